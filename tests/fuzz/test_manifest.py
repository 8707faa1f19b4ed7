"""Manifests of checkpoints that are damaged or meant ill: told of, and nothing outside of the folder is looked at."""

import hashlib
import json
import os
import random

import pytest

from riverrun.train import manifest
from tests.fuzz.mutations import altered_json, runs

FILES = {"trainer.json": b"{}", "zero/mp_rank_00_model_states.pt": b"weights", "rng/rank_00000.pt": b"random"}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "step_00000001"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    manifest.write(folder, 1, {name: manifest.measure(folder / name) for name in FILES})
    return folder


def rewrite(folder, **changes):
    """The manifest with other values of the first file's entry, or another name for it."""
    value = json.loads((folder / "manifest.json").read_text())
    entry = value["files"].pop("rng/rank_00000.pt") | {k: v for k, v in changes.items() if k != "name"}
    value["files"][changes.get("name", "rng/rank_00000.pt")] = entry
    (folder / "manifest.json").write_text(json.dumps(value))


def refused(folder, why):
    with pytest.raises(ValueError, match=why) as raised:
        manifest.entries(folder)
    assert str(folder / "manifest.json") in str(raised.value) and "choose another" in str(raised.value)
    assert str(folder / "manifest.json") in manifest.problem(folder)


def test_what_was_written_is_read(folder):
    found = manifest.entries(folder)
    assert found == {
        name: manifest.Entry(len(content), hashlib.sha256(content).hexdigest()) for name, content in FILES.items()
    }
    assert manifest.problem(folder) is None


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_file_that_is_not_as_it_was_is_named(folder, damage):
    victim = folder / "zero/mp_rank_00_model_states.pt"
    if damage == "remove":
        victim.unlink()
    else:
        victim.write_bytes(b"weighty" if damage == "flip" else b"weigh")
    told = {"flip": "does not have the checksum", "cut": "has 5 bytes instead of 7", "remove": "is missing"}[damage]
    assert f"{victim} {told}" in manifest.problem(folder)


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "zero/../../x", "a//b", "./a", "a/.", "", "a\\b", "a\0b", "a\nb", "\ud800", "x" * 300,
     "a/" * 3000],
)  # fmt: skip
def test_a_name_that_could_lead_elsewhere(folder, name):
    rewrite(folder, name=name)
    refused(folder, "a name|such a long name")


@pytest.mark.parametrize("size", [-1, 1.0, True, "7", None, 2**63, 10**400])
def test_a_size_that_is_none(folder, size):
    rewrite(folder, bytes=size)
    refused(folder, "`bytes` is a whole number")


@pytest.mark.parametrize("digest", ["", "0" * 63, "G" * 64, "A" * 64, 5, None, "0" * 64 + "\n"])
def test_a_checksum_that_is_none(folder, digest):
    rewrite(folder, sha256=digest)
    refused(folder, "64 hexadecimal digits")


def test_links_that_lead_out(folder, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "rank_00000.pt").write_bytes(b"random")
    for link, target in (("rng/rank_00000.pt", tmp_path / "secret" / "rank_00000.pt"), ("rng", tmp_path / "secret")):
        place = folder / link
        kept = place.rename(tmp_path / "kept")
        place.symlink_to(target)
        refused(folder, "leads out of the checkpoint")
        place.unlink()
        kept.rename(place)
    (folder / "inside").symlink_to(folder / "rng")  # within, and from without to the folder: as good as files
    rewrite(folder, name="inside/rank_00000.pt")
    assert manifest.problem(folder) is None
    (tmp_path / "link").symlink_to(folder)
    assert manifest.problem(tmp_path / "link") is None


def test_what_is_no_file_is_not_waited_for(folder):
    (folder / "rng/rank_00000.pt").unlink()
    os.mkfifo(folder / "rng/rank_00000.pt")
    assert "rank_00000.pt is missing" in manifest.problem(folder)
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    refused(folder, "no such file")


@pytest.mark.parametrize(
    "content", [b"", b"[", b"[" * 10**6, b"1" * 5000, b'"files"', b"{}", b'{"files": {}}', b"\xff\xfe"]
)
def test_what_is_no_manifest(folder, content):
    (folder / "manifest.json").write_bytes(content)
    refused(folder, "cannot be read")


def test_a_manifest_without_end(folder, monkeypatch):
    monkeypatch.setattr(manifest, "MAX_BYTES", 100)
    refused(folder, "more than 100 bytes")


def test_damaged_manifests(folder):
    """Whatever the file says, the answer is a message, or entries of files that lie in the folder."""
    rng = random.Random(0)
    value = json.loads((folder / "manifest.json").read_text())
    accepted = 0
    for _ in range(runs(4000)):
        (folder / "manifest.json").write_bytes(altered_json(rng, value))
        found = manifest.problem(folder)
        try:
            entries = manifest.entries(folder)
        except ValueError as error:
            assert found is not None and found in str(error)
            continue
        accepted += 1
        for name, entry in entries.items():
            assert os.path.realpath(folder / name).startswith(os.path.realpath(folder) + os.sep)
            assert found is not None or manifest.measure(folder / name) == entry
    assert accepted > 0
