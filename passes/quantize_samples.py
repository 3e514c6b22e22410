"""What enters the products of a graph on samples: second moments for calibration, a few rows to measure errors by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .base import as_array
from .errors import ElisionError
from .formats.calibrated import spread_of
from .ir.graph import Graph
from .quantize_find import EMBEDDING, Target

ROWS = 64
"""How many rows of a product's inputs are kept to measure errors by."""

Visit = Callable[[Target, "Inputs"], np.ndarray | None]
"""Gets a target and what enters it (nothing for tables); may give the matrix that takes the weight's place."""


class Inputs:
    """What enters one product, over all samples: arrays [..., K]."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self.arrays = [np.asarray(a, np.float32).reshape(-1, a.shape[-1]) for a in arrays]
        self._moments: np.ndarray | None = None
        self._spread: np.ndarray | None = None

    @property
    def count(self) -> int:
        """How many rows."""
        return sum(len(a) for a in self.arrays)

    @property
    def moments(self) -> np.ndarray:
        """The mean of x xT over all rows, float64 [K, K]."""
        if self._moments is None:
            total = sum((a.T @ a).astype(np.float64) for a in self.arrays)
            self._moments = np.asarray(total / max(self.count, 1))
        return self._moments

    @property
    def spread(self) -> np.ndarray:
        """For `quantize_calibrated`."""
        if self._spread is None:
            self._spread = spread_of(self.moments, self.count)
        return self._spread

    @property
    def rows(self) -> np.ndarray:
        """At most ROWS rows [n, K], evenly spread over all."""
        every = np.concatenate(self.arrays)
        return every[:: max(1, len(every) // ROWS)][:ROWS]


def visit_targets(
    graph: Graph, targets: Sequence[Target], samples: Sequence[Sequence[Any]], visit: Visit
) -> bool:
    """Call `visit` for every target in the order of the graph. samples: arrays or tensors for `graph.inputs`.

    True when products saw what their quantized predecessors put out, as in torch graphs; in ONNX graphs everything is
    computed beforehand. Raises ElisionError when the samples do not run."""
    by_op = {target.op: target for target in targets}
    if graph.host == "fx":
        from .ir.fx_samples import walk

        cache: list[Any] = [None, None]  # products of one input come one after the other

        def inner(op: Any, arrays: list[Any]) -> np.ndarray | None:
            target = by_op[op]
            if target.role == EMBEDDING:
                return visit(target, Inputs([]))
            if cache[0] is not target.x:
                cache[:] = [target.x, Inputs([a.detach().cpu().float().numpy() for a in arrays])]
            return visit(target, cache[1])

        walk(graph, samples, set(by_op), inner)  # type: ignore[arg-type]
        return True
    products = [t for t in targets if t.role != EMBEDDING]
    values = list(dict.fromkeys(t.x for t in products))
    collected: list[list[np.ndarray]] = [[] for _ in values]
    for sample in samples:
        if len(sample) != len(graph.inputs):
            raise ElisionError(f"a sample has an array for each of the graph's {len(graph.inputs)} inputs")
        feeds = {value: as_array(item) for value, item in zip(graph.inputs, sample)}
        for place, array in zip(collected, graph.evaluate(values, feeds)):
            place.append(array)
    known = {value: Inputs(arrays) for value, arrays in zip(values, collected)}
    left = Counter(t.x for t in products)
    for target in targets:
        if target.role == EMBEDDING:
            visit(target, Inputs([]))
            continue
        visit(target, known[target.x])
        left[target.x] -= 1
        if not left[target.x]:
            del known[target.x]
    return False
