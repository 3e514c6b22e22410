"""A canvas, and the plan of one denoising step: which positions are computed, seen, and may be decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .lm_step import Rows

EMPTY = np.zeros(0, np.int64)


class Canvas:
    """The text while it is made. ids: int64 [N]. given: bool [N], what was there at first. masked: bool [N], what is
    still to be decided. masks: int64, the positions of these, ascending."""

    def __init__(self, ids: Sequence[int] | np.ndarray, mask_id: int) -> None:
        self.ids = np.array(ids, np.int64)
        self.masked = self.ids == mask_id
        self.given = ~self.masked
        self.masks = np.flatnonzero(self.masked)

    def __len__(self) -> int:
        return len(self.ids)

    def decide(self, positions: np.ndarray, tokens: np.ndarray) -> None:
        """positions, tokens: int64 [n]; the positions are masked ones."""
        self.ids[positions] = tokens
        self.masked[positions] = False
        self.masks = np.flatnonzero(self.masked)

    def cut(self, length: int) -> None:
        """Only the first `length` positions are left."""
        self.ids, self.given = self.ids[:length], self.given[:length]
        self.masked = self.masked[:length]
        self.masks = np.flatnonzero(self.masked)


def canvas_ids(prompt: Sequence[int], new: int, mask_id: int) -> np.ndarray:
    """int64: a prompt, then `new` masks."""
    return np.concatenate([np.asarray(prompt, np.int64), np.full(new, mask_id, np.int64)])


@dataclass(frozen=True)
class Plan:
    """One canvas at one denoising step. All arrays are int64 positions, ascending.

    refresh: positions 0 .. E-1 are computed afresh, and see each other and nothing else. compute [M]: what is computed
    (0 .. E-1 at a refresh). Seen are the positions 0 .. run-1 and extras [X]: all computed ones are among them.
    candidates [C]: masked positions that may be decided. deciding [C]: the position whose logits decide each of them,
    always a computed one. exactly: how many are decided, whatever the rule says."""

    refresh: bool
    compute: np.ndarray
    run: int
    extras: np.ndarray
    candidates: np.ndarray
    deciding: np.ndarray
    exactly: int | None = None

    @property
    def extent(self) -> int:
        """E of a refresh."""
        return len(self.compute)

    def rows(self, ids: np.ndarray, start: int) -> Rows:
        """The computed positions of a canvas with these ids int64 [N], whose slots begin at `start`."""
        count = len(self.compute)
        prefix = np.empty((count, 2), np.int32)
        prefix[:] = start, self.run
        ancestors = np.full((count, max(1, len(self.extras))), -1, np.int32)
        if len(self.extras):
            ancestors[:] = start + self.extras
        slots = (start + self.compute).astype(np.int32)
        return Rows(ids[self.compute], self.compute, slots, prefix, ancestors)

    def scored(self) -> tuple[np.ndarray, np.ndarray]:
        """(int64 [R]: which of the computed rows are scored, each once; int64 [C]: which of these decides each
        candidate)."""
        places = np.searchsorted(self.compute, self.deciding)
        if len(places) < 2 or places[0] != places[1]:  # only the first two can be decided by the same row
            return places, np.arange(len(places))
        return places[1:], np.maximum(np.arange(len(places)) - 1, 0)


def deciding(candidates: np.ndarray, shift: bool) -> np.ndarray:
    """Whose logits decide each candidate: its own, or, with shifted logits, those of the position before; position 0
    has none before it and takes its own."""
    return np.maximum(candidates - 1, 0) if shift else candidates


def refresh_plan(extent: int, candidates: np.ndarray, shift: bool, exactly: int | None = None) -> Plan:
    """Computes positions 0 .. extent-1."""
    whole = np.arange(extent)
    return Plan(True, whole, extent, EMPTY, candidates, deciding(candidates, shift), exactly)


def step_plan(
    compute: np.ndarray, run: int, candidates: np.ndarray, shift: bool, extras: np.ndarray = EMPTY
) -> Plan:
    """Computes `compute`, and with shifted logits the position before each candidate too."""
    rows = deciding(candidates, shift)
    if shift and len(rows):
        places = np.minimum(np.searchsorted(compute, rows), len(compute) - 1)
        missing = rows[compute[places] != rows]
        if len(missing):
            compute = np.sort(np.concatenate([compute, missing]))
    return Plan(False, compute, run, extras, candidates, rows)
