"""`riverrun doctor --slurm`: real tasks as srun would start them, in the environment that it gives them."""

import json
import os
import subprocess
import sys
import threading

import pytest
from typer.testing import CliRunner

from riverrun.launch import cli, doctor_slurm
from riverrun.launch.doctor import Finding
from riverrun.launch.doctor_nodes import Verdict
from riverrun.launch.doctor_slurm import Place, exchange, expand, granted, place

# the command itself, without the checks that load DeepSpeed; faults are put in by the test
TASK = """
import sys
from riverrun.launch import cli, doctor, doctor_slurm
doctor_slurm.CHECKS = (doctor.versions, doctor.disk, doctor.clock, doctor.matmul)
{fault}
sys.argv[0] = "riverrun"
cli.main()
"""
WRONG_PRODUCT = """
import torch
double = torch.Tensor.double
torch.Tensor.double = lambda self: double(self) * 1.1
"""
NO_TORCH_VERSION = """
version = doctor_slurm.metadata.version
doctor_slurm.metadata.version = lambda name: "9.9" if name == "numpy" else version(name)
"""


def environ(task, nodes, tasks=None):
    """What srun sets."""
    return {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "3",
        "SLURM_PROCID": str(task),
        "SLURM_STEP_NUM_TASKS": str(tasks or len(expand(nodes))),
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_RESTART_COUNT": "2",
        "OMP_NUM_THREADS": "1",
    }


def start(folder, nodes, tasks, faults=None, wait=120):
    command = ["doctor", "--slurm", "--dir", str(folder), "--wait", str(wait)]
    return [
        subprocess.Popen(
            [sys.executable, "-c", TASK.format(fault=(faults or {}).get(task, "")), *command],
            env=os.environ | environ(task, nodes),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for task in tasks
    ]


def results(processes):
    found = []
    try:
        for process in processes:
            stdout, stderr = process.communicate(timeout=300)
            found.append((process.returncode, stdout, stderr))
    finally:
        for process in processes:
            process.kill()
    return found


def test_nodes_in_order(tmp_path):
    done = results(start(tmp_path, "n[1-2]", range(2)))
    assert [code for code, *_ in done] == [0, 0], done
    table = done[0][1].splitlines()
    assert table[0].startswith("node ") and [line.split()[0] for line in table[1:3]] == ["n1", "n2"]
    assert [line.split()[-1] for line in table[1:3]] == ["ok", "ok"]
    assert done[1][1] == "", "only the first prints the table"
    folder = tmp_path / "slurm" / "doctor" / "77_2"
    assert {path.name for path in folder.iterdir()} == {
        f"step_3_{what}_{task:05d}.json" for what in ("report", "address", "reached", "summed") for task in range(2)
    }
    assert json.loads((folder / "step_3_summed_00001.json").read_text()) == ""


def test_a_node_that_computes_wrongly_and_one_with_another_version(tmp_path):
    done = results(start(tmp_path, "n[08-10],m", range(4), {1: WRONG_PRODUCT, 3: NO_TORCH_VERSION}))
    assert [code for code, *_ in done] == [86] * 4, done
    for _, stdout, _ in done:
        bad = [line for line in stdout.splitlines() if line.startswith("bad node: ")]
        assert len(bad) == 2
        assert bad[0].startswith("bad node: n09 (matmul on cpu: torch.float32, relative error 1.0e-01")
        assert bad[1].startswith("bad node: m (numpy is 9.9, on the others ")


def test_a_node_that_never_reports(tmp_path):
    done = results(start(tmp_path, "n[1-3]", [0, 2], wait=1))
    codes = {code for code, *_ in done}
    assert codes == {86}, done
    # of two tasks one may be later than the second that the other waits
    assert all("bad node: n2 (no report within 1 s)" in stdout for _, stdout, _ in done)


def test_what_is_wrong_everywhere_is_no_nodes_fault(tmp_path, monkeypatch):
    def broken(folder):
        yield Finding("deepspeed", "problem", "not installed", "pip install deepspeed")

    monkeypatch.setattr(doctor_slurm, "CHECKS", (broken,))
    result = CliRunner().invoke(cli.app, ["doctor", "--slurm", "--dir", str(tmp_path)], env=environ(0, "n1"))
    assert result.exit_code == 1
    assert "problem: deepspeed on n1: not installed; fix: pip install deepspeed" in result.stdout
    assert "bad node" not in result.stdout


@pytest.mark.parametrize(
    ("nodelist", "nodes"),
    [
        ("n1", ["n1"]),
        ("n1,login", ["n1", "login"]),
        ("n[1-3,7]", ["n1", "n2", "n3", "n7"]),
        ("gpu[008-011],cpu2", ["gpu008", "gpu009", "gpu010", "gpu011", "cpu2"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("a[1,3]-ib,b[9-10]", ["a1-ib", "a3-ib", "b9", "b10"]),
    ],
)
def test_lists_of_nodes(nodelist, nodes):
    assert expand(nodelist) == nodes


def test_a_list_that_is_not_one():
    with pytest.raises(ValueError, match="brackets that do not close"):
        expand("n[1-3")


def test_outside_of_srun(tmp_path):
    result = CliRunner().invoke(
        cli.app, ["doctor", "--slurm", "--dir", str(tmp_path)], env={"SLURM_JOB_ID": None, "SLURM_PROCID": None}
    )
    assert result.exit_code == 2 and "srun --ntasks-per-node=1 riverrun doctor --slurm" in result.stderr
    with pytest.raises(ValueError, match="there are 4 tasks on 2 nodes"):
        place(environ(0, "n[1-2]", tasks=4))
    first = environ(0, "n[1-2]")
    del first["SLURM_RESTART_COUNT"]  # SLURM does not set it before the first restart
    assert place(first).restart == "0"


def test_gpus_that_slurm_gave_and_torch_does_not_see(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 7)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    [finding] = granted({"SLURM_GPUS_ON_NODE": "8"})
    assert finding.state == "problem" and finding.detail == "torch sees 7 of the 8 that SLURM gave"
    assert not list(granted({"SLURM_GPUS_ON_NODE": "7"})) and not list(granted({}))
    monkeypatch.setattr("torch.version.cuda", None)  # trains on the CPU whatever SLURM gives
    assert not list(granted({"SLURM_GPUS_ON_NODE": "8"}))


def test_answers_come_in_any_order(tmp_path):
    nodes = ("a", "b", "c")
    found = {}

    def task(number):
        found[number] = exchange(tmp_path, Place("1", "0", "0", number, nodes), "x", {"n": number}, 60)

    threads = [threading.Thread(target=task, args=(number,)) for number in (2, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: {0: {"n": 0}, 1: {"n": 1}, 2: {"n": 2}} for number in range(3)}
    # another step of the same job has its own
    assert exchange(tmp_path, Place("1", "0", "1", 0, nodes), "x", 5, 0.0) == {0: 5}


def test_an_all_reduce_is_not_tried_when_a_node_cannot_reach_the_first(tmp_path, monkeypatch):
    """Three tasks in threads, of which one has no route."""
    nodes, verdicts = ("a", "b", "c"), [Verdict() for _ in range(3)]
    real = doctor_slurm._reach
    monkeypatch.setattr(
        doctor_slurm,
        "_reach",
        lambda host, port: "no route to host" if threading.current_thread().name == "2" else real("127.0.0.1", port),
    )
    monkeypatch.setattr("riverrun.launch.all_reduce.sum_over_nodes", lambda *args: pytest.fail("tried all the same"))

    def task(number):
        doctor_slurm.together(tmp_path, Place("1", "0", "0", number, nodes), "gloo", 60, verdicts[number])

    threads = [threading.Thread(target=task, args=(number,), name=str(number)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for verdict in verdicts:
        assert list(verdict.bad) == ["c"] and verdict.bad["c"][0].endswith("on a: no route to host")
