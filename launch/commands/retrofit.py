"""`riverrun retrofit`: a trained model of fixed depth becomes one of recurrent depth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from riverrun.launch.console import out as console

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from riverrun.modeling.config import RiverrunConfig
    from riverrun.modeling.options import ModelOptions

DOCUMENTS, LENGTH = 32, 512  # of the text on which the first state is calibrated


def retrofit(
    model: Annotated[
        Path, typer.Argument(help="A run, a checkpoint or an exported model's folder, of a model of fixed depth.")
    ],
    core: Annotated[str, typer.Option(help="The layers that are to run several times, counted from 0: 10-17, or 10.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; it must not exist.")],
    prelude: Annotated[str, typer.Option(help="The layers that run once before them; left out: none.")] = "",
    coda: Annotated[str, typer.Option(help="The layers that run once after them; left out: none.")] = "",
    mean_recurrence: Annotated[int, typer.Option(help="How often the core runs, on average.")] = 8,
    backprop_depth: Annotated[int, typer.Option(help="Iterations that get a gradient in training, at most.")] = 4,
    data: Annotated[
        Path | None,
        typer.Option(help="A token store; the first state is then as large as what the prelude makes of its text."),
    ] = None,
) -> None:
    """Turn some layers of a trained model into a recurrent core, for further training.

    Layers that are named in no part are dropped. The adapter before the core starts as [0 | I]: it ignores the state,
    so that the new model computes what the kept layers do one after the other, and from all layers just what the old
    model did. Training teaches it to use more iterations.
    """
    from rich.text import Text

    from riverrun.modeling.config import RiverrunConfig
    from riverrun.modeling.depth.options import DepthOptions
    from riverrun.modeling.depth.retrofit import Parts
    from riverrun.modeling.depth.retrofit import retrofit as operate
    from riverrun.modeling.hf.export import export_model
    from riverrun.modeling.hf.folder import refuse_existing
    from riverrun.train import initial

    parts = Parts.parse(prelude, core, coda)
    refuse_existing(out)
    old, weights = initial.contents(initial.locate(str(model), "MODEL"))
    old = old.resolve()
    depth = DepthOptions(mean_recurrence=mean_recurrence, backprop_depth=backprop_depth)
    config, weights = operate(RiverrunConfig.from_options(old), weights, parts, depth)
    if data is not None:
        config = _calibrated(config, weights, data, str(model))
    export_model(config, weights, out, tokenizer_dir=initial.tokenizer_folder(str(model)), target="riverrun")
    _report(config.options, parts.dropped(old.num_hidden_layers), out)
    console.print(Text(_recipe(config.options, old, out)), soft_wrap=True)


def _calibrated(config: RiverrunConfig, weights: Mapping[str, torch.Tensor], data: Path, model: str) -> RiverrunConfig:
    """The config whose `state_std` is the size of e on a store's text."""
    from dataclasses import replace

    from riverrun.modeling.config import RiverrunConfig
    from riverrun.modeling.depth.retrofit import prelude_rms
    from riverrun.modeling.hf.importer import build_model
    from riverrun.train import initial
    from riverrun.train.data.store import TokenStore

    store, options = TokenStore.open(data), config.options
    tokenizer = initial.tokenizer_of(model)
    if store.vocab_size > options.vocab_size or (tokenizer and tokenizer.fingerprint != store.tokenizer_fingerprint):
        raise ValueError(
            f"--data {data} was prepared with another tokenizer than the model's: prepare it with that one"
        )
    assert options.depth is not None
    std = float(f"{prelude_rms(build_model(config, weights), _documents(store)):.4g}")  # to be copied into recipes
    return RiverrunConfig.from_options(replace(options, depth=replace(options.depth, state_std=std)))


def _documents(store) -> Iterator[torch.Tensor]:
    """The beginnings of documents from all over a store."""
    import torch

    number = min(DOCUMENTS, store.num_documents)
    for i in range(number):
        tokens = store.document(i * store.num_documents // number)
        yield torch.from_numpy(tokens[:LENGTH].astype("int64"))


def _report(options: ModelOptions, dropped: list[int], out: Path) -> None:
    from rich.text import Text

    depth = options.depth
    assert depth is not None
    core = depth.core_layers(options.num_hidden_layers)
    lines = [
        f"{out}: {depth.prelude_layers} layers of prelude, {core} of core, {depth.coda_layers} of coda; "
        f"{depth.effective_layers(options.num_hidden_layers)} are run with {depth.mean_recurrence} iterations",
        f"dropped layers: {', '.join(map(str, dropped)) or 'none'}",
        f"the first state's standard deviation is {depth.initial_std:.4g}"
        + ("" if depth.state_std is not None else ", Huginn's; --data STORE calibrates it"),
    ]
    console.print(Text("\n".join(lines)), soft_wrap=True)


def _recipe(options: ModelOptions, old: ModelOptions, out: Path) -> str:
    """What a recipe of the old model has to say to train the new one on."""
    from riverrun.modeling.depth.options import DepthOptions
    from riverrun.train.toml_text import toml_tables

    values = {"train.init_from": str(out), "model.num_hidden_layers": options.num_hidden_layers}
    if options.layer_pattern != old.layer_pattern:
        values["model.layer_pattern"] = list(options.layer_pattern)
    for name, default in vars(DepthOptions()).items():
        if (value := getattr(options.depth, name)) != default:
            values[f"model.depth.{name}"] = value
    return f"To train it on, set in the old model's recipe:\n\n{toml_tables(values)}"
