"""What follows from the bounds of packed documents alone: computed once a batch, not by every layer, and not again for
the backward pass. Small kernels though they are, a model of many layers has hundreds of them, and a GPU waits for its
host meanwhile.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

Result = TypeVar("Result")


def once_a_batch(function: Callable[..., Result]) -> Callable[..., Result]:
    """`function(cu_seqlens, *sizes)` of a tensor and hashable sizes, whose results are remembered while that tensor
    lives and keeps its numbers. They must not be written to.

    They belong to the stream that they were computed on. A graph that is being captured computes its own: it is to be
    replayed with other numbers.
    """
    known = WeakTensorKeyDictionary()

    @functools.wraps(function)
    def remembered(cu_seqlens: torch.Tensor, *sizes: int) -> Result:
        if type(cu_seqlens) is not torch.Tensor or cu_seqlens.is_inference():  # which do not tell that they change
            return function(cu_seqlens, *sizes)
        stream = None
        if cu_seqlens.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return function(cu_seqlens, *sizes)
            stream = torch.cuda.current_stream(cu_seqlens.device).stream_id
        results = known.setdefault(cu_seqlens, {})
        key = (cu_seqlens._version, stream, *sizes)
        if key not in results:
            results[key] = function(cu_seqlens, *sizes)
        return results[key]

    return remembered
