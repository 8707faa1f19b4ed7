"""A model's parameters over tensor-parallel ranks: the plan of all of them, and models that are built sharded."""

from functools import partial

import torch
from torch import distributed as dist
from torch import nn

from riverrun.modeling.block import Block
from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.parallel.mesh import Axis
from riverrun.modeling.parallel.split import Split

OUTSIDE = {"model.embed_tokens.weight": Split(0), "lm_head.weight": Split(0)}  # a rank has the rows of its tokens
MLP = {"gate_proj.weight": Split(0), "up_proj.weight": Split(0), "down_proj.weight": Split(1)}


def meta_model(config: RiverrunConfig) -> RiverrunForCausalLM:
    """The whole model without memory: shapes, marks and counts."""
    with torch.device("meta"):
        return RiverrunForCausalLM(config)


def parameter_plan(model: RiverrunForCausalLM, tp: int) -> dict[str, Split | None]:
    """How `tp` ranks share each parameter of `model`, tied ones under their first name; None: all have it whole.

    Raises:
        ValueError: the model's sizes do not divide among that many ranks; every such size is listed.
    """
    if problems := model.config.options.tp_problems(tp):
        raise ValueError("this model cannot be shared:\n" + "\n".join(f"  - {p}" for p in problems))
    plan = dict.fromkeys((name for name, _ in model.named_parameters()), None) | dict[str, Split | None]()
    plan |= {name: split for name, split in OUTSIDE.items() if name in plan}
    for layer, block in model.named_modules():
        if not isinstance(block, Block):
            continue
        if block.has_mlp:
            plan |= {f"{layer}.mlp.{name}": split for name, split in MLP.items()}
        for name, split in block.mixer.parameter_plan(tp).items():
            plan[f"{layer}.mixer.{name}"] = Split(split) if isinstance(split, int) else split
    return plan


def shard_shapes(config: RiverrunConfig, tp: int) -> dict[str, torch.Size]:
    """Of every parameter, tied ones once, on one of `tp` ranks."""
    model = meta_model(config)
    plan = parameter_plan(model, tp)
    return {
        name: split.shape(p.shape, tp) if (split := plan[name]) else p.shape for name, p in model.named_parameters()
    }


def build_sharded(config: RiverrunConfig, tp: Axis) -> RiverrunForCausalLM:
    """This rank's part of a model with its initial weights, in fp32 on the CPU.

    The weights are drawn from torch's random state as a whole and then cut, a module at a time: the same for any number
    of ranks, and never more than one module's in memory besides this rank's.
    """
    model = meta_model(config)
    plan = parameter_plan(model, tp.size)
    splits = {param: plan[name] for name, param in model.named_parameters()}
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        drawn = {name: made[p] if p in made else _empty(p) for name, p in own.items()}
        module._parameters.update(drawn)
        if any(p not in made for p in own.values()):  # a tied parameter keeps its first module's values
            model._init_weights(module)
        for name, p in own.items():
            if p not in made:
                made[p] = drawn[name]
                if tp.size > 1:
                    _cut(made[p], splits[p], tp)
        if tp.size > 1:
            if hasattr(module, "tp"):
                module.tp = tp  # type: ignore[assignment]
            if isinstance(module, nn.Linear):
                module.out_features, module.in_features = module.weight.shape
    return model


def _empty(param: nn.Parameter) -> nn.Parameter:
    """A parameter on the CPU with the marks of one without memory."""
    made = nn.Parameter(torch.empty_like(param, device="cpu"), requires_grad=param.requires_grad)
    vars(made).update(vars(param))
    return made


def _cut(param: nn.Parameter, split: Split | None, tp: Axis) -> None:
    """In place: this rank's shard; or, of a parameter that it has whole, the ranks' gradients summed."""
    if split is None:
        param.register_hook(partial(_sum, tp=tp))
    else:
        param.data = split.take(param.data, tp)
        param.tensor_model_parallel = True  # type: ignore[attr-defined]  # DeepSpeed's mark: all shards count in norms


def _sum(grad: torch.Tensor, tp: Axis) -> torch.Tensor:
    total = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
    dist.all_reduce(total, group=tp.group)
    return total.to(grad.dtype)
