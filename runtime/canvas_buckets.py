"""Few shapes: rows, positions and slots of every call are rounded up, for hosts that compile for each shape."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..passes.errors import ElisionError
from .canvas_step import CanvasModel, Scored
from .lm_step import Rows

ROWS, POSITIONS = 16, 64
"""By default a call has a multiple of so many rows, and a refresh one of so many positions."""


@dataclass
class Bucketed:
    """`model`, called with few shapes: only its step graph is, also for a refresh, whose rows see all positions of the
    canvas. Rows that fill a bucket up read and write one slot of their own, the last of the cache. `shapes` are those
    that were seen: rows, scored rows, slots listed one by one."""

    model: CanvasModel
    rows: int = ROWS
    positions: int = POSITIONS
    shapes: set[tuple[int, int, int]] = field(default_factory=set)
    capacity: int = field(init=False)
    vocabulary: int = field(init=False)
    largest_k: int = field(init=False)

    def __post_init__(self) -> None:
        if self.rows < 1 or self.positions < 1:
            raise ElisionError("buckets hold 1 or more rows, and 1 or more positions")
        self.capacity, self.vocabulary = self.model.capacity - 1, self.model.vocabulary
        self.largest_k = self.model.largest_k

    def refresh(self, start: int, ids: np.ndarray, keep: np.ndarray, whole: bool = False) -> Scored:
        count = len(ids)
        positions = np.arange(count)
        slots = (start + positions).astype(np.int32)
        prefix = np.tile(np.array([[start, count]], np.int32), (count, 1))
        rows = Rows(np.asarray(ids, np.int64), positions, slots, prefix, np.full((count, 1), -1, np.int32))
        return self._step(rows, keep, whole, self.positions)

    def step(self, rows: Rows, keep: np.ndarray, whole: bool = False) -> Scored:
        return self._step(rows, keep, whole, self.rows)

    def _step(self, rows: Rows, keep: np.ndarray, whole: bool, unit: int) -> Scored:
        count, wanted = len(rows), np.asarray(keep, np.int64)
        more, width = _up(count, unit) - count, _up(rows.ancestors.shape[1], self.rows)
        spare = self.model.capacity - 1
        ancestors = np.full((count + more, width), -1, np.int32)
        ancestors[:count, : rows.ancestors.shape[1]] = rows.ancestors
        ancestors[count:, 0] = spare
        call = Rows(
            np.concatenate([rows.ids, np.full(more, rows.ids[0])]),
            np.concatenate([rows.positions, np.full(more, rows.positions[0])]),
            np.concatenate([rows.slots, np.full(more, spare, rows.slots.dtype)]),
            np.concatenate([rows.prefix, np.zeros((more, 2), rows.prefix.dtype)]),
            ancestors,
        )
        scored = _filled(wanted, self.rows)
        self.shapes.add((len(call), len(scored), width))
        return self.model.step(call, scored, whole).of(slice(len(wanted)))


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def _filled(keep: np.ndarray, unit: int) -> np.ndarray:
    """`keep` with its last number once more until a bucket is full; none stays none."""
    return np.concatenate([keep, np.full(_up(len(keep), unit) - len(keep), keep[-1] if len(keep) else 0)])
