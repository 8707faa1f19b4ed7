"""s_0, what the core starts from: a truncated normal number for every token and channel, drawn by counting.

The number is a function of a token's key and its channel alone, by hashing: no generator's state, no order of drawing.
So it is the same on any layout of ranks, when a prompt is read in parts, and when the forward pass is done again.

The hash is two rounds of Mueller's xor-shift-multiply form with constants below 2³¹ that were searched for little bias
(Wellons' hash prospector), on 32-bit words in int64: no product overflows.
"""

import math

import torch

from riverrun.modeling.layout import Layout
from riverrun.modeling.parallel.mesh import ALONE, Axis

CUT = 3.0  # standard deviations
WORD = 2**32 - 1
CHUNK = 2**22  # numbers that are drawn at a time
_EDGE = math.erf(CUT / math.sqrt(2))


def initial_state(
    layout: Layout, row_keys: torch.Tensor | None, like: torch.Tensor, std: float, tp: Axis = ALONE
) -> torch.Tensor:
    """s_0 (B, T, channels); among tensor-parallel ranks (B·T / tp.size, channels), of this rank's tokens.

    Args:
        row_keys: (B,) int64: keys are those of a row and the token's place in the whole of it, as in training; None:
            keys are positions in sequences, so that a sequence has the same s_0 wherever it stands.
        like: whose shape, type and device it has.
        std: of the normal distribution before it is cut off at three of it on either side, after which the numbers' is
            0.9866 of it; 0: zeros.
    """
    if std == 0:
        return torch.zeros_like(like)
    keys = token_keys(layout, row_keys).flatten(0, 1)
    return draw(keys[tp.share(len(keys))], like.shape[-1], std).to(like.dtype).view(like.shape)


def token_keys(layout: Layout, row_keys: torch.Tensor | None) -> torch.Tensor:
    """(B, T, 2) int64, 32 bits each."""
    if row_keys is None:
        index = layout.positions
        low = high = torch.zeros_like(index[:, :1])
    else:
        B, T = layout.shape
        first = 0 if layout.context is None else layout.context.axis.rank * T
        index = torch.arange(first, first + T, device=row_keys.device).expand(B, T)
        low, high = row_keys[:, None] & WORD, (row_keys[:, None] >> 32) & WORD
    a = _mix(_mix(low) ^ index)
    return torch.stack([a, _mix(_mix(high) + index & WORD) ^ a], dim=-1)


def draw(keys: torch.Tensor, channels: int, std: float) -> torch.Tensor:
    """Keys (N, 2) → (N, channels) float32."""
    out = torch.empty(len(keys), channels, dtype=torch.float32, device=keys.device)
    channel = torch.arange(channels, device=keys.device)
    size = max(1, CHUNK // channels)
    for part, pairs in zip(out.split(size), keys.split(size)):
        a, b = pairs.T[..., None]
        bits = _mix(_mix(channel ^ a) + b & WORD)
        uniform = (2 * (bits >> 8) + 1 - 2**24).float() / 2**24  # exact, between −1 and 1, symmetric
        part.copy_(torch.erfinv(uniform * _EDGE) * (std * math.sqrt(2)))
    return out


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A permutation of the 32-bit words."""
    x = (x ^ (x >> 15)) * 0x2C1B3C6D & WORD
    x = (x ^ (x >> 12)) * 0x297A2D39 & WORD
    return x ^ (x >> 15)
