"""`riverrun eval jrt`: what reading a document twice is worth."""

from pathlib import Path
from typing import Annotated

import typer

from riverrun.launch.commands.eval import BatchSize, Device, Dtype, Model, NumSteps, Step, Trust, progress_bar
from riverrun.launch.console import out
from riverrun.launch.evaluation import results_folder


def jrt(
    model: Model,
    form: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="reports (generated), fda, swde, squad, nq, triviaqa or drop; may be repeated. "
            "Default: those of --data, or reports.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FORMAT=FILE",
            help="A set as JSON lines, or its name on Hugging Face's hub; may be repeated. Fields: text, key, value "
            "(fda, swde); text, context, question, value (squad); context, question, orig_question, answers (others). "
            "Default: the authors' sets on the hub.",
        ),
    ] = None,
    context_length: Annotated[int, typer.Option(help="Tokens of a document and of the answer.")] = 1000,
    answer_length: Annotated[int, typer.Option(help="Of those, the tokens kept free for the answer.")] = 50,
    prefix: Annotated[
        int,
        typer.Option(
            help="Tokens of a prompt that are read without causality, by models with prefix linear attention: as in "
            "training, 1024 in the paper. Default: none."
        ),
    ] = 0,
    limit: Annotated[int | None, typer.Option(help="Items of each format; default: all, and 200 reports.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same reports.")] = 42,
    batch_size: BatchSize = 8,
    out_dir: Annotated[
        Path | None,
        typer.Option("--out", help="The folder for the results, gone on with if begun; default: eval/jrt in the run."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    step: Step = None,
    trust_remote_code: Trust = False,
    num_steps: NumSteps = None,
) -> None:
    """Recall from documents that are read once, and twice (Just Read Twice), and the gain with its interval.

    Writes samples.jsonl (a line as soon as a sample is finished: the same command goes on where it was stopped),
    results.json, and jrt.png.
    """
    from rich.text import Text

    from riverrun.eval.harness import Timer, write_results
    from riverrun.eval.models import load_model
    from riverrun.eval.samples import SAMPLES
    from riverrun.eval.tasks import jrt as task

    timer, given = Timer(), _by_format(data or [])
    plan = task.Plan(
        tuple(form or given or [task.REPORTS]), given, context_length=context_length, answer_length=answer_length,
        seed=seed, prefix=prefix,
    )  # fmt: skip
    loaded = load_model(
        model, device=device, dtype=dtype, step=step, trust_remote_code=trust_remote_code, num_steps=num_steps
    )
    folder = out_dir or results_folder(model, "jrt", num_steps=num_steps)
    with progress_bar("jrt") as progress:
        records, results = task.run(loaded, plan, folder, batch_size=batch_size, limit=limit, progress=progress)
    path = write_results(folder, results, loaded, seed=seed, batch_size=batch_size, timer=timer, limit=limit)
    task.plot(records, folder / "jrt.png", loaded.description)

    out.print(Text(loaded.description), soft_wrap=True)
    for table in task.tables(records):
        out.print(table)
    for result in results:
        if dropped := result.details["dropped"]:
            out.print(Text(f"{result.task}: {dropped} items were dropped, as eval/jrt_formats.py says"), soft_wrap=True)
    out.print(Text(f"{path}, {SAMPLES} and jrt.png beside it"), soft_wrap=True)


def _by_format(data: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in data:
        name, equals, source = (part.strip() for part in text.partition("="))
        if not (name and equals and source):
            raise ValueError(f"--data {text!r} must look like fda=items.jsonl: the format, and its set")
        if name in found:
            raise ValueError(f"--data gives {name} twice: {found[name]} and {source}")
        found[name] = source
    return found
