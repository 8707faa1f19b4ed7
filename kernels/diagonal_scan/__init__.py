"""The diagonal linear recurrence h_t = a_t h_{t−1} + x_t: the core of LRU, S5, RG-LRU, minGRU and their relatives."""

import torch

from riverrun.kernels.common.backend import check_shape, resolve_backend
from riverrun.kernels.diagonal_scan.chunked import diagonal_scan_chunked, diagonal_scan_summary
from riverrun.kernels.diagonal_scan.reference import diagonal_scan_reference

NARROW = (torch.bfloat16, torch.float16, torch.float32, torch.complex64)
DTYPES = (*NARROW, torch.float64, torch.complex128)

__all__ = ["diagonal_scan", "diagonal_scan_summary"]


def diagonal_scan(
    x: torch.Tensor,
    a: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """h_t = a_t ⊙ h_{t−1} + x_t, channel by channel, of real or of complex numbers.

    Arithmetic is float32 or complex64 (float64 or complex128 if `x` is). The gradients of complex arguments are
    torch's: those of the step loop under autograd.

    Args:
        x: (B, T, D), the input of every step.
        a: (B, T, D), the decays, or (D,) if they are the same at every step. Real if `x` is real, complex if it is
            complex, in any precision. Values are not checked: negative ones and zeros are as good as others, and
            decays beyond 1 are right as long as products of 512 of them stay within the range of the arithmetic.
        initial_state: (S, D), the states before the first token of each sequence; zeros if None. S is the batch size,
            or the number of documents.
        cu_seqlens: (S + 1,) integers rising strictly from 0 to T: the bounds of documents packed into a batch of one
            row.
        backend: "auto", "reference", "chunked" or "triton" (see `resolve_backend`). The Triton kernels take the values
            of `cu_seqlens` on trust, so that the host need not wait for them.

    Returns:
        h (B, T, D) in the dtype of `x`, and the final state (S, D) in float32 or complex64 (float64 or complex128 if
        `x` is).

    Raises:
        ValueError: an argument of the wrong shape or dtype, bad `cu_seqlens`, or a backend that there is not.
    """
    op = "diagonal_scan"
    if x.dim() != 3 or 0 in x.shape:
        raise ValueError(f"{op}: x must have shape (B, T, D), all at least 1, got {tuple(x.shape)}")
    B, T, D = x.shape
    if a.dim() == 1:
        check_shape(op, "a", a, (D,), "(D,)")
    else:
        check_shape(op, "a", a, (B, T, D), "(D,) or (B, T, D)")
    for name, tensor in (("x", x), ("a", a)):
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{op}: {name} must be of floating-point or complex numbers, got {tensor.dtype}")
    if x.is_complex() != a.is_complex():
        raise ValueError(
            f"{op}: x and a must be both real or both complex, got {x.dtype} and {a.dtype}; convert the real one"
        )
    S = B if cu_seqlens is None else len(cu_seqlens) - 1
    state_dtype = torch.promote_types(x.dtype, torch.float32)
    if initial_state is not None:
        check_shape(op, "initial_state", initial_state, (S, D), "(S, D)")
        if initial_state.is_complex() and not x.is_complex():
            raise ValueError(f"{op}: initial_state must be real, as x is, got {initial_state.dtype}; convert x and a")
        initial_state = initial_state.to(state_dtype)
    chosen = resolve_backend(op, backend, x.real if x.is_complex() else x, T, has_triton=True)
    if chosen == "triton":
        from riverrun.kernels.diagonal_scan.triton_op import diagonal_scan_triton

        return diagonal_scan_triton(x, a if a.dtype in NARROW else a.to(state_dtype), initial_state, cu_seqlens)
    if initial_state is None:
        initial_state = x.new_zeros(S, D, dtype=state_dtype)
    scan = diagonal_scan_reference if chosen == "reference" else diagonal_scan_chunked
    h, final_state = scan(x.to(state_dtype), a.to(state_dtype), initial_state, cu_seqlens)
    return h.to(x.dtype), final_state
