"""What is continued: prompts of code or of text, and how continuations of each are scored."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from riverrun.eval.batches import Tokens
from riverrun.eval.decoding.complete import opening
from riverrun.eval.documents import open_documents
from riverrun.eval.models import LoadedModel
from riverrun.eval.repetition import metrics
from riverrun.eval.repetition.code_metrics import compiles, complete_lines, tr_n, tr_s
from riverrun.eval.repetition.code_set import code_prompts, read_prompts
from riverrun.eval.repetition.library import documents

PREFIX = 50  # tokens of a text's prompt


@dataclass(frozen=True)
class Item:
    """Attributes:
    source: for people.
    text: the prompt.
    tokens: the prompt's.
    reference: tokens that followed in the text; empty if unknown.
    """

    source: str
    text: str
    tokens: list[int]
    reference: list[int]


@dataclass(frozen=True)
class Output:
    """A continuation. `ended`: by the end-of-sequence token."""

    tokens: list[int]
    text: str
    ended: bool


def fingerprint(items: Sequence[Item]) -> str:
    return hashlib.sha256(json.dumps([asdict(item) for item in items]).encode()).hexdigest()


# Code


def code_items(model: LoadedModel, data: Path | None, limit: int, seed: int) -> list[Item]:
    prompts = code_prompts(limit, seed) if data is None else read_prompts(data, limit)
    tokenizer, begin = model.require_tokenizer(), opening(model)
    return [Item(prompt.source, prompt.text, begin + tokenizer.encode(prompt.text), []) for prompt in prompts]


def score_code(items: Sequence[Item], outputs: Sequence[Output]) -> list[dict[str, Any]]:
    """EGP, TR-N, TR-S, CCP (of prompt and continuation) and rep-4 of each."""
    whole = [complete_lines(item.text + out.text, out.ended) for item, out in zip(items, outputs)]
    found = []
    for out, compiled in zip(outputs, compiles(whole)):
        structure = complete_lines(out.text, out.ended)
        found.append(
            {"egp": float(out.ended), "tr_n": tr_n(structure), "tr_s": tr_s(structure), "ccp": float(compiled)}
            | {"rep_4": metrics.rep_n(out.tokens, 4)}
        )
    return found


# Text


def text_items(model: LoadedModel, data: Path | None, limit: int, new_tokens: int, seed: int) -> list[Item]:
    """Windows of `PREFIX` + `new_tokens` tokens: the first of each document, then the second of each, and so on.

    Raises:
        ValueError: documents that are all shorter than a window.
    """
    tokenizer = model.require_tokenizer()
    given: Sequence[Tokens]
    if data is None:
        given = [opening(model) + tokenizer.encode(text) for text in islice(documents(seed), 2 * limit)]
    else:
        given = [tokens[:-1] for tokens in open_documents(data, model).tokens]  # without the end-of-sequence token
    found = []
    for number, (source, window) in enumerate(islice(_windows(given, PREFIX + new_tokens), limit)):
        prompt, reference = window[:PREFIX], window[PREFIX:]
        found.append(Item(f"{source}/{number}", tokenizer.decode(prompt), prompt, reference))
    if not found:
        raise ValueError(
            f"no document has the {PREFIX + new_tokens} tokens of a prompt and a continuation: lower "
            "--max-new-tokens, or give longer texts"
        )
    return found


def _windows(documents: Sequence[Tokens], size: int) -> Iterator[tuple[str, list[int]]]:
    for place in count():
        fitting = [(i, tokens) for i, tokens in enumerate(documents) if len(tokens) >= (place + 1) * size]
        if not fitting:
            return
        for i, tokens in fitting:
            yield f"text/{i}", [int(token) for token in tokens[place * size : (place + 1) * size]]


def score_text(items: Sequence[Item], outputs: Sequence[Output]) -> list[dict[str, Any]]:
    """rep-1 to rep-4, rep-w, rep-r, rep-sen and diversity of each."""
    return [
        {f"rep_{n}": metrics.rep_n(out.tokens, n) for n in (1, 2, 3, 4)}
        | {"rep_w": metrics.rep_w(out.tokens), "rep_r": metrics.rep_r(out.tokens)}
        | {"rep_sen": metrics.rep_sen(out.text), "diversity": metrics.diversity(out.tokens)}
        for out in outputs
    ]
