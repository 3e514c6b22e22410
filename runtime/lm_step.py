"""Rows of a step graph: what a runner takes, and how prompts, sequences and trees are written as rows.

A step graph (pass `incremental`) computes M new rows against a cache of C slots. Each row says which slots it sees, in
order: a run of them (`prefix`), then single ones (`ancestors`), the last of which is its own. Sequences and branches
of a tree are told apart by nothing else, so one call can hold rows of many.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from ..passes.errors import ElisionError

CHUNK = 512
"""Rows of one call while a prompt is read."""

LARGEST = 8
"""How many of a row's largest scores are given where not all are wanted: the first is the greedy id, and drafters learn
from the others (Token Recycling keeps 8)."""


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


@dataclass(frozen=True)
class Largest:
    """The k largest scores of rows: values float32 [R, k], descending; ids int64 [R, k], the lowest first of equals.
    hidden: float32 [M, H] of all rows, kept or not, where the step graph puts out hidden states (pass `taps`); those of
    several places lie side by side."""

    values: np.ndarray
    ids: np.ndarray
    hidden: np.ndarray | None = None


class StepModel(Protocol):
    """What runs a step graph. `capacity`: C; `vocabulary`: V; `largest_k`: k of `largest`."""

    capacity: int
    vocabulary: int
    largest_k: int

    def step(self, rows: Rows, keep: Sequence[int] | None = None) -> np.ndarray:
        """Writes the rows into the cache; scores float32 [len(keep), V] of the rows in `keep` (None: all). The array is
        good until the next call."""
        ...

    def largest(self, rows: Rows, keep: Sequence[int] | None = None) -> Largest:
        """`step`, of which only the k largest scores of each row are wanted."""
        ...

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        """The keys and values in the slots `source` [n] into the slots `target` [n], all at once."""
        ...

    def begin(self, inputs: dict[str, Any]) -> None:
        """What an encoder-decoder's decoder attends to, from now on. Raises ElisionError where there is no encoder."""
        ...

    def show(self, rows: np.ndarray) -> None:
        """Rows float32 [R, C] of pictures, which the ids from V on mean from now on. Of models that read pictures."""
        ...


def is_tap(name: str) -> bool:
    """Whether an output of a step graph is one of the pass `taps`."""
    return name == "hidden" or name.startswith("hidden.")


def beside(taps: Sequence[np.ndarray]) -> np.ndarray | None:
    """Hidden states [M, H] of several places as one [M, n H], None for none."""
    return None if not taps else taps[0] if len(taps) == 1 else np.concatenate(taps, 1)


def largest_of(scores: np.ndarray, k: int) -> Largest:
    """The k largest of every row of scores [R, V]. Where there are fewer, fewer. NaN counts as the largest."""
    k = min(k, scores.shape[1])
    found = np.empty((len(scores), k), np.int64)
    for row, into in zip(scores, found):
        row = np.nan_to_num(row, nan=np.inf)
        limit = np.partition(row, -k)[-k]
        ids = np.flatnonzero(row >= limit)
        into[:] = ids[np.argsort(-row[ids], kind="stable")][:k]
    return Largest(np.take_along_axis(scores, found, 1), found)


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


def slots_of(model: StepModel) -> Slots:
    """What gives sequences their slots: its `own_slots()` where a model has them, or all of its cache."""
    own = getattr(model, "own_slots", None)
    return Slots(model.capacity) if own is None else own()


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
    depths: list[int] = []
    for parent in parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return tree_rows(start, past, ids, parents, depths)


def tree_rows(
    start: int, past: int, ids: Sequence[int], parents: Sequence[int], depths: Sequence[int]
) -> Rows:
    """`tree`, where the depths of the nodes are known."""
    count, first = len(ids), start + past
    slots = np.arange(first, first + count, dtype=np.int32)
    ancestors = np.full((count, max(depths) + 1), -1, np.int32)
    for node, (parent, depth) in enumerate(zip(parents, depths)):
        if depth:
            ancestors[node, :depth] = ancestors[parent, :depth]
        ancestors[node, depth] = first + node
    prefix = np.empty((count, 2), np.int32)
    prefix[:] = start, past
    return Rows(np.asarray(ids, np.int64), past + np.asarray(depths, np.int64), slots, prefix, ancestors)


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


def prompt_chunks(
    start: int, ids: Sequence[int], chunk: int = CHUNK, places: np.ndarray | None = None
) -> Iterator[Rows]:
    """The calls that write a prompt into the slots from `start` on. places: the position of each token, where tokens
    between were left out."""
    for first in range(0, len(ids), chunk):
        rows = chain(start, first, ids[first : first + chunk])
        yield rows if places is None else replace(rows, positions=places[first : first + chunk])


def further(rows: Rows, by: int) -> Rows:
    """The same rows `by` positions further on: behind a prompt of which so many tokens were left out."""
    return replace(rows, positions=rows.positions + by) if by else rows


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
