"""How often proposals are accepted, learned while text is written.

A proposal has a key (which drafter, how deep, which rank, how long a match: whatever says something about its chances).
Under each key the share of accepted proposals among those whose parent was accepted is kept, older ones fading.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

MEMORY = 64.0
"""Proposals under one key after which older ones count for half and less."""

WEIGHT = 4.0
"""How many proposals the prior is worth."""


@dataclass
class Acceptance:
    """probability(key, prior): the chance of a proposal, given that its parent is accepted. `ranks` and `depths` count
    (proposed, accepted) for reports; a rank is a child's place among its siblings."""

    _counts: dict[Hashable, list[float]] = field(default_factory=dict)  # [chance, weight]
    ranks: dict[int, list[int]] = field(default_factory=dict)
    depths: dict[int, list[int]] = field(default_factory=dict)

    def probability(self, key: Hashable, prior: float) -> float:
        found = self._counts.get(key)
        if found is None:
            found = self._counts[key] = [prior, WEIGHT]
        return found[0]

    def observe(self, key: Hashable, accepted: bool) -> None:
        found = self._counts.get(key)
        if found is None:
            found = self._counts[key] = [0.5, WEIGHT]
        weight = min(found[1] + 1.0, MEMORY)
        found[0] += ((1.0 if accepted else 0.0) - found[0]) / weight
        found[1] = weight

    def soften(self, weight: float = 12.0) -> None:
        """What was counted so far counts less: another text begins."""
        for found in self._counts.values():
            found[1] = min(found[1], weight)

    def verified(self, tree: Any, path: Sequence[int]) -> None:
        """Counts a tree of which the nodes in `path`, from the root on, were accepted: each child of one of them was
        tested."""
        kept = set(path)
        for parent in path:
            for rank, child in enumerate(tree.children(parent)):
                accepted = child in kept
                if tree.keys[child] is not None:
                    self.observe(tree.keys[child], accepted)
                for table, entry in ((self.ranks, rank), (self.depths, tree.depths[child])):
                    counts = table.setdefault(entry, [0, 0])
                    counts[0] += 1
                    counts[1] += accepted

    def to_json(self) -> dict[str, Any]:
        """{"by_depth": {"1": share, ...}, "by_rank": ...}: the share accepted of those that were tested."""

        def shares(table: dict[int, list[int]]) -> dict[str, float]:
            return {str(key): round(hit / tried, 4) for key, (tried, hit) in sorted(table.items())}

        return {"by_depth": shares(self.depths), "by_rank": shares(self.ranks)}
