"""extra-embeddings: ids beyond the vocabulary, for tokens that a model was never trained to write.

Rows of such ids behind a text, with embeddings trained for the purpose, make a model say what comes several tokens
later (prompt tokens of PPD, Chen et al., EMNLP 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .analysis.residual import lookups, token_ids
from .base import Outcome, Pass, PassContext, register
from .errors import PipelineError, Refused
from .ir.graph import Graph, Op, Value


@dataclass(frozen=True)
class ExtraEmbeddingsOptions:
    """count: how many ids more. ids: the name of the input with the token ids (by default decoder_input_ids, else
    input_ids)."""

    count: int = 3
    ids: str = ""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise PipelineError(f"count must be at least 1, not {self.count}")


@register
class ExtraEmbeddings(Pass):
    """Gives the table of embeddings [V, H] `count` rows more, for the ids V, V + 1, ...: each is the mean of the
    others until `set_extra_rows` says more. A head that shares the table keeps its own V rows, and scores their
    number. It comes before `quantize`."""

    name = "extra-embeddings"
    exact = True
    summary = "ids beyond the vocabulary, with embeddings of their own"
    Options = ExtraEmbeddingsOptions

    def run(self, graph: Graph, context: PassContext) -> Outcome:
        """Raises Refused where the ids are not looked up in constant tables of floats, NothingMatched without ids."""
        found = _tables(graph, self.options.ids)
        made: dict[Value, Value] = {}
        for op, table, data in found:
            if table not in made:
                mean = data.mean(0, dtype=np.float32).astype(data.dtype)
                rows = np.concatenate([data, np.repeat(mean[None], self.options.count, 0)])
                made[table] = graph.insert_constant(rows, f"{table.name}_and_more")
            graph.set_operand(op, 0, made[table])
        first = min(len(data) for _, _, data in found)
        note = f"the ids {first} to {first + self.options.count - 1} are new"
        return Outcome(changed=True, statistics={"tables": len(made)}, notes=[note])


def set_extra_rows(graph: Graph, rows: np.ndarray, ids: str = "") -> None:
    """Let `rows` float [count, H] be the last rows of the table that token ids are looked up in, which the pass with
    this count has added. Raises Refused where the graph has several such tables, or one of another width."""
    found = _tables(graph, ids)
    if len({table for _, table, _ in found}) != 1:
        raise Refused("the token ids are looked up in several tables")
    for op, table, data in found:
        if rows.ndim != 2 or rows.shape[1] != data.shape[1] or len(rows) >= len(data):
            raise Refused(f"rows {list(rows.shape)} do not fit the table %{table.name} {list(data.shape)}")
        whole = np.concatenate([data[: -len(rows)], np.asarray(rows).astype(data.dtype)])
        graph.set_operand(op, 0, graph.insert_constant(whole, table.name))
    graph.remove_dead()


def _tables(graph: Graph, ids: str) -> list[tuple[Op, Value, np.ndarray]]:
    """Lookups of the ids, their tables, and what those hold."""
    value = token_ids(graph, ids)
    found = []
    for op in lookups(graph, value):
        table = op.inputs[0]
        data = None if table is None or op.kind == "elision" else graph.constant_value(table)
        if table is None or data is None or data.ndim != 2 or op.attrs.get("axis", 0) != 0:
            raise Refused(
                f"{op.target} (%{op.name}) looks %{value.name} up in what is no plain table of floats"
            )
        found.append((op, table, data))
    if not found:
        raise Refused(f"%{value.name} is looked up in no table")
    return found
