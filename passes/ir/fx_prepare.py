"""Bring a traced graph into the form the view wants: flat, functional, constants first.

Every step here keeps the numbers to the bit. `prepare` edits the module it is given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ..errors import ElisionError
from . import fx_call, fx_ops
from .fx_nodes import evaluate, fake_mode_of, fetch, live_nodes
from .fx_regions import inline_regions
from .fx_rewrite import rewrite
from .fx_writes import make_functional


def prepare(module: fx.GraphModule) -> None:
    """Inline regions, put constants first, remove in-place writes, take composites apart. In place."""
    inline_regions(module)
    drop_metadata_checks(module.graph)
    hoist_constants(module)
    fill_meta(module)
    make_functional(module)
    rewrite(module)
    hoist_constants(module)
    drop_dead(module.graph)


def drop_metadata_checks(graph: fx.Graph) -> None:
    """Erase the dtype checks that tracing puts before every cast: the verifier compares dtypes itself."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)


def drop_dead(graph: fx.Graph) -> None:
    """Erase calls and constants that reach no output and write nothing."""
    live = live_nodes(graph)
    for node in reversed(list(graph.nodes)):
        if node not in live and node.op in ("call_function", "get_attr"):
            graph.erase_node(node)


def hoist_constants(module: fx.GraphModule) -> None:
    """Put every get_attr right after the placeholders, so that a constant can be used anywhere."""
    graph = module.graph
    anchor = next((n for n in graph.nodes if n.op not in ("placeholder", "get_attr")), None)
    if anchor is None:
        return
    late = False
    for node in list(graph.nodes):
        if node is anchor:
            late = True
        elif node.op == "placeholder" and late:
            raise ElisionError(f"placeholder {node.name} comes after an operation")
        elif node.op == "get_attr" and late:
            anchor.prepend(node)


def fill_meta(module: fx.GraphModule) -> None:
    """Give every constant and call that has none its fake value."""
    mode = fake_mode_of(module)
    if mode is None:
        raise ElisionError("the graph carries no fake values (node.meta['val']): trace it with fake tensors")
    for node in module.graph.nodes:
        if node.op == "get_attr":
            _note_number(node, fetch(module, str(node.target)))
        if "val" in node.meta:
            continue
        if node.op == "get_attr":
            value = fetch(module, str(node.target))
            if isinstance(value, torch.Tensor):
                node.meta["val"] = mode.from_tensor(value, static_shapes=True)
        elif node.op == "call_function" and fx_call.target_name(node.target) not in fx_ops.SWITCHES:
            node.meta["val"] = evaluate(node, mode)


def _note_number(node: fx.Node, value: Any) -> None:
    """Let a constant that is one number carry it, so that passes can read it without the data."""
    single = (
        isinstance(value, torch.Tensor) and value.dim() == 0 and not isinstance(value, torch.nn.Parameter)
    )
    if single and not hasattr(value, "fake_mode"):
        with unset_fake_temporarily():
            node.meta["elision_number"] = value.item()
