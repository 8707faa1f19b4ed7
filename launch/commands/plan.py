"""`riverrun plan`: does a recipe fit on some GPUs, which layout is fastest, and how long it takes. An estimate."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from riverrun.launch import shipped
from riverrun.launch.console import err, out

if TYPE_CHECKING:
    from riverrun.launch.plan import Cluster, Estimate
    from riverrun.train.config import Recipe

PARTS = {
    "weights": "weights",
    "gradients": "gradients, fp32",
    "optimizer": "optimiser: master weights and moments",
    "exchange": "what ZeRO gathers, buckets or copies",
    "activations": "activations saved for the backward pass",
    "working": "the block at work",
    "states": "recurrent states inside its kernels",
    "loss": "logits of a chunk, and the loss",
    "carried": "recurrent states passed from step to step",
}


def plan(
    recipe: Annotated[
        str,
        typer.Argument(help="A recipe's name, or the path of a .toml file.", autocompletion=shipped.complete),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the recipe's; those of a layout are kept."),
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="How many there are.")] = ...,  # type: ignore[assignment]
    gpu: Annotated[Literal["h200", "h100-80g", "a100-80g"], typer.Option(help="Of what kind.")] = "h200",
    node_size: Annotated[int, typer.Option(min=1, help="GPUs of a node, joined by NVLink.")] = 8,
    network_gbps: Annotated[float, typer.Option(min=1, help="Gbit/s out of a node for each of its GPUs.")] = 400,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all layouts that fit there.")] = None,
) -> None:
    """Find the fastest layout that fits: tensor, context and data parallel, ZeRO, micro batch, recompute.

    Nothing is allocated and no GPU is needed: activations are counted on tensors without memory, speed is a roofline.
    The exit code is 2 if nothing fits.
    """
    from riverrun.launch import plan as planning

    loaded = shipped.load(recipe, overrides or [], require_inputs=False)
    fixed = {
        key: value
        for key, value in planning.Layout.of(loaded.recipe, gpus).overrides().items()
        if loaded.origins[key] == "command line"
    }
    cluster = planning.Cluster(planning.GPUS[gpu], gpus, min(node_size, gpus), network_gbps * 1e9 / 8)
    found = planning.search(loaded.recipe, cluster, fixed)
    best = found[0]
    _print_memory(best, cluster, loaded.recipe)
    _print_speed(best, cluster, loaded.recipe)
    _print_others(found[:5], cluster, loaded.recipe)
    out.print(f"\nriverrun train {recipe} {planning.command_line(best.layout)}", soft_wrap=True, highlight=False)
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n", encoding="utf-8")
        err.print(f"wrote {json_file}: {len(found)} layouts", highlight=False)


def _print_memory(best: "Estimate", cluster: "Cluster", recipe: "Recipe") -> None:
    from rich.table import Table

    from riverrun.launch.memory import GIB
    from riverrun.launch.plan import describe, name_of

    memory = best.memory
    shown = f"{recipe.name} on {cluster.gpus} {cluster.gpu.name}: {name_of(best.layout)}, {describe(best.layout)}"
    table = Table("memory of a GPU at its peak")
    table.add_column("GiB", justify="right")
    out.print(shown, highlight=False, markup=False, soft_wrap=True)
    for part, words in PARTS.items():
        if memory.parts[part]:
            table.add_row(words, f"{memory.parts[part] / GIB:.2f}")
    table.add_section()
    table.add_row(f"allocated, in the {memory.moment}", f"{memory.allocated / GIB:.2f}")
    table.add_row("allowance: CUDA, NCCL, fragments", f"{memory.outside / GIB:.2f}")
    table.add_section()
    table.add_row(f"all, of {cluster.gpu.memory:.1f}", f"{memory.total / GIB:.2f}")
    out.print(table)


def _print_speed(best: "Estimate", cluster: "Cluster", recipe: "Recipe") -> None:
    from riverrun.launch.plan import flops
    from riverrun.modeling.depth.counts import RecurrenceDistribution

    T = recipe.data.seq_len
    count = flops(recipe.model, T)
    mixing = ", ".join(f"{name} {value / 1e9:.3g}" for name, value in count.mixing.items())
    out.print(
        f"GFLOPs a token: forward {count.forward / 1e9:.3g} (matrices {count.matrices / 1e9:.3g}; mixing at {T:,} "
        f"tokens: {mixing}), training {count.training / 1e9:.3g}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if (depth := recipe.model.depth) is not None:
        drawn = RecurrenceDistribution(depth)
        n, k = drawn.mean_steps
        out.print(
            f"iterations of the core: {n + k:.3g} in training, {k:.3g} of them with a gradient, {drawn.largest} at "
            f"most; forward above with {depth.mean_recurrence}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    if "attention" in count.mixing:
        longer = (f"{n:,}: {flops(recipe.model, n).forward / 1e9:.3g}" for n in (2 * T, 4 * T, 16 * T))
        out.print(f"forward in longer rows: {', '.join(longer)}", highlight=False, soft_wrap=True)
    total = sum(best.seconds.values())
    shares = {name: value for name, value in best.seconds.items() if value > 0.005 * total}
    parts = ", ".join(f"{name} {value / total:.0%}" for name, value in sorted(shares.items(), key=lambda x: -x[1]))
    steps = recipe.train.steps
    tokens = steps * recipe.train.global_batch_size * T
    days = steps * total / 86_400
    out.print(
        f"estimate: {best.tokens_per_second:,.0f} tokens/s, {best.tokens_per_second / cluster.gpus:,.0f} a GPU, MFU "
        f"{best.mfu:.0%}; a step of {total:.2f} s ({parts})",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    span = f"{days:.1f} days" if days >= 1 else f"{24 * days:.1f} hours"
    out.print(
        f"{steps:,} steps, {tokens / 1e9:.3g}B tokens: {span}, {24 * days * cluster.gpus:,.0f} GPU hours\n",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _print_others(found: "list[Estimate]", cluster: "Cluster", recipe: "Recipe") -> None:
    from rich.table import Table

    from riverrun.launch.memory import GIB
    from riverrun.launch.plan import Layout, describe, estimate, name_of, problems

    table = Table("layout", "", title="the fastest that fit, by estimate", title_justify="left")
    for column in ("tokens/s", "MFU", "GiB"):
        table.add_column(column, justify="right")
    rows = [(name_of(each.layout), describe(each.layout), each) for each in found]
    own = Layout.of(recipe, cluster.gpus)
    if own.gpus == cluster.gpus and not problems(recipe, own, cluster) and own not in [e.layout for e in found]:
        rows.append((f"recipe: {name_of(own)}", describe(own), estimate(recipe, own, cluster)))
    for name, rest, each in rows:
        size = f"{each.memory.total / GIB:.1f}"
        if each.memory.total > cluster.gpu.memory * GIB:
            size += ", too much"
        table.add_row(name, rest, f"{each.tokens_per_second:,.0f}", f"{each.mfu:.0%}", size)
    out.print(table)
