"""Self-reinforcement (DITTO, arXiv 2206.02369, §3): what repeating a sentence does to its own probability.

A sentence follows a context n + 1 times. With p_{n,l} the probability of its token l in copy n, given all before it,

    AP(n)  mean of p_{n,l}
    IP(n)  share of tokens with p_{n,l} > p_{0,l}
    WR(n)  share of tokens that were the likeliest ("winners")

over the tokens of all sentences. Sets: `random`, tokens drawn alike, as many as the text's; `text`, sentences of a
text, after the one before them; `own`, of the model's own samples. Expected of a model trained on text alone: AP and WR
rise and saturate, least for random tokens.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from riverrun.eval.decoding.decode import decode
from riverrun.eval.decoding.registry import parse_decoding
from riverrun.eval.decoding.stream import continuation
from riverrun.eval.models import LoadedModel
from riverrun.eval.repetition.library import prose
from riverrun.eval.repetition.metrics import split_sentences
from riverrun.eval.repetition.predictions import predict
from riverrun.eval.samples import Key, collect
from riverrun.train.data.tokenizer import Tokenizer

SETS = ("random", "text", "own")
LONGEST = 64  # tokens of a sentence or its context
SAMPLED, TRIES = 128, 20  # tokens of an own sample; samples that may be empty


@dataclass(frozen=True)
class Repeated:
    context: list[int]
    sentence: list[int]

    def row(self, copies: int) -> list[int]:
        return self.context + copies * self.sentence


@dataclass(frozen=True)
class Curve:
    """A set's curves, by copy; copy 0 is the first occurrence."""

    set: str
    sentences: int
    ap: list[float]
    ip: list[float]
    wr: list[float]


def begin(model: LoadedModel) -> list[int]:
    """The token that stands before a text: what ends the one before it or, for other models, what begins one."""
    tokenizer = model.require_tokenizer()
    return [tokenizer.eos_id if model.is_riverrun or tokenizer.bos_id is None else tokenizer.bos_id]


def text_pairs(texts: Iterable[str], count: int) -> list[tuple[str, str]]:
    """The first `count` pairs of neighbouring sentences, two of a text at most."""
    found: list[tuple[str, str]] = []
    for text in texts:
        sentences = prose(text)
        found += list(zip(sentences[::2], sentences[1::2]))[:2]
        if len(found) >= count:
            break
    return found[:count]


def make(model: LoadedModel, kind: str, number: int, pair: tuple[str, str], seed: int) -> Repeated:
    """Sentence `number` of a set, where `pair` is that of the text.

    Raises:
        ValueError: the model's samples are empty.
    """
    tokenizer, start = model.require_tokenizer(), begin(model)
    if kind == "own":
        pair_or_halves = _own(model, number, seed)
        return Repeated(start + pair_or_halves[0], pair_or_halves[1])
    context, sentence = _encode(tokenizer, pair)
    if kind == "random":
        rng = random.Random(f"{seed}/random/{number}")
        special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
        vocabulary = [token for token in range(tokenizer.vocab_size) if token not in special]
        context, sentence = rng.choices(vocabulary, k=len(context)), rng.choices(vocabulary, k=len(sentence))
    return Repeated(start + context, sentence)


def _encode(tokenizer: Tokenizer, pair: Sequence[str]) -> tuple[list[int], list[int]]:
    return tokenizer.encode(pair[0])[-LONGEST:], tokenizer.encode(f" {pair[1]}")[:LONGEST]


def _own(model: LoadedModel, number: int, seed: int) -> tuple[list[int], list[int]]:
    """The first two sentences of a sample, or its two halves."""
    tokenizer, start = model.require_tokenizer(), begin(model)
    drawing = parse_decoding("sample:temperature=1.0,top_p=1.0")
    for attempt in range(TRIES):
        made = decode(model, drawing, [start], SAMPLED, seed=seed + 1 + number * TRIES + attempt)[0]
        if len(made) >= 2:
            sentences = split_sentences(continuation(tokenizer, start, made))
            if len(sentences) >= 2:
                return _encode(tokenizer, sentences)
            half = len(made) // 2
            return made[:half][-LONGEST:], made[half:][:LONGEST]
    raise ValueError(f"{model.description} ends its own samples at once: leave the curves out with --sentences 0")


def measure(model: LoadedModel, sentences: list[Repeated], copies: int) -> list[dict[str, Any]]:
    """A record each: its number of tokens, and AP, IP and WR by copy."""
    found = []
    for repeated, predictions in zip(sentences, predict(model, [each.row(copies) for each in sentences])):
        first, length = len(repeated.context) - 1, len(repeated.sentence)
        p = np.exp(predictions.log_p[first:]).reshape(copies, length)
        wins = predictions.likeliest[first:].reshape(copies, length) == np.array(repeated.sentence)
        values = {"ap": p.mean(1), "ip": (p > p[0]).mean(1), "wr": wins.mean(1)}
        found.append({"tokens": length} | {name: value.tolist() for name, value in values.items()})
    return found


def run(
    model: LoadedModel,
    pairs: list[tuple[str, str]],
    folder: Path,
    config: dict[str, Any],
    *,
    copies: int,
    seed: int,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Curve]:
    """The curves of all sets; sentences that are in `folder` are not measured again.

    Raises:
        ValueError: rows that the model cannot take; see `collect`.
    """
    if not model.is_riverrun and model.seq_len is not None:
        longest = 1 + LONGEST + copies * LONGEST
        if longest > model.seq_len:
            raise ValueError(
                f"{model.description} takes at most {model.seq_len} tokens, {copies} copies of a sentence up to "
                f"{longest}: lower --copies, or leave the curves out with --sentences 0"
            )

    def work(keys: list[Key]) -> list[dict[str, Any]]:
        return measure(model, [make(model, kind, i, pairs[i], seed) for kind, i in keys], copies)

    keys: list[Key] = [(kind, number) for kind in SETS for number in range(len(pairs))]
    records = collect(
        folder, config, keys, work, batch_size=batch_size, group=lambda key: key[0], progress=progress
    )  # fmt: skip
    return [average(kind, [r for r, key in zip(records, keys) if key[0] == kind]) for kind in SETS]


def average(kind: str, records: list[dict[str, Any]]) -> Curve:
    """Over tokens: sentences count by their lengths."""
    weights = [record["tokens"] for record in records]
    curves = {name: np.average([r[name] for r in records], axis=0, weights=weights) for name in ("ap", "ip", "wr")}
    return Curve(kind, len(records), **{name: curve.tolist() for name, curve in curves.items()})


def plot(curves: Sequence[Curve], path: Path, title: str) -> None:
    """AP, IP and WR over copies, a line a set; as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(11, 3.8), sharey=True, layout="constrained")
    names = {"ap": "AP: mean probability", "ip": "IP: above the first copy", "wr": "WR: likeliest"}
    for axes, (name, words) in zip(panels, names.items()):
        for curve in curves:
            values = asdict(curve)[name]
            first = int(name == "ip")  # which the first copy has none of
            axes.plot(range(first, len(values)), values[first:], linewidth=2, label=curve.set)
        axes.set(title=words, xlabel="copy", ylim=(-0.02, 1.02))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("share of tokens, or probability")
    panels[-1].legend()
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=144)
    plt.close(figure)
