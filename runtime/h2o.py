"""Which keys a cache of limited size keeps: the first ones, the last ones, and those that got most attention.

Zhang et al., H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, NeurIPS 2023; that
the first keys must stay: Xiao et al., Efficient Streaming Language Models with Attention Sinks, ICLR 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..passes.errors import ElisionError


@dataclass(frozen=True)
class H2O:
    """Keys of a sequence that stay between two rounds: `size` at most. Of these the first `sinks` and the last `recent`
    (None: half of what the sinks leave) always stay, the others are the keys with the most attention so far.

    Every layer and key head chooses for itself. What is dropped is gone: the text is not that of the whole cache."""

    size: int
    recent: int | None = None
    sinks: int = 4

    def __post_init__(self) -> None:
        """Raises ElisionError for numbers that leave no room."""
        if self.sinks < 0 or (self.recent is not None and self.recent < 1):
            raise ElisionError(
                f"of a limited cache 0 or more first and 1 or more recent keys stay, not {self.sinks} and {self.recent}"
            )
        if self.size < self.sinks + (self.recent or 1):
            raise ElisionError(
                f"a cache of {self.size} keys has no room for the first {self.sinks} and {self.recent or 1} recent ones"
            )

    @property
    def last(self) -> int:
        """How many recent keys stay."""
        return max(1, (self.size - self.sinks) // 2) if self.recent is None else self.recent

    @property
    def heavy(self) -> int:
        """How many keys stay for the attention they got."""
        return self.size - self.sinks - self.last

    def to_json(self) -> dict[str, Any]:
        return {"size": self.size, "recent": self.last, "sinks": self.sinks}


def choose(scores: np.ndarray, policy: H2O) -> np.ndarray:
    """The slots that stay, int64 [heads, min(size, n)], rising. scores [heads, n]: the attention every key got, keys in
    the order of the text. Of equal ones the earlier stays."""
    heads, count = scores.shape
    if count <= policy.size:
        return np.broadcast_to(np.arange(count), (heads, count))
    middle = scores[:, policy.sinks : count - policy.last]
    best = np.argsort(-middle, axis=1, kind="stable")[:, : policy.heavy] + policy.sinks
    first, last = np.arange(policy.sinks), np.arange(count - policy.last, count)
    ends = [np.broadcast_to(part, (heads, len(part))) for part in (first, last)]
    return np.concatenate([ends[0], np.sort(best, axis=1), ends[1]], axis=1)
