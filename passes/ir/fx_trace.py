"""Tracing for the FX view inside torch.compile.

Dynamo hands a backend its own graph: torch functions and tensor methods, parameters lifted to placeholders.
`retrace` turns that into the ATen level that `torch.export` shows, so that one set of passes serves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv


def retrace(module: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Trace `module` again at the level of torch.export before decomposition.

    The result takes the same inputs in the same order (tensors, lifted parameters, SymInts) and returns the
    same flat tuple, so it goes to `torch._inductor.compile_fx.compile_fx` with the same example inputs.
    `node.meta['val']` is set everywhere; placeholders also carry `meta['elision_origin']` ("input",
    "parameter" or "constant") and, when it has data, `meta['elision_tensor']`, the tensor itself."""
    holders = [n for n in module.graph.nodes if n.op == "placeholder"]
    context = TracingContext.try_get()
    mode = (context.fake_mode if context is not None else None) or detect_fake_mode(example_inputs)
    if mode is None:
        mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
    fakes = [_fake(value, mode, context) for value in example_inputs]
    # The ambient autocast state is Inductor's business: it traces the result once more, under that state.
    with mode:
        traced = make_fx(fx.Interpreter(module).run, pre_dispatch=True)(*fakes)
    _name_placeholders(traced, holders, example_inputs)
    traced.train(module.training)
    return traced


def _fake(value: Any, mode: FakeTensorMode, context: TracingContext | None) -> Any:
    """The fake twin that AOTAutograd will make of the same input: same symbols, no new guards."""
    if not isinstance(value, torch.Tensor) or getattr(value, "fake_mode", None) is mode:
        return value
    symbolic = None if context is None else context.tensor_to_context.get(value)
    source = None if symbolic is None else symbolic.tensor_source  # type: ignore[attr-defined]
    return mode.from_tensor(value, symbolic_context=symbolic, source=source, trace=symbolic is None)


def _name_placeholders(traced: fx.GraphModule, holders: list[fx.Node], examples: Sequence[Any]) -> None:
    new = [n for n in traced.graph.nodes if n.op == "placeholder"]
    for node, old, example in zip(new, holders, examples):
        node.meta["elision_origin"] = _origin(old, example)
        if isinstance(example, torch.Tensor) and not isinstance(example, FakeTensor):
            node.meta["elision_tensor"] = example
        name = traced.graph._graph_namespace.create_name(old.name.lower(), None)
        node.name = name
        node.target = name
    traced.recompile()


def _origin(holder: fx.Node, example: Any) -> str:
    static = "_dynamo_static_input_type" in (holder.meta.get("tensor_dict") or {})
    if isinstance(example, torch.nn.Parameter) or getattr(
        holder.meta.get("example_value"), "_is_param", False
    ):
        return "parameter"
    return "constant" if static else "input"
