"""`RiverrunForCausalLM`: embedding, blocks, head. The model that trains is the model that is saved."""

import math
from collections import UserList
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from riverrun.kernels.linear_cross_entropy import linear_cross_entropy
from riverrun.modeling.cache import RiverrunCache
from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.depth.counts import RecurrenceDistribution
from riverrun.modeling.depth.model import DepthModel
from riverrun.modeling.depth.universal import UniversalModel
from riverrun.modeling.layout import Layout
from riverrun.modeling.mixers import MIXERS, States
from riverrun.modeling.parallel.context import Context
from riverrun.modeling.parallel.loss import sharded_cross_entropy
from riverrun.modeling.stack import RiverrunModel

# what transformers calls the cache in a model's output: the first from 5.24 on
CACHE = next(name for name in ("cache", "past_key_values") if name in CausalLMOutputWithPast.__dataclass_fields__)


@dataclass
class CausalLMOutput(CausalLMOutputWithPast):
    """transformers' output, and what training needs besides.

    Attributes:
        cross_entropy: summed next-token cross-entropy in nats, without z-loss, detached.
        token_losses: (B, T) that of every prediction, 0 where there is no target, if they were asked for.
        states: of every layer after the rows' last tokens, by name (B, …), detached, if states were given.
    """

    cross_entropy: torch.Tensor | None = None
    token_losses: torch.Tensor | None = None
    states: list[States] | None = None


class RiverrunForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model over a `RiverrunConfig`; trains, decodes with a constant-size recurrent state, saves itself."""

    config_class = RiverrunConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False  # `set_recompute` instead
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _no_split_modules = ["Block", "RecurrentCore"]
    _keep_in_fp32_modules_strict = [
        "A_log", "dt_bias", "D", "alpha_bias", "theta_bias", "eta_bias", "delta_bias", "gamma_bias", "feature_scale",
    ]  # fmt: skip
    _supports_sdpa = True
    _is_stateful = True  # states cannot be rolled back: no assisted or contrastive decoding

    def __init__(self, config: RiverrunConfig):
        super().__init__(config)
        options = config.options
        body = DepthModel if options.depth is not None else UniversalModel if options.universal else RiverrunModel
        self.model: Any = body(options)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: RiverrunCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        cu_seqlens: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        num_targets: torch.Tensor | int | None = None,
        z_loss: float = 0.0,
        token_losses: bool = False,
        context: Context | None = None,
        states: list[States] | None = None,
        prefix: torch.Tensor | int | None = None,
        num_steps: int | tuple[int, int] | None = None,
        row_keys: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CausalLMOutput | tuple:
        """Logits, or the training loss without ever materialising all logits.

        Args:
            input_ids: (B, T) tokens.
            attention_mask: (B, T), or (B, seen + T) with a cache: 0 at left padding.
            past_key_values: the cache that an earlier call returned; updated in place.
            labels: (B, T) transformers' convention: the inputs themselves, shifted here; −100 is ignored.
            use_cache: return a cache. Default: only if one is given.
            logits_to_keep: compute logits for that many last positions only; 0: all.
            cu_seqlens: (S + 1,) int32 bounds of packed documents over the flattened B·T tokens; row starts are bounds.
            targets: (B, T) the token to predict at each position, already shifted; −100 is ignored. The training
                loop's way: no logits are returned.
            num_targets: what the summed loss is divided by; default: the number of targets here.
            z_loss: weight of the squared log-partition, added to `loss`.
            token_losses: compute the cross-entropy of every single one of `targets` instead of the loss. Not of a model
                that several ranks share.
            context: the rows lie on several context-parallel ranks, and the tokens and targets given are this rank's
                shard of them. In training and evaluation only; it takes the place of `cu_seqlens`.
            states: of every layer, what each row's first document starts from, by the names that a cache has them by,
                (B, …); an empty dictionary: zeros. Keys and values of attention are not among them: it sees the row.
                In training only; the states after the rows are returned.
            prefix: how many of each row's first tokens, padding counted, prefix linear attention reads without
                causality: a number, or (B,) of them. They must all be in the first call of a cache. None or 0: none.
            num_steps: how often the core of a model of recurrent depth runs: r, or (n, k) iterations without and with
                a gradient. Of r, the last `depth.backprop_depth` have a gradient in training mode, none have elsewhere.
                None: `depth.mean_recurrence`.
            row_keys: (B,) int64, what the core's initial states are drawn from, along with the tokens' places in their
                rows. In training, where each row is to have its own. None: they follow from positions alone, so that a
                text reads the same wherever it stands. Of a Universal Transformer, what the rows' offsets in training
                are drawn from.

        A Universal Transformer's `loss` counts what pondering costs, `model.universal.ponder_weight` times the mean
        over targets of N + R; not that of `labels` in evaluation mode, from which perplexities are computed.

        Where several ranks share weights or rows, the loss is this rank's part: that of all is the sum over the ranks.

        Returns:
            `loss` and `cross_entropy` if there are targets; `logits` (B, T or logits_to_keep, vocab_size) unless
            `targets` was given; `past_key_values` if a cache is used.

        Raises:
            ValueError: labels and targets together; a packed batch with a filled cache; padding on the right; logits or
                a cache of a model that several ranks share; `num_steps` or `row_keys` of a model of fixed depth, or
                `states` of one of recurrent depth.
        """
        if labels is not None and targets is not None:
            raise ValueError("give either labels (shifted here) or targets (already shifted), not both")
        tp = self.model.tp
        if (tp.size > 1 or context is not None) and (targets is None or past_key_values is not None or use_cache):
            raise ValueError(
                "a model that several ranks share (parallel.tp or parallel.cp above 1) computes only the loss of "
                "`targets`: export it to generate or to get logits"
            )
        if context is not None and (alone := {m for m in self.model.options.layers if not MIXERS[m].context_parallel}):
            raise ValueError(
                f"{', '.join(sorted(alone))} cannot share rows among ranks (they do not heed layout.context): "
                "set parallel.cp=1"
            )
        cache = past_key_values
        if cache is None and use_cache:
            cache = self.make_cache()
        if context is not None:
            layout = Layout.of_shard(context)
        else:
            layout = self._layout(input_ids, attention_mask, cu_seqlens, cache)
        if prefix is not None:
            layout.prefix = self._prefix(prefix, input_ids, cache, context)
        if states is not None:
            assert cache is None and context is None, "states are what training keeps in place of a cache"
        # DeepSpeed's stage 3 copies lists among arguments, and waits for gradients of tensors in lists and dicts there,
        # which states do not get: hence UserList and UserDict
        carried = None if states is None else UserList(states)
        hidden = self.model(input_ids, layout, cache, carried, **self._iterations(num_steps, row_keys))
        hidden, pondering = hidden if isinstance(hidden, tuple) else (hidden, None)
        states = None if carried is None else carried.data

        if token_losses:
            if pondering is not None and self.training and self.config.options.universal.ponder_weight:
                raise ValueError(
                    "the losses of single predictions leave out what pondering costs: set "
                    "model.universal.ponder_weight=0, or train.objective='lm'"
                )
            return CausalLMOutput(token_losses=self._token_losses(hidden, targets), states=states)
        logits = loss = cross_entropy = None
        if targets is None:
            logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        if labels is not None:
            targets = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
        if targets is not None:
            weight, targets = self.lm_head.weight, targets.flatten()
            if tp.size == 1:
                out = linear_cross_entropy(hidden.flatten(0, 1), weight, targets, z_loss=z_loss)
            else:
                out = sharded_cross_entropy(hidden, weight, targets, tp, z_loss=z_loss, ignore_index=-100)
            loss = out.loss + out.z_loss
            if pondering is not None and (self.training or labels is None):
                loss = loss + self._ponder_loss(pondering, targets)
            loss = loss / (out.num_targets if num_targets is None else num_targets)
            cross_entropy = out.loss.detach()
        result = CausalLMOutput(
            loss=loss,
            logits=logits,
            cross_entropy=cross_entropy,
            states=states,
            **{CACHE: cache},  # type: ignore[arg-type]
        )
        return result.to_tuple() if return_dict is False else result

    def _iterations(self, num_steps: int | tuple[int, int] | None, row_keys: torch.Tensor | None) -> dict[str, Any]:
        """What a body of recurrent depth is given besides, and one of fixed depth is not."""
        if isinstance(self.model, DepthModel):
            return {"steps": self.model.depth.steps(num_steps, self.training), "row_keys": row_keys}
        if self.config.options.universal is not None and num_steps is None:
            return {"row_keys": row_keys}
        if num_steps is not None or row_keys is not None:
            raise ValueError(
                "num_steps and row_keys are for models of recurrent depth (model.depth), whose core runs several "
                "times: leave them out"
            )
        return {}

    def _ponder_loss(self, cost: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The weighted cost of this rank's positions that have a target, of all targets (N,), summed."""
        asked = targets[self.model.tp.share(len(targets))] != -100
        return self.config.options.universal.ponder_weight * (cost.flatten() * asked).sum()

    def _token_losses(self, hidden: torch.Tensor, targets: torch.Tensor | None) -> torch.Tensor:
        assert targets is not None and self.model.tp.size == 1
        out = linear_cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten(), reduction="none")
        return out.loss.view(targets.shape)

    def _layout(self, input_ids, attention_mask, cu_seqlens, cache) -> Layout:
        B, T = input_ids.shape
        fresh = cache is None or cache.seen == 0
        if cu_seqlens is not None:
            if not fresh:
                raise ValueError("packed documents (cu_seqlens) cannot continue a cache: they start new sequences")
            return Layout.of_documents((B, T), cu_seqlens)
        if attention_mask is not None and attention_mask.dim() == 2:
            new = attention_mask[:, -T:]
            if not (T == 1 and not fresh) and not bool(new.all()):
                if not fresh:
                    raise ValueError("only the first call of a cache can hold padding: pad the prompts on the left")
                return Layout.of_left_padded(new)
        start = input_ids.new_zeros(B) if fresh else cache.next_position
        return Layout.of_rows((B, T), start)

    def _prefix(self, prefix, input_ids, cache, context) -> torch.Tensor | None:
        """`Layout.prefix`; see `forward`."""
        B, T = input_ids.shape
        longest = prefix if isinstance(prefix, int) else int(prefix.max())
        if longest == 0:
            return None
        if not self.config.options.reads_prefix:
            raise ValueError(
                "no layer of this model can read a prefix: leave `prefix` out, or build one with layers of "
                "prefix_linear_attention and its `encoder`"
            )
        if context is not None:
            raise ValueError("rows that several ranks share (parallel.cp above 1) cannot have a prefix: set it to 0")
        if (cache is not None and cache.seen) or longest > T:
            raise ValueError(
                f"a prefix must lie within the first call of a cache, and this call has {T} tokens after "
                f"{0 if cache is None else cache.seen}: give the whole prefix at once, or a shorter one"
            )
        ends = prefix if isinstance(prefix, int) else prefix.to(input_ids.device)[:, None]
        return (torch.arange(T, device=input_ids.device) < ends).expand(B, T)

    # training

    def set_recompute(self, enabled: bool) -> None:
        """Recompute each block's activations in the backward pass (non-reentrant) instead of storing them."""
        self.model.recompute = enabled

    def compile_blocks(self) -> None:
        """torch.compile every block in place, of a core one iteration; parameter names stay as they are.

        Recurrent mixers stay eager: their chunk layout follows the documents of each batch, on the host.
        """
        self.model.compile_blocks()

    def flops_per_token(self, seq_len: int) -> float:
        """Forward FLOPs a token: 2 a matrix parameter (the head counted, the embedding look-up not) plus what the
        mixers do beyond their matrices (`Mixer.mixing_flops`), those of a core as often as it runs on average. Training
        costs three times that where everything has a gradient; recompute is not counted, so that MFU is model FLOPs,
        not hardware FLOPs."""
        return 2.0 * self.lm_head.weight.shape[0] * self.lm_head.weight.shape[1] + self.model.flops_per_token(seq_len)

    def training_flops_per_token(self, seq_len: int, num_steps: tuple[float, float] | None = None) -> float:
        """FLOPs a token of training, without recompute: three times those of the forward pass, but for a core's
        iterations without a gradient, which are only computed forward.

        Args:
            num_steps: (n, k) iterations without and with a gradient, if they are not those of the distribution's mean.
        """
        if not isinstance(self.model, DepthModel):
            return 3 * self.flops_per_token(seq_len)
        n, k = RecurrenceDistribution(self.model.depth).mean_steps if num_steps is None else num_steps
        return 3 * (2.0 * self.lm_head.weight.numel() + self.model.flops_per_token(seq_len, iterations=k + n / 3))

    def state_bytes(self, seq_len: int) -> int:
        """Bytes of decoding state a sequence after `seq_len` tokens."""
        return self.model.state_bytes(seq_len)

    # decoding

    def hidden_states(
        self, input_ids: torch.Tensor, layout: Layout, cache: RiverrunCache | None = None
    ) -> torch.Tensor:
        """(B, T, hidden_size) of tokens after the final norm, which `lm_head` makes logits of."""
        out = self.model(input_ids, layout, cache)
        return out[0] if isinstance(out, tuple) else out

    def make_cache(self, slots: int | None = None) -> RiverrunCache:
        """An empty cache.

        Args:
            slots: of a core that runs several times, how many sets of states its iterations share, the t-th the set
                t mod slots (see `modeling.depth.cache`); None: each has its own, as in the full forward.

        Raises:
            ValueError: `slots` below 1, or of a model of fixed depth.
        """
        return self.model.make_cache(slots)

    # transformers

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        params = list(module.parameters(recurse=False))
        if params and all(getattr(p, "_is_hf_initialized", False) for p in params):
            return  # loaded from a checkpoint
        if isinstance(module, nn.Linear | nn.Embedding):
            self._init_matrix(module.weight, getattr(module, "writes_residual", False))
        elif (reset := getattr(module, "reset_parameters", None)) is not None:
            reset()

    def _init_matrix(self, weight: torch.Tensor, writes_residual: bool) -> None:
        """Normal; where it writes into the residual stream, so small that its variance does not grow with depth.

        Takase et al. (2023, arXiv 2312.16903) as Huginn has it (2502.05171, §4.1): σ² = 2/(5h), of what writes into the
        stream 1/(5·h·layers), cut off at 3σ. Layers count as often as they run.
        """
        options = self.config.options
        if options.initializer == "takase":
            h = options.hidden_size
            std = math.sqrt(1 / (5 * h * options.effective_layers) if writes_residual else 2 / (5 * h))
            nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
            return
        std = options.initializer_range
        if writes_residual:
            std /= math.sqrt(options.effective_layers * (2 if options.intermediate_size else 1))
        nn.init.normal_(weight, std=std)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate() leaves the cache to `forward`

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids, past_key_values=None, attention_mask=None, use_cache=True, prefix=None, num_steps=None,
        cache=None, **kwargs,
    ):  # fmt: skip
        cache = past_key_values if cache is None else cache  # the name from transformers 5.24 on
        fresh = cache is None or cache.seen == 0
        if not fresh:
            input_ids = input_ids[:, cache.seen :]
        return {
            "prefix": prefix if fresh else None,
            "num_steps": num_steps,
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "past_key_values": cache,
            "use_cache": use_cache,
            "logits_to_keep": 1,
        }

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        """Transformers from 5.24 on looks for `cache` in the outputs, those before for `past_key_values`."""
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        cache = getattr(outputs, CACHE)
        return model_kwargs if cache is None else model_kwargs | {"cache": cache}
