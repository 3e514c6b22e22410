"""Speculation: for each sequence and round, the draft tree that is worth verifying; and the guard that stops it where
it does not pay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .acceptance import Acceptance
from .draft_tree import Proposal, Tree
from .drafters import Draft, Drafter, Verified
from .tree_policy import MOST_ROWS, Marginal, Policy, Room
from .verify_costs import VerifyCosts

EXACT, SAMPLING = "exact", "sampling"


@dataclass
class Guard:
    """Turns speculation off for a while where tokens come no faster with it than without.

    Both rates are measured: of rounds with a tree, draft included, and of rounds without. After `trial` rounds that do
    not pay there are `pause` plain ones, then another trial; each failed trial doubles the pause, up to `longest`."""

    trial: int = 12
    pause: int = 24
    longest: int = 384
    margin: float = 0.01
    off: int = 0  # plain rounds still to come
    _tokens: float = 0.0
    _seconds: float = 0.0
    _plain: float = 0.0
    _rounds: int = 0
    _next: int = 0

    def wants(self) -> bool:
        if self.off > 0:
            self.off -= 1
            return False
        return True

    def plain(self, seconds: float) -> None:
        """A round of one row took this long."""
        self._plain = (
            seconds if self._plain == 0 else min(self._plain * 1.02, 0.8 * self._plain + 0.2 * seconds)
        )

    def speculated(self, tokens: int, seconds: float, expected: float) -> None:
        """A round with a tree gave `tokens` in `seconds`; expected: what one row would have taken, as measured when
        the model was, where no plain round has been seen yet."""
        self._tokens, self._seconds = 0.95 * self._tokens + tokens, 0.95 * self._seconds + seconds
        self._rounds += 1
        plain = self._plain or expected
        if self._rounds < self.trial or plain <= 0:
            return
        if self._tokens * plain < self._seconds * (1 - self.margin):
            self._next = min(self.longest, max(self.pause, 2 * self._next))
            self.off, self._rounds, self._tokens, self._seconds = self._next, 0, 0.0, 0.0
        elif self._rounds > 4 * self.trial:
            self._next = 0


@dataclass
class Spent:
    """Of one sequence: calls of the target (`rounds`), rows in them, tokens they gave, seconds by what they went into.
    In a batch a call's time is shared out by rows. trace: a record of each round, where it is asked for."""

    rounds: int = 0
    rows: int = 0
    tokens: int = 0
    draft: float = 0.0
    verify: float = 0.0
    rest: float = 0.0
    origins: dict[str, int] = field(default_factory=dict)
    trace: list[dict[str, Any]] | None = None


class Speculation:
    """What one generator drafts with. kept across prompts: what the drafter and the counts have learned.

    mode: "exact" commits what plain decoding would (for sampling: with its own random stream), "sampling" tests the
    proposals against the distribution, by their kind."""

    def __init__(
        self, drafter: Drafter, costs: VerifyCosts, policy: Policy | None = None, mode: str = EXACT,
        guard: bool = True, acceptance: Acceptance | None = None,
    ) -> None:  # fmt: skip
        self.drafter, self.costs, self.mode = drafter, costs, mode
        self.policy: Policy = policy or Marginal()
        self.acceptance = acceptance or Acceptance()
        self._guarded = guard
        self._curves: dict[tuple[int, int], Sequence[float]] = {}

    def begin(self, ids: Sequence[int], room: int, seed: Sequence[int]) -> SequenceDraft:
        """Of a sequence with these tokens, which will have `room` more at most."""
        self.acceptance.soften()
        return SequenceDraft(self, self.drafter.begin(ids, room), np.random.default_rng([*seed, 1]))

    def report(self, spent: Spent) -> dict[str, Any]:
        """What drafting came to for one sequence. Acceptance is that of all sequences so far."""
        return {
            "drafter": self.drafter.name,
            "tree": self.policy.name,
            "mode": self.mode,
            "verifications": spent.rounds,
            "rows_verified": spent.rows,
            "tokens_per_verification": round(spent.tokens / spent.rounds, 4) if spent.rounds else None,
            "accepted_from": dict(sorted(spent.origins.items())),
            "acceptance": self.acceptance.to_json(),
            "draft_seconds": round(spent.draft, 6),
            "verify_seconds": round(spent.verify, 6),
            "rest_seconds": round(spent.rest, 6),
        }

    def curve(self, past: int, sequences: int) -> Sequence[float]:
        """Seconds that rows of one sequence cost when `sequences` verify as many each, shared out among them."""
        key = (past // 64, sequences)
        found = self._curves.get(key)
        if found is None:
            whole = self.costs.curve(past, MOST_ROWS * sequences)
            found = self._curves[key] = [whole[rows * sequences] / sequences for rows in range(MOST_ROWS + 1)]
        return found


class SequenceDraft:
    """Drafting for one sequence."""

    def __init__(self, shared: Speculation, draft: Draft, random: np.random.Generator) -> None:
        self._shared, self.draft, self._random = shared, draft, random
        self.guard = Guard()
        self._expected = 0.0

    def propose(self, root: int, past: int, rows: int, depth: int, sequences: int) -> Tree:
        """A tree of at most `rows` nodes, root counted, and this depth."""
        shared = self._shared
        if rows < 2 or depth < 1 or (shared._guarded and not self.guard.wants()):
            return Tree.of(root)
        costs = shared.curve(past, sequences)
        self._expected = costs[1]
        room = Room(min(rows, MOST_ROWS), depth, costs, self._random)
        tree = shared.policy.grow(shared.drafter, self.draft, root, shared.acceptance, room)
        if len(tree) > room.rows or (len(tree) > 1 and max(tree.depths) > depth):
            tree = tree.cut(room.rows, depth)
        return tree.heavy_first() if tree.kind is Proposal.DETERMINISTIC else tree

    def observe(self, seen: Verified, seconds: float, drafting: float) -> None:
        """seconds: of the whole round; drafting: what of them went into the tree."""
        if len(seen.tree) == 1:
            self.guard.plain(seconds - drafting)
        else:
            self._shared.acceptance.verified(seen.tree, seen.tree.confirmed(seen.path, seen.new))
            self.guard.speculated(len(seen.new), seconds, self._expected)
        self.draft.observe(seen)

    def close(self) -> None:
        self.draft.close()
