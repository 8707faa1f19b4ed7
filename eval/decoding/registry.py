"""Decodings by name, as they are typed: `greedy`, `dry`, `rpg:mode=additive,kappa=2`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from riverrun.eval.decoding.contrastive import ContrastiveOptions
from riverrun.eval.decoding.draw import Draw, SampleOptions, TypicalOptions
from riverrun.eval.decoding.dry import DRY, DRYOptions
from riverrun.eval.decoding.lz import LZ, LZOptions
from riverrun.eval.decoding.presence import Presence, PresenceOptions
from riverrun.eval.decoding.rpg import RPG, RPGOptions
from riverrun.eval.studies.options import build, choose, parse_overrides
from riverrun.train.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class GreedyOptions:
    """The likeliest token."""


@dataclass(frozen=True)
class RepetitionOptions:
    """CTRL's repetition penalty (arXiv 1909.05858): of tokens that occurred, positive logits are divided by
    `penalty` and negative ones multiplied.

    Attributes:
        prompt: whether the prompt counts, too.
    """

    penalty: float = 1.2
    prompt: bool = True

    def __post_init__(self) -> None:
        if self.penalty <= 0:
            raise ValueError(f"repetition needs penalty > 0, above 1 against repetition, not {self.penalty}")


@dataclass(frozen=True)
class NoRepeatOptions:
    """No n-gram of `size` tokens occurs twice.

    Attributes:
        prompt: whether the prompt's count, too.
    """

    size: int = 4
    prompt: bool = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"no_repeat_ngram needs size ≥ 1, not {self.size}")


DECODINGS: dict[str, type] = {
    "greedy": GreedyOptions,
    "presence": PresenceOptions,
    "repetition": RepetitionOptions,
    "no_repeat_ngram": NoRepeatOptions,
    "dry": DRYOptions,
    "lz": LZOptions,
    "rpg": RPGOptions,
    "contrastive": ContrastiveOptions,
    "typical": TypicalOptions,
    "sample": SampleOptions,
}


@dataclass(frozen=True)
class Decoding:
    """Attributes:
    spec: as it was typed.
    name: among `DECODINGS`.
    options: of that name's class.
    """

    spec: str
    name: str
    options: Any

    @property
    def sees_prompt(self) -> bool:
        """Whether tokens of the prompt count as what may be repeated."""
        return getattr(self.options, "prompt", True)

    @property
    def samples(self) -> bool:
        return isinstance(self.options, SampleOptions | TypicalOptions)

    def processors(self, tokenizer: Tokenizer, seed: int | None = None) -> LogitsProcessorList:
        """What changes the logits before the likeliest token is taken; with a seed, a decoding that samples ends with
        the draw. To be given single rows without padding and, unless `sees_prompt`, without the prompt.

        Raises:
            ValueError: contrastive search, which is no matter of logits.
        """
        o = self.options
        if isinstance(o, SampleOptions | TypicalOptions):
            return LogitsProcessorList([*o.cuts(), *([] if seed is None else [Draw(seed)])])
        if isinstance(o, GreedyOptions):
            return LogitsProcessorList()
        if isinstance(o, PresenceOptions):
            return LogitsProcessorList([Presence(o)])
        if isinstance(o, RepetitionOptions):
            return LogitsProcessorList([RepetitionPenaltyLogitsProcessor(float(o.penalty))])
        if isinstance(o, NoRepeatOptions):
            return LogitsProcessorList([NoRepeatNGramLogitsProcessor(o.size)])
        if isinstance(o, DRYOptions):
            return LogitsProcessorList([DRY(o, tokenizer)])
        if isinstance(o, LZOptions):
            return LogitsProcessorList([LZ(o)])
        if isinstance(o, RPGOptions):
            return LogitsProcessorList([RPG(o, tokenizer)])
        raise ValueError(f"{self.name} chooses among continuations, not by logits: it cannot be a processor")


def parse_decoding(spec: str) -> Decoding:
    """One decoding, as `name` or `name:key=value,key=value`.

    Raises:
        ValueError: an unknown name or key (all are listed), or an impossible value.
    """
    return Decoding(spec.strip(), *parse_spec("decoding", spec, DECODINGS))


def parse_spec(kind: str, spec: str, classes: Mapping[str, type]) -> tuple[str, Any]:
    """The name in `name` or `name:key=value,key=value`, and that name's class, built of the values.

    Raises:
        ValueError: see `parse_decoding`.
    """
    name, colon, rest = spec.strip().partition(":")
    choose(kind, name, classes)
    parts = [part.strip() for part in rest.split(",")] if colon else []
    for part in parts:
        if "=" not in part or part.startswith("="):
            keys = ", ".join(f.name for f in fields(classes[name])) or "none"
            raise ValueError(f"{part!r} in {spec!r} must look like key=value; keys of {name}: {keys}")
    values = parse_overrides([f"{name}.{part}" for part in parts]).get(name, {})
    return name, build(name, classes[name], values)


def parse_decodings(text: str) -> tuple[Decoding, ...]:
    """Several with commas between them; after a colon, `key=value` belongs to the decoding before.

    Raises:
        ValueError: see `parse_decoding`; none, or one twice.
    """
    specs: list[str] = []
    for part in (part.strip() for part in text.split(",") if part.strip()):
        if specs and ":" in specs[-1] and "=" in part and ":" not in part.partition("=")[0]:
            specs[-1] += f",{part}"
        else:
            specs.append(part)
    if not specs or len(set(specs)) < len(specs):
        raise ValueError(f"--decoding {text!r} must be one or several of {', '.join(DECODINGS)}, each once")
    return tuple(map(parse_decoding, specs))
