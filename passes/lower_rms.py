"""RMS norms of step graphs as one op, with the residual addition in front of them.

Written out, a norm is six operations over rows of a few hundred numbers: for one new row, all of it is overhead."""

from __future__ import annotations

from .ir.graph import Graph, Op
from .lower_match import RmsNorm, operands, rms_norm, same_shape


def fuse_norms(graph: Graph) -> dict[str, int]:
    """Rewrite `graph` in place; how many norms became ops, and how many of them with an addition."""
    counts = {"norms": 0, "norms with their addition": 0}
    for op in [o for o in graph.ops if o.kind in ("elementwise", "norm")]:
        if op not in graph.ops or op.output.dtype != "float32":
            continue
        if op.kind == "elementwise" and op.attrs.get("fn") != "mul":
            continue
        found = rms_norm(graph, op.output)
        if found is None or found.x.dtype != "float32" or not same_shape(found.x, op.output):
            continue
        counts["norms with their addition" if _fuse(graph, op, found) else "norms"] += 1
    if any(counts.values()):
        graph.remove_dead()
    return {what: times for what, times in counts.items() if times}


def _fuse(graph: Graph, op: Op, norm: RmsNorm) -> bool:
    """The op in the place of `op`; whether the addition in front of it is part of it."""
    weight = graph.insert_constant(norm.weight, "norm_weight")
    total = norm.x
    add = total.producer
    parts = operands(add) if add is not None and add.kind == "elementwise" else []
    adds = add is not None and add.attrs.get("fn") == "add" and add.attrs.get("alpha", 1) == 1
    if adds and len(parts) == 2 and all(same_shape(v, total) for v in parts):
        out, added = graph.insert("add_rms_norm", [*parts, weight], {"eps": norm.eps}, after=add)
        graph.replace_uses(total, added)
        graph.replace_uses(op.output, out)
        return True
    out = graph.insert("rms_norm", [total, weight], {"eps": norm.eps}, after=add)[0]
    graph.replace_uses(op.output, out)
    return False
