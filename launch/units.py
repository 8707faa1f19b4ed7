"""The parts of a micro batch whose activations are kept and given up together: blocks, and iterations of a core."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from riverrun.launch.core_footprint import core_footprint
from riverrun.launch.footprint import Footprint, block_footprint
from riverrun.launch.passes import ONCE, Passes, core_layers, most_graded, passes
from riverrun.modeling.options import ModelOptions

Parts = Sequence[tuple[str, Footprint]]


@dataclass(frozen=True)
class Moment:
    """A moment at which memory can be at its peak.

    Attributes:
        kept: bytes of this unit that stay until its backward pass.
        working: what is at work besides.
        inside: of states inside kernels.
        backward: gradients of weights are made.
        late: the backward pass of the whole has begun.
    """

    name: str
    kept: float
    working: float
    inside: float
    backward: bool = False
    late: bool = False


@dataclass(frozen=True)
class Unit:
    """What is computed at once and, under recompute, once more before its backward pass.

    Attributes:
        name: for the user.
        parts: blocks and others, in the order of the forward pass.
        recompute: only its input is kept.
        repeated: its weights are those of several units.
        beside: another hidden state stays with it.
    """

    name: str
    parts: Parts
    recompute: bool = False
    repeated: bool = False
    beside: bool = False

    def kept(self, tokens: int) -> float:
        """Bytes from its forward pass to its backward pass."""
        return self.parts[0][1].entered(tokens) if self.recompute else sum(part.saved(tokens) for _, part in self.parts)

    def moments(self, tokens: int, grown: float, added: float) -> Iterator[Moment]:
        """
        Args:
            grown: bytes of the gradient of its output, while it is computed again.
            added: of gradients that wait for those of other units with the same weights.
        """
        entered, stack = self.kept(tokens) if self.recompute else 0.0, 0.0
        for name, part in self.parts:  # `stack`: what the parts before have saved
            (forward, inside), (backward, inside_backward) = (
                way.peak(tokens / part.row) for way in (part.forward, part.backward)
            )
            full = f"{self.name}{name}"
            yield Moment(f"forward of {full}", 0.0 if self.recompute else stack, forward - inside, inside)
            if self.recompute:
                again = stack + forward + grown + added - inside
                yield Moment(f"recompute of {full}", 0.0, again, inside, late=True)
            kept = entered if self.recompute else stack + part.saved(tokens)
            working = stack + backward + added - kept - inside_backward
            yield Moment(f"backward of {full}", kept, working, inside_backward, backward=True, late=True)
            stack += part.saved(tokens)


def units(options: ModelOptions, tp: int, dtype: torch.dtype, recompute: bool, length: int) -> list[Unit]:
    """Of a micro batch, in the order of the forward pass. What has no gradient leaves nothing and is not there.

    Args:
        options: resolved.
        length: tokens of its rows, before tensor-parallel ranks share them.
    """
    parts = [
        (f"block {i} ({mixer})", block_footprint(options, mixer, tp, dtype, length))
        for i, mixer in enumerate(options.layers)
    ]
    times = most_graded(options)
    if options.universal is not None:
        halts = options.universal.halting == "act"  # which keeps every step's state
        return [
            Unit(
                f"step {t + 1} of {times}, ", [part], recompute, repeated=times > 1, beside=halts and part is parts[-1]
            )
            for t in range(times)
            for part in parts
        ]
    if options.depth is None:
        return [Unit("", [part], recompute) for part in parts]
    core, layers = core_footprint(options, tp, dtype), core_layers(options)
    iteration = [("injection", core.injection), *parts[layers.start : layers.stop]]
    leaving = [] if core.leaving is None else [Unit("", [("the core's output", core.leaving)])]
    return [
        *(Unit("", [part], recompute) for part in parts[: layers.start]),
        Unit("", [("the core's input", core.drive)], beside=True),
        *(Unit(f"iteration {t + 1} of {times}, ", iteration, recompute, repeated=times > 1) for t in range(times)),
        *leaving,
        *(Unit("", [part], recompute) for part in parts[layers.stop :]),
    ]


def footprints(options: ModelOptions, tp: int, dtype: torch.dtype, length: int) -> list[tuple[Footprint, Passes]]:
    """All of the model but embedding and head, and how often each part runs on a micro batch of rows of that length."""
    of_layers = passes(options)
    found = [
        (block_footprint(options, mixer, tp, dtype, length), often) for mixer, often in zip(options.layers, of_layers)
    ]
    if options.depth is not None:
        core = core_footprint(options, tp, dtype)
        found += [(core.drive, ONCE), (core.injection, of_layers[core_layers(options).start])]
        found += [] if core.leaving is None else [(core.leaving, ONCE)]
    return found
