"""How much a model repeats itself under one decoding or another, and what each costs in recall.

Continuations of a set of prompts (`riverrun.eval.repetition.tasks`), scored for each decoding of the registry:

    code  EGP, share that ends; TR-N and TR-S, repetition of structure; CCP, share that compiles (arXiv 2505.10402)
    text  rep-n, rep-w, rep-r, rep-sen, diversity (arXiv 2206.02369), beside the text's own continuation ("reference")

with length, seconds and perplexity under the model itself. The reference has rep/l and wrep of the model's likeliest
next tokens, too, looking back into the prompt and the continuation only. Recall: passkeys under each decoding,
for what must be copied from the prompt is repetition as well. Self-reinforcement: `riverrun.eval.repetition.curves`.

Intervals are 95%: Wilson's for shares of samples, else a bootstrap over samples. Metrics of a continuation too short
for them are null, and left out of means.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from riverrun.eval.decoding.complete import opening
from riverrun.eval.decoding.decode import decode, require_forking
from riverrun.eval.decoding.registry import Decoding
from riverrun.eval.decoding.stream import continuation
from riverrun.eval.documents import open_documents
from riverrun.eval.harness import SampleMetric, TaskResult
from riverrun.eval.haystack import KINDS, Cell, make_sample
from riverrun.eval.intervals import bootstrap, wilson
from riverrun.eval.models import LoadedModel
from riverrun.eval.repetition import curves, metrics
from riverrun.eval.repetition.curves import Curve
from riverrun.eval.repetition.library import documents
from riverrun.eval.repetition.predictions import predict
from riverrun.eval.repetition.report import HIGHER, SHARES, SHOWN, Figure, Findings, Row
from riverrun.eval.repetition.tasks import Item, Output, code_items, fingerprint, score_code, score_text, text_items
from riverrun.eval.samples import Key, collect
from riverrun.eval.tasks.needle import is_correct

VERSION = 1
REFERENCE = "reference"
RESAMPLES = 1000
SETS = {"code": 256, "text": 100}  # new tokens
LOOKING = (16, 32, 128, 512)  # tokens back
PASSKEY = "passkey"


@dataclass(frozen=True)
class Plan:
    """What is evaluated.

    Attributes:
        set: code or text.
        data: prompts in CodeRepetEval's format, or texts; None: what the standard library gives.
        max_new_tokens: None: 256 of code, 100 of text.
        recall: passkeys asked for under each decoding; recall_length: tokens of each, prompt and answer.
        sentences: of each set of the curves; copies: of each sentence.

    Raises:
        ValueError: an unknown set, or counts below 1 (below 0 of what may be left out).
    """

    decodings: tuple[Decoding, ...]
    set: str = "code"
    data: Path | None = None
    limit: int = 32
    max_new_tokens: int | None = None
    recall: int = 8
    recall_length: int = 512
    sentences: int = 16
    copies: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.set not in SETS:
            raise ValueError(f"there is no set {self.set!r}: choose among {', '.join(SETS)}")
        if self.limit < 1:
            raise ValueError(f"a limit of {self.limit} prompts leaves nothing to evaluate: give at least 1")
        if self.new_tokens < 1 or self.recall < 0 or self.sentences < 0 or self.copies < 2:
            raise ValueError(
                f"max_new_tokens={self.new_tokens} must be at least 1, copies={self.copies} at least 2, and recall="
                f"{self.recall} and sentences={self.sentences} not negative"
            )

    @property
    def new_tokens(self) -> int:
        return SETS[self.set] if self.max_new_tokens is None else self.max_new_tokens


# Continuations


def evaluate(
    items: Sequence[Item],
    plan: Plan,
    folder: Path,
    config: dict[str, Any],
    answer: Callable[[Decoding, list[Item]], list[Output]],
    log_likelihood: Callable[[list[Item], list[list[int]]], list[tuple[float, dict[str, Any]]]],
    *,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    decode_text: Callable[[Item], str] = lambda item: "",
) -> list[dict[str, Any]]:
    """The records of all decodings, and of the reference; in the order of decodings, items.

    Args:
        answer: continues items.
        log_likelihood: of continuations, in nats, and more that the reference's records hold.
        decode_text: an item's reference as text.

    Raises:
        ValueError: see `collect`.
    """
    score = score_code if plan.set == "code" else score_text
    by_spec = {decoding.spec: decoding for decoding in plan.decodings}

    def work(keys: list[Key]) -> list[dict[str, Any]]:
        spec, some = keys[0][0], [items[number] for _, number in keys]
        began = time.perf_counter()
        if spec == REFERENCE:
            outputs, seconds = [Output(item.reference, decode_text(item), False) for item in some], None
        else:
            outputs = answer(by_spec[spec], some)
            seconds = (time.perf_counter() - began) / len(keys)
        likelihoods = log_likelihood(some, [out.tokens for out in outputs])
        found = []
        for key, item, out, scores, (log_p, more) in zip(keys, some, outputs, score(some, outputs), likelihoods):
            nll = -log_p / len(out.tokens) if out.tokens else None
            record = {"decoding": spec, "number": key[1], "source": item.source, "output": out.text}
            record |= {"ended": out.ended, "length": len(out.tokens), "seconds": seconds, "nll": nll, **scores}
            found.append(record | (more if spec == REFERENCE else {}))
        return found

    specs = [*([REFERENCE] if all(item.reference for item in items) else []), *by_spec]
    keys: list[Key] = [(spec, number) for spec in specs for number in range(len(items))]
    return collect(
        folder, config, keys, work, batch_size=batch_size, group=lambda key: key[0], progress=progress
    )  # fmt: skip


def answer_with(
    model: LoadedModel, max_new_tokens: int, seed: int, decoding: Decoding, items: list[Item]
) -> list[Output]:
    tokenizer = model.require_tokenizer()
    made = decode(model, decoding, [item.tokens for item in items], max_new_tokens, seed)
    return [
        Output(tokens, continuation(tokenizer, item.tokens, tokens), len(tokens) < max_new_tokens)
        for item, tokens in zip(items, made)
    ]


def likelihood_under(
    model: LoadedModel, items: list[Item], continuations: list[list[int]]
) -> list[tuple[float, dict[str, Any]]]:
    """Of each continuation, and for each l the rates of `metrics.looking_back` over prompt and continuation."""
    rows = [item.tokens + tokens for item, tokens in zip(items, continuations)]
    found = []
    for item, row, predictions in zip(items, rows, predict(model, rows)):
        looking = {}
        for l in LOOKING:
            if l < len(row) and (rates := metrics.looking_back(row, predictions.likeliest.tolist(), l)):
                looking[str(l)] = list(rates)
        found.append((float(predictions.log_p[len(item.tokens) - 1 :].sum()), {"looking": looking}))
    return found


# Recall


def recall(
    plan: Plan,
    folder: Path,
    config: dict[str, Any],
    model: LoadedModel,
    answer: Callable[[Decoding, list[list[int]], int], list[list[int]]],
    *,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Passkeys under each decoding, the same ones.

    Raises:
        ValueError: a length that is too short; see `collect`.
    """
    tokenizer, begin = model.require_tokenizer(), opening(model)
    by_spec = {decoding.spec: decoding for decoding in plan.decodings}
    samples = [
        make_sample(Cell(PASSKEY, plan.recall_length, (i % 5) / 4, i), tokenizer, None, plan.seed, len(begin))
        for i in range(plan.recall)
    ]

    def work(keys: list[Key]) -> list[dict[str, Any]]:
        some = [samples[number] for _, number in keys]
        prompts = [begin + tokenizer.encode(sample.prompt) for sample in some]
        found = []
        for key, sample, prompt, made in zip(
            keys, some, prompts, answer(by_spec[keys[0][0]], prompts, KINDS[PASSKEY].new_tokens)
        ):
            output = continuation(tokenizer, prompt, made)
            right = is_correct(PASSKEY, sample.answer, output)
            found.append(
                {"decoding": key[0], "number": key[1], "answer": sample.answer, "output": output, "recall": right}
            )
        return found

    keys: list[Key] = [(spec, number) for spec in by_spec for number in range(len(samples))]
    return collect(
        folder, config, keys, work, batch_size=batch_size, group=lambda key: key[0], progress=progress
    )  # fmt: skip


# The task


def run(
    model: LoadedModel,
    plan: Plan,
    folder: Path,
    *,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Findings, list[TaskResult]]:
    """The task as the command line runs it: continuations in `folder`, passkeys and curves in folders below. What is
    there of the same plan and model is gone on with; decodings may be added.

    Raises:
        ValueError: prompts that the model cannot take, data that cannot be read, decodings that the model does not
            support, another configuration there.
    """
    tokenizer = model.require_tokenizer()
    if any(decoding.name == "contrastive" for decoding in plan.decodings):
        require_forking(model)
    if plan.set == "code":
        items = code_items(model, plan.data, plan.limit, plan.seed)
    else:
        items = text_items(model, plan.data, plan.limit, plan.new_tokens, plan.seed)
    longest = max(len(item.tokens) for item in items) + plan.new_tokens
    needed = max(longest, plan.recall_length if plan.recall else 0)
    if not model.is_riverrun and model.seq_len is not None and needed > model.seq_len:
        raise ValueError(
            f"{model.description} takes at most {model.seq_len} tokens, but prompts and continuations take up to "
            f"{longest}, passkeys {plan.recall_length}: lower --max-new-tokens and --recall-length, or give --no-recall"
        )
    shared = {
        "version": VERSION,
        "set": plan.set,
        "seed": plan.seed,
        "model_fingerprint": model.fingerprint,
        "model_dtype": str(model.dtype),
        "tokenizer_fingerprint": tokenizer.fingerprint,
    }
    config = shared | {"max_new_tokens": plan.new_tokens, "prompts": fingerprint(items)}
    records = evaluate(
        items, plan, folder, config, partial(answer_with, model, plan.new_tokens, plan.seed),
        partial(likelihood_under, model), batch_size=batch_size, progress=progress,
        decode_text=lambda item: continuation(tokenizer, item.tokens, item.reference),
    )  # fmt: skip
    passkeys: list[dict[str, Any]] = []
    if plan.recall:
        own = shared | {"recall": plan.recall, "recall_length": plan.recall_length}
        answer = partial(_answer_tokens, model, plan.seed)
        passkeys = recall(plan, folder / "recall", own, model, answer, batch_size=batch_size)
    found: list[Curve] = []
    if plan.sentences:
        pairs = curves.text_pairs(_texts(model, plan), plan.sentences)
        if len(pairs) < plan.sentences:
            raise ValueError(
                f"{plan.data} has {len(pairs)} pairs of sentences: lower --sentences {plan.sentences}; 0: no curves"
            )
        own = shared | {"copies": plan.copies, "pairs": [list(pair) for pair in pairs]}
        found = curves.run(
            model, pairs, folder / "curves", own, copies=plan.copies, seed=plan.seed, batch_size=batch_size
        )  # fmt: skip
    findings = summarize(plan, records, passkeys, found)
    return findings, results(findings, config, len(items))


def _answer_tokens(
    model: LoadedModel, seed: int, decoding: Decoding, prompts: list[list[int]], new_tokens: int
) -> list[list[int]]:
    return decode(model, decoding, prompts, new_tokens, seed)


def _texts(model: LoadedModel, plan: Plan) -> Iterable[str]:
    """Where the curves' sentences come from."""
    if plan.set == "code" or plan.data is None:
        return documents(plan.seed)
    tokenizer = model.require_tokenizer()
    given = open_documents(plan.data, model).tokens
    return (tokenizer.decode([int(token) for token in tokens[:-1]]) for tokens in given)


# Results


def summarize(
    plan: Plan, records: Sequence[dict[str, Any]], passkeys: Sequence[dict[str, Any]], found: list[Curve]
) -> Findings:
    rows = []
    for spec in dict.fromkeys(record["decoding"] for record in records):
        own = [record for record in records if record["decoding"] == spec]
        figures = {name: figure(name, [r[name] for r in own]) for name in (*SHOWN[plan.set], "length", "seconds")}
        figures["perplexity"] = _exponential(figure("nll", [r["nll"] for r in own]))
        if answers := [float(r["recall"]) for r in passkeys if r["decoding"] == spec]:
            figures["recall"] = figure("recall", answers)
        rows.append(Row(spec, len(own), figures))
    looking = {}
    for l in LOOKING:
        rates = [r["looking"][str(l)] for r in records if str(l) in r.get("looking", {})]
        if rates:
            looking[l] = metrics.Looking(*(float(rate) for rate in np.mean(rates, axis=0)))
    return Findings(plan.set, rows, looking, found)


def figure(name: str, values: Sequence[float | None]) -> Figure:
    """A metric over samples."""
    known = [float(value) for value in values if value is not None]
    if not known:
        return Figure(None, None, None)
    mean = fmean(known)
    stderr = stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None
    return Figure(mean, stderr, wilson(mean, len(known)) if name in SHARES else bootstrap(known, RESAMPLES))


def _exponential(nll: Figure) -> Figure:
    """Perplexity and its interval; its standard error by the delta method."""
    if nll.value is None or nll.interval is None:
        return nll
    value, stderr = math.exp(nll.value), nll.stderr
    return Figure(value, None if stderr is None else value * stderr, tuple(map(math.exp, nll.interval)))  # type: ignore


def results(findings: Findings, config: dict[str, Any], count: int) -> list[TaskResult]:
    """A result a decoding, and one a curve."""
    made = []
    for row in findings.rows:
        where = {"decoding": row.decoding}
        samples = {
            name: SampleMetric("nll" if name == "perplexity" else name, where=where, exponential=name == "perplexity")
            for name in row.metrics
            if name not in ("recall", "seconds")
        }
        is_reference = row.decoding == REFERENCE
        made.append(
            TaskResult(
                f"repetition_{findings.set}_{row.decoding}",
                VERSION,
                {name: each.value for name, each in row.metrics.items()},
                {name: each.stderr for name, each in row.metrics.items()},
                {name: name in HIGHER for name in row.metrics},
                row.samples,
                count,
                {**config, "decoding": row.decoding},
                {"looking": {str(l): rates._asdict() for l, rates in findings.looking.items()}} if is_reference else {},
                ci95={name: each.interval for name, each in row.metrics.items()},
                sample_metrics=samples,
            )
        )
    for curve in findings.curves:
        ends = {"ap_first": curve.ap[0], "ap_last": curve.ap[-1], "ip_first": curve.ip[1], "ip_last": curve.ip[-1]}
        ends |= {"wr_first": curve.wr[0], "wr_last": curve.wr[-1]}
        made.append(
            TaskResult(
                f"self_reinforcement_{curve.set}", VERSION, dict(ends), dict.fromkeys(ends), dict.fromkeys(ends, False),
                curve.sentences, curve.sentences, {**config, "copies": len(curve.ap)}, asdict(curve),
            )
        )  # fmt: skip
    return made
