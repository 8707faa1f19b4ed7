"""Torch operators written in Python, with gradients, which torch.compile does not look into.

On the way to such an operator torch.library spends the time of several launches. While a model runs eagerly nobody
looks: then an operator here is its function, or a plain `torch.autograd.Function` of it if it has a gradient.
"""

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

# a second copy of this source, loaded under another name as a checkpoint's remote code, has operators of its own
NAMESPACE = re.sub(r"\W", "_", __name__)


class Operator:
    """A function of tensors, among them the first argument, that returns new ones. Called with all its arguments, by
    position.

    Attributes:
        overload: the operator as torch's dispatcher knows it.
    """

    def __init__(self, name: str, function: Callable[..., Any]):
        self.name = name
        self._function = function
        self._gradient: type[torch.autograd.Function] | None = None
        self._definition = torch.library.custom_op(f"{NAMESPACE}::{name}", function, mutates_args=())
        self.overload = getattr(getattr(torch.ops, NAMESPACE), name).default

    def register_fake(self, fake: Callable[..., Any]) -> None:
        """`fake` makes empty tensors like the outputs."""
        self._definition.register_fake(fake)

    def register_autograd(self, gradient: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """As torch.library's, for a gradient that is not itself differentiated."""
        self._definition.register_autograd(gradient, setup_context=setup_context)

        # torch would inspect signatures at every call of a `setup_context` of its own
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = self._run(*inputs)
            setup_context(ctx, inputs, output)
            return output

        parts = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(gradient))}
        self._gradient = type(self.name, (torch.autograd.Function,), parts)

    def __call__(self, *inputs: Any) -> Any:
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or type(inputs[0]) not in PLAIN:
            return self.overload(*inputs)
        if self._gradient is None or not _wanted(inputs):
            return self._run(*inputs)
        return self._gradient.apply(*inputs)

    def _run(self, *inputs: Any) -> Any:
        kind = inputs[0].device.type
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            return self._function(*inputs)


PLAIN = (torch.Tensor, torch.nn.Parameter)


def _wanted(inputs: tuple[Any, ...]) -> bool:
    """Whether autograd is to know of the call."""
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """The decorated function, with its types annotated, as an `Operator`; nothing may be written to its arguments."""
    return lambda function: Operator(name, function)
