"""Step graphs: attention over a cache with all that stands around it as one op, gated layers, joined projections.

The same in both hosts, and only where a graph has an attention over a cache. A pattern that is not met is left."""

from __future__ import annotations

from typing import Any

import numpy as np

from .ir.graph import Graph, Op, Value
from .lower_heads import NONE, Heads, heads_of, joined_result
from .lower_linears import side_by_side, with_columns
from .lower_match import Piece, activation, asked, last, operands, piece, same_shape, source
from .lower_rms import fuse_norms

ATTENTION, JOINED, GATED = "elision.cached_attention", "joined_cached_attention", "gated"


def fuse_steps(graph: Graph) -> dict[str, int]:
    """Rewrite `graph` in place; how often each pattern was met."""
    counts: dict[str, int] = {}
    attentions = [op for op in graph.ops_of("elision") if op.target == ATTENTION]
    if not attentions:
        return counts
    for op in attentions:
        if join_heads(graph, op):
            _count(counts, "attention with its heads joined")
    for op in [o for o in graph.ops_of("elementwise") if o.attrs.get("fn") == "mul"]:
        if op in graph.ops and join_gate(graph, op):
            _count(counts, "gated")
    if counts:
        graph.remove_dead()
        for op in list(graph.ops_of("elision")):
            if op.target in (f"elision.{JOINED}", f"elision.{GATED}") and pack(graph, op):
                _count(counts, "products side by side")
        graph.remove_dead()
    counts |= fuse_norms(graph)
    return counts


def _count(counts: dict[str, int], what: str) -> None:
    counts[what] = counts.get(what, 0) + 1


# ---- attention -----------------------------------------------------------------------------------------
def join_heads(graph: Graph, op: Op) -> bool:
    """joined_cached_attention in the place of `op` and of what splits and joins its heads."""
    q, k, v = (heads_of(graph, x) for x in operands(op)[:3])
    result = joined_result(graph, op.outputs[0])
    if q is None or k is None or v is None or result is None or v.norm is not None or v.rotary is not None:
        return False
    if any(x.flat.dtype != "float32" for x in (q, k, v)) or not _alike(q, k):
        return False
    parts = _operands(graph, (q, k, v))
    if parts is None:
        return False
    heads, shared = op.inputs[0].shape[1], op.inputs[1].shape[1]  # type: ignore[union-attr, index]
    attrs: dict[str, Any] = {
        **asked(op, "cached_attention"),
        "heads": heads,
        "kv_heads": shared,
        "rotary": NONE,
    }
    given: list[Value | None] = [*parts, *(op.operand(i) for i in range(3, 9))]
    given += [None] * 4
    if q.rotary is not None:
        attrs["rotary"] = q.rotary.kind
        given[9:11] = q.rotary.cos, q.rotary.sin
    for slot, part, name in ((11, q, "q_norm"), (12, k, "k_norm")):
        if part.norm is not None:
            attrs["eps"] = part.eps
            given[slot] = graph.insert_constant(np.ascontiguousarray(part.norm), name)
    new = graph.insert(JOINED, given, attrs, after=op)
    joined = new[0]
    if result.rank == 2:
        joined = graph.insert_plain("reshape", [joined], {"shape": result.shape}, after=joined.producer)
    graph.replace_uses(result, joined)
    for old, value in zip(op.outputs[1:], new[1:]):
        graph.replace_uses(old, value)
    return True


def _operands(graph: Graph, parts: tuple[Heads, Heads, Heads]) -> list[Value | None] | None:
    """q, k and v of the joined op, or one product of all three where their channels lie mixed in one."""
    if all(part.columns is None for part in parts):
        return [part.flat for part in parts]
    if len({part.flat for part in parts}) != 1 or any(part.columns is None for part in parts):
        return None
    columns = np.concatenate([part.columns for part in parts if part.columns is not None])
    packed = with_columns(graph, parts[0].flat, columns)
    return None if packed is None else [packed, None, None]


def _alike(q: Heads, k: Heads) -> bool:
    """Can one op do what is done to both?"""
    if (q.rotary is None) != (k.rotary is None) or (q.rotary is not None and not q.rotary.like(k.rotary)):
        return False
    return q.norm is None or k.norm is None or q.eps == k.eps


# ---- operands side by side -----------------------------------------------------------------------------
def pack(graph: Graph, op: Op) -> bool:
    """Let `op` take its first operands (q, k and v, or the gate and what it opens) as one, where they lie side by side
    or one product can put them there. What was read on the way, by a norm say, is gone by now."""
    name = op.target.partition(".")[2]
    count = 3 if name == JOINED else 2
    apart = [op.operand(i) for i in range(count)]
    if any(x is None for x in apart):
        return False
    packed = side_by_side(graph, [x for x in apart if x is not None])
    if packed is None:
        return False
    given = [packed, *[None] * (count - 1), *op.inputs[count:]]
    new = graph.insert(name, given, asked(op, name), after=op)
    for old, value in zip(op.outputs, new):
        graph.replace_uses(old, value)
    return True


# ---- gates ---------------------------------------------------------------------------------------------
def join_gate(graph: Graph, op: Op) -> bool:
    """`gated` in the place of fn(x) * y, where x and y come from the same rows."""
    given = operands(op)
    if len(given) != 2 or op.output.dtype != "float32" or not same_shape(*given):
        return False
    for gate, up in (given, given[::-1]):
        found, up = activation(graph, gate), source(up)
        if found is None or found[0] is up or not same_shape(found[0], up):
            continue
        x, fn = found
        if not (_projected(x) and _projected(up)):
            continue
        new = graph.insert(GATED, [x, up], {"fn": fn}, after=op)[0]
        graph.replace_uses(op.output, new)
        return True
    return False


def _projected(value: Value) -> bool:
    """Is `value`, or what it is cut from, the result of a product? Only then is this a gated layer."""
    op = source(value).producer
    if op is None:
        return False
    if op.kind in ("linear", "matmul") or op.target in ("elision.linear_nbits", "elision.linear_rows"):
        return True
    found: Piece = piece(value)
    if op.kind == "elementwise" and op.attrs.get("fn") == "add":  # a bias of its own
        return any(_projected(v) for v in operands(op) if last(v) > 0 and v.rank > 1)
    return found.base is not source(value) and _projected(found.base)
