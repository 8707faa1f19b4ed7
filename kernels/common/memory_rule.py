"""How a neural memory learns, without torch: models' options are read where it need not be loaded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# ε of the LayerNorm of a memory's output, about the variance of what it norms at first. With a tiny one, a norm divides
# by whatever little forgetting has left, and magnifies gradients without bound (`curvature`).
NORM_EPS = 1e-2

# Tokens after which memories forget half, at first. A deep one that is forgotten down to nothing learns no more: the
# gradient of each of its layers has the others' size.
LINEAR_HALF_LIFE, DEEP_HALF_LIFE = 256.0, 8192.0


@dataclass(frozen=True)
class Rule:
    """A memory network and its learning rule. With the names of `riverrun.kernels.neural_memory.neural_memory`:

    Attributes:
        chunk_size: b, tokens whose gradients are taken at the weights before the first of them; 1: the online rule.
            Chunks are counted from a sequence's start.
        read: "after": a token reads the memory it has written to (Titans, arXiv 2501.00663, eq. 15). "before": the one
            before it. "chunk": that at its chunk's start, as in LaCT (arXiv 2505.23884), which makes a chunk plain
            matrix products.
        bias: the inner loss, of e = f(k) − v: "l2" ½‖e‖²; "dot" −⟨f(k), v⟩; "lp" Σ|e|^p / p; "huber" Huber's,
            each coordinate's gradient cut to ±δ. Yaad (arXiv 2504.13173, §5.3) changes from e to δ sign(e) for whole
            tokens, by ‖e‖ ≤ δ, so that at the edge rounding decides about the whole step.
        p: of "lp".
        activation: φ between the layers.
        residual: f(x) = x + … .
        gated: three matrices, (φ(x W₁) ∘ (x W₂)) W₃, instead of a chain.
        retention: what weights are made of the accumulators that are written to: "none": they are those. "lq": scaled
            by 1 / ‖A‖_q^(q−2) (Moneta, §5.3), at each chunk's start. "softmax": softmax over each output's
            inputs (Memora), at each chunk's start.
        q: of "lq".
        window: c, tokens up to each whose weighted losses it learns from (the Omega rule of ATLAS, arXiv 2505.23735,
            eq. 9). Gradients of tokens before the chunk are taken anew at its weights.
        newton_schulz: iterations of Muon's orthogonalisation that a chunk's last momentum S_b, which then takes its
            gradients whole, passes through on its way into the weights, Σ_t (Π_{j>t} (1 − α_j)) θ_t times, when the
            chunk is full (ATLAS, eqs. 32–33, which do this at every token); 0: none.
    """

    chunk_size: int = 1
    read: Literal["after", "before", "chunk"] = "after"
    bias: Literal["l2", "dot", "lp", "huber"] = "l2"
    p: float = 3.0
    activation: Literal["gelu", "silu"] = "gelu"
    residual: bool = False
    gated: bool = False
    retention: Literal["none", "lq", "softmax"] = "none"
    q: float = 4.0
    window: int = 1
    newton_schulz: int = 0

    def problems(self) -> list[str]:
        """All that does not fit together, each with its fix."""
        found = [f"{n}={getattr(self, n)} must be at least 1" for n in ("chunk_size", "window") if getattr(self, n) < 1]
        if self.read != "chunk" and (self.newton_schulz or self.retention == "softmax"):
            what = "newton_schulz" if self.newton_schulz else "retention='softmax'"
            found.append(f"{what} changes the weights at chunks' ends only: it needs read='chunk'")
        if self.p < 1:
            found.append(f"p={self.p} must be at least 1; the paper has 3")
        if self.q < 2:
            found.append(f"q={self.q} must be at least 2; the paper has 4")
        return found


def curvature(sizes: Sequence[tuple[int, int]], norm: bool, gated: bool) -> float:
    """About the largest eigenvalue of the l2 loss's Gauss-Newton matrix for one key of unit length, at weights drawn
    with variance 1 / in, or with a norm at whatever forgetting leaves of them: a step θ along the gradient scales the
    error by 1 − θ times that.

    A layer has the squared length of its input times the squared gain from its output to the memory's (Bai & Yin's
    largest singular value (1 + √(out / in)) of a random matrix, and the activation's slope of ½ at small inputs, which
    in a gated memory is scaled by its other half). A LayerNorm, with gains that give the output a key's length, divides
    by the deviation of what it norms: it curves a memory the more, the less is left in its last layer, up to what ε
    allows. Without one a memory starts flat and gets steeper as it learns: no layer counts for less than 1.

    Args:
        sizes: (in, out) of the memory's matrices, the last one's out being the values'.
        norm: the outputs pass a LayerNorm with gains 1 / √out.
        gated: (φ(x W₁) ∘ (x W₂)) W₃.
    """
    layers = list(sizes[1:] if gated else sizes)
    slope = 1 / (4 * layers[0][0]) if gated else 1 / 4  # squared
    lengths = [1.0]  # squared, of the layers' inputs
    for n, m in layers[:-1]:
        lengths.append(lengths[-1] * slope * m / n)
    n, m = layers[-1]
    gain = 1 / (m * (lengths[-1] / n + NORM_EPS)) if norm else 1.0
    total = lengths[-1] / (m * NORM_EPS) if norm else lengths[-1]
    for i, (n, m) in reversed(list(enumerate(layers[1:]))):
        gain *= slope * (1 + math.sqrt(m / n)) ** 2
        total += lengths[i] * gain * (2 if gated and i == 0 else 1)
    return max(total, float(len(sizes)))
