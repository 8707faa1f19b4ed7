"""`riverrun doctor --slurm`: one task a node, under srun. Every task checks its node, then all compare.

They meet in DIR/slurm/doctor/<job>_<restart>/, where each leaves its report and reads the others', up to a deadline:
a node that hangs or is gone keeps nobody waiting for longer. Every task comes to the same verdict and prints the bad
nodes, so that one that dies takes no answer with it; task 0 prints the table as well.
"""

import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from riverrun.launch import doctor
from riverrun.launch.doctor import Check, Finding
from riverrun.launch.doctor_nodes import NodeReport, Verdict, judge, judge_errors, table
from riverrun.train.outcome import BAD_NODE, FAILED, FINISHED

CHECKS: tuple[Check, ...] = (
    doctor.versions, doctor.imports, doctor.gpus, doctor.compiler, doctor.cores_and_memory, doctor.disk, doctor.clock,
    doctor.matmul,
)  # fmt: skip
SAME = ("riverrun", "torch", "triton", "deepspeed", "transformers", "numpy", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
POLL = 0.1  # seconds
ALL_REDUCE_SECONDS = 120.0


@dataclass(frozen=True)
class Place:
    """Where this task is in its job step."""

    job: str
    restart: str
    step: str
    task: int
    nodes: tuple[str, ...]

    @property
    def node(self) -> str:
        return self.nodes[self.task]

    def folder(self, run_dir: Path) -> Path:
        return run_dir / "slurm" / "doctor" / f"{self.job}_{self.restart}"


def place(environ: Mapping[str, str]) -> Place:
    """As srun says.

    Raises:
        ValueError: not under srun, or not with one task on each node.
    """
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST"))
    if nodes is None or "SLURM_PROCID" not in environ or "SLURM_JOB_ID" not in environ:
        raise ValueError(
            "--slurm is for a task of a job step: srun --ntasks-per-node=1 riverrun doctor --slurm --dir …"
        )
    names = tuple(expand(nodes))
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1")))
    if tasks != len(names):
        raise ValueError(
            f"--slurm needs one task a node, and there are {tasks} tasks on {len(names)} nodes: "
            "srun --ntasks-per-node=1 riverrun doctor --slurm --dir …"
        )
    return Place(
        environ["SLURM_JOB_ID"],
        environ.get("SLURM_RESTART_COUNT", "0"),
        environ.get("SLURM_STEP_ID", "0"),
        int(environ["SLURM_PROCID"]),
        names,
    )


def expand(nodelist: str) -> list[str]:
    """The nodes of a list like "a[01-03,7]-ib,login", in order.

    Raises:
        ValueError: brackets that do not close.
    """
    if nodelist.count("[") != nodelist.count("]"):
        raise ValueError(f"SLURM's list of nodes {nodelist!r} has brackets that do not close")
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        pieces = re.split(r"\[([^\]]*)\]", part)  # text, ranges, text, …
        found = [pieces[0]]
        for ranges, text in zip(pieces[1::2], pieces[2::2]):
            found = [name + number + text for name in found for number in _numbers(ranges)]
        names += found
    return names


def _numbers(ranges: str) -> list[str]:
    """01-03,7 -> 01, 02, 03, 7"""
    found = []
    for item in ranges.split(","):
        low, _, high = item.partition("-")
        found += [str(n).zfill(len(low)) for n in range(int(low), int(high or low) + 1)]
    return found


def run(run_dir: Path, environ: Mapping[str, str], seconds: float, say: Callable[[str], None]) -> int:
    """This task's part. Returns the exit code.

    Args:
        seconds: to wait for the other tasks.

    Raises:
        ValueError: see `place`; or `run_dir` is not a folder.
    """
    here = place(environ)
    findings = [*doctor.examine(run_dir, CHECKS), *granted(environ)]
    report = NodeReport(here.node, findings, facts())
    answers = exchange(run_dir, here, "report", asdict(report), seconds)
    reports = [_report(answer) for _, answer in sorted(answers.items())]
    missing = [node for task, node in enumerate(here.nodes) if task not in answers]
    verdict = judge(reports, missing, seconds)
    if len(here.nodes) > 1 and not missing:
        cuda = all(any(f.name == "matmul on cuda:0" for f in report.findings) for report in reports)
        together(run_dir, here, "nccl" if cuda else "gloo", seconds, verdict)
    if here.task == 0:
        for line in [
            *table(reports, verdict),
            *(f"warning: {text}" for text in verdict.warnings),
            *(f"problem: {text}" for text in verdict.problems),
        ]:
            say(line)
    for node, reasons in verdict.bad.items():
        say(f"bad node: {node} ({'; '.join(reasons)})")
    return BAD_NODE if verdict.bad else FAILED if verdict.problems else FINISHED


def granted(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Whether torch sees all GPUs that SLURM gave to this node: one may have fallen off the bus."""
    import torch

    given = environ.get("SLURM_GPUS_ON_NODE", "")
    if given.isdigit() and torch.version.cuda and (seen := torch.cuda.device_count()) != int(given):
        fix = "look at nvidia-smi and dmesg there; check CUDA_VISIBLE_DEVICES and srun's --gpus-per-task"
        yield Finding("GPU count", "problem", f"torch sees {seen} of the {given} that SLURM gave", fix)


def facts() -> dict[str, str]:
    """What has to be the same on all nodes."""
    import torch

    found = {"python": sys.version.split()[0]}
    for name in SAME:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    count = torch.cuda.device_count()
    return found | {"devices": f"{count} x {torch.cuda.get_device_name(0)}" if count else "cpu"}


def exchange(run_dir: Path, here: Place, what: str, answer: Any, seconds: float) -> dict[int, Any]:
    """Leaves this task's answer for the others, and returns everyone's that came within `seconds`, by task.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = here.folder(run_dir)
    folder.mkdir(parents=True, exist_ok=True)

    names = {f"step_{here.step}_{what}_{task:05d}.json": task for task in range(len(here.nodes))}
    own = folder / f"step_{here.step}_{what}_{here.task:05d}.json"
    own.with_suffix(".partial").write_text(json.dumps(answer), encoding="utf-8")
    os.replace(own.with_suffix(".partial"), own)
    found: dict[int, Any] = {}
    until = time.monotonic() + seconds
    while True:
        late = time.monotonic() > until
        # listing the folder makes a network file system look again for files that were not there
        for name in os.listdir(folder):
            if name in names and names[name] not in found:
                found[names[name]] = json.loads((folder / name).read_text(encoding="utf-8"))
        if late or len(found) == len(names):
            return found
        time.sleep(min(1.0, POLL * max(1, len(names) / 32)))  # thousands of nodes need not ask ten times a second


def together(run_dir: Path, here: Place, backend: str, seconds: float, verdict: Verdict) -> None:
    """An all-reduce over the nodes, once every one of them can reach the first."""
    from riverrun.launch.all_reduce import Meeting, sum_over_nodes

    with Meeting(here.task == 0) as meeting:
        address = [socket.gethostname(), meeting.port]
        first = exchange(run_dir, here, "address", address, seconds)
        host, port = first.get(0, address)
        reached = exchange(run_dir, here, "reached", _reach(host, port) if 0 in first else "", seconds)
        _absent(here, reached, "stopped answering", verdict)
        errors = {here.nodes[task]: error for task, error in reached.items()}
        judge_errors(errors, f"connecting to {host}:{port} on {here.nodes[0]}", verdict)
        if len(reached) < len(here.nodes) or any(errors.values()):
            return
        error = sum_over_nodes(backend, here.task, len(here.nodes), host, port, ALL_REDUCE_SECONDS)
        summed = exchange(run_dir, here, "summed", error, seconds + ALL_REDUCE_SECONDS)
        _absent(here, summed, "stopped answering during an all-reduce", verdict)
        judge_errors({here.nodes[task]: e for task, e in summed.items()}, f"all-reduce with {backend}", verdict)


def _absent(here: Place, answers: Mapping[int, Any], why: str, verdict: Verdict) -> None:
    for task, node in enumerate(here.nodes):
        if task not in answers:
            verdict.blame(node, why)


def _reach(host: str, port: int) -> str:
    """What keeps this node from connecting there; "": nothing."""
    try:
        socket.create_connection((host, port), timeout=20).close()
    except OSError as error:
        return str(error)
    return ""


def _report(answer: dict[str, Any]) -> NodeReport:
    return NodeReport(**answer | {"findings": [Finding(**finding) for finding in answer["findings"]]})
