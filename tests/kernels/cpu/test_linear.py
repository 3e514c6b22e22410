"""The products in C++: what they compute in every variant, whatever company a row has, in torch and in its lowering."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from elision.kernels import cpu
from elision.passes.base import PassContext
from elision.passes.errors import Refused
from elision.passes.ir.fx import FxGraph
from elision.passes.lower import Lower
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import Tensor, nn

from .. import onnx_call
from ..cases import CASES, call
from ..linear_cases import nbits, quantized, x_of
from .linear_draws import ZEROS, allowed, emulated, product
from .sessions import feeds_of, open_session

if cpu.available():
    cpu.kernels()

ROOT = Path(__file__).parents[3]
LINEAR = [
    case for case in CASES if case.op in ("linear_nbits", "linear_rows", "linear_topk", "linear_spread")
]


@pytest.mark.parametrize("variant", cpu.variants() if cpu.available() else ["portable"])
def test_every_variant_computes_the_emulated_product_and_a_row_has_the_same_bits_in_any_company(
    variant: str,
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.cpu.linear_worker"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, cpu.ISA: variant},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [variant, "60"]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20),
    channels=st.integers(1, 50),
    width=st.integers(1, 300),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([16, 32, 64, 96, 128, 256]),
    zeros=st.sampled_from(ZEROS),
    seed=st.integers(0, 1000),
)
def test_the_product_is_as_exact_as_rows_of_eight_bits_allow(
    rows: int, channels: int, width: int, bits: int, group: int, zeros: str, seed: int
) -> None:
    p = product(seed, rows, channels, width, bits, group, zeros)
    operands = [p.x, *p.parts, p.bias]
    found = torch.ops.elision_cpu.linear_nbits(*operands, **p.attrs).double().numpy()
    (reference,) = call("linear_nbits", operands, p.attrs)
    size = np.abs(reference.numpy()).max() + 1e-6
    assert (np.abs(found - reference.double().numpy()) <= allowed(p) + 1e-5 * size).all()
    np.testing.assert_allclose(found, emulated(p), rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_torch_kernels_are_whole_and_agree_with_the_definition(case: Any) -> None:
    operands = case.make()
    overload = getattr(torch.ops.elision_cpu, case.op).default
    torch.library.opcheck(overload, tuple(operands), case.attrs)
    found = overload(*operands, **case.attrs)
    for one, other in zip(
        found if isinstance(found, tuple) else [found], call(case.op, operands, case.attrs), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=2e-3 if one.dtype == torch.float16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_a_file_with_constant_weights_gives_the_same_with_and_without_the_library(case: Any) -> None:
    """Twice: the weight is packed in the first call."""
    operands = case.make()
    model, feeds = onnx_call.model(case.op, operands, case.attrs), feeds_of(case.op, operands)
    for name in [n for n in feeds if n != "x"]:
        model.graph.initializer.append(numpy_helper.from_array(feeds.pop(name), name))
    kept = [value for value in model.graph.input if value.name == "x"]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    expected = call(case.op, operands, case.attrs)
    for custom in (False, True):
        session = open_session(model, custom=custom, threads=2)
        first, second = session.run(None, feeds), session.run(None, feeds)
        for one, again, other in zip(first, second, expected, strict=True):
            assert np.array_equal(one, again)
            torch.testing.assert_close(
                torch.from_numpy(one), other, rtol=2e-3 if one.dtype == np.float16 else 1e-5, atol=1e-5
            )


def test_rows_in_onnxruntime_have_the_same_bits_in_any_company() -> None:
    p = product(3, 64, 90, 160, 4, 32, "ints")
    operands = [p.x, *p.parts, None]
    model = onnx_call.model("linear_nbits", operands, p.attrs)
    for threads in (1, 2):
        session, feeds = open_session(model, threads=threads), feeds_of("linear_nbits", operands)
        whole = session.run(None, feeds)[0]
        for rows in range(1, 65):
            found = session.run(None, {**feeds, "x": feeds["x"][64 - rows :]})[0]
            assert np.array_equal(found, whole[64 - rows :])


# ---- the largest -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("k", [1, 2, 7, 90])
@pytest.mark.parametrize("threads", [1, 3])
def test_among_equals_the_lowest_index_comes_first(k: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.ones(5, 32)
        weight = torch.zeros(90, 32)
        weight[:, 0] = torch.tensor([3.0, -1.0, 2.0] * 30)  # thirty of each, all over the tiles
        values, places = torch.ops.elision_cpu.linear_topk(x, weight, bits=32, group=0, k=k)
        expected = call("linear_topk", [x, weight], {"bits": 32, "group": 0, "k": k})
        assert torch.equal(values, expected[0]) and torch.equal(places, expected[1])
    finally:
        torch.set_num_threads(before)


def test_what_is_no_number_comes_first_as_in_a_sort() -> None:
    x, weight = torch.tensor([[1.0, 0.0], [torch.nan, 1.0], [torch.inf, 1.0]]), torch.randn(50, 2)
    weight[7] = torch.nan
    weight[3] = -torch.inf
    found = torch.ops.elision_cpu.linear_topk(x, weight, bits=32, group=0, k=50)
    expected = call("linear_topk", [x, weight], {"bits": 32, "group": 0, "k": 50})
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_rows_with_numbers_beyond_all_bounds_stay_apart() -> None:
    p = product(1, 4, 33, 64, 4, 32, "none")
    x = p.x.clone()
    x[1, 5], x[2, 40] = torch.nan, torch.inf
    found = torch.ops.elision_cpu.linear_nbits(x, *p.parts, **p.attrs)
    clean = torch.ops.elision_cpu.linear_nbits(p.x, *p.parts, **p.attrs)
    assert torch.equal(found[[0, 3]], clean[[0, 3]])
    assert found[1].isnan().all() and not found[2].isfinite().any()


# ---- in graphs -----------------------------------------------------------------------------------------
class Head(nn.Module):
    """Products of all kinds, the last of which shares its weight with the first."""

    def __init__(self) -> None:
        super().__init__()
        weight, scales, zeros = quantized(64, 64, bits=4, group=32, zeros="ints")
        assert weight is not None and scales is not None and zeros is not None
        self.weight, self.scales, self.zeros = nn.Buffer(weight), nn.Buffer(scales), nn.Buffer(zeros)
        self.bias, self.rows = nn.Parameter(torch.randn(64)), nn.Parameter(torch.randn(64, 64).bfloat16())
        self.norm = nn.Parameter(torch.rand(64) + 0.5)

    def forward(self, x: Tensor) -> Any:
        ops = torch.ops.elision
        y = ops.linear_nbits(x, self.weight, self.scales, self.zeros, self.bias, bits=4, group=32)
        y = ops.linear_rows(y, self.rows)
        return ops.linear_topk(
            y, self.weight, self.scales, self.zeros, None, self.norm, bits=4, group=32, k=3, norm_offset=1.0
        )


def lowered() -> tuple[Head, FxGraph, Tensor]:
    module, x = Head().eval(), x_of(1, 5, 64)
    graph = FxGraph.trace(module, (x,))
    outcome = Lower().run(graph, PassContext())
    assert outcome.changed and not outcome.notes
    graph.verify()
    return module, graph, x


def test_lowering_packs_each_weight_once_and_lets_the_original_go() -> None:
    module, graph, x = lowered()
    targets = [op.target for op in graph.ops]
    assert targets.count("elision_cpu.linear_packed") == 2
    assert targets.count("elision_cpu.linear_topk_packed") == 1
    fast = graph.to_module()
    assert len(list(fast.buffers())) == 2  # the first weight, for two products, and the second
    assert len(list(fast.parameters())) == 2  # bias and norm
    expected = module(x)
    with torch.no_grad():
        compiled = torch.compile(fast, fullgraph=True)
        for found in (fast(x), compiled(x)):
            size = expected[0].abs().max()
            torch.testing.assert_close(found[0] / size, expected[0] / size, rtol=0.02, atol=0.02)


def test_a_packed_weight_cannot_be_taken_apart() -> None:
    _, graph, _ = lowered()
    with pytest.raises(Refused, match="its weight was packed for our kernels"):
        Lower(target="mlir").run(graph, PassContext())


def test_weights_that_are_operands_are_packed_in_every_call() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return torch.ops.elision.linear_rows(x, weight)

    x, weight = torch.randn(3, 40), torch.randn(20, 40)
    graph = FxGraph.trace(Product(), (x, weight))
    outcome = Lower().run(graph, PassContext())
    assert outcome.notes == ["linear_rows: the weight is no constant: it is packed in every call"]
    torch.testing.assert_close(graph.to_module()(x, weight), x @ weight.T)


# ---- what does not fit ---------------------------------------------------------------------------------
x, (weight, scales, zeros) = torch.randn(3, 64), quantized(20, 64, bits=4, group=32, zeros="ints")
FOUR, EIGHT = {"bits": 4, "group": 32}, {"bits": 8, "group": 32}
assert weight is not None and scales is not None and zeros is not None
WRONG: list[tuple[str, list[Any], dict[str, Any], str]] = [
    ("linear_nbits", [x.double(), weight, scales], FOUR, "not torch.float64"),
    ("linear_nbits", [x, weight, scales], EIGHT, r"is \[20, 2, 16\], not \[20, 2, 32\]"),
    ("linear_nbits", [x, weight, scales], {"bits": 3, "group": 32}, "bits is 4 or 8, not 3"),
    ("linear_nbits", [x, weight, scales], {"bits": 4, "group": 48}, "group is 16 or a multiple of 32, not 48"),
    ("linear_nbits", [x, weight, scales], {**FOUR, "width": 65}, "a product of 65 -> 0"),
    ("linear_nbits", [x[:, :32], weight, scales], FOUR, r"is \[20, 2, 16\], not \[20, 1, 16\]"),
    ("linear_nbits", [x, weight, scales[1:]], FOUR, r"is \[19, 2\], not \[20, 2\]"),
    ("linear_nbits", [x, weight, scales.double()], FOUR, "no kernel for weights of torch.uint8, torch.float64"),
    ("linear_nbits", [x, weight, scales, zeros.int()], FOUR, "no kernel for weights"),
    ("linear_nbits", [x, weight, scales, zeros, torch.ones(3)], FOUR, r"bias is \[3\], not \[20\]"),
    ("linear_rows", [x, torch.randn(20, 63)], {}, r"is \[20, 63\], not \[20, 64\]"),
    ("linear_rows", [x, torch.randn(20, 64).double()], {}, "no kernel for weights of torch.float64"),
    ("linear_topk", [x, weight, scales], {**FOUR, "k": 21}, "k is between 1 and 20, not 21"),
    ("linear_topk", [x, weight, scales], {**FOUR, "k": 0}, "k is between 1 and 20, not 0"),
    ("linear_topk", [x, weight, scales, None, None, torch.ones(3)], {**FOUR, "k": 2}, r"norm is \[3\], not \[64\]"),
    ("linear_packed", [x, torch.zeros(500, dtype=torch.uint8)], {"channels": 20}, "was not packed"),
]  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=lambda c: f"{c[0]}-{c[3]}")
def test_operands_that_do_not_fit_are_refused(case: tuple[str, list[Any], dict[str, Any], str]) -> None:
    op, operands, attrs, message = case
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.elision_cpu, op)(*operands, **attrs)


def test_onnxruntime_is_told_what_does_not_fit() -> None:
    operands = nbits(3, 64, channels=20, bits=4, group=32, zeros="ints", bias=True)
    session = open_session(onnx_call.model("linear_nbits", operands, FOUR))
    feeds = feeds_of("linear_nbits", operands)
    right = session.run(None, feeds)[0]
    for name, message in (
        ("weight", "the weight does not fit"),
        ("scales", "scales and zeros do not fit"),
        ("zeros", "scales and zeros do not fit"),
        ("bias", "is no vector of 20"),
    ):
        with pytest.raises(Exception, match=f"linear_nbits: .*{message}"):
            session.run(
                None, {**feeds, name: feeds[name][:, :1] if feeds[name].ndim > 1 else feeds[name][1:]}
            )
        assert np.array_equal(session.run(None, feeds)[0], right)


def test_a_body_without_lengths_is_products_with_the_unpacked_weight() -> None:
    """An operand whose width the file does not say: no MatMulNBits, which needs it."""
    for zeros in ZEROS:
        operands = nbits(3, 72, channels=20, bits=4, group=32, zeros=zeros)
        model = onnx_call.model("linear_nbits", operands, {**FOUR})
        function = model.functions[0]
        assert "MatMulNBits" in {node.op_type for node in function.node}
        from elision.kernels import OPS

        types = [
            None if t is None else (t.dim(), onnx.helper.np_dtype_to_tensor_dtype(t.numpy().dtype))
            for t in operands
        ]
        plain = OPS["linear_nbits"].onnx_function(types, FOUR, 20)  # type: ignore[arg-type]
        assert "MatMulNBits" not in {node.op_type for node in plain.node}
        del model.functions[:]
        model.functions.append(plain)
        node = model.graph.node[0]
        node.overload = plain.overload
        del node.attribute[:]
        node.attribute.extend(onnx.helper.make_attribute(n, v) for n, v in FOUR.items())
        found = open_session(model, custom=False).run(None, feeds_of("linear_nbits", operands))[0]
        torch.testing.assert_close(
            torch.from_numpy(found), call("linear_nbits", operands, FOUR)[0], rtol=1e-5, atol=1e-5
        )
