"""Regions that tracing keeps as nested graphs (no-grad, autocast), inlined into one flat graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..errors import ElisionError
from . import fx_call
from .fx_nodes import fetch, free_name

_GRAD_REGION = "higher_order::wrap_with_set_grad_enabled"
_AUTOCAST_REGION = "higher_order::wrap_with_autocast"


def inline_regions(module: fx.GraphModule) -> None:
    """Inline `with torch.no_grad()` and `with torch.autocast()` regions, nested ones too.

    A no-grad region becomes its ops followed by `detach` of what leaves it: the same gradients, and an op
    inserted beside it is not caught in it. An autocast region keeps its enter and exit calls."""
    found = True
    while found:
        found = False
        for node in list(module.graph.nodes):
            name = fx_call.target_name(node.target) if node.op == "call_function" else ""
            if name == _GRAD_REGION:
                enabled, body, *operands = node.args
                leave = None if enabled else torch.ops.aten.detach.default
                _inline(module, node, fetch(module, body.target), operands, leave)
            elif name == _AUTOCAST_REGION:
                device, dtype, enabled, cache, body, *operands = node.args
                with module.graph.inserting_before(node):
                    enter = module.graph.call_function(
                        torch.amp.autocast_mode._enter_autocast, (device, dtype, enabled, cache)
                    )
                _inline(module, node, fetch(module, body.target), operands, None, after=enter)
            else:
                continue
            found = True
    dead = [n for n in module.graph.nodes if n.op == "get_attr" and not n.users]
    for node in dead:
        module.graph.erase_node(node)
    module.delete_all_unused_submodules()


def _inline(
    module: fx.GraphModule,
    node: fx.Node,
    body: fx.GraphModule,
    operands: list[Any],
    leave: Any,
    after: fx.Node | None = None,
) -> None:
    graph = module.graph
    mapped: dict[fx.Node, Any] = {}
    feed = iter(operands)
    results: Any = None
    with graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                mapped[inner] = next(feed)
            elif inner.op == "output":
                results = fx.map_arg(inner.args[0], lambda n: mapped[n])
            elif inner.op == "get_attr":
                name = free_name(module, inner.target)
                setattr(module, name, fetch(body, inner.target))
                mapped[inner] = graph.get_attr(name)
                mapped[inner].meta = dict(inner.meta)
            else:
                mapped[inner] = graph.node_copy(inner, lambda n: mapped[n])
        if after is not None:
            graph.call_function(torch.amp.autocast_mode._exit_autocast, (after,))
        if leave is not None:

            def detach(result: fx.Node) -> fx.Node:
                value = result.meta.get("val")
                if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                    return result
                outside = graph.call_function(leave, (result,))
                outside.meta = dict(result.meta)
                return outside

            results = fx.map_arg(results, detach)
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(results)
    else:
        for user in list(node.users):
            if user.target is not operator.getitem:
                raise ElisionError(f"cannot inline region {node.name}: {user.name} uses it whole")
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(node)
