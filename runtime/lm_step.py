"""Rows of a step graph: what a runner takes, and how prompts, sequences and trees are written as rows.

A step graph (pass `incremental`) computes M new rows against a cache of C slots. Each row says which slots it sees, in
order: a run of them (`prefix`), then single ones (`ancestors`), the last of which is its own. Sequences and branches
of a tree are told apart by nothing else, so one call can hold rows of many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..passes.errors import ElisionError

CHUNK = 512
"""Rows of one call while a prompt is read."""


@dataclass(frozen=True)
class Rows:
    """ids, positions: int64 [M]. slots: int32 [M]. prefix: int32 [M, 2], first slot and count. ancestors: int32 [M, A],
    padded with -1 at the end."""

    ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    prefix: np.ndarray
    ancestors: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


class StepModel(Protocol):
    """What runs a step graph. `capacity`: C; `vocabulary`: V."""

    capacity: int
    vocabulary: int

    def step(self, rows: Rows, keep: Sequence[int] | None = None) -> np.ndarray:
        """Writes the rows into the cache; scores float32 [len(keep), V] of the rows in `keep` (None: all). The array is
        good until the next call."""
        ...

    def begin(self, inputs: dict[str, Any]) -> None:
        """What an encoder-decoder's decoder attends to, from now on. Raises ElisionError where there is no encoder."""
        ...


class Slots:
    """Which slots are taken. Sequences get runs of them, the lowest that are free. None is kept for rows of padding: no
    runner here pads."""

    def __init__(self, capacity: int) -> None:
        self.total = capacity
        self._taken: list[tuple[int, int]] = []  # (start, count), in order

    def take(self, count: int) -> int | None:
        """The first slot of a free run of `count`, None where there is none now."""
        start = 0
        for place, (other, size) in enumerate([*self._taken, (self.total, 0)]):
            if start + count <= other:
                self._taken.insert(place, (start, count))
                return start
            start = other + size
        return None

    def give_back(self, start: int) -> None:
        self._taken = [(other, size) for other, size in self._taken if other != start]


def chain(start: int, past: int, ids: Sequence[int]) -> Rows:
    """`ids` after the `past` ones in slots start, start+1, ...: each row sees a run of slots up to its own."""
    count = len(ids)
    positions = np.arange(past, past + count)
    slots = (start + positions).astype(np.int32)
    prefix = np.stack([np.full(count, start), positions], 1).astype(np.int32)
    return Rows(np.asarray(ids, np.int64), positions.astype(np.int64), slots, prefix, slots[:, None])


def tree(start: int, past: int, ids: Sequence[int], parents: Sequence[int]) -> Rows:
    """A tree after the `past` ids in slots start, start+1, ...: node i lies in the i-th slot after them. parents[i] < i
    is its parent, -1 for a root."""
    count = len(ids)
    slots = (start + past + np.arange(count)).astype(np.int32)
    paths: list[list[int]] = []
    for node, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), int(slots[node])])
    longest = max(len(path) for path in paths)
    ancestors = np.array([path + [-1] * (longest - len(path)) for path in paths], np.int32)
    positions = np.array([past + len(path) - 1 for path in paths], np.int64)
    prefix = np.broadcast_to(np.array([start, past], np.int32), (count, 2)).copy()
    return Rows(np.asarray(ids, np.int64), positions, slots, prefix, ancestors)


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of several sequences as one call."""
    if len(parts) == 1:
        return parts[0]
    widest = max(part.ancestors.shape[1] for part in parts)
    return Rows(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.positions for part in parts]),
        np.concatenate([part.slots for part in parts]),
        np.concatenate([part.prefix for part in parts]),
        np.concatenate([_widened(part.ancestors, widest) for part in parts]),
    )


def _widened(ancestors: np.ndarray, width: int) -> np.ndarray:
    padding = width - ancestors.shape[1]
    return np.pad(ancestors, ((0, 0), (0, padding)), constant_values=-1) if padding else ancestors


def read_prompt(model: StepModel, start: int, ids: Sequence[int], chunk: int = CHUNK) -> np.ndarray:
    """Writes a prompt into the slots from `start` on, in chunks; float32 [V], the scores of what comes next."""
    scores = None
    for first in range(0, len(ids), chunk):
        part = ids[first : first + chunk]
        scores = model.step(chain(start, first, part), [len(part) - 1])
    assert scores is not None, "a prompt has at least one id"
    return scores[0]


def named_inputs(inputs: Mapping[str, Any], names: Sequence[str]) -> dict[str, np.ndarray]:
    """`inputs` by the names of a prelude; a single one may come without its name. Raises ElisionError."""
    if list(inputs) == [""] and len(names) == 1:
        inputs = {names[0]: inputs[""]}
    missing = [name for name in names if name not in inputs]
    if missing:
        raise ElisionError(f"encoder_inputs lack {missing[0]!r}; the encoder reads {', '.join(names)}")
    return {name: _array(inputs[name]) for name in names}


def _array(item: Any) -> np.ndarray:
    array = item.detach().cpu().numpy() if hasattr(item, "detach") else np.asarray(item)
    array = array.astype(np.int64) if array.dtype.kind in "iu" else array.astype(np.float32)
    return array[None] if array.ndim == 1 else array
