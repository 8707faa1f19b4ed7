"""`riverrun launch`: start a run on all devices of this host, or submit it to SLURM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from riverrun.launch import local, run_folder, shipped, slurm, slurm_jobs
from riverrun.launch.console import err, out
from riverrun.train import outcome

if TYPE_CHECKING:
    from riverrun.train.config import Recipe

ON_SLURM = "On SLURM"


def launch(
    recipe: Annotated[
        str, typer.Argument(help="A recipe's name, or the path of a .toml file.", autocompletion=shipped.complete)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the recipe's, such as train.steps=20."),
    ] = None,
    run_dir: Annotated[
        Path, typer.Option("--run-dir", help="The folder of the run; on SLURM all nodes must see it.")
    ] = ...,  # type: ignore[assignment]
    nproc: Annotated[
        int | None, typer.Option("--nproc", min=1, help="Ranks a host. On SLURM the default is one a GPU.")
    ] = None,
    restarts: Annotated[
        int, typer.Option("--restarts", min=0, help="How often to start again after a crash, if the run gets on.")
    ] = 0,
    on_slurm: Annotated[bool, typer.Option("--slurm", help="Submit to SLURM.", rich_help_panel=ON_SLURM)] = False,
    nodes: Annotated[int, typer.Option("--nodes", "-N", min=1, rich_help_panel=ON_SLURM)] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option("--gpus-per-node", "-G", min=0, help="0: CPUs.", rich_help_panel=ON_SLURM)
    ] = None,
    partition: Annotated[str, typer.Option("--partition", "-p", rich_help_panel=ON_SLURM)] = "",
    time: Annotated[
        str, typer.Option("--time", "-t", help="The limit of one job, such as 12:00:00.", rich_help_panel=ON_SLURM)
    ] = "",
    account: Annotated[str, typer.Option("--account", "-A", rich_help_panel=ON_SLURM)] = "",
    qos: Annotated[str, typer.Option("--qos", rich_help_panel=ON_SLURM)] = "",
    constraint: Annotated[str, typer.Option("--constraint", "-C", rich_help_panel=ON_SLURM)] = "",
    exclude: Annotated[str, typer.Option("--exclude", "-x", help="Nodes to leave out.", rich_help_panel=ON_SLURM)] = "",
    cpus_per_task: Annotated[
        int | None, typer.Option("--cpus-per-task", min=1, help="CPUs a node.", rich_help_panel=ON_SLURM)
    ] = None,
    mem: Annotated[str, typer.Option("--mem", help="Memory a node; 0: all.", rich_help_panel=ON_SLURM)] = "",
    exclusive: Annotated[
        bool, typer.Option("--exclusive/--shared", help="Whole nodes, or parts.", rich_help_panel=ON_SLURM)
    ] = True,
    signal_seconds: Annotated[
        int,
        typer.Option("--signal-seconds", min=1, help="Save that long before the limit.", rich_help_panel=ON_SLURM),
    ] = 300,
    max_restarts: Annotated[
        int, typer.Option("--max-restarts", min=0, help="How often the job is requeued.", rich_help_panel=ON_SLURM)
    ] = 20,
    chain: Annotated[
        int,
        typer.Option(
            "--chain",
            min=0,
            help="Submit this many jobs, each of which goes on where the last one ended, instead of requeueing.",
            rich_help_panel=ON_SLURM,
        ),
    ] = 0,
    array: Annotated[
        bool, typer.Option("--array", help="The chain is one array of jobs.", rich_help_panel=ON_SLURM)
    ] = False,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not look at the nodes first.", rich_help_panel=ON_SLURM)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write and print the script, do not submit.", rich_help_panel=ON_SLURM)
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="Print the job's log until it ends.", rich_help_panel=ON_SLURM)
    ] = False,
) -> None:
    """Train on several devices: on this host, or with [bold]--slurm[/bold] on a cluster.

    A run that is in the folder already goes on. Ctrl-C, SIGTERM and [bold]riverrun stop[/bold] save and end it; the
    same command goes on from there. The exit code is 0 if the run finished, 85 if it was stopped and saved.
    """
    run_dir, values = run_dir.expanduser().absolute(), tuple(overrides or [])
    if on_slurm and restarts:
        raise ValueError("--restarts is for this host: on SLURM the job requeues itself, see --max-restarts")
    if not on_slurm:
        _refuse_idle_options(
            {
                "--nodes": nodes > 1, "--gpus-per-node": gpus_per_node is not None, "--partition": partition,
                "--time": time, "--account": account, "--qos": qos, "--constraint": constraint, "--exclude": exclude,
                "--cpus-per-task": cpus_per_task, "--mem": mem, "--chain": chain, "--array": array,
                "--dry-run": dry_run, "--follow": follow,
            }
        )  # fmt: skip
        if nproc is None:
            raise ValueError("say --nproc N: how many ranks to start on this host, at most one a GPU (or --slurm)")
        _prepare(recipe, values, run_dir, nproc)
        arguments = [f"--run-dir={run_dir}", "--resume=auto", "--", recipe, *values]
        code = local.run(local.command(arguments, nproc), run_dir, restarts, _say)
        raise typer.Exit(code)
    job = slurm.Job(
        recipe, values, run_dir, Path.cwd(), nodes=nodes, partition=partition, gpus_per_node=gpus_per_node, nproc=nproc,
        time=time, account=account, qos=qos, constraint=constraint, exclude=exclude, cpus_per_task=cpus_per_task,
        mem=mem, signal_seconds=signal_seconds, max_restarts=max_restarts, chain=chain, array=array,
        check=not no_check, exclusive=exclusive,
    )  # fmt: skip
    if follow and array:
        raise ValueError("--follow prints one job's log: leave out --array, or look into RUN_DIR/slurm yourself")
    slurm.render(job)  # what cannot be rendered is refused before anything is written
    _prepare(recipe, values, run_dir, nodes * (nproc or gpus_per_node or 0))
    _submit(job, dry_run, follow)


def _submit(job: slurm.Job, dry_run: bool, follow: bool) -> None:
    if dry_run:
        script = slurm.write(job)
        out.print(script.read_text(encoding="utf-8", errors="surrogateescape"), end="", markup=False, highlight=False,
                  soft_wrap=True)  # fmt: skip
        _say(f"not submitted: {script}")
        return
    slurm.fresh(job.run_dir)
    script = slurm.write(job)
    jobs = slurm_jobs.submit(job, script)
    for number in jobs:
        out.print(number, markup=False, highlight=False)
    _say(
        f"submitted {script}\nlog: {job.folder}/{jobs[0] if not job.array else 'JOB'}.out; "
        f"`riverrun status {job.run_dir}` tells how it stands, `riverrun stop {job.run_dir}` saves and ends it"
    )
    if follow:
        for number in jobs:
            _say(f"job {number} ended: {slurm_jobs.follow(job.run_dir, number)}")
        standing = outcome.read(job.run_dir)
        if standing is None or standing.state == "running":
            raise typer.Exit(outcome.FAILED)
        raise typer.Exit(standing.exit_code)


def _prepare(recipe: str, overrides: tuple[str, ...], run_dir: Path, ranks: int) -> None:
    """Refuses what would fail later, on the ranks or after hours in a queue."""
    loaded = shipped.load(recipe, list(overrides)).recipe
    if pid := run_folder.running_here(run_dir):
        raise ValueError(
            f"--run-dir {run_dir} is in use by process {pid} of this host: wait for it, or `riverrun stop {run_dir}`"
        )
    if living := slurm_jobs.alive(run_dir):
        jobs = ", ".join(f"{job} ({state})" for job, state in living.items())
        raise ValueError(
            f"--run-dir {run_dir} has jobs in the queue: {jobs}. Wait for them, end them with "
            f"`riverrun stop {run_dir}`, or take them out with `scancel {' '.join(living)}`"
        )
    _check_layout(loaded, ranks)
    run_folder.claim(run_dir, loaded)


def _check_layout(recipe: Recipe, ranks: int) -> None:
    from riverrun.train.batches import plan_micro_batches

    parallel, train = recipe.parallel, recipe.train
    group = parallel.tp * parallel.cp
    if ranks % group:
        raise ValueError(
            f"{ranks} ranks do not divide into parallel.tp={parallel.tp} x parallel.cp={parallel.cp}: start a multiple "
            f"of {group} ranks, or lower one of them"
        )
    plan_micro_batches(
        train.global_batch_size, train.micro_batch_size, ranks // group, tp=parallel.tp, cp=parallel.cp,
        seq_len=recipe.data.seq_len,
    )  # fmt: skip


def _refuse_idle_options(options: dict[str, object]) -> None:
    if given := [name for name, value in options.items() if value]:
        raise ValueError(f"{', '.join(given)}: for SLURM only. Say --slurm too, or leave {given[0]} out")


def _say(message: str) -> None:
    err.print(message, markup=False, highlight=False, soft_wrap=True, style="yellow")
