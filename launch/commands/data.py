"""`riverrun data`: train a tokenizer, turn a corpus into token stores, look into a store."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from riverrun.launch.console import err, out, printable

if TYPE_CHECKING:
    from riverrun.train.data.sources import Source
    from riverrun.train.data.store import TokenStore
    from riverrun.train.data.tokenizer import Tokenizer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn text into what `riverrun train` reads.",
)

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT...", help="Files, folders (searched at every depth), patterns in quotes, or one name on the hub."
    ),
]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="auto|text|jsonl|parquet|hub",
        help="What INPUT is. auto: by the files' names; text: each file is a document; hub: a data set on the Hugging "
        "Face hub, or a folder in its layout.",
    ),
]
Field = Annotated[str, typer.Option("--field", help="JSON lines, Parquet, hub: the field that holds the text.")]
Glob = Annotated[str, typer.Option("--glob", help="Which names count in folders, such as '*.py'.")]
Subset = Annotated[str | None, typer.Option("--subset", help="hub: the data set's configuration.")]
Split = Annotated[str, typer.Option("--split", help="hub: the split to read.")]


@app.command("tokenizer")
def tokenizer(
    inputs: Inputs,
    out_file: Annotated[Path, typer.Option("--out", metavar="FILE.model", help="The sentencepiece model to write.")],
    vocab_size: Annotated[
        int, typer.Option("--vocab-size", min=1, help="Tokens, with the 256 bytes and 4 special tokens.")
    ],
    format: Format = "auto",
    field: Field = "text",
    glob: Glob = "*",
    subset: Subset = None,
    split: Split = "train",
    max_megabytes: Annotated[
        float, typer.Option("--max-megabytes", min=0.001, help="Learn from about that much text, drawn by document.")
    ] = 100.0,
) -> None:
    """Train a sentencepiece BPE that loses nothing: any text decodes to itself.

    The same input and options give the same file.
    """
    import tempfile

    from riverrun.train.data.bpe import train_sentencepiece
    from riverrun.train.data.sources import draw_documents, open_source

    with tempfile.TemporaryDirectory() as cache:
        source = open_source(
            inputs, format=format, field=field, glob=glob, subset=subset, split=split, cache=Path(cache)
        )
        trained = train_sentencepiece(draw_documents(source, int(max_megabytes * 1e6)), out_file, vocab_size)
        bytes_per_token = _bytes_per_token(source, trained)
    out.print(
        f"{out_file}: {trained.vocab_size} tokens, {bytes_per_token:.2f} bytes a token, "
        f"fingerprint {trained.fingerprint[:12]}",
        highlight=False,
        soft_wrap=True,
    )


@app.command("prepare")
def prepare(
    inputs: Inputs,
    tokenizer: Annotated[
        str,
        typer.Option(
            "--tokenizer",
            metavar="SPEC",
            help="A sentencepiece .model file, a Hugging Face tokenizer folder, a hub name, or bytes.",
        ),
    ],
    out_dir: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Gets train/, tokenizer/, prepare.json and, if asked, held_out/."),
    ],
    format: Format = "auto",
    field: Field = "text",
    glob: Glob = "*",
    subset: Subset = None,
    split: Split = "train",
    held_out: Annotated[
        float,
        typer.Option("--held-out", min=0.0, max=0.999, help="The share of documents to keep apart for evaluation."),
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Decides which documents are held out.")] = 0,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="Processes. They change nothing in the result.", show_default="CPUs"),
    ] = None,
) -> None:
    """Tokenise a corpus into token stores.

    Interrupted or killed, the same command goes on where it stopped, and the result is the same to the byte. Then train
    with [bold]data.train=DIR/train data.held_out=DIR/held_out data.tokenizer=DIR/tokenizer[/bold].
    """
    from rich.table import Table

    from riverrun.train.data.prepare import prepare as run

    prepared = run(
        inputs, out_dir, tokenizer=tokenizer, format=format, field=field, glob=glob, subset=subset, split=split,
        held_out=held_out, seed=seed, workers=workers or len(os.sched_getaffinity(0)), console=err,
    )  # fmt: skip
    table = Table("store", "documents", "tokens", "bytes", "bytes a token")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, counts in prepared.counts.items():
        numbers = [f"{counts[kind]:,}" for kind in ("documents", "tokens", "bytes")]
        table.add_row(str(prepared.out / name), *numbers, f"{counts['bytes'] / counts['tokens']:.2f}")
    out.print(table)
    if prepared.skipped:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in prepared.skipped.items())
        err.print(f"left out {sum(prepared.skipped.values()):,} documents: {reasons}", style="yellow", soft_wrap=True)
        for example in prepared.examples:
            err.print(f"  - {example}", style="yellow", soft_wrap=True, highlight=False, markup=False)


@app.command("inspect")
def inspect(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A token store, or the folder that `riverrun data prepare` wrote.")
    ],
    document: Annotated[int, typer.Option("--document", min=0, help="The document whose beginning is shown.")] = 0,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="How much of it is shown.")] = 64,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Check every shard's checksum.")] = True,
) -> None:
    """Show what a token store holds, check its checksums, and decode a little of it."""
    from rich.table import Table
    from rich.text import Text

    from riverrun.train.data.store import INDEX, TokenStore

    folders = [path for path in (folder, folder / "train", folder / "held_out") if (path / INDEX).is_file()]
    for path in folders or [folder]:
        store = TokenStore.open(path, verify=verify)
        decode = _tokenizer_beside(store)
        table = Table("", str(path), show_header=True)
        for name, value in (
            ("documents", f"{store.num_documents:,}"),
            ("tokens", f"{store.num_tokens:,}"),
            ("bytes of text", f"{store.num_bytes:,}"),
            ("bytes a token", f"{store.bytes_per_token:.3f}"),
            ("shards", f"{len(store.shards):,}"),
            ("vocabulary", f"{store.vocab_size:,}"),
            ("tokenizer", f"{store.tokenizer_fingerprint[:12]}{'' if decode else ' (not beside the store)'}"),
            ("checksums", "correct" if verify else "not checked"),
        ):
            table.add_row(name, value)
        out.print(table)
        if document >= store.num_documents:
            raise ValueError(f"{path} has documents 0 to {store.num_documents - 1}: there is no document {document}")
        ids = store.document(document)[:tokens].tolist()
        out.print(Text(f"document {document}, first {len(ids)} tokens:", style="bold"))
        out.print(Text(printable(decode.decode(ids)) if decode else " ".join(map(str, ids))))


def _tokenizer_beside(store: "TokenStore") -> "Tokenizer | None":
    """The tokenizer that `prepare` saved beside the store, if it is still that one."""
    from riverrun.train.data.tokenizer import load_tokenizer

    folder = store.folder.absolute().parent / "tokenizer"
    if not folder.is_dir():
        return None
    tokenizer = load_tokenizer(folder)
    return tokenizer if tokenizer.fingerprint == store.tokenizer_fingerprint else None


def _bytes_per_token(source: "Source", tokenizer: "Tokenizer") -> float:
    """Measured on about a megabyte."""
    from riverrun.train.data.sources import draw_documents

    size = tokens = 0
    for text in draw_documents(source, 1_000_000):
        size += len(text.encode())
        tokens += len(tokenizer.encode(text))
    return size / max(1, tokens)
