"""Finding quantized rows of a file again in the float weights that were loaded from it, without a name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from .layout import Quantized, dequantize, stacked

_COLUMNS = 64
"""How many columns are hashed. Rows that begin alike and go on differently are not found, which costs no more than
rounding anew."""


class SourceFormats:
    """Index of dequantized rows. Loaders rename, permute, stack and split the matrices of a file; rows stay rows.

    tensors: what a file holds in few bits. A row of float32 is found by a hash of how it begins, then compared."""

    def __init__(self, tensors: Iterable[Quantized] = ()) -> None:
        self.tensors: list[Quantized] = []
        self._index: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._pending: dict[int, list[tuple[np.ndarray, int]]] = {}
        for tensor in tensors:
            self.add(tensor)

    def __len__(self) -> int:
        return len(self.tensors)

    def add(self, tensor: Quantized) -> None:
        """One more matrix."""
        self.tensors.append(tensor)
        self._pending.setdefault(tensor.width, []).append((_hashes(_begin(tensor)), len(self.tensors) - 1))
        self._index.pop(tensor.width, None)

    def lookup(self, weight: np.ndarray) -> Quantized | None:
        """weight float [N, K] -> the rows it was dequantized from, in its order; None unless all of them are known,
        fit together, and are equal to the last bit."""
        if weight.ndim != 2 or weight.dtype != np.float32 or not len(weight):
            return None
        index = self._table(weight.shape[1])
        if index is None:
            return None
        known, numbers, rows = index
        first = _find(known, _hashes(weight[:1]))  # most matrices that are not from the file end here
        if first is None:
            return None
        places = _find(known, _hashes(weight))
        if places is None:
            return None
        numbers, rows = numbers[places], rows[places]
        found = self._gather(numbers, rows)
        return found if found is not None and np.array_equal(dequantize(found), weight) else None

    def _gather(self, numbers: np.ndarray, rows: np.ndarray) -> Quantized | None:
        used = np.unique(numbers)
        if len(used) == 1:
            return self.tensors[used[0]].take(rows)
        merged = stacked([self.tensors[n].take(rows[numbers == n]) for n in used])
        if merged is None:
            return None
        place = np.empty(len(rows), np.int64)
        place[np.concatenate([np.flatnonzero(numbers == n) for n in used])] = np.arange(len(rows))
        return merged.take(place)

    def _table(self, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Sorted hashes of all rows of this width, their tensors and their rows."""
        if width not in self._index:
            parts = self._pending.get(width)
            if parts is None:
                return None
            hashes = np.concatenate([h for h, _ in parts])
            numbers = np.concatenate([np.full(len(h), n, np.int32) for h, n in parts])
            rows = np.concatenate([np.arange(len(h), dtype=np.int32) for h, _ in parts])
            order = np.argsort(hashes, kind="stable")
            self._index[width] = hashes[order], numbers[order], rows[order]
        return self._index[width]


def _find(known: np.ndarray, wanted: np.ndarray) -> np.ndarray | None:
    places = np.searchsorted(known, wanted)
    if (places == len(known)).any() or not np.array_equal(known[places], wanted):
        return None
    return places


def _begin(tensor: Quantized) -> np.ndarray:
    """The first columns of the dequantized matrix."""
    columns = min(_COLUMNS, tensor.width)
    if tensor.order is None:
        groups = -(-columns // tensor.group)
        zeros = None if tensor.zeros is None else tensor.zeros[:, :groups]
        weight, scales = tensor.weight[:, :groups], tensor.scales[:, :groups]
        tensor = replace(tensor, weight=weight, scales=scales, zeros=zeros, width=columns)
    return dequantize(tensor)[:, :columns]


def _hashes(rows: np.ndarray) -> np.ndarray:
    """One uint64 for each row [n, K] of float32, of its first columns; -0 and 0 are one number."""
    bits = (np.ascontiguousarray(rows[:, :_COLUMNS], np.float32) + np.float32(0)).view(np.uint32)
    odd = np.random.default_rng(7).integers(1, 1 << 63, bits.shape[1], np.uint64) * 2 + 1
    found = (bits * odd).sum(1, dtype=np.uint64)
    return found ^ found >> np.uint64(29)
