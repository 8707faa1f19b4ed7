"""A run goes on with fewer or more ranks as it is: the global batch stays, micro batches and accumulation follow."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import store_workers
import training_workers as workers

from riverrun.train import checkpoint, metrics
from riverrun.train.batches import MicroBatches, plan_micro_batches


@pytest.mark.parametrize(
    "dp, rows, accumulation",
    [(1, 8, 8), (2, 8, 4), (4, 8, 2), (8, 8, 1), (16, 4, 1), (32, 2, 1), (64, 1, 1)],
)
def test_64_rows_in_micro_batches_of_8_at_most(dp, rows, accumulation):
    plan = plan_micro_batches(64, 8, dp)
    assert plan[:2] == (rows, accumulation)
    assert (plan.note == "") == (rows == 8)
    if plan.note:
        assert f"micro batches of {rows} rows instead of train.micro_batch_size=8" in plan.note
        assert f"{dp} data-parallel ranks" in plan.note


def test_the_largest_micro_batch_that_divides_a_share():
    assert plan_micro_batches(48, 8, 6) == MicroBatches(8, 1)
    assert plan_micro_batches(36, 8, 2)[:2] == (6, 3)
    assert plan_micro_batches(14, 6, 2)[:2] == (1, 7)  # a share of 7 rows has no other divisor up to 6


def test_every_plan_has_all_rows_and_no_larger_one_would_do():
    for total in range(1, 61):
        for micro in (1, 2, 3, 5, 8, 60):
            for dp in range(1, 14):
                if total % dp:
                    with pytest.raises(ValueError, match=rf"{total} does not divide among {dp} data-parallel"):
                        plan_micro_batches(total, micro, dp)
                    continue
                rows, accumulation, note = plan_micro_batches(total, micro, dp)
                assert rows * accumulation * dp == total and rows <= micro
                assert all(total // dp % larger for larger in range(rows + 1, micro + 1))
                assert bool(note) == (rows < micro)


@pytest.mark.parametrize("seq_len, tp, cp", [(15, 2, 1), (12, 8, 1), (12, 8, 2), (7, 4, 1)])
def test_tensor_parallel_ranks_can_share_every_micro_batch(seq_len, tp, cp):
    unit = tp // math.gcd(seq_len // cp, tp)
    for total in (16, 24, 48):
        for dp in range(1, 25):
            if total % (dp * unit):
                with pytest.raises(ValueError, match="does not divide among"):
                    plan_micro_batches(total, 8, dp, tp=tp, cp=cp, seq_len=seq_len)
                continue
            rows, accumulation, _ = plan_micro_batches(total, 8, dp, tp=tp, cp=cp, seq_len=seq_len)
            assert rows * accumulation * dp == total
            assert rows * (seq_len // cp) % tp == 0


@pytest.mark.parametrize(
    "args, layout, told",
    [
        ((64, 8, 6), {}, "start 4 or 8 ranks (possible are 1, 2, 4, 8, 16, 32, 64)"),
        ((64, 8, 6), {}, "or set train.global_batch_size to a multiple of 6"),
        ((64, 8, 128), {}, "start 64 ranks (possible are"),
        ((64, 8, 3), {"tp": 2, "cp": 2}, "3 data-parallel ranks (12 ranks, parallel.tp=2 × parallel.cp=2)"),
        ((64, 8, 3), {"tp": 2, "cp": 2}, "start 8 or 16 ranks, each 4 of which are one data-parallel rank"),
        ((64, 8, 3), {"tp": 2, "cp": 2}, "(possible are 4, 8, 16, 32, 64, 128, 256)"),
        ((8, 4, 8), {"tp": 2, "seq_len": 15}, "multiple of 2 rows"),
        ((8, 4, 8), {"tp": 2, "seq_len": 15}, "(possible are 2, 4, 8)"),
        ((7, 4, 1), {"tp": 2, "seq_len": 15}, "set train.global_batch_size=8"),
        ((720720, 8, 17), {}, "start 16 or 18 ranks"),
    ],
)
def test_numbers_of_ranks_that_would_do_are_named(args, layout, told):
    with pytest.raises(ValueError) as raised:
        plan_micro_batches(*args, **layout)
    assert told in str(raised.value) and len(str(raised.value)) < 500


def test_the_numbers_that_are_named_do():
    for dp in (5, 7, 11, 100):
        with pytest.raises(ValueError) as raised:
            plan_micro_batches(96, 8, dp, tp=4, seq_len=6)
        text = str(raised.value)
        named = text.partition("possible are ")[2].partition(")")[0].removesuffix(" …").split(", ")
        for ranks in map(int, named):
            plan_micro_batches(96, 8, ranks // 4, tp=4, seq_len=6)


def test_a_run_on_two_ranks_then_one_then_four(tmp_path):
    """Killed twice; every loss and all weights are those of a run on one rank that nothing happened to."""
    store = store_workers.write_store(tmp_path / "store")
    config = store_workers.on_store(
        store, model={"layer_pattern": ["mamba2", "attention"]}, steps=12, micro_batch_size=2
    )
    config = config.model_copy(
        update={
            "optimizer": config.optimizer.model_copy(update={"eps": 1e-3}),  # which lets rounding stay rounding
            "checkpoint": config.checkpoint.model_copy(update={"asynchronous": False}),
        }
    )

    def train(run_dir, world, kill_at=-1):
        log = tmp_path / f"{run_dir.name}.{world}.log"
        codes = workers.run(store_workers.train, config, run_dir, kill_at, world=world, log=log)
        assert (codes == [0] * world) == (kill_at < 0), workers.read(log)
        return workers.read(log)

    whole, moved = tmp_path / "whole", tmp_path / "moved"
    train(whole, 1)
    first = train(moved, 2, kill_at=7)
    second = train(moved, 1, kill_at=11)
    third = train(moved, 4)
    assert "from step 4 " in second and "from step 8 " in third, second + third
    assert "micro batches of 1 rows instead of train.micro_batch_size=2" in " ".join(third.split())
    assert "instead of train.micro_batch_size" not in first + second

    got, want = (
        [(r["step"], r["loss"]) for r in metrics.read(run_dir / "metrics.jsonl") if r["kind"] == "train"]
        for run_dir in (moved, whole)
    )
    assert [step for step, _ in got] == [step for step, _ in want] == list(range(1, 13))
    assert [loss for _, loss in got] == pytest.approx([loss for _, loss in want], rel=2e-5)
    assert want[-1][1] < 0.9 * want[0][1], "it has to learn something that a wrong batch would disturb"
    ours, theirs = checkpoint.load_weights(moved), checkpoint.load_weights(whole)
    assert set(ours) == set(theirs)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4, msg=name)
