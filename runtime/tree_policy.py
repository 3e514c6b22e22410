"""Which guesses become nodes: shapes of draft trees.

`Marginal` is ours, and the default: nodes are added while what they are likely to bring is worth what a wider
verification costs on this machine. The others are the field's: `Fixed` templates, EAGLE-2's beam, and DySpec's greedy
expansion, for comparison and for drafters that draw at random.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .acceptance import Acceptance
from .draft_tree import Proposal, Tree
from .drafters import Draft, Drafter, Guess

MOST_ROWS = 64
"""Rows of one sequence in one verification."""


@dataclass(frozen=True)
class Room:
    """rows: nodes at most, the root counted. depth: of the deepest node at most. costs: seconds of a verification of
    0, 1, 2, ... rows, never falling. random: what drafters that draw at random use."""

    rows: int
    depth: int
    costs: Sequence[float]
    random: np.random.Generator | None = None


class Policy(Protocol):
    name: str

    def grow(self, drafter: Drafter, draft: Draft, root: int, acceptance: Acceptance, room: Room) -> Tree:
        """A tree of at most `room.rows` nodes, no deeper than `room.depth`."""
        ...


# ---- ours ----------------------------------------------------------------------------------------------
class Marginal:
    """The tree of the most tokens a second, as the counted chances and the measured costs see it.

    Nodes are taken by falling value (the product of the chances along the path), so that for every number of rows the
    tree is the best one, and the number is where (1 + sum of values) / cost is largest (Dinkelbach's rule for a ratio,
    as PPD and Sequoia choose sizes offline). Rows that cost nothing more are filled."""

    name = "marginal"
    slack = 1.01  # costs that differ by less are the same

    def grow(self, drafter: Drafter, draft: Draft, root: int, acceptance: Acceptance, room: Room) -> Tree:
        if drafter.costly:
            return self._by_levels(drafter, draft, root, acceptance, room)
        growth, costs = _BestFirst(draft, root, acceptance, room.depth), room.costs
        tree, total, rate, count = growth.tree, 1.0, 1.0 / costs[1], 1
        while growth.value > 0 and len(tree) < room.rows:
            if not _may_pay(total, growth.value, len(tree), rate, room):
                break
            total += growth.value
            growth.take()
            if total / costs[len(tree)] > rate:
                rate, count = total / costs[len(tree)], len(tree)
        free = count
        while free < len(tree) and costs[free + 1] <= costs[count] * self.slack:
            free += 1
        return tree.cut(free, room.depth)

    def _by_levels(
        self, drafter: Drafter, draft: Draft, root: int, acceptance: Acceptance, room: Room
    ) -> Tree:
        """For drafters whose time counts: the best few nodes of a level are expanded in one call, another level only
        while it is likely to bring more than its call costs."""
        grown = _levels(draft, root, acceptance, room, width=4, seconds=drafter.seconds(), pay=True)
        values = sorted(grown.values[1:], reverse=True)
        spent = max(grown.depths) * drafter.seconds()  # whether anything of it is verified or not
        total, rate, count = 1.0, 1.0 / (room.costs[1] + spent), 0
        for number, value in enumerate(values[: room.rows - 1], 1):
            total += value
            if total / (room.costs[number + 1] + spent) > rate:
                rate, count = total / (room.costs[number + 1] + spent), number
        return _likeliest(grown, count)


class _BestFirst:
    """A tree that grows by the likeliest of all guesses. value: the chance of that one, 0 where there is none."""

    def __init__(self, draft: Draft, root: int, acceptance: Acceptance, depth: int) -> None:
        self.tree = Tree.of(root)
        self._draft, self._acceptance, self._depth = draft, acceptance, depth
        self._heap: list[tuple[float, int, int, Guess, Any]] = []
        self._guesses = 0
        self._expand(0, draft.root())

    @property
    def value(self) -> float:
        return -self._heap[0][0] if self._heap else 0.0

    def take(self) -> None:
        negative, _, parent, guess, above = heapq.heappop(self._heap)
        node = self.tree.add(parent, guess.token, guess.key, -negative, guess.origin)
        self._expand(node, self._draft.step(above, guess.token))

    def _expand(self, node: int, state: Any) -> None:
        if self.tree.depths[node] >= self._depth:
            return
        for guess in self._draft.expand([state])[0]:
            chance = self.tree.values[node] * self._acceptance.probability(guess.key, guess.prior)
            self._guesses += 1
            heapq.heappush(self._heap, (-chance, self._guesses, node, guess, state))


def _may_pay(total: float, value: float, count: int, rate: float, room: Room) -> bool:
    """Whether some number of nodes no better than `value` could still raise the rate."""
    for rows in range(count + 1, room.rows + 1):
        total += value
        if total > rate * room.costs[rows]:
            return True
    return False


def _levels(
    draft: Draft, root: int, acceptance: Acceptance, room: Room, *, width: int, seconds: float, pay: bool,
    depth: int | None = None,
) -> Tree:  # fmt: skip
    """All guesses for the `width` best nodes of every level."""
    tree = Tree.of(root)
    frontier = [(0, draft.root())]
    rate = 1.0 / room.costs[1]
    for _ in range(room.depth if depth is None else min(depth, room.depth)):
        if pay and sum(tree.values[node] for node, _ in frontier) < rate * seconds:
            break
        found = []
        for (node, state), guesses in zip(frontier, draft.expand([state for _, state in frontier])):
            for guess in guesses:
                chance = tree.values[node] * acceptance.probability(guess.key, guess.prior)
                found.append((chance, tree.add(node, guess.token, guess.key, chance, guess.origin), state))
        found.sort(key=lambda entry: (-entry[0], entry[1]))
        frontier = [(node, draft.step(state, tree.tokens[node])) for _, node, state in found[:width]]
        if not frontier:
            break
    return tree


def _likeliest(tree: Tree, count: int) -> Tree:
    """The root and the `count` nodes of the highest values, which fall along every path."""
    nodes = sorted(range(1, len(tree)), key=lambda node: (-tree.values[node], node))[:count]
    return tree.of_nodes(sorted(nodes))


# ---- the field's ---------------------------------------------------------------------------------------
@dataclass
class Fixed:
    """widths[d] guesses for every node of depth d: (1, 1, 1) is a chain. Drafters that draw at random draw so many."""

    widths: tuple[int, ...] = (4, 2, 1, 1)
    name: str = "fixed"

    def grow(self, drafter: Drafter, draft: Draft, root: int, acceptance: Acceptance, room: Room) -> Tree:
        tree = Tree.of(root, drafter.kind)
        level = [(0, draft.root())]
        for width in self.widths[: room.depth]:
            if not level or len(tree) >= room.rows:
                break
            if drafter.kind is not Proposal.DETERMINISTIC:
                level = _drawn(tree, drafter, draft, level, width, room)
                continue
            below = []
            for (node, state), guesses in zip(level, draft.expand([state for _, state in level])):
                for guess in guesses[:width]:
                    if len(tree) >= room.rows:
                        return tree
                    value = tree.values[node] * acceptance.probability(guess.key, guess.prior)
                    child = tree.add(node, guess.token, guess.key, value, guess.origin)
                    below.append((child, draft.step(state, guess.token)))
            level = below
        return tree


@dataclass
class Beam:
    """EAGLE-2 (Li et al. 2024): the `beam` best nodes of each of `depth` levels are expanded, and the `size` best of
    all nodes kept, by the product of chances along the path."""

    size: int = 16
    beam: int = 4
    depth: int = 4
    name: str = "beam"

    def grow(self, drafter: Drafter, draft: Draft, root: int, acceptance: Acceptance, room: Room) -> Tree:
        grown = _levels(
            draft, root, acceptance, room, width=self.beam, seconds=0.0, pay=False, depth=self.depth
        )
        return _likeliest(grown, min(self.size, room.rows) - 1)


@dataclass
class DySpec:
    """DySpec (Xiong et al. 2024): always the slot that verification is likeliest to reach, up to `size` nodes.

    With a drafter that draws without replacement a slot's token is drawn when the slot is taken, so that the choice of
    slots depends on earlier draws only, as verification by rejection asks for."""

    size: int = 16
    name: str = "dyspec"

    def grow(self, drafter: Drafter, draft: Draft, root: int, acceptance: Acceptance, room: Room) -> Tree:
        size = min(self.size, room.rows)
        if drafter.kind is Proposal.DETERMINISTIC:
            growth = _BestFirst(draft, root, acceptance, room.depth)
            while growth.value > 0 and len(growth.tree) < size:
                growth.take()
            return growth.tree
        tree = Tree.of(root, drafter.kind)
        heap: list[tuple[float, int, int, Any]] = [(-1.0, 0, 0, draft.root())]
        order = 0
        while heap and len(tree) < size:
            negative, _, node, state = heapq.heappop(heap)
            known = tree.draws.get(node)
            q = draft.distribution([state])[0] if known is None else known[0]  # type: ignore[attr-defined]
            drawn = draw(tree, node, q, room.random)
            if drawn is None:
                continue
            token, chance = drawn
            child = tree.add(node, token, _key_of_draw(tree, node), -negative * chance, drafter.name)
            order += 2
            rest = -negative * (1.0 - chance)
            if rest > 0:
                heapq.heappush(heap, (-rest, order, node, state))
            if tree.depths[child] < room.depth:
                heapq.heappush(heap, (negative * chance, order + 1, child, draft.step(state, token)))
        return tree


# ---- at random -----------------------------------------------------------------------------------------
def draw(
    tree: Tree, node: int, q: np.ndarray, random: np.random.Generator | None
) -> tuple[int, float] | None:
    """One more child of `node` from the draft's distribution q [V], as the tree's kind of proposal says: its token, and
    the chance it was drawn with. None where nothing is left to draw. The draw is noted in `tree.draws`."""
    assert random is not None, "drafters that draw need a generator of random numbers"
    q, order = tree.draws.setdefault(node, (q, []))
    left = q
    if tree.kind is Proposal.WITHOUT_REPLACEMENT and order:
        left = q.copy()
        left[order] = 0.0
    total = float(left.sum())
    if not total > 0:
        return None
    bounds = np.cumsum(left)
    token = min(int(np.searchsorted(bounds, random.random() * bounds[-1], side="right")), len(q) - 1)
    if left[token] <= 0:  # rounding at the very end
        token = int(np.argmax(left))
    order.append(token)
    return token, float(left[token]) / total


def _key_of_draw(tree: Tree, node: int) -> Hashable:
    return ("draw", min(tree.depths[node], 4), min(len(tree.children(node)), 3))


def _drawn(
    tree: Tree, drafter: Drafter, draft: Draft, level: list[tuple[int, Any]], width: int, room: Room
) -> list[tuple[int, Any]]:
    """`width` draws for every node of a level; the nodes below."""
    below: dict[int, Any] = {}
    distributions = draft.distribution([state for _, state in level])  # type: ignore[attr-defined]
    for (node, state), q in zip(level, distributions):
        for _ in range(width):
            if len(tree) >= room.rows:
                return list(below.items())
            drawn = draw(tree, node, q, room.random)
            if drawn is None:
                break
            token, chance = drawn
            child = tree.add(node, token, _key_of_draw(tree, node), tree.values[node] * chance, drafter.name)
            if child not in below:
                below[child] = draft.step(state, token)
    return list(below.items())
