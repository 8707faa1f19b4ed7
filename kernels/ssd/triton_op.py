"""The Triton kernels of `ssd` as a torch operator: launches and gradients.

Forward: one walk along the sequences. Nothing but the inputs is saved.
Backward: the walks of the states and of their adjoints; then the gradients, chunk by chunk. What the programs of a
chunk have of one gradient is summed in a fixed order.
Where sequences and heads are too few to fill the device, each walk is of segments, after a walk for their maps.
"""

from collections.abc import Callable
from typing import Any

import torch

from riverrun.kernels.common.operator import operator
from riverrun.kernels.common.self_check import check_once, deviation, draws, in_double, is_due
from riverrun.kernels.ssd.chunked import ssd_chunked
from riverrun.kernels.ssd.steps import step_sizes
from riverrun.kernels.ssd.triton_backward import gradients_kernel
from riverrun.kernels.ssd.triton_launch import CHUNK, TILE_NUMBERS, Launch
from riverrun.kernels.ssd.triton_step_sizes import Steps
from riverrun.kernels.ssd.triton_walks import Walks, rows

GRADIENTS_WARPS = {64: 4, 32: 8, 16: 8}  # by the tokens of a chunk
STAGES, READ_STAGES = 2, 3  # of the gradients; fewer for larger states

Exchange = Callable[[torch.Tensor], torch.Tensor]  # of states (S, H, P, N) with ranks that share the sequences


def scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    bias: torch.Tensor | None,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    softplus: bool,
    like: Launch | None = None,
    enter: Exchange | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ y (B, T, H, P), final state (S, H, P, N) float32.

    Args:
        enter: makes the initial states of the final ones that zeros would have led to.
    """
    batch, T, H, P = x.shape
    y = x.new_empty(batch, T, H, P)
    final = x.new_empty(batch if cu_seqlens is None else len(cu_seqlens) - 1, H, P, B.shape[3], dtype=torch.float32)
    launch = Launch.of(x, B, cu_seqlens, like)
    walks = Walks(launch, Steps(launch, rows(dt), bias, A, softplus, T).make(), T)
    x, B, C = map(rows, (x, B, C))
    maps = walks.maps(x, B)
    if enter is not None:
        initial = enter(walks.ends(x, B, maps))
    walks.outputs(x, B, C, D, initial, y, final, maps)
    return y, final


def scan_backward(
    grad_y: torch.Tensor,
    grad_final: torch.Tensor | None,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    bias: torch.Tensor | None,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    softplus: bool,
    like: Launch | None = None,
    leave: Exchange | None = None,
) -> tuple[torch.Tensor, ...]:
    """→ the gradients of x, dt, A, B, C, D, the bias and the initial state (those three empty if there is none).

    Args:
        leave: makes the final states' adjoints of those that zeros would have led to at the initial ones.
    """
    (batch, T, H, P), (G, N) = x.shape, B.shape[2:]
    launch = Launch.of(x, B, cu_seqlens, like)
    M, splits, Q = launch.chunks.num_chunks, launch.splits, launch.dims["Q"]
    steps = Steps(launch, rows(dt), bias, A, softplus, T)
    walks = Walks(launch, steps.make(), T)
    grad_x = x.new_empty(x.shape)
    x, B, C = map(rows, (x, B, C))

    grad_initial = None if initial is None else torch.empty_like(initial)
    maps, upstream = walks.maps(x, B), rows(grad_y)
    states = walks.states(x, B, initial, maps)
    maps = walks.adjoint_maps(upstream, C, maps)
    if leave is not None:
        grad_final = leave(walks.first_adjoints(upstream, C, maps))
    grad_states = walks.adjoints(upstream, C, grad_final, grad_initial, maps)

    by_read, by_a, by_d, by_written = A.new_empty(4, M, H, Q)
    flow = A.new_empty(M, H)
    grad_B, grad_C = A.new_empty(2, splits, 2, batch, T, G, N)
    grad_D = A.new_zeros(0 if D is None else (M, *D.shape))
    size = P * launch.dims["BN"] * TILE_NUMBERS // launch.tile  # of a state
    fewer = size > 4 * TILE_NUMBERS
    gradients_kernel[(4 * M * G * splits,)](
        grad_y, x, *walks.steps, B, C, x if D is None else D, states, grad_states,
        grad_x, by_read, flow, by_a, by_d, by_written, grad_B, grad_C, grad_D,
        *launch.chunks.tensors[2:], T, batch * T,
        **walks.options(), X_STRIDE=x.stride(0), B_STRIDE=B.stride(0), C_STRIDE=C.stride(0), BP=launch.channels,
        HEADS=H // G // splits, HAS_D=D is not None, BY_CHANNEL=D is not None and D.dim() == 2,
        READ_STAGES=READ_STAGES - fewer - (size > TILE_NUMBERS), STAGES=STAGES - fewer,
        num_warps=GRADIENTS_WARPS[Q],
    )  # fmt: skip
    grad_dt, grad_bias, grad_A = steps.gradients(walks.steps, by_read, flow, by_a, by_d, by_written, dt)
    grad_D = grad_D if D is None else grad_D.sum(0)
    grad_B, grad_C = (_total(t, x.dtype) for t in (grad_B, grad_C))
    grad_initial = A.new_empty(0) if grad_initial is None else grad_initial
    return grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_bias, grad_initial


def _total(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(splits, 2, …) → (…): the sum, rounded once."""
    if len(parts) > 1:
        return parts.sum((0, 1)).to(dtype)
    return torch.add(*parts[0], out=parts.new_empty(parts.shape[2:], dtype=dtype))


def check(
    x: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    D: torch.Tensor | None,
    bias: torch.Tensor | None,
    states: bool,
    cu_seqlens: torch.Tensor | None,
    softplus: bool,
    back: bool,
) -> None:
    """The self-check of the kernels that such tensors take forward, or backward. `states` are initial ones."""
    (H, P), (G, N), device, packed = x.shape[2:], B.shape[2:], x.device, cu_seqlens is not None

    def compare() -> float:
        draw, T = draws(device), 3 * CHUNK + 16  # like most batches' a multiple of 16: compilers use that
        bounds = torch.tensor([0, 5, T], dtype=torch.int32, device=device) if packed else None
        steps = draw(1, T, H) if softplus else draw(1, T, H).sigmoid() / 8
        inputs: list[Any] = [
            draw(1, T, H, P).to(x.dtype),
            steps.to(dt.dtype),
            -draw(H).exp(),
            draw(1, T, G, N).to(x.dtype),
            draw(1, T, G, N).to(x.dtype),
            None if D is None else draw(*D.shape),
            None if bias is None else draw(H).abs(),
            draw(2 if packed else 1, H, P, N) if states else None,
        ]
        upstream = draw(1, T, H, P).to(x.dtype)

        def chunked(x, dt, A, B, C, D, bias, initial):
            return ssd_chunked(x, step_sizes(x, dt, bias, softplus), A, B, C, D, initial, bounds, CHUNK)

        u, raw, A, keys, queries, skip, offset, initial = inputs
        rest = u, raw, A, keys, queries, skip, offset, initial, bounds, softplus, Launch.of(x, B, cu_seqlens)
        if not back:
            return deviation(scan(*rest), in_double(chunked, inputs, None))
        grads = scan_backward(upstream, None, *rest)
        return deviation([t for t in grads if t.numel()], in_double(chunked, inputs, upstream)[2:])

    sizes: dict[str, object] = {"H": H, "P": P, "G": G, "N": N, "D": None if D is None else D.dim()}
    sizes |= {"bias": bias is not None, "softplus": softplus, "states": states, "packed": packed, "gradients": back}
    sizes |= {"dtype": x.dtype, "steps": dt.dtype}
    check_once("ssd", sizes, device, compare, 1e-4 if x.dtype == torch.float32 else 5e-2)


@operator("ssd_triton")
def _forward(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    bias: torch.Tensor | None,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    softplus: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if is_due(x):
        check(x, dt, B, D, bias, initial is not None, cu_seqlens, softplus, back=False)
    return scan(x, dt, A, B, C, D, bias, initial, cu_seqlens, softplus)


@_forward.register_fake
def _(x, dt, A, B, C, D, bias, initial, cu_seqlens, softplus):
    batch, T, H, P = x.shape
    S = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(batch, T, H, P), x.new_empty(S, H, P, B.shape[3], dtype=torch.float32)


@operator("ssd_triton_backward")
def _backward(
    grad_y: torch.Tensor,
    grad_final: torch.Tensor | None,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    bias: torch.Tensor | None,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    softplus: bool,
) -> list[torch.Tensor]:
    if is_due(x):
        check(x, dt, B, D, bias, initial is not None, cu_seqlens, softplus, back=True)
    return list(scan_backward(grad_y, grad_final, x, dt, A, B, C, D, bias, initial, cu_seqlens, softplus))


@_backward.register_fake
def _(grad_y, grad_final, x, dt, A, B, C, D, bias, initial, cu_seqlens, softplus):
    grads = [x.new_empty(x.shape), dt.new_empty(dt.shape), A.new_empty(A.shape), x.new_empty(B.shape)]
    return [*grads, x.new_empty(C.shape), *(A.new_empty(0 if t is None else t.shape) for t in (D, bias, initial))]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    *tensors, ctx.softplus = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, grad_y: torch.Tensor | None, grad_final: torch.Tensor | None) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors  # read once: a checkpointed tensor cannot be unpacked twice
    x, *_, D, bias, initial, _ = tensors
    grad_y = x.new_zeros(x.shape) if grad_y is None else grad_y.contiguous()
    grad_final = None if grad_final is None else grad_final.contiguous()
    *grads, grad_D, grad_bias, grad_initial = _backward(grad_y, grad_final, *tensors, ctx.softplus)
    maybe = ((D, grad_D), (bias, grad_bias), (initial, grad_initial))
    return *grads, *(None if t is None else grad for t, grad in maybe), None, None


_forward.register_autograd(_gradient, setup_context=_setup)


def ssd_triton(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`riverrun.kernels.ssd.ssd`. The values of `cu_seqlens` are not checked: the host does not wait for them."""
    if cu_seqlens is not None and x.shape[0] != 1:
        raise ValueError(f"cu_seqlens describes documents packed into one row: expected batch size 1, got {x.shape[0]}")
    initial_state = initial_state if initial_state is None else initial_state.float().contiguous()
    return _forward(*as_kernels_take(x, dt, A, B, C, D, dt_bias), initial_state, cu_seqlens, dt_softplus)


def as_kernels_take(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    """The same in the types that the kernels read."""
    D, dt_bias = (t if t is None else t.float().contiguous() for t in (D, dt_bias))
    return x, dt, A.float().contiguous(), B.to(x.dtype), C.to(x.dtype), D, dt_bias
