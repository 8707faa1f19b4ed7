"""Which implementation of an op runs: `reference`, `chunked` or (where an op has one) `triton`."""

from typing import Literal, get_args

import torch

Backend = Literal["auto", "reference", "chunked", "triton"]


def resolve_backend(op: str, backend: str, x: torch.Tensor, seq_len: int, *, has_triton: bool = False) -> str:
    """Turn `backend` into the implementation to run for input `x` of `seq_len` time steps.

    "auto" takes Triton on a CUDA tensor where the op has such a kernel (which is for float32 and narrower types), the
    step loop for a single step (decoding), and the chunked form otherwise.

    Raises:
        ValueError: an unknown backend, or "triton" where there is no such kernel, no CUDA tensor, or float64.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"{op}: unknown backend {backend!r}; choose one of {', '.join(get_args(Backend))}")
    if backend == "triton":
        if not has_triton:
            raise ValueError(f"{op}: there is no Triton kernel for this op yet; use backend='auto' or 'chunked'")
        if x.dtype == torch.float64:
            raise ValueError(f"{op}: the Triton kernel computes in float32; use backend='chunked' for float64")
        if not x.is_cuda and not _interpreted():
            raise ValueError(f"{op}: backend='triton' needs CUDA tensors, got {x.device}; use backend='auto'")
    if backend != "auto":
        return backend
    if has_triton and x.is_cuda and x.dtype != torch.float64:
        return "triton"
    return "reference" if seq_len == 1 else "chunked"


def _interpreted() -> bool:
    """Triton runs its kernels in Python (TRITON_INTERPRET=1), on any device."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def check_shape(op: str, name: str, x: torch.Tensor, expected: tuple[int, ...], axes: str) -> None:
    """Raise a ValueError that names the argument and the expected axes if `x` is not of shape `expected`."""
    if tuple(x.shape) != expected:
        raise ValueError(f"{op}: {name} must have shape {axes} = {expected}, got {tuple(x.shape)}")
