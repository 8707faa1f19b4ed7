"""The recurrence of whole sequences in torch: all chunks of L tokens side by side, L steps instead of T.

Chunk m starts from zero and gives states e_j and products of its decays P_j = a_0 ⋯ a_j, j = 0 … L − 1. The states
before the chunks follow one another, s_{m+1} = P_{L−1} s_m + e_{L−1}, and the true states are h_j = e_j + P_j s_m:
products of decays only, nothing is divided by them. Padding at a sequence's end has decay 1 and input 0: it hands the
state on.

The adjoint is the same recurrence from right to left with the decays conjugated. With g = ∂loss/∂h (∂loss/∂h̄ where
numbers are complex, as torch has it)

    μ_t = g_t + ā_{t+1} μ_{t+1},    ∂loss/∂x_t = μ_t,    ∂loss/∂a_t = h̄_{t−1} μ_t,

and what a chunk hands to the one before it is ā_0 μ_0.
"""

import itertools

import torch

from riverrun.kernels.common.chunks import Chunks, chunk_layout
from riverrun.kernels.common.operator import operator

CHUNK_SIZE = 64  # tokens, a power of two


def diagonal_scan_chunked(
    x: torch.Tensor, a: torch.Tensor, initial_state: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`riverrun.kernels.diagonal_scan.diagonal_scan` of tensors that are all of the state's dtype."""
    chunks = chunk_layout(x, min(CHUNK_SIZE, x.shape[1]), cu_seqlens)
    h, final, _ = _scan(_decays(a, chunks), chunks.split(x), chunks.sort(initial_state), list(chunks.active))
    return chunks.join(h), chunks.unsort(final)


def diagonal_scan_summary(
    x: torch.Tensor, a: torch.Tensor, *, cu_seqlens: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What whole sequences do to a state, without any outputs: final state = P · initial state + E.

    Two steps in a row are one, h ↦ a₂ (a₁ h + x₁) + x₂ = a₂ a₁ h + (a₂ x₁ + x₂) (Blelloch 1990, Prefix Sums and Their
    Applications, §1.4): the tokens of every chunk are paired until one step is left of each.

    Args:
        x, a, cu_seqlens: as of `diagonal_scan`.

    Returns:
        The product P of the sequence's decays, and E, its final state from zeros, (S, D) each, in float32 or complex64
        (float64 or complex128 if `x` is).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    chunks = chunk_layout(x, CHUNK_SIZE, cu_seqlens)
    decay, added = _decays(a.to(dtype), chunks), chunks.split(x.to(dtype))
    while added.shape[1] > 1:
        (first, later), (before, after) = (t.unflatten(1, (-1, 2)).unbind(2) for t in (decay, added))
        decay, added = later * first, torch.addcmul(after, later, before)
    decay, added = decay[:, 0], added[:, 0]
    zeros = x.new_zeros(len(chunks.order), x.shape[2], dtype=dtype)
    _, product = chunks.scan(torch.mul, zeros + 1, decay)
    _, final = chunks.scan(lambda h, decay, added: torch.addcmul(added, decay, h), zeros, decay, added)
    return product, final


def _decays(a: torch.Tensor, chunks: Chunks) -> torch.Tensor:
    """a (B, T, D) or (D,) → (M, L, D), 1 at padding."""
    return torch.where(chunks.valid[..., None], a if a.dim() == 1 else chunks.split(a), 1)


@operator("diagonal_scan_chunked")
def _scan(
    a: torch.Tensor, x: torch.Tensor, state: torch.Tensor, active: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """a, x (M, L, D), states before the sequences (N, D) → states (M, L, D), states after the sequences (N, D), states
    before the chunks (M, D). Chunks and sequences are ordered as in `Chunks`."""
    h, products = _from_zero(a, x), a.cumprod(1)
    starts, final = _carry(products[:, -1], h[:, -1], state, active, reverse=False)
    return h.addcmul_(products, starts[:, None]), final, starts


@_scan.register_fake
def _(a, x, state, active):
    return x.new_empty(x.shape), torch.empty_like(state), x.new_empty(x.shape[0], x.shape[2])


@operator("diagonal_scan_chunked_backward")
def _scan_backward(
    grad_h: torch.Tensor,
    grad_final: torch.Tensor,
    a: torch.Tensor,
    h: torch.Tensor,
    starts: torch.Tensor,
    active: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ the gradients of a, x and the states before the sequences."""
    first, others = a.conj().split([1, a.shape[1] - 1], dim=1)
    decay = torch.cat([torch.ones_like(first), others.flip(1)], dim=1)
    mu, products = _from_zero(decay, grad_h.flip(1)), decay.cumprod(1)
    first = first[:, 0]
    ends, grad_state = _carry(first * products[:, -1], first * mu[:, -1], grad_final, active, reverse=True)
    mu = mu.addcmul_(products, ends[:, None]).flip(1)
    before = torch.cat([starts[:, None], h[:, :-1]], dim=1)
    return mu * before.conj(), mu, grad_state


@_scan_backward.register_fake
def _(grad_h, grad_final, a, h, starts, active):
    return h.new_empty(h.shape), h.new_empty(h.shape), torch.empty_like(grad_final)


def _setup_context(ctx, inputs, output):
    a, _, _, ctx.active = inputs
    h, _, starts = output
    ctx.save_for_backward(a, h, starts)


def _gradient(ctx, grad_h, grad_final, _):
    return *_scan_backward(grad_h, grad_final, *ctx.saved_tensors, ctx.active), None


_scan.register_autograd(_gradient, setup_context=_setup_context)


def _from_zero(a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The states (M, L, D) of all chunks from zero."""
    h = x.clone(memory_format=torch.contiguous_format)
    for a_t, before, after in zip(a.unbind(1)[1:], h.unbind(1), h.unbind(1)[1:]):
        after.addcmul_(a_t, before)
    return h


def _carry(
    product: torch.Tensor, end: torch.Tensor, state: torch.Tensor, active: list[int], reverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Carry states (N, D) over the chunks: s ← product s + end. Returns those before each chunk (M, D), and the last.

    In reverse, sequences join where their last chunks are.
    """
    state, starts = state.clone(), torch.empty_like(end)
    steps = list(zip(active, itertools.accumulate(active)))
    for n, above in reversed(steps) if reverse else steps:
        chunk = slice(above - n, above)
        starts[chunk] = state[:n]
        torch.addcmul(end[chunk], product[chunk], starts[chunk], out=state[:n])
    return starts, state
