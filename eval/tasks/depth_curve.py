"""Loss of a model of recurrent depth as a function of r, how often its core runs, and whether its start is forgotten.

One run to the largest r serves all: the coda reads the state after each r asked for, which is the state of a run that
ends there. Every token of a document but its first is scored, within segments that start anew (see `perplexity`).

Path independence (Anil et al. 2022, arXiv 2211.09961): each text is read from two draws of s_0, which are those
of its tokens' positions and of positions far away. Over the predictions, the means of

    distance   2 ‖a − b‖ / (‖a‖ + ‖b‖) between their logits a and b, each less its mean: 0 if they are alike, √2 if they
               have nothing to do with each other
    KL         of the distributions that they give, in nats

Both are exactly 0 for a model that starts from zeros. The losses are those of the first draw.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from riverrun.eval.batches import Batch, Tokens, packed_batches
from riverrun.eval.documents import Documents
from riverrun.eval.fitting import Fitting
from riverrun.eval.harness import SampleMetric, TaskResult
from riverrun.eval.models import LoadedModel, depth_body
from riverrun.eval.samples import Key, collect
from riverrun.eval.tasks.perplexity import PerplexityResult, Tally, evaluating
from riverrun.kernels.linear_cross_entropy import tokens_of_chunk
from riverrun.modeling.depth.model import DepthModel
from riverrun.modeling.layout import Layout
from riverrun.train.data.packing import IGNORED
from riverrun.train.metrics import bits_per_byte

TASK, VERSION = "perplexity_by_depth", 1
FAR = 2**30  # positions, to where no text goes
SUMS = ("nats", "distance", "kl")


class Depth(NamedTuple):
    """What r iterations give: the loss, and means over predictions of what another start changes."""

    r: int
    result: PerplexityResult
    distance: float
    kl: float


def iterates(
    body: DepthModel, input_ids: torch.Tensor, layout: Layout, steps: Sequence[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Hidden states (B, T, h) after the final norm, of r iterations for each r of `steps`, which ascend: from s_0, and
    from another draw of it."""
    x = body.embed(input_ids)
    body.prepare_attention(layout, None, x.dtype)
    e = body.run(body.prelude, x, layout)
    states = [body.initial_state(e, replace(layout, positions=layout.positions + shift)) for shift in (0, FAR)]
    for r in range(1, max(steps) + 1):
        states = [body.core.iterate(s, e, layout) for s in states]
        if r in steps:
            first, second = (body.finish(s, layout) for s in states)
            yield first, second


def compare(
    first: torch.Tensor, second: torch.Tensor, head: nn.Linear, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states (N, h) of two draws, and the tokens to predict (N,) → (N,) each, float64: the loss of the first in
    nats, distance, and KL."""
    parts, rows = [], tokens_of_chunk(first, head.weight.shape[0])
    for a, b, target in zip(first.split(rows), second.split(rows), targets.split(rows)):
        a, b = (head(x).to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
        a, b = (x - x.mean(-1, keepdim=True) for x in (a, b))
        size = torch.linalg.vector_norm(a, dim=-1) + torch.linalg.vector_norm(b, dim=-1)
        distance = 2 * torch.linalg.vector_norm(a - b, dim=-1) / size.clamp_min(1e-12)
        a, b = a.log_softmax(-1), b.log_softmax(-1)
        kl = F.kl_div(b, a, log_target=True, reduction="none").sum(-1).clamp_min(0)  # rounding
        parts.append(torch.stack([-a.gather(1, target[:, None])[:, 0], distance, kl]).double())
    losses, distance, kl = torch.cat(parts, 1)
    return losses, distance, kl


@torch.no_grad()
def measure(
    network: Any, documents: Sequence[Tokens], steps: Sequence[int], seq_len: int, batch_size: int
) -> list[dict[str, Any]]:
    """A sample for each document: its predictions, and sums over them for each r."""
    tokens = np.zeros(len(documents), np.int64)
    sums = {f"{name}_r{r}": np.zeros(len(documents)) for r in steps for name in SUMS}
    with evaluating(network):
        for batch in packed_batches(documents, seq_len, batch_size):
            places, owners = _scored(batch)
            tokens += np.bincount(owners, minlength=len(documents))
            targets = batch.targets.flatten()[places].to(network.device)
            assert batch.cu_seqlens is not None
            shape = (batch.input_ids.shape[0], batch.input_ids.shape[1])
            layout = Layout.of_documents(shape, batch.cu_seqlens.to(network.device))
            found = iterates(network.model, batch.input_ids.to(network.device), layout, steps)
            for r, draws in zip(steps, found):
                first, second = (hidden.flatten(0, 1)[places.to(network.device)] for hidden in draws)
                for name, values in zip(SUMS, compare(first, second, network.lm_head, targets)):
                    sums[f"{name}_r{r}"] += np.bincount(owners, values.cpu().numpy(), len(documents))
    return [
        {"tokens": int(number), **{name: float(values[i]) for name, values in sums.items()}}
        for i, number in enumerate(tokens)
    ]


def _scored(batch: Batch) -> tuple[torch.Tensor, np.ndarray]:
    """Of the tokens with a target: their places among the flattened ones, and their documents."""
    assert batch.cu_seqlens is not None and batch.documents is not None
    places = (batch.targets.flatten() != IGNORED).nonzero()[:, 0]
    sequence = np.searchsorted(batch.cu_seqlens.numpy(), places.numpy(), side="right") - 1
    return places, batch.documents[sequence]


def run(
    model: LoadedModel,
    documents: Documents,
    folder: Path,
    *,
    steps: Sequence[int],
    seq_len: int | None,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Depth], TaskResult]:
    """The task as the command line runs it; a folder of the same model, data, steps and lengths is gone on with.

    Args:
        folder: for samples.jsonl.
        steps: numbers of iterations, each once; their order does not matter.
        seq_len: tokens a segment; None: what the model was trained on, or 1024.
        batch_size: rows of segments at a time.

    Raises:
        ValueError: a model of fixed depth, numbers below 1 or twice, nothing to score, or another configuration in the
            folder.
    """
    depth_body(model)
    steps, seq_len = sorted(steps), seq_len or model.seq_len or 1024
    if steps[0] < 1 or len(set(steps)) < len(steps):
        raise ValueError(
            f"num_steps={','.join(map(str, steps))} must be different numbers of iterations, 1 or more each"
        )
    if seq_len < 1 or batch_size < 1:
        raise ValueError(f"seq_len={seq_len} and batch_size={batch_size} must be at least 1")
    rows = Fitting(batch_size)

    def work(keys: list[Key]) -> list[dict[str, Any]]:
        return rows(partial(measure, model.model, [documents.tokens[number] for (number,) in keys], steps, seq_len))

    settings = {
        "task": TASK,
        "version": VERSION,
        "num_steps": steps,
        "seq_len": seq_len,
        "data_fingerprint": documents.fingerprint,
        "model_fingerprint": model.fingerprint,
        "model_dtype": str(model.dtype),
    }
    together = max(1, round(batch_size * seq_len * documents.num_documents / documents.num_tokens))
    keys: list[Key] = [(number,) for number in range(documents.num_documents)]
    records = collect(folder, settings, keys, work, batch_size=together, progress=progress)
    found = [depth_of(records, r) for r in steps]
    return found, summarize(found, documents, depth_body(model).depth.mean_recurrence, settings)


def depth_of(records: Sequence[dict[str, Any]], r: int) -> Depth:
    """Raises ValueError if nothing was scored, or a loss is not finite."""
    whole: dict[str, list] = {"octave_nats": [], "octave_tokens": []}  # positions are not told apart
    result = Tally.of(
        [{"nats": record[f"nats_r{r}"], "tokens": record["tokens"], **whole} for record in records]
    ).result()
    distance, kl = (sum(record[f"{name}_r{r}"] for record in records) / result.tokens for name in SUMS[1:])
    return Depth(r, result, distance, kl)


def summarize(
    found: Sequence[Depth], documents: Documents, mean_recurrence: int, settings: dict[str, Any]
) -> TaskResult:
    """The curve for results.json, with a metric for each number of iterations."""
    bits = bits_per_byte(1.0, documents.bytes_per_token)  # for a loss of one nat a token
    metrics: dict[str, float | None] = {}
    stderr: dict[str, float | None] = {}
    samples: dict[str, SampleMetric] = {}
    for r, result, distance, kl in found:
        metrics |= {f"loss_r{r}": result.loss, f"perplexity_r{r}": result.perplexity}
        metrics |= {f"bits_per_byte_r{r}": result.loss * bits, f"distance_r{r}": distance, f"kl_r{r}": kl}
        error = result.stderr
        stderr |= {f"loss_r{r}": error, f"perplexity_r{r}": error and error * result.perplexity}
        stderr |= {f"bits_per_byte_r{r}": error and error * bits}
        samples |= {
            f"loss_r{r}": SampleMetric(f"nats_r{r}", "tokens"),
            f"perplexity_r{r}": SampleMetric(f"nats_r{r}", "tokens", exponential=True),
            f"bits_per_byte_r{r}": SampleMetric(f"nats_r{r}", "tokens", scale=bits),
            f"distance_r{r}": SampleMetric(f"distance_r{r}", "tokens"),
            f"kl_r{r}": SampleMetric(f"kl_r{r}", "tokens"),
        }
    return TaskResult(
        TASK,
        VERSION,
        metrics,
        stderr,
        dict.fromkeys(metrics, False),
        documents.num_documents,
        documents.available,
        {name: settings[name] for name in ("num_steps", "seq_len", "data_fingerprint")}
        | {"stderr": "ratio estimator over documents, linearised; the interval is normal"},
        {
            "mean_recurrence": mean_recurrence,
            "tokens_scored": found[0].result.tokens,
            "tokens": documents.num_tokens,
            "bytes": documents.num_bytes,
        },
        sample_metrics=samples,
    )


def table(found: Sequence[Depth]) -> Table:
    shown = Table()
    for name in ("iterations", "loss (nats a token)", "perplexity", "distance", "KL (nats)"):
        shown.add_column(name, justify="right")
    for r, result, distance, kl in found:
        error = "" if result.stderr is None else f" ± {result.stderr:.4f}"
        shown.add_row(str(r), f"{result.loss:.4f}{error}", f"{result.perplexity:,.3f}", f"{distance:.2e}", f"{kl:.2e}")
    return shown


def plot(found: Sequence[Depth], mean_recurrence: int, path: Path, title: str) -> None:
    """Loss, and what another s_0 changes, over the number of iterations, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullLocator

    steps = [depth.r for depth in found]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    reach = [
        [abs(depth.result.loss - end) for end in depth.result.interval or 2 * [depth.result.loss]] for depth in found
    ]
    left.errorbar(steps, [depth.result.loss for depth in found], np.transpose(reach), marker=".", capsize=3)
    right.plot(steps, [depth.distance for depth in found], marker=".", label="distance of logits")
    right.plot(steps, [depth.kl for depth in found], marker=".", label="KL (nats)")
    if any(depth.distance > 0 for depth in found):
        right.set_yscale("log")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(steps, list(map(str, steps)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.axvline(mean_recurrence, color="black", linewidth=0.8, linestyle=":", label="mean in training")
        axes.grid(alpha=0.3)
        axes.set_xlabel("iterations of the core")
    left.set_ylabel("nats per token")
    right.set_ylabel("between two draws of the first state")
    right.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=144)
    plt.close(figure)
