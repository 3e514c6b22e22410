"""The key/value caches of a step graph, kept so that one copy moves rows of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


class Caches:
    """Caches [heads, slots, width], zero at first. Those of one shape and type lie in one block, so that what a tree
    leaves behind is put in order by one copy and not by one for each layer.

    shapes: shape and numpy dtype by name. `views`: the cache of each name."""

    def __init__(self, shapes: Mapping[str, tuple[tuple[int, ...], Any]]) -> None:
        alike: dict[Any, list[str]] = {}
        for name, (shape, dtype) in shapes.items():
            alike.setdefault((tuple(shape), np.dtype(dtype)), []).append(name)
        self._blocks = {key: np.zeros((len(names), *key[0]), key[1]) for key, names in alike.items()}
        self.views = {
            name: self._blocks[key][number]
            for key, names in alike.items()
            for number, name in enumerate(names)
        }

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        """Slots `source` [n] into `target` [n]; what lay in `source` is read before anything is written."""
        for block in self._blocks.values():
            block[:, :, target] = block[:, :, source]
