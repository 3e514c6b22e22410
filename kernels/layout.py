"""Values of any rank as rows of tokens [B, N, F] and back, in torch and in ONNX bodies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .body import Body
from .lengths import Dim, Shape


def order_of(rank: int, axis: int, batch_axis: int) -> list[int]:
    """Axes as (batch, token, the others in order)."""
    return [batch_axis, axis, *(a for a in range(rank) if a not in (axis, batch_axis))]


def inverse(order: Sequence[int]) -> list[int]:
    return [list(order).index(a) for a in range(len(order))]


def check_axes(op: str, rank: int, axis: int, batch_axis: int) -> None:
    """Raises ValueError where the axes do not fit a value of this rank."""
    if not 0 <= axis < rank or not -1 <= batch_axis < rank or axis == batch_axis:
        raise ValueError(f"{op}: axis {axis} and batch axis {batch_axis} do not fit rank {rank}")


def to_rows(x: Tensor, axis: int, batch_axis: int) -> Tensor:
    """x as [B, N, F]; batch_axis -1: x has none and B is 1."""
    if batch_axis < 0:
        x, axis, batch_axis = x.unsqueeze(0), axis + 1, 0
    x = x.permute(order_of(x.dim(), axis, batch_axis))
    return x.unsqueeze(-1) if x.dim() == 2 else x.flatten(2)


def from_rows(rows: Tensor, like: Tensor, axis: int, batch_axis: int) -> Tensor:
    """The inverse of `to_rows` for a value shaped like `like` but for batch and tokens."""
    if batch_axis < 0:
        return from_rows(rows, like.unsqueeze(0), axis + 1, 0).squeeze(0)
    order = order_of(like.dim(), axis, batch_axis)
    rest = [like.shape[a] for a in order[2:]]
    rows = rows.reshape([rows.shape[0], rows.shape[1], *rest])
    return rows.permute(inverse(order))


def take(x: Tensor, index: Tensor, axis: int, batch_axis: int) -> Tensor:
    """x[b, index[b]] along `axis`, index [B, M]; a batch axis of length 1 is expanded to B."""
    if batch_axis < 0:
        return torch.index_select(x, axis, index[0].long())
    shape, target = [1] * x.dim(), list(x.shape)
    shape[batch_axis], shape[axis] = index.shape[0], index.shape[1]
    target[axis] = index.shape[1]
    if x.shape[batch_axis] == 1:
        target[batch_axis] = index.shape[0]
        x = x.expand([target[a] if a == batch_axis else length for a, length in enumerate(x.shape)])
    index = index.long()
    if axis < batch_axis:
        index = index.t()
    return torch.gather(x, axis, index.reshape(shape).expand(target))


def with_length(shape: Shape, axis: int, batch_axis: int, map_shape: Shape) -> Shape:
    """`shape` with the tokens of a map [B, M] along `axis`, and its batch where the own batch is 1."""
    new: list[Dim] = list(shape)
    new[axis] = map_shape[1]
    if batch_axis >= 0 and new[batch_axis] == 1:
        new[batch_axis] = map_shape[0]
    return tuple(new)


# ---- ONNX --------------------------------------------------------------------------------------------
def body_to_rows(b: Body, x: str, rank: int, axis: int, batch_axis: int) -> str:
    """`to_rows` in a function body."""
    if batch_axis < 0:
        x, rank, axis, batch_axis = b.unsqueeze(x, 0), rank + 1, axis + 1, 0
    x = b.permute(x, order_of(rank, axis, batch_axis))
    if rank == 2:
        return b.unsqueeze(x, 2)
    return x if rank == 3 else b("Reshape", x, b.constant([0, 0, -1]))


def body_from_rows(b: Body, rows: str, like: str, rank: int, axis: int, batch_axis: int) -> str:
    """`from_rows` in a function body."""
    lacking = batch_axis < 0
    if lacking:
        like, rank, axis, batch_axis = b.unsqueeze(like, 0), rank + 1, axis + 1, 0
    order = order_of(rank, axis, batch_axis)
    if rank == 2:
        rows = b.squeeze(rows, 2)
    elif rank > 3:
        rows = b.reshape(rows, 0, 0, *(b.length(like, a) for a in order[2:]))
    out = b.permute(rows, inverse(order))
    return b.squeeze(out, 0) if lacking else out


def body_take(b: Body, x: str, index: str, rank: int, axis: int, batch_axis: int) -> str:
    """`take` in a function body: whole rows are copied, which Gather does faster than GatherElements."""
    if batch_axis < 0:
        return b("Gather", x, b("Reshape", index, b.constant([-1])), axis=axis)
    rows = body_to_rows(b, x, rank, axis, batch_axis)
    return body_from_rows(b, body_take_rows(b, rows, index), x, rank, axis, batch_axis)


def body_take_rows(b: Body, rows: str, index: str) -> str:
    """rows [B or 1, N, F], index [B, M] -> [B, M, F]."""
    batch, length = b.length(index, 0), b.length(rows, 1)
    own = b.length(rows, 0)
    # Row b of the flattened batch starts at b * N; at 0 where one batch row serves all.
    start = b("Mul", b.count(batch), b("Where", b("Equal", own, b.constant([1])), b.constant([0]), length))
    flat = b("Add", b.cast(index, 7), b.unsqueeze(start, 1))
    table = b("Reshape", rows, b.join(b.constant([-1]), b.length(rows, 2)))
    return b("Gather", table, flat, axis=0)
