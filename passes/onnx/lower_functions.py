"""One function for each op: onnxruntime before 1.24 does not tell overloads apart and would take any of them.

(Tried: 1.20 runs the last one, silently.) Variants that differ in what a node can say itself are made one; of the rest
the one with most nodes keeps the op's name, and the others are called by it and a number, under which our library
(`csrc/onnxruntime.cc`) knows the op too.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir

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
    """Give all but the most used function of every op a name of its own; returns how many nodes of each op got one."""
    uses: dict[tuple[str, str], Counter[ir.OperatorIdentifier]] = {}
    for node in model.graph.all_nodes():
        if node.op_identifier() in model.functions:
            uses.setdefault((node.domain, node.op_type), Counter())[node.op_identifier()] += 1
    names = {(domain, name) for domain, name, _ in model.functions}
    renamed: dict[ir.OperatorIdentifier, str] = {}
    counts: dict[str, int] = {}
    for (domain, name), counter in uses.items():
        number = 1
        for key, times in counter.most_common()[1:]:
            while (domain, f"{name}_{number + 1}") in names:
                number += 1
            number += 1
            renamed[key] = f"{name}_{number}"
            counts[f"{name} under another name"] = counts.get(f"{name} under another name", 0) + times
    for node in model.graph.all_nodes():
        if (new := renamed.get(node.op_identifier())) is not None:
            node.op_type = new
    for key, new in renamed.items():
        function = model.functions.pop(key)
        function.name = new
        model.functions[function.identifier()] = function
    return counts
