"""`riverrun eval cola`: which of a model's layers its answers need."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from riverrun.launch.commands.eval import Device, Dtype, Model, NumSteps, Step, Trust, progress_bar
from riverrun.launch.console import out
from riverrun.launch.evaluation import results_folder


def cola(
    model: Model,
    data: Annotated[
        Path | None,
        typer.Option(
            help='Questions as JSON lines: question, choices ({"text": [...], "label": [...]} or a list of texts), '
            "answerKey, and a kind, if there are several."
        ),
    ] = None,
    generate: Annotated[
        int | None, typer.Option(metavar="N", help="Instead: N generated questions about small numbers.")
    ] = None,
    simulations: Annotated[int, typer.Option(help="Chains that each search evaluates.")] = 200,
    reward: Annotated[
        Literal["likelihood", "generate"],
        typer.Option(
            help="What counts as right: the likeliest choice per character, or a greedy answer that is the right "
            "choice's text or label (dearer by far)."
        ),
    ] = "likelihood",
    max_questions: Annotated[int | None, typer.Option(help="The first ones only; default: all.")] = None,
    k: Annotated[
        int, typer.Option("--k", help="Layers (or iterations) of a block that is left out or repeated, at most.")
    ] = 4,
    r: Annotated[int, typer.Option("--r", help="Times that a block runs again, at most.")] = 4,
    exploration: Annotated[
        float, typer.Option(help="c in the search's bound: low values follow rewards. The paper does not say it.")
    ] = 2**0.5,
    length_penalty: Annotated[float, typer.Option(help="Lambda in the search's bound; the paper's is 5.")] = 5.0,
    leaves: Annotated[
        int, typer.Option(help="Chains of a question that run together (virtual loss). 1: as the paper, but slower.")
    ] = 8,
    new_tokens: Annotated[int, typer.Option(help="Of a generated answer, at most.")] = 16,
    seed: Annotated[int, typer.Option(help="The same seed gives the same questions and searches.")] = 0,
    out_dir: Annotated[
        Path | None,
        typer.Option("--out", help="The folder for the results, gone on with if begun; default: eval/cola in the run."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    step: Step = None,
    trust_remote_code: Trust = False,
    num_steps: NumSteps = None,
) -> None:
    """Chain of layers (CoLa): a shorter chain of the model's layers that answers right, or one that mends an answer.

    Layers may be skipped and repeated; of a model of recurrent depth, those around the core and the core's iterations,
    --num-steps of which are the model as it is. Each question's search sees its answer, so two controls stand beside
    it: random chains, as many; and chains chosen on one half of a kind of questions, tested on the other.

    Writes samples.jsonl (a line as soon as a search is finished: the same command goes on where it was stopped),
    results.json, cola.png and layers.png; of a model of recurrent depth iterations.png, too: how many the chains have,
    and what more or fewer of them change with no search.
    """
    from rich.text import Text

    from riverrun.eval.depth_search import iterations, report, task
    from riverrun.eval.depth_search.questions import fingerprint, make_question, read_questions
    from riverrun.eval.harness import Timer, write_results
    from riverrun.eval.models import load_model
    from riverrun.eval.samples import SAMPLES

    timer = Timer()
    plan = task.Plan(simulations, reward, k, r, leaves, exploration, length_penalty, new_tokens, seed)
    if (data is None) == (generate is None):
        raise ValueError("give the questions: either --data FILE.jsonl, or --generate N for generated ones")
    if data is not None:
        questions = read_questions(data)
        source = fingerprint(questions)
    else:
        if generate < 1:  # type: ignore[operator]
            raise ValueError(f"--generate {generate} leaves nothing to ask: give at least 1")
        questions = [make_question(seed, number) for number in range(generate)]  # type: ignore[arg-type]
        source = "generated"  # the same ones for a seed, however many
    loaded = load_model(
        model, device=device, dtype=dtype, step=step, trust_remote_code=trust_remote_code, num_steps=num_steps
    )
    folder = out_dir or results_folder(model, "cola", num_steps=num_steps)
    with progress_bar("cola") as progress:
        records, config, space = task.run(
            loaded, plan, questions, source, folder, limit=max_questions, progress=progress
        )
    of = report.outcomes(records, space)
    results = report.summarize(records, config, space, len(questions))
    path = write_results(folder, results, loaded, seed=seed, batch_size=1, timer=timer, limit=max_questions)
    report.plot_shares(records, space, folder / "cola.png", loaded.description)
    report.plot_layers(records, space, folder / "layers.png", loaded.description)
    plots = "cola.png and layers.png"
    if space.core is not None:
        chains, plots = report.searched_chains(of), "cola.png, layers.png and iterations.png"
        iterations.plot(records.iterated, chains, space, folder / "iterations.png", loaded.description)

    out.print(Text(f"{loaded.description}, {results[0].documents} questions"), soft_wrap=True)
    for table in report.tables(records, space):
        out.print(table)
    if left_out := len(of["search"]) - len(of[task.HELD_OUT]):
        out.print(Text(f"held out: {left_out} questions are the only ones of their kind, and left out"), soft_wrap=True)
    out.print(Text(f"{path}, {SAMPLES}, {plots} beside it"), soft_wrap=True)
