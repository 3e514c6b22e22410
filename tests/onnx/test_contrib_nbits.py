"""com.microsoft's operators over weights of few bits as ops of the dialect, with the same results."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from .onnx_tools import Builder, check

N, K, G = 5, 70, 32
GROUPS = -(-K // G)


# onnxruntime takes floating zero points with 4 bits only.
@pytest.mark.parametrize("bits, zeros", [(4, "none"), (8, "none"), (4, "bytes"), (8, "bytes"), (4, "floats")])
@pytest.mark.parametrize("flat", [False, True])
def test_products(bits: int, zeros: str, flat: bool) -> None:
    random = np.random.default_rng(0)
    b = Builder(21)
    x = b.input("x", ["m", K])
    operands = [
        x,
        b.const(random.integers(0, 256, (N, GROUPS, G * bits // 8)), np.uint8),
        b.const(random.uniform(0.01, 0.1, (N * GROUPS,) if flat else (N, GROUPS))),
    ]
    if zeros == "bytes":
        operands.append(b.const(random.integers(0, 256, (N, -(-GROUPS * bits // 8))), np.uint8))
    elif zeros == "floats":
        operands.append(b.const(random.uniform(4, 11, (N, GROUPS))))
    else:
        operands.append("")
    operands += ["", b.const(random.normal(size=N))]
    y = b(
        "MatMulNBits", *operands, domain="com.microsoft", K=K, N=N, bits=bits, block_size=G, accuracy_level=4
    )
    b.output(y)
    feed = {"x": random.normal(size=(3, K)).astype(np.float32)}
    # One side multiplies in float32 where zero points are floats, or of 4 bits and packed by the function: the other
    # rounds x to 8 bits. In all other cases both do.
    near = 0.1 if zeros == "floats" or (bits, zeros) == (4, "bytes") else 1e-4
    graph, _ = check(b.model(), feed, tolerance=near, **{"MatMulNBits taken apart": 1})
    (op,) = graph.ops_of("elision")
    assert op.target == "elision.linear_nbits"
    assert (op.attrs["bits"], op.attrs["group"]) == (bits, G)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_rows_of_a_table(bits: int, zeros: bool) -> None:
    random = np.random.default_rng(0)
    width, group = 64, 32
    b = Builder(21)
    ids = b.input("ids", ["m", 2], TensorProto.INT64)
    names = ["table", "scales", "zeros"]
    arrays = [
        random.integers(0, 256, (7, width * bits // 8)).astype(np.uint8),
        random.uniform(0.01, 0.1, (7, width // group)).astype(np.float32),
        random.integers(0, 256, (7, width // group * bits // 8)).astype(np.uint8),
    ][: 2 + zeros]
    b.initializers += [numpy_helper.from_array(a, n) for a, n in zip(arrays, names)]
    attrs = {"bits": bits, "block_size": group, "gather_axis": 0, "quantize_axis": 1}
    inputs = [names[0], ids, *names[1 : len(arrays)]]
    b.nodes.append(helper.make_node("GatherBlockQuantized", inputs, ["y"], domain="com.microsoft", **attrs))
    b.output("y")
    graph, _ = check(
        b.model(), {"ids": np.array([[0, 3], [6, 2], [1, 1]])}, **{"GatherBlockQuantized taken apart": 1}
    )
    (op,) = graph.ops_of("elision")
    assert op.target == "elision.embedding_nbits"


def test_a_table_that_is_the_weight_of_the_head() -> None:
    """Both read one array: the builder of onnxruntime-genai reshapes it for the rows."""
    random = np.random.default_rng(0)
    b = Builder(21)
    ids = b.input("ids", ["m", 2], TensorProto.INT64)
    weight = b.const(random.integers(0, 256, (7, 2, 16)), np.uint8)
    scales = b.const(random.uniform(0.01, 0.1, (7, 2)))
    flat = b("Reshape", weight, b.ints(7, 32))
    rows = {"bits": 4, "block_size": 32, "gather_axis": 0, "quantize_axis": 1}
    x = b("GatherBlockQuantized", flat, ids, scales, domain="com.microsoft", **rows)
    product = {"K": 64, "N": 7, "bits": 4, "block_size": 32, "accuracy_level": 4}
    b.output(b("MatMulNBits", x, weight, scales, domain="com.microsoft", **product))
    graph, _ = check(b.model(), {"ids": np.array([[0, 3], [6, 2]])})
    table, head = (op.inputs[1] for op in graph.ops_of("elision"))
    assert table is head
