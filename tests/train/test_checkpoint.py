"""Checkpoint folders, with an engine that writes one small file."""

import errno
import random
import shutil

import numpy as np
import pytest
import torch

from riverrun.modeling.parallel.mesh import Mesh
from riverrun.train import checkpoint, manifest, resume
from riverrun.train.config import Recipe
from riverrun.train.recipe import to_toml
from riverrun.train.saver import Saver
from riverrun.train.snapshot import snapshot


class Alone:
    rank, world_size, mesh = 0, 1, Mesh()

    def gather(self, value):
        return [value]


class FakeEngine:
    states = None

    def __init__(self, error=None):
        self.error, self.weights = error, torch.arange(100.0)

    def save(self, folder, write, slices):
        write({"weights": self.weights}, folder / "zero" / "weights.pt")
        if self.error:
            raise self.error


def recipe(**train):
    values = {"data": {"train": [{"path": "a"}]}, "train": {"steps": 100, **train}, "schedule": {"warmup_steps": 1}}
    loaded = Recipe.model_validate(values)
    return loaded.model_copy(update={"model": loaded.model.resolve()})


def save(run_dir, step, keep=3, engine=None, asynchronous=True):
    state = {
        "step": step,
        "layout": checkpoint.layout_of(recipe(), Alone()),
        "recipe": recipe().model_dump(mode="json"),
    }
    saver = Saver(run_dir, keep, Alone(), asynchronous)
    saver.start(step, engine or FakeEngine(), state)
    return saver.finish().path


def find(run_dir, mode="auto", config=None):
    said = []
    return resume.find_start(run_dir, mode, config or recipe(), said.append), said


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 100000000, 7):
        save(tmp_path, step, keep=2)
    assert [checkpoint.step_of(c) for c in checkpoint.checkpoints(tmp_path)] == [10, 100000000]
    assert checkpoint.read_state(checkpoint.checkpoints(tmp_path)[0])["step"] == 10


@pytest.mark.parametrize("asynchronous", [True, False])
def test_old_ones_are_gone_when_the_saver_is_closed(tmp_path, asynchronous):
    saver = Saver(tmp_path, 1, Alone(), asynchronous)
    for step in (1, 2, 3):
        saver.start(step, FakeEngine(), {"step": step})
        saver.finish()
    saver.close()
    assert [p.name for p in checkpoint.folder_of(tmp_path).iterdir()] == ["step_00000003"]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_an_old_one_that_cannot_be_deleted_is_told_with_the_next(tmp_path, monkeypatch, asynchronous):
    def busy(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(shutil, "rmtree", busy)
    saver = Saver(tmp_path, 1, Alone(), asynchronous)
    told = []
    for step in (1, 2, 3):
        saver.start(step, FakeEngine(), {"step": step})
        told.append(saver.finish().undeleted)
    assert told[:2] == [None, None] and "busy" in told[2]
    saver.close()
    assert [checkpoint.step_of(c) for c in checkpoint.checkpoints(tmp_path)] == [3]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest", "no manifest"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, damage):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    victim = bad / ("manifest.json" if "manifest" in damage else "zero/weights.pt")
    if damage in ("delete", "no manifest"):
        victim.unlink()
    else:
        whole = victim.read_bytes()
        damages = {"flip": b"?" + whole[1:], "truncate": whole[:50], "manifest": b'{"files": [1]}'}
        victim.write_bytes(damages[damage])
    said = []
    assert checkpoint.latest(tmp_path, said.append) == good
    assert len(said) == 1 and str(victim) in said[0] and "step_00000002" in said[0]


def test_a_failed_save_leaves_what_there_was(tmp_path):
    good = save(tmp_path, 1)
    with pytest.raises(OSError, match="No space left") as raised:
        save(tmp_path, 2, engine=FakeEngine(OSError(errno.ENOSPC, "No space left on device")))
    assert raised.value.errno == errno.ENOSPC
    assert checkpoint.latest(tmp_path, print) == good
    assert [p.name for p in checkpoint.folder_of(tmp_path).iterdir()] == [good.name]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_written_is_what_it_was_when_the_save_began(tmp_path, asynchronous):
    engine, saver = FakeEngine(), Saver(tmp_path, 3, Alone(), asynchronous)
    state = {"step": 1, "window": {"losses": [1.0]}}
    saver.start(1, engine, state)
    engine.weights.zero_()
    state["window"]["losses"].append(2.0)
    assert not checkpoint.checkpoints(tmp_path), "nothing has a checkpoint's name before it is whole"
    saved = saver.finish()
    assert manifest.problem(saved.path) is None and saver.pending is None and saver.finish() is None
    assert torch.equal(torch.load(saved.path / "zero" / "weights.pt")["weights"], torch.arange(100.0))
    assert checkpoint.read_state(saved.path) == {"step": 1, "window": {"losses": [1.0]}}
    files = [p for p in saved.path.rglob("*") if p.is_file() and p.name != manifest.NAME]
    assert saved.bytes == sum(p.stat().st_size for p in files)
    assert 0 <= saved.stall <= saved.seconds


@pytest.mark.parametrize("asynchronous", [True, False])
def test_an_error_in_the_thread_is_the_save_s(tmp_path, monkeypatch, asynchronous):
    good = save(tmp_path, 1)

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(manifest, "measure", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, asynchronous=asynchronous)
    assert [p.name for p in checkpoint.folder_of(tmp_path).iterdir()] == [good.name]


def test_the_last_known_good_one_is_kept_whatever_its_age(tmp_path):
    assert checkpoint.last_good(tmp_path) is None
    save(tmp_path, 1)
    checkpoint.mark_good(tmp_path, 1)
    for step in (2, 3, 4):
        save(tmp_path, step, keep=2)
    assert [checkpoint.step_of(c) for c in checkpoint.checkpoints(tmp_path)] == [1, 3, 4]
    assert checkpoint.step_of(checkpoint.to_return_to(tmp_path, 4, print)) == 1
    checkpoint.mark_good(tmp_path, 3)
    save(tmp_path, 5, keep=2)
    assert [checkpoint.step_of(c) for c in checkpoint.checkpoints(tmp_path)] == [3, 4, 5]


def test_one_returns_to_the_newest_intact_one_before_the_trouble(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=9)
    (checkpoint.folder_of(tmp_path) / "step_00000003" / "zero" / "weights.pt").write_bytes(b"")
    said = []
    assert checkpoint.step_of(checkpoint.to_return_to(tmp_path, 3, said.append)) == 2 and len(said) == 1
    checkpoint.mark_good(tmp_path, 4)
    assert checkpoint.step_of(checkpoint.to_return_to(tmp_path, 3, said.append)) == 2, "a later one is of no use"
    assert checkpoint.to_return_to(tmp_path, 0, said.append) is None


def test_what_is_half_removed_is_no_checkpoint(tmp_path, monkeypatch):
    old = save(tmp_path, 1)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
    checkpoint.remove(old)
    assert checkpoint.checkpoints(tmp_path) == [] and (old.parent / "step_00000001.removed").exists()
    monkeypatch.undo()
    checkpoint.set_aside(tmp_path, 9)
    assert not list(old.parent.iterdir())


def test_a_snapshot_keeps_what_belongs_together():
    flat = torch.arange(6.0)
    state = {"flat": flat, "again": flat, "part": flat[2:4], "list": [flat, (flat, 3)], "text": "x"}
    copy = snapshot(state)
    flat.zero_()
    assert torch.equal(copy["flat"], torch.arange(6.0)) and copy["again"] is copy["flat"] is copy["list"][1][0]
    assert torch.equal(copy["part"], torch.tensor([2.0, 3.0])) and copy["list"][1][1] == 3 and copy["text"] == "x"
    weight = torch.nn.Parameter(torch.ones(2))
    kept = snapshot({"w": weight})["w"]
    assert isinstance(kept, torch.nn.Parameter) and kept is not weight and kept.data_ptr() != weight.data_ptr()


def test_later_checkpoints_are_set_aside(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (checkpoint.folder_of(tmp_path) / "step_00000004.partial").mkdir()
    moved = checkpoint.set_aside(tmp_path, 1)
    assert [p.name for p in moved] == ["step_00000002.superseded", "step_00000003.superseded"]
    assert [checkpoint.step_of(c) for c in checkpoint.checkpoints(tmp_path)] == [1]
    assert not list(checkpoint.folder_of(tmp_path).glob("*.partial"))


def test_every_random_number_generator_is_restored():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    state = checkpoint.rng_state()
    first = draw()
    checkpoint.set_rng_state(state)
    assert draw() == first


def test_weights_of_a_step_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="has no intact checkpoint"):
        checkpoint.load_weights(tmp_path)
    save(tmp_path, 4)
    with pytest.raises(ValueError, match="no checkpoint of step 5; it has: 4"):
        checkpoint.load_weights(tmp_path, 5)


def test_auto_starts_anew_or_goes_on(tmp_path):
    assert find(tmp_path / "new")[0] == resume.Start()
    run_dir = tmp_path / "run"
    newest = save(run_dir, 8)
    assert find(run_dir)[0].checkpoint == newest and find(run_dir)[0].step == 8
    assert find(run_dir, config=recipe(log_every=2, steps=200))[0].step == 8
    assert find(tmp_path / "other", str(run_dir))[0].checkpoint == newest
    assert find(tmp_path / "other", str(newest))[0].checkpoint == newest


def test_a_run_that_died_before_its_first_checkpoint_starts_anew(tmp_path):
    (tmp_path / "config.toml").write_text(to_toml(recipe()))
    assert find(tmp_path)[0] == resume.Start()
    with pytest.raises(ValueError, match=r"another recipe:\n  - train.seed: 0 there, 1 here"):
        find(tmp_path, config=recipe(seed=1))


def test_what_must_not_be_resumed(tmp_path):
    run_dir = tmp_path / "run"
    newest = save(run_dir, 8)
    with pytest.raises(ValueError, match="is not empty"):
        find(run_dir, "never")
    with pytest.raises(ValueError, match=r"train.seed: 0 there, 3 here"):
        find(run_dir, config=recipe(seed=3))
    with pytest.raises(ValueError, match=r"raise train\.steps"):
        find(run_dir, config=recipe(steps=7))
    with pytest.raises(ValueError, match="does not exist"):
        find(run_dir, str(tmp_path / "nowhere"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    with pytest.raises(ValueError, match="holds no run"):
        find(tmp_path / "notes")
    with pytest.raises(ValueError, match="is a file"):
        find(tmp_path / "notes" / "a.txt")
    (newest / "zero" / "weights.pt").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is intact"):
        find(run_dir)
    with pytest.raises(ValueError, match=r"weights.pt is missing"):
        find(run_dir, str(newest))
