"""What kernels' launchers allocate and free again while an operator runs, in bytes, from the operator's arguments.

By the operator's name; `launch/footprint.py` sees all else that is allocated.
"""

from collections.abc import Callable
from math import prod

import torch

from riverrun.modeling.attention_block import HALF, SCORE_BYTES


def _inside_ssd(grad_y, grad_final, x, dt, A, B, *_) -> float:
    """States at the chunks' starts and their adjoints, (M, H, N, P) in the type of x each; grad_B and grad_C in two
    float32 parts each; six float32 numbers a token and head (kernels/ssd/triton_op.py)."""
    tokens, (H, P), N = prod(x.shape[:2]), x.shape[2:], B.shape[3]
    chunk = min(64, 8192 // max(64, N))
    return 2 * tokens / chunk * H * N * P * x.element_size() + 4 * 4 * B.numel() + 6 * 4 * tokens * H


def _inside_delta(k: torch.Tensor, exact: bool) -> float:
    """The inverse and the scores, (M, H, C, C) each, of chunks of C = 64 Householder steps (…/triton_launch.py)."""
    return 2 * 64 * (prod(k.shape[:4])) * (4 if exact else k.element_size())


def _inside_delta_backward(grad_o, grad_final, q, k, v, *rest) -> float:
    """The same, states and their adjoints at the chunks' edges (M, H, K, V), W and Y like v (…/triton_walks.py); X and
    Z, as large as inverse and scores, in the type of k (…/triton_op.py)."""
    steps, size = prod(k.shape[:4]), 4 if rest[-1] else k.element_size()
    states = 2 * steps / 64 * k.shape[-1] * v.shape[-1]
    return _inside_delta(k, rest[-1]) + _inside_delta(k, False) + (states + 2 * v.numel()) * size


def _inside_linear_memory(q, k, v, decay, weight: torch.Tensor, *rest) -> float:
    """The scores, and of an online memory T, (M, H, C, C) each, in the type of q, unless they are saved
    (kernels/neural_memory/triton_linear_launch.py)."""
    online, _, save = rest[-3:]
    return 0.0 if save else (1.0 + online) * weight.numel() * q.element_size()


def _inside_linear_memory_backward(grad_o, of_final, of_momentum, q, k, v, decay, weight, carry, *rest) -> float:
    """The same, unless they were saved, with the states at the chunks' starts, (M, H, K, V) each, twice with a
    momentum, and E like v; as large as these, the states' adjoints, X, and of an online memory Z. Gradients of gates in
    parts that are summed, float32."""
    (errors, *_, online, _), (M, H, C) = rest[-4:], decay.shape
    squares, copies = (1 + online) * weight.numel(), 1 if carry is None else 2
    states = copies * M * H * q.shape[-1] * v.shape[-1]
    made = 0 if errors.numel() else squares + states + v.numel()
    return (made + states + squares) * q.element_size() + 4.0 * M * H * C * (copies * online + 2)


def _inside_flash_backward(grad, q: torch.Tensor, k, v, out, log_z: torch.Tensor, *_) -> float:
    """A float32 sum of q's gradient and a number a token and head. In float32, which those kernels do not take, a part
    of the scores four times (modeling/attention_block.py)."""
    if q.dtype not in HALF:
        return 4.0 * SCORE_BYTES
    return 4.0 * (q.numel() + log_z.numel())


def _inside_mlp_memory(q, k, v, r1, weight, e1, w1, r2, g2, e2, w2, gain, initial, *options) -> float:
    """Of the heads at a time: what tiles of hidden channels leave to be summed, float32, and unless it is kept δ₂ of a
    chunk, in the type of k."""
    launch, C, V = _mlp_launch(k, v, weight, gain, initial, *options), weight.shape[-1], v.shape[-1]
    return launch.teams * C * V * ((launch.save != "all") * k.element_size() + 12.0 * launch.tiles)


def _inside_mlp_memory_backward(grad_o, of_final, q, k, v, *rest) -> float:
    """Of a group of g chunks of all sequences, in the type of k: what one kernel hands on to the next, and gradients of
    the states behind; the states before, too, with δ₂ and, float32, U, unless those of all chunks are kept. Of the
    heads at a time, shares to be summed and the gradient of U. Of all chunks, those of gates, and what comes back
    through a norm (kernels/neural_memory/triton_mlp.py). Groups grow with the root of a row's length."""
    from riverrun.kernels.neural_memory.triton_mlp_handed import HANDED

    (_, weight, ends), (gain, initial), options = rest[:3], rest[8:10], rest[-5:]
    launch, width, (P, size) = _mlp_launch(k, v, weight, gain, initial, *options), k.element_size(), initial.shape[2:]
    (M, H, _, C), tiles, (F, V) = weight.shape, launch.tiles, (launch.options[name] for name in "FV")
    again = P * size * width + (width + 4) * C * V if launch.save == "root" else 0
    of_group = launch.heads * launch.keep * (width * (HANDED.value * F * C + tiles * C * C + P * size) + again)
    of_teams = launch.teams * C * V * (width + (8 if launch.save == "root" else 4) * tiles)
    of_all = 4 * M * H * (2 * tiles * (2 * P * C + ends.shape[-1]) + C // 16 * V)
    return of_group + of_teams + of_all + (0 if gain is None else v.numel() * width)


def _mlp_launch(k, v, weight, gain, initial, cu_seqlens, silu, residual, save, max_seqlen):
    from riverrun.kernels.neural_memory.triton_mlp_launch import Launch

    return Launch.of(k, v, weight, gain, initial, cu_seqlens, silu, residual, save, max_seqlen)


def _inside_long_memory(q, k, v, writes, ends, first, second, chunk_size, silu, l2, save) -> float:
    """Of one chunk, what lies between its products, and where nothing is saved what would be
    (kernels/neural_memory/long_chunks_walk.py), in the type of q."""
    (B, T, H, V), (K, P, _, F) = v.shape, first.shape[1:]
    saved = 0 if save else 2 * K + 5 * F + V
    return B * H * min(T, chunk_size) * (2 * F + 2 * P * F + P * V + V + saved) * q.element_size()


def _inside_long_memory_backward(
    grad_o, of_first, of_second, writes, ends, first, second, room, chunk_size, *_
) -> float:
    """Likewise, and the adjoint of every sequence's state in that type too."""
    (B, T, H, V), (K, P, _, F) = grad_o.shape, first.shape[1:]
    of_tokens = B * H * min(T, chunk_size) * (2 * V + 11 * F + 2 * K + 4 * P * F + 2 * P * V)
    return (of_tokens + B * H * (first[0].numel() + second[0].numel())) * grad_o.element_size()


INSIDE: dict[str, Callable[..., float]] = {
    "_flash_attention_backward": _inside_flash_backward,
    "ssd_triton": lambda x, dt, *_: 2.0 * 4 * dt.numel(),
    "ssd_triton_backward": _inside_ssd,
    "gated_delta_triton": lambda q, k, *rest: _inside_delta(k, rest[-1]),
    "gated_delta_triton_backward": _inside_delta_backward,
    "linear_memory_triton": _inside_linear_memory,
    "linear_memory_triton_backward": _inside_linear_memory_backward,
    "neural_memory_mlp_triton": _inside_mlp_memory,
    "neural_memory_mlp_triton_backward": _inside_mlp_memory_backward,
    "neural_memory_long": _inside_long_memory,
    "neural_memory_long_backward": _inside_long_memory_backward,
    # h of the step before; and, of gates side by side, what the weight's gradient sums (kernels/head_rnn/triton_op.py)
    "head_rnn_backward": lambda grad_h, *_: 2.0 * grad_h.numel() * grad_h.element_size(),
}
