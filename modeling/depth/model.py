"""`DepthModel`: prelude, recurrent core and coda (Geiping et al. 2025, arXiv 2502.05171)."""

from collections import UserList

import torch
from torch import nn

from riverrun.modeling.block import Block
from riverrun.modeling.cache import RiverrunCache
from riverrun.modeling.depth.cache import DepthCache
from riverrun.modeling.depth.core import RecurrentCore
from riverrun.modeling.depth.initial_state import initial_state
from riverrun.modeling.layers import RMSNorm
from riverrun.modeling.layout import Layout
from riverrun.modeling.options import ModelOptions
from riverrun.modeling.stack import Stack, block_flops, block_state_bytes, leave_mixer_eager


class DepthModel(Stack):
    """e = prelude(embed(x)); s_i = core(s_{i−1}, e), i = 1 … r; norm(coda(norm(s_r))), with one norm in both places, or
    only in the last without `DepthOptions.norm_core`.

    The steps are methods too, for decoding that runs them in another order: `embed`, `prepare_attention`, `run` of the
    prelude's blocks, `initial_state`, `core.iterate`, `finish`.
    """

    def __init__(self, options: ModelOptions):
        super().__init__(options)
        assert options.depth is not None
        self.depth = options.depth
        first, last = self.depth.prelude_layers, options.num_hidden_layers - self.depth.coda_layers
        mixers = options.layers
        self.prelude = nn.ModuleList(Block(options, mixer) for mixer in mixers[:first])
        self.core = RecurrentCore(options, mixers[first:last])
        self.coda = nn.ModuleList(Block(options, mixer) for mixer in mixers[last:])
        self.norm = RMSNorm(options.hidden_size, options.norm_eps)

    @property
    def layers(self) -> list[nn.Module]:
        """All blocks, in the order of `options.layers`."""
        return [*self.prelude, *self.core.layers, *self.coda]

    def forward(
        self,
        input_ids: torch.Tensor,
        layout: Layout,
        cache: RiverrunCache | None = None,
        states: UserList | None = None,
        steps: tuple[int, int] | None = None,
        row_keys: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """input_ids (B, T) → hidden states (B, T, hidden_size) after the final norm.

        Args:
            cache: a `DepthCache`, which is updated in place.
            states: refused: rows do not go on from others' states here.
            steps: iterations of the core without and with a gradient; None: `mean_recurrence`, without.
            row_keys: see `initial_state`.

        Raises:
            ValueError: `states`; a cache of another kind or of another number of iterations.
        """
        if states is not None:
            raise ValueError(
                "a model of recurrent depth cannot pass states from row to row: how many its core has varies with the "
                "number of iterations; set train.state_passing.mode='off'"
            )
        n, k = self.depth.steps(None, training=False) if steps is None else steps
        iterations = None
        if cache is not None:
            if not isinstance(cache, DepthCache):
                raise ValueError(
                    "this cache has no room for the iterations of a model of recurrent depth: make one by "
                    "model.make_cache(), or set use_cache=True"
                )
            iterations = cache.iterations(n + k)
        x = self.embed(input_ids)
        self.prepare_attention(layout, cache, x.dtype)
        e = self.run(self.prelude, x, layout, None if cache is None else cache.layers)
        s = self.initial_state(e, layout, row_keys)
        s = self.core(e, s, layout, n, k, iterations, self.recompute and self.training)
        return self._finish(s, layout, cache)

    def initial_state(self, e: torch.Tensor, layout: Layout, row_keys: torch.Tensor | None = None) -> torch.Tensor:
        """s_0 for the prelude's output e, like it (B, T, h) or, under tensor parallelism, of this rank's tokens."""
        return initial_state(layout, row_keys, e, self.depth.initial_std, self.tp)

    def finish(self, s: torch.Tensor, layout: Layout, cache: DepthCache | None = None) -> torch.Tensor:
        """What comes after the last iteration: read-out, norm, coda, norm. Notes the tokens in the cache."""
        return self._finish(self.core.injection.read_out(s), layout, cache)

    def _finish(self, s: torch.Tensor, layout: Layout, cache: DepthCache | None) -> torch.Tensor:
        coda = None if cache is None else cache.layers[len(self.prelude) : cache.outside]
        x = self.run(self.coda, self.norm(s) if self.depth.norm_core else s, layout, coda)
        if cache is not None:
            cache.advance(layout.positions, layout.sequence)
        return self.norm(x)

    def make_cache(self, slots: int | None = None) -> DepthCache:
        """An empty cache for decoding; see `DepthCache`."""
        return DepthCache(len(self.prelude) + len(self.coda), len(self.core.layers), slots)

    def compile_blocks(self) -> None:
        """See `RiverrunForCausalLM.compile_blocks`."""
        for block in (*self.prelude, *self.coda):
            leave_mixer_eager(block)
            block.compile()
        self.core.compile_iteration()

    def flops_per_token(self, seq_len: int, iterations: float | None = None) -> float:
        """Of the forward pass, without the head, with so many iterations; None: `mean_recurrence`."""
        r = self.depth.mean_recurrence if iterations is None else iterations
        once = block_flops((*self.prelude, *self.coda), seq_len) + self.core.call_flops()
        return once + r * self.core.step_flops(seq_len)

    def state_bytes(self, seq_len: int) -> int:
        """Bytes of decoding state a sequence after `seq_len` tokens, when every iteration has its own."""
        outside = block_state_bytes((*self.prelude, *self.coda), seq_len)
        return outside + self.depth.mean_recurrence * block_state_bytes(self.core.layers, seq_len)
