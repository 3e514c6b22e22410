"""What a dynamic vocabulary must know of a model: its table of embeddings, and the inputs that the pass gave it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..passes.errors import ElisionError
from ..passes.ir.graph import Dim, Graph
from ..passes.overlay import input_behind, overlaid, own_rows


@dataclass(frozen=True, eq=False)
class Source:
    """count: V, the ids of the model's own. width: C. rows: float32 [K, C] of own ids. names: of the inputs with ids,
    mask and table. lengths, capacities: the static numbers of tokens and of rows, [] where they are free."""

    count: int
    width: int
    dtype: str
    rows: Callable[[np.ndarray], np.ndarray]
    names: tuple[str, str, str]
    lengths: list[int]
    capacities: list[int]
    per_text: bool
    torch: bool


def read_source(target: Any) -> Source:
    """Of a result, a graph, a file, or a table [V, C]. Raises ElisionError where `dynamic-vocab` was not applied."""
    if hasattr(target, "report") and hasattr(target, "graph"):
        return _of_graph(target.graph)
    if isinstance(target, Graph):
        return _of_graph(target)
    if isinstance(target, np.ndarray) or hasattr(target, "detach"):
        return _of_table(target)
    from .api import is_onnx, open_onnx

    if not is_onnx(target):
        raise ElisionError(
            f"a {type(target).__name__} is no result of elision.optimize, no file and no table"
        )
    return _of_graph(open_onnx(target))


def _of_table(table: Any) -> Source:
    tensor = hasattr(table, "detach")
    dtype = str(table.dtype).removeprefix("torch.")
    data = table.detach().cpu().float().numpy() if tensor else table
    if data.ndim != 2 or data.dtype.kind != "f":
        raise ElisionError(f"a table of embeddings is float [V, C], not {dtype} {list(data.shape)}")
    names = ("input_ids", "attention_mask", "table")
    count, width = data.shape
    return Source(count, width, dtype, lambda ids: data[ids], names, [], [], False, tensor)


def _of_graph(graph: Graph) -> Source:
    found = overlaid(graph)
    if not found:
        raise ElisionError("the model has no table of new tokens: elision.optimize it with dynamic-vocab")
    op, lookup = found[0]
    rows, ids = op.inputs[2], None if op.inputs[1] is None else input_behind(graph, op.inputs[1])
    if rows is None or rows not in graph.inputs or rows.shape is None or ids is None:
        raise ElisionError("the model's new tokens come from no input")
    known = dict(zip(graph.inputs, graph.input_names))
    mask = _mask_name(known[ids], graph.input_names)
    return Source(
        int(op.attrs["first"]),
        lookup.width,
        rows.dtype,
        lambda wanted: own_rows(graph, lookup, wanted),
        (known[ids], mask, known[rows]),
        _static(ids.shape[-1] if ids.shape else 0),
        _static(rows.shape[-2]),
        rows.rank == 3,
        graph.host == "fx",
    )


def _mask_name(ids: str, names: list[str]) -> str:
    """The mask beside the ids: attention_mask, decoder_attention_mask beside decoder_input_ids."""
    wanted = (
        f"{ids.removesuffix('input_ids')}attention_mask" if ids.endswith("input_ids") else "attention_mask"
    )
    return wanted if wanted in names or "attention_mask" not in names else "attention_mask"


def _static(dim: Dim) -> list[int]:
    return [dim] if isinstance(dim, int) and dim else []
