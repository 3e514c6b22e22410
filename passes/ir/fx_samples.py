"""Running a torch graph over several samples at once, op by op, so that weights can be exchanged on the way."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from ..errors import ElisionError
from . import fx_call, fx_nodes, fx_ops
from .fx import FxGraph
from .graph import Op

Visit = Callable[[Op, list[torch.Tensor]], np.ndarray | None]
"""Told of a product or table and its inputs in every sample; a matrix [N, K] takes the place of the weight."""


def walk(graph: FxGraph, samples: Sequence[Sequence[Any]], targets: Collection[Op], visit: Visit) -> None:
    """Run every op for all samples before the next one; at `targets` (linear, matmul, embedding) call `visit`.

    samples: tensors or arrays in the order of `graph.inputs`. What is exchanged counts for all later ops: a layer
    sees what the layers before it will put out. Raises ElisionError when a sample does not run."""
    nodes = list(graph.module.graph.nodes)
    last = {used: node for node in nodes for used in node.all_input_nodes}
    wanted = {op.raw: op for op in targets}
    env: dict[fx.Node, list[Any]] = {}
    with torch.no_grad():
        for node in nodes:
            try:
                if node.op == "placeholder":
                    env[node] = _fed(graph, node, samples)
                elif node.op == "get_attr":
                    env[node] = [fx_nodes.fetch(graph.module, str(node.target))] * len(samples)
                elif node.op == "call_function":
                    env[node] = _called(node, env, len(samples), wanted.get(node), visit)
            except ElisionError:
                raise
            except Exception as error:
                reason = fx_nodes.first_line(error)
                raise ElisionError(
                    f"the graph does not run on the samples: %{node.name}: {reason}"
                ) from error
            for used in node.all_input_nodes:
                if last[used] is node:
                    env.pop(used, None)


def _fed(graph: FxGraph, node: fx.Node, samples: Sequence[Sequence[Any]]) -> list[Any]:
    place = next((i for i, value in enumerate(graph.inputs) if value.raw is node), None)
    if place is None:
        value = next((v for v in graph.values() if v.raw is node), None)
        tensor = None if value is None else graph.tensor(value)
        return [node.meta.get("val") if tensor is None else tensor] * len(samples)
    if any(len(sample) != len(graph.inputs) for sample in samples):
        raise ElisionError(f"a sample has an array for each of the graph's {len(graph.inputs)} inputs")
    return [torch.as_tensor(sample[place]) for sample in samples]


def _called(
    node: fx.Node, env: dict[fx.Node, list[Any]], count: int, op: Op | None, visit: Visit
) -> list[Any]:
    if fx_call.target_name(node.target) in fx_ops.SWITCHES:
        return [None] * count  # of gradients and autocast: nothing that matters here
    if op is not None:
        first = op.inputs[1 if op.kind == "embedding" else 0]
        assert first is not None
        weight = visit(op, env[first.raw])
        if weight is not None:
            return [_product(op, x, torch.from_numpy(weight), env, i) for i, x in enumerate(env[first.raw])]
    results = []
    for index in range(count):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n, i=index: env[n][i])
        results.append(node.target(*args, **kwargs))  # type: ignore[operator]
    return results


def _product(
    op: Op, x: torch.Tensor, w: torch.Tensor, env: dict[fx.Node, list[Any]], index: int
) -> torch.Tensor:
    if op.kind == "embedding":
        table = op.inputs[0]
        assert table is not None
        return torch.nn.functional.embedding(x, w).to(getattr(torch, table.dtype))
    given = op.operand(2)
    bias = None if given is None else env[given.raw][index].float()
    return torch.nn.functional.linear(x.float(), w, bias).to(x.dtype)
