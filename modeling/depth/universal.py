"""`UniversalModel`: the Universal Transformer (Dehghani et al. 2018, arXiv 1807.03819), as a causal language model.

All of the model's layers form one block, which is applied to every position up to T = `max_steps` times:

    x_t = s_{t−1} + P^t,    s_t = block(x_t)    of positions that have not halted,    s_t = s_{t−1}    of the others

with s_0 the embedding and P^t sinusoids of place and step, added anew at each step (equations 4 to 6 there):

    P^t[pos, 2j] = sin(pos / 10000^(2j/h)) + sin(t / 10000^(2j/h)),    P^t[pos, 2j + 1] the same with cosines

The block is norm(x + mixer(x)), then norm(x + mlp(x)) (`norm="post"`), with RMSNorm for the paper's LayerNorm and any
mixers; of several layers each step adds P^t before the first. Positions halt one by one (`modeling.depth.halting`):
what comes out is the mean of their states under the halting weights, or s_T where none halts. The final norm of our
other models comes after that. Embeddings that are much smaller than P^t learn slowly: `scale_embedding` with the
initializer "takase" makes them nearly as large.

A halted position stays as it is and can still be attended to: every step runs on all positions, and its result is
dropped where they have halted. So decoding has states of its own at each step, of halted tokens as well, and equals
the full forward pass. The loop ends early where all positions of a pass have halted, unless later tokens are to read
what further steps leave (a cache), or other ranks take part: they would wait. FLOPs are therefore counted for all T
steps, an upper bound.

In training the places of a row can start anywhere (`random_offset`), as in the paper's study of length generalisation,
so that a model learns to use differences of places. The offset is a function of the row's key alone.
"""

import math
from collections import UserList
from collections.abc import Callable

import torch
from torch import nn

from riverrun.modeling.block import Block
from riverrun.modeling.cache import RiverrunCache
from riverrun.modeling.depth.halting import Halting, Progress
from riverrun.modeling.layers import RMSNorm
from riverrun.modeling.layout import Layout
from riverrun.modeling.mixers import States
from riverrun.modeling.options import ModelOptions
from riverrun.modeling.parallel.mesh import ALONE, Axis
from riverrun.modeling.stack import Stack, block_flops, leave_mixer_eager
from riverrun.modeling.statistics import note

LONGEST_WAVE = 10_000.0  # over 2π, in positions
GOLDEN_RATIO = 0x9E3779B97F4A7C15 - 2**64  # its fractional part, of 64 bits, as a signed number


class PostNormBlock(Block):
    """norm(x + mixer(x)), then norm(x + mlp(x)): the order of the first transformers (arXiv 1706.03762)."""

    def forward(self, x: torch.Tensor, layout: Layout, states: States | None = None) -> torch.Tensor:
        x = self.mixer_norm(x + self._leave(self.mixer(self._enter(x, layout), layout, states)))
        return self.mlp_norm(x + self._leave(self.mlp(self._enter(x, layout)))) if self.has_mlp else x


class UniversalCore(nn.Module):
    """The shared block and the loop over steps. ZeRO-3 gathers its parameters once a pass, not at each step."""

    fetched_whole = True
    tp: Axis = ALONE

    def __init__(self, options: ModelOptions):
        super().__init__()
        assert options.universal is not None
        self.options = options.universal
        block = PostNormBlock if self.options.norm == "post" else Block
        self.layers = nn.ModuleList(block(options, mixer) for mixer in options.layers)
        self.halting: Halting | None = None
        if self.options.halting == "act":
            self.halting = Halting(options.hidden_size, options.initializer_range)

    def forward(
        self,
        s: torch.Tensor,
        places: torch.Tensor | None,
        layout: Layout,
        run: Callable[..., torch.Tensor],
        states: list[States] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """s_0 (…, h) → the model's output (…, h), and what each position's pondering costs, N + R (…).

        Args:
            places: (…, h) the part of P^t that all steps share; None: there is none.
            run: `Stack.run`, which runs the layers once.
            states: of step t's layer l at t · layers + l; None: there are no tokens before.
        """
        clock = sinusoids(torch.arange(1, self.options.max_steps + 1, device=s.device), s)
        progress, mean, size = None, torch.zeros_like(s), len(self.layers)
        for t in range(self.options.max_steps):
            x = s + clock[t] if places is None else s + (places + clock[t])
            new = run(self.layers, x, layout, None if states is None else states[t * size : (t + 1) * size])
            if self.halting is None:
                s = new
                continue
            p = self.halting(x)
            before = progress or Progress.start(p)
            weight, progress = before.step(p, self.options.epsilon, last=t + 1 == self.options.max_steps)
            s = torch.where(before.running[..., None], new, s)
            mean = mean + weight[..., None].to(s.dtype) * s
            if states is None and self.tp.size == 1 and layout.context is None and not progress.running.any():
                break
        if progress is None:
            return s, None
        if self.training:
            note("halting_steps", progress.steps.sum(), progress.steps.numel())
            note("halting_remainder", progress.remainder.sum(), progress.remainder.numel())
        return mean, progress.cost


class UniversalModel(Stack):
    """Embedding, the loop over the shared block, and the final norm."""

    def __init__(self, options: ModelOptions):
        super().__init__(options)
        self.core = UniversalCore(options)
        self.universal = self.core.options
        self.norm = RMSNorm(options.hidden_size, options.norm_eps)

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks that all steps share, in the order of `options.layers`."""
        return self.core.layers

    def forward(
        self,
        input_ids: torch.Tensor,
        layout: Layout,
        cache: RiverrunCache | None = None,
        states: UserList | None = None,
        row_keys: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """input_ids (B, T) → hidden states (B, T, hidden_size) after the final norm, and (B, T) what each position's
        pondering costs, None where none halts.

        Under tensor parallelism both are of this rank's part of the flattened tokens.

        Raises:
            ValueError: `states`; no `row_keys` in training with a random offset; a cache of another model.
        """
        if states is not None:
            raise ValueError(
                "a Universal Transformer cannot pass states from row to row, which would be those of every step: set "
                "train.state_passing.mode='off'"
            )
        x = self.embed(input_ids)
        self.prepare_attention(layout, cache, x.dtype)
        slots = None if cache is None else self._slots(cache)
        x, cost = self.core(x, self._places(layout, row_keys, x), layout, self.run, slots)
        if cache is not None:
            cache.advance(layout.positions, layout.sequence)
        return self.norm(x), cost

    def _places(self, layout: Layout, row_keys: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
        """Sinusoids of the positions of this rank's tokens, like the embedding."""
        if self.universal.positions != "sinusoidal":
            return None
        positions = layout.positions
        if self.training and self.universal.random_offset:
            if row_keys is None:
                raise ValueError(
                    "universal.random_offset draws the offset of each row in training from its key: give row_keys, or "
                    "set it to 0"
                )
            positions = positions + offsets(row_keys, self.universal.random_offset)[:, None]
        if self.tp.size > 1:
            positions = positions.flatten()[self.tp.share(positions.numel())]
        return sinusoids(positions, like)

    def _slots(self, cache: RiverrunCache) -> list[States]:
        """A cache's states, of each step's layers."""
        if len(cache.layers) != self.universal.max_steps * len(self.layers):
            raise ValueError("a Universal Transformer needs a cache with states for each step: model.make_cache()")
        return cache.layers

    def make_cache(self, slots: int | None = None) -> RiverrunCache:
        """An empty cache for decoding: states of every layer at every step.

        Raises:
            ValueError: `slots` is given: steps cannot share them, for halted tokens would be forgotten.
        """
        if slots is not None:
            raise ValueError(
                "slots of a cache are shared by iterations of a core (model.depth); the steps of a Universal "
                "Transformer (model.universal) each need their own: leave slots out"
            )
        return RiverrunCache(self.universal.max_steps * len(self.layers))

    def compile_blocks(self) -> None:
        """See `RiverrunForCausalLM.compile_blocks`."""
        for block in self.layers:
            leave_mixer_eager(block)
            block.compile()

    def flops_per_token(self, seq_len: int) -> float:
        """Of the forward pass, without the head, if every position takes all steps."""
        return self.universal.max_steps * block_flops(self.layers, seq_len)

    def state_bytes(self, seq_len: int) -> int:
        """Bytes of decoding state a sequence after `seq_len` tokens."""
        once = sum(block.mixer.state_bytes(seq_len) for block in self.layers)  # type: ignore[operator, union-attr]
        return self.universal.max_steps * once


def sinusoids(places: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """places (…) → (…, channels), of the channels and type of `like`: sine and cosine in turn, of waves that are from
    2π to 2π · 10000 places long."""
    channels, exact = like.shape[-1], torch.promote_types(like.dtype, torch.float32)
    pair = torch.arange(0, channels, 2, device=places.device, dtype=exact)
    angle = places[..., None].to(exact) * torch.exp(-math.log(LONGEST_WAVE) * pair / channels)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)[..., :channels].to(like.dtype)


def offsets(row_keys: torch.Tensor, largest: int) -> torch.Tensor:
    """A number in 0 … largest for each key (B,): keys that follow each other give a golden-ratio sequence, which
    spreads evenly over them."""
    part = (row_keys * GOLDEN_RATIO >> 32) & (2**32 - 1)  # of 2³²
    return part * (largest + 1) >> 32
