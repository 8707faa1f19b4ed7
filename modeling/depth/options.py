"""The options of recurrent depth: a core of layers that runs several times between a prelude and a coda."""

from dataclasses import dataclass
from math import isfinite
from typing import Literal, get_args

Sampling = Literal["poisson-lognormal-filling", "fixed"]
Injection = Literal["linear", "diagonal"]


@dataclass(frozen=True)
class DepthOptions:
    """Recurrent depth (Geiping et al. 2025, arXiv 2502.05171): logits = coda(s_r), s_i = core(s_{i−1}, prelude(x)).

    The first `prelude_layers` of the model's layers are the prelude, the last `coda_layers` the coda, those between
    them the core, which is run r times on one set of weights.
    """

    __pydantic_config__ = {"extra": "forbid"}

    prelude_layers: int = 2
    coda_layers: int = 2
    mean_recurrence: int = 32  # r̄: iterations of the core, on average in training, and by default elsewhere
    backprop_depth: int = 8  # k: the gradient goes through the last k iterations at most
    sampling: Sampling = "poisson-lognormal-filling"  # of a micro batch's r in training; "fixed": always r̄
    sigma: float = 0.5  # of ln r under poisson-lognormal-filling
    injection: Injection = "linear"  # of the prelude's output into the core: by Huginn's adapter, or Parcae's diagonal
    norm_core: bool = True  # the model's final norm also on what the core leaves to the coda; a retrofit has none there
    state_std: float | None = None  # of s_0's truncated normal; None: √(2/5), that of takase's embedding; 0: zeros

    @property
    def initial_std(self) -> float:
        """σ of s_0, before it is cut off at three of it."""
        return 0.4**0.5 if self.state_std is None else self.state_std

    def core_layers(self, num_hidden_layers: int) -> int:
        """Layers of the core, of a model of so many layers."""
        return num_hidden_layers - self.prelude_layers - self.coda_layers

    def effective_layers(self, num_hidden_layers: int) -> int:
        """Layers that r̄ iterations run."""
        core = self.core_layers(num_hidden_layers)
        return num_hidden_layers + (self.mean_recurrence - 1) * core

    def steps(self, num_steps: int | tuple[int, int] | None, training: bool) -> tuple[int, int]:
        """(n, k): iterations without and with a gradient.

        Args:
            num_steps: (n, k) itself; or r: the last iterations, `backprop_depth` at most, get a gradient in training,
                none elsewhere; None: r̄.

        Raises:
            ValueError: no iteration at all, or a negative number.
        """
        if isinstance(num_steps, int) or num_steps is None:
            r = self.mean_recurrence if num_steps is None else num_steps
            k = min(r, self.backprop_depth) if training else 0
            n = r - k
        else:
            n, k = num_steps
        if n < 0 or k < 0 or n + k < 1:
            raise ValueError(
                f"num_steps={num_steps} must be at least 1 iteration of the core, or (n, k): iterations without and "
                "with a gradient, neither negative"
            )
        return n, k

    def problems(self, num_hidden_layers: int) -> list[str]:
        """Everything that is impossible, each with its fix."""
        found = []
        for name in ("prelude_layers", "coda_layers"):
            if getattr(self, name) < 0:
                found.append(f"depth.{name}={getattr(self, name)} must not be negative; 0 is none")
        if not found and self.core_layers(num_hidden_layers) < 1:
            found.append(
                f"depth.prelude_layers={self.prelude_layers} and depth.coda_layers={self.coda_layers} leave no core of "
                f"num_hidden_layers={num_hidden_layers}: set num_hidden_layers to at least "
                f"{self.prelude_layers + self.coda_layers + 1}"
            )
        for name in ("mean_recurrence", "backprop_depth"):
            if getattr(self, name) < 1:
                found.append(f"depth.{name}={getattr(self, name)} must be at least 1 iteration")
        for name, known in (("sampling", get_args(Sampling)), ("injection", get_args(Injection))):
            if getattr(self, name) not in known:
                found.append(f"depth.{name}={getattr(self, name)!r} is unknown; choose from {', '.join(known)}")
        if not (isfinite(self.sigma) and self.sigma >= 0):
            found.append(f"depth.sigma={self.sigma} must be a number that is not negative; 0.5 is Huginn's")
        if not (isfinite(self.initial_std) and self.initial_std >= 0):
            found.append(f"depth.state_std={self.state_std} must be a number that is not negative; 0 starts from zeros")
        return found
