"""Rows that start from states of rows before: their order, the buffer, and whole runs, killed and on other ranks; runs
that start from another's weights, with DITTO as their objective."""

import shutil
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import store_workers
import training_workers as workers

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.hf.export import export_model
from riverrun.train import checkpoint, initial, metrics
from riverrun.train.build import build_model
from riverrun.train.config import StatePassingConfig
from riverrun.train.data.loader import PackedLoader
from riverrun.train.data.packing import IGNORED, PackedRows, collate
from riverrun.train.data.store import TokenStore
from riverrun.train.data.streams import Streams
from riverrun.train.recipe import to_toml
from riverrun.train.state_passing import FOLDER, Carries, StateBuffer
from tests.train.test_loop import assert_equal, records

TBTT = {"mode": "tbtt", "segment_rows": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def store(folder):
    return store_workers.write_store(folder / "store")


def train(run_dir, config, kill_at=-1, **layout):
    """Returns what was printed."""
    log = run_dir.with_suffix(".log")
    log.unlink(missing_ok=True)
    codes = workers.run(store_workers.train, config, run_dir, kill_at, log=log, **layout)
    printed = workers.read(log)
    assert any(codes) == (kill_at >= 0), printed
    return printed


def losses(run_dir, name="loss"):
    return [record[name] for record in metrics.read(run_dir / "metrics.jsonl")]


def assert_same_run(got, want, step=10):
    last, other = (checkpoint.folder_of(run) / f"step_{step:08d}" for run in (want, got))
    files = sorted(file.relative_to(last) for file in last.rglob("*.pt"))
    assert files == sorted(file.relative_to(other) for file in other.rglob("*.pt"))
    for file in files:
        loaded = (torch.load(place / file, weights_only=False) for place in (other, last))
        assert_equal(*loaded, str(file))
    assert records(got) == records(want)


@pytest.fixture(scope="module")
def whole(folder, store):
    """Truncated backpropagation on one rank."""
    train(folder / "whole", store_workers.on_store(store, state_passing=TBTT))
    return folder / "whole"


# the order


def test_every_place_reads_the_text_on_from_step_to_step(store):
    rows = PackedRows(TokenStore.open(store), 48)
    streams = Streams([rows], [1.0], seed=1, places=4, length=3)
    total = len(rows) // 3 * 3
    seen = {place: [] for place in range(4)}
    for i in range(4 * 40):
        source, segment, offset = streams.locate(i)
        assert source == 0 and 0 <= segment < len(rows) // 3
        seen[i % 4].append(3 * segment + offset)
        assert np.array_equal(streams[i].input_ids, rows[3 * segment + offset].input_ids)
        assert streams.continues(i) == (i >= 4 and offset > 0)
    for place, found in seen.items():
        for step, (a, b) in enumerate(pairwise(found)):
            assert not streams.continues(4 * (step + 1) + place) or b == a + 1
    starting = [sum(not streams.continues(4 * step + place) for place in range(4)) for step in range(3, 12)]
    assert starting == [2, 1, 1] * 3, "not all at once"
    epoch = [3 * streams.locate(4 * 3 * k + p)[1] for k in range(2) for p in range(4)]
    assert len(set(epoch)) == 8 and total > 24, "no segment comes twice"
    with pytest.raises(ValueError, match=r"lower it, or prepare a larger corpus"):
        Streams([rows], [1.0], seed=1, places=4, length=len(rows) + 1)


def test_rows_know_whether_a_document_begins_with_them(store):
    tokens = TokenStore.open(store)
    rows = PackedRows(tokens, 7)
    begins = [rows[i].begins for i in range(len(rows))]
    starts = set(tokens.document_starts(0, tokens.num_tokens).tolist())
    assert begins == [7 * i in starts for i in range(len(rows))] and 1 < sum(begins) < len(begins)
    assert all((rows[i - 1].targets[-1] == IGNORED) == begins[i] for i in range(1, len(rows)))


def test_rows_carry_states_by_seed_and_number_and_not_into_new_documents(store):
    rows = PackedRows(TokenStore.open(store), 48)
    streams = Streams([rows], [1.0], seed=1, places=4, length=3)
    always = Carries(StatePassingConfig(mode="tbtt", segment_rows=3), 1, streams)
    want = [streams.continues(i) and not streams[i].begins for i in range(60)]
    assert [always(streams[i], i) for i in range(60)] == want and 0 < sum(want) < 60
    half = Carries(StatePassingConfig(mode="passing", probability=0.5), 1, None)
    drawn = [half(rows[0], i) for i in range(400)]
    assert drawn == [half(rows[1], i) for i in range(400)] and 160 < sum(drawn) < 240

    def loader(rank, size, micro):
        return PackedLoader(
            streams, lambda rows, *_: collate(rows), global_batch_size=4, micro_batch_size=micro, dp_rank=rank,
            dp_size=size, carries=always,
        )  # fmt: skip

    one = loader(0, 1, 4).step(5)[0]
    parts = [batch for rank in range(2) for batch in loader(rank, 2, 1).step(5)]
    assert torch.equal(one.carries, torch.cat([batch.carries for batch in parts])) and one.carries.any()
    assert torch.equal(one.input_ids, torch.cat([batch.input_ids for batch in parts]))


# the buffer


def test_the_buffer_gives_each_row_its_own_state_in_fp32_and_zeros_where_nothing_is_carried():
    buffer = StateBuffer(first=0, rows=4, layers=2, device=torch.device("cpu"))
    assert buffer.take(0, torch.tensor([True, True])) == [{}, {}]
    for start in (0, 2):
        state = torch.tensor([[1.0], [2.0]], dtype=torch.bfloat16) + start
        buffer.put(start, [{"ssd": state}, {}])
    assert buffer.take(0, None) == buffer.take(0, torch.tensor([False, False])) == [{}, {}]
    taken = buffer.take(2, torch.tensor([False, True]))
    assert taken[0]["ssd"].tolist() == [[0.0], [4.0]] and taken[0]["ssd"].dtype == torch.float32 and taken[1] == {}
    taken[0]["ssd"].fill_(9)
    buffer.put(0, [{"ssd": torch.tensor([[float("nan")], [7.0]])}, {}])
    assert buffer.layers[0]["ssd"].tolist() == [[0.0], [7.0], [3.0], [4.0]]


def test_saved_states_are_dealt_to_any_number_of_ranks(tmp_path):
    def buffer(first, rows):
        return StateBuffer(first, rows, 1, torch.device("cpu"))

    for rank in range(2):
        saved = buffer(3 * rank, 3)
        saved.put(0, [{"cell": torch.arange(3.0)[:, None] + 3 * rank}])
        torch.save(saved.state(), tmp_path / f"{rank:05d}.pt")
    alone, third = buffer(0, 6), buffer(4, 2)
    assert alone.restore(tmp_path) and third.restore(tmp_path)
    assert alone.layers[0]["cell"].flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert third.layers[0]["cell"].flatten().tolist() == [4, 5]
    assert not buffer(0, 6).restore(tmp_path / "none")


# whole runs


def test_runs_on_two_ranks_resume_bit_for_bit_and_on_one_rank_too(folder, store, whole):
    config = store_workers.on_store(store, state_passing=TBTT)
    train(folder / "two", config, world=2)
    assert losses(folder / "two") == pytest.approx(losses(whole), abs=1e-4)
    train(folder / "broken", config, kill_at=7, world=2)
    states = sorted((checkpoint.folder_of(folder / "broken") / "step_00000004" / FOLDER).iterdir())
    assert [file.name for file in states] == ["00000.pt", "00001.pt"]
    shutil.copytree(folder / "broken", folder / "alone")
    assert "from step 4 " in train(folder / "broken", config, world=2)
    assert_same_run(folder / "broken", folder / "two")
    larger = store_workers.on_store(store, state_passing=TBTT, micro_batch_size=2)
    assert "resharded for this layout" in (printed := train(folder / "alone", larger)) and "from zeros" not in printed
    assert losses(folder / "alone") == pytest.approx(losses(whole), abs=1e-4)


def test_stage_three_and_recomputation_pass_the_same_states(folder, store, whole):
    config = store_workers.on_store(store, state_passing=TBTT, steps=4, recompute=True)
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"zero_stage": 3})})
    train(folder / "stage3", config, world=2)
    assert losses(folder / "stage3")[:3] == pytest.approx(losses(whole)[:3], abs=5e-5)


def test_a_checkpoint_without_states_starts_from_zeros_and_says_so(folder, store, whole):
    shutil.copytree(whole, folder / "stateless")
    last = checkpoint.folder_of(folder / "stateless") / "step_00000008"
    shutil.rmtree(checkpoint.folder_of(folder / "stateless") / "step_00000010")
    shutil.rmtree(last / FOLDER)
    (last / "manifest.json").unlink()
    checkpoint.describe(last, checkpoint.read_state(last))
    printed = train(folder / "stateless", store_workers.on_store(store, state_passing=TBTT))
    assert "which has no recurrent states: rows start from zeros once" in printed
    assert losses(folder / "stateless")[:8] == losses(whole)[:8] != losses(folder / "stateless")[8:]
    assert losses(folder / "stateless")[8] != losses(whole)[8]


def test_ditto_after_pretraining_resumes_bit_for_bit_without_its_source(folder, store, whole):
    source = folder / "source"
    shutil.copytree(whole, source)
    config = store_workers.on_store(store, objective="ditto", init_from=str(source), steps=8, micro_batch_size=2)
    assert f"from the weights of {source}" in train(folder / "ditto", config)
    assert f'init_from = "{source}"' in (folder / "ditto" / "config.toml").read_text()
    found = list(metrics.read(folder / "ditto" / "metrics.jsonl"))
    kinds = [record["ditto"] is None for record in found]
    assert 0 < sum(kinds) < 8
    assert all((r["loss"] is None) == (r["ditto_left_out"] is not None) == (r["ditto"] is not None) for r in found)
    assert all(0 < r["ditto"] < 1 for r in found if r["ditto"] is not None)
    first = next(r["loss"] for r in found if r["loss"] is not None)
    assert first < losses(whole)[1], "it does not start anew"

    train(folder / "ditto-broken", config, kill_at=6)
    source.rename(folder / "moved")
    assert "from step 4 " in train(folder / "ditto-broken", config)
    assert_same_run(folder / "ditto-broken", folder / "ditto", step=8)
    (folder / "moved").rename(source)
    train(folder / "ditto-two", config, world=2)
    for name in ("loss", "ditto", "ditto_left_out"):
        assert losses(folder / "ditto-two", name) == [
            None if value is None else pytest.approx(value, abs=1e-4) for value in losses(folder / "ditto", name)
        ]


# where weights come from


def test_weights_come_from_a_run_a_checkpoint_or_an_export(folder, store, whole):
    config = store_workers.on_store(store)
    want = {name: tensor.clone() for name, tensor in checkpoint.load_weights(whole).items()}
    model = build_model(config, weights=initial.read(initial.locate(str(whole)), config.model))
    assert all(torch.equal(param, want[name]) for name, param in model.named_parameters())
    export_model(RiverrunConfig.from_options(config.model), want, folder / "export")
    for place in (folder / "export", checkpoint.folder_of(whole) / "step_00000010"):
        read = initial.read(initial.locate(str(place)), config.model)
        assert all(torch.equal(read[name], tensor) for name, tensor in want.items())
    assert initial.tokenizer_of(str(whole)).vocab_size == 258
    assert initial.tokenizer_of(str(checkpoint.folder_of(whole) / "step_00000010")) is not None


def test_weights_of_another_model_are_refused(folder, store, whole):
    wider = store_workers.on_store(store, model={"hidden_size": 64}).model
    with pytest.raises(ValueError, match=r"model\.hidden_size: 32 there, 64 here"):
        initial.read(initial.locate(str(whole)), wider)
    heads = store_workers.on_store(store, model={"mamba2": {"head_dim": 8, "chunk_size": 16}}).model
    with pytest.raises(ValueError) as error:
        initial.read(initial.locate(str(whole)), heads)
    assert "model.mamba2.head_dim: 16 there, 8 here" in str(error.value) and "chunk_size" not in str(error.value)
    with pytest.raises(ValueError, match="has no weights: name a run folder"):
        initial.locate(str(folder / "nothing"))


def test_what_cannot_pass_states_is_listed(store):
    passing = store_workers.on_store(store, state_passing=TBTT, objective="ditto")
    passing = passing.model_copy(
        update={
            "parallel": passing.parallel.model_copy(update={"cp": 2}),
            "model": store_workers.on_store(store, model={"layer_pattern": ["attention"]}).model,
        }
    )
    problems = "\n".join(passing.problems())
    assert "needs recurrent layers" in problems and "set parallel.tp=1 and parallel.cp=1" in problems
    assert "belongs to train.objective='lm'" in problems
    fine = store_workers.on_store(store, state_passing=TBTT)
    assert fine.problems() == [] and 'mode = "tbtt"' in to_toml(fine)
