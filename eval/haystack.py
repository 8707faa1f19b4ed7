"""Recall from long texts: one fact, or a few, in a haystack of sentences that do not matter.

    passkey           a 5-digit key, stated twice, in noise (Stuffed Mamba, arXiv 2410.07145; in our own words)
    niah_single_1     RULER (arXiv 2404.06654): a word's 7-digit number in noise
    niah_single_2     the same in a text
    niah_single_3     a word's UUID in a text
    niah_multikey_1   a word's number in a text, among three such needles with other keys
    niah_multikey_2   a word's number in a haystack of such needles
    niah_multikey_3   a UUID's UUID in a haystack of such needles
    babilong_qa1      BABILong (arXiv 2406.10149): where somebody is; one supporting fact among facts, in filler
    babilong_qa2      where a thing is; two supporting facts

The text is that of a local file. Without one, the noise of RULER stands in for it, except in niah_single_2, which would
be niah_single_1 then. Words are drawn from lists of our own, so that figures are near RULER's, not comparable to them.

A sample is a pure function of (seed, kind, length, depth, number), the tokenizer and the file. Its length is in tokens,
of the prompt and those that may be generated (128 in RULER), met within one sentence of the haystack from below. Depth
is the share of the haystack's sentences that precede the needle or, in BABILong, the last supporting fact; other
needles and facts are at random places, facts in their order.
"""

import random
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from riverrun.train.data.tokenizer import Tokenizer

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {type}s for {key} is: {value}."
NIAH = (
    "A special magic {type} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{type} afterwards.\n",
    "\nWhat is the special magic {type} for {key} mentioned in the provided text? The special magic {type} for {key} "
    "mentioned in the provided text is",
)
PASSKEY = (
    "Somewhere in the text below a pass key is given. Keep it in mind, for you will be asked for it.\n",
    "The pass key is {value}. Keep it in mind: {value} is the pass key.",
    "\nWhat is the pass key? The pass key is",
)
BABILONG = {
    "babilong_qa1": (
        "I will give you context with the facts about positions of different persons hidden in some random text and a "
        "question. You need to answer the question based only on the information from the facts. If a person was in "
        "different locations, use the latest location to answer the question.\n\n"
        "Charlie went to the hallway. Judith moved to the kitchen. Charlie travelled to the balcony.\n"
        "Question: Where is Charlie?\nAnswer: balcony.\n\n"
    ),
    "babilong_qa2": (
        "I will give you context with the facts about locations and actions of different persons hidden in some random "
        "text and a question. You need to answer the question based only on the information from the facts. If a "
        "person got an item in the first location and travelled to the second location the item is also in the second "
        "location. If a person dropped an item in the first location and moved to the second location the item remains "
        "in the first location.\n\n"
        "Charlie went to the kitchen. Charlie got a bottle. Charlie moved to the balcony.\n"
        "Question: Where is the bottle?\nAnswer: balcony.\n\n"
    ),
}
ACTORS = ("Mary", "John", "Daniel", "Sandra")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
MOVES = ("moved", "went", "journeyed", "travelled", "went back")
ADJECTIVES = re.findall(
    r"\w+",
    "amber brave brief calm clever cold curious damp deep eager early faint famous fierce gentle giant glad golden "
    "grand happy heavy hollow honest humble idle jolly keen kind large late lively lonely loud lucky mellow mild "
    "narrow neat noble odd pale patient plain polite proud quick quiet rapid rare red round rural salty sharp shy "
    "silver simple sleepy small smooth soft solid steady strange sunny sweet swift tall tame tender thick thin vast",
)
NOUNS = re.findall(
    r"\w+",
    "acorn anchor apron arrow badge banjo barrel basket beacon bench bishop blanket bottle branch bridge bucket button "
    "cabin camel candle canoe carpet castle cedar chapel cherry circus clock cloud comet copper cradle cricket crystal "
    "curtain daisy desert donkey eagle engine falcon feather fiddle forest fountain furnace garlic ginger glacier "
    "harbor helmet island jacket kettle ladder lantern lemon lizard magnet marble meadow mirror needle orchard paddle",
)


@dataclass(frozen=True)
class Kind:
    """Attributes:
    filler: "noise", "text" (a file's) or "needles".
    key, value: "word", "number" or "uuid".
    needles: that name a key; one is asked for.
    new_tokens: generated at most.
    """

    filler: str
    new_tokens: int
    key: str = "word"
    value: str = "number"
    needles: int = 1


KINDS = {
    "passkey": Kind("noise", 16),
    "niah_single_1": Kind("noise", 128),
    "niah_single_2": Kind("text", 128),
    "niah_single_3": Kind("text", 128, value="uuid"),
    "niah_multikey_1": Kind("text", 128, needles=4),
    "niah_multikey_2": Kind("needles", 128),
    "niah_multikey_3": Kind("needles", 128, key="uuid", value="uuid"),
    "babilong_qa1": Kind("text", 32),
    "babilong_qa2": Kind("text", 32),
}


class Cell(NamedTuple):
    """What a sample is made from, besides the seed, the tokenizer and the file; depth is in [0, 1]."""

    kind: str
    length: int
    depth: float
    number: int


@dataclass(frozen=True)
class Sample:
    cell: Cell
    prompt: str
    answer: str


@dataclass(frozen=True)
class Event:
    """One fact of the small world: a move to a place, or an object taken or left where the actor is."""

    actor: str
    verb: str
    place: str | None = None
    item: str | None = None

    def __str__(self) -> str:
        return f"{self.actor} {self.verb} " + (f"to the {self.place}." if self.place else f"the {self.item}.")


class Story(NamedTuple):
    """Facts in order, a question, its answer, and which fact settles it last."""

    facts: list[Event]
    question: str
    answer: str
    last_support: int


# The world


def move_story(rng: random.Random) -> Story:
    """bAbI's task 1: people move; the last move of the one asked for is the supporting fact."""
    facts = [Event(rng.choice(ACTORS), rng.choice(MOVES), rng.choice(PLACES)) for _ in range(rng.randint(2, 10))]
    who = rng.choice(sorted({fact.actor for fact in facts}))
    support = max(i for i, fact in enumerate(facts) if fact.actor == who)
    answer = facts[support].place
    assert answer is not None
    return Story(facts, f"Where is {who}?", answer, support)


def object_story(rng: random.Random) -> Story:
    """bAbI's task 2: people move, take objects along and drop them. The supporting facts are that the object was taken
    and the last move of its holder, or that it was dropped and the move before."""
    while True:
        facts: list[Event] = []
        at: dict[str, int] = {}  # actor → the fact of the last move
        settled: dict[str, tuple[str, int]] = {}  # object → its place, the last fact about that
        holder: dict[str, str] = {}
        for number in range(rng.randint(4, 14)):
            actor = rng.choice(ACTORS)
            held = [item for item, by in holder.items() if by == actor]
            place = facts[at[actor]].place if actor in at else None
            free = [o for o in OBJECTS if o not in holder and (o not in settled or settled[o][0] == place)]
            action = rng.choice(["move", "move", "take", "drop"])
            if action == "take" and place and free:
                item = rng.choice(free)
                facts.append(Event(actor, rng.choice(["got", "grabbed", "took", "picked up"]), item=item))
                holder[item], settled[item] = actor, (place, number)
            elif action == "drop" and place and held:
                item = rng.choice(held)
                facts.append(Event(actor, rng.choice(["dropped", "discarded", "left", "put down"]), item=item))
                del holder[item]
                settled[item] = (place, number)
            else:
                place = rng.choice([p for p in PLACES if p != place])
                facts.append(Event(actor, rng.choice(MOVES), place))
                at[actor] = number
                settled |= dict.fromkeys(held, (place, number))
        if settled:
            item = rng.choice(sorted(settled))
            return Story(facts, f"Where is the {item}?", *settled[item])


# The haystack


class Haystack:
    """Filler sentences of one sample, drawn as they are needed, and what joins them."""

    def __init__(self, kind: Kind, text: Sequence[str] | None, rng: random.Random, avoid: Sequence[str]) -> None:
        self.kind, self.rng, self.avoid, self.drawn = kind, rng, avoid, list[str]()
        self.text = None
        if kind.filler == "text" and text is not None:
            start = rng.randrange(len(text))
            self.text = [s for s in [*text[start:], *text[:start]] if not any(word in s for word in avoid)]
            if not self.text:
                raise ValueError("every sentence of the haystack holds the answer: give a longer text")
        self.joiner = " " if self.text else "\n"

    def first(self, count: int) -> list[str]:
        if self.kind.filler == "needles":
            while len(self.drawn) < count:
                self.drawn.append(str(_needle(self.kind, self.rng, self.avoid)[2]))
            return self.drawn[:count]
        if self.text is None:
            return [NOISE] * count
        return (self.text * (count // len(self.text) + 1))[:count]


def read_haystack(path: Path) -> list[str]:
    """The sentences of a UTF-8 text, white space made single blanks, those beyond 60 words cut.

    Raises:
        ValueError: no such file, no UTF-8, or nothing in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"the haystack {path} is not UTF-8 text: convert it first") from None
    except OSError as error:
        raise ValueError(f"the haystack {path} cannot be read: {error.strerror}") from error
    sentences = [sentence.split() for sentence in re.split(r"(?<=[.!?])\s+", text)]
    found = [" ".join(words[i : i + 60]) for words in sentences for i in range(0, len(words), 60)]
    if not found:
        raise ValueError(f"the haystack {path} holds no text")
    return found


def _draw(what: str, rng: random.Random) -> str:
    if what == "word":
        return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    return str(rng.randrange(10**6, 10**7)) if what == "number" else str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _needle(kind: Kind, rng: random.Random, avoid: Iterable[str] = ()) -> tuple[str, str, str]:
    """A key, its value and the sentence, without the words to avoid."""
    while True:
        key, value = _draw(kind.key, rng), _draw(kind.value, rng)
        if key not in avoid and value not in avoid:
            return key, value, NEEDLE.format(type=kind.value, key=key, value=value)


# Samples


def make_sample(cell: Cell, tokenizer: Tokenizer, text: Sequence[str] | None, seed: int, opening: int = 0) -> Sample:
    """The sample of a cell.

    Args:
        text: the haystack's sentences; None: noise.
        opening: tokens that will be put before the prompt.

    Raises:
        ValueError: a length that does not hold the question.
    """
    kind = KINDS[cell.kind]
    rng = random.Random(f"{seed}/{cell.kind}/{cell.length}/{cell.depth}/{cell.number}")
    facts, last, before, after, answer, avoid = _content(cell.kind, kind, rng)
    shares = sorted(rng.random() for _ in facts[:last])  # where between the beginning and the depth
    later = sorted(rng.random() for _ in facts[last + 1 :])
    haystack = Haystack(kind, text, random.Random(rng.getrandbits(64)), avoid)

    def prompt(count: int) -> str:
        place = round(cell.depth * count)
        gaps = [int(s * (place + 1)) for s in shares] + [place]
        gaps += [place + int(s * (count - place + 1)) for s in later]
        sentences = haystack.first(count)
        for gap, fact in reversed(list(zip(gaps, facts))):
            sentences.insert(gap, fact)
        return before + haystack.joiner.join(sentences) + after

    budget = cell.length - kind.new_tokens - opening
    count = most_sentences(lambda n: len(tokenizer.encode(prompt(n))), budget)
    if count is None:
        least = len(tokenizer.encode(prompt(0))) + kind.new_tokens + opening
        raise ValueError(f"{cell.kind} needs at least {least} tokens: length={cell.length} is too short for it")
    return Sample(cell, prompt(count), answer)


def _content(name: str, kind: Kind, rng: random.Random) -> tuple[list[str], int, str, str, str, list[str]]:
    """Sentences to hide in order, the one whose depth is asked for, what precedes and follows the haystack, the answer,
    and words that the haystack must not hold."""
    if name in BABILONG:
        story = move_story(rng) if name == "babilong_qa1" else object_story(rng)
        facts = [str(fact) for fact in story.facts]
        before, after = BABILONG[name] + "<context>\n", f"\n</context>\nQuestion: {story.question}\nAnswer:"
        return facts, story.last_support, before, after, story.answer, []
    if name == "passkey":
        value = f"{rng.randrange(10**5):05d}"
        return [PASSKEY[1].format(value=value)], 0, PASSKEY[0], PASSKEY[2], value, [value]
    avoid: list[str] = []
    needles = []
    for _ in range(kind.needles):
        key, value, sentence = _needle(kind, rng, avoid)
        avoid += [key, value]
        needles.append((key, value, sentence))
    key, value, _ = needles[0]
    needle, rank = needles[0], rng.randrange(len(needles))
    others = needles[1:]
    placed = [sentence for *_, sentence in [*others[:rank], needle, *others[rank:]]]
    before, after = (part.format(type=kind.value, key=key) for part in NIAH)
    return placed, rank, before, after, value, avoid


def most_sentences(tokens: Callable[[int], int], budget: int) -> int | None:
    """The largest n with tokens(n) ≤ budget, of a function that grows about linearly; None if even tokens(0) is above.
    Encoding is slow, so the first tries are where the line through the last one meets the budget."""
    low, at_low, high, tries = 0, tokens(0), None, 0
    if at_low > budget:
        return None
    base, slope = at_low, max(1.0, tokens(1) - at_low)
    while high is None or high - low > 1:
        guess = low + max(1, int((budget - at_low) / slope))
        if high is not None:
            guess = min(guess, high - 1) if tries < 6 else (low + high) // 2
        found, tries = tokens(guess), tries + 1
        slope = max(0.01, (found - base) / guess)
        if found <= budget:
            low, at_low = guess, found
        else:
            high = guess
    return low
