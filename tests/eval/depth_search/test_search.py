"""Chains, edits, the tree search and random chains, without a model."""

import random

import pytest
from planted import all_chains

from riverrun.eval.depth_search.chains import Space, in_words, neighbours, random_chain
from riverrun.eval.depth_search.search import TreeOptions, best, random_search, tree_search

SEARCHES = [tree_search, random_search]


def counting(is_right=lambda chain: False):
    """A reward, and the batches of chains that it was asked for."""
    asked = []

    def evaluate(chains):
        asked.append(list(chains))
        return [float(is_right(chain)) for chain in chains]

    return evaluate, asked


# chains


def test_neighbours_by_hand():
    shorter, longer = neighbours(Space(tuple(range(3)), k=2, r=2), (0, 1, 2))
    assert set(shorter) == {(1, 2), (0, 2), (0, 1), (2,), (0,)} and len(shorter) == 5
    assert set(longer) == {
        (0, 0, 1, 2), (0, 0, 0, 1, 2), (0, 1, 1, 2), (0, 1, 1, 1, 2), (0, 1, 2, 2), (0, 1, 2, 2, 2),
        (0, 1, 0, 1, 2), (0, 1, 2, 1, 2),
    }  # fmt: skip  # blocks of two run again once: twice would make 7 layers of 3
    assert len(longer) == 8


def test_edits_of_a_whole_model_are_counted():
    shorter, longer = neighbours(Space(tuple(range(36))), tuple(range(36)))
    assert (len(shorter), len(longer)) == (36 + 35 + 34 + 33, 4 * (36 + 35 + 34 + 33))


def test_edits_act_on_chains_and_leave_something():
    space = Space(tuple(range(2)), k=4, r=4)
    assert neighbours(space, (1,)) == ((), ((1, 1), (1, 1, 1), (1, 1, 1, 1)))
    assert (1, 0, 1, 0) in all_chains(space) and () not in all_chains(space)
    assert max(map(len, all_chains(space))) == 4
    assert len(neighbours(space, (1, 1, 1, 1)).shorter) == 3  # equal chains once


def test_chains_in_words():
    assert in_words((0, 1, 2, 3, 5, 5, 6, 7, 11)) == "0-3 5 5-7 11" and in_words((2,)) == "2"


def test_random_chains_shorten_and_lengthen_alike():
    space, rng = Space(tuple(range(12))), random.Random(0)
    chains = [random_chain(space, rng) for _ in range(2000)]
    shorter = sum(len(chain) < 12 for chain in chains) / len(chains)
    assert 0.3 < shorter < 0.6 and max(map(len, chains)) <= 24
    once = {chain for part in neighbours(space, space.identity) for chain in part}
    assert 0.4 < sum(chain in once for chain in chains) / len(chains) < 0.65
    assert set(chains) - once


# searches


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("leaves", [1, 7])
def test_every_simulation_evaluates_a_new_chain(search, leaves):
    evaluate, asked = counting(lambda chain: len(chain) < 4)
    rewards = search(Space(tuple(range(6))), evaluate, TreeOptions(60, leaves), random.Random(1))
    chains = [chain for batch in asked for chain in batch]
    assert len(chains) == len(set(chains)) == 60 and list(rewards) == chains
    assert asked[0] == [tuple(range(6))] and max(map(len, asked)) == leaves
    assert all(reward == (len(chain) < 4) for chain, reward in rewards.items())


@pytest.mark.parametrize("search", SEARCHES)
def test_a_seed_repeats_itself(search):
    def found(seed):
        evaluate, _ = counting(lambda chain: 2 not in chain)
        return list(search(Space(tuple(range(6))), evaluate, TreeOptions(50), random.Random(seed)).items())

    assert found(3) == found(3) != found(4)


@pytest.mark.parametrize("leaves", [1, 8])
def test_a_search_ends_when_there_is_nothing_new(leaves):
    space = Space(tuple(range(3)), k=2, r=1)
    every = all_chains(space)
    assert len(every) == 1008  # of 1092 sequences of up to 6 layers
    evaluate, _ = counting()
    rewards = tree_search(space, evaluate, TreeOptions(5000, leaves), random.Random(0))
    assert set(rewards) == every
    drawn = random_search(space, evaluate, TreeOptions(5000, leaves), random.Random(0))
    assert set(drawn) <= every and len(drawn) > 20


@pytest.mark.parametrize("constants", [{}, {"exploration": 0.2, "length_penalty": 1.0}])
def test_a_search_gets_further_than_random_chains(constants):
    """Layer 5 spoils the answer, and of five others at least three are needed."""
    is_right = lambda chain: 5 not in chain and len({0, 3, 4, 8, 11} & set(chain)) >= 3  # noqa: E731
    options = TreeOptions(200, **constants)

    def mean_shortest(search):
        lengths = []
        for seed in range(10):
            rewards = search(Space(tuple(range(12))), counting(is_right)[0], options, random.Random(seed))
            lengths.append(min(len(chain) for chain, reward in rewards.items() if reward))
        return sum(lengths) / len(lengths)

    assert mean_shortest(tree_search) < mean_shortest(random_search) - 0.5


def test_the_penalty_drives_towards_short_chains():
    def mean_length(penalty):
        evaluate, asked = counting(lambda chain: True)
        tree_search(Space(tuple(range(12))), evaluate, TreeOptions(200, length_penalty=penalty), random.Random(0))
        chains = [chain for batch in asked for chain in batch]
        return sum(map(len, chains)) / len(chains)

    assert mean_length(5.0) < mean_length(0.0) - 1


@pytest.mark.parametrize("leaves", [1, 8])
def test_the_planted_optimum_is_found(leaves):
    """Right are the chains without layer 1 in which layer 2 runs at least twice: the shortest of all is (2, 2)."""
    space, is_right = Space(tuple(range(3)), k=2, r=2), lambda chain: 1 not in chain and chain.count(2) >= 2
    right = sorted(filter(is_right, all_chains(space)), key=len)
    assert right[0] == (2, 2) and len(right[1]) > 2 and not is_right(space.identity)
    for seed in range(5):
        evaluate, _ = counting(is_right)
        assert best(tree_search(space, evaluate, TreeOptions(60, leaves), random.Random(seed))) == (2, 2)


def test_the_best_is_right_then_short_then_first():
    assert best({(0, 1): 0.5, (0,): 0.2, (1, 1): 1.0, (1,): 1.0, (0, 0, 1): 1.0, (2,): 1.0}) == (1,)
