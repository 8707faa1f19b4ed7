"""What a recurrent core allocates and moves besides its layers: how the prelude's output enters, and what leaves."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from riverrun.launch.footprint import Footprint, trace
from riverrun.modeling.layout import Layout
from riverrun.modeling.options import ModelOptions

Function = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class CoreFootprint:
    """Attributes:
    drive: what depends on the prelude's output alone, once a micro batch.
    injection: of every iteration, before its layers.
    leaving: read-out and norm after the last; None: there is neither.
    """

    drive: Footprint
    injection: Footprint
    leaving: Footprint | None


@lru_cache(maxsize=64)
def core_footprint(options: ModelOptions, tp: int, dtype: torch.dtype) -> CoreFootprint:
    """Of a model of recurrent depth, one rank's part of it.

    Args:
        options: resolved.
        dtype: of parameters and activations.
    """
    assert options.depth is not None
    depth = replace(options.depth, prelude_layers=0, coda_layers=0)
    single = replace(options, num_hidden_layers=1, layer_pattern=options.layers[:1], depth=depth)
    leaves = depth.injection != "linear" or depth.norm_core
    return CoreFootprint(
        trace(single, tp, dtype, _drive),
        trace(single, tp, dtype, _injection),
        trace(single, tp, dtype, _leaving) if leaves else None,
    )


def _drive(body: Any, layout: Layout, like: torch.Tensor) -> Function:
    return lambda e: body.core.injection.drive(e)[0]


def _injection(body: Any, layout: Layout, like: torch.Tensor) -> Function:
    driven, of_state = body.core.injection.drive(like)
    return lambda s: body.core.injection(s, (driven.detach(), of_state))


def _leaving(body: Any, layout: Layout, like: torch.Tensor) -> Function:
    def leave(s: torch.Tensor) -> torch.Tensor:
        out = body.core.injection.read_out(s)
        return body.norm(out) if body.depth.norm_core else out

    return leave
