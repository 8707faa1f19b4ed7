"""Ranks that train a small model under some layout, for the tests of parity."""

import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.parallel.mesh import Mesh
from riverrun.modeling.parallel.sharding import build_sharded
from riverrun.train import engine as engines
from riverrun.train.config import EngineConfig, OptimizerConfig, TrainConfig
from riverrun.train.data.packing import IGNORED, Batch
from riverrun.train.distributed import Ranks
from tests.modeling.parallel.sharded import BASE, SHAPES
from tests.ranks import mesh as mesh_of

ROWS, LENGTH, STEPS = 8, 16, 3  # rows a step over all data-parallel ranks


def rows(step: int) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """Tokens and targets of a step, and where documents start in each row; the rows have unlike numbers of targets."""
    generator = torch.Generator().manual_seed(50 + step)
    ids, targets = torch.randint(0, BASE.vocab_size, (2, ROWS, LENGTH), generator=generator).unbind()
    starts = []
    for row in range(ROWS):
        targets[row, : 2 * row % LENGTH] = IGNORED
        starts.append(sorted({0, *torch.randint(1, LENGTH, (row % 4,), generator=generator).tolist()}))
    return ids, targets, starts


def micro_batches(step: int, mesh: Mesh, accumulation: int) -> list[Batch]:
    ids, targets, starts = rows(step)
    mine = list(range(ROWS))[mesh.dp.share(ROWS)]
    size = len(mine) // accumulation
    batches = []
    for first in range(0, len(mine), size):
        part = mine[first : first + size]
        bounds = [i * LENGTH + s for i, row in enumerate(part) for s in starts[row]] + [size * LENGTH]
        number = int((targets[part] != IGNORED).sum())
        batches.append(Batch(ids[part], targets[part], torch.tensor(bounds, dtype=torch.int32), number))
    return batches


def train(
    shape: str,
    cp: int,
    tp: int,
    stage: int,
    accumulation: int,
    recompute: bool,
    overlap=False,
    device="cpu",
    dtype="fp32",
):
    """STEPS steps of AdamW with clipping: the losses, the gradients' norms, and this rank's weights."""
    world = torch.distributed.get_world_size()
    mesh, rank = mesh_of(cp, tp, device), torch.distributed.get_rank()
    ranks = Ranks(rank, world, rank, torch.device(device, rank if device == "cuda" else None), mesh)
    torch.manual_seed(0)
    model = build_sharded(RiverrunConfig.from_options(SHAPES[shape]), mesh.tp)
    model.set_recompute(recompute)
    micro = ROWS // mesh.dp.size // accumulation
    engine = engines.Engine(
        model,
        OptimizerConfig(lr=2e-2, grad_clip=0.5, eps=1e-2),  # a small eps would turn rounding into whole steps
        TrainConfig(dtype=dtype, micro_batch_size=micro, z_loss=1e-2),
        EngineConfig(zero_stage=stage, overlap_comm=overlap),
        ranks,
        accumulation,
    )
    losses, norms = [], []
    for step in range(STEPS):
        batches = micro_batches(step, mesh, accumulation)
        targets = sum(b.num_targets for b in batches) if mesh.leads else 0
        summed, targets = ranks.total(engine.accumulate(batches).item(), targets)
        losses.append(summed / targets)
        norms.append(engine.step(1.0).grad_norm)
    (held_out,) = ranks.total(sum(engine.evaluate(b).item() for b in micro_batches(99, mesh, accumulation)))
    parameters = dict(engine.module.named_parameters())
    with GatheredParameters(list(parameters.values()), enabled=stage == 3):
        weights = {name: p.detach().float().cpu() for name, p in parameters.items()}
    return losses, norms, held_out, weights, mesh.tp.rank
