"""The Triton kernels of `head_rnn` as torch operators: launches and gradients."""

import torch
import triton.language as tl

from riverrun.kernels.common.operator import Operator, operator
from riverrun.kernels.common.self_check import check_once, deviation, draws, in_double, is_due, rounding
from riverrun.kernels.common.triton_math import INTERPRETED
from riverrun.kernels.common.whole import ceil_div, power_of_2_from
from riverrun.kernels.head_rnn.cells import CELLS
from riverrun.kernels.head_rnn.chunked import head_rnn_chunked
from riverrun.kernels.head_rnn.triton_cells import (
    elman_back,
    elman_step,
    gru_back,
    gru_step,
    lstm_back,
    lstm_step,
    slstm_back,
    slstm_step,
)
from riverrun.kernels.head_rnn.triton_kernels import backward_kernel, forward_kernel

STEP = {"lstm": lstm_step, "slstm": slstm_step, "gru": gru_step, "elman": elman_step}
BACK = {"lstm": lstm_back, "slstm": slstm_back, "gru": gru_back, "elman": elman_back}

SEQUENCES = 16  # of a program: the rows of the tensor cores' smallest product
TWICE_ON_CHIP = 128  # bytes of a row of a head's weights up to which there is room for them and their transposes
FORWARD_WARPS = {16: 1, 32: 2, 64: 4, 128: 8}  # by the head size in 16-bit numbers
BACKWARD_WARPS = {16: 1, 32: 2, 64: 4, 128: 8}


def _bounds(gates: torch.Tensor, cu_seqlens: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The bounds of the sequences over all tokens, and their order, longest first: the rows of a program run as long as
    the longest of them."""
    B, T = gates.shape[:2]
    if cu_seqlens is None:
        rows = torch.arange(B + 1, device=gates.device)
        return rows * T, rows[:-1]
    bounds = cu_seqlens.long()
    return bounds, bounds.diff().argsort(descending=True, stable=True)


def _options(gates: torch.Tensor, cell: str, warps: dict[int, int]) -> dict:
    K = gates.shape[4]
    padded = max(16, power_of_2_from(K))
    narrow = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return {
        "G": len(CELLS[cell].gates),
        "NS": len(CELLS[cell].states),
        "K": K,
        "KP": padded,
        "BS": SEQUENCES,
        # the interpreter cannot multiply matrices of bfloat16
        "DOT": tl.float32 if INTERPRETED.value else narrow.get(gates.dtype, tl.float32),
        "PRECISION": "tf32x3",  # of products of float32; those of narrower types are exact
        "num_warps": warps[min(128, padded * gates.element_size() // 2)],
        "num_stages": 1,
    }


def forward(
    gates: torch.Tensor,
    weight: torch.Tensor,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    cell: str,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ h (B, T, H, K), final state (S, NS, H, K), and the states besides h (B · T, NS − 1, H, K) if they are to be
    saved."""
    B, T, _, H, K = gates.shape
    bounds, order = _bounds(gates, cu_seqlens)
    S, NS = len(order), len(CELLS[cell].states)
    h = gates.new_empty(B, T, H, K)
    final = gates.new_empty(S, NS, H, K, dtype=torch.float32)
    states = final.new_empty((B * T, NS - 1, H, K) if save else 0)
    forward_kernel[(ceil_div(S, SEQUENCES) * H,)](
        gates, weight, final if initial is None else initial, bounds, order, h, states, final, S, H,
        STEP=STEP[cell], HAS_INITIAL=initial is not None, SAVE=save, **_options(gates, cell, FORWARD_WARPS),
    )  # fmt: skip
    return h, final, states


@operator("head_rnn")
def _forward(
    gates: torch.Tensor,
    weight: torch.Tensor,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    cell: str,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if is_due(gates):
        check(gates, weight, cell, initial is not None, save)
    return forward(gates, weight, initial, cu_seqlens, cell, save)


@_forward.register_fake
def _(gates, weight, initial, cu_seqlens, cell, save):
    B, T, _, H, K = gates.shape
    NS, S = len(CELLS[cell].states), B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = gates.new_empty(S, NS, H, K, dtype=torch.float32)
    return gates.new_empty(B, T, H, K), final, final.new_empty((B * T, NS - 1, H, K) if save else 0)


def backward(
    grad_h: torch.Tensor,
    grad_final: torch.Tensor | None,
    gates: torch.Tensor,
    weight: torch.Tensor,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    h: torch.Tensor,
    states: torch.Tensor,
    cell: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ the gradients of gates, weight and initial state (empty if there is none)."""
    B, T, G, H, K = gates.shape
    bounds, order = _bounds(gates, cu_seqlens)
    S = len(order)
    grad_gates = torch.empty_like(gates)
    last_differs = cell == "gru"
    grad_rec = gates.new_empty((B * T, H, K) if last_differs else 0)
    grad_initial = states.new_empty(0 if initial is None else initial.shape)
    before = torch.empty_like(h).view(B * T, H, K)  # h before each step
    before[1:] = h.view(B * T, H, K)[:-1]
    before[bounds[:-1]] = 0 if initial is None else initial[:, -1].to(h.dtype)
    before = before.transpose(0, 1)  # (H, B·T, K)
    recur = K * h.element_size() <= TWICE_ON_CHIP
    products = h if recur else torch.stack([torch.bmm(before, w) for w in weight.to(h.dtype)])
    backward_kernel[(ceil_div(S, SEQUENCES) * H,)](
        grad_h, states if grad_final is None else grad_final, gates, weight, states if initial is None else initial,
        bounds, order, h, states, products, grad_gates, grad_rec, grad_initial, B * T, S, H,
        BACK=BACK[cell], HAS_INITIAL=initial is not None, HAS_FINAL=grad_final is not None, LAST_DIFFERS=last_differs,
        RECUR=recur, **_options(gates, cell, BACKWARD_WARPS),
    )  # fmt: skip
    by_gate = list(grad_gates.view(B * T, G, H, K).unbind(1))
    if last_differs:
        by_gate[-1] = grad_rec
    grad_weight = torch.stack([torch.bmm(before.mT, g.transpose(0, 1)) for g in by_gate])
    return grad_gates, grad_weight, grad_initial


_backward = Operator("head_rnn_backward", backward)


@_backward.register_fake
def _(grad_h, grad_final, gates, weight, initial, cu_seqlens, h, states, cell):
    grad_initial = states.new_empty(0 if initial is None else initial.shape)
    return torch.empty_like(gates), torch.empty_like(weight, dtype=gates.dtype), grad_initial


def check(gates: torch.Tensor, weight: torch.Tensor, cell: str, has_initial: bool, gradients: bool) -> None:
    """The self-check of the kernels for such tensors."""
    G, H, K = gates.shape[2:]

    def compare() -> float:
        draw = draws(gates.device)
        bounds = [0, 1, 9, 14]  # of documents, which are sequences like any other to the kernels
        S, T = len(bounds) - 1, bounds[-1]
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=gates.device)
        u, w = draw(1, T, G, H, K).to(gates.dtype), (draw(G, H, K, K) * (0.5 * K**-0.5)).to(weight.dtype)
        upstream = draw(1, T, H, K).to(gates.dtype)
        initial = None
        if has_initial:
            initial = draw(S, len(CELLS[cell].states), H, K).abs()  # slstm's normaliser is positive
        h, final, states = forward(u, w, initial, cu_seqlens, cell, gradients)
        got = [h, final]
        if gradients:
            got += backward(upstream, None, u, w, initial, cu_seqlens, h, states, cell)
            got = got if has_initial else got[:-1]

        def chunked(gates, weight, initial):
            if initial is None:
                initial = gates.new_zeros(S, len(CELLS[cell].states), H, K)
            return head_rnn_chunked(gates, weight, cell, initial, cu_seqlens)

        want = in_double(chunked, (u, w, initial), upstream if gradients else None)
        return deviation(got, want)

    sizes: dict[str, object] = {"cell": cell, "H": H, "K": K, "initial": has_initial, "gradients": gradients}
    sizes |= {"dtype": gates.dtype, "parameters": weight.dtype}
    # torch's products, for the weight's gradient, may be told to cut float32 to 11 bits
    limit = max(2e-3, rounding(gates.dtype))
    check_once("head_rnn", sizes, gates.device, compare, limit)


def _setup_context(ctx, inputs, output):
    gates, weight, initial, cu_seqlens, ctx.cell, save = inputs
    assert save, "called without the states, but a gradient is wanted"
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gates, weight, initial, cu_seqlens, output[0], output[2])


def _gradient(ctx, grad_h, grad_final, _):
    gates, weight, initial, cu_seqlens, h, states = ctx.saved_tensors
    grad_h = torch.zeros_like(h) if grad_h is None else grad_h.contiguous()
    grad_final = None if grad_final is None else grad_final.contiguous()
    grad_gates, grad_weight, grad_initial = _backward(
        grad_h, grad_final, gates, weight, initial, cu_seqlens, h, states, ctx.cell
    )
    return grad_gates, grad_weight.to(weight.dtype), None if initial is None else grad_initial, None, None, None


_forward.register_autograd(_gradient, setup_context=_setup_context)


def head_rnn_triton(
    gates: torch.Tensor, weight: torch.Tensor, cell: str, initial: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`riverrun.kernels.head_rnn.head_rnn`; `initial` is float32."""
    tensors = [x if x is None else x.contiguous() for x in (gates, weight, initial, cu_seqlens)]
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return _forward(*tensors, cell, save)[:2]
