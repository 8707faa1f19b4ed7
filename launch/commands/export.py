"""`riverrun export` and `riverrun import`: to and from Hugging Face folders."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from riverrun.launch.console import out as console


def export(
    run_dir: Annotated[Path, typer.Argument(help="The folder of a training run.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    step: Annotated[int | None, typer.Option(help="The checkpoint to export; default: the newest intact one.")] = None,
    dtype: Annotated[Literal["bf16", "fp32"], typer.Option(help="Of the weights; decays stay in fp32.")] = "fp32",
    target: Annotated[
        Literal["auto", "riverrun", "mamba2", "olmo_hybrid", "huginn"],
        typer.Option(help="The class to write for; auto: one of transformers' own if it computes the same."),
    ] = "auto",
) -> None:
    """Write a run's model as a Hugging Face folder: weights, config, tokenizer.

    Pure Mamba-2 becomes transformers' Mamba2ForCausalLM, a gated_delta and attention hybrid of the right shape its
    OlmoHybridForCausalLM. Any other model brings its code along and loads with trust_remote_code=True; that needs
    only torch and transformers. A recurrent-depth model of Huginn's kind is written in Huginn's names and fields by
    --target huginn; its code does not come along.
    """
    import torch

    from riverrun.eval.models import trained_length
    from riverrun.modeling.hf.export import export_model, resolve_target
    from riverrun.modeling.hf.folder import refuse_existing
    from riverrun.modeling.hf.importer import read_config
    from riverrun.train.checkpoint import load_weights

    if not run_dir.is_dir():
        raise ValueError(f"there is no run folder {run_dir}: give the --run-dir of a training run")
    config = read_config(run_dir)
    resolve_target(config, target)  # complain before the weights are read
    refuse_existing(out)
    if target == "huginn" and (length := trained_length(run_dir)) is not None:
        config.huginn = {"block_size": length}
    tokenizer = run_dir / "tokenizer"
    architecture = export_model(
        config,
        load_weights(run_dir, step),
        out,
        dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype],
        tokenizer_dir=tokenizer if tokenizer.is_dir() else None,
        target=target,
    )
    _report(out, architecture)


def import_(
    hf_dir: Annotated[
        Path,
        typer.Argument(
            help="A folder of Mamba2ForCausalLM, OlmoHybridForCausalLM, RavenForCausalLM (Huginn) or a Riverrun export."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
) -> None:
    """Turn a Hugging Face model into a Riverrun folder, for `riverrun eval`, `riverrun generate` and further training.

    Reads JSON and safetensors only; no code from the folder is run.
    """
    from riverrun.modeling.hf.export import export_model
    from riverrun.modeling.hf.folder import refuse_existing
    from riverrun.modeling.hf.importer import import_model
    from riverrun.modeling.hf.tokenizer import tokenizer_files

    refuse_existing(out)
    config, weights = import_model(hf_dir)
    tokenizer = hf_dir if tokenizer_files(hf_dir) else None
    _report(out, export_model(config, weights, out, tokenizer_dir=tokenizer, target="riverrun"))


def _report(folder: Path, architecture: str) -> None:
    from rich.text import Text

    from riverrun.launch.commands.recipes import in_short
    from riverrun.modeling.hf import huginn
    from riverrun.modeling.hf.folder import SafetensorsFolder
    from riverrun.modeling.hf.remote_code import MODEL_CLASS
    from riverrun.modeling.hf.tokenizer import tokenizer_files

    tensors = SafetensorsFolder(folder)
    parameters = sum(tensors.shape(name).numel() for name in tensors)
    size = sum(path.stat().st_size for path in folder.iterdir())
    trust = ", trust_remote_code=True" if architecture in (MODEL_CLASS, huginn.ARCHITECTURE) else ""
    console.print(
        Text(f"{folder}: {architecture}, {in_short(parameters)} parameters, {size / 1e6:,.1f} MB"), soft_wrap=True
    )
    if architecture == huginn.ARCHITECTURE:
        files = " and ".join(sorted(f"{name.split('.')[0]}.py" for name in huginn.AUTO_MAP.values()))
        console.print(
            f"Before transformers can load it, copy {files} from tomg-group-umd/huginn-0125 on the Hugging Face hub "
            "into it: they run with transformers 4.51, not with 5. Riverrun reads it as it is.",
            soft_wrap=True, highlight=False,
        )  # fmt: skip
    if not tokenizer_files(folder):
        console.print("It has no tokenizer: there was none to take along.")
    console.print("Load it in Python, or evaluate it:")
    console.print(
        Text(
            f'  transformers.AutoModelForCausalLM.from_pretrained("{folder}"{trust})\n'
            f"  riverrun eval perplexity --model {folder} --data STORE"
        ),
        soft_wrap=True,
    )
