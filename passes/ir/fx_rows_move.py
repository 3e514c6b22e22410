"""Rows of the operator table: what moves, joins, cuts, picks and creates elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .fx_call import Call, Path, Spec, at, dtype_name, integer_index, row, target_name
from .graph import Dim


# ---- same elements, other shape ----------------------------------------------------------------------
@row(
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as"),
    *("reshape_as", "ravel", "_reshape_alias", "view_copy", "squeeze_copy", "unsqueeze_copy", "atleast_1d"),
)
def _reshape(c: Call) -> Spec | None:
    if c.has("dtype"):  # view.dtype reads the bytes anew
        return None
    return Spec("reshape", at("self"))


def _perm(c: Call, perm: Sequence[int]) -> Spec:
    return Spec("transpose", at("self"), {"perm": tuple(perm)})


@row("permute", "permute_copy")
def _permute(c: Call) -> Spec:
    rank = c.rank("self")
    return _perm(c, [c.axis(d, rank) for d in c["dims"]])


@row("transpose", "swapaxes", "swapdims", "transpose_copy")
def _transpose(c: Call) -> Spec:
    rank = c.rank("self")
    perm = list(range(rank))
    if rank:
        first = "dim0" if c.has("dim0") else "axis0"
        a, b = c.axis(c[first], rank), c.axis(c["dim1" if c.has("dim1") else "axis1"], rank)
        perm[a], perm[b] = perm[b], perm[a]
    return _perm(c, perm)


@row("t", "numpy_T", "mT", "matrix_H", "adjoint", "t_copy")
def _t(c: Call) -> Spec:
    rank = c.rank("self")
    name = target_name(c.node.target)
    perm = list(range(rank))
    if name == "aten::numpy_T":
        perm.reverse()
    elif rank >= 2:
        perm[-1], perm[-2] = perm[-2], perm[-1]
    return _perm(c, perm)


@row("movedim", "moveaxis")
def _movedim(c: Call) -> Spec:
    rank = c.rank("self")
    source, target = c["source"], c["destination"]
    source = [source] if not isinstance(source, list | tuple) else source
    target = [target] if not isinstance(target, list | tuple) else target
    moved = {c.axis(t, rank): c.axis(s, rank) for s, t in zip(source, target)}
    rest = iter(a for a in range(rank) if a not in moved.values())
    return _perm(c, [moved[a] if a in moved else next(rest) for a in range(rank)])


@row("expand", "expand_as", "broadcast_to", "expand_copy")
def _expand(c: Call) -> Spec:
    return Spec("expand", at("self"))


@row("repeat", "tile")
def _repeat(c: Call) -> Spec | None:
    before, after = c.shape("self"), c.out_shape
    lead = len(after) - len(before)
    repeated = [a for a in range(len(after)) if a < lead or after[a] != before[a - lead]]
    if all(a < lead or before[a - lead] == 1 for a in repeated):
        return Spec("expand", at("self"))
    return Spec("spatial", at("self"), {"axes": tuple(repeated), "fn": "repeat"}) if not lead else None


@row("repeat_interleave")
def _repeat_interleave(c: Call) -> Spec | None:
    if not c.has("dim") or c["dim"] is None or not c.has("self") or isinstance(c["repeats"], fx.Node):
        return None
    axis = c.axis(c["dim"], c.rank("self"))
    if c.shape("self")[axis] == 1:
        return Spec("expand", at("self"))
    return Spec("spatial", at("self"), {"axes": (axis,), "fn": "repeat_interleave"})


# ---- joining and parting -----------------------------------------------------------------------------
@row("cat", "concat", "concatenate")
def _cat(c: Call) -> Spec:
    dim = c["dim"] if c.has("dim") else c["axis"]
    return Spec("concat", c.tensors(), {"axis": c.axis(dim, len(c.out_shape))})


@row("stack")
def _stack(c: Call) -> Spec:
    return Spec("stack", c.tensors(), {"axis": c.axis(c["dim"], len(c.out_shape))})


@row("split", "chunk", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split", "split_copy")
def _split(c: Call) -> Spec:
    axis = c.axis(c["dim"], c.rank("self"))
    return Spec("split", at("self"), {"axis": axis, "sizes": tuple(s[axis] for s in c.out_shapes)})


@row("unbind", "unbind_copy")
def _unbind(c: Call) -> Spec:
    return Spec("unbind", at("self"), {"axis": c.axis(c["dim"], c.rank("self"))})


def _position(value: Any, length: Dim) -> Any:
    """A slice's bound or a selected index: non-negative where the length is static."""
    if isinstance(value, int) and value < 0 and isinstance(length, int):
        return max(value + length, 0)
    return value


@row("slice", "slice_copy")
def _slice(c: Call) -> Spec:
    axis = c.axis(c["dim"], c.rank("self"))
    length = c.shape("self")[axis]
    start = _position(c.plain("start") or 0, length)
    end = _position(c.plain("end"), length)
    if end is not None and (end == length or (isinstance(end, int) and end >= 2**62)):
        end = None
    if isinstance(end, int) and isinstance(length, int) and end >= length:
        end = None
    step = c.plain("step")
    if start == 0 and end is None and step == 1:  # x[:]
        return Spec("tie", at("self"))
    return Spec("slice", at("self"), {"axis": axis, "start": start, "end": end, "step": step})


@row("narrow", "narrow_copy")
def _narrow(c: Call) -> Spec | None:
    if isinstance(c["start"], fx.Node) and isinstance(c["start"].meta.get("val"), torch.Tensor):
        return None
    axis = c.axis(c["dim"], c.rank("self"))
    length = c.shape("self")[axis]
    start = _position(c.plain("start"), length)
    end = start + c.plain("length")
    attrs = {"axis": axis, "start": start, "end": None if end == length else end, "step": 1}
    return Spec("slice", at("self"), attrs)


@row("select", "select_copy")
def _select(c: Call) -> Spec:
    axis = c.axis(c["dim"], c.rank("self"))
    return Spec(
        "select", at("self"), {"axis": axis, "index": _position(c.plain("index"), c.shape("self")[axis])}
    )


@row("index_select")
def _index_select(c: Call) -> Spec:
    return Spec("gather", at("self", "index"), {"axis": c.axis(c["dim"], c.rank("self"))})


@row("index", "_unsafe_index")
def _index(c: Call) -> Spec | None:
    found = [i for i, index in enumerate(c["indices"]) if index is not None]
    if len(found) == 1 and integer_index(c["indices"][found[0]]):
        return Spec("gather", [("self", None), ("indices", found[0])], {"axis": found[0]})
    return None


@row("gather")
def _gather_elements(c: Call) -> Spec:
    axis = c.axis(c["dim"], c.rank("self"))
    return Spec("spatial", at("self", "index"), {"axes": (axis,), "fn": "gather_elements"})


@row("embedding")
def _embedding(c: Call) -> Spec:
    return Spec("embedding", at("weight", "indices"))


# ---- writing into a copy -----------------------------------------------------------------------------
@row("index_put", "_unsafe_index_put")
def _index_put(c: Call) -> Spec:
    axes: list[int] = []
    indices: list[Path] = []
    axis = 0
    for place, index in enumerate(c["indices"]):
        # A mask stands for as many axes as it has.
        covered = (
            index.meta["val"].dim() if index is not None and index.meta["val"].dtype == torch.bool else 1
        )
        if index is not None:
            axes += range(axis, axis + covered)
            indices.append(("indices", place))
        axis += covered
    return Spec("scatter", [*at("self", "values"), *indices], {"axes": tuple(axes)})


@row("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill", "index_reduce")
def _scatter(c: Call) -> Spec:
    return Spec("scatter", c.tensors(), {"axes": (c.axis(c["dim"], c.rank("self")),)})


@row("slice_scatter", "select_scatter")
def _slice_scatter(c: Call) -> Spec:
    return Spec("scatter", at("self", "src"), {"axes": (c.axis(c["dim"], c.rank("self")),)})


@row("masked_scatter", "diagonal_scatter")
def _masked_scatter(c: Call) -> Spec:
    return Spec("scatter", c.tensors(), {"axes": tuple(range(c.rank("self")))})


# ---- creating, sizes, ties ---------------------------------------------------------------------------
@row(
    *("arange", "zeros", "ones", "full", "empty", "eye", "linspace", "logspace", "scalar_tensor", "rand"),
    *("randn", "randint", "randperm", "tril_indices", "triu_indices", "new_zeros", "new_ones", "new_full"),
    *("new_empty", "empty_strided", "new_empty_strided", "hann_window", "empty_permuted"),
)
def _create(c: Call) -> Spec:
    name = target_name(c.node.target).removeprefix("aten::")
    skip = ("device", "layout", "pin_memory", "self")
    return Spec("create", [], {"fn": name, **c.numbers(skip)})


@row("sym_size")
def _sym_size(c: Call) -> Spec | None:
    return Spec("size", at("self"), {"axis": c.axis(c["dim"], c.rank("self"))}) if c.has("dim") else None


@row("clone", "contiguous", "detach", "alias", "lift_fresh_copy", "lift_fresh", "detach_copy", "alias_copy")
def _tie(c: Call) -> Spec:
    return Spec("tie", at("self"))


@row("to", "_to_copy", "type_as", "float", "half", "bfloat16")
def _cast(c: Call) -> Spec:
    value = c.node.meta["val"]
    return Spec("elementwise", at("self"), {"fn": "cast", "dtype": dtype_name(value.dtype)})
