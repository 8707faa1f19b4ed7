"""Which parameter is trained how: AdamW or Muon, with or without weight decay.

The rules:
- Muon (if asked for) trains the weights of `nn.Linear` layers except the output head, each as one matrix. All else
  (embeddings, head, depthwise convolutions, norms, biases, recurrent vectors) is AdamW's, as in Jordan et al. 2024.
- Weight decay (decoupled) applies to parameters of two and more dimensions unless marked `no_weight_decay`: so not to
  norms and biases, and not to A_log, D, dt_bias and the recurrences' weights, which mark themselves.
- Parameters marked `keep_fp32` form groups of their own, because a ZeRO group has one type.
"""

from typing import Any

import torch
from torch import nn

from riverrun.train.config import OptimizerConfig


def muon_matrices(model: nn.Module) -> set[torch.Tensor]:
    """The hidden matrices: weights of `nn.Linear` layers, but neither the head nor one tied to an embedding."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    outside = {m.weight for m in model.modules() if isinstance(m, nn.Embedding) or m is head}
    linear = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    return {p for p in linear - outside if not getattr(p, "keep_fp32", False)}


def decays(param: nn.Parameter) -> bool:
    """Whether weight decay applies."""
    return param.dim() >= 2 and not getattr(param, "no_weight_decay", False)


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """torch parameter groups in a fixed order, each with its `peak_lr`, of which the schedule sets a fraction.

    Only the parameters' shapes and marks count, and the order of `model.parameters()`: every rank gets the same groups.
    """
    matrices = muon_matrices(model) if config.name == "muon" else set()
    groups: dict[tuple[bool, bool, bool], dict[str, Any]] = {}
    for param in model.parameters():
        if not param.requires_grad:
            continue
        muon, decay, fp32 = param in matrices, decays(param), getattr(param, "keep_fp32", False)
        if (muon, decay, fp32) not in groups:
            lr = config.muon_lr if muon else config.lr
            group: dict[str, Any] = {"params": [], "lr": lr, "peak_lr": lr, "use_muon": muon}
            group["weight_decay"] = config.weight_decay if decay else 0.0
            if muon:
                group |= {"momentum": config.muon_momentum}
            else:
                group |= {"betas": tuple(config.betas), "eps": config.eps}
            groups[muon, decay, fp32] = group
        groups[muon, decay, fp32]["params"].append(param)
    return [groups[key] for key in sorted(groups)]


def adamw(groups: list[dict[str, Any]], device: torch.device) -> torch.optim.AdamW:
    """torch's AdamW over `parameter_groups`: fused on CUDA, the plain loop on CPU (a group is one flat tensor)."""
    return torch.optim.AdamW(groups, fused=device.type == "cuda", foreach=False)


def set_lr(param_groups: list[dict[str, Any]], factor: float) -> None:
    """Sets every group's learning rate to `factor` times its peak."""
    for group in param_groups:
        group["lr"] = factor * group["peak_lr"]
