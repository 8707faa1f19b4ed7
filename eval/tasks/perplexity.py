"""Language-model loss on text: nats a token, perplexity, bits per byte, and the loss as a function of the position.

What is scored. Every token of a document but its first, which has no context, given the tokens before it in the same
document; states start anew with each document, as in training.

Segments (the default): a document is cut every `seq_len` tokens, and each segment starts from zero states. Streaming: a
document is read in chunks of `seq_len` tokens with the state carried on, so that positions go on to its end in
constant memory for recurrent and windowed layers (full attention keeps all keys).

Position: how many tokens the model has seen when it predicts, counted from the start of the document (streaming) or of
the segment; the first prediction is at position 1.

Bits per byte: loss / ln 2 · (tokens / UTF-8 bytes), both counted exactly over the evaluated documents, end-of-sequence
tokens included; a document's first token is thereby counted at the average loss.

Standard error: documents are taken as independent, tokens within one are not. The loss is the ratio of two sums over
documents, total loss and tokens, so its error is the linearised (delta method) one of a ratio estimator (Cochran,
Sampling Techniques, §6.4); the interval of 95% is the normal one.

A sample (a line of samples.jsonl) is a document: its summed loss in nats and its predictions, also by octave of
positions. All figures are of these sums, in the order of the documents.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from riverrun.eval.batches import Batch, Tokens, batched, packed_batches, pad, row_batches
from riverrun.eval.documents import Documents
from riverrun.eval.fitting import Fitting
from riverrun.eval.harness import SampleMetric, TaskResult
from riverrun.eval.intervals import Z95
from riverrun.eval.losses import token_losses
from riverrun.eval.models import LoadedModel
from riverrun.eval.samples import Key, collect
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.train.data.packing import IGNORED
from riverrun.train.metrics import bits_per_byte

TASK, VERSION = "perplexity", 1

OCTAVES = 64
OCTAVE_EDGES = 2.0 ** np.arange(OCTAVES + 1)  # first positions; the last one ends the last bucket


class Bucket(NamedTuple):
    """Mean loss in nats over `tokens` predictions at positions first to last, both included."""

    first: int
    last: int
    loss: float
    tokens: int


@dataclass(frozen=True)
class PerplexityResult:
    """Attributes:
    loss: nats a token.
    stderr: of `loss`, over documents; None with fewer than two.
    tokens: predictions scored.
    documents: with at least one prediction.
    by_position: buckets [2^k, 2^(k+1) − 1] of positions, empty ones left out.
    """

    loss: float
    stderr: float | None
    tokens: int
    documents: int
    by_position: tuple[Bucket, ...]

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of `loss`, 95%, normal."""
        return None if self.stderr is None else (self.loss - Z95 * self.stderr, self.loss + Z95 * self.stderr)


class Losses(Protocol):
    """What takes the losses in."""

    def add(self, losses: np.ndarray, positions: np.ndarray, documents: np.ndarray) -> None:
        """(N,) scored predictions each: loss, position from 1, number of the document."""


class DocumentSums:
    """Sums of losses in float64 by document and bucket of positions; the buckets begin at `edges`, the last of which
    ends the last one. (D, K) each."""

    def __init__(self, documents: int, edges: np.ndarray) -> None:
        self.edges = edges
        self.nats = np.zeros((documents, len(edges) - 1))
        self.tokens = np.zeros(self.nats.shape, np.int64)

    def add(self, losses: np.ndarray, positions: np.ndarray, documents: np.ndarray) -> None:
        place = (documents, np.searchsorted(self.edges, positions, side="right") - 1)
        np.add.at(self.nats, place, losses)
        np.add.at(self.tokens, place, 1)

    def records(self, name: str = "octave") -> list[dict[str, Any]]:
        """A document each: sums by bucket, without the empty ones after the last, as `{name}_nats` and `_tokens`."""
        ends = [int(row.nonzero()[0][-1]) + 1 if row.any() else 0 for row in self.tokens]
        return [
            {f"{name}_nats": nats[:end].tolist(), f"{name}_tokens": tokens[:end].tolist()}
            for nats, tokens, end in zip(self.nats, self.tokens, ends)
        ]


class Tally:
    """Sums of losses in float64, by document and by octave of positions."""

    def __init__(self) -> None:
        self.bucket_nats, self.bucket_tokens = np.zeros(OCTAVES), np.zeros(OCTAVES, np.int64)
        self.document_nats, self.document_tokens = np.zeros(0), np.zeros(0, np.int64)

    def add(self, losses: np.ndarray, positions: np.ndarray, documents: np.ndarray) -> None:
        """(N,) scored predictions each: loss, position from 1, number of the document."""
        buckets = np.frexp(positions.astype(np.float64))[1] - 1  # ⌊log2⌋, exact
        self.bucket_nats += np.bincount(buckets, losses, OCTAVES)
        self.bucket_tokens += np.bincount(buckets, minlength=OCTAVES)
        size = max(len(self.document_nats), int(documents.max(initial=-1)) + 1)
        if size > len(self.document_nats):
            spare = max(size, 2 * len(self.document_nats)) - len(self.document_nats)
            self.document_nats = np.pad(self.document_nats, (0, spare))
            self.document_tokens = np.pad(self.document_tokens, (0, spare))
        if len(documents):  # a batch holds a narrow range of documents
            lo, hi = int(documents.min()), int(documents.max()) + 1
            self.document_nats[lo:hi] += np.bincount(documents - lo, losses)
            self.document_tokens[lo:hi] += np.bincount(documents - lo)

    @classmethod
    def of(cls, records: Sequence[dict[str, Any]]) -> "Tally":
        """Of the samples of all documents, in their order."""
        tally = cls()
        tally.document_nats = np.array([record["nats"] for record in records])
        tally.document_tokens = np.array([record["tokens"] for record in records], np.int64)
        for record in records:
            seen = len(record["octave_tokens"])
            tally.bucket_nats[:seen] += record["octave_nats"]
            tally.bucket_tokens[:seen] += np.array(record["octave_tokens"], np.int64)  # of no tokens at all: []
        return tally

    def result(self) -> PerplexityResult:
        """Raises ValueError if nothing was scored."""
        seen = self.document_tokens > 0
        nats, tokens = self.document_nats[seen], self.document_tokens[seen]
        total, count = float(nats.sum()), int(tokens.sum())
        if count == 0:
            raise ValueError("there is nothing to score: every document has fewer than two tokens")
        loss, stderr = total / count, None
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss}: the weights hold non-finite numbers, or the dtype overflows (try fp32)"
            )
        if len(nats) > 1:
            residuals = nats - loss * tokens
            stderr = math.sqrt(float((residuals**2).sum()) * len(nats) / (len(nats) - 1)) / count
        buckets = tuple(
            Bucket(2**k, 2 ** (k + 1) - 1, self.bucket_nats[k] / self.bucket_tokens[k], int(self.bucket_tokens[k]))
            for k in np.flatnonzero(self.bucket_tokens).tolist()
        )
        return PerplexityResult(loss, stderr, count, len(nats), buckets)


def evaluate(model: nn.Module, batches: Iterable[tuple]) -> PerplexityResult:
    """The loss of a model, Riverrun's or any Hugging Face causal LM, on batches such as `Batch`; in evaluation mode.

    Raises:
        ValueError: nothing to score; packed sequences for a model that cannot keep them apart.
    """
    tally = Tally()
    measure(model, batches, tally)
    return tally.result()


@torch.no_grad()
def measure(model: nn.Module, batches: Iterable[tuple], tally: Losses) -> None:
    """Adds the losses of `batches` to `tally`. Sequences of batches without documents are numbered one by one."""
    fresh = 0
    with evaluating(model):
        device = _device(model)
        for fields in batches:
            batch = Batch(*fields)
            input_ids, targets = batch.input_ids.to(device), batch.targets.to(device)
            cu_seqlens = None if batch.cu_seqlens is None else batch.cu_seqlens.to(device)
            losses = token_losses(model, input_ids, targets, cu_seqlens).double().cpu().numpy().reshape(-1)
            B, T = batch.input_ids.shape
            bounds = np.arange(B + 1) * T if batch.cu_seqlens is None else batch.cu_seqlens.cpu().numpy()
            sequence = np.searchsorted(bounds, np.arange(B * T), side="right") - 1
            documents = batch.documents
            if documents is None:
                documents = np.arange(fresh, fresh + len(bounds) - 1)
                fresh += len(documents)
            scored = batch.targets.cpu().numpy().reshape(-1) != IGNORED
            positions = np.arange(B * T) - bounds[sequence] + 1
            tally.add(losses[scored], positions[scored], documents[sequence[scored]])


def evaluate_streaming(
    model: RiverrunForCausalLM, documents: Iterable[Tokens], *, chunk_len: int, batch_size: int = 1
) -> PerplexityResult:
    """As `evaluate`, on whole documents, `chunk_len` tokens at a time with the state carried from chunk to chunk.

    Raises:
        ValueError: nothing to score.
    """
    tally = Tally()
    measure_streaming(model, documents, tally, chunk_len=chunk_len, batch_size=batch_size)
    return tally.result()


@torch.no_grad()
def measure_streaming(
    model: RiverrunForCausalLM, documents: Iterable[Tokens], tally: Losses, *, chunk_len: int, batch_size: int
) -> None:
    """Adds the losses of whole documents to `tally`."""
    number = 0
    with evaluating(model):
        for group in batched(documents, batch_size):
            group = [np.asarray(tokens, np.int64) for tokens in group]
            order = sorted(range(len(group)), key=lambda i: -len(group[i]))
            stream(model, [group[i] for i in order], number + np.array(order), chunk_len, tally)
            number += len(group)


def stream(
    model: RiverrunForCausalLM, tokens: list[np.ndarray], numbers: np.ndarray, chunk_len: int, tally: Losses
) -> None:
    """Documents in parallel, the longest first; a document that is over leaves the batch."""
    cache, device = model.make_cache(), _device(model)
    rows, start = len(tokens), 0
    while rows := sum(len(document) - 1 > start for document in tokens[:rows]):
        if cache.seen and rows < len(cache.next_position):  # type: ignore[arg-type]
            cache.reorder_cache(torch.arange(rows, device=device))
        width = min(chunk_len, len(tokens[0]) - 1 - start)
        parts = [document[start : start + width + 1] for document in tokens[:rows]]
        input_ids, targets = pad([(p[:-1], p[1:]) for p in parts], width)
        losses = token_losses(model, input_ids.to(device), targets.to(device), cache=cache).double().cpu().numpy()
        scored = targets.numpy() != IGNORED
        positions = np.broadcast_to(start + 1 + np.arange(width), scored.shape)
        tally.add(losses[scored], positions[scored], numbers[:rows].repeat(scored.sum(1)))
        start += width


def run(
    model: LoadedModel,
    documents: Documents,
    folder: Path,
    *,
    seq_len: int | None,
    batch_size: int,
    streaming: bool,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[PerplexityResult, TaskResult]:
    """The task as the command line runs it; a folder of the same model, data and settings is gone on with.

    Args:
        folder: for samples.jsonl.
        seq_len: tokens a segment, or a chunk if `streaming`; None: what the model was trained on, or 1024.
        batch_size: rows of segments at a time, or documents if `streaming`.

    Raises:
        ValueError: nothing to score, streaming with a model that is not Riverrun's, a length it cannot take, or another
            configuration in the folder.
    """
    seq_len = seq_len or min(model.seq_len or 1024, 1024 if not model.is_riverrun else 1 << 30)
    if seq_len < 1 or batch_size < 1:
        raise ValueError(f"seq_len={seq_len} and batch_size={batch_size} must be at least 1")
    network, recurrent, length = model.model, model.is_riverrun, seq_len
    if not recurrent and streaming:
        raise ValueError(f"streaming carries a recurrent state, which {model.description} does not offer: leave it out")
    if not recurrent and model.seq_len is not None and seq_len > model.seq_len:
        raise ValueError(f"{model.description} takes at most {model.seq_len} tokens: lower seq_len={seq_len}")
    rows = Fitting(batch_size)

    def of_segments(some: list[Tokens], batch_size: int) -> DocumentSums:
        sums = DocumentSums(len(some), OCTAVE_EDGES)
        measure(network, (packed_batches if recurrent else row_batches)(some, length, batch_size), sums)
        return sums

    def work(keys: list[Key]) -> list[dict[str, Any]]:
        some = [documents.tokens[number] for (number,) in keys]
        if streaming:
            assert isinstance(network, RiverrunForCausalLM)
            sums = DocumentSums(len(some), OCTAVE_EDGES)
            measure_streaming(network, some, sums, chunk_len=length, batch_size=len(some))
        else:
            sums = rows(partial(of_segments, some))
        return document_records(sums)

    settings = {
        "task": TASK,
        "version": VERSION,
        "seq_len": seq_len,
        "streaming": streaming,
        "data_fingerprint": documents.fingerprint,
        "model_fingerprint": model.fingerprint,
        "model_dtype": str(model.dtype),
    }
    # segments are packed: as many documents as fill the rows
    together = max(1, round(batch_size * seq_len * documents.num_documents / documents.num_tokens))
    records = collect(
        folder, settings, [(number,) for number in range(documents.num_documents)], work,
        batch_size=batch_size if streaming else together, progress=progress,
    )  # fmt: skip
    result = Tally.of(records).result()
    return result, summarize(result, documents, seq_len=seq_len, streaming=streaming)


def document_records(octaves: DocumentSums) -> list[dict[str, Any]]:
    """Samples of documents: their sums, and those by octave."""
    return [
        {"nats": float(nats.sum()), "tokens": int(tokens.sum()), **record}
        for nats, tokens, record in zip(octaves.nats, octaves.tokens, octaves.records())
    ]


def summarize(result: PerplexityResult, documents: Documents, *, seq_len: int, streaming: bool) -> TaskResult:
    """The result with its units and its data, for results.json."""
    interval = result.interval
    bits = bits_per_byte(1.0, documents.bytes_per_token)  # for a loss of one nat a token
    return TaskResult(
        TASK,
        VERSION,
        {"loss": result.loss, "perplexity": result.perplexity, "bits_per_byte": result.loss * bits},
        {
            "loss": result.stderr,
            "perplexity": result.stderr and result.perplexity * result.stderr,
            "bits_per_byte": result.stderr and bits * result.stderr,
        },
        {"loss": False, "perplexity": False, "bits_per_byte": False},
        documents.num_documents,
        documents.available,
        {
            "seq_len": seq_len,
            "streaming": streaming,
            "position": "tokens of the document seen" if streaming else "tokens of the segment seen",
            "stderr": "ratio estimator over documents, linearised; the interval is normal",
            "data_fingerprint": documents.fingerprint,
        },
        {
            "loss_95": interval and list(interval),
            "tokens_scored": result.tokens,
            "tokens": documents.num_tokens,
            "bytes": documents.num_bytes,
            "by_position": [bucket._asdict() for bucket in result.by_position],
        },
        ci95={
            "loss": interval,
            "perplexity": interval and (math.exp(min(interval[0], 700.0)), math.exp(min(interval[1], 700.0))),
            "bits_per_byte": interval and (bits * interval[0], bits * interval[1]),
        },
        sample_metrics={
            "loss": SampleMetric("nats", "tokens"),
            "perplexity": SampleMetric("nats", "tokens", exponential=True),
            "bits_per_byte": SampleMetric("nats", "tokens", scale=bits),
        },
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and then as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
