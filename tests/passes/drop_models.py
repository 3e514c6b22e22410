"""Vision-language models of the zoo with tokens dropped, and the eager model that hides the same tokens."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from elision.passes.base import Outcome, PassContext
from elision.passes.ir.fx import FxGraph
from elision.passes.token_drop import TokenDrop
from torch import Tensor, nn

from tests.zoo.export import export as export_call
from tests.zoo.export import quiet
from tests.zoo.model import Built
from tests.zoo.vlm import VLMS, padded

CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}
Side = str  # "", "left" or "right"


@cache
def module_of(name: str) -> nn.Module:
    return VLMS[name].module()


@cache
def call_of(name: str, batch: int = 2, images: int = 1, side: Side = "", by: int = 4) -> Built:
    """One call of a zoo model, padded on a side, or not at all."""
    inputs = VLMS[name].inputs(batch, images)
    if side:
        inputs = padded(inputs, side == "left", by)
    return Built(module_of(name), tuple(inputs.values()))


@cache
def graph_of(name: str, batch: int = 2, images: int = 1, side: Side = "") -> FxGraph:
    """The graph of that call. The batch may vary where the model permits it and a text has one image."""
    model = VLMS[name]
    call = call_of(name, batch, images, side)
    with quiet():
        return FxGraph.from_export(export_call(call, model.dynamic_shapes() if images == 1 else None))


def drop(
    graph: FxGraph, args: tuple[Tensor, ...], *, want_map: bool = False, **options: Any
) -> tuple[FxGraph, Outcome]:
    """A copy of the graph with tokens dropped, verified."""
    made = graph.copy()
    assert isinstance(made, FxGraph)
    context = PassContext(force=True, example_inputs=args, want_map=want_map)
    outcome = TokenDrop(**options).run(made, context)
    made.verify()
    return made, outcome


@cache
def dropped(
    name: str, batch: int = 2, images: int = 1, side: Side = "", **options: Any
) -> tuple[FxGraph, Outcome]:
    """`name` with tokens dropped, once in a process."""
    call = call_of(name, batch, images, side)
    return drop(graph_of(name, batch, images, side), call.args, **options)


def run(graph: FxGraph | nn.Module, args: tuple[Tensor, ...]) -> Any:
    with torch.no_grad():
        call: Any = graph.run if isinstance(graph, FxGraph) else graph
        return call(*args)


def gone_in(out: Tensor) -> Tensor:
    """Tokens [B, N] whose row of a restored output is zero: they were dropped (or are padding)."""
    return (out == 0).all(-1)


def hidden(call: Built, gone: Tensor, mask: int = 1) -> Tensor:
    """What the eager model says when nothing attends to the tokens that are gone."""
    args = list(call.args)
    args[mask] = args[mask].masked_fill(gone, 0)
    return run(call.module, tuple(args))


def image_tokens(name: str, args: tuple[Tensor, ...]) -> Tensor:
    """Which positions of the texts belong to an image, bool [B, N]."""
    return args[0] == VLMS[name].placeholder


def flags_of(graph: FxGraph, args: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The output, and what top_tokens says about the tokens of each picture: 1 kept, 0 dropped, -1 neither."""
    made = graph.copy()
    assert isinstance(made, FxGraph)
    (top,) = [op for op in made.ops if op.target.endswith("elision.top_tokens")]
    made.add_output(top.output, "flags")
    out, flags = run(made, args)
    return out, flags


def sliced(args: tuple[Tensor, ...], row: int) -> tuple[Tensor, ...]:
    """The call of one sample."""
    return tuple(arg[row : row + 1] for arg in args)
