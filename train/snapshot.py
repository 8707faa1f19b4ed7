"""Copies of training state in the host's memory, to be written while training changes the originals."""

from collections.abc import Mapping
from typing import Any

import torch


def snapshot(state: Any) -> Any:
    """`state` with a copy on the CPU of every tensor in its dicts, lists and tuples. Tensors that are one and the same,
    or the same part of one storage, stay so. Copies from a GPU are done when this returns.

    Everything else is taken over as it is: numbers and texts do not change, and training replaces its other objects.
    """
    copies: dict[tuple, torch.Tensor] = {}
    out = _copy(state, copies)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return out


def _copy(value: Any, copies: dict[tuple, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        key = (value.data_ptr(), value.dtype, value.shape, value.stride(), value.device)
        if value.numel() == 0 or key not in copies:
            copies[key] = _on_host(value.detach())
        copy = copies[key]
        return torch.nn.Parameter(copy, value.requires_grad) if isinstance(value, torch.nn.Parameter) else copy
    if isinstance(value, Mapping):
        items = {key: _copy(item, copies) for key, item in value.items()}
        return items if type(value) is dict else type(value)(items)  # type: ignore[call-arg]
    if isinstance(value, list):
        return [_copy(item, copies) for item in value]
    if type(value) is tuple:
        return tuple(_copy(item, copies) for item in value)
    return value


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "cpu":
        return tensor.clone()
    # pinned, so that the copy runs at the bus's speed; the allocator keeps the memory for the next snapshot
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
