"""`riverrun eval`: how good a model is. Sub-commands are the tasks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from riverrun.launch.console import err, out
from riverrun.launch.evaluation import Tasks, results_folder

if TYPE_CHECKING:
    from riverrun.eval.documents import Documents
    from riverrun.eval.harness import Timer
    from riverrun.eval.models import LoadedModel

app = typer.Typer(
    name="eval",
    cls=Tasks,
    subcommand_metavar="TASK[,TASK…] [OPTIONS]",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Evaluate a run, an exported model or any Hugging Face causal language model.",
)

Model = Annotated[
    str, typer.Option("--model", help="A run folder, a model folder in Hugging Face's layout, or a name on its hub.")
]
Step = Annotated[int | None, typer.Option(help="The checkpoint of a run; default: the newest intact one.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; auto is CUDA where there is any.")]
Dtype = Annotated[
    Literal["fp32", "bf16", "fp16"] | None, typer.Option(help="Of the weights; default: as they were saved.")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the code that a foreign model folder contains.")]

Control = Annotated[
    str | None,
    typer.Option(
        "--state-control",
        metavar="NAME=VALUE,…",
        help="Of Mamba-2 layers: retention, insertion, dt_scale, max_norm or window, such as "
        "retention=0.9999,insertion=0.75 or window=8192.",
    ),
]

NumSteps = Annotated[
    int | None,
    typer.Option(
        "--num-steps",
        metavar="R",
        help="How often the core of a model of recurrent depth runs; default: as often as on average in training.",
    ),
]


def _batch_size(text: str | int) -> int:
    if text == "auto":
        from riverrun.eval.fitting import AUTO

        return AUTO
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither auto nor a whole number") from None


BatchSize = Annotated[
    int,
    typer.Option(
        "--batch-size",
        parser=_batch_size,
        metavar="auto|N",
        help="Prompts, documents or rows at a time. auto: 64, halved whenever the memory of the GPU is too small.",
    ),
]


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """On a terminal, a bar that is told of what is done and of all."""
    from rich.progress import Progress

    with Progress(console=err, transient=True, disable=not err.is_terminal) as bar:
        shown = bar.add_task(name)
        yield lambda done, total: bar.update(shown, completed=done, total=total)


@app.callback()
def eval_(
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start again: remove the samples of an earlier evaluation in --out.")
    ] = False,
) -> None:
    """Evaluate a run, an exported model or any Hugging Face causal language model.

    Several tasks: [bold]riverrun eval perplexity,needle --model …[/bold] loads the model once; each option goes to the
    tasks that know it, the results of each to a folder of its own below --out, and all of them to results.json there.
    On several devices: [bold]torchrun --nproc-per-node N -m riverrun.launch.cli eval …[/bold]. What was stopped is gone
    on with by the same command, on any number of devices.
    """


@app.command()
def perplexity(
    model: Model,
    data: Annotated[Path, typer.Option(help="A token store's folder, a text file, or a .jsonl file.")],
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens a segment, or a chunk when streaming; default: as in training.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Evaluate the first N documents only.")] = None,
    batch_size: BatchSize = 8,
    out_dir: Annotated[
        Path | None,
        typer.Option(
            "--out", help="The folder for the results, gone on with if begun; default: eval/perplexity in the run."
        ),
    ] = None,
    num_steps: Annotated[
        str | None,
        typer.Option(
            metavar="R[,R…]",
            help="How often the core of a model of recurrent depth runs; default: as often as on average in training. "
            "Several: the loss as a function of it, and what another initial state changes.",
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    step: Step = None,
    streaming: Annotated[
        bool,
        typer.Option(
            "--streaming/--no-streaming", help="Read whole documents with the state carried on, not segments."
        ),
    ] = False,
    trust_remote_code: Trust = False,
    state_control: Control = None,
) -> None:
    """Loss, perplexity and bits per byte on held-out text, and the loss by position.

    Prints the figures with their standard error over documents, and writes samples.jsonl (a line a document: the same
    command goes on where it was stopped), results.json and loss_by_position.png.
    Every token but a document's first is scored, given the tokens before it in its segment or, with --streaming, in
    the whole document.
    With several --num-steps, depth.png takes the place of loss_by_position.png.
    """
    from rich.text import Text

    from riverrun.eval.documents import open_documents
    from riverrun.eval.harness import Timer, write_results
    from riverrun.eval.models import load_model
    from riverrun.eval.report import perplexity_tables, plot_loss_by_position
    from riverrun.eval.tasks import perplexity as task

    timer, steps = Timer(), _numbers(num_steps)
    curve = len(steps) > 1
    if curve and streaming:
        raise ValueError(f"--streaming carries the states of one depth on: leave it out, or give one of {num_steps}")
    one = None if curve or not steps else steps[0]
    loaded = load_model(
        model, device=device, dtype=dtype, step=step, trust_remote_code=trust_remote_code, state_control=state_control,
        num_steps=one,
    )  # fmt: skip
    documents = open_documents(data, loaded, limit)
    if curve:
        folder = out_dir or results_folder(model, "perplexity", "by_depth")
        return _by_depth(loaded, documents, folder, steps, seq_len, batch_size, limit, timer)
    folder = out_dir or results_folder(model, "perplexity", num_steps=one)
    with progress_bar("perplexity") as progress:
        result, record = task.run(
            loaded, documents, folder,
            seq_len=seq_len, batch_size=batch_size, streaming=streaming, progress=progress,
        )  # fmt: skip
    path = write_results(folder, [record], loaded, seed=0, batch_size=batch_size, timer=timer, limit=limit)
    plot_loss_by_position(result.by_position, folder / "loss_by_position.png", loaded.description)

    bits = record.metrics["bits_per_byte"]
    assert bits is not None
    out.print(Text(f"{loaded.description} on {data}"), soft_wrap=True)
    for table in perplexity_tables(result, bits):
        out.print(table)
    out.print(Text(f"{path} and loss_by_position.png beside it"), soft_wrap=True)


def _numbers(text: str | None) -> list[int]:
    try:
        return [] if text is None else [int(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"--num-steps {text!r} must be whole numbers, with commas between several") from None


def _by_depth(
    loaded: "LoadedModel",
    documents: "Documents",
    folder: Path,
    steps: list[int],
    seq_len: int | None,
    batch_size: int,
    limit: int | None,
    timer: "Timer",
) -> None:
    """Perplexity after several numbers of iterations: prints it, and writes results.json and depth.png."""
    from rich.text import Text

    from riverrun.eval.harness import write_results
    from riverrun.eval.tasks import depth_curve as task

    with progress_bar("perplexity") as progress:
        found, record = task.run(
            loaded, documents, folder, steps=steps, seq_len=seq_len, batch_size=batch_size, progress=progress
        )
    path = write_results(folder, [record], loaded, seed=0, batch_size=batch_size, timer=timer, limit=limit)
    task.plot(found, record.details["mean_recurrence"], folder / "depth.png", loaded.description)

    out.print(Text(f"{loaded.description}, {record.details['tokens_scored']:,} tokens scored"), soft_wrap=True)
    out.print(task.table(found))
    out.print(Text(f"{path} and depth.png beside it"), soft_wrap=True)


@app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def lm_eval(context: typer.Context) -> None:
    """lm-evaluation-harness, which knows our models as `--model riverrun --model_args path=RUN_OR_FOLDER`.

    All arguments are its own, for instance `run --model riverrun --model_args path=runs/a --tasks lambada_openai`.
    """
    import sys

    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as missing:
        raise ValueError(f"{missing.name} is not installed: pip install 'riverrun[eval]'") from None
    import riverrun.eval.lm_eval  # noqa: F401 - registers the model

    sys.argv = ["lm-eval", *context.args]
    cli_evaluate()
