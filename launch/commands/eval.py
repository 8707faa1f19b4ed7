"""`riverrun eval`: how good a model is. Sub-commands are the tasks."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from riverrun.launch.console import err, out

app = typer.Typer(
    name="eval",
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


@app.callback()
def eval_() -> None:
    """Evaluate a run, an exported model or any Hugging Face causal language model."""


@app.command()
def perplexity(
    model: Model,
    data: Annotated[Path, typer.Option(help="A token store's folder, a text file, or a .jsonl file.")],
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens a segment, or a chunk when streaming; default: as in training.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Evaluate the first N documents only.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows at a time.")] = 8,
    out_dir: Annotated[
        Path | None,
        typer.Option("--out", help="The folder for results.json and the plot; default: eval/perplexity in the run."),
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
) -> None:
    """Loss, perplexity and bits per byte on held-out text, and the loss by position.

    Prints the figures with their standard error over documents, and writes results.json and loss_by_position.png.
    Every token but a document's first is scored, given the tokens before it in its segment or, with --streaming, in
    the whole document.
    """
    from dataclasses import replace

    from rich.progress import track
    from rich.text import Text

    from riverrun.eval.documents import open_documents
    from riverrun.eval.harness import Timer, write_results
    from riverrun.eval.models import load_model
    from riverrun.eval.report import perplexity_tables, plot_loss_by_position
    from riverrun.eval.tasks import perplexity as task

    timer = Timer()
    loaded = load_model(model, device=device, dtype=dtype, step=step, trust_remote_code=trust_remote_code)
    documents = open_documents(data, loaded, limit)
    shown = track(
        documents.tokens,
        "perplexity",
        documents.num_documents,
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    result, record = task.run(
        loaded, replace(documents, tokens=shown), seq_len=seq_len, batch_size=batch_size, streaming=streaming
    )
    folder = out_dir or Path(model if (Path(model) / "checkpoints").is_dir() else ".", "eval", "perplexity")
    path = write_results(folder, [record], loaded, seed=0, batch_size=batch_size, timer=timer)
    plot_loss_by_position(result.by_position, folder / "loss_by_position.png", loaded.description)

    bits = record.metrics["bits_per_byte"]
    assert bits is not None
    out.print(Text(f"{loaded.description} on {data}"), soft_wrap=True)
    for table in perplexity_tables(result, bits):
        out.print(table)
    out.print(Text(f"{path} and loss_by_position.png beside it"), soft_wrap=True)


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
