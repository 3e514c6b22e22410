"""A stand-in for a step graph that costs next to nothing, and drafters and trees that are good or bad on purpose."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from elision.passes.errors import ElisionError
from elision.runtime.draft_tree import Proposal, Tree
from elision.runtime.drafters import Guess, Verified
from elision.runtime.lm_step import Largest, Rows, largest_of
from elision.runtime.speculation import Speculation
from elision.runtime.tree_policy import Room
from elision.runtime.verify_costs import flat


class Hashing:
    """Scores come from a hash of the last `order` ids that a row sees (None: of all of them), so that text is soon
    periodic for a small order. letters: the ids that can be chosen at all.

    A slot remembers id and position; a row may only see what was written for just that position."""

    def __init__(
        self, vocabulary: int = 12, capacity: int = 200, order: int | None = 2, *, spread: float = 2.0,
        letters: Sequence[int] | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        self.vocabulary, self.capacity, self.largest_k = vocabulary, capacity, 8
        self._order, self._spread, self._letters, self._seed = order, spread, letters, seed
        self._ids, self._at = np.full(capacity, -1), np.full(capacity, -1)
        self._known: dict[Any, np.ndarray] = {}
        self._given = np.empty((0, vocabulary), np.float32)
        self.calls: list[int] = []
        self.moved = 0

    def scores(self, ids: Sequence[int]) -> np.ndarray:
        """float32 [V]: what may follow these ids."""
        key = tuple(ids) if self._order is None else tuple(ids)[-self._order :]
        found = self._known.get(key)
        if found is None:
            random = np.random.default_rng([self._seed, len(key), *key])
            found = (random.standard_normal(self.vocabulary) * self._spread).astype(np.float32)
            if self._letters is not None:
                barred = np.ones(self.vocabulary, bool)
                barred[list(self._letters)] = False
                found[barred] -= 100
            self._known[key] = found
        return found

    def best(self, ids: Sequence[int]) -> list[int]:
        return np.argsort(-self.scores(ids), kind="stable").tolist()

    def step(self, rows: Rows, keep: Sequence[int] | None = None) -> np.ndarray:
        self._given[:] = np.nan  # good until the next call only
        slots = rows.slots.tolist()
        assert len(set(slots)) == len(slots) and min(slots) >= 0 and max(slots) < self.capacity
        assert ((rows.ids >= 0) & (rows.ids < self.vocabulary)).all()
        self.calls.append(len(rows))
        self._ids[rows.slots], self._at[rows.slots] = rows.ids, rows.positions
        kept = range(len(rows)) if keep is None else keep
        self._given = np.stack([self.scores(self._seen(rows, m)) for m in kept])
        return self._given

    def _seen(self, rows: Rows, m: int) -> list[int]:
        start, count = rows.prefix[m]
        own = rows.ancestors[m][rows.ancestors[m] >= 0]
        assert own[-1] == rows.slots[m]
        keys = [*range(start, start + count), *own.tolist()]
        assert rows.positions[m] == len(keys) - 1
        assert self._at[keys].tolist() == list(range(len(keys))), "a slot that was written for another place"
        return self._ids[keys].tolist()

    def largest(self, rows: Rows, keep: Sequence[int] | None = None) -> Largest:
        return largest_of(self.step(rows, keep), self.largest_k)

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        self.moved += 1
        self._ids[target], self._at[target] = self._ids[source], self._at[source]

    def begin(self, inputs: dict[str, Any]) -> None:
        raise ElisionError("no encoder")


# ---- drafters ------------------------------------------------------------------------------------------
Follow = Callable[[tuple[int, ...]], Sequence[int]]
"""All ids so far -> guesses of the next, the likeliest first."""


class Scripted:
    """Guesses what `follow` says, and checks what it is told. `open`: sequences that are under way."""

    name, kind = "scripted", Proposal.DETERMINISTIC

    def __init__(self, follow: Follow, *, costly: bool = False, seconds: float = 0.0) -> None:
        self.follow, self.costly, self._seconds = follow, costly, seconds
        self.open = self.expanded = 0
        self.seen: list[Verified] = []

    def begin(self, ids: Sequence[int], room: int) -> ScriptedDraft:
        self.open += 1
        return ScriptedDraft(self, tuple(ids), room)

    def seconds(self) -> float:
        return self._seconds


class Drawing(Scripted):
    """Draws from q(ids), float [V], as `kind` says."""

    name = "drawing"

    def __init__(self, q: Callable[[tuple[int, ...]], np.ndarray], kind: Proposal) -> None:
        super().__init__(lambda ids: [])
        self.q, self.kind = q, kind


class ScriptedDraft:
    """A state is all ids so far."""

    def __init__(self, drafter: Scripted, ids: tuple[int, ...], room: int) -> None:
        self._drafter, self._ids, self._room = drafter, ids, room
        self._closed = False

    def root(self) -> tuple[int, ...]:
        return self._ids

    def step(self, state: tuple[int, ...], token: int) -> tuple[int, ...]:
        return (*state, token)

    def expand(self, states: Sequence[tuple[int, ...]]) -> list[list[Guess]]:
        assert states, "nothing to expand"
        self._drafter.expanded += 1
        return [
            [
                Guess(int(token), ("scripted", rank), 0.8 / (rank + 1), self._drafter.name)
                for rank, token in enumerate(self._drafter.follow(state))
            ]
            for state in states
        ]

    def distribution(self, states: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        assert states, "nothing to draw for"
        return [self._drafter.q(state) for state in states]  # type: ignore[attr-defined]

    def observe(self, seen: Verified) -> None:
        assert not self._closed
        assert seen.tree.tokens[0] == self._ids[-1]
        assert len(seen.best) == len(seen.tree)
        assert len(seen.path) == len(seen.new) <= self._room
        assert [seen.tree.tokens[node] for node in seen.path[1:]] == list(seen.new[:-1])
        assert list(seen.path) == [0, *(n for n in seen.path if seen.tree.parents[n] in seen.path)]
        self._room -= len(seen.new)
        self._ids += tuple(seen.new)
        self._drafter.seen.append(seen)

    def close(self) -> None:
        assert not self._closed
        self._closed = True
        self._drafter.open -= 1


def oracle(model: Hashing, *, right: float = 1.0, width: int = 1) -> Scripted:
    """Runs the model itself; wrong about the best id where a hash of the text says so."""

    def follow(ids: tuple[int, ...]) -> list[int]:
        best = model.best(ids)
        wrong = zlib.crc32(repr(ids).encode()) % 1000 >= 1000 * right
        return best[1 : width + 1] if wrong else best[:width]

    return Scripted(follow)


def knows(texts: Sequence[Sequence[int]], vocabulary: int, *, right: float = 1.0) -> Scripted:
    """Knows some texts, whatever chose their ids."""
    known = [tuple(text) for text in texts]

    def follow(ids: tuple[int, ...]) -> list[int]:
        for text in known:
            if text[: len(ids)] == ids and len(text) > len(ids):
                wrong = zlib.crc32(repr(ids).encode()) % 1000 >= 1000 * right
                return [(text[len(ids)] + wrong) % vocabulary, (text[len(ids)] + 2) % vocabulary]
        return [0]

    return Scripted(follow)


class Wild:
    """Trees of any shape, some of their nodes right by what the drafter says, larger and deeper than there is room."""

    name = "wild"

    def __init__(self, vocabulary: int, seed: int = 0, size: int = 24) -> None:
        self._vocabulary, self._size = vocabulary, size
        self._random = np.random.default_rng(seed)

    def grow(self, drafter: Any, draft: Any, root: int, acceptance: Any, room: Room) -> Tree:
        tree, states, random = Tree.of(root), [draft.root()], self._random
        for _ in range(int(random.integers(0, self._size + 1))):
            parent = int(random.integers(0, len(tree)) if random.random() < 0.5 else len(tree) - 1)
            guesses = draft.expand([states[parent]])[0]
            known = bool(guesses) and random.random() < 0.7
            token = guesses[0].token if known else int(random.integers(0, self._vocabulary))
            node = tree.add(parent, token, ("wild", known), float(random.random()), "wild")
            if node == len(states):
                states.append(draft.step(states[parent], token))
        return tree


def drafting(drafter: Any, policy: Any, *, mode: str = "exact", guard: bool = False) -> Speculation:
    return Speculation(drafter, flat(1e-3), policy, mode, guard)


# ---- statistics ----------------------------------------------------------------------------------------
def chi_square(counts: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """(the statistic, what it exceeds once in a thousand tests). Cells that are expected to be rare count as one."""
    rare = expected < 8
    assert counts[expected == 0].sum() == 0, "something impossible came"
    pooled = [counts[rare].sum()] if expected[rare].sum() > 0 else []
    counts = np.append(counts[~rare], pooled)
    expected = np.append(expected[~rare], [expected[rare].sum()] if pooled else [])
    free = len(counts) - 1
    at = 2 / (9 * free)
    return float(((counts - expected) ** 2 / expected).sum()), free * (1 - at + 3.09 * at**0.5) ** 3
