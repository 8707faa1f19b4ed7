"""`riverrun status`: how a run stands."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from riverrun.launch import run_folder, slurm_jobs
from riverrun.launch.console import out
from riverrun.train import outcome

SILENT_SECONDS = 60.0  # a rank whose heart has not beaten for that long is shown


def status(
    run_dir: Annotated[Path, typer.Argument(help="The run's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """How a run stands: state, step, loss, newest checkpoint, SLURM job, ranks that are silent.

    It reads the run folder, from any host that sees it.
    """
    run_folder.require(run_dir)
    found = survey(run_dir, time.time())
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for name, text in _lines(found):
        out.print(f"{name:<12}{text}", markup=False, highlight=False, soft_wrap=True)


def survey(run_dir: Path, now: float) -> dict[str, Any]:
    """What `--json` prints. Ages are in seconds; None: not known."""
    standing, record = outcome.read(run_dir), run_folder.last_record(run_dir)
    written, saved = run_folder.record_time(run_dir), run_folder.newest_step(run_dir)
    jobs, queue = _jobs(run_dir)
    state: str = standing.state if standing else "not started"
    if standing is not None and (run_folder.dead(standing) or (state == "running" and queue == "left")):
        state = "dead"  # killed, or its host is gone: it could not write what became of it
    beats = run_folder.heartbeats(run_dir)
    return {
        "state": state,
        "step": max(record.get("step", 0), standing.step if standing else 0),
        "steps": standing.steps if standing else None,
        "loss": record.get("loss"),
        "tokens_per_second": record.get("tokens_per_second"),
        "record_age": None if written is None else max(now - written, 0.0),
        "checkpoint_step": saved if saved >= 0 else None,
        "stop_request": outcome.stop_request(run_dir),
        "message": standing.message if standing else "",
        "exit_code": standing.exit_code if standing and standing.state != "running" else None,
        "host": standing.host if standing else "",
        "pid": standing.pid if standing else None,
        "jobs": jobs,
        "heartbeats": [beat | {"age": max(now - beat["time"], 0.0)} for beat in beats],
    }


def _jobs(run_dir: Path) -> tuple[dict[str, str], str]:
    """The last job and all that live, with their states; and whether the run is "in" the queue or "left" it; "": there
    is no telling."""
    known = slurm_jobs.submitted(run_dir)
    try:
        found = slurm_jobs.states(known)
    except ValueError as error:
        return {known[-1]: str(error)}, ""
    if found is None:
        return dict.fromkeys(known[-1:], "no SLURM on this host"), ""
    living = {job: text for job, text in found.items() if slurm_jobs.lives(text)}
    last = {job: found.get(job, "no longer known to SLURM") for job in known[-1:]}
    return living | last, "in" if living else "left" if known else ""


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    asked = found["stop_request"] if found["state"] in ("running", "not started") else None
    running = found["state"] == "running"
    at = f" of {found['steps']:,}" if found["steps"] else ""
    lines = [("state", found["state"] + (f", asked to {asked}" if asked else ""))]
    if found["state"] == "dead":
        lines.append(("", f"process {found['pid']} on {found['host']} is gone; `riverrun launch` goes on with the run"))
    lines.append(("step", f"{found['step']:,}{at}"))
    if found["loss"] is not None:
        lines.append(("loss", f"{found['loss']:.4f}, written {_ago(found['record_age'])}"))
    if running and found["tokens_per_second"]:
        lines.append(("tokens/s", f"{found['tokens_per_second']:,.0f}"))
    lines.append(("checkpoint", "none" if found["checkpoint_step"] is None else f"step {found['checkpoint_step']:,}"))
    for job, state in found["jobs"].items():
        lines.append(("job", f"{job}: {state}"))
    if running and found["host"]:
        lines.append(("rank 0", f"process {found['pid']} on {found['host']}"))
    if running and found["heartbeats"]:
        lines.append(("ranks", _ranks(found["heartbeats"])))
    if found["message"]:
        lines.append(("message", found["message"]))
    return lines


def _ranks(beats: list[dict[str, Any]]) -> str:
    silent = [beat for beat in beats if beat["age"] > SILENT_SECONDS]
    steps = {beat["step"] for beat in beats}
    where = f"at step {min(steps):,}" if len(steps) == 1 else f"at steps {min(steps):,} to {max(steps):,}"
    if not silent:
        return f"{len(beats)}, {where}, all alive"
    names = ", ".join(f"{b['rank']} on {b['host']} ({b['phase']}, {_ago(b['age'])})" for b in silent)
    return f"{len(beats)}, {where}; silent: {names}"


def _ago(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} seconds ago"
