"""`riverrun bench-checkpoint`: how long training waits for a checkpoint."""

import os
from pathlib import Path
from typing import Annotated

import typer

from riverrun.launch import shipped
from riverrun.launch.console import err, out


def bench_checkpoint(
    recipe: Annotated[
        str,
        typer.Argument(help="A recipe's name, or the path of a .toml file.", autocompletion=shipped.complete),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the recipe's, such as train.steps=20."),
    ] = None,
    folder: Annotated[
        Path,
        typer.Option("--dir", help="Where to write: the disk of runs, but no folder of one."),
    ] = ...,  # type: ignore[assignment]
    saves: Annotated[int, typer.Option(min=1, help="Checkpoints of each kind, after a first one beside training.")] = 3,
) -> None:
    """Time checkpoints written in training's place and beside it, with a recipe's model on random tokens, one micro
    batch a step.

    On several devices start it with torchrun, as in training.
    """
    from riverrun.train import checkpoint, distributed
    from riverrun.train.checkpoint_cost import measure

    loaded = shipped.load(recipe, overrides or [], require_inputs=False)
    if checkpoint.folder_of(folder).exists():
        raise ValueError(f"{folder} has checkpoints, and what is written here is deleted: name another folder")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    engine, parallel = loaded.recipe.engine, loaded.recipe.parallel
    ranks = distributed.start(
        engine.device, rank, world, int(os.environ.get("LOCAL_RANK", 0)), engine.start_timeout_minutes,
        cp=parallel.cp, tp=parallel.tp,
    )  # fmt: skip
    costs = []
    try:
        with err.status("the model's first steps, then checkpoints in training's place") as status:
            for cost in measure(loaded.recipe, folder, ranks, saves):
                costs.append(cost)
                status.update("checkpoints beside training")
    finally:
        distributed.stop()
    if rank == 0:
        import torch

        name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU"
        lines = [
            f"{loaded.recipe.name}: {costs[0].bytes / 1e9:.2f} GB on {world} x {name}, torch {torch.__version__}, "
            f"medians of {saves}",
            "| written | training waits s | whole s | waits / whole | step s | step meanwhile s |",
            "|---|---|---|---|---|---|",
        ]
        for cost in costs:
            meanwhile = "–" if cost.step_beside is None else f"{cost.step_beside:.3f}"
            kind = "beside training" if cost.asynchronous else "in its place"
            lines.append(
                f"| {kind} | {cost.stall:.3f} | {cost.write:.3f} | {cost.stall / cost.write:.1%} | {cost.step:.3f} | "
                f"{meanwhile} |"
            )
        waits = costs[1].stall / costs[0].stall
        lines.append(f"beside training, it waits {waits:.1%} of the time that it waits in its place")
        lines.append(
            f"the first one beside training waits {costs[1].first:.3f} s: it allocates the host's memory for the copy"
        )
        out.print("\n".join(lines), soft_wrap=True, markup=False, highlight=False)
