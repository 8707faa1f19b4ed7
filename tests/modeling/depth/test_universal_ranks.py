"""Offsets of places on ranks that share rows or weights are those of one process, and so is what pondering costs.

The rest of a Universal Transformer on several ranks is tested with all other models, as the shape "universal".
"""

from dataclasses import replace

import pytest
import torch

from riverrun.modeling.depth.universal_options import UniversalOptions
from riverrun.modeling.parallel.context import Context
from riverrun.modeling.parallel.mesh import ALONE, Mesh
from riverrun.modeling.parallel.sharding import build_sharded
from tests.modeling.parallel.sharded import BOUNDS, LENGTH, ROW_KEYS, ROWS, SHAPES, batch, config_of
from tests.ranks import mesh as mesh_of


def loss_of(mesh: Mesh, offset: int, weight: float = 0.5) -> float:
    """A rank's part of it."""
    universal = UniversalOptions(max_steps=3, random_offset=offset, ponder_weight=weight)
    torch.manual_seed(0)
    model = build_sharded(config_of(replace(SHAPES["universal"], universal=universal)), mesh.tp).double().train()
    ids, targets = (x[:, mesh.cp.share(LENGTH)] for x in batch())
    given = {"targets": targets, "num_targets": 10, "row_keys": ROW_KEYS}
    if mesh.cp.size > 1:
        given["context"] = Context.of_rows(mesh.cp, ROWS, LENGTH, BOUNDS, "cpu")
    else:
        given["cu_seqlens"] = torch.tensor(BOUNDS, dtype=torch.int32)
    return model(ids, **given).loss.item()


def on_rank(cp: int, tp: int, offset: int, weight: float) -> float:
    return loss_of(mesh_of(cp, tp), offset, weight)


@pytest.mark.parametrize(("cp", "tp"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_ranks_start_rows_at_the_same_places(ranks, cp, tp, weight):
    alone = loss_of(Mesh(ALONE, ALONE, ALONE, ALONE), 99, weight)
    assert sum(ranks(2).run(on_rank, cp, tp, 99, weight)) == pytest.approx(alone, rel=1e-10)


def test_offsets_and_pondering_matter():
    mesh = Mesh(ALONE, ALONE, ALONE, ALONE)
    assert loss_of(mesh, 99) != pytest.approx(loss_of(mesh, 0), rel=1e-3)
    assert loss_of(mesh, 99, 0.0) < loss_of(mesh, 99) - 0.5
