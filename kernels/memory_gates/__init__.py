"""What a neural memory keeps of itself, and how far it steps, of every token: its gates, from their projections."""

from typing import NamedTuple

import torch

from riverrun.kernels.common.backend import check_shape, resolve_backend
from riverrun.kernels.memory_gates.reference import memory_gates_reference


class Logits(NamedTuple):
    """Of a memory's gates, or what is added to them."""

    alpha: torch.Tensor
    theta: torch.Tensor
    eta: torch.Tensor | None = None


def memory_gates(
    logits: Logits, biases: Logits, *, scale: float = 1.0, shrink: bool = False, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Of α = σ(a), θ = s σ(t) and η = σ(e) (Titans, arXiv 2501.00663, §3.1), a, t and e logits with their biases:

        log(1 − α) = −log(1 + eᵃ)        θ, or θ (1 − η) if steps `shrink`        log η = −log(1 + e⁻ᵉ)

    Momentum sums steps to 1 / (1 − η) times their size, which `shrink` makes up for. Arithmetic is float32 (float64 if
    the logits are float64); logarithms near 0 are exact to their own last digits.

    Args:
        logits: (B, T, N) each, N heads, or layers of heads; of every output of a layer α and θ may be (B, T, N, out).
            No `eta`: there is no momentum.
        biases: (N,) of each that there is.
        scale: s.
        backend: "auto", "reference", "chunked" or "triton" (see `resolve_backend`); the second and the third are the
            same. The Triton kernels are for logits of three dimensions, and read them in place if their tokens are
            evenly spaced.

    Returns:
        log(1 − α), θ and log η (None without `eta`) in the shapes of the logits, in float32 (float64).

    Raises:
        ValueError: an argument of the wrong shape, or a backend that there is not.
    """
    op, alpha = "memory_gates", logits.alpha
    if alpha.dim() not in (3, 4):
        raise ValueError(f"{op}: alpha must have shape (B, T, N) or (B, T, N, out), got {tuple(alpha.shape)}")
    N = alpha.shape[2]
    check_shape(op, "theta", logits.theta, tuple(alpha.shape), "that of alpha")
    if (logits.eta is None) != (biases.eta is None):
        raise ValueError(f"{op}: eta needs both its logits and its bias; for no momentum give neither")
    if logits.eta is not None:
        check_shape(op, "eta", logits.eta, tuple(alpha.shape[:3]), "(B, T, N)")
    for name, bias in biases._asdict().items():
        if bias is not None:
            check_shape(op, f"the bias of {name}", bias, (N,), "(N,)")
    fits = alpha.dim() == 3
    if backend == "triton" and not fits:
        raise ValueError(f"{op}: the Triton kernel is for logits (B, T, N); use backend='chunked'")
    if resolve_backend(op, backend, alpha, alpha.shape[1], has_triton=fits) == "triton" and alpha.numel():
        from riverrun.kernels.memory_gates.triton_gates import memory_gates_triton

        return memory_gates_triton(*logits, *biases, scale, shrink)
    return memory_gates_reference(logits, biases, scale, shrink)
