"""Attention over a cache, in torch on the CPU: the kernel writes into the caches that it is given, and what the graph
gave back as new caches are then the caches that it took."""

from __future__ import annotations

from typing import Any

from .ir.graph import Graph, Op

KEY_CACHE, VALUE_CACHE = 3, 4


def write_into_caches(graph: Graph, op: Op, overload: Any, attrs: dict[str, Any]) -> str:
    """Put the overload that writes in the place of `op`; "", or why it stays."""
    from ..kernels.cpu.step_ops import cached_refuses

    host: Any = graph
    caches = [op.operand(i) for i in (KEY_CACHE, VALUE_CACHE)]
    if any(c is None or c.origin != "input" for c in caches):
        return "the caches are no inputs of the graph"
    if any(c is not None and (len(c.users) != 1 or c in graph.outputs) for c in caches):
        return "something else reads a cache as it was before"
    reason = cached_refuses([], [None if v is None else v.dtype for v in op.inputs])
    if reason:
        return reason
    new = host.insert_call(overload, op.inputs, attrs, after=op)
    for old, value in zip(op.outputs, [new.output, *caches]):
        host.replace_uses(old, value)
    host.remove_op(op)
    return ""
