"""fix-rows: products whose every row has the same bits, however many rows there are.

Host libraries choose their kernel by the number of rows, and kernels add in different orders: one row alone and that
row among eight then differ in the last bits. `linear_rows` adds in one order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .base import Outcome, Pass, PassContext, register
from .errors import NothingMatched
from .ir.graph import Graph
from .order import LOWERED
from .quantize_emit import Emitter
from .quantize_find import EMBEDDING, find_targets


@dataclass(frozen=True)
class RowsOptions:
    """dtype: how weights are stored; keep leaves them as they are, as float32 does those that are. float16 and bfloat16
    round others, and the pass counts as lossy."""

    dtype: Literal["keep", "float32", "float16", "bfloat16"] = "float32"


@register
class FixRows(Pass):
    """Every product with a constant weight as linear_rows."""

    name = "fix-rows"
    exact = True
    before = (LOWERED,)
    summary = "products whose rows do not depend on how many there are"
    Options = RowsOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.exact = self.options.dtype in ("keep", "float32")

    def run(self, graph: Graph, context: PassContext) -> Outcome:
        """Raises NothingMatched without a product that has a constant weight, unless others were made before."""
        targets = [t for t in find_targets(graph).targets if t.role != EMBEDDING]
        if not targets:
            if any(op.target.startswith("elision.linear_") for op in graph.ops_of("elision")):
                return Outcome(notes=["every product is of the dialect already"])
            raise NothingMatched("fix-rows found no product with a constant weight")
        emitter = Emitter(graph)
        made: dict[tuple[object, ...], np.ndarray] = {}
        for target in targets:
            wanted = target.weight.dtype if self.options.dtype == "keep" else _dtype(self.options.dtype)
            key = target.weight.__array_interface__["data"], target.weight.strides, target.weight.shape
            if key not in made:  # tied weights stay tied
                made[key] = np.ascontiguousarray(target.weight, wanted)
            emitter.emit(target, made[key])
        graph.remove_dead()
        return Outcome(changed=True, statistics={"products as rows": len(targets)})


def _dtype(name: str) -> np.dtype:
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name, None) or name)
