"""Drafters: what may follow, guessed cheaply. The protocol, and drafters made of others.

A drafter is shared by all sequences of a generator, and may learn from all of them; of each sequence it has a `Draft`.
Whatever it proposes, text stays that of plain decoding: a bad guess costs time only.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from .draft_tree import Proposal, Tree


class Guess(NamedTuple):
    """One token that may come next. key: what its acceptance is counted under; prior: its chance while nothing was
    counted yet; origin: the name of the drafter."""

    token: int
    key: Hashable
    prior: float
    origin: str


@dataclass(frozen=True)
class Verified:
    """What one verification told. tree: the one that was computed. best: int64 [M, k], the ids of the k largest scores
    after every node. path: the accepted nodes, from the root on. new: the tokens that were committed, one for each node
    of the path (fewer at the end of a text). hidden: float32 [M, H], where the step graph puts out hidden states."""

    tree: Tree
    best: np.ndarray
    path: Sequence[int]
    new: Sequence[int]
    hidden: np.ndarray | None = None


class Draft(Protocol):
    """A drafter's view of one sequence. States are whatever it likes."""

    def root(self) -> Any:
        """The state after all committed tokens."""
        ...

    def step(self, state: Any, token: int) -> Any:
        """The state after one more token, guessed by this drafter or by another one."""
        ...

    def expand(self, states: Sequence[Any]) -> list[list[Guess]]:
        """Guesses of what follows each of some states, likeliest first, no token twice."""
        ...

    def observe(self, seen: Verified) -> None:
        """`seen.new` were committed."""
        ...

    def close(self) -> None:
        """The sequence is at its end."""
        ...


class Drafter(Protocol):
    """kind: how its guesses are made. costly: whether `expand` takes about as long for several states as for one, and
    not next to nothing: then trees are grown level by level."""

    name: str
    kind: Proposal
    costly: bool

    def begin(self, ids: Sequence[int], room: int) -> Draft:
        """The draft of a new sequence with these tokens, the prompt and the first new one, which will have `room` more
        at most."""
        ...

    def seconds(self) -> float:
        """What one `expand` takes, about; 0 where that is next to nothing."""
        ...


class Union:
    """Guesses of several drafters side by side at every node of the tree; a token that two guess is the first's.
    first_only: a later drafter is asked only where those before it have nothing (n-grams first, then a fallback)."""

    kind = Proposal.DETERMINISTIC

    def __init__(self, drafters: Sequence[Drafter], *, first_only: bool = False) -> None:
        if any(drafter.kind is not Proposal.DETERMINISTIC for drafter in drafters):
            raise ValueError(
                "drafters that draw at random cannot be combined: their guesses are tested in one way"
            )
        self.drafters, self._first_only = list(drafters), first_only
        self.name = ("|" if first_only else "+").join(drafter.name for drafter in drafters)
        self.costly = any(drafter.costly for drafter in drafters)

    def begin(self, ids: Sequence[int], room: int) -> Draft:
        return _UnionDraft([drafter.begin(ids, room) for drafter in self.drafters], self._first_only)

    def seconds(self) -> float:
        return sum(drafter.seconds() for drafter in self.drafters)


class _UnionDraft:
    """A state is the tuple of all drafts' states."""

    def __init__(self, drafts: list[Draft], first_only: bool) -> None:
        self._drafts, self._first_only = drafts, first_only

    def root(self) -> tuple[Any, ...]:
        return tuple(draft.root() for draft in self._drafts)

    def step(self, state: tuple[Any, ...], token: int) -> tuple[Any, ...]:
        return tuple(draft.step(part, token) for draft, part in zip(self._drafts, state))

    def expand(self, states: Sequence[tuple[Any, ...]]) -> list[list[Guess]]:
        found: list[dict[int, Guess]] = [{} for _ in states]
        for number, draft in enumerate(self._drafts):
            asked = [i for i in range(len(states)) if not (self._first_only and found[i])]
            if not asked:
                break
            for place, guesses in zip(asked, draft.expand([states[i][number] for i in asked])):
                known = found[place]
                before = min(len(known), 2)
                for guess in guesses:
                    if guess.token not in known:
                        # Behind another drafter's guesses a rank has other chances.
                        key = (guess.key, before) if before else guess.key
                        known[guess.token] = guess._replace(key=key)
        return [list(known.values()) for known in found]

    def observe(self, seen: Verified) -> None:
        for draft in self._drafts:
            draft.observe(seen)

    def close(self) -> None:
        for draft in self._drafts:
            draft.close()
