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
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from riverrun.eval.batches import Batch, Tokens, batched, row_batches
from riverrun.eval.documents import Documents
from riverrun.eval.harness import TaskResult
from riverrun.eval.losses import token_losses
from riverrun.eval.models import LoadedModel
from riverrun.eval.report import span
from riverrun.eval.tasks.perplexity import Bucket, PerplexityResult, Tally, evaluating, stream
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.train.data.packing import IGNORED

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
        nats, tokens = _grouped(self.nats), _grouped(self.tokens)
        draws = _resamples(len(nats))
        with np.errstate(invalid="ignore"):  # a resample can lack every document that reaches a bucket
            return np.nanquantile((draws @ nats) / (draws @ tokens), [0.025, 0.975], axis=0)


def _grouped(rows: np.ndarray) -> np.ndarray:
    """(D, K) → (min(D, GROUPS), K): sums of rows. Resampling groups of documents is as good and costs less."""
    missing = -len(rows) % GROUPS if len(rows) > GROUPS else 0
    return np.pad(rows, ((0, missing), (0, 0))).reshape(-1, min(len(rows), GROUPS), rows.shape[1]).sum(0)


def _resamples(count: int) -> np.ndarray:
    """(RESAMPLES, count) how often each of `count` rows is drawn; the same in every call."""
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(np.float64)


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


class PositionTally(Tally):
    """Also sums by document and by the buckets that begin at `edges`."""

    def __init__(self, edges: np.ndarray) -> None:
        super().__init__()
        self.edges = edges
        self.nats, self.tokens = np.zeros((0, len(edges) - 1)), np.zeros((0, len(edges) - 1), np.int64)

    def add(self, losses: np.ndarray, positions: np.ndarray, documents: np.ndarray) -> None:
        super().add(losses, positions, documents)
        if more := len(self.document_nats) - len(self.nats):
            self.nats = np.pad(self.nats, ((0, more), (0, 0)))
            self.tokens = np.pad(self.tokens, ((0, more), (0, 0)))
        place = (documents, np.searchsorted(self.edges, positions, side="right") - 1)
        np.add.at(self.nats, place, losses)
        np.add.at(self.tokens, place, 1)

    def curve(self) -> Curve:
        """Without documents and buckets in which nothing was scored."""
        rows, seen = self.tokens.any(1), int(np.flatnonzero(self.tokens.any(0))[-1]) + 1
        return Curve(self.edges[: seen + 1], self.nats[rows, :seen], self.tokens[rows, :seen])


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
    nats, tokens = _grouped(own_nats[:, beyond] * full), _grouped(own_tokens[:, beyond] * full)
    nats_within = _grouped(own_nats[:, within].sum(1, keepdims=True) * full)
    tokens_within = _grouped(own_tokens[:, within].sum(1, keepdims=True) * full)

    def ratios(draws: np.ndarray) -> np.ndarray:
        """(R, rows) → (R, buckets)"""
        with np.errstate(invalid="ignore"):
            reference = (draws @ nats_within) / (draws @ tokens_within)
            return (draws @ nats) / (draws @ tokens) / np.maximum(reference, 1e-12)

    ratio = float(ratios(np.ones((1, len(nats)))).max())
    tail = 0.025 / full.shape[1]
    bounds = np.nanquantile(ratios(_resamples(len(nats))), [tail, 1 - tail], axis=0)
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


def sequences(
    documents: Iterable[Tokens], max_length: int | None, concatenate: bool, opening: int | None = None
) -> Iterator[np.ndarray]:
    """Documents cut to max_length + 1 tokens, that is `max_length` predictions, or all tokens joined and cut into
    sequences of that length, the incomplete last one left out.

    Args:
        opening: the token with which texts begin, if any; joined ones have it at the beginning only.

    Raises:
        ValueError: joining without a length, or too few tokens for one sequence.
    """
    if not concatenate:
        for tokens in documents:
            yield np.asarray(tokens if max_length is None else tokens[: max_length + 1], np.int64)
        return
    if max_length is None:
        raise ValueError("joined documents need a length: give --max-length with --concatenate")
    start = np.array([] if opening is None else [opening], np.int64)
    wanted, found = max_length + 1 - len(start), 0
    parts: list[np.ndarray] = []
    for tokens in documents:
        parts.append(np.asarray(tokens[1:] if len(tokens) and tokens[0] == opening else tokens, np.int64))
        if sum(map(len, parts)) < wanted:
            continue
        joined = np.concatenate(parts)
        whole = len(joined) // wanted
        for piece in joined[: whole * wanted].reshape(whole, wanted):
            yield np.concatenate([start, piece])
        parts, found = [joined[whole * wanted :]], found + whole
    if not found:
        total = sum(map(len, parts))
        raise ValueError(f"all documents together have {total:,} tokens: lower --max-length={max_length:,}")


def opening_token(model: LoadedModel) -> int | None:
    """With which `open_documents` begins a text: other models' beginning-of-sequence token."""
    return None if model.is_riverrun or model.tokenizer is None else model.tokenizer.bos_id


@torch.no_grad()
def measure(
    model: torch.nn.Module, documents: Iterable[Tokens], tally: PositionTally, *, chunk_len: int, batch_size: int
) -> None:
    """Adds the losses of `documents` to `tally`: Riverrun's models read `chunk_len` tokens at a time with the state
    carried on, others whole rows."""
    device = next(model.parameters()).device
    with evaluating(model):
        if isinstance(model, RiverrunForCausalLM):
            number = 0
            for group in batched((np.asarray(tokens, np.int64) for tokens in documents), batch_size):
                group.sort(key=len, reverse=True)
                stream(model, group, number + np.arange(len(group)), chunk_len, tally)
                number += len(group)
            return
        for batch in row_batches(documents, LONGEST, batch_size):
            tally.add(*_scored(batch, token_losses(model, batch.input_ids.to(device), batch.targets.to(device))))


def _scored(batch: Batch, losses: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss, position and document of every prediction in a batch of rows."""
    assert batch.documents is not None
    row, column = np.nonzero(batch.targets.numpy() != IGNORED)
    return losses.double().cpu().numpy()[row, column], column + 1, batch.documents[row]


def run(
    model: LoadedModel,
    documents: Documents,
    *,
    max_length: int | None,
    train_length: int | None,
    chunk_len: int,
    batch_size: int,
    concatenate: bool,
) -> tuple[LengthResult, TaskResult]:
    """The task as the command line runs it.

    Args:
        max_length: predictions of a document that count; None: all, or as many as a model that is not Riverrun's takes.
        train_length: T; None: what is known of the model, else no verdict.

    Raises:
        ValueError: nothing to score, a length below 1 or beyond what the model takes, or too few tokens to join.
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
    tally = PositionTally(edges(max_length or LONGEST, train_length))
    chosen = sequences(documents.tokens, max_length, concatenate, opening_token(model))
    measure(model.model, chosen, tally, chunk_len=chunk_len, batch_size=batch_size)
    total = tally.result()
    curve = tally.curve()
    result = LengthResult(total, curve, judge(curve, train_length))
    config = {
        "max_length": max_length,
        "train_length": train_length,
        "concatenate": concatenate,
        "streaming": model.is_riverrun,
        "position": "tokens of the document seen",
        "interval": f"bootstrap over documents, {RESAMPLES} resamples",
        "data_fingerprint": documents.fingerprint,
    }
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
