"""`riverrun stop`: ask a run to save and end."""

import time
from pathlib import Path
from typing import Annotated

import typer

from riverrun.launch import run_folder, slurm_jobs
from riverrun.launch.console import out
from riverrun.train import outcome


def stop(
    run_dir: Annotated[Path, typer.Argument(help="The run's folder.")],
    requeue: Annotated[
        bool, typer.Option("--requeue", help="The run is to be started again: its SLURM job is requeued.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the run has ended.")] = False,
) -> None:
    """Ask a run to save after its current step and to end. `riverrun launch` goes on with it.

    It works from any host that sees the run folder. With --wait the exit code is 85 when the run stopped and was saved,
    0 when it came to its end first.
    """
    run_folder.require(run_dir)
    standing, jobs = outcome.read(run_dir), slurm_jobs.alive(run_dir)
    ended = standing is not None and (standing.state != "running" or run_folder.dead(standing))
    if not jobs and (standing is None or ended):
        _say(f"nothing to stop: {_how(standing, run_dir)}")
        return
    began = time.time()
    outcome.request_stop(run_dir, "requeue" if requeue else "stop")
    asked = outcome.stop_request(run_dir)
    if standing is None or ended:  # it is still to begin
        then = "exits as soon as it starts" if asked == "stop" else "starts as if it had not been asked"
        _say(f"not running yet: {_list(jobs)} {then}. `scancel {' '.join(jobs)}` takes it out of the queue")
    else:
        again = (
            "and is started again by its SLURM job or by whoever started it (exit code 85)"
            if asked == "requeue"
            else f"and ends. `riverrun launch` with --run-dir {run_dir} goes on with it"
        )
        _say(
            f"asked the run to stop (step {standing.step} when it last wrote): it saves after its current step {again}"
        )
        if requeue and asked == "stop":
            _say("it had been asked to stop for good before, which --requeue does not overrule")
    if wait:
        raise typer.Exit(_wait(run_dir, began))


def _wait(run_dir: Path, began: float) -> int:
    """Until the run has written how it ended, or cannot write it any more."""
    looked = time.monotonic()
    while True:
        standing = outcome.read(run_dir)
        if standing is not None and standing.state != "running" and standing.time >= began:
            _say(standing.message)
            return standing.exit_code
        if standing is not None and run_folder.dead(standing):
            raise ValueError(f"process {standing.pid} is gone without a word: look at its output, then launch again")
        if time.monotonic() - looked > slurm_jobs.POLL_SECONDS:
            looked = time.monotonic()
            if slurm_jobs.submitted(run_dir) and not slurm_jobs.alive(run_dir):
                standing = outcome.read(run_dir)  # it may have been written since
                if standing is None or standing.state == "running":
                    raise ValueError(f"the run's jobs have left the queue without a word: see {run_dir / 'slurm'}")
                _say(standing.message)
                return standing.exit_code
        time.sleep(0.1)


def _how(standing: outcome.Standing | None, run_dir: Path) -> str:
    if standing is None:
        return f"{run_dir} has a run that has not started, and no job in the queue"
    if standing.state == "running":
        return f"process {standing.pid} of this host is gone. `riverrun launch` goes on from the newest checkpoint"
    return f"the run is {standing.state}, at step {standing.step} of {standing.steps}"


def _list(jobs: dict[str, str]) -> str:
    return ("job " if len(jobs) == 1 else "jobs ") + ", ".join(f"{job} ({state})" for job, state in jobs.items())


def _say(message: str) -> None:
    out.print(message, markup=False, highlight=False, soft_wrap=True)
