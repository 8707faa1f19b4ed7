"""Riverrun's models in lm-evaluation-harness, as `--model riverrun --model_args path=RUN_OR_FOLDER`.

Importing this module registers the name. It needs the package `lm-eval` (pip install 'riverrun[eval]').

Requests are packed one behind the other in a row, each a document of its own: nothing is padded, so that a batch's
numbers do not depend on its other requests. Documents for perplexity are streamed through the recurrent state, however
long they are; with `max_length` they are cut into the harness's windows instead, as it does for transformers.
"""

from collections.abc import Sequence
from typing import Any

import lm_eval.models  # noqa: F401 - which registers the harness's own ones: it does so only if none are there yet
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import StoppingCriteria, StoppingCriteriaList

from riverrun.eval.decoding.generate import PREFILL_CHUNK, Sampling, generate
from riverrun.eval.losses import token_losses
from riverrun.eval.models import load_model
from riverrun.kernels.linear_cross_entropy import tokens_of_chunk
from riverrun.modeling.layout import Layout
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.train.data.tokenizer import Tokenizer

Scored = tuple[float, bool]
"""The log-probability of a continuation in nats, and whether greedy decoding gives it."""


@register_model("riverrun")
class RiverrunLM(TemplateLM):
    """
    Args:
        path: a run folder, or a folder that holds a model of Riverrun's.
        step: which checkpoint of a run; default: the newest intact one.
        batch_size: requests that are scored at a time.
        max_length: tokens of a request, at most, the last ones; default: all, however many there are.
        max_gen_toks: new tokens where a task does not say.
        num_steps: how often the core of a model of recurrent depth runs; default: as often as on average in training.
            The harness's own cache of answers (--use_cache) does not know it: give each depth a cache of its own.

    Raises:
        ValueError: as `load_model` does; a model that is not Riverrun's.
    """

    def __init__(
        self,
        path: str,
        step: int | str | None = None,
        device: str = "auto",
        dtype: str | None = None,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        num_steps: int | str | None = None,
    ):
        super().__init__()
        loaded = load_model(path, device=device, dtype=dtype, step=_number(step), num_steps=_number(num_steps))
        if not isinstance(loaded.model, RiverrunForCausalLM):
            raise ValueError(f"{loaded.description} is not a Riverrun model: use --model hf for it")
        self.loaded, self.model = loaded, loaded.model
        self.text: Tokenizer = loaded.require_tokenizer()
        self.batch_size = 16 if isinstance(batch_size, str) and batch_size.startswith("auto") else int(batch_size)
        self.max_length, self.max_gen_toks = max_length and int(max_length), int(max_gen_toks)

    @property
    def eot_token_id(self) -> int:
        return self.text.eos_id

    @property
    def tokenizer_name(self) -> str:
        """What the harness keys its cache of requests by."""
        return self.text.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.text.encode(string)

    def get_model_info(self) -> dict[str, Any]:
        """For the harness's results."""
        return {
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_dtype": str(self.loaded.dtype),
            "model_sha": self.loaded.fingerprint,
        }

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[Scored]:
        found: dict[int, Scored] = {i: (0.0, True) for i, request in enumerate(requests) if not request[2]}
        order = sorted(set(range(len(requests))) - set(found), key=lambda i: -len(requests[i][1] + requests[i][2]))
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            scores = self._score([requests[i][1] for i in part], [requests[i][2] for i in part])
            found |= dict(zip(part, scores))
            for i in part:
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
        return [found[i] for i in range(len(requests))]

    @torch.no_grad()
    def _score(self, contexts: list[list[int]], continuations: list[list[int]]) -> list[Scored]:
        inputs: list[list[int]] = []
        places: list[int] = []
        targets: list[int] = []
        length = 0
        for context, continuation in zip(contexts, continuations):
            tokens = context + continuation
            tokens = tokens if self.max_length is None else tokens[-self.max_length - 1 :]
            if len(continuation) >= len(tokens):
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens leaves no context within "
                    f"max_length={self.max_length}: raise it"
                )
            inputs.append(tokens[:-1])
            length += len(tokens) - 1
            places += range(length - len(continuation), length)
            targets += continuation
        device = self.loaded.device
        bounds = torch.tensor([0, *map(len, inputs)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        layout = Layout.of_documents((1, length), bounds.to(device))
        ids = torch.tensor([[token for row in inputs for token in row]], device=device)
        hidden = self.model.hidden_states(ids, layout)[0, torch.tensor(places, dtype=torch.long, device=device)]
        wanted = torch.tensor(targets, dtype=torch.long, device=device)
        scores, greedy = [], []
        rows = tokens_of_chunk(hidden, self.loaded.vocab_size)
        for states, target in zip(hidden.split(rows), wanted.split(rows)):
            logits = self.model.lm_head(states).to(torch.promote_types(states.dtype, torch.float32))
            scores.append(logits.log_softmax(-1).gather(1, target[:, None])[:, 0])
            greedy.append(logits.argmax(-1) == target)
        lengths = list(map(len, continuations))
        sums = (part.double().sum().item() for part in torch.cat(scores).split(lengths))
        return list(zip(sums, (bool(part.all()) for part in torch.cat(greedy).split(lengths))))

    @torch.no_grad()
    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        found = []
        for (text,) in (request.args for request in requests):
            tokens = self.text.encode(text)
            if self.max_length is None:
                score = self._stream([self.prefix_token_id, *tokens])
            else:
                windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
                pairs = [(None, *make_disjoint_window(window)) for window in windows]
                score = sum(value for value, _ in self._loglikelihood_tokens(pairs))
            found.append(score)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), score)
        return found

    def _stream(self, tokens: list[int]) -> float:
        """log p of all tokens but the first, in constant memory."""
        cache, ids = self.model.make_cache(), torch.tensor([tokens], device=self.loaded.device)
        total = 0.0
        for inputs, targets in zip(ids[:, :-1].split(PREFILL_CHUNK, 1), ids[:, 1:].split(PREFILL_CHUNK, 1)):
            total -= token_losses(self.model, inputs, targets, cache=cache).double().sum().item()
        return total

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        found = []
        for request in requests:
            context, options = request.args
            options = dict(options)
            until = options.pop("until", None) or []
            until = [until] if isinstance(until, str) else list(until)
            most = int(options.pop("max_gen_toks", self.max_gen_toks))
            sampling = Sampling(
                temperature=options.get("temperature") or 1.0,
                top_k=options.get("top_k"),
                top_p=options.get("top_p", 1.0),
                greedy=not options.get("do_sample", False) or not options.get("temperature", 1.0),
            )
            prompt = self.text.encode(context) or [self.prefix_token_id]
            if self.max_length is not None:
                prompt = prompt[-max(1, self.max_length - most) :]
            stop = StoppingCriteriaList([Until(until, self.text, len(prompt))])
            eos = self.text.eos_id
            made = generate(self.model, prompt, sampling, max_new_tokens=most, eos_id=eos, stopping=stop).tokens[0]
            text = self.text.decode(made[:-1] if made and made[-1] == eos else made)
            for end in until:
                text = text.split(end)[0] if end else text
            found.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return found


def _number(text: int | str | None) -> int | None:
    return None if text is None else int(text)


class Until(StoppingCriteria):
    """Stops a row as soon as its new text holds one of `ends`."""

    def __init__(self, ends: list[str], text: Tokenizer, prompt: int):
        self.ends, self.text, self.prompt = [end for end in ends if end], text, prompt
        self.reach = max((len(end.encode()) for end in self.ends), default=0) + 4  # tokens, a character's bytes besides

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        tails = (self.text.decode(row) for row in input_ids[:, self.prompt :][:, -self.reach :].tolist())
        return torch.tensor([any(end in tail for end in self.ends) for tail in tails], device=input_ids.device)
