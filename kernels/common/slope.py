"""How a recurrence's last state depends on its first, by autograd. For short sequences in Triton: `triton_slope.py`."""

from collections.abc import Callable

import torch
from torch.autograd.graph import saved_tensors_hooks


def linearise(solve: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Φ(start) (S, K, D) of a solve that mixes no channels, and ∂Φ (S, K, K, D) there; neither has a gradient."""
    start = start.detach().requires_grad_()
    # the hooks keep recomputation away from a graph that is gone before the forward pass is over; outputs that it saves
    # as they are would keep it alive
    with torch.enable_grad(), saved_tensors_hooks(torch.Tensor.detach, lambda x: x):
        end = solve(start)
        # the gradient of all channels' sum is every channel's own
        rows = [torch.autograd.grad(e.sum(), start, retain_graph=True)[0] for e in end.unbind(1)]
    return end.detach(), torch.stack(rows, dim=1)
