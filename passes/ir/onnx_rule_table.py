"""The table of shape rules, and what rules share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from .graph import Shape
from .onnx_shapes import ShapeEnv

Shapes = Sequence[Shape | None]
Rule = Callable[[ShapeEnv, ir.Node], Shapes]
RULES: dict[tuple[str, str], Rule] = {}


def rule(*names: str, domain: str = "") -> Callable[[Rule], Rule]:
    def add(function: Rule) -> Rule:
        for name in names:
            RULES[domain, name] = function
        return function

    return add


# ---- helpers -----------------------------------------------------------------------------------------
def axis_of(node: ir.Node, rank: int, default: int = 0, name: str = "axis") -> int:
    axis = node.attributes.get_int(name, default)
    if not -rank <= axis < max(rank, 1):
        raise ValueError(f"axis {axis} of a value of rank {rank}")
    return axis % rank if rank else 0


def axes_operand(env: ShapeEnv, node: ir.Node, index: int) -> list[int] | None:
    """Axes given as operand (newer opsets) or as attribute (older ones); None when not given."""
    if len(node.inputs) > index and node.inputs[index] is not None:
        axes = env.known_ints(node.inputs[index])
        if axes is None:
            raise ValueError("axes known only at run time")
        return axes
    if "axes" in node.attributes:
        return list(node.attributes["axes"].as_ints())
    return None
