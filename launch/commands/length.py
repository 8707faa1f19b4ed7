"""`riverrun eval length` and `riverrun eval needle`: how far a model's context carries."""

from pathlib import Path
from typing import Annotated

import typer

from riverrun.launch.commands.eval import BatchSize, Control, Device, Dtype, Model, NumSteps, Step, Trust, progress_bar
from riverrun.launch.console import out
from riverrun.launch.evaluation import results_folder


def length(
    model: Model,
    data: Annotated[Path, typer.Option(help="A token store's folder, a text file, or a .jsonl file.")],
    max_length: Annotated[
        int | None, typer.Option(help="Positions to evaluate; default: as far as the documents, or the model, go.")
    ] = None,
    train_length: Annotated[
        int | None,
        typer.Option(help="Tokens of context in training, for the verdict; default: as the run's config says."),
    ] = None,
    concatenate: Annotated[
        bool, typer.Option("--concatenate", help="Join the documents and cut them into sequences of --max-length.")
    ] = False,
    chunk_len: Annotated[int, typer.Option(help="Tokens read at once, with the state carried on.")] = 4096,
    limit: Annotated[int | None, typer.Option(help="Read the first N documents only.")] = None,
    states: Annotated[
        int, typer.Option(help="Documents whose states are followed, Riverrun's models only; 0: none.")
    ] = 4,
    batch_size: BatchSize = 8,
    out_dir: Annotated[
        Path | None,
        typer.Option(
            "--out", help="The folder for the results, gone on with if begun; default: eval/length in the run."
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    step: Step = None,
    trust_remote_code: Trust = False,
    state_control: Control = None,
    num_steps: NumSteps = None,
) -> None:
    """Loss by position, far beyond the training length, and whether the model collapses, forgets or extrapolates there.

    Writes samples.jsonl (a line a document: the same command goes on where it was stopped), results.json and
    length.png; and states.png, the norms of the recurrent states by layer and head and how much
    of the first token they retain. Give documents longer than twice the training length, or --concatenate.
    """
    from itertools import islice

    from rich.text import Text

    from riverrun.eval.documents import open_documents
    from riverrun.eval.harness import Timer, write_results
    from riverrun.eval.models import load_model
    from riverrun.eval.tasks import length as task
    from riverrun.eval.tasks import state_statistics
    from riverrun.modeling.model import RiverrunForCausalLM

    timer = Timer()
    loaded = load_model(
        model, device=device, dtype=dtype, step=step, trust_remote_code=trust_remote_code, state_control=state_control,
        num_steps=num_steps,
    )  # fmt: skip
    if states > 0 and isinstance(loaded.model, RiverrunForCausalLM):
        state_statistics.check(loaded.model)
    documents = open_documents(data, loaded, limit)
    folder = out_dir or results_folder(model, "length", num_steps=num_steps)
    with progress_bar("length") as progress:
        result, record = task.run(
            loaded, documents, folder, max_length=max_length, train_length=train_length, chunk_len=chunk_len,
            batch_size=batch_size, concatenate=concatenate, progress=progress,
        )  # fmt: skip
    records = [record]
    train_length = record.config["train_length"]
    if states > 0 and isinstance(loaded.model, RiverrunForCausalLM):
        chosen = islice(task.sequences(documents.tokens, max_length, concatenate), states)
        statistics = state_statistics.measure(
            loaded.model, chosen, train_length=train_length, chunk_len=chunk_len
        )  # fmt: skip
        config = {
            name: record.config[name] for name in ("max_length", "train_length", "concatenate", "data_fingerprint")
        }
        records.append(state_statistics.summarize(statistics, documents.available, config))
    path = write_results(folder, records, loaded, seed=0, batch_size=batch_size, timer=timer, limit=limit)
    if len(records) > 1:
        state_statistics.plot(statistics, folder / "states.png", loaded.description)
    task.plot(result, train_length, folder / "length.png", loaded.description)

    out.print(Text(f"{loaded.description} on {data}: {result.verdict.verdict}"), soft_wrap=True)
    out.print(Text(result.verdict.reason), soft_wrap=True)
    out.print(task.table(result))
    if len(records) > 1:
        out.print(state_statistics.table(statistics))
    out.print(Text(f"{path} and the plots beside it"), soft_wrap=True)


def needle(
    model: Model,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help="passkey, niah_single_1 to _3, niah_multikey_1 to _3, babilong_qa1 or _qa2; may be repeated. "
            "Default: passkey and niah_single_1."
        ),
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(help="Tokens of prompt and answer; may be repeated. Default: 1024, 2048, 4096.")
    ] = None,
    depth: Annotated[
        list[float] | None,
        typer.Option(help="Share of the text before the needle; may be repeated. Default: 0, 0.25, 0.5, 0.75, 1."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Of each kind, length and depth.")] = 20,
    haystack: Annotated[
        Path | None, typer.Option(help="A text file to hide the needles in; default: RULER's noise sentences.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Evaluate at most N samples of each kind, of every length and depth alike.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same samples.")] = 42,
    batch_size: BatchSize = 8,
    out_dir: Annotated[
        Path | None,
        typer.Option(
            "--out", help="The folder for the results, gone on with if begun; default: eval/needle in the run."
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    step: Step = None,
    trust_remote_code: Trust = False,
    state_control: Control = None,
    num_steps: NumSteps = None,
) -> None:
    """Recall of facts hidden in long texts, by length and depth: passkeys, RULER's needles, BABILong's facts.

    Writes samples.jsonl (a line as soon as a sample is finished: the same command goes on where it was stopped),
    results.json, and needle.png, a heat map of the accuracy.
    """
    from rich.text import Text

    from riverrun.eval.harness import Timer, write_results
    from riverrun.eval.models import load_model
    from riverrun.eval.samples import SAMPLES
    from riverrun.eval.tasks import needle as task

    timer = Timer()
    chosen = {"kinds": kind, "lengths": length, "depths": depth}
    plan = task.Plan(
        **{name: tuple(values) for name, values in chosen.items() if values},  # type: ignore[arg-type]
        samples=samples, seed=seed, haystack=haystack,
    )  # fmt: skip
    loaded = load_model(
        model, device=device, dtype=dtype, step=step, trust_remote_code=trust_remote_code, state_control=state_control,
        num_steps=num_steps,
    )  # fmt: skip
    folder = out_dir or results_folder(model, "needle", num_steps=num_steps)
    with progress_bar("needle") as progress:
        records, results = task.run(loaded, plan, folder, batch_size=batch_size, limit=limit, progress=progress)
    path = write_results(folder, results, loaded, seed=seed, batch_size=batch_size, timer=timer, limit=limit)
    task.plot(records, folder / "needle.png", loaded.description)

    out.print(Text(loaded.description), soft_wrap=True)
    out.print(task.table(records))
    out.print(Text(f"{path}, {SAMPLES} and needle.png beside it"), soft_wrap=True)
