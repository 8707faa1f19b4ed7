"""The steps of `riverrun quickstart`: the commands a user would type, run one after the other."""

import json
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.markup import escape
from rich.table import Table

from riverrun.eval.samples import overwriting
from riverrun.launch.commands import data, export, generate, train
from riverrun.launch.commands import eval as evaluation
from riverrun.launch.console import out
from riverrun.train import metrics
from riverrun.train.data.store import TokenStore

VOCAB_SIZE = 4096
PROMPT = "def read(self, size=-1):\n"
# runs in a process of its own, where Riverrun cannot be imported
LOAD_BACK = """
import sys
sys.modules["riverrun"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt, logits = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
with torch.no_grad():
    torch.save(model(ids).logits, logits)
tokens = model.generate(ids, max_new_tokens=20, do_sample=False)
print(type(model).__name__, "continues:", repr(tokenizer.decode(tokens[0, ids.shape[1]:])))
"""


def run(folder: Path, overrides: Sequence[str]) -> None:
    """Do all steps in `folder`; those that are done already are left out."""
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    corpus, model, stores = folder / "corpus", folder / "tokenizer.model", folder / "data"
    run_dir, exported = folder / "run", folder / "exported"

    out.rule("text")
    if not corpus.is_dir():
        _copy_standard_library(corpus)
    sizes = [path.stat().st_size for path in corpus.rglob("*.py")]
    out.print(f"{len(sizes)} files of Python's standard library, {sum(sizes) / 2**20:.1f} MiB")

    if not model.is_file():
        _show("data tokenizer", corpus, "--out", model, "--vocab-size", VOCAB_SIZE)
        data.tokenizer([str(corpus)], model, VOCAB_SIZE)
    if not (stores / "train" / "index.json").is_file():
        _show("data prepare", corpus, "--tokenizer", model, "--out", stores, "--held-out", 0.015)
        data.prepare([str(corpus)], str(model), stores, held_out=0.015)

    out.rule("training")
    values = [
        f"data.train={stores / 'train'}", f"data.held_out={stores / 'held_out'}", f"data.tokenizer={model}",
        "train.eval_every=50", "train.eval_rows=1000", *overrides,
    ]  # fmt: skip
    _show("train quickstart", *values, "--run-dir", run_dir)
    train.train("quickstart", values, run_dir)

    out.rule("evaluation")
    _show("eval perplexity", "--model", run_dir, "--data", stores / "held_out")
    with overwriting():  # what an earlier quickstart left in this folder
        evaluation.perplexity(str(run_dir), stores / "held_out", out_dir=folder / "perplexity")

    out.rule("a sample")
    _show("generate", "--model", run_dir, "--prompt", PROMPT)
    generate.generate(str(run_dir), PROMPT, max_new_tokens=96)

    out.rule("export")
    if exported.exists():
        shutil.rmtree(exported)  # of an earlier quickstart in this folder
    _show("export", run_dir, exported)
    export.export(run_dir, exported)
    difference = _load_back(run_dir, exported, folder / "logits.pt")

    out.rule("result")
    _report(folder, run_dir, stores, difference, time.monotonic() - began)


def unigram_bits_per_byte(train_store: TokenStore, held_out: TokenStore) -> float:
    """What guessing every token by its frequency in the training text costs, on the tokens that are scored: all but
    each document's first. Counts start at one, so that no token is impossible."""
    counts = np.ones(train_store.vocab_size)
    counts += np.bincount(train_store.tokens(0, train_store.num_tokens), minlength=train_store.vocab_size)
    bits = -np.log2(counts / counts.sum())
    scored = sum(bits[held_out.document(i)[1:]].sum() for i in range(held_out.num_documents))
    return float(scored / held_out.num_bytes)


def _copy_standard_library(corpus: Path) -> None:
    """The standard library's modules, without its tests and whatever else is installed beside them."""
    library = Path(sysconfig.get_paths()["stdlib"])
    left_out = shutil.ignore_patterns("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
    partial = corpus.with_name("corpus.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if not left_out(str(library), list(relative.parts)):
            (partial / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, partial / relative)
    partial.rename(corpus)


def _load_back(run_dir: Path, exported: Path, logits: Path) -> float:
    """Load the export with transformers alone; the largest difference of its logits from ours, relative to theirs."""
    import torch

    from riverrun.eval.models import load_model

    command = [sys.executable, "-c", LOAD_BACK, str(exported), PROMPT, str(logits)]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(f"the export cannot be loaded by transformers:\n{found.stderr}")
    out.print(found.stdout.strip(), markup=False, highlight=False, soft_wrap=True)
    ours = load_model(str(run_dir), device="cpu", dtype="fp32")
    theirs = torch.load(logits, weights_only=True)
    logits.unlink()
    with torch.no_grad():
        mine = ours.model(torch.tensor([ours.require_tokenizer().encode(PROMPT)])).logits
    return ((mine - theirs).abs().max() / theirs.abs().max()).item()


def _report(folder: Path, run_dir: Path, stores: Path, difference: float, seconds: float) -> None:
    records = list(metrics.read(run_dir / "metrics.jsonl"))
    held_out = [r["bits_per_byte"] for r in records if r["kind"] == "held_out"]
    unigram = unigram_bits_per_byte(TokenStore.open(stores / "train"), TokenStore.open(stores / "held_out"))
    results = json.loads((folder / "perplexity" / "results.json").read_text())["results"]["perplexity"]
    final = next(value for key, value in results.items() if key.split(",")[0] == "bits_per_byte")
    table = Table("on held-out files", "bits per byte", box=None)
    table.add_row("untrained model", f"{held_out[0]:.3f}")
    table.add_row("unigram baseline (token frequencies)", f"{unigram:.3f}")
    table.add_row("trained model", f"{held_out[-1]:.3f}")
    table.add_row("trained model, every file from its start", f"{final:.3f}")
    out.print(table)
    out.print(f"exported logits differ from ours by {difference:.1e} of the largest")
    out.print(
        f"loss curve: {run_dir / 'loss.png'}    export: {folder / 'exported'}    {seconds:.0f} seconds in all",
        soft_wrap=True,
    )


def _show(command: str, *arguments: object) -> None:
    words = " ".join(shlex.quote(str(a)) for a in arguments)
    out.print(f"[bold]$ riverrun {command}[/bold] {escape(words)}", highlight=False, soft_wrap=True)
