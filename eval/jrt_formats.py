"""Questions about documents read once or twice: the prompts of Just Read Twice (arXiv 2407.05483), zero-shot.

    format              read once (default)  twice
    fda, swde           D K:                 Information about K. D ⏎ D K:
    squad               P                    Q C ⏎ P
    nq, triviaqa, drop  D S                  Q D ⏎ D S

D, the document, ends with exactly one full stop. K is the key asked for, its first letter in upper case; Q the
question; S the same as a statement to complete; C a passage, and P that passage with such a statement at its end.

Truncation: D keeps `context_length` − `answer_length` tokens, half of them before the first occurrence of an answer, as
far as its ends allow; without an occurrence, its first ones. Items are dropped whose answers have at most one
character; of fda and swde, those whose key lies outside what is kept; of squad, whose cloze is a part of the passage,
those that are longer.

Sets are JSON lines with the fields of `FORMATS`, which are those of the authors' sets on the Hugging Face hub.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from riverrun.train.data.tokenizer import Tokenizer

SPLIT = "validation"  # of the sets on the hub
SUMMARY = re.compile("summary of information above", re.IGNORECASE)  # SWDE's documents go on with a summary
MARKERS = re.compile(r"\[(?:PAR|DOC|TLE)\]")  # of TriviaQA's web pages


class Prompts(NamedTuple):
    """The same question after its document was read once, and twice."""

    default: str
    twice: str


@dataclass(frozen=True)
class Item:
    """A question before truncation.

    Attributes:
        lead: what the twice prompt opens with, the question in it.
        document: cleaned, without the full stop.
        cue: what is to be completed.
        key: that must be in what is kept of the document.
        passage: what is read first where it is not the document; nothing is truncated then.
    """

    lead: str
    document: str
    cue: str
    answers: tuple[str, ...]
    key: str | None = None
    passage: str | None = None


@dataclass(frozen=True)
class Format:
    """Attributes:
    fields: of a JSON line: texts, the last one the answer, or a list of answers that count.
    hub: the authors' set.
    """

    fields: tuple[str, ...]
    hub: str
    item: Callable[..., Item]


def _report(text: str, key: str, value: Sequence[str]) -> Item:
    text = _without_ending(text, f"{key}:")
    name = key[0].upper() + key[1:]
    return Item(f"Information about {name}.", text.strip("\n").rstrip("."), f"{name}:", tuple(value), key)


def _web_page(text: str, key: str, value: Sequence[str]) -> Item:
    return _report(SUMMARY.split(text)[0].rstrip(), key, value)


def _cloze(text: str, context: str, question: str, value: Sequence[str]) -> Item:
    return Item(question, text.strip(), "", tuple(value), passage=context.split("Question:")[0].strip())


def _passage(context: str, question: str, orig_question: str, answers: Sequence[str]) -> Item:
    context = _without_ending(context.strip(), question.strip()).strip().rstrip(".").rstrip()
    return Item(orig_question.strip().rstrip(":"), context, question.strip(), tuple(answers))


def _web_passage(context: str, **rest: Any) -> Item:
    return _passage(MARKERS.sub("", context), **rest)


REPORT, CLOZE = ("text", "key", "value"), ("text", "context", "question", "value")
PASSAGE = ("context", "question", "orig_question", "answers")
FORMATS = {
    "fda": Format(REPORT, "hazyresearch/based-fda", _report),
    "swde": Format(REPORT, "hazyresearch/based-swde-v2", _web_page),
    "squad": Format(CLOZE, "hazyresearch/based-squad", _cloze),
    "nq": Format(PASSAGE, "hazyresearch/based_nq_1024", _passage),
    "triviaqa": Format(PASSAGE, "hazyresearch/based_triviaqa", _web_passage),
    "drop": Format(PASSAGE, "hazyresearch/based_drop", _passage),
}


def _without_ending(text: str, ending: str) -> str:
    """Without any number of them, in any case."""
    text = text.rstrip()
    while ending and text.lower().endswith(ending.lower()):
        text = text[: -len(ending)].rstrip()
    return text


# prompts


def prompts(item: Item, tokenizer: Tokenizer, context_length: int, answer_length: int) -> Prompts | None:
    """Of the truncated document; None: the item is dropped."""
    answers = usable(item.answers)
    if not answers:
        return None
    budget = context_length - answer_length
    if item.passage is not None:
        if len(tokenizer.encode(item.document)) > budget:
            return None
        return Prompts(item.document, f"{item.lead} {item.passage}\n{item.document}")
    at = min((found for a in answers if (found := item.document.lower().find(a.lower())) >= 0), default=0)
    document = window(item.document, at, tokenizer, budget).rstrip(". \n") + "."
    if item.key is not None and item.key.lower() not in document.lower():
        return None
    return Prompts(f"{document} {item.cue}", f"{item.lead} {document}\n{document} {item.cue}")


def usable(answers: Sequence[str]) -> tuple[str, ...]:
    return tuple(answer.strip() for answer in answers if len(answer.strip()) > 1)


def window(text: str, at: int, tokenizer: Tokenizer, budget: int) -> str:
    """`budget` tokens of a text, half of them before its character `at`, as far as its ends allow."""
    tokens = tokenizer.encode(text)
    if len(tokens) <= budget:
        return text
    before = len(tokenizer.encode(text[:at]))
    start = min(max(0, before - budget // 2), len(tokens) - budget)
    return tokenizer.decode(tokens[start : start + budget]).strip()


# sets


def read_items(name: str, source: str | Path | None) -> list[Item]:
    """The items of a format, from JSON lines or the Hugging Face hub.

    Args:
        source: a file, or a set's name on the hub; None: the authors' set there.

    Raises:
        ValueError: no such file and nothing to be had from the hub, lines that are not JSON objects, or fields that are
            missing or of another type; says which.
    """
    form = FORMATS[name]
    if source is not None and Path(source).is_file():
        rows = [(f"{source}, line {i}", row) for i, row in _json_lines(Path(source))]
    else:
        rows = _from_hub(name, str(source or form.hub))
    if not rows:
        raise ValueError(f"{source} holds no items: one JSON object a line, with {_listed(form.fields)}")
    return [form.item(**_checked(name, form, where, row)) for where, row in rows]


def _json_lines(path: Path) -> list[tuple[int, Any]]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                found.append((number, json.loads(line)))
            except json.JSONDecodeError:
                raise ValueError(f"{path}, line {number} is not JSON: give one object a line") from None
    return found


def _from_hub(name: str, hub: str) -> list[tuple[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(hub, split=SPLIT)
    except Exception as error:  # of many kinds: offline, unknown, gated, another layout
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"there is no file {hub}, and no set of that name could be fetched ({reason}): give its items with "
            f"--data {name}=FILE.jsonl, one object a line with {_listed(FORMATS[name].fields)}"
        ) from error
    return [(f"{hub}, row {i}", row) for i, row in enumerate(rows)]


def _checked(name: str, form: Format, where: str, row: Any) -> dict[str, Any]:
    """The format's fields, answers as a list."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is not a JSON object")
    if missing := [field for field in form.fields if field not in row]:
        raise ValueError(f"{where} lacks {_listed(missing)}: {name} needs {_listed(form.fields)}")
    *texts, answer = form.fields
    found: dict[str, Any] = {field: row[field] for field in texts}
    found[answer] = [row[answer]] if isinstance(row[answer], str) else row[answer]
    for field in texts:
        if not isinstance(found[field], str) or not found[field].strip():
            raise ValueError(f"{where}: {field} must be a text, and not empty")
    if not isinstance(found[answer], list) or not all(isinstance(each, str) for each in found[answer]):
        raise ValueError(f"{where}: {answer} must be a text or a list of texts")
    return found


def _listed(fields: Sequence[str]) -> str:
    return ", ".join(fields)
