"""`riverrun eval compare`: models against one another, from their results."""

from pathlib import Path
from typing import Annotated

import typer

from riverrun.launch.console import err, out


def compare(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="A B [C]...", help="Folders with results.json and samples.jsonl. All others are compared with A."
        ),
    ],
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="A setting of the evaluations that may differ, such as train_length; may be repeated."),
    ] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="The folder for compare.json and compare.png.")] = Path(
        "eval/compare"
    ),
) -> None:
    """Differences between models, sample by sample, with intervals of 95%.

    Both must have been evaluated by the same version of a task in the same way. Where tasks keep samples, the
    difference is over those that both have; where not, it is that of independent evaluations, and the table says so.
    What is bold is more than chance would make of one metric alone.
    """
    import json

    from rich.text import Text

    from riverrun.eval import compare as comparison
    from riverrun.train.data.store import write_atomically

    if len(folders) < 2:
        raise ValueError("give two folders with results, or more: riverrun eval compare A B")
    first, *others = (comparison.load(folder) for folder in folders)
    found = [comparison.compare(first, other, ignore or []) for other in others]
    names = [str(folder) for folder in folders]
    out_dir.mkdir(parents=True, exist_ok=True)
    document = comparison.as_json(names, found)
    write_atomically(out_dir / "compare.json", (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())
    comparison.plot(names, found, out_dir / "compare.png")
    tokenizers = [next(iter(one.values())).document.get("tokenizer_fingerprint") for one in (first, *others)]
    for name, tokenizer, differences in zip(names[1:], tokenizers[1:], found):
        out.print(Text(f"A: {names[0]}, B: {name}"), soft_wrap=True)
        out.print(comparison.table(differences))
        if tokenizer != tokenizers[0]:
            err.print(
                "The tokenizers differ: a loss or perplexity a token does not compare; bits per byte do.",
                style="yellow", soft_wrap=True,
            )  # fmt: skip
    out.print(Text(f"{out_dir / 'compare.json'}, and compare.png beside it"), soft_wrap=True)
