"""Draft trees: what a drafter proposes to follow the last committed token, as flat arrays.

Node 0 is the root, the last committed token, which no cache holds yet. A parent comes before its children, and two
children of one parent never hold the same token: a walk down the tree is then a walk down a text.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np


class Proposal(Enum):
    """How children were chosen, which decides how they may be tested when text is sampled.

    DETERMINISTIC: without chance (the best of something). INDEPENDENT: each drawn from the draft's distribution, the
    same again and again. WITHOUT_REPLACEMENT: drawn from it one after the other, none twice."""

    DETERMINISTIC = "deterministic"
    INDEPENDENT = "independent"
    WITHOUT_REPLACEMENT = "without replacement"


@dataclass
class Tree:
    """tokens, parents (-1 of the root), depths (0 of the root): one entry for each node.

    keys: what acceptance is counted under, None of the root. values: how likely it is, as the drafter sees it, that
    verification reaches and accepts the node. origins: which drafter found it. kind: of all proposals in it. draws: by
    node, the draft's distribution behind it, float [V], and the tokens in the order drawn, equal ones too; needed for
    the kinds that draw."""

    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [-1])
    depths: list[int] = field(default_factory=lambda: [0])
    keys: list[Hashable] = field(default_factory=lambda: [None])
    values: list[float] = field(default_factory=lambda: [1.0])
    origins: list[str] = field(default_factory=lambda: [""])
    kind: Proposal = Proposal.DETERMINISTIC
    draws: dict[int, tuple[np.ndarray, list[int]]] = field(default_factory=dict)
    _children: list[dict[int, int]] = field(default_factory=lambda: [{}], repr=False)

    @classmethod
    def of(cls, root: int, kind: Proposal = Proposal.DETERMINISTIC) -> Tree:
        return cls([root], kind=kind)

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, parent: int, token: int, key: Hashable = None, value: float = 0.0, origin: str = "") -> int:
        """The new node's number, or that of the child which holds the token already."""
        children = self._children[parent]
        if token in children:
            return children[token]
        node = children[token] = len(self.tokens)
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.keys.append(key)
        self.values.append(value)
        self.origins.append(origin)
        self._children.append({})
        return node

    def child(self, node: int, token: int) -> int | None:
        return self._children[node].get(token)

    def children(self, node: int) -> list[int]:
        """In the order in which they were added."""
        return list(self._children[node].values())

    def path(self, node: int) -> list[int]:
        """The tokens from below the root down to `node`."""
        tokens = []
        while node > 0:
            tokens.append(self.tokens[node])
            node = self.parents[node]
        return tokens[::-1]

    def confirmed(self, path: Sequence[int], new: Sequence[int]) -> list[int]:
        """The nodes whose tokens were committed: the accepted ones, and a child of the last of them that holds the
        token with which the text ended."""
        last = self.child(path[-1], new[-1])
        return [*path] if last is None else [*path, last]

    def cut(self, count: int, depth: int) -> Tree:
        """The first `count` nodes, none deeper than `depth`: a tree again, since parents come first."""
        whole = count > len(self) or (count == len(self) and self.kind is not Proposal.INDEPENDENT)
        if whole and (len(self) == 1 or max(self.depths) <= depth):
            return self
        fits = [node for node in range(1, len(self)) if self.depths[node] <= depth]
        made = self.of_nodes(fits[: max(0, count - 1)])
        if self.kind is not Proposal.DETERMINISTIC:
            made.draws = {
                node: (q, [t for t in order if made.child(node, t) is not None])
                for node, (q, order) in made.draws.items()
            }
        node = made.parents[-1]
        if self.kind is Proposal.INDEPENDENT and len(made) >= count and node in made.draws:
            # Later draws are still there only where they equal earlier ones, which testing must not depend on.
            q, order = made.draws[node]
            made.draws[node] = (q, order[: order.index(made.tokens[-1]) + 1])
        return made

    def heavy_first(self) -> Tree:
        """The same tree, numbered depth first, the likeliest child first: when its likeliest path is accepted, the
        rows of the cache that hold it lie where they belong."""
        order: list[int] = []
        stack = self._by_value(0)
        while stack:
            order.append(stack.pop())
            stack += self._by_value(order[-1])
        return self.of_nodes(order)

    def of_nodes(self, nodes: Sequence[int]) -> Tree:
        """The tree of the root and these nodes, in this order: parents are among them, before their children."""
        made, place = Tree.of(self.tokens[0], self.kind), {0: 0}
        for node in nodes:
            place[node] = made.add(
                place[self.parents[node]],
                self.tokens[node], self.keys[node], self.values[node], self.origins[node],
            )  # fmt: skip
        made.draws = {place[node]: drawn for node, drawn in self.draws.items() if node in place}
        return made

    def _by_value(self, node: int) -> list[int]:
        """The likeliest last, of equals the first."""
        return sorted(self._children[node].values(), key=lambda child: -self.values[child])[::-1]

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "parents": self.parents,
            "values": [round(float(value), 4) for value in self.values],
            "origins": self.origins,
        }


def from_paths(root: int, paths: Sequence[Sequence[int]], key: Hashable = None, origin: str = "") -> Tree:
    """The tree of several continuations; beginnings that they share are there once."""
    tree = Tree.of(root)
    for path in paths:
        node = 0
        for token in path:
            node = tree.add(node, int(token), key, 0.0, origin)
    return tree
