"""For the tests of launching: what stands in for SLURM's programs, a recipe that trains in a second, a run folder."""

import os
from pathlib import Path

import pytest

from tests.slurm import tiny


@pytest.fixture
def bin(tmp_path, monkeypatch):
    """Stands in for SLURM: what each of its programs is called with goes to BIN/<program>.calls, one word a line."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)

    def program(name: str, does: str = "") -> Path:
        calls = folder / f"{name}.calls"
        (folder / name).write_text(
            f'#!/bin/bash\nprintf "%s\\0" "$PWD" "$@" >>"{calls}"; printf "\\n\\0" >>"{calls}"\n{does}\n'
        )
        (folder / name).chmod(0o755)
        return calls

    return program


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("recipe"))
