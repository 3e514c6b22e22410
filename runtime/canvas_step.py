"""What runs the two graphs of a masked diffusion model (pass `window`): a refresh and a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .lm_step import Rows


@dataclass(frozen=True)
class Scored:
    """What is known of R scored rows. ids int64 [R, k]: of the k largest logits, the lowest first of equals. values
    float32 [R, k]: these logits, descending. log_sum float32 [R]: log of the sum of exp of all logits. entropy float32
    [R], in nats: of their softmax. logits float32 [R, V]: all of them, where they were asked for."""

    ids: np.ndarray
    values: np.ndarray
    log_sum: np.ndarray
    entropy: np.ndarray
    logits: np.ndarray | None = None

    def of(self, rows: slice | np.ndarray) -> Scored:
        """Some of the rows, by slice or by number."""
        logits = None if self.logits is None else self.logits[rows]
        return Scored(self.ids[rows], self.values[rows], self.log_sum[rows], self.entropy[rows], logits)


class CanvasModel(Protocol):
    """A masked diffusion model over a cache of `capacity` slots. `vocabulary`: V; `largest_k`: k of `Scored`.

    Position p of a canvas that begins at slot s has the slot s + p. Results are good until the next call."""

    capacity: int
    vocabulary: int
    largest_k: int

    def refresh(self, start: int, ids: np.ndarray, keep: np.ndarray, whole: bool = False) -> Scored:
        """Computes positions 0 .. E-1 of a canvas from its ids int64 [E], every one of which sees all E and no other,
        and writes their keys and values into the slots start .. start + E - 1. keep int64 [R]: the positions that are
        scored. whole: with all logits."""
        ...

    def step(self, rows: Rows, keep: np.ndarray, whole: bool = False) -> Scored:
        """Computes rows, of one canvas or of several: their keys and values go into their slots first, then each row
        sees the slots that it says (its own among them, whatever the order). keep int64 [R]: numbers of the rows that
        are scored."""
        ...
