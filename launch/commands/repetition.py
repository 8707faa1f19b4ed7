"""`riverrun eval repetition`: how much a model repeats itself, and what stops it."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from riverrun.launch.commands.eval import BatchSize, Device, Dtype, Model, NumSteps, Step, Trust, progress_bar
from riverrun.launch.console import out
from riverrun.launch.evaluation import results_folder


def repetition(
    model: Model,
    decoding: Annotated[
        str,
        typer.Option(
            help="With commas between them, and options as dry:base=2,range=512: greedy, presence, repetition, "
            "no_repeat_ngram, dry, lz, rpg, contrastive, typical or sample."
        ),
    ] = "greedy,repetition,dry,rpg",
    kind: Annotated[
        Literal["code", "text"], typer.Option("--set", help="code: Python that invites repetition; text: prose.")
    ] = "code",
    data: Annotated[
        Path | None,
        typer.Option(
            help="code: JSON lines with a field `prompt`, as CodeRepetEval's; text: a token store, a text file or a "
            ".jsonl file. Default: prompts or docstrings of Python's standard library."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(help="Prompts.")] = 32,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Of a continuation; default: 256 of code, 100 of text.")
    ] = None,
    recall: Annotated[
        bool, typer.Option("--recall/--no-recall", help="Ask for passkeys under each decoding, too.")
    ] = True,
    recall_samples: Annotated[int, typer.Option(help="Passkeys.")] = 8,
    recall_length: Annotated[int, typer.Option(help="Tokens of a passkey's text, the question and the answer.")] = 512,
    sentences: Annotated[
        int, typer.Option(help="Of each set of the self-reinforcement curves (660 in the paper); 0: no curves.")
    ] = 16,
    copies: Annotated[int, typer.Option(help="Of each of those sentences (100 in the paper).")] = 32,
    seed: Annotated[int, typer.Option(help="The same seed gives the same prompts and draws.")] = 0,
    batch_size: BatchSize = 8,
    out_dir: Annotated[
        Path | None,
        typer.Option(
            "--out", help="The folder for the results, gone on with if begun; default: eval/repetition in the run."
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    step: Step = None,
    trust_remote_code: Trust = False,
    num_steps: NumSteps = None,
) -> None:
    """Repetition of a model's continuations under several decodings, and the recall that each of them leaves.

    Writes samples.jsonl (a line as soon as a sample is finished: the same command goes on where it was stopped, and may
    name more decodings), results.json, repetition.png, and curves.png: how a sentence's probability grows with its
    copies (AP, IP, WR).
    """
    from rich.text import Text

    from riverrun.eval.decoding.registry import parse_decodings
    from riverrun.eval.harness import Timer, write_results
    from riverrun.eval.models import load_model
    from riverrun.eval.repetition import curves, report
    from riverrun.eval.samples import SAMPLES
    from riverrun.eval.tasks import repetition as task

    timer = Timer()
    plan = task.Plan(
        parse_decodings(decoding), kind, data, limit, max_new_tokens, recall_samples if recall else 0, recall_length,
        sentences, copies, seed,
    )  # fmt: skip
    loaded = load_model(
        model, device=device, dtype=dtype, step=step, trust_remote_code=trust_remote_code, num_steps=num_steps
    )
    folder = out_dir or results_folder(model, "repetition", num_steps=num_steps)
    with progress_bar("repetition") as progress:
        findings, results = task.run(loaded, plan, folder, batch_size=batch_size, progress=progress)
    path = write_results(folder, results, loaded, seed=seed, batch_size=batch_size, timer=timer, limit=limit)
    report.plot(findings, folder / "repetition.png", loaded.description)
    if findings.curves:
        curves.plot(findings.curves, folder / "curves.png", loaded.description)

    out.print(Text(f"{loaded.description}, {kind}"), soft_wrap=True)
    for table in report.tables(findings):
        out.print(table)
    out.print(Text(f"{path}, {SAMPLES} and the plots beside it"), soft_wrap=True)
