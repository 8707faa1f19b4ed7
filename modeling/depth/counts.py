"""How many iterations of the core a micro batch gets in training: the distribution of recurrence counts, exactly.

Of "poisson-lognormal-filling" (Geiping et al. 2025, arXiv 2502.05171, §3.3, and their code), with mean r̄, σ and k̄
iterations that backpropagate:

    τ ~ N(ln r̄ − σ²/2, σ²),    p ~ Poisson(e^τ) + 1,    n = max(p − k̄, 0),    k = min(p, k̄)

of which n come first, without gradient. E[e^τ] = r̄, so that p is r̄ + 1 on average. "fixed" has p = r̄ always.

The tail is cut: a p beyond the 99.9 % quantile is that quantile, so that no step takes more than about four times the
mean, and time limits of collectives can be set.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from riverrun.modeling.depth.options import DepthOptions

CAP = 0.999  # the quantile that counts are cut at
WIDTH, NODES = 8.0, 2001  # of the trapezoidal rule over τ: standard deviations either way, and points

Steps = tuple[int, int]  # iterations without gradient, and with it


@dataclass(frozen=True)
class RecurrenceDistribution:
    """Of the numbers of iterations (n, k) of a micro batch.

    Args:
        options: of the model; `mean_recurrence`, `backprop_depth`, `sampling` and `sigma` count.
    """

    options: DepthOptions

    @cached_property
    def pmf(self) -> list[float]:
        """Probabilities of p = 0, 1, …, up to the largest one. That of 0 is 0."""
        if self.options.sampling == "fixed":
            return [*[0.0] * self.options.mean_recurrence, 1.0]
        log_rate, log_weight = self._nodes()
        log_term = log_weight - log_rate.exp()  # of every node, that Poisson's variable is `count`
        terms, total, count = [0.0], 0.0, 0
        while total < CAP:
            terms.append(log_term.exp().sum().item())
            total += terms[-1]
            count += 1
            log_term += log_rate - math.log(count)
        terms[-1] += 1 - total
        return terms

    def _nodes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Values of τ, and the logarithms of their weights, which sum to one. For an analytic integrand that vanishes
        at both ends the trapezoidal rule converges exponentially."""
        normal = torch.linspace(-WIDTH, WIDTH, NODES, dtype=torch.float64, device="cpu")
        log_weight = (-normal.square() / 2).log_softmax(0)
        sigma = self.options.sigma
        return math.log(self.options.mean_recurrence) - sigma**2 / 2 + sigma * normal, log_weight

    @property
    def largest(self) -> int:
        """The most iterations that a micro batch gets."""
        return len(self.pmf) - 1

    @cached_property
    def mean_steps(self) -> tuple[float, float]:
        """E[n] and E[k]."""
        of_each = [self.split(count) for count in range(len(self.pmf))]
        n, k = (math.fsum(p * count for p, count in zip(self.pmf, counts)) for counts in zip(*of_each))
        return n, k

    def quantile(self, u: float) -> int:
        """The smallest p whose cumulative probability is above u, for u in [0, 1)."""
        return min(bisect_right(self._cumulative, u), self.largest)

    @cached_property
    def _cumulative(self) -> list[float]:
        return list(accumulate(self.pmf))

    def split(self, count: int) -> Steps:
        """p iterations as (n, k)."""
        depth = self.options.backprop_depth
        return max(count - depth, 0), min(count, depth)
