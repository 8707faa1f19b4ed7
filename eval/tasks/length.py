"""Length extrapolation: the loss of every prediction by its position, far beyond the length of training.

Riverrun's models read whole documents with the state carried on, in constant memory where no layer attends without a
window (see `riverrun.eval.tasks.perplexity`); other models read the beginning of each document, one a row, up to their
limit.

The verdict follows Stuffed Mamba (arXiv 2410.07145): a model forgets if its loss at no position is more than twice that
within the training length T. A model that never learned to forget fills its state beyond T, and its loss rises steeply.
Here, with loss(k) the mean of a bucket of positions beyond T, and the reference the mean over (T/2, T], both over the
documents that fill the bucket, and ratio = max over k of loss(k) / reference:

    collapses     ratio > 2
    forgets       1.05 < ratio ≤ 2      does not collapse, but predicts worse than within T
    extrapolates  ratio ≤ 1.05
    cannot tell   the interval of the ratio crosses a bound, fewer than 8 documents fill a bucket beyond T, or (unless
                  it collapses) the buckets do not reach 2·T

The paper compares with the maximum within T without its first bucket of 8192 positions; the last octave of T stands for
that here, because the loss at early positions is high for want of context and would excuse a collapse. The bound of
1.05 is ours. Interval of 95%: percentile bootstrap over documents, with Bonferroni's correction for the number of
buckets, since the ratio is the largest of many.

The verdict is on the shape of the curve, not its height: a model that has learned nothing extrapolates perfectly.

Buckets are a quarter of an octave wide, counted from T; a document counts for the ratio where it fills the bucket.

A sample (a line of samples.jsonl) is a document, or a sequence of joined ones, with its sums by octave and by bucket.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from riverrun.eval.batches import Tokens, row_batches
from riverrun.eval.documents import Documents
from riverrun.eval.harness import SampleMetric, TaskResult
from riverrun.eval.intervals import grouped, resamples
from riverrun.eval.models import LoadedModel
from riverrun.eval.report import span
from riverrun.eval.samples import Key, collect
from riverrun.eval.tasks import perplexity
from riverrun.eval.tasks.perplexity import OCTAVE_EDGES, Bucket, DocumentSums, Losses, PerplexityResult, Tally
from riverrun.modeling.model import RiverrunForCausalLM

TASK, VERSION = "length", 1
COLLAPSES, EXTRAPOLATES = 2.0, 1.05  # bounds of the ratio
MIN_DOCUMENTS = 8
RESAMPLES, GROUPS = 4000, 1000
LONGEST = 1 << 40


@dataclass(frozen=True)
class Curve:
    """Losses by document and bucket.

    Attributes:
        edges: (K + 1,) first position of each bucket, and the one after the last bucket.
        nats: (D, K) float64 summed losses.
        tokens: (D, K) int64 predictions.
    """

    edges: np.ndarray
    nats: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, edges: np.ndarray, records: Sequence[dict[str, Any]]) -> "Curve":
        """Of samples; without documents and buckets in which nothing was scored."""
        nats, tokens = np.zeros((len(records), len(edges) - 1)), np.zeros((len(records), len(edges) - 1), np.int64)
        for row, record in enumerate(records):
            seen = len(record["bucket_tokens"])
            nats[row, :seen], tokens[row, :seen] = record["bucket_nats"], record["bucket_tokens"]
        rows, end = tokens.any(1), int(np.flatnonzero(tokens.any(0))[-1]) + 1
        return cls(edges[: end + 1], nats[rows, :end], tokens[rows, :end])

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        nats, tokens = self.nats.sum(0), self.tokens.sum(0)
        return tuple(
            Bucket(int(self.edges[k]), int(self.edges[k + 1]) - 1, float(nats[k] / tokens[k]), int(tokens[k]))
            for k in range(len(tokens))
        )

    def band(self) -> np.ndarray | None:
        """(2, K) pointwise 95% intervals of the buckets' losses; None with fewer than two documents."""
        if len(self.tokens) < 2:
            return None
        nats, tokens = grouped(self.nats, GROUPS), grouped(self.tokens, GROUPS)
        draws = resamples(len(nats), RESAMPLES)
        with np.errstate(invalid="ignore"):  # a resample can lack every document that reaches a bucket
            return np.nanquantile((draws @ nats) / (draws @ tokens), [0.025, 0.975], axis=0)


@dataclass(frozen=True)
class Verdict:
    """Attributes:
    verdict: "collapses", "forgets", "extrapolates" or "cannot tell".
    reason: why, in a sentence.
    ratio: largest loss beyond the training length over that within; None if nothing reaches beyond.
    interval: of `ratio`, 95%.
    reach: the last position that counted.
    """

    verdict: str
    reason: str
    ratio: float | None = None
    interval: tuple[float, float] | None = None
    reach: int | None = None


@dataclass(frozen=True)
class LengthResult:
    total: PerplexityResult
    curve: Curve
    verdict: Verdict


class OctavesAndBuckets:
    """Sums of `documents` documents by octave, as perplexity has them, and by the buckets of a curve."""

    def __init__(self, documents: int, edges: np.ndarray) -> None:
        self.octaves, self.buckets = DocumentSums(documents, OCTAVE_EDGES), DocumentSums(documents, edges)

    def add(self, losses: np.ndarray, positions: np.ndarray, documents: np.ndarray) -> None:
        self.octaves.add(losses, positions, documents)
        self.buckets.add(losses, positions, documents)

    def records(self) -> list[dict[str, Any]]:
        pairs = zip(perplexity.document_records(self.octaves), self.buckets.records("bucket"))
        return [octaves | buckets for octaves, buckets in pairs]


def edges(max_length: int, train_length: int | None) -> np.ndarray:
    """The first positions of the buckets, which end at ⌊T·2^(k/4)⌋ for whole k, and max_length + 1. The last bucket
    takes up what would be less than half of another."""
    T = train_length or 1
    below, above = 4 * T.bit_length(), 4 * max(1, max_length // T).bit_length()
    ends = {math.floor(T * 2 ** (k / 4)) for k in range(-below, above + 1)}
    kept = {end for end in ends if 0 < end < max_length and (end == T or end * 2**0.125 < max_length)}
    return np.array([1, *(end + 1 for end in sorted(kept | {max_length}))])


def judge(curve: Curve, train_length: int | None) -> Verdict:
    """The verdict by the criterion above."""
    if train_length is None:
        return Verdict("cannot tell", "the length in training is unknown: pass --train-length")
    first, last = curve.edges[:-1], curve.edges[1:] - 1
    full = curve.tokens == last - first + 1  # (D, K)
    within = (2 * first > train_length) & (last <= train_length)
    beyond = (first > train_length) & (full.sum(0) >= MIN_DOCUMENTS)
    if not beyond.any():
        reason = f"fewer than {MIN_DOCUMENTS} documents fill a bucket beyond the {train_length:,} tokens of training"
        return Verdict("cannot tell", reason)
    filling = full[:, beyond].any(1)
    full, own_nats, own_tokens = full[filling][:, beyond], curve.nats[filling], curve.tokens[filling]
    nats, tokens = (grouped(own[:, beyond] * full, GROUPS) for own in (own_nats, own_tokens))
    nats_within, tokens_within = (
        grouped(own[:, within].sum(1, keepdims=True) * full, GROUPS) for own in (own_nats, own_tokens)
    )

    def ratios(draws: np.ndarray) -> np.ndarray:
        """(R, rows) → (R, buckets)"""
        with np.errstate(invalid="ignore"):
            reference = (draws @ nats_within) / (draws @ tokens_within)
            return (draws @ nats) / (draws @ tokens) / np.maximum(reference, 1e-12)

    ratio = float(ratios(np.ones((1, len(nats)))).max())
    tail = 0.025 / full.shape[1]
    bounds = np.nanquantile(ratios(resamples(len(nats), RESAMPLES)), [tail, 1 - tail], axis=0)
    low, high = (float(side.max()) for side in bounds)
    reach = int(last[beyond][-1])
    verdict, reason = _decide(low, high, reach, train_length)
    return Verdict(verdict, reason, ratio, (low, high), reach)


def _decide(low: float, high: float, reach: int, train_length: int) -> tuple[str, str]:
    where = f"up to position {reach:,}, the loss is at most {low:.3f} to {high:.3f} times that within training"
    if low > COLLAPSES:
        return "collapses", where
    if reach < 2 * train_length:
        return "cannot tell", f"{where}; twice the {train_length:,} tokens of training are not reached"
    if high <= EXTRAPOLATES:
        return "extrapolates", where
    if low > EXTRAPOLATES and high <= COLLAPSES:
        return "forgets", where
    bound = COLLAPSES if high > COLLAPSES else EXTRAPOLATES
    return "cannot tell", f"{where}, on both sides of {bound}: evaluate more documents"


class Cut(Sequence[np.ndarray]):
    """Documents up to `size` tokens; None: whole."""

    def __init__(self, documents: Sequence[Tokens], size: int | None):
        self.documents, self.size = documents, size

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, i):
        return np.asarray(self.documents[i][: self.size], np.int64)


class Joined(Sequence[np.ndarray]):
    """All tokens one after another, cut into sequences of `size`; texts' opening token is at the beginning of each."""

    def __init__(self, documents: Sequence[Tokens], size: int, opening: int | None):
        self.documents, self.opening = documents, opening
        self.start = np.array([] if opening is None else [opening], np.int64)
        self.taken = size - len(self.start)
        self.ends = np.array([0, *accumulate(len(self._document(i)) for i in range(len(documents)))])

    def __len__(self) -> int:
        return int(self.ends[-1]) // self.taken

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        low, high = i * self.taken, (i + 1) * self.taken
        first, last = np.searchsorted(self.ends, low, side="right") - 1, np.searchsorted(self.ends, high)
        tokens = np.concatenate([self._document(number) for number in range(first, last)])
        return np.concatenate([self.start, tokens[low - self.ends[first] :][: self.taken]])

    def _document(self, i: int) -> np.ndarray:
        tokens = self.documents[i]
        return np.asarray(tokens[1:] if len(tokens) and tokens[0] == self.opening else tokens, np.int64)


def sequences(
    documents: Sequence[Tokens], max_length: int | None, concatenate: bool, opening: int | None = None
) -> Sequence[np.ndarray]:
    """Documents cut to max_length + 1 tokens, that is `max_length` predictions, or all tokens joined and cut into
    sequences of that length, the incomplete last one left out.

    Args:
        opening: the token with which texts begin, if any; joined ones have it at the beginning only.

    Raises:
        ValueError: joining without a length, or too few tokens for one sequence.
    """
    if not concatenate:
        return Cut(documents, None if max_length is None else max_length + 1)
    if max_length is None:
        raise ValueError("joined documents need a length: give --max-length with --concatenate")
    joined = Joined(documents, max_length + 1, opening)
    if not joined:
        raise ValueError(f"all documents together have {joined.ends[-1]:,} tokens: lower --max-length={max_length:,}")
    return joined


def opening_token(model: LoadedModel) -> int | None:
    """With which `open_documents` begins a text: other models' beginning-of-sequence token."""
    return None if model.is_riverrun or model.tokenizer is None else model.tokenizer.bos_id


def measure(
    model: torch.nn.Module, documents: Iterable[Tokens], tally: Losses, *, chunk_len: int, batch_size: int
) -> None:
    """Adds the losses of `documents` to `tally`: Riverrun's models read `chunk_len` tokens at a time with the state
    carried on, others whole rows."""
    if isinstance(model, RiverrunForCausalLM):
        perplexity.measure_streaming(model, documents, tally, chunk_len=chunk_len, batch_size=batch_size)
    else:
        perplexity.measure(model, row_batches(documents, LONGEST, batch_size), tally)


def run(
    model: LoadedModel,
    documents: Documents,
    folder: Path,
    *,
    max_length: int | None,
    train_length: int | None,
    chunk_len: int,
    batch_size: int,
    concatenate: bool,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[LengthResult, TaskResult]:
    """The task as the command line runs it; a folder of the same model, data and settings is gone on with.

    Args:
        folder: for samples.jsonl.
        max_length: predictions of a document that count; None: all, or as many as a model that is not Riverrun's takes.
        train_length: T; None: what is known of the model, else no verdict.

    Raises:
        ValueError: nothing to score, a length below 1 or beyond what the model takes, too few tokens to join, or
            another configuration in the folder.
    """
    for name, value in (("max_length", max_length), ("train_length", train_length)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if chunk_len < 1 or batch_size < 1:
        raise ValueError(f"chunk_len={chunk_len} and batch_size={batch_size} must be at least 1")
    if not model.is_riverrun and model.seq_len is not None:
        if (max_length or 0) > model.seq_len:
            raise ValueError(f"{model.description} takes at most {model.seq_len} tokens: lower max_length={max_length}")
        max_length = max_length or model.seq_len
    train_length = train_length or model.seq_len
    bounds = edges(max_length or LONGEST, train_length)
    chosen = sequences(documents.tokens, max_length, concatenate, opening_token(model))

    def work(keys: list[Key]) -> list[dict[str, Any]]:
        sums = OctavesAndBuckets(len(keys), bounds)
        some = [chosen[number] for (number,) in keys]
        measure(model.model, some, sums, chunk_len=chunk_len, batch_size=len(some))
        return sums.records()

    config = {
        "max_length": max_length,
        "train_length": train_length,
        "concatenate": concatenate,
        "streaming": model.is_riverrun,
        "position": "tokens of the document seen",
        "interval": f"bootstrap over documents, {RESAMPLES} resamples",
        "data_fingerprint": documents.fingerprint,
    }
    settings = {
        "task": TASK,
        "version": VERSION,
        **config,
        "model_fingerprint": model.fingerprint,
        "model_dtype": str(model.dtype),
    }
    keys = [(number,) for number in range(len(chosen))]
    records = collect(folder, settings, keys, work, batch_size=batch_size, progress=progress)
    total, curve = Tally.of(records).result(), Curve.of(bounds, records)
    result = LengthResult(total, curve, judge(curve, train_length))
    return result, summarize(result, documents, config)


def summarize(result: LengthResult, documents: Documents, config: dict) -> TaskResult:
    """The result for results.json; `ratio` is the metric of the verdict."""
    curve, verdict = result.curve, result.verdict
    band = curve.band()
    cumulative = curve.nats.sum(0).cumsum() / curve.tokens.sum(0).cumsum()
    by_position = [
        bucket._asdict() | {"loss_95": None if band is None else band[:, k].tolist(), "loss_so_far": cumulative[k]}
        for k, bucket in enumerate(curve.buckets)
    ]
    return TaskResult(
        TASK,
        VERSION,
        {"loss": result.total.loss, "ratio": verdict.ratio},
        {"loss": result.total.stderr},
        {"loss": False, "ratio": False},
        result.total.documents,
        documents.available,
        config,
        {
            "verdict": verdict.verdict,
            "reason": verdict.reason,
            "ratio_95": verdict.interval and list(verdict.interval),
            "reach": verdict.reach,
            "tokens_scored": result.total.tokens,
            "by_position": by_position,
        },
        ci95={"loss": result.total.interval, "ratio": verdict.interval},
        sample_metrics={"loss": SampleMetric("nats", "tokens")},
    )


def table(result: LengthResult) -> Table:
    """The loss by octave."""
    found = Table()
    for name in ("tokens of context", "loss", "tokens scored"):
        found.add_column(name, justify="right")
    for bucket in result.total.by_position:
        found.add_row(span(bucket), f"{bucket.loss:.4f}", f"{bucket.tokens:,}")
    return found


def plot(result: LengthResult, train_length: int | None, path: Path, title: str) -> None:
    """The loss by position with its 95% band, the training length and the bound of a collapse, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curve, buckets = result.curve, result.curve.buckets
    figure, axes = plt.subplots(figsize=(7.5, 4.4), layout="constrained")
    axes.stairs([b.loss for b in buckets], curve.edges, baseline=None, linewidth=2, label="mean loss")
    if (band := curve.band()) is not None:
        low, high = np.c_[band, band[:, -1]]
        axes.fill_between(curve.edges, low, high, step="post", alpha=0.25, label="95%")
    if train_length is not None:
        axes.axvline(train_length, color="black", linestyle="--", linewidth=1, label=f"training: {train_length:,}")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="position (tokens of context)", ylabel="nats per token")
    axes.set_title(f"{title}: {result.verdict.verdict}", fontsize=10, wrap=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=144)
    plt.close(figure)
