"""One function for each op: onnxruntime before 1.24 does not tell overloads apart and would take any of them.

(Tried: 1.20 runs the last one, silently.) Variants that differ in what a node can say itself are made one; of the rest
the one with most nodes stays a function, which our library can replace, and the others are written into the graph.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from ..ir.onnx_dialect import DOMAIN, OP, make_node, op_and_attributes
from .surgery import Editor, operand


def unify(ed: Editor) -> None:
    """Merges without sizes count every token once, as the others may say too; they need no function of their own."""
    merges = [n for n in ed.graph if n.domain == DOMAIN and n.metadata_props.get(OP) == "merge_tokens"]
    if len({operand(n, 1) is None for n in merges}) < 2:
        return
    for node in merges:
        slot = operand(node, 2)
        if operand(node, 1) is not None or slot is None:
            continue
        length = ed.env.need(slot)[1]
        if not isinstance(length, int):
            continue
        ones = ed.constant(np.ones((1, length), np.float32), "ones")
        _, attrs = op_and_attributes(node)
        inputs = [ones if i == 1 else value for i, value in enumerate(node.inputs)]
        first = ed.adopt(make_node(ed.model, "merge_tokens", inputs, attrs), before=node)
        new = first.producer()
        assert new is not None
        for old, out in zip(list(node.outputs), new.outputs):
            ed.replace(old, out)
        ed.count("merges given sizes of 1")


def one_each(model: ir.Model) -> dict[str, int]:
    """Write all but the most used function of every op into the graph; returns how many nodes of each op went."""
    uses: dict[str, Counter[ir.OperatorIdentifier]] = {}
    for node in model.graph.all_nodes():
        if node.op_identifier() in model.functions:
            name = f"{node.domain}::{node.op_type}"
            uses.setdefault(name, Counter())[node.op_identifier()] += 1
    losers = {key for counter in uses.values() for key, _ in counter.most_common()[1:]}
    if not losers:
        return {}
    gone: dict[str, int] = {}
    for name, counter in uses.items():
        times = sum(count for key, count in counter.items() if key in losers)
        if times:
            gone[f"{name.partition('::')[2]} written into the graph"] = times
    common.InlinePass(criteria=lambda function: function.identifier() in losers)(model)
    common.RemoveUnusedFunctionsPass()(model)
    return gone
