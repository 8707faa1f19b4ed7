"""The generated tasks against hand-computed cases, algebra and naive programs."""

import itertools

import numpy as np
import pytest

from riverrun.eval.studies import chomsky, copying, groups, state_tracking
from riverrun.eval.studies.memory import MemoryTask, NDelayedMatch, NParity
from riverrun.eval.studies.mqar import _distinct
from riverrun.eval.studies.scoring import evaluate
from riverrun.eval.studies.task import IGNORED, TEST, TRAIN, VALIDATION, SequenceTask
from riverrun.eval.studies.tasks import TASKS, make_task

SEQUENCES = [name for name, task in TASKS.items() if issubclass(task, SequenceTask)]
MEMORY = [name for name, task in TASKS.items() if issubclass(task, MemoryTask)]
LENGTH = 32
PAIR = 4016  # a length of set_disjointness: its two sizes


def sequences(name: str, **options) -> SequenceTask:
    task = make_task(name, options)
    assert isinstance(task, SequenceTask)
    return task


def length_of(name: str) -> int:
    return PAIR if name == "set_disjointness" else LENGTH


def rows(name: str, length: int = LENGTH, count: int = 50, **options) -> list[tuple[list[int], list[int]]]:
    batch = sequences(name, **options).batch(TRAIN, 1, 2, count, length)
    return list(zip(batch.inputs.tolist(), batch.targets.tolist()))


def answers(targets: list[int]) -> list[int]:
    return [t for t in targets if t != IGNORED]


class Fixed:
    """In place of a random generator: returns what it is given, one after the other."""

    def __init__(self, *values):
        self.values = [np.array(v) for v in values]

    def integers(self, *args):
        return self.values.pop(0)


# every task


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_batch_is_a_function_of_its_coordinates(name):
    task, length = sequences(name), length_of(name)
    first = task.batch(TRAIN, 3, 5, 4, length)
    again = task.batch(TRAIN, 3, 5, 4, length)
    assert (first.inputs == again.inputs).all() and (first.targets == again.targets).all()
    for other in ((VALIDATION, 3, 5), (TEST, 3, 5), (TRAIN, 4, 5), (TRAIN, 3, 6)):
        assert (task.batch(*other, 4, length).inputs != first.inputs).any()


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("size", [None, 32, 64])
def test_tokens_are_in_the_vocabulary_and_answers_among_the_answers(name, size):
    task = sequences(name)
    length = size or max(task.shortest, 4 if name == "mqar" else 1)
    length += 1000 * length * (name == "set_disjointness" and size is not None)
    inputs, targets = task.batch(TRAIN, 0, 0, 16, length)
    assert inputs.shape == targets.shape and inputs.dtype == targets.dtype == np.int64
    assert inputs.min() >= 0 and inputs.max() < task.vocab_size(length)
    asked = targets[targets != IGNORED]
    assert asked.min() in task.answers and asked.max() in task.answers
    assert (targets != IGNORED).any(1).all()
    assert task.answers.stop <= task.vocab_size(length)


@pytest.mark.parametrize("name", [name for name in SEQUENCES if name != "set_disjointness"])
def test_training_lengths(name):
    task = sequences(name)
    seen = {task.training_batch(0, step, 1, 8).inputs.shape[1] for step in range(60)}
    assert (len(seen) > 1) == task.defaults.uniform_lengths
    assert max(seen) == task.batch(TRAIN, 0, 0, 1, 8).inputs.shape[1]


@pytest.mark.parametrize("name", SEQUENCES)
def test_the_right_answers_score_1_and_guesses_score_chance(name):
    task, count, length = sequences(name), 1500, length_of(name)
    targets = task.batch(TEST, 0, 0, count, length).targets
    oracle = evaluate(task, lambda inputs: targets, TEST, count, length)
    assert oracle.accuracy == oracle.exact == oracle.high == 1 and oracle.low > 0.99
    rng = np.random.default_rng(0)
    first, stop = task.answers.start, task.answers.stop
    guess = evaluate(task, lambda inputs: rng.integers(first, stop, inputs.shape), TEST, count, length)
    error = 4 * np.sqrt(task.chance * (1 - task.chance) / count)
    assert guess.accuracy == pytest.approx(task.chance, abs=error)


@pytest.mark.parametrize(
    "name",
    ["mqar", "s3", "s4", "a5", "parity", "cycle_navigation", "reverse_string", "bucket_sort", "missing_duplicate"],
)
def test_a_constant_scores_chance_where_answers_are_uniform(name):
    task, count = sequences(name), 1500
    constant = task.answers[0]
    guess = evaluate(task, lambda inputs: np.full(inputs.shape, constant), TEST, count, LENGTH)
    assert guess.accuracy == pytest.approx(task.chance, abs=4 * np.sqrt(task.chance * (1 - task.chance) / count))


# groups


@pytest.mark.parametrize("task, order", [(groups.S3, 6), (groups.S4, 24), (groups.S5, 120), (groups.A5, 60)])
def test_group_axioms(task, order):
    table = groups.products(task.degree, task.even_only)
    assert table.shape == (order, order) and task().order == order
    everything = np.arange(order)
    assert (table[0] == everything).all() and (table[:, 0] == everything).all()  # identity
    assert all(sorted(line) == list(everything) for line in (*table, *table.T))  # inverses, in a Latin square
    assert (table[table] == table[:, table]).all()  # (a b) c = a (b c)
    assert (table != table.T).any()


def test_a_product_by_hand():
    assert groups.elements(3, False) == ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    # swapping the last two, then the first two: 0 → 1, 1 → 2, 2 → 0 when the right one goes first
    assert groups.products(3, False)[2, 1] == 3 and groups.products(3, False)[1, 2] == 4


@pytest.mark.parametrize("task", [groups.S3, groups.S4, groups.S5, groups.A5])
def test_word_problems_against_composed_permutations(task):
    group = groups.elements(task.degree, task.even_only)
    batch = task().batch(TRAIN, 0, 0, 5, LENGTH)
    for tokens, targets in zip(batch.inputs, batch.targets):
        product = tuple(range(task.degree))
        for token, target in zip(tokens, targets):
            product = tuple(product[i] for i in group[token])
            assert group[target] == product


def test_a5_is_perfect_and_s3_is_not():
    """Commutators generate all of A5, which makes its word problem hard; those of S3 are the rotations."""

    def commutators(degree, even_only):
        table = groups.products(degree, even_only)
        inverse = np.argmin(table, axis=1)  # where the product is 0, the identity
        return {
            table[table[a, b], table[inverse[a], inverse[b]]] for a, b in itertools.product(range(len(table)), repeat=2)
        }

    assert len(commutators(5, True)) == 60
    assert len(commutators(3, False)) == 3


# running results


def test_parity_and_cycle_by_hand():
    parity = state_tracking.Parity().sample(Fixed([[1, 0, 1, 1]]), 1, 4)  # type: ignore[arg-type]
    assert parity.targets.tolist() == [[1, 1, 0, 1]]
    cycle = state_tracking.CycleNavigation().sample(Fixed([[2, 1, 1, 1, 0, 2]]), 1, 6)  # type: ignore[arg-type]
    assert cycle.targets.tolist() == [[4, 0, 1, 2, 2, 1]]


def test_modular_arithmetic_against_python():
    for inputs, targets in rows("modular_arithmetic", 31):
        symbols = "".join("01234+-*"[token] for token in inputs)
        assert len(symbols) == 31
        assert targets[0::2] == [eval(symbols[: n + 1]) % 5 for n in range(0, 31, 2)]
        assert set(targets[1::2]) == {IGNORED}
    assert len(rows("modular_arithmetic", 32)[0][0]) == 31 and len(rows("modular_arithmetic", 1)[0][0]) == 1


# MQAR


@pytest.mark.parametrize("options", [{}, {"num_kv_pairs": 8}, {"num_passes": 2, "num_kv_pairs": 5}, {"power_a": 1.0}])
def test_mqar_layout(options):
    K, P = options.get("num_kv_pairs", 4), options.get("num_passes", 1)
    for inputs, targets in rows("mqar", 64, vocabulary=64, **options):
        context = inputs[: 2 * K * P]
        keys, values = context[0 : 2 * K : 2], context[1 : 2 * K : 2]
        assert context == context[: 2 * K] * P
        assert len(set(keys)) == K and all(1 <= key < 32 for key in keys)
        assert len(set(values)) == K and all(32 <= value < 64 for value in values)
        asked = [t for t in range(64) if targets[t] != IGNORED]
        assert len(asked) == K and all(t >= 2 * K * P and t % 2 == 0 for t in asked)
        assert sorted(inputs[t] for t in asked) == sorted(keys)
        for t in asked:  # the answer is what followed the key
            assert targets[t] == context[context.index(inputs[t]) + 1]
        assert all(inputs[t] == 0 for t in range(2 * K * P, 64) if t not in asked)


def test_mqar_at_its_smallest():
    ((inputs, targets),) = rows("mqar", 4, count=1, vocabulary=4, num_kv_pairs=1)
    assert inputs[0] == inputs[2] == 1 and targets == [IGNORED, IGNORED, inputs[1], IGNORED]


def test_mqar_gaps_follow_the_power_law():
    """One query among 30 slots: p(g) ∝ (g + 1)^(a − 1)."""
    count, a = 20_000, 0.5
    batch = sequences("mqar", vocabulary=8, num_kv_pairs=1, power_a=a).batch(TRAIN, 0, 0, count, 62)
    seen = np.bincount(((batch.targets != IGNORED).argmax(1) - 2) // 2, minlength=30) / count
    p = np.arange(1, 31) ** (a - 1)
    assert np.abs(seen - p / p.sum()).max() < 4 * np.sqrt(0.1 * 0.9 / count)


def test_draws_without_replacement_have_the_law_of_one_after_the_other():
    odds, count = np.array([1, 0.5, 0.25]), 50_000
    drawn = _distinct(np.random.default_rng(0), count, odds, 2)
    p = odds / odds.sum()
    for a, b in itertools.permutations(range(3), 2):
        seen = (drawn == [a, b]).all(1).mean()
        assert seen == pytest.approx(p[a] * p[b] / (1 - p[a]), abs=4 * np.sqrt(0.25 / count))


def test_mqar_random_filler_keeps_the_queries():
    quiet, noisy = rows("mqar", 64, vocabulary=64), rows("mqar", 64, vocabulary=64, random_non_queries=True)
    for (_, expected), (inputs, targets) in zip(quiet, noisy):
        assert targets == expected
        assert sum(token == 0 for token in inputs) < 10


# strings


def test_strings_by_hand():
    batch = chomsky.ReverseString().sample(Fixed([[0, 0, 1]]), 1, 3)  # type: ignore[arg-type]
    assert batch.inputs.tolist() == [[0, 0, 1, 2, 2, 2]] and answers(batch.targets[0].tolist()) == [1, 0, 0]
    batch = copying.Copying().sample(Fixed([[7, 3]]), 1, 2)  # type: ignore[arg-type]
    assert batch.inputs.tolist() == [[copying.BOS, 7, 3, copying.COPY, 7, 3]]
    assert batch.targets.tolist() == [[IGNORED, IGNORED, IGNORED, 7, 3, copying.EOS]]


def test_bucket_sort_and_missing_duplicate():
    for inputs, targets in rows("bucket_sort"):
        assert answers(targets) == sorted(inputs[:LENGTH]) and inputs[LENGTH:] == [5] * LENGTH
    for inputs, targets in rows("missing_duplicate", 33):
        w, masked = inputs[:32], inputs[:32].index(2)
        w[masked] = answers(targets)[0]
        assert w[:16] == w[16:] and inputs[32:] == [3] and targets[32] != IGNORED


def test_stack_by_hand():
    # bottom 0, then 1; pop, pop, pop (nothing there), push 1, push 0
    batch = chomsky.StackManipulation().sample(
        Fixed([[2]], [[0, 1, 0, 0, 0, 0, 0]], [[9, 9, 3, 3, 3, 5, 4]]),  # type: ignore[arg-type]
        1, 7,
    )  # fmt: skip
    assert batch.inputs.tolist() == [[0, 1, 3, 3, 3, 5, 4] + [6] * 8]
    assert batch.targets[0, 7:].tolist() == [0, 1, 2] + [IGNORED] * 5


def test_stack_against_a_list():
    for inputs, targets in rows("stack_manipulation", 20, 200):
        stack: list[int] = []
        for token in inputs[:20]:
            if token == chomsky.POP:
                stack = stack[:-1]
            else:
                stack.append({chomsky.PUSH_0: 0, chomsky.PUSH_1: 1}.get(token, token))
        assert answers(targets) == [*stack[::-1], chomsky.TERMINATOR]
        assert inputs[20:] == [6] * 21


# memory


@pytest.mark.parametrize("name", MEMORY)
def test_memory_labels_against_their_definition(name):
    task = make_task(name)
    assert isinstance(task, MemoryTask)
    for step in range(20):
        bits, labels = task.batch(TRAIN, 0, step, 16, range(2, 7))
        assert 8 <= bits.shape[1] < 26 and labels.shape == (16, 5)
        for row, got in zip(bits.tolist(), labels.tolist()):
            parity = [sum(row[-n:]) % 2 for n in range(2, 7)]
            match = [int(row[-n] == row[-1]) for n in range(2, 7)]
            assert got == (parity if name == "n_parity" else match)


def test_memory_heads():
    multi, single = NParity(), NParity(curriculum="single")
    assert list(multi.trained(5)) == [2, 3, 4, 5] and [multi.head(n) for n in multi.trained(5)] == [0, 1, 2, 3]
    assert list(single.trained(5)) == [5] and single.head(5) == 0
    assert multi.vocab_size(16) == 30 and single.vocab_size(16) == 2


def test_memory_guesses():
    """N-DMS is balanced; N-parity favours 0 by 1 / (2N + 2) at even N, as its docstring says."""
    _, labels = NDelayedMatch().batch(TEST, 0, 0, 20_000, range(2, 5))
    assert labels.mean(0) == pytest.approx([0.5] * 3, abs=0.015)
    _, labels = NParity().batch(TEST, 0, 0, 20_000, range(2, 6))
    assert (1 - labels.mean(0)) == pytest.approx([0.5 + 1 / 6, 0.5, 0.5 + 1 / 10, 0.5], abs=0.015)


# set disjointness


@pytest.mark.parametrize("passes", [1, 2])
def test_two_sets_share_exactly_the_target(passes):
    places = set()
    for inputs, targets in rows("set_disjointness", PAIR, 300, num_passes=passes):
        once = 1 + 4 + 1 + 16
        assert inputs[:once] * passes + [3] == inputs and inputs[0] == 1 and inputs[5] == 2
        a, b = inputs[1:5], inputs[6:22]
        assert len(set(a)) == 4 and len(set(b)) == 16 and min(a + b) >= 4 and max(a + b) < 2048
        (shared,) = set(a) & set(b)
        assert answers(targets) == [shared] and targets[-1] == shared
        places.add((a.index(shared), b.index(shared)))
    assert {i for i, _ in places} == set(range(4)) and {j for _, j in places} == set(range(16))


def test_set_disjointness_trains_on_the_papers_pairs_and_names_its_lengths():
    task = sequences("set_disjointness")
    shapes = []
    for step in range(400):
        (line,) = task.training_batch(0, step, 1, task.defaults.train_length).inputs.tolist()
        shapes.append((line.index(2) - 1, len(line) - line.index(2) - 2))
    pairs = [(4, 16), (8, 32), (16, 64), (4, 128), (16, 256), (4, 256)]
    assert set(shapes) == {*pairs, *((b, a) for a, b in pairs)}
    assert len(task.defaults.test_lengths) == 20 and task.length_label(16_004) == "16+4"
    assert task.problems((4016, task.defaults.train_length, *task.defaults.test_lengths)) == []
    found = sequences("set_disjointness", vocabulary=20, num_passes=0).problems((32, 4016, 4000))
    assert len(found) == 4
    for message, expected in zip(found, ("num_passes=0", "no length 32: write", "at least 36 for a set of 16", "4000")):
        assert expected in message
