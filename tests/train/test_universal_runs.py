"""Whole runs of Universal Transformers: they learn, tell how long positions ponder, and resume bit for bit."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from training_workers import recipe

from riverrun.train.data.loader import PackedLoader
from riverrun.train.data.packing import collate
from riverrun.train.recurrence import RowKeys
from tests.distributed.depth_workers import Samples
from tests.train.test_loop import KILLED, assert_same_run, records, train

UNIVERSAL = {"max_steps": 3, "ponder_weight": 0.05}


def looped(**universal):
    model = {"universal": UNIVERSAL | universal, "num_hidden_layers": 1, "layer_pattern": ["attention"]}
    return recipe(model=model | {"initializer": "takase", "scale_embedding": True})


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "straight"
    code, printed = train(run_dir, config=looped())
    assert code == 0, printed
    return run_dir


def test_a_run_learns_and_tells_how_long_positions_ponder(straight):
    trained = [r for r in records(straight) if r["kind"] == "train"]
    assert trained[-1]["loss"] < 0.75 * trained[0]["loss"]
    assert all(1 <= r["halting_steps"] <= 3 and 0 < r["halting_remainder"] <= 1 for r in trained)
    assert trained[0]["halting_steps"] != trained[-1]["halting_steps"]


def test_a_killed_run_resumes_bit_for_bit(straight, tmp_path):
    run_dir = tmp_path / "run"
    assert train(run_dir, "kill", 9, config=looped())[0] == KILLED
    code, printed = train(run_dir, config=looped())
    assert code == 0 and "from step 8 " in printed, printed
    assert_same_run(run_dir, straight)


def test_recipes_that_would_train_something_else_are_told():
    found = looped().model_copy(update={"train": recipe(train={"objective": "ditto"}).train}).problems()
    assert any(p.startswith("model.universal.ponder_weight belongs to train.objective='lm'") for p in found)
    passing = recipe(train={"state_passing": {"mode": "passing"}}).train
    found = looped().model_copy(update={"train": passing}).problems()
    assert any("cannot be had with [model.universal]" in p for p in found)
    assert not any("universal" in p for p in looped().problems())


def test_offsets_of_places_need_keys_of_rows(tmp_path):
    """Which these generated rows have not."""
    code, printed = train(tmp_path / "run", config=looped(random_offset=5))
    assert code != 0 and "give row_keys" in printed


@pytest.mark.parametrize("balance", [False, True])
def test_the_loader_gives_every_row_its_key_on_any_number_of_ranks(balance):
    """And deals rows as without."""
    settings = {"global_batch_size": 8, "micro_batch_size": 2, "balance": balance}
    found = []
    for size in (1, 2, 4):
        pairs = set()
        for rank in range(size):
            plain, keyed = (
                PackedLoader(
                    Samples(), lambda rows, *_: collate(rows), dp_rank=rank, dp_size=size, row_keys=keys, **settings
                ).step(3)
                for keys in (None, RowKeys(7))
            )
            for batch, other in zip(keyed, plain, strict=True):
                assert batch.input_ids.equal(other.input_ids) and other.row_keys is None and batch.num_steps is None
                pairs |= {(tuple(ids.tolist()), int(key)) for ids, key in zip(batch.input_ids, batch.row_keys)}
        assert len(pairs) == 8
        found.append(pairs)
    assert found[0] == found[1] == found[2]
