"""Lengths in an fx graph: nodes that compute a symbolic length, and the arguments that state one."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from ..errors import ElisionError
from . import fx_call
from .graph import Dim


def length_node(graph: fx.Graph, source: fx.Node, axis: int, before: fx.Node) -> fx.Node:
    """A new `sym_size` of `source`'s `axis`, placed before `before`."""
    with graph.inserting_before(before):
        node = graph.call_function(torch.ops.aten.sym_size.int, (source, axis))
    node.meta["val"] = source.meta["val"].shape[axis]
    return node


def expression(expr: Dim, before: fx.Node) -> tuple[Any, list[fx.Node]]:
    """An argument that computes `expr` (an int where it is static), and the nodes that were put before
    `before` for it, in order. Raises ElisionError when a symbol of `expr` is no input axis."""
    expr = fx_call.simplify(expr)
    if isinstance(expr, int):
        return expr, []
    graph = before.graph
    created: list[fx.Node] = []
    whole = _known(graph, expr, before)
    if whole is not None:
        return _materialise(whole, before, created), created
    env: dict[sympy.Symbol, Any] = {}
    for symbol in expr.free_symbols:
        found = _known(graph, symbol, before)
        if found is None:
            raise ElisionError(f"no axis before {before.name} has the length {symbol}")
        env[symbol] = fx.Proxy(_materialise(found, before, created))  # type: ignore[index]
    known = set(graph.nodes)
    with graph.inserting_before(before):
        result = sympy_interp(PythonReferenceAnalysis, env, expr).node
    for node in graph.nodes:
        if node not in known:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
            created.append(node)
    return result, created


def _known(graph: fx.Graph, expr: Any, before: fx.Node) -> Any:
    """A scalar node with this value, or (tensor node, axis), found before `before`."""
    axis_of: Any = None
    for node in graph.nodes:
        if node is before:
            break
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and value.node.expr == expr:
            return node
        if axis_of is None and isinstance(value, torch.Tensor) and node.op != "get_attr":
            for axis, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt) and size.node.expr == expr:
                    axis_of = (node, axis)
                    break
    return axis_of


def _materialise(found: Any, before: fx.Node, created: list[fx.Node]) -> fx.Node:
    if isinstance(found, fx.Node):
        return found
    source, axis = found
    node = length_node(before.graph, source, axis, before)
    created.append(node)
    return node


# ---- arguments that state a length -------------------------------------------------------------------
Setter = Callable[[fx.Node, "fx_call.Call", int, Any, Callable[..., Any]], bool]
"""(node, call, output axis, length, emit) -> whether an argument was rewritten. `emit(function, *args)`
computes on lengths: on ints at once, on nodes by a new node before `node`."""

# These follow their operand: there is nothing to rewrite.
_FOLLOWS = frozenset(
    {
        *("aten::flatten", "aten::squeeze", "aten::unsqueeze", "aten::ravel", "aten::view_as"),
        *("aten::reshape_as", "aten::expand_as", "aten::atleast_1d"),
    }
)
# name -> the argument that lists the output's lengths
_LISTED = {
    **dict.fromkeys(("aten::view", "aten::_unsafe_view", "aten::_reshape_alias"), "size"),
    **dict.fromkeys(("aten::expand", "aten::broadcast_to", "aten::expand_copy", "aten::view_copy"), "size"),
    "aten::reshape": "shape",
    **dict.fromkeys(
        (
            *("aten::zeros", "aten::ones", "aten::full", "aten::empty", "aten::rand", "aten::randn"),
            *("aten::new_zeros", "aten::new_ones", "aten::new_full", "aten::new_empty", "aten::randint"),
        ),
        "size",
    ),
}


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Set an argument by its schema name, wherever the call has it."""
    for arg in fx_call.signature(node.target):
        if arg.name == name and arg.position < len(node.args):
            node.update_arg(arg.position, value)
            return
    node.update_kwarg(name, value)


def state_length(node: fx.Node, axis: int, length: Any, emit: Callable[..., Any]) -> None:
    """Rewrite the shape argument of `node` so that its output's `axis` has `length` (an int or a node).

    Raises ElisionError for an operator that states no length."""
    call = fx_call.Call(node)
    name = fx_call.target_name(node.target)
    if name in _FOLLOWS:
        return
    if name in _LISTED:
        sizes = list(call[_LISTED[name]])
        sizes[axis] = length
        set_argument(node, _LISTED[name], sizes)
    elif name == "aten::unflatten":
        first = call.axis(call["dim"], call.rank("self"))
        sizes = list(call["sizes"])
        if first <= axis < first + len(sizes):
            sizes[axis - first] = length
            set_argument(node, "sizes", sizes)
    elif name == "aten::arange":
        _set_arange(node, call, length, emit)
    elif name == "aten::eye":
        set_argument(node, "n" if axis == 0 or not call.has("m") else "m", length)
    elif name in ("aten::slice", "aten::slice_copy"):
        _set_slice(node, call, axis, length, emit)
    elif name in ("aten::narrow", "aten::narrow_copy"):
        if axis == call.axis(call["dim"], call.rank("self")):
            set_argument(node, "length", length)
    elif name in ("aten::split", "aten::unsafe_split", "aten::split_with_sizes"):
        _set_parts(node, call, axis, length)
    elif name in ("aten::repeat", "aten::tile"):
        counts = "repeats" if call.has("repeats") else "dims"
        sizes = list(call[counts])
        lead = len(sizes) - call.rank("self")
        if axis >= lead and call.shape("self")[axis - lead] != 1:
            raise ElisionError(f"{node.name}: axis {axis} is tiled, its length cannot be set")
        sizes[axis] = length
        set_argument(node, counts, sizes)
    else:
        raise ElisionError(
            f"{node.name}: {fx_call.target_text(node.target)} states no length that could be set"
        )


def _set_arange(node: fx.Node, call: fx_call.Call, length: Any, emit: Callable[..., Any]) -> None:
    step = call["step"] if call.has("step") and call["step"] is not None else 1
    start = call["start"] if call.has("start") else 0
    end = length if step == 1 else emit(operator.mul, length, step)
    set_argument(node, "end", end if start == 0 else emit(operator.add, end, start))


def _set_parts(node: fx.Node, call: fx_call.Call, axis: int, length: Any) -> None:
    """Parts of one length get the new length; parts of several lengths say nothing about theirs."""
    if axis != call.axis(call["dim"], call.rank("self")):
        return
    name = "split_sizes" if call.has("split_sizes") else "split_size"
    sizes = call[name]
    if not isinstance(sizes, list | tuple):
        set_argument(node, name, length)
        return
    if len({str(fx_call.as_plain(s)) for s in sizes}) != 1:
        raise ElisionError(f"{node.name}: the parts have different lengths, they cannot be set")
    set_argument(node, name, [length] * len(sizes))


def _set_slice(node: fx.Node, call: fx_call.Call, axis: int, length: Any, emit: Callable[..., Any]) -> None:
    if axis != call.axis(call["dim"], call.rank("self")):
        return
    start, step = call["start"] or 0, call["step"] or 1
    if isinstance(start, int) and start < 0:
        if isinstance(length, int) and length <= -start and step == 1 and call["end"] is None:
            start = -length  # the last rows, counted from the end
            set_argument(node, "start", start)
            return
        raise ElisionError(f"{node.name}: a slice counted from the end, its length cannot be set")
    span = length if step == 1 else emit(operator.mul, length, step)
    set_argument(node, "end", span if start == 0 else emit(operator.add, span, start))
