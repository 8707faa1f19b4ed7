"""`riverrun study`: small models on generated data, to learn what a mixer can and cannot do."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from riverrun.launch.console import err, out

if TYPE_CHECKING:
    from riverrun.eval.studies.sweep import Study

TASKS = (
    "mqar, s3, s4, s5, a5, parity, modular_arithmetic, cycle_navigation, copying, copy, reverse, addition, "
    "reverse_string, bucket_sort, stack_manipulation, missing_duplicate, set_disjointness, n_parity or n_dms"
)
T = TypeVar("T", int, float)


def study(
    name: Annotated[str, typer.Argument(help=f"The task: {TASKS}.", show_default=False)],
    mixer: Annotated[
        str, typer.Option(help="The mixers to compare, with commas between them.")
    ] = "gated_delta,mamba2,para_lstm,attention",
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="OWNER.OPTION=VALUE",
            help="An option of a mixer or of the task, as gated_delta.num_householder=2 or mqar.num_kv_pairs=8. Any "
            "option of universal makes the layers a Universal Transformer's shared block, as universal.max_steps=8.",
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Blocks of each model; default: the task's.")] = None,
    width: Annotated[int | None, typer.Option(help="Of each model; default: the task's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of each run at most; default: the task's.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step; default: the task's.")] = None,
    train_length: Annotated[
        int | None, typer.Option(help="Length of training, the longest where it varies; default: the task's.")
    ] = None,
    test_lengths: Annotated[
        str | None, typer.Option(help="Lengths, with commas between them; default: the task's.")
    ] = None,
    lr: Annotated[
        str | None, typer.Option(help="Learning rates to sweep, with commas between them; default: the task's.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many runs of each setting: seeds 0, 1, ….")] = 3,
    held_out: Annotated[int, typer.Option(min=1, help="Held-out sequences of each measurement.")] = 512,
    patience: Annotated[
        int,
        typer.Option(
            min=0,
            help="Perfect measurements in a row that end a run; 0: none do. After all steps, at the lowest learning "
            "rates, what is learnt holds on longer sequences.",
        ),
    ] = 3,
    jobs: Annotated[
        int,
        typer.Option(
            min=1, help="Runs at a time, each in a process: small models do not fill a GPU; several GPUs share them."
        ),
    ] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; auto is CUDA where there is any.")] = "auto",
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="The folder for runs, table and plot; default: studies/NAME.")
    ] = None,
) -> None:
    """Train small models of several mixers on a generated task, and test them on longer sequences.

    Every mixer is trained at every learning rate; the best one on held-out data of the training length is reported.
    Writes runs.jsonl, study.md and study.png, anew after each run. A second call with the same --out trains only what
    is missing.
    """
    from rich.text import Text

    from riverrun.eval.models import resolve_device
    from riverrun.eval.studies.report import PLOT, REPORT, rich_tables, write_report
    from riverrun.eval.studies.run import Run
    from riverrun.eval.studies.sweep import Finished, run_study
    from riverrun.eval.studies.tasks import make_task

    defaults = make_task(name).defaults

    def given(value: T | None, default: T) -> T:
        return default if value is None else value

    planned = _study(
        name,
        [each.strip() for each in mixer.split(",") if each.strip()],
        overrides or [],
        layers=given(layers, defaults.layers),
        width=given(width, defaults.width),
        steps=given(steps, defaults.steps),
        batch_size=given(batch_size, defaults.batch_size),
        train_length=given(train_length, defaults.train_length),
        test_lengths=defaults.test_lengths if test_lengths is None else _numbers("--test-lengths", test_lengths, int),
        learning_rates=defaults.learning_rates if lr is None else _numbers("--lr", lr, float),
        seeds=tuple(range(seeds)),
        held_out_rows=held_out,
        patience=patience,
    )
    where, folder = resolve_device(device), out_dir or Path("studies", name)
    with err.status("study") as status:
        shown = ""

        def started(run: Run, index: int, count: int) -> None:
            nonlocal shown
            shown = f"{index + 1} of {count}: {run.mixer}, learning rate {run.learning_rate:g}, seed {run.seed}"
            status.update(shown)

        def progress(step: int, words: str) -> None:
            status.update(f"{shown}, step {step:,}: {words}")

        def kept(finished: list[Finished], missing: int) -> None:
            write_report(planned, finished, folder)
            status.update(f"{missing} runs to come, {jobs} at a time")

        finished = run_study(planned, folder, where, progress, started, kept, jobs)
    write_report(planned, finished, folder)
    for table in rich_tables(planned, finished):
        out.print(table)
    out.print(Text(f"{folder / REPORT} and {PLOT} beside it"), soft_wrap=True)


def _study(
    task: str,
    mixers: list[str],
    overrides: list[str],
    *,
    steps: int,
    **settings,
) -> "Study":
    """The study, with the overrides given to whom they belong."""
    from riverrun.eval.studies.options import choose, parse_overrides
    from riverrun.eval.studies.sweep import Study
    from riverrun.modeling.mixer_options import OPTIONS

    for each in mixers:
        choose("mixer", each, OPTIONS)
    options = parse_overrides(overrides)
    for owner in options:
        choose("task or mixer in this study called", owner, [task, *mixers, "universal"])
    task_options, universal = options.pop(task, {}), options.pop("universal", None)
    return Study(
        task=task,
        mixers=tuple(mixers),
        steps=steps,
        validate_every=max(1, steps // 40),
        task_options=task_options,
        mixer_options=options,
        universal=universal,
        **settings,
    )


def _numbers(flag: str, text: str, kind: type[T]) -> tuple[T, ...]:
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{flag} {text!r} must be {what} with commas between them") from None
