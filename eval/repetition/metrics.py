"""How much a text repeats itself; on tokens of any kind, without a model. None where a text is too short to say.

rep-n, rep-w, rep/l and wrep are those of Welleck et al. (arXiv 1908.04319) and Su et al. (arXiv 2202.06417, with
`diversity`); rep-r is Fu et al.'s (arXiv 2012.14660); rep-sen is DITTO's (arXiv 2206.02369).
"""

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from math import prod
from typing import NamedTuple

Tokens = Sequence[Hashable]


def duplicates(items: Sequence[Hashable]) -> float | None:
    """1 − unique / all."""
    return 1 - len(set(items)) / len(items) if items else None


def ngrams(tokens: Tokens, n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def rep_n(tokens: Tokens, n: int) -> float | None:
    """The share of n-grams that occurred before."""
    return duplicates(ngrams(tokens, n))


def diversity(tokens: Tokens) -> float | None:
    """Π over n = 2, 3, 4 of 1 − rep-n: 1 for a text without a repeated bigram."""
    found = [rep_n(tokens, n) for n in (2, 3, 4)]
    return None if None in found else prod(1 - rep for rep in found if rep is not None)


def rep_w(tokens: Tokens, w: int = 16) -> float | None:
    """The share of tokens that are among the w before them."""
    return sum(token in tokens[max(0, t - w) : t] for t, token in enumerate(tokens)) / len(tokens) if tokens else None


def rep_r(tokens: Tokens) -> float | None:
    """The share of positions that a bigram covers which occurs more than once."""
    if len(tokens) < 2:
        return None
    bigrams = ngrams(tokens, 2)
    counts = Counter(bigrams)
    covered = {place for i, bigram in enumerate(bigrams) if counts[bigram] > 1 for place in (i, i + 1)}
    return len(covered) / len(tokens)


def rep_sen(text: str) -> float | None:
    """The share of sentences that occurred before."""
    return duplicates(split_sentences(text))


def split_sentences(text: str) -> list[str]:
    """Pieces that end with . ! or ? before white space, or at an empty line; white space made single blanks."""
    pieces = re.split(r"(?<=[.!?])\s+|\n\s*\n", text)
    return [" ".join(piece.split()) for piece in pieces if piece.strip()]


class Looking(NamedTuple):
    """Shares of predictions; see `looking_back`."""

    rep: float
    wrep: float
    human: float


def looking_back(tokens: Tokens, predicted: Tokens, l: int) -> Looking | None:
    """rep/l: how often the likeliest next token is among the l tokens before it; wrep: how often it is that and wrong;
    human: how often the real next token is among them.

    Args:
        predicted: the likeliest token after each token but the last.
    """
    if len(predicted) != len(tokens) - 1:
        raise ValueError(f"{len(tokens)} tokens have {len(tokens) - 1} successors, not {len(predicted)} predictions")
    if not predicted:
        return None
    rep = wrep = human = 0
    for t, (guess, gold) in enumerate(zip(predicted, tokens[1:]), start=1):
        before = tokens[max(0, t - l) : t]
        rep += guess in before
        wrep += guess in before and guess != gold
        human += gold in before
    return Looking(*(count / len(predicted) for count in (rep, wrep, human)))
