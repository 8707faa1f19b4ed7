"""`riverrun bench-samplers`: samplers of recurrent depth beside each other."""

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from riverrun.launch.commands.eval import Device, Dtype, Step
from riverrun.launch.console import err, out

if TYPE_CHECKING:
    from riverrun.eval.decoding.recurrent_depth.benchmark import Measured
    from riverrun.eval.models import LoadedModel

DEFAULT = ["ar", "ar:slots=1", "adaptive", "speculative", "diffusion"]


def bench_samplers(
    model: Annotated[
        str, typer.Argument(help="A run folder, or a model folder in Hugging Face's layout, of recurrent depth.")
    ],
    data: Annotated[
        Path | None, typer.Option(help="Prompts: the first tokens of a store's documents that are long enough.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Or: the texts of a .jsonl or Parquet file, or of a text file, each a prompt.")
    ] = None,
    sampler: Annotated[
        list[str] | None,
        typer.Option(
            help="One to measure, with its options, as diffusion:inner_steps=2; may be given several times. Times are "
            f"compared with the first one's. Default: {', '.join(DEFAULT)}."
        ),
    ] = None,
    num_steps: Annotated[int | None, typer.Option(help="Iterations r; default: the mean in training.")] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="At most.")] = 8,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of each prompt from --data.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=2, help="Of each text; none ends earlier.")] = 128,
    temperature: Annotated[float | None, typer.Option(help="Draw tokens; default: the likeliest one.")] = None,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that make up this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="The folder for table and plot; default: bench/samplers.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    step: Step = None,
) -> None:
    """Time samplers of recurrent depth on the same prompts, one text at a time.

    Measures tokens a second, iterations a token, how far texts agree with greedy decoding at full depth, and their loss
    under the model at full depth. Writes samplers.md, samplers.json and samplers.png.
    """
    import sys

    from riverrun.eval.decoding.generate import Sampling
    from riverrun.eval.decoding.recurrent_depth.benchmark import measure
    from riverrun.eval.decoding.recurrent_depth.registry import parse_sampler
    from riverrun.eval.decoding.recurrent_depth.sampler import require_depth
    from riverrun.eval.models import load_model

    names = sampler or DEFAULT
    chosen = {name.strip(): parse_sampler(name) for name in names}
    if len(chosen) < len(names):
        raise ValueError(f"--sampler {', '.join(names)}: each is to be given once")
    if temperature is None and top_p < 1:
        raise ValueError(f"--top-p {top_p} cuts what tokens are drawn from, and none is drawn: add --temperature")
    sampling = Sampling(greedy=True) if temperature is None else Sampling(temperature, None, top_p)
    loaded = load_model(model, device=device, dtype=dtype, step=step)
    steps = sum(require_depth(loaded.model).model.depth.steps(num_steps, training=False))
    texts = _prompts(loaded, data, prompts, num_prompts, prompt_tokens)
    folder = out_dir or Path("bench", "samplers")
    about = {
        "command": " ".join(["riverrun", *sys.argv[1:]]),
        "model": loaded.description,
        "model_fingerprint": loaded.fingerprint,
        "num_steps": steps,
        "prompts": len(texts),
        "prompt_tokens": [*map(len, texts)],
        "new_tokens": new_tokens,
        "sampling": "greedy" if sampling.greedy else f"temperature {temperature}, top-p {top_p}",
        "seed": seed,
        "environment": _environment(loaded),
    }
    found: list[Measured] = []
    table = ""
    with err.status("decoding"):
        for row in measure(loaded, chosen, texts, sampling, new_tokens=new_tokens, num_steps=steps, seed=seed):
            found.append(row)
            table = _write(found, about, folder)  # what there is stays if the run is cut off
            err.print(f"{row.sampler}: {row.speed:,.1f} tokens/s", style="dim", highlight=False)
    out.print(table, soft_wrap=True, markup=False, highlight=False)
    out.print(f"{folder / 'samplers.md'}, samplers.json and samplers.png beside it", soft_wrap=True, highlight=False)


def _prompts(
    loaded: "LoadedModel", data: Path | None, prompts: Path | None, number: int, length: int
) -> list[list[int]]:
    if (data is None) == (prompts is None):
        raise ValueError("give the prompts: either --data STORE, or --prompts FILE")
    if data is not None:
        return _beginnings(loaded, data, number, length)
    from riverrun.eval.documents import open_documents

    assert prompts is not None
    if prompts.is_dir():
        raise ValueError(f"--prompts {prompts} is a folder: give a file, or a token store as --data")
    return [[int(token) for token in tokens[:-1]] for tokens in open_documents(prompts, loaded, number).tokens]


def _beginnings(loaded: "LoadedModel", folder: Path, number: int, length: int) -> list[list[int]]:
    """The first `length` tokens of the first documents that have more."""
    from riverrun.eval.documents import check_tokenizer
    from riverrun.train.data.store import TokenStore

    if not folder.is_dir():
        raise ValueError(f"--data {folder} is no token store: give a store's folder, or a file as --prompts")
    store = TokenStore.open(folder)
    check_tokenizer(store, loaded)
    found: list[list[int]] = []
    for document in map(store.document, range(store.num_documents)):
        if len(document) > length:
            found.append([int(token) for token in document[:length]])
            if len(found) == number:
                break
    if not found:
        raise ValueError(f"{folder} has no document of more than {length} tokens: lower --prompt-tokens")
    return found


def _environment(loaded: "LoadedModel") -> dict[str, Any]:
    import torch
    import transformers

    from riverrun import __version__

    cuda = loaded.device.type == "cuda"
    return {
        "riverrun": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda if cuda else None,
        "device": torch.cuda.get_device_name(loaded.device) if cuda else f"CPU, {platform.machine()}",
        "threads": None if cuda else torch.get_num_threads(),
        "dtype": str(loaded.dtype).removeprefix("torch."),
    }


COLUMNS = (
    "sampler", "tokens/s", "×", "calls/token", "iterations/token", "computed/token", "agreement", "exact", "loss",
)  # fmt: skip
NOTES = """\
- tokens/s: new ones, the median over prompts, one text at a time; ×: the multiple of the first row's
- calls: iterations of the core one after the other, on however many tokens; iterations: those that a token had when it
  was done with; computed: all that were computed, also for tokens that were dropped
- agreement: the share of a text before its first difference from greedy decoding at full depth; exact: of texts that
  have none
- loss: nats a token of the texts, under the model at full depth
"""


def _write(found: "list[Measured]", about: dict[str, Any], folder: Path) -> str:
    """Table, figures and plot; returns the table."""
    from riverrun.launch.bench_report import Grid

    how = about["environment"]
    title = (
        f"{about['model']}: r={about['num_steps']}, {about['prompts']} prompts, {about['new_tokens']} new tokens, "
        f"{about['sampling']}; {how['device']}, {how['dtype']}, torch {how['torch']}"
    )
    cells: list[tuple[str, ...]] = [
        (
            row.sampler, f"{row.speed:,.1f}", f"{row.speed / found[0].speed:.2f}", f"{row.calls:.2f}",
            f"{row.mean_iterations:.2f}", f"{row.iterations:.2f}", f"{row.agreement:.1%}", f"{row.exact:.1%}",
            f"{row.loss:.4f}",
        )
        for row in found
    ]  # fmt: skip
    table = Grid(title, COLUMNS, cells).markdown()
    folder.mkdir(parents=True, exist_ok=True)
    environment = ", ".join(f"{name} {value}" for name, value in how.items() if value is not None)
    parts = [f"```\n{about['command']}\n```", environment, table, "![samplers](samplers.png)", NOTES]
    (folder / "samplers.md").write_text("\n\n".join(parts), encoding="utf-8")
    rows = [asdict(row) | {"tokens_per_second": row.speed, "mean_iterations": row.mean_iterations} for row in found]
    record = about | {"samplers": rows}
    (folder / "samplers.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _plot(found, title, folder / "samplers.png")
    return table


def _plot(found: "list[Measured]", title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.6 + 0.45 * len(found)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    names = [row.sampler for row in found]
    for axes, label, values in (
        (panels[0], "tokens/s", [row.speed for row in found]),
        (panels[1], "agreement with greedy decoding", [row.agreement for row in found]),
        (panels[2], "loss of the texts at full depth", [row.loss for row in found]),
    ):
        bars = axes.barh(names, values)
        axes.bar_label(bars, fmt="{:.3g}", padding=2, fontsize=8)
        axes.set_xlabel(label)
        axes.margins(x=0.15)
    panels[0].invert_yaxis()
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=120)
