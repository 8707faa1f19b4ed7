"""Just Read Twice (arXiv 2407.05483): recall from a document that is read once, and twice, and the gain.

A recurrent model must choose what to keep of a document before it is asked; in the second reading it knows. Prompts and
sets are those of `riverrun.eval.jrt_formats`, besides "reports", generated ones (`riverrun.eval.jrt_reports`).

Scoring. Greedy generation of at most 48 tokens, up to the first newline. `contains`: an answer occurs in the output, in
any case; the papers' tables have it. `f1`: of the output's words and an answer's, the best of all answers, without
case, punctuation and articles. What is wrong by `contains` is an error of one of three kinds: no answer (no word at
all), a repetition of the prompt (at least `REPEATED` words, all of them a passage of it; the paper leaves open what it
counts), or another one.

Intervals are 95%: Wilson's (1927) for `contains`, a bootstrap over items for `f1`, and for gains a bootstrap over the
items' differences, since both prompts ask about the same items.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from rich.table import Table

from riverrun.eval.decoding.complete import opening, respond
from riverrun.eval.harness import SampleMetric, TaskResult
from riverrun.eval.intervals import bootstrap, wilson
from riverrun.eval.jrt_formats import FORMATS, Item, Prompts, prompts, read_items, usable
from riverrun.eval.jrt_reports import make_report
from riverrun.eval.models import LoadedModel
from riverrun.eval.samples import Key, collect

VERSION = 1
REPORTS, REPORTS_NUMBER = "reports", 200
MODES = Prompts._fields
METRICS = ("contains", "f1")
NEW_TOKENS = 48
REPEATED = 4  # words
ERRORS = ("no answer", "repeats the prompt", "other")


# Scoring


def contains(output: str, answers: Sequence[str]) -> bool:
    return any(re.search(re.escape(answer), output, re.IGNORECASE) for answer in answers)


def words(text: str) -> list[str]:
    """In lower case, without punctuation and articles, as SQuAD compares them."""
    return [word for word in re.sub(r"[^\w\s]", "", text.lower()).split() if word not in ("a", "an", "the")]


def token_f1(output: str, answers: Sequence[str]) -> float:
    def f1(given: list[str], wanted: list[str]) -> float:
        if not given or not wanted:
            return float(given == wanted)
        return 2 * (Counter(given) & Counter(wanted)).total() / (len(given) + len(wanted))

    return max(f1(words(output), words(answer)) for answer in answers)


def error_of(prompt: str, output: str) -> str:
    """The kind of an output that is wrong."""
    made = words(output)
    if not made:
        return ERRORS[0]
    repeated = f" {' '.join(made)} " in f" {' '.join(words(prompt))} "
    return ERRORS[1] if len(made) >= REPEATED and repeated else ERRORS[2]


# The task


@dataclass(frozen=True)
class Plan:
    """What is evaluated.

    Attributes:
        data: files or names on the hub by format; the authors' sets on the hub for formats without.
        prefix: tokens of each prompt that are read without causality, by models with prefix linear attention.

    Raises:
        ValueError: unknown or repeated formats, data for a format that is not evaluated, or lengths that leave nothing.
    """

    formats: tuple[str, ...] = (REPORTS,)
    data: Mapping[str, str] = field(default_factory=dict)
    context_length: int = 1000
    answer_length: int = 50
    seed: int = 42
    prefix: int = 0

    def __post_init__(self) -> None:
        known = [REPORTS, *FORMATS]
        for name in (*self.formats, *self.data):
            if name not in known:
                raise ValueError(f"there is no jrt format {name!r}: choose among {', '.join(known)}")
        if not self.formats or len(set(self.formats)) < len(self.formats):
            raise ValueError(f"formats={list(self.formats)} must be one or several, each once")
        if REPORTS in self.data:
            raise ValueError("reports are generated: leave out their data, or name them fda if they have its fields")
        if unused := [name for name in self.data if name not in self.formats]:
            raise ValueError(f"data for {', '.join(unused)}, which is not among the formats {', '.join(self.formats)}")
        if not 0 <= self.answer_length < self.context_length:
            raise ValueError(
                f"context_length={self.context_length} must be more than answer_length={self.answer_length}, which is "
                "kept free of it"
            )
        if self.prefix < 0:
            raise ValueError(f"prefix={self.prefix} must not be negative")

    def items(self, name: str, limit: int | None = None) -> list[Item]:
        """All items of a format, before any limit; of reports, that many, or `REPORTS_NUMBER`."""
        if name != REPORTS:
            return read_items(name, self.data.get(name))
        made = [make_report(self.seed, number) for number in range(limit or REPORTS_NUMBER)]
        return [FORMATS["fda"].item(report.text, report.key, [report.value]) for report in made]


class Question(NamedTuple):
    prompts: Prompts
    answers: tuple[str, ...]


class Questions(NamedTuple):
    """Those of a format; `available` items before the limit, `dropped` of those looked at (see `jrt_formats`)."""

    asked: list[Question]
    available: int
    dropped: int
    fingerprint: str


class Record(NamedTuple):
    """A line of samples.jsonl. `error` is None where `contains` is true."""

    format: str
    mode: str
    number: int
    answers: list[str]
    output: str
    contains: bool
    f1: float
    error: str | None


def prepare(plan: Plan, tokenizer: Any, limit: int | None = None) -> dict[str, Questions]:
    """The questions of each format, or the first `limit` of them.

    Raises:
        ValueError: a set that cannot be read, or of which nothing is left, or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} leaves nothing to evaluate: give at least 1")
    found = {}
    for name in plan.formats:
        items, asked, dropped = plan.items(name, limit), list[Question](), 0
        for item in items:
            if len(asked) == limit:
                break
            if (made := prompts(item, tokenizer, plan.context_length, plan.answer_length)) is None:
                dropped += 1
            else:
                asked.append(Question(made, usable(item.answers)))
        if not asked:
            raise ValueError(
                f"all {dropped} items of {name} are dropped: their answers are of one character, or a context_length "
                f"of {plan.context_length} tokens does not hold what is asked for; raise --context-length"
            )
        named = items if name != REPORTS else items[:1]  # the same ones, however many
        digest = hashlib.sha256(json.dumps([asdict(item) for item in named]).encode()).hexdigest()
        found[name] = Questions(asked, len(items), dropped, digest)
    return found


def settings(plan: Plan, questions: Mapping[str, Questions], model: LoadedModel) -> dict[str, Any]:
    """What samples of one folder share, as JSON types."""
    found = asdict(plan) | {
        "data": {name: each.fingerprint for name, each in questions.items()},
        "version": VERSION,
        "model_fingerprint": model.fingerprint,
        "model_dtype": str(model.dtype),
        "tokenizer_fingerprint": model.require_tokenizer().fingerprint,
    }
    return json.loads(json.dumps(found))


def evaluate(
    questions: Mapping[str, Questions],
    folder: Path,
    config: dict[str, Any],
    answer: Callable[[list[str]], list[str]],
    *,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Record]:
    """All records: those in `folder`, and the rest; in the order of formats, modes, items.

    Args:
        answer: prompts → the texts that follow them.
        progress: told of records done and of all.

    Raises:
        ValueError: see `collect`.
    """

    def work(keys: list[Key]) -> list[dict[str, Any]]:
        asked = [questions[name].asked[number] for name, _, number in keys]
        given = [getattr(question.prompts, mode) for question, (_, mode, _) in zip(asked, keys)]
        found = []
        for (name, mode, number), question, prompt, text in zip(keys, asked, given, answer(given)):
            output = text.split("\n", 1)[0]
            right = contains(output, question.answers)
            f1, error = token_f1(output, question.answers), None if right else error_of(prompt, output)
            found.append(Record(name, mode, number, list(question.answers), output, right, f1, error)._asdict())
        return found

    keys: list[Key] = [
        (name, mode, number) for name, each in questions.items() for mode in MODES for number in range(len(each.asked))
    ]
    found = collect(folder, config, keys, work, batch_size=batch_size, group=lambda key: key[:2], progress=progress)
    return [Record(**record) for record in found]


def run(
    model: LoadedModel,
    plan: Plan,
    folder: Path,
    *,
    batch_size: int,
    limit: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Record], list[TaskResult]]:
    """The task as the command line runs it; a folder of the same plan and model is gone on with.

    Args:
        limit: items of each format; None: all, and `REPORTS_NUMBER` reports.

    Raises:
        ValueError: prompts that the model cannot take, no tokenizer, no data, another configuration there.
    """
    tokenizer = model.require_tokenizer()
    questions = prepare(plan, tokenizer, limit)
    if not model.is_riverrun and model.seq_len is not None:
        longest = max(len(tokenizer.encode(q.prompts.twice)) for each in questions.values() for q in each.asked)
        if (needed := longest + len(opening(model)) + NEW_TOKENS) > model.seq_len:
            raise ValueError(
                f"{model.description} takes at most {model.seq_len} tokens, but a document read twice and its answer "
                f"take {needed}: lower --context-length"
            )
    config = settings(plan, questions, model)
    answer = partial(respond, model, max_new_tokens=NEW_TOKENS, prefix=plan.prefix)
    records = evaluate(questions, folder, config, answer, batch_size=batch_size, progress=progress)
    return records, summarize(records, questions, config)


class Figure(NamedTuple):
    """A mean over items, its standard error (None of a single item) and its 95% interval."""

    value: float
    stderr: float | None
    low: float
    high: float


def figures(records: Sequence[Record]) -> dict[str, Figure]:
    """`contains` and `f1` of one format in each mode, and their gains: twice minus once, item by item."""
    found, by_mode = {}, {mode: [r for r in records if r.mode == mode] for mode in MODES}
    for metric in METRICS:
        values = {mode: [float(getattr(r, metric)) for r in own] for mode, own in by_mode.items()}
        for mode, own in values.items():
            interval = wilson(fmean(own), len(own)) if metric == "contains" else bootstrap(own)
            found[f"{metric}_{mode}"] = _figure(own, interval)
        gains = [twice - once for once, twice in zip(*values.values(), strict=True)]
        found[f"{metric}_gain"] = _figure(gains, bootstrap(gains))
    return found


def _figure(values: list[float], interval: tuple[float, float]) -> Figure:
    stderr = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return Figure(fmean(values), stderr, *interval)


def errors(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """The share of all items that is an error of each kind, by mode."""
    found = {}
    for mode in MODES:
        kinds = [record.error for record in records if record.mode == mode]
        found[mode] = {kind: kinds.count(kind) / len(kinds) for kind in ERRORS}
    return found


def _of(records: Sequence[Record], name: str) -> list[Record]:
    return [record for record in records if record.format == name]


def summarize(
    records: Sequence[Record], questions: Mapping[str, Questions], config: dict[str, Any]
) -> list[TaskResult]:
    """A result a format."""
    results = []
    for name, each in questions.items():
        found = figures(own := _of(records, name))
        results.append(
            TaskResult(
                f"jrt_{name}",
                VERSION,
                {metric: figure.value for metric, figure in found.items()},
                {metric: figure.stderr for metric, figure in found.items()},
                dict.fromkeys(found, True),
                len(each.asked),
                each.available,
                {**config, "formats": [name], "data": {name: each.fingerprint}, "new_tokens": NEW_TOKENS},
                {f"{metric}_95": [figure.low, figure.high] for metric, figure in found.items()}
                | {"dropped": each.dropped, "errors": errors(own)},
                sample_metrics={
                    f"{metric}_{mode}": SampleMetric(metric, where={"format": name, "mode": mode})
                    for metric in METRICS
                    for mode in MODES
                },
            )
        )
    return results


def tables(records: Sequence[Record]) -> list[Table]:
    """A line a format, in per cent: `contains` with its intervals; the words' F1 and what is wrong."""
    main, rest = Table(title="an answer in the output, %, and 95% intervals"), Table(title="F1 and errors, %")
    for found, heads in (
        (main, ("format", "items", "once", "twice", "gain")),
        (rest, ("format", "reading", "F1", *ERRORS)),
    ):
        for head in heads:
            found.add_column(head, justify="left" if head in ("format", "reading") else "right")
    for name in dict.fromkeys(record.format for record in records):
        own = _of(records, name)
        of, kinds = figures(own), errors(own)
        shown = [of[f"contains_{key}"] for key in (*MODES, "gain")]
        main.add_row(
            name,
            str(len(own) // len(MODES)),
            *(f"{100 * each.value:.1f}\n{100 * each.low:.1f} to {100 * each.high:.1f}" for each in shown),
        )
        for mode, reading in zip(MODES, ("once", "twice")):
            wrong = (f"{100 * kinds[mode][kind]:.1f}" for kind in ERRORS)
            rest.add_row(name, reading, f"{100 * of[f'f1_{mode}'].value:.1f}", *wrong)
    return [main, rest]


def plot(records: Sequence[Record], path: Path, title: str) -> None:
    """Bars of `contains` once and twice, and of the gain, each with its interval; as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(record.format for record in records))
    by_name = [figures(_of(records, name)) for name in names]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(3.5 + 1.6 * len(names), 3.8), width_ratios=[2, 1], layout="constrained"
    )
    bars = {"once": (left, -0.2, "default"), "twice": (left, 0.2, "twice"), "gain": (right, 0.0, "gain")}
    for label, (axes, shift, key) in bars.items():
        found = [of[f"contains_{key}"] for of in by_name]
        heights = [100 * each.value for each in found]
        below, above = ([each.value - each.low for each in found], [each.high - each.value for each in found])
        reach = [[100 * max(0.0, length) for length in side] for side in (below, above)]  # rounding may cross zero
        places = [i + shift for i in range(len(names))]
        axes.bar(places, heights, 0.38, yerr=reach, capsize=3, label=label, color="C2" if key == "gain" else None)
    for axes, heading in ((left, "an answer in the output (%)"), (right, "gain (points)")):
        axes.set_xticks(range(len(names)), names)
        axes.set_title(heading, fontsize=9)
        axes.grid(axis="y", alpha=0.3)
    left.set_ylim(0, 105)
    left.legend()
    right.axhline(0, color="black", linewidth=0.8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=144)
    plt.close(figure)
