"""Products whose weight is a constant, on the CPU: the kernels take it in the order in which they read it, made once.

The original stays with the graph only where something else reads it: a table that is an embedding too, for one."""

from __future__ import annotations

from typing import Any

from .ir.graph import Graph, Op, Value

OPERANDS = {"linear_nbits": 4, "linear_rows": 2, "linear_topk": 4, "linear_spread": 4}
"""How many operands of an op are x and the weight with its parts; the others follow those of the packed form."""


def pack_weights(graph: Graph, op: Op, name: str, attrs: dict[str, Any], made: dict[Any, Value]) -> str:
    """Put the packed form in the place of `op`; "", or why it stays. `made`: what was packed already, by the weight's
    parts, so that a weight that several ops read is packed once."""
    import torch

    from ..kernels import cpu

    host: Any = graph
    parts = [op.operand(i) for i in range(1, OPERANDS[name])]
    tensors = [None if v is None else host.tensor(v) for v in parts]
    if any(v is not None and t is None for v, t in zip(parts, tensors)):
        return "the weight is no constant"
    x = op.inputs[0]
    if x is None or x.shape is None or not isinstance(x.shape[-1], int):
        return "the length of a row is not known"
    weight, key = tensors[0], tuple(None if v is None else v.name for v in parts)
    assert parts[0] is not None and weight is not None  # no op of these lacks them
    attrs = {"bits": 8 * weight.element_size(), "group": 0, **attrs}
    if key not in made:
        tensors = [None if t is None else t.detach() for t in tensors]
        packed = cpu.pack_weight(*tensors, bits=attrs["bits"], group=attrs["group"], width=x.shape[-1])
        value = made[key] = graph.insert_constant(packed.numpy(), f"{parts[0].name}_packed")
        setattr(host.module, str(value.raw.target), packed)  # itself: a copy would not be in large pages
    rest = op.inputs[OPERANDS[name] :]
    kept = {n: attrs[n] for n in ("k", "eps", "norm_offset") if n in attrs}
    form = f"{name}_packed" if name in ("linear_topk", "linear_spread") else "linear_packed"
    target = getattr(torch.ops.elision_cpu, form).default
    new = host.insert_call(target, [x, made[key], *rest], {"channels": weight.shape[0], **kept}, after=op)
    for old, value in zip(op.outputs, new.outputs):
        host.replace_uses(old, value)
    host.remove_op(op)
    return ""
