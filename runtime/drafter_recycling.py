"""Token Recycling: what once scored high after a token may follow it again (Luo et al., ACL 2025).

Every verified row, accepted or not, tells the best ids after its token. They are kept by the token, and by the token
with the one before it, which says more where it is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .draft_tree import Proposal
from .drafters import Draft, Guess, Verified

WIDTH = 4
"""How many of a row's best ids are kept: the fifth is hardly ever accepted."""

PAIRS = 1 << 17
"""Pairs of tokens that are remembered; the oldest give way."""

# Chances of a rank before anything was counted.
_PRIORS = {2: (0.55, 0.10, 0.05, 0.03), 1: (0.30, 0.10, 0.06, 0.04)}


class Recycling:
    name = "recycling"
    kind = Proposal.DETERMINISTIC
    costly = False

    def __init__(self) -> None:
        self._after: dict[int, list[int]] = {}
        self._after_pair: dict[tuple[int, int], list[int]] = {}

    def begin(self, ids: Sequence[int], room: int) -> Draft:
        return _RecyclingDraft(self, list(ids[-2:]))

    def seconds(self) -> float:
        return 0.0

    def learn(self, before: int | None, token: int, best: list[int]) -> None:
        self._after[token] = best
        if before is not None:
            self._after_pair.pop((before, token), None)  # back to the end: the youngest
            self._after_pair[(before, token)] = best

    def forget(self) -> None:
        while len(self._after_pair) > PAIRS:
            del self._after_pair[next(iter(self._after_pair))]

    def best(self, before: int | None, token: int) -> tuple[int, list[int]]:
        """(how many tokens of context it rests on, ids); (0, []) where nothing is known."""
        if before is not None:
            found = self._after_pair.get((before, token))
            if found is not None:
                return 2, found
        found = self._after.get(token)
        return (1, found) if found is not None else (0, [])


class _RecyclingDraft:
    """A state: (the token before, the token, depth)."""

    def __init__(self, table: Recycling, last: list[int]) -> None:
        self._table, self._last = table, last

    def root(self) -> tuple[int | None, int, int]:
        before = self._last[-2] if len(self._last) > 1 else None
        return before, self._last[-1], 1

    def step(self, state: tuple[int | None, int, int], token: int) -> tuple[int | None, int, int]:
        return state[1], token, state[2] + 1

    def expand(self, states: Sequence[tuple[int | None, int, int]]) -> list[list[Guess]]:
        found = []
        for before, token, depth in states:
            order, ids = self._table.best(before, token)
            priors = _PRIORS.get(order, ())
            level = min(depth, 4)
            found.append(
                [
                    Guess(new, ("recycling", order, rank, level), prior, "recycling")
                    for rank, (new, prior) in enumerate(zip(ids, priors))
                ]
            )
        return found

    def observe(self, seen: Verified) -> None:
        tree, table = seen.tree, self._table
        root_before = self._last[-2] if len(self._last) > 1 else None
        best: Any = seen.best[:, :WIDTH].tolist()
        for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents)):
            before = root_before if parent < 0 else tree.tokens[parent]
            table.learn(before, token, best[node])
        table.forget()
        self._last = [*self._last, *seen.new][-2:]

    def close(self) -> None:
        pass
