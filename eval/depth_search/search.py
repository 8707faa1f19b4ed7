"""Monte Carlo tree search over chains (CoLa), and random chains with the same budget.

A node is a chain, its children are edits of it; the root is the identity. No chain is in the tree twice, so that every
simulation evaluates a new one. From the root on, the search descends to the child with the largest

    Q/v + c √(ln V / v) − λ |chain| / L

(Q: rewards at and below it, v: its visits, V: all), until it adds a child: where a node has fewer than ⌈2√v⌉, and
elsewhere with probability 0.1 (the paper's; without progressive widening, the hundreds of edits of the root would use
up all simulations). λ = 5 is the paper's. It does not say c; √2 is UCB1's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil, log, sqrt
from random import Random

from riverrun.eval.depth_search.chains import Chain, Space, draw_kind, neighbours, random_chain

Evaluate = Callable[[list[Chain]], list[float]]
"""Chains → their rewards, in [0, 1]."""

Rewards = dict[Chain, float]
"""In the order of evaluation, the identity first."""

TRIES = 100  # that random chains may all have been drawn before, until there seem to be no others


@dataclass(frozen=True)
class TreeOptions:
    """Attributes:
    simulations: chains that are evaluated, the identity counted.
    leaves: evaluated at a time. Until they are, each counts as a visit without reward (virtual loss).
    """

    simulations: int = 200
    leaves: int = 8
    exploration: float = sqrt(2)
    length_penalty: float = 5.0
    random_share: float = 0.1


@dataclass(eq=False)
class Node:
    """`shorter` and `longer` are edits not tried yet, shuffled; None: not listed yet. A closed node has nothing new."""

    chain: Chain
    parent: "Node | None" = None
    children: list["Node"] = field(default_factory=list)
    shorter: list[Chain] | None = None
    longer: list[Chain] = field(default_factory=list)
    visits: int = 0
    reward: float = 0.0
    closed: bool = False


def tree_search(space: Space, evaluate: Evaluate, options: TreeOptions, rng: Random) -> Rewards:
    """The chains that were evaluated: `simulations`, or all that edits lead to if there are fewer."""
    return _Tree(space, options, rng).search(evaluate)


class _Tree:
    def __init__(self, space: Space, options: TreeOptions, rng: Random):
        self.space, self.options, self.rng = space, options, rng
        self.root = Node(space.identity)
        self.seen = {space.identity}

    def search(self, evaluate: Evaluate) -> Rewards:
        rewards: Rewards = {}
        leaves = [self._visit(self.root)]
        while leaves:
            found = evaluate([leaf.chain for leaf in leaves])
            for leaf, reward in zip(leaves, found, strict=True):
                rewards[leaf.chain] = reward
                _credit(leaf, reward)
            leaves = []
            for _ in range(min(self.options.leaves, self.options.simulations - len(rewards))):
                if (new := self._grow()) is None:
                    break
                leaves.append(self._visit(new))
        return rewards

    def _visit(self, node: Node) -> Node:
        above: Node | None = node
        while above is not None:
            above.visits += 1
            above = above.parent
        return node

    def _grow(self) -> Node | None:
        """A new node of the tree; None: no edit leads to a new chain."""
        node = self.root
        while True:
            self._list_untried(node)
            untried, children = node.shorter or node.longer, [child for child in node.children if not child.closed]
            if untried and (
                not children
                or len(node.children) < ceil(2 * sqrt(node.visits))
                or self.rng.random() < self.options.random_share
            ):
                child = Node(draw_kind(self.rng, node.shorter or [], node.longer).pop(), node)
                node.children.append(child)
                self.seen.add(child.chain)
                return child
            if children:
                node = max(children, key=self._bound)
                continue
            node.closed = True
            if node is self.root:
                return None
            node = self.root

    def _list_untried(self, node: Node) -> None:
        if node.shorter is None:
            node.shorter, node.longer = map(list, neighbours(self.space, node.chain))
            self.rng.shuffle(node.shorter)
            self.rng.shuffle(node.longer)
        for chains in (node.shorter, node.longer):
            while chains and chains[-1] in self.seen:
                chains.pop()

    def _bound(self, node: Node) -> float:
        explore = self.options.exploration * sqrt(log(self.root.visits) / node.visits)
        penalty = self.options.length_penalty * len(node.chain) / len(self.space.identity)
        return node.reward / node.visits + explore - penalty


def _credit(node: Node | None, reward: float) -> None:
    while node is not None:
        node.reward += reward
        node = node.parent


def random_search(space: Space, evaluate: Evaluate, options: TreeOptions, rng: Random) -> Rewards:
    """The identity and random chains, each once, as many as a tree search evaluates."""
    rewards = dict(zip([space.identity], evaluate([space.identity])))
    seen = {space.identity}
    while len(rewards) < options.simulations:
        chains: list[Chain] = []
        while len(chains) < min(options.leaves, options.simulations - len(rewards)):
            drawn = (random_chain(space, rng) for _ in range(TRIES))
            if (new := next((chain for chain in drawn if chain not in seen), None)) is None:
                break
            seen.add(new)
            chains.append(new)
        if not chains:
            break
        rewards |= zip(chains, evaluate(chains), strict=True)
    return rewards


def best(rewards: Rewards) -> Chain:
    """That of the largest reward; of those, the shortest; of those, the first."""
    return max(rewards, key=lambda chain: (rewards[chain], -len(chain)))
