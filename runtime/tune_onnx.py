"""The cases of onnxruntime: small models in canonical form, lowered by a table that names one form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from ..passes.ir.onnx import OnnxGraph
from ..passes.lowering import ONNXRUNTIME, Choice, ShapeClass, Table, attention_class, rows_class
from ..passes.onnx import io
from ..passes.onnx.lower_attention import JOINED, SPLIT
from ..passes.onnx.lower_norms import APART as NORM_APART
from ..passes.onnx.lower_norms import FUSED
from ..passes.onnx.lower_packed import APART, PACKED
from .runners import plain_session
from .tune import Case

FORMS = {"attention": (JOINED, SPLIT), "add_norm": (FUSED, NORM_APART), "packed_linear": (PACKED, APART)}
"""The forms of every operation that has several; the first is what the others are measured against."""

HEADS, WIDTH, BATCH = 6, 64, 4


class Small:
    """A model of a few nodes, and the inputs to run it on."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.inputs: list[Any] = []
        self.feeds: dict[str, np.ndarray] = {}

    def __call__(self, kind: str, *operands: str, outputs: int = 1, **attrs: Any) -> str:
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, operands, names, **attrs))
        return names[0]

    def input(self, name: str, *shape: int) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        self.feeds[name] = self.random.normal(size=shape).astype(np.float32)
        return name

    def constant(self, array: Any) -> str:
        name = f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def weight(self, *shape: int) -> str:
        return self.constant(self.random.normal(0, 0.05, shape).astype(np.float32))

    def graph(self, *outputs: str) -> OnnxGraph:
        results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "case", self.inputs, results, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
        return OnnxGraph(io.from_proto(model))


def forms(op: str, shape: ShapeClass, small: Small, graph: OnnxGraph) -> dict[str, Callable[[], object]]:
    """A runner for every form of `op`, in a session with no library of ours."""
    runners: dict[str, Callable[[], object]] = {}
    for form in FORMS[op]:
        table = Table({(op, ONNXRUNTIME): {shape: Choice(form)}}, form)
        session = plain_session(io.to_proto(graph.model, table=table).SerializeToString())
        runners[form] = lambda session=session: session.run(None, small.feeds)
    return runners


def attention(tokens: int, kind: str) -> Case:
    """Attention over [4, tokens, 6 * 64] in one form or the other, with the moves of heads around it."""
    shape = (BATCH, HEADS, tokens, WIDTH)
    masked, sized = kind == "masked", kind == "sized"
    wanted = attention_class("float32", shape, shape, masked=masked, sized=sized, causal=False)

    def make() -> dict[str, Callable[[], object]]:
        small = Small()
        split = small.constant(np.array([0, 0, HEADS, WIDTH]))
        q, k, v = (
            small(
                "Transpose",
                small("Reshape", small.input(x, BATCH, tokens, HEADS * WIDTH), split),
                perm=[0, 2, 1, 3],
            )
            for x in "qkv"
        )
        mask = [small.input("mask", BATCH, 1, 1, tokens)] if kind == "masked" else []
        out = small("Transpose", small("Attention", q, k, v, *mask), perm=[0, 2, 1, 3])
        joined = small.constant(np.array([0, 0, HEADS * WIDTH]))
        graph = small.graph(small("Reshape", out, joined))
        if kind == "sized":
            (op,) = graph.ops_of("attention")
            size = graph.insert_constant(small.random.integers(1, 5, (1, tokens)).astype(np.float32), "size")
            attrs = {"scale": op.attrs["scale"]}
            (biased,) = graph.insert("attention", [*op.inputs, None, size], attrs, after=op)
            for user, index in list(op.output.users):
                graph.set_operand(user, index, biased)
            graph.remove_dead()
        return forms("attention", wanted, small, graph)

    return Case("attention", wanted, make)


def add_norm(rows: int, width: int) -> Case:
    """norm(x + y) of [1, rows, width]."""
    wanted = rows_class("float32", (1, rows, width))

    def make() -> dict[str, Callable[[], object]]:
        small = Small()
        x, y = (small.input(name, 1, rows, width) for name in "xy")
        scale, shift = small.weight(width), small.weight(width)
        norm = small("LayerNormalization", small("Add", x, y), scale, shift, axis=-1)
        return forms("add_norm", wanted, small, small.graph(norm))

    return Case("add_norm", wanted, make)


def packed_linear(rows: int, width: int) -> Case:
    """x W + c of [1, rows, width], three times as wide, cut into three."""
    wanted = rows_class("float32", (1, rows, 3 * width))

    def make() -> dict[str, Callable[[], object]]:
        small = Small()
        product = small("MatMul", small.input("x", 1, rows, width), small.weight(width, 3 * width))
        small("Split", small("Add", product, small.weight(3 * width)), outputs=3, axis=2, num_outputs=3)
        parts = list(small.nodes[-1].output)
        return forms("packed_linear", wanted, small, small.graph(*parts))

    return Case("packed_linear", wanted, make)


def cases(target: str, *, quick: bool) -> list[Case]:
    kinds = ("plain", "sized", "masked")
    if quick:
        return [*(attention(128, kind) for kind in kinds), add_norm(512, 384), packed_linear(512, 384)]
    return [
        *(attention(tokens, kind) for kind in kinds for tokens in (32, 128, 256, 1024)),
        *(add_norm(rows, width) for width in (384, 1024) for rows in (64, 512, 4096)),
        *(packed_linear(rows, width) for width in (384, 768) for rows in (64, 512, 2048)),
    ]
