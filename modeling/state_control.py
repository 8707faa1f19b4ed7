"""Training-free remedies for Mamba-2 models that fail beyond their training length, applied while they read.

Of a head, h_t = α_t h_{t−1} + Δ_t B_t x_tᵀ with α_t = exp(Δ_t A):

    retention, insertion   α ← c_α α, B ← c_B B: forget more and remember less (Chen et al. 2024, arXiv 2410.07145;
                           there c_α = 0.9999, c_B = 0.75).
    dt_scale               Δ ← s Δ, s of 0.2 to 0.5: the same steps, shorter.
    max_norm               h ← h p / ‖h‖ where ‖h‖ > p, the Frobenius norm of a head's state, after every `NORM_CHUNK`
                           tokens of a sequence: not after each, so that they are still computed together.
    window                 h_t − α_{t−r+1} ⋯ α_t h_{t−r}, which is the state of the last r tokens alone. It is computed
                           as the recurrence that it obeys, w_t = α_t w_{t−1} + u_t − α_{t−r+1} ⋯ α_t u_{t−r} with u the
                           inputs: one bounded state in fp32, in place of the difference of two that grow. Inputs of the
                           last r tokens are kept. A layer's inputs come from the windows of the layers below it, so
                           that a model of L layers sees L · r tokens, as with windows of attention.

The first two come before the others. They read in fp32 and cost time; without a control nothing changes.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from riverrun.kernels.ssd import ssd
from riverrun.modeling.layout import Layout

NORM_CHUNK = 128
LEAST_STEP = 1e-30  # a softplus can be 0

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # x (B, T, H, P), Δ (B, T, H), B, C (B, T, G, N)


@dataclass(frozen=True)
class StateControl:
    """See above; the defaults change nothing.

    Raises:
        ValueError: values out of range, or `max_norm` with `window`, whose subtraction needs a linear recurrence.
    """

    retention: float = 1.0
    insertion: float = 1.0
    dt_scale: float = 1.0
    max_norm: float = math.inf
    window: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.retention <= 1:
            raise ValueError(f"retention={self.retention} must be above 0 and at most 1; 0.9999 is usual")
        for name in ("insertion", "dt_scale", "max_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1 token")
        if self.window is not None and self.max_norm < math.inf:
            raise ValueError("max_norm and window do not go together: a window is exact for linear recurrences only")

    @classmethod
    def parse(cls, text: str) -> "StateControl":
        """From NAME=VALUE,NAME=VALUE.

        Raises:
            ValueError: an unknown name, a value that is no number, or out of range.
        """
        known, values = {f.name for f in fields(cls)}, dict[str, Any]()
        for part in text.split(","):
            name, equals, value = (side.strip() for side in part.partition("="))
            if not equals or name not in known:
                raise ValueError(
                    f"{part.strip()!r} is no state control: give {', '.join(sorted(known))}, as in "
                    "retention=0.9999,insertion=0.75"
                )
            try:
                values[name] = int(value) if name == "window" else float(value)
            except ValueError:
                kind = "a whole number" if name == "window" else "a number"
                raise ValueError(f"{name}={value} must be {kind}") from None
        return cls(**values)

    def settings(self) -> dict[str, float | int]:
        """What it changes, by name."""
        return {name: value for name, value in asdict(self).items() if value != getattr(StateControl, name)}

    def log_decay(self, log_alpha: torch.Tensor) -> torch.Tensor:
        """ln α of a model → that under this control."""
        return log_alpha * self.dt_scale + math.log(self.retention)

    def ssd(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor,
        *,
        layout: Layout,
        states: dict[str, torch.Tensor] | None,
        chunk_size: int,
    ) -> torch.Tensor:
        """The recurrence of a layer under control, for `riverrun.kernels.ssd.ssd`.

        Args:
            x, B, C: of the layer, flattened if packed.
            dt: (B, T, H) Δ, the softplus taken.
            states: read and written: `ssd` (B, H, P, N), and `window_x`, `window_dt`, `window_B`, the last inputs.

        Returns:
            y (B, T, H, P) in the type of `x`.
        """
        fp32 = torch.promote_types(x.dtype, torch.float32)
        X, B, C, delta = x.to(fp32), B.to(fp32), C.to(fp32), self.dt_scale * dt.to(fp32)
        decay = delta + math.log(self.retention) / A  # the steps that decay so: exp(decay · A) = c_α exp(Δ A)
        decay = decay.clamp(min=LEAST_STEP)
        inputs = (X * (self.insertion * delta / decay)[..., None], decay, B, C)
        run = self._windowed if self.window is not None else self._normalised
        before = {name: state for name, state in (states or {}).items() if name in STATES}
        parts, after = [], []
        for piece, positions, start in _sequences(inputs, layout, before):
            y, final = run(piece, A, positions, start, chunk_size)
            parts.append(y)
            after.append(final)
        if states is not None:
            for name in after[0]:
                states[name] = layout.last(torch.cat([final[name] for final in after]))
        y = torch.cat(parts, dim=1) if layout.cu_seqlens is not None else parts[0]
        return (y + D[:, None] * X).to(x.dtype)

    def _normalised(
        self, inputs: Inputs, A: torch.Tensor, positions: torch.Tensor, states: dict[str, torch.Tensor], chunk_size: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        after, T, parts = dict(states), inputs[0].shape[1], []
        due = (positions + 1) % NORM_CHUNK == 0  # (B, T)
        cuts = [T] if self.max_norm == math.inf else sorted({T, *(due.any(0).nonzero().flatten() + 1).tolist()})
        for start, stop in pairwise([0, *cuts]):
            x, dt, B, C = (part[:, start:stop] for part in inputs)
            y, state = ssd(x, dt, A, B, C, initial_state=after.get("ssd"), chunk_size=chunk_size)
            parts.append(y)
            if self.max_norm < math.inf:
                norm = state.flatten(2).norm(dim=2)  # (B, H)
                shrink = (self.max_norm / norm).clamp(max=1).masked_fill(~due[:, stop - 1, None], 1)
                state = state * shrink[..., None, None]
            after["ssd"] = state
        return torch.cat(parts, dim=1), after

    def _windowed(
        self, inputs: Inputs, A: torch.Tensor, positions: torch.Tensor, states: dict[str, torch.Tensor], chunk_size: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        x, dt, B, C = inputs
        T, r = x.shape[1], self.window
        assert r is not None
        long = {}  # the last r inputs, and the new ones
        for name, new in (("window_x", x), ("window_dt", dt), ("window_B", B)):
            old = states.get(name)
            long[name] = torch.cat([new.new_zeros(len(new), r, *new.shape[2:]) if old is None else old, new], dim=1)
        steps = long["window_dt"].double().cumsum(1)
        left = ((steps[:, r:] - steps[:, :T]) * A.double()).exp().to(x.dtype)  # of token t − r after token t
        weight = left * long["window_dt"][:, :T] / dt
        y, state = ssd(x, dt, A, B, C, initial_state=states.get("ssd"), chunk_size=chunk_size)
        leaving = long["window_x"][:, :T] * weight[..., None], dt, A, long["window_B"][:, :T], C
        gone, of_gone = ssd(*leaving, chunk_size=chunk_size)
        return y - gone, {"ssd": state - of_gone} | {name: kept[:, T:] for name, kept in long.items()}


STATES = ("ssd", "window_x", "window_dt", "window_B")


def _sequences(
    inputs: Inputs, layout: Layout, before: dict[str, torch.Tensor]
) -> Iterator[tuple[Inputs, torch.Tensor, dict[str, torch.Tensor]]]:
    """Inputs, positions and initial states of what is computed at once: all rows, or one packed sequence."""
    if layout.cu_seqlens is None:
        yield inputs, layout.positions, before
        return
    positions = layout.positions.view(1, -1)
    initial = {name: layout.initial(before, name) for name in before}
    bounds = layout.cu_seqlens.tolist()
    for s, (start, stop) in enumerate(pairwise(bounds)):
        x, dt, B, C = (part[:, start:stop] for part in inputs)
        own = {name: state[s : s + 1] for name, state in initial.items() if state is not None}
        yield (x, dt, B, C), positions[:, start:stop], own


def set_state_control(model: nn.Module, control: StateControl | None) -> None:
    """Puts all Mamba-2 layers of a model under `control`; None, or one that changes nothing: under none.

    Raises:
        ValueError: the model has no such layers.
    """
    layers = [module for module in model.modules() if hasattr(module, "state_control")]
    if control is not None and not layers:
        raise ValueError("state controls are for mamba2 layers, of which this model has none")
    for layer in layers:
        layer.state_control = control if control is not None and control.settings() else None  # type: ignore[assignment]
