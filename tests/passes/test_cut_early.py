"""Masks of all pairs of tokens are cut where they are made: the same values, and the matrix is never there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from elision.passes.cut_early import EarlyCut
from elision.passes.ir.fx import FxGraph
from elision.passes.ir.graph import Graph
from elision.runtime.runners import run_model
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from elision.testing import apply, capture, run
from tests.analysis import toys

N, KEPT = 12, 6
DROP = "token-drop{policy=uniform budget=0.5 layer=0}"
Mask = Callable[[Tensor, Tensor], Tensor]


def places() -> tuple[Tensor, Tensor]:
    at = torch.arange(N)
    return at[:, None], at[None, :]


def causal(valid: Tensor, table: Tensor) -> Tensor:
    queries, keys = places()
    return (keys <= queries)[None, None] & valid[:, None, None, :].bool()


def window(valid: Tensor, table: Tensor) -> Tensor:
    queries, keys = places()
    near = (queries - keys < 4) & (keys <= queries)
    return near.expand(valid.shape[0], 1, N, N) & valid[:, None, None, :].bool()


def chosen(valid: Tensor, table: Tensor) -> Tensor:
    return torch.where(causal(valid, table), 0.0, -1e9)


def filled(valid: Tensor, table: Tensor) -> Tensor:
    return torch.zeros(()).masked_fill(~causal(valid, table), -1e9)


def grouped(valid: Tensor, table: Tensor) -> Tensor:
    """Causal, but tokens that the input puts into one group see each other; the heads' axis comes last."""
    queries, keys = places()
    together = valid[:, :, None] == valid[:, None, :]
    return (((keys <= queries) | together) & valid[:, None, :].bool())[:, None]


def sloped(valid: Tensor, table: Tensor) -> Tensor:
    queries, keys = places()
    slopes = torch.tensor([0.5, 0.25])[:, None, None]
    return -(queries - keys).abs().float() * slopes + (1 - valid[:, None, None, :].float()) * -1e9


def learned(valid: Tensor, table: Tensor) -> Tensor:
    """A table of pairs, of which nothing smaller is known, added to what is made of vectors."""
    return table + chosen(valid, table)


class Masked(nn.Module):
    """Features [B, N, 16] and a padding mask; `mask` says who sees whom."""

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.mask = mask
        self.table = nn.Parameter(torch.randn(1, 2, N, N))
        self.blocks = nn.ModuleList(toys.Block() for _ in range(2))

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        x, mask = x * 1.5, self.mask(valid, self.table)
        for block in self.blocks:
            x = block(x, mask=mask)
        return x


def call() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    valid = torch.ones(2, N, dtype=torch.int64)
    valid[1, -3:] = 0
    return torch.randn(2, N, 16), valid


def pairs_of(graph: Graph) -> list[str]:
    """Names of what is computed of all pairs of tokens."""
    shapes = {v.name: v.shape or () for op in graph.ops for v in op.outputs}
    return [name for name, shape in shapes.items() if tuple(shape[-2:]) == (N, N)]


@pytest.mark.parametrize("mask", [causal, window, chosen, filled, grouped, sloped, learned])
def test_the_matrix_of_pairs_is_not_written(mask: Mask, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    module = Masked(mask).eval()
    graph = FxGraph.trace(module, call())
    early = apply(graph, DROP, call())
    # What the slopes are of is added to the padding: only where a key is read by no query is asked of all pairs.
    assert mask is sloped or mask is learned or not pairs_of(early)
    selected = [op for op in early.ops if op.target.endswith("select_tokens") and op.inputs[0] is not None]
    tables = [op for op in selected if tuple((op.inputs[0].shape or ())[-2:]) == (N, N)]  # type: ignore[union-attr]
    assert len(tables) == (mask is learned)
    monkeypatch.setattr(EarlyCut, "made", lambda *_: None)
    late = apply(graph, DROP, call())
    assert pairs_of(late)
    np.testing.assert_array_equal(run(early, call())[0], run(late, call())[0])


def masked_file(flipped: bool) -> onnx.ModelProto:
    """Where(causal and padding, 0, -1e9) as an exporter writes it, or Where(not that, -1e9, 0)."""

    def node(kind: str, inputs: str, output: str, **attrs: Any) -> onnx.NodeProto:
        return helper.make_node(kind, inputs.split(), [output], **attrs)

    nodes = [
        node("Mul", "x scale", "stream"),
        node("Cast", "valid", "flags", to=TensorProto.BOOL),
        node("Unsqueeze", "flags front", "keys"),
        node("And", "triangle keys", "both"),
        node("Not", "both", "neither"),
        node("Where", "neither low zero" if flipped else "both zero low", "mask"),
        node("Unsqueeze", "stream one", "q"),
        node("Attention", "q q q mask", "heads"),
        node("Squeeze", "heads one", "seen"),
        node("Add", "stream seen", "y"),
    ]
    arrays = {
        "scale": np.float32(1.5),
        "zero": np.float32(0),
        "low": np.float32(-1e9),
        "one": np.array([1]),
        "front": np.array([1, 2]),
        "triangle": np.tri(N, dtype=bool)[None, None],
    }
    infos = [("x", TensorProto.FLOAT, [2, N, 16]), ("valid", TensorProto.INT64, [2, N])]
    inputs = [helper.make_tensor_value_info(*info) for info in infos]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, N, 16])]
    weights = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])


@pytest.mark.parametrize("flipped", [False, True])
def test_a_file_has_the_condition_cut_and_asks_it_for_padding(
    flipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = capture(masked_file(flipped))
    early = apply(graph, DROP)
    assert not pairs_of(early)
    (where,) = [op for op in early.ops if op.target == "Where"]
    assert tuple(where.output.shape or ()) == (2, 1, KEPT, KEPT)
    (asked,) = [op.inputs[0] for op in early.ops if op.target.endswith("valid_size")]
    assert asked is early.inputs[1]  # nothing that it is made into
    monkeypatch.setattr(EarlyCut, "made", lambda *_: None)
    late = apply(graph, DROP)
    feeds = {name: array.numpy() for name, array in zip(("x", "valid"), call())}
    found = [run_model(one.model, feeds)[0] for one in (early, late)]  # type: ignore[attr-defined]
    np.testing.assert_array_equal(*found)
