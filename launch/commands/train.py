"""`riverrun train`: pretrain a recipe, alone or on the ranks that torchrun started."""

import os
from pathlib import Path
from typing import Annotated

import typer

from riverrun.launch import shipped
from riverrun.launch.console import err


def train(
    recipe: Annotated[
        str,
        typer.Argument(help="A recipe's name, or the path of a .toml file.", autocompletion=shipped.complete),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the recipe's, such as train.steps=20."),
    ] = None,
    run_dir: Annotated[
        Path, typer.Option("--run-dir", help="The folder for checkpoints, metrics and the loss curve.")
    ] = ...,  # type: ignore[assignment]
    resume: Annotated[
        str,
        typer.Option(
            "--resume",
            metavar="auto|never|PATH",
            help="auto: go on from the newest checkpoint, if there is one. never: the folder must be new. PATH: go on "
            "from that checkpoint or run folder.",
        ),
    ] = "auto",
) -> None:
    """Pretrain a model.

    On several devices: [bold]riverrun launch … --nproc N[/bold]. Ctrl-C finishes the step, saves and leaves; the same
    command then goes on from there. So does SIGUSR1, and [bold]riverrun stop RUN_DIR[/bold], with exit code 85.
    """
    loaded = shipped.load(recipe, overrides or [])

    from riverrun.train import distributed, loop, outcome

    agent = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun's
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank == 0 and not agent:
        outcome.withdraw(run_dir)  # of an earlier run; riverrun launch and the batch script do it before torchrun
    engine, parallel = loaded.recipe.engine, loaded.recipe.parallel
    ranks = distributed.start(
        engine.device, rank, world_size, int(os.environ.get("LOCAL_RANK", 0)), engine.start_timeout_minutes,
        cp=parallel.cp, tp=parallel.tp,
    )  # fmt: skip
    try:
        end = loop.run(loaded.recipe, run_dir, resume, ranks, os.environ.get("SLURM_JOB_ID", ""), agent)
    finally:
        distributed.stop()
    if rank == 0:
        err.print(end.message, style="yellow" if end.exit_code else "green", soft_wrap=True, highlight=False)
    if end.exit_code and not (agent and end.exit_code == outcome.STOPPED):
        raise typer.Exit(end.exit_code)
