"""Renders a batch script for SLURM from the templates in `slurm/`, into RUN_DIR/slurm.

What comes from the user reaches the script in two ways, neither of which can be read as anything else: directives
(`#SBATCH`), as SLURM's quoted strings, and words of the shell, quoted by `shlex`.
"""

import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import riverrun
from riverrun.train import outcome

TEMPLATES = Path(riverrun.__file__).parent / "slurm"
LIBRARY = ("riverrun.sh", "node.sh")
_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")
_BARE = re.compile(r"[\w@%+=:,./\[\]-]+", re.ASCII)


@dataclass(frozen=True)
class Job:
    """What `riverrun launch --slurm` is told.

    Attributes:
        run_dir, work_dir: absolute. The recipe's paths are relative to work_dir.
        gpus_per_node: None: the partition decides; 0: none.
        nproc: ranks a node; None: one a GPU.
        time: the limit, as SLURM writes it; "": the partition's.
        signal_seconds: how long before the time limit the run saves.
        max_restarts: how often the job requeues itself.
        chain: this many jobs, one after the other, instead of requeueing; 0: requeue.
        array: the chain is an array of which one task runs at a time, instead of jobs with dependencies.
        check: look at every node before training.
        exclusive: whole nodes.
    """

    recipe: str
    overrides: tuple[str, ...]
    run_dir: Path
    work_dir: Path
    nodes: int = 1
    partition: str = ""
    gpus_per_node: int | None = None
    nproc: int | None = None
    time: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    exclude: str = ""
    cpus_per_task: int | None = None
    mem: str = ""
    signal_seconds: int = 300
    max_restarts: int = 20
    chain: int = 0
    array: bool = False
    check: bool = True
    exclusive: bool = True

    def __post_init__(self) -> None:
        assert self.run_dir.is_absolute() and self.work_dir.is_absolute()
        for name, value, least in (
            ("--nodes", self.nodes, 1),
            ("--nproc", self.nproc, 1),
            ("--gpus-per-node", self.gpus_per_node, 0),
            ("--cpus-per-task", self.cpus_per_task, 1),
            ("--signal-seconds", self.signal_seconds, 1),
            ("--max-restarts", self.max_restarts, 0),
            ("--chain", self.chain, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be {least} or more")
        if not self.gpus_per_node and self.nproc is None:
            raise ValueError(
                "say --gpus-per-node G (one rank a GPU), or --gpus-per-node 0 --nproc N for N ranks on CPUs"
            )
        if self.time and not _TIME.fullmatch(self.time):
            raise ValueError(f"--time {self.time!r} is not a time limit of SLURM's: 90 (minutes), 12:00:00, 2-00:00:00")
        if self.array and self.chain < 2:
            raise ValueError("--array runs the jobs of a chain as one array: say --chain N with it")
        if "\\" in str(self.run_dir):
            raise ValueError(
                f"--run-dir {self.run_dir}: SLURM takes a backslash in a path for its own: use another name"
            )

    @property
    def folder(self) -> Path:
        return self.run_dir / "slurm"


def directives(job: Job) -> list[str]:
    """The `#SBATCH` lines.

    Raises:
        ValueError: a value that cannot stand in one.
    """
    return [
        f"#SBATCH --{name}" + ("" if value is None else f"={_quoted(name, value)}") for name, value in _options(job)
    ]


def settings(job: Job) -> list[str]:
    """The variables of the script: what `slurm/riverrun.sh` names, and `train`, the arguments of `riverrun train`."""
    arguments = [f"--run-dir={job.run_dir}", "--resume=auto", "--", job.recipe, *job.overrides]
    values = {
        "run_dir": job.run_dir,
        "work_dir": job.work_dir,
        "python": sys.executable,
        "nproc": "" if job.nproc is None else job.nproc,
        "grace": job.signal_seconds,
        "max_restarts": job.max_restarts,
        "chain": job.chain,
        "check": int(job.check),
        "exclude": job.exclude,
    }
    lines = [f"{name}={shlex.quote(str(value))}" for name, value in values.items()]
    return [*lines, "train=(", *(f"    {shlex.quote(argument)}" for argument in arguments), ")"]


def render(job: Job) -> str:
    """The batch script."""
    blocks = {"# @directives@": directives(job), "# @settings@": settings(job)}
    lines: list[str] = []
    for line in (TEMPLATES / "train.sbatch").read_text(encoding="utf-8").splitlines():
        lines += blocks.pop(line, [line])
    assert not blocks, f"the template lacks {', '.join(blocks)}"
    return "\n".join(lines) + "\n"


def write(job: Job) -> Path:
    """Renders the script into RUN_DIR/slurm and lays the library beside it, so that a run that is requeued for weeks
    does not change when Riverrun does. Returns the script's path."""
    script = render(job)
    job.folder.mkdir(parents=True, exist_ok=True)
    for name in LIBRARY:
        shutil.copyfile(TEMPLATES / name, job.folder / name)
    path = job.folder / "train.sbatch"
    path.write_text(script, encoding="utf-8", errors="surrogateescape")
    return path


def fresh(run_dir: Path) -> None:
    """Takes back what ended the jobs before: a request to stop, a crash that was not to be repeated, an outcome."""
    outcome.withdraw(run_dir)
    for path in (run_dir / "slurm" / "given-up", run_dir / "outcome.json"):
        path.unlink(missing_ok=True)


def _options(job: Job) -> Iterator[tuple[str, str | int | None]]:
    yield "job-name", "riverrun-" + (re.sub(r"[^\w.-]", "_", job.run_dir.name, flags=re.ASCII) or "run")
    yield "nodes", job.nodes
    yield "ntasks-per-node", 1
    for name, value in (
        ("partition", job.partition), ("account", job.account), ("qos", job.qos), ("constraint", job.constraint),
        ("exclude", job.exclude), ("time", job.time), ("mem", job.mem), ("gpus-per-node", job.gpus_per_node),
        ("cpus-per-task", job.cpus_per_task),
    ):  # fmt: skip
        if value:
            yield name, value
    if job.exclusive:
        yield "exclusive", None
    yield "output", str(job.folder).replace("%", "%%") + "/%j.out"
    yield "open-mode", "append"
    yield "wait-all-nodes", 1
    yield "signal", f"B:USR1@{job.signal_seconds}"
    yield ("no-requeue" if job.chain else "requeue"), None
    if job.array:
        yield "array", f"1-{job.chain}%1"


def _quoted(name: str, value: str | int) -> str:
    text = str(value)
    if not text.isprintable():
        raise ValueError(f"--{name} {text!r} has characters that cannot be printed, which SLURM's scripts cannot hold")
    if _BARE.fullmatch(text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
