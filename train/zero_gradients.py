"""What DeepSpeed's ZeRO-1 (`BF16_Optimizer`) does to gradients one parameter after another, in fewer launches: models
of many layers have hundreds of parameters, and where they are small a GPU waits for its host.
"""

from typing import Any

import torch

from riverrun.modeling.parallel.mesh import Axis


def take_together(zero: Any, tp: Axis) -> None:
    """Makes `zero` add each gradient to its fp32 sum in one launch, instead of converting it first, and find the norm
    and clip in one launch a parameter group. The same but for rounding: of the norm, and of what is clipped by it."""
    one_by_one = zero.get_grads_for_norm

    @torch.no_grad()
    def accumulate(param: torch.nn.Parameter, group: int, index: int) -> None:
        assert param.grad is not None
        total = zero.fp32_groups_gradients[group][index]
        total.add_(param.grad.view(total.shape))
        zero.fp32_groups_has_gradients[group][index] = True
        param.grad = None

    def for_norm(for_clipping: bool = False) -> Any:
        whole = zero.fp32_groups_actual_gradients_flat
        if for_clipping:
            return whole
        # tensor-parallel ranks must count once what they all have
        return (whole, {}) if tp.size == 1 else one_by_one()

    zero.accumulate_hp_grads_and_remove_lp = accumulate
    zero.get_grads_for_norm = for_norm
