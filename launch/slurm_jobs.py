"""SLURM's commands: submitting the jobs of a run, and how they stand. RUN_DIR/slurm/jobs has their numbers."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from riverrun.launch.slurm import Job

POLL_SECONDS = 2.0  # for the queue, which all users share
LIVING = {
    "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "STAGE_OUT", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING",
    "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT",
}  # fmt: skip


def submission(script: Path, after: str = "", link: int | None = None) -> list[str]:
    """The command that submits a script.

    Args:
        after: a job that must have ended before.
        link: which job of a chain this is, from 1.
    """
    depend = [f"--dependency=afterany:{after}"] if after else []
    return ["sbatch", "--parsable", *depend, str(script), *([] if link is None else [str(link)])]


def submit(job: Job, script: Path) -> list[str]:
    """Submits the job, or the jobs of its chain. Returns their numbers.

    Raises:
        ValueError: SLURM is not here, or does not take the job.
    """
    jobs: list[str] = []
    chained = job.chain > 0 and not job.array
    for link in range(1, job.chain + 1) if chained else [None]:
        try:
            printed = _call(submission(script, jobs[-1] if jobs else "", link), cwd=job.work_dir)
        except ValueError as error:
            begun = f"\nSubmitted already: {' '.join(jobs)}; `scancel {' '.join(jobs)}` takes them back" if jobs else ""
            raise ValueError(f"{error}{begun}") from None
        number = printed.strip().split(";")[0]
        if not number.isdecimal():
            raise ValueError(f"sbatch printed {printed!r} instead of a job's number; `squeue --me` shows what it took")
        jobs.append(number)
        with (job.folder / "jobs").open("a", encoding="utf-8") as file:
            file.write(number + "\n")
    return jobs


def submitted(run_dir: Path) -> list[str]:
    """The numbers of a run's jobs, oldest first."""
    try:
        return re.findall(r"^\d+$", (run_dir / "slurm" / "jobs").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return []


def states(jobs: Sequence[str]) -> dict[str, str] | None:
    """Of each job that SLURM still knows: PENDING, RUNNING, COMPLETED, …, with SLURM's reason if there is one; of an
    array those of all its tasks. None: there is no SLURM here.

    Raises:
        ValueError: SLURM does not answer.
    """
    if not jobs:
        return {}
    if shutil.which("squeue") is None:
        return None
    try:
        printed = _call(["squeue", "--noheader", "--states=all", f"--jobs={','.join(jobs)}", "--format=%F|%T|%r"])
    except ValueError as error:
        if "Invalid job id" in str(error):  # none of them is known
            return {}
        raise
    found: dict[str, list[str]] = {}
    for job, state, reason in (line.split("|", 2) for line in printed.splitlines() if line.count("|") >= 2):
        text = state if reason in ("None", "") or state == "COMPLETED" else f"{state} ({reason})"
        if text not in found.setdefault(job, []):
            found[job].append(text)
    return {job: ", ".join(texts) for job, texts in found.items()}


def alive(run_dir: Path) -> dict[str, str]:
    """The jobs of a run that are in the queue, and their states."""
    return {job: text for job, text in (states(submitted(run_dir)) or {}).items() if lives(text)}


def lives(text: str) -> bool:
    """Whether a job in the state that `states` tells may still do something."""
    return not LIVING.isdisjoint(re.findall(r"[A-Z_]+", text))


def follow(run_dir: Path, job: str) -> str:
    """Copies the job's log to stdout until the job has left the queue. Returns its last state."""
    path, offset, looked, now = run_dir / "slurm" / f"{job}.out", 0, 0.0, "PENDING"
    while True:
        living = True
        if time.monotonic() - looked >= POLL_SECONDS:
            now, looked = (states([job]) or {}).get(job, "no longer known to SLURM"), time.monotonic()
            living = lives(now)
        if path.exists():  # after the state was read: what a job wrote before its end is copied
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read()
            offset += len(data)
            sys.stdout.write(data.decode("utf-8", "replace"))
            sys.stdout.flush()
        if not living:
            return now
        time.sleep(0.1)


def _call(command: list[str], cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, text=True, capture_output=True, env=_environment())
    except FileNotFoundError:
        raise ValueError(
            f"`{command[0]}` is not here: run this on a login node of the cluster (--dry-run only writes the script)"
        ) from None
    if done.returncode:
        raise ValueError(f"`{' '.join(command[:2])}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _environment() -> dict[str, str]:
    """Submitted from within a job, another one would inherit that one's sizes."""
    if "SLURM_JOB_ID" not in os.environ:
        return dict(os.environ)
    return {name: value for name, value in os.environ.items() if name == "SLURM_CONF" or not name.startswith("SLURM_")}
