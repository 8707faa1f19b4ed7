"""What a benchmark consists of. A new op takes one file with one `Benchmark`, and a place in the package's list."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

Inputs = dict[str, torch.Tensor]
"""By name; those of a floating-point type require gradients. The first axes of sequences are (B, T, …)."""

Load = Callable[[str], ModuleType]
"""Imports a package that Riverrun does not depend on; raises ModuleNotFoundError if it is not installed."""


class Unavailable(Exception):
    """A contender cannot run here; the message says why."""


@dataclass(frozen=True)
class Case:
    """The shapes of a run: B rows of T tokens, D channels in H heads; `variant` of ops that have several, else ""."""

    B: int
    T: int
    D: int
    H: int
    dtype: torch.dtype
    device: torch.device
    variant: str = ""

    @property
    def elements(self) -> int:
        return self.B * self.T * self.D


@dataclass
class Work:
    """What a contender does with given inputs.

    Attributes:
        forward: the kernel, from ready pre-activations to h (B, T, …).
        leaves: the tensors whose gradients the kernel's backward pass must yield: the gates, then the weights.
        layer: the same from the layer's input x, through the projection.
        layer_leaves: x and all parameters.
        backward: dL/dh → whatever the contender's backward kernel gives, where it is not reached through autograd.
        arrange: the leaves' gradients → those of the reference's leaves, where a contender keeps the same parameters in
            another form.
    """

    forward: Callable[[], torch.Tensor]
    leaves: tuple[torch.Tensor, ...]
    layer: Callable[[], torch.Tensor] | None = None
    layer_leaves: tuple[torch.Tensor, ...] = ()
    backward: Callable[[torch.Tensor], Any] | None = None
    arrange: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]] | None = None


@dataclass(frozen=True)
class Contender:
    """One way to compute the op, or something that competes with it.

    Attributes:
        build: (inputs, case, load) → its work; may raise `Unavailable`.
        note: what a reader must know to compare it.
        same_maths: computes the same function: its error is measured, otherwise it has none.
        needs_cuda: cannot run elsewhere.
        min_len, max_len: shorter sequences say nothing about it, longer ones would take too long: they are left out.
    """

    name: str
    build: Callable[[Inputs, Case, Load], Work]
    note: str = ""
    same_maths: bool = True
    needs_cuda: bool = False
    min_len: int = 1
    max_len: int | None = None


@dataclass(frozen=True)
class Benchmark:
    """An op and its contenders.

    Attributes:
        inputs: (case, regime) → the inputs, from torch's random state.
        regimes: the kinds of inputs to measure. The first is also that of the sweep over T.
        contenders: of a case, ours in its default form first: the others' times are given as multiples of its.
        reference: the step-by-step definition, on whatever type of inputs it gets.
        forward_numbers, backward_numbers: how many numbers of the inputs' type an element (B · T · D) must be read and
            written at least, and `formula`, the same in words.
        sequences: the inputs with axes (B, T, …), which are cut where the reference would take too long.
        variants: the choices of `Case.variant`, the first being the default.
        width, heads: D and H where nothing else is asked for; H may follow from D and the variant.
        head_counts: the H of the sweep over heads of that width in all; empty: there is none.
        products: of a layer, the contender that does its matrix products alone: the rest of the layer's time is that of
            the recurrence, and of what glues all together.
        flops: of the matrix products of a forward pass, where they are what the op's time goes to.
    """

    name: str
    inputs: Callable[[Case, str], Inputs]
    regimes: dict[str, str]
    contenders: Callable[[Case], list[Contender]]
    reference: Callable[[Inputs, Case], Work]
    forward_numbers: Callable[[Case], float]
    backward_numbers: Callable[[Case], float]
    formula: str
    sequences: tuple[str, ...] = ("x", "gates")
    variants: tuple[str, ...] = ()
    width: int = 2048
    heads: int | Callable[[int, str], int] = 8
    head_counts: tuple[int, ...] = ()
    products: str = ""
    flops: Callable[[Case], float] | None = None

    def heads_of(self, width: int, variant: str) -> int:
        return self.heads(width, variant) if callable(self.heads) else self.heads
