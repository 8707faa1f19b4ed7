"""RPG, the grammar-based repetition penalty for code (arXiv 2505.10402): statements of one shape, one after another.

The text so far is a sequence of lines as the grammar sees them (`PythonLines`; other languages through tree-sitter). At
the beginning of a line, if the last ones repeat with some period (`tandem.trailing_run`), the tokens that began the
earlier copies are *critical*: one of them would begin the next copy. They are penalised by the number of copies n ≥ 2:

    prob          p ← λⁿ · p                          the paper's P_n = λ^Count
    logit_signed  z ← λⁿ · z for z > 0, z / λⁿ below
    additive      z ← z − κ · n                       for peaked distributions, where λ = 0.9 is too weak

With `eos_boost` below 1, the end-of-sequence token's p is divided by eos_boostⁿ, where the program could end: outside
of all brackets and not after a block's header.

Where this is not the authors' code:
- It multiplies raw logits by λⁿ, which raises negative ones. See the modes above; none of them lifts what is −inf.
- It looks for a period that divides the whole sequence, and the paper for neighbours in the suffix array that are
  copies; here any repeat that ends at this line counts, the longest of the smallest period.
- Its count of structural copies stays 1, since it starts anew at each step. Here n grows with every copy until the
  pattern breaks, blank lines and white space in between or not.
- A copy begins where nesting is least: in `elif …:` and `return …`, repeated, `return` may not be the critical one, nor
  the `def` below a decorator.

A line's first token is the one with its first visible character, whatever white space is with it. Tokens that hold the
newline before it too are penalised while the line before may still end. The work is that of new characters, and at a
line's beginning that of a Z-function over the last `max_lines` lines.
"""

from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from math import log
from typing import Literal

import torch

from riverrun.eval.decoding.rows import RowProcessor
from riverrun.eval.repetition.python_lines import Line, PythonLines
from riverrun.eval.repetition.tandem import trailing_run
from riverrun.eval.repetition.tree_lines import TreeLines, load_grammar
from riverrun.train.data.tokenizer import Tokenizer

REMEMBERED = 256  # rows whose lines are kept for the next step
HELD = 8  # tokens that may wait for the rest of a character
CONTEXT = 16  # tokens that are decoded along with a new one


@dataclass(frozen=True)
class RPGOptions:
    """Attributes:
    mode: see above.
    lam: λ.
    kappa: κ, in nats.
    eos_boost: 1: none.
    language: python, or one whose tree-sitter grammar is installed.
    max_lines: that are looked at.

    Raises:
        ValueError: λ or eos_boost outside (0, 1], a negative κ, fewer than two lines, or no grammar for a language.
    """

    mode: Literal["prob", "logit_signed", "additive"] = "prob"
    lam: float = 0.9
    kappa: float = 1.5
    eos_boost: float = 1.0
    language: str = "python"
    max_lines: int = 512

    def __post_init__(self) -> None:
        if not (0 < self.lam <= 1 and 0 < self.eos_boost <= 1 and self.kappa >= 0 and self.max_lines >= 2):
            raise ValueError(
                f"rpg needs 0 < lam ≤ 1, 0 < eos_boost ≤ 1, kappa ≥ 0 and max_lines ≥ 2, not lam={self.lam}, "
                f"eos_boost={self.eos_boost}, kappa={self.kappa}, max_lines={self.max_lines}"
            )
        if self.language != "python":
            load_grammar(self.language)


@dataclass(frozen=True)
class Copies:
    """A repeat that ends here.

    Attributes:
        count: copies.
        starts: where in the text each one's first visible character is.
        may_end: whether the program could end here.
    """

    count: int
    starts: list[int]
    may_end: bool


def copies(lines: list[Line]) -> Copies | None:
    """The repeat of which another copy may begin after `lines`; None: there is none, or its last copy is unfinished."""
    run = trailing_run([line.key for line in lines])
    if run is None or lines[-1].symbols[0] == "@":
        return None
    own = lines[-run.length :]
    top = min(line.level for line in own)
    first = next(i for i, line in enumerate(own) if line.level == top)  # a copy begins at the outermost level
    count, rest = divmod(run.length - first, run.period)
    if rest or count < 2:
        return None
    return Copies(count, [line.start for line in own[first :: run.period]], not lines[-1].needs_more)


class CodeText:
    """The text of a row's tokens as it grows, its lines, and which token each character came with."""

    def __init__(self, tokenizer: Tokenizer, language: str):
        self.tokenizer = tokenizer
        self.special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
        self.lines: PythonLines | TreeLines = PythonLines() if language == "python" else TreeLines(language)
        self.text = ""
        self.offsets, self.tokens = [0], [-1]  # the text from an offset on came with a token
        self.window: list[int] = []
        self.shown = 0  # characters of the window that are in the text
        self.held = 0
        self.fused = False  # has any token held a newline and what begins the next line?

    def add(self, token: int) -> None:
        if token in self.special:
            return
        self.window.append(token)
        text = self.tokenizer.decode(self.window)
        self.held += 1
        if text.endswith("\ufffd") and self.held < HELD:
            return
        self.offsets.append(len(self.text))
        self.tokens.append(self.window[-self.held])
        new = text[self.shown :]
        self.text += new
        self.lines.feed(new)
        self.fused |= "\n" in new and not new[new.rfind("\n") :].isspace()
        self.held, self.shown = 0, len(text)
        if len(self.window) > 2 * CONTEXT:
            self.window = self.window[-CONTEXT:]
            self.shown = len(self.tokenizer.decode(self.window))

    def starter(self, offset: int) -> tuple[int, bool]:
        """The token of the character at an offset, and whether it holds the newline before that, too."""
        place = bisect_right(self.offsets, offset) - 1
        return self.tokens[place], "\n" in self.text[self.offsets[place] : offset]


class RPG(RowProcessor):
    def __init__(self, options: RPGOptions, tokenizer: Tokenizer):
        self.options, self.tokenizer = options, tokenizer
        self._texts: OrderedDict[tuple[int, ...], CodeText] = OrderedDict()  # by the tokens that were added

    def row(self, tokens: list[int], scores: torch.Tensor) -> torch.Tensor:
        found, critical = self.critical(tokens)
        if found is None or not critical:
            return scores
        o, n, at = self.options, found.count, torch.tensor(sorted(critical), device=scores.device)
        old = scores[at]
        if o.mode == "prob":
            new = old + n * log(o.lam)
        elif o.mode == "additive":
            new = old - n * o.kappa
        else:
            new = torch.where(old > 0, old * o.lam**n, old / o.lam**n)
        scores = scores.index_copy(0, at, new)
        if o.eos_boost < 1 and found.may_end:
            eos = torch.tensor([self.tokenizer.eos_id], device=scores.device)
            scores = scores.index_copy(0, eos, scores[eos] - n * log(o.eos_boost))
        return scores

    def critical(self, tokens: list[int]) -> tuple[Copies | None, set[int]]:
        """The repeat that another copy would go on with, and the tokens that would begin it."""
        text = self._text_of(tokens)
        lines, at_start = text.lines.lines[-self.options.max_lines :], text.lines.at_line_start
        if not at_start:  # only a token with a newline in it could begin a copy
            if not text.fused:
                return None, set()
            last = text.lines.unfinished()
            lines = [*lines, last] if last else []
        found = copies(lines)
        if found is None:
            return None, set()
        starters = [text.starter(start) for start in found.starts]
        return found, {token for token, fused in starters if (at_start or fused) and token >= 0}

    def _text_of(self, tokens: list[int]) -> CodeText:
        """That of a step before, if these are its tokens and some more."""
        key = tuple(tokens)
        for known in (key, key[:-1]):
            if known in self._texts:
                text = self._texts.pop(known)
                break
        else:
            known, text = (), CodeText(self.tokenizer, self.options.language)
        for token in key[len(known) :]:
            text.add(token)
        self._texts[key] = text
        if len(self._texts) > REMEMBERED:
            self._texts.popitem(last=False)
        return text
