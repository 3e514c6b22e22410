"""own_ids, overlay_rows: ids beyond a table of embeddings, whose rows are given at run time.

Rows behind the table (merged tokens, images among the tokens of a text) are no part of it: joining the two would copy
the whole table for every call. The table is looked up as before, in whatever form it is kept, and its rows give way to
the others where the ids say so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..body import INT64, Body
from ..definition import Attr, OpDef
from ..layout import body_take_rows
from ..lengths import numel


def own_ids(ids: Tensor, *, first: int) -> Tensor:
    """ids [...] int64 or int32, 0 in the place of those from `first` on, which the table has no rows for."""
    return torch.where(ids < first, ids, 0)


def overlay_rows(own: Tensor, ids: Tensor, rows: Tensor, *, first: int) -> Tensor:
    """own [..., C] as it was looked up, ids [...], rows [M, C], or [B, M, C] with ids [B, ...] -> [..., C].

    An id of `first` or more reads row id - first of `rows` (of its sequence), every other keeps its row of `own`, bit
    for bit. The result has own's dtype. M is at least 1; an id of first + M or more is an error."""
    if rows.dim() not in (2, 3) or (rows.dim() == 3 and ids.dim() < 1):
        raise ValueError(f"overlay_rows: rows {list(rows.shape)} are neither [M, C] nor [B, M, C]")
    beyond = ids >= first
    index = torch.where(beyond, ids - first, 0).to(torch.int64)
    if rows.dim() == 3:
        start = torch.arange(rows.shape[0], device=ids.device) * rows.shape[1]
        index = index + start.reshape([-1] + [1] * (ids.dim() - 1))
    found = rows.flatten(0, -2).index_select(0, index.flatten()).to(own.dtype)
    return torch.where(beyond.unsqueeze(-1), found.reshape(own.shape), own)


def _own_body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    kind = operands[0][1]
    inside = b("Less", "ids", b.constant(attrs["first"], kind))
    return [b("Where", inside, "ids", b.constant(0, kind))]


def _overlay_body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    (_, dtype), (rank, _), (width, given) = operands
    ids = b.cast("ids", INT64)
    first = b.constant(attrs["first"])
    beyond = b("GreaterOrEqual", ids, first)
    index = b("Where", beyond, b("Sub", ids, first), b.constant(0))
    if width == 2:
        found = b("Gather", "rows", index, axis=0)
    else:
        flat = b.reshape(index, 0, -1)
        found = b("Reshape", body_take_rows(b, "rows", flat), b("Shape", "own"))
    if given != dtype:
        found = b.cast(found, dtype)
    return [b("Where", b.unsqueeze(beyond, rank), found, "own")]


OWN = OpDef(
    name="own_ids",
    summary="The ids of a table's own rows; 0 in the place of the others.",
    inputs=("ids",),
    outputs=("own",),
    attrs=(Attr("first"),),
    mixes=0,
    reference=own_ids,
    shapes=lambda shapes, attrs: [tuple(shapes[0])],
    dtypes=lambda dtypes, attrs: [dtypes[0] or "int64"],
    body=_own_body,
    work=lambda shapes, attrs: 0,
    full_precision=False,
)
OVERLAY = OpDef(
    name="overlay_rows",
    summary="Rows of a second table in the place of those whose ids go beyond the first.",
    inputs=("own", "ids", "rows"),
    outputs=("out",),
    attrs=(Attr("first"),),
    mixes=0,
    reference=overlay_rows,
    shapes=lambda shapes, attrs: [tuple(shapes[0])],
    dtypes=lambda dtypes, attrs: [dtypes[0] or "float32"],
    body=_overlay_body,
    work=lambda shapes, attrs: 0,
    # The rows that are read and written; never a whole table.
    traffic=lambda shapes, attrs: 3 * numel(shapes[0]) + numel(shapes[1]),
    full_precision=False,
    source="Feher et al., ACL 2025, for merged tokens",
)
