"""The Triton kernels of a linear memory as a torch operator.

Forward: `prepare_kernel` over all chunks, then `forward_kernel` along the sequences. Backward: both again, for the
states at each chunk's start and E, unless the first time has saved them; `backward_kernel`, for the states' adjoints at
each chunk's end and Y; then `within_kernel` and `gradients_kernel` over all chunks.
"""

from typing import Any, Literal

import torch
from torch.nn import functional as F

from riverrun.kernels.common.operator import operator
from riverrun.kernels.common.self_check import check_once, deviation, draws, in_double, is_due
from riverrun.kernels.neural_memory.chunked import neural_memory_chunked
from riverrun.kernels.neural_memory.gates import ChunkGates, triton_gates
from riverrun.kernels.neural_memory.rule import Gates, MemoryState, Rule
from riverrun.kernels.neural_memory.triton_linear_launch import CHUNKS, Launch, Made, Pair, Settings
from riverrun.kernels.neural_memory.triton_path import Keep


def memory(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: ChunkGates,
    initial: Pair,
    cu_seqlens: torch.Tensor | None,
    settings: Settings,
    save: bool,
) -> tuple[torch.Tensor, Pair, Made]:
    """→ o (B, T, H, V), the final weights and momentum (S, H, K, V) float32, and what was made, all of it if `save`."""
    launch = Launch(q, k, v, gates, cu_seqlens, settings)
    made = launch.room(save)
    launch.prepare(made)
    return *launch.outputs(made, initial), made


def memory_backward(
    grad_o: torch.Tensor,
    grad_final: Pair,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: ChunkGates,
    initial: Pair,
    cu_seqlens: torch.Tensor | None,
    settings: Settings,
    made: Made | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, ChunkGates, Pair]:
    """→ the gradients of q, k, v, the gates, the initial weights and momentum. `made`: what `memory` saved, if any."""
    launch = Launch(q, k, v, gates, cu_seqlens, settings)
    if made is None:
        made = launch.room(save=True)
        launch.prepare(made)
        launch.states(made, initial)
    adjoints, grad_v, grad_initial = launch.adjoints(made, grad_o, grad_final)
    grad_q, grad_k, of_gates = launch.gradients(made, grad_o, adjoints, grad_v)
    return grad_q, grad_k, grad_v, of_gates, grad_initial


def check(
    q: torch.Tensor,
    v: torch.Tensor,
    momentum: bool,
    still: bool,
    packed: bool,
    settings: Settings,
    save: bool,
    back: bool,
) -> None:
    """The self-check of the forward kernels for such tensors, or with `back` of those of gradients. `still`: there is
    a momentum, but none to begin with."""
    dtype, device, (H, K), V = q.dtype, q.device, q.shape[2:], v.shape[-1]
    C, online, late = settings
    rule = Rule(chunk_size=1 if online else C, read="before" if late else "after")

    def compare() -> float:
        draw, T = draws(device), 3 * C + 16  # several chunks; like most batches' a multiple of 16: compilers use that
        bounds = torch.tensor([0, 5, T], dtype=torch.int32, device=device) if packed else None
        shape, sequences = (1, T, H), 2 if packed else 1
        inputs = [F.normalize(draw(*shape, K), dim=-1).to(dtype) for _ in range(2)]
        inputs += [draw(*shape, V).to(dtype), -draw(*shape).exp() / 8, draw(*shape).sigmoid() / (1 + C / K)]
        states = [draw(sequences, H, K, V), draw(sequences, H, K, V)]
        upstream = draw(*shape, V).to(dtype)
        rest = [-draw(*shape).exp() if momentum else None, states[0], states[1] if momentum and not still else None]

        def chunked(q, k, v, log_keep, lr, log_momentum, W, S):
            if momentum and S is None:
                S = torch.zeros_like(W)
            state, gates = MemoryState((W,), None if S is None else (S,)), Gates(log_keep, lr, log_momentum)
            o, final = neural_memory_chunked(q, k, v, state, (gates,), rule, None, None, None, None, bounds)
            return o, *final.weights, *(final.momentum or ())

        want = in_double(chunked, [*inputs, *rest], upstream if back else None)
        q, k, v, *of_gates = (x.detach().requires_grad_() for x in (*inputs, *rest[:1]) if x is not None)
        gates, initial = triton_gates(Gates(*of_gates), C, bounds), Pair(*rest[1:])
        gates = ChunkGates(*(x if x is None else x.contiguous() for x in gates))  # type: ignore[arg-type]
        with torch.no_grad():
            o, final, made = memory(q, k, v, gates, initial, bounds, settings, save)
            if not back:
                return deviation([x for x in (o, *final) if x is not None], want)
            *grads, of_chunks, of_initial = memory_backward(
                upstream, Pair(None, None), q, k, v, gates, initial, bounds, settings, made if save else None
            )
        outputs, grad_outputs = zip(*((x, g) for x, g in zip(gates, of_chunks) if x is not None))
        grads += torch.autograd.grad(outputs, of_gates, grad_outputs)
        grads += [g for x, g in zip(initial, of_initial) if x is not None]  # type: ignore[misc]
        return deviation(grads, want[3 if momentum else 2 :])

    sizes: dict[str, object] = {"H": H, "K": K, "V": V, **settings._asdict(), "momentum": momentum, "still": still}
    sizes |= {"packed": packed, "saved": save, "gradients": back, "dtype": dtype}
    check_once("linear neural_memory", sizes, device, compare, 1e-4 if dtype == torch.float32 else 5e-2)


@operator("linear_memory_triton")
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    weight: torch.Tensor,
    carry: torch.Tensor | None,
    momentum_decay: torch.Tensor | None,
    momentum_weight: torch.Tensor | None,
    initial: torch.Tensor,
    initial_momentum: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    chunk_size: int,
    online: bool,
    late: bool,
    save: bool,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor,
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
]:  # fmt: skip
    settings, momentum = Settings(chunk_size, online, late), carry is not None
    if is_due(q):
        check(q, v, momentum, initial_momentum is None, cu_seqlens is not None, settings, save=save, back=False)
    gates = ChunkGates(decay, weight, carry, momentum_decay, momentum_weight)
    o, final, made = memory(q, k, v, gates, Pair(initial, initial_momentum), cu_seqlens, settings, save)
    return o, *_or_empty(*final), *_to_save(made, settings)  # type: ignore[return-value]


@_forward.register_fake
def _(
    q, k, v, decay, weight, carry, momentum_decay, momentum_weight, initial, initial_momentum, cu_seqlens, chunk_size,
    online, late, save,
):  # fmt: skip
    gates = ChunkGates(decay, weight, carry, momentum_decay, momentum_weight)
    settings = Settings(chunk_size, online, late)
    made = Launch(q, k, v, gates, cu_seqlens, settings).room(save)
    final_momentum = initial.new_empty(0 if carry is None else initial.shape)
    return torch.empty_like(v), torch.empty_like(initial), final_momentum, *_to_save(made, settings)


@operator("linear_memory_triton_backward")
def _backward(
    grad_o: torch.Tensor,
    grad_final: torch.Tensor | None,
    grad_final_momentum: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    weight: torch.Tensor,
    carry: torch.Tensor | None,
    momentum_decay: torch.Tensor | None,
    momentum_weight: torch.Tensor | None,
    initial: torch.Tensor,
    initial_momentum: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    scores: torch.Tensor,
    inverse: torch.Tensor,
    states: torch.Tensor,
    momenta: torch.Tensor,
    errors: torch.Tensor,
    chunk_size: int,
    online: bool,
    late: bool,
) -> list[torch.Tensor]:
    settings, momentum = Settings(chunk_size, online, late), carry is not None
    made = Made(scores, inverse, states, momenta, errors) if errors.numel() else None
    if is_due(q):
        save = made is not None
        check(q, v, momentum, initial_momentum is None, cu_seqlens is not None, settings, save=save, back=True)
    gates = ChunkGates(decay, weight, carry, momentum_decay, momentum_weight)
    *grads, of_gates, grad_initial = memory_backward(
        grad_o, Pair(grad_final, grad_final_momentum), q, k, v, gates, Pair(initial, initial_momentum), cu_seqlens,
        settings, made,
    )  # fmt: skip
    return [*grads, *_or_empty(*of_gates, *grad_initial)]


@_backward.register_fake
def _(grad_o, grad_final, grad_final_momentum, q, k, v, decay, weight, carry, momentum_decay, momentum_weight, W, *_):
    like = q, k, v, decay, weight, carry, momentum_decay, momentum_weight, W, None if carry is None else W
    return _or_empty(*(None if x is None else torch.empty_like(x) for x in like))


def _or_empty(*tensors: torch.Tensor | None) -> list[torch.Tensor]:
    """Operators return tensors: empty ones for those that there are not."""
    device = next(x.device for x in tensors if x is not None)
    return [torch.empty(0, device=device) if x is None else x for x in tensors]


def _to_save(made: Made, settings: Settings) -> list[torch.Tensor]:
    """All of it, or nothing. Operators do not return a tensor twice."""
    if made.errors is None:
        return [made.scores.new_empty(0) for _ in made]
    return _or_empty(made.scores, made.inverse if settings.online else None, *made[2:])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.chunk_size, ctx.online, ctx.late, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[3:])


def _gradient(
    ctx: Any, grad_o: torch.Tensor | None, of_final: torch.Tensor | None, of_momentum: torch.Tensor | None, *unused: Any
) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    grad_o = torch.zeros_like(tensors[2]) if grad_o is None else grad_o.contiguous()
    finals = (None if x is None or not x.numel() else x.contiguous() for x in (of_final, of_momentum))
    grads = _backward(grad_o, *finals, *tensors, ctx.chunk_size, ctx.online, ctx.late)
    return *(None if x is None else grad for x, grad in zip(tensors, grads)), None, None, None, None, None


_forward.register_autograd(_gradient, setup_context=_setup)


def linear_memory_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: ChunkGates,
    initial: torch.Tensor,
    initial_momentum: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    *,
    chunk_size: int,
    online: bool,
    read: Literal["after", "before"],
    keep: Keep = "root",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A memory f(x) = x W that learns ½‖f(k) − v‖² with momentum or without.

    Args:
        q, k: (B, T, H, K), and v: (B, T, H, V); K and V up to 256.
        gates: of the chunks that `triton_chunks.cut` counts.
        initial, initial_momentum: (S, H, K, V); no initial momentum: zeros.
        chunk_size: C, one of `CHUNKS`.
        online: each token learns at the weights that it finds, whatever C; else at those of its chunk's start.
        keep: "all": a backward pass finds the states before all chunks, and whatever else it needs of the way forth;
            "root": nothing but the inputs.

    Returns:
        o (B, T, H, V) in the dtype of `q`, the final weights, and the final momentum or None, in float32. The values of
        `cu_seqlens` are not checked: the host does not wait for them.
    """
    assert chunk_size in CHUNKS and (gates.carry is not None or initial_momentum is None)
    if cu_seqlens is not None and q.shape[0] != 1:
        raise ValueError(f"cu_seqlens describes documents packed into one row: expected batch size 1, got {q.shape[0]}")
    q, k, v = (x.to(q.dtype).contiguous() for x in (q, k, v))
    rest = [None if x is None else x.float().contiguous() for x in (*gates, initial, initial_momentum)]
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, *rest))
    save = keep == "all" and wanted
    o, final, final_momentum, *_ = _forward(q, k, v, *rest, cu_seqlens, chunk_size, online, read == "before", save)
    return o, final, None if gates.carry is None else final_momentum
