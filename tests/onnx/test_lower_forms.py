"""`lower` for onnxruntime: which form each operator gets, the same numbers, and what 1.20 must not meet."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from elision.passes.ir.onnx import OnnxGraph
from elision.passes.lowering import ONNXRUNTIME, Choice, ShapeClass, Table
from elision.passes.lowering_defaults import DEFAULTS
from elision.passes.onnx.io import from_proto, to_proto
from elision.passes.onnx.lower import lower
from elision.passes.onnx.lower_opset import relabel
from elision.passes.onnx.normalise import normalise
from elision.passes.pipeline import parse
from elision.passes.testing import apply, expect_diff
from onnx import TensorProto

from .onnx_tools import Builder, run

B, H, N, D = 2, 2, 6, 4
C = H * D


def forced(op: str, form: str) -> Table:
    """A table that names one form whatever the lengths."""
    words = [
        ShapeClass(w)
        for w in (("float32",), ("float32", "plain"), ("float32", "masked"), ("float32", "sized"))
    ]
    return Table({(op, ONNXRUNTIME): {word: Choice(form) for word in words}}, "a test", DEFAULTS)


def feed(**more: np.ndarray) -> dict[str, np.ndarray]:
    x = np.random.default_rng(0).normal(size=(B, N, C)).astype(np.float32)
    return {"x": x, **more}


def attention(mask: list[int] | None = None, dtype: int = TensorProto.FLOAT, packed: str = "") -> Builder:
    """One self-attention between a projection in and one out, in operator set 23."""
    b = Builder(23)
    x = b.input("x", [B, N, C])
    if packed:
        y = b("Add", b("MatMul", x, b.weight(C, 3 * C)), b.weight(3 * C))
        y = b("Transpose", b("Reshape", y, b.ints(0, 0, 3, H, D)), perm=[2, 0, 3, 1, 4])
        if packed == "gather":
            parts = [b("Gather", y, b.const(i, np.int64), axis=0) for i in range(3)]
        elif packed == "split":
            parts = [b.squeeze(part, [0]) for part in b.split(y, [1, 1, 1], 0)]
        else:
            parts = [b.squeeze(b("Slice", y, b.ints(i), b.ints(i + 1), b.ints(0)), [0]) for i in range(3)]
    else:
        parts = [
            b(
                "Transpose",
                b("Reshape", b("MatMul", x, b.weight(C, C)), b.ints(0, 0, H, D)),
                perm=[0, 2, 1, 3],
            )
            for _ in range(3)
        ]
    if mask is not None:
        parts.append(b.input("mask", mask, dtype))
    out = b("Transpose", b("Attention", *parts), perm=[0, 2, 1, 3])
    b.output(b("MatMul", b("Reshape", out, b.ints(0, 0, C)), b.weight(C, C)))
    return b


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def lowered(b: Builder, table: Table = DEFAULTS) -> tuple[ir.Model, dict[str, int], list[str]]:
    model = from_proto(b.model())
    counts, notes = lower(model, table)
    return model, counts, notes


# ---- attention ---------------------------------------------------------------------------------------
def test_heads_side_by_side() -> None:
    model, counts, notes = lowered(attention())
    assert counts == {"joined_attention": 1} and not notes
    assert kinds(model) == ["MatMul"] * 3 + ["joined_attention", "MatMul"]
    np.testing.assert_allclose(run(model, feed())[0], run(attention().model(), feed())[0], atol=1e-5)


def test_the_diff() -> None:
    before = OnnxGraph(from_proto(attention().model()))
    after = apply(before, parse("lower"))
    expect_diff(
        before,
        after,
        """
        ...
        - %Reshape_4: float32[2, 6, 2, 4] = Reshape(%MatMul_2, [0, 0, 2, 4])
        - %Transpose_5: float32[2, 2, 6, 4] = Transpose(%Reshape_4) {perm=[0, 2, 1, 3]}
        ...
        - %Reshape_9: float32[2, 6, 2, 4] = Reshape(%MatMul_7, [0, 0, 2, 4])
        - %Transpose_10: float32[2, 2, 6, 4] = Transpose(%Reshape_9) {perm=[0, 2, 1, 3]}
        ...
        - %Reshape_14: float32[2, 6, 2, 4] = Reshape(%MatMul_12, [0, 0, 2, 4])
        - %Transpose_15: float32[2, 2, 6, 4] = Transpose(%Reshape_14) {perm=[0, 2, 1, 3]}
        - %Attention_16: float32[2, 2, 6, 4] = Attention(%Transpose_5, %Transpose_10, %Transpose_15)
        - %Transpose_17: float32[2, 6, 2, 4] = Transpose(%Attention_16) {perm=[0, 2, 1, 3]}
        - %Reshape_19: float32[2, 6, 8] = Reshape(%Transpose_17, [0, 0, 8])
        + %Attention_16_joined_attention: float32[2, 6, 8] = elision.joined_attention(%MatMul_2, %MatMul_7, %MatMul_12) {causal=False, heads=2, kv_heads=2, scale=0.5}
        - %MatMul_21: float32[2, 6, 8] = MatMul(%Reshape_19, %c_20)
        + %MatMul_21: float32[2, 6, 8] = MatMul(%Attention_16_joined_attention, %c_20)
        ...
        """,  # noqa: E501
    )


def test_split_heads_where_the_table_says_so() -> None:
    model, counts, _ = lowered(attention(), forced("attention", "attention"))
    assert counts == {"attention": 1}
    assert "attention" in kinds(model) and kinds(model).count("Transpose") == 4
    np.testing.assert_allclose(run(model, feed())[0], run(attention().model(), feed())[0], atol=1e-5)


@pytest.mark.parametrize("shape", [[B, 1, 1, N], [1, 1, N, N], [1, H, N, N], [N, N]])
@pytest.mark.parametrize("form", ["joined_attention", "attention"])
def test_additive_masks(shape: list[int], form: str) -> None:
    values = np.where(np.random.default_rng(1).random(shape) > 0.4, 0.5, -1e30).astype(np.float32)
    model, _, _ = lowered(attention(shape), forced("attention", form))
    whole = np.broadcast_to(values, np.broadcast_shapes(values.shape, (B, H, N, N))).copy()
    wanted = run(attention([B, H, N, N]).model(), feed(mask=whole))[0]
    np.testing.assert_allclose(run(model, feed(mask=values))[0], wanted, atol=1e-5)


@pytest.mark.parametrize("shape", [[B, 1, 1, N], [B, 1, N, N], [B, H, N, N]])
def test_queries_without_any_key_get_zeros(shape: list[int]) -> None:
    """As in onnxruntime's own operator; the dialect's attention would give them the mean."""
    keep = np.random.default_rng(1).random(shape) > 0.4
    keep[0, :, 0] = False
    model, counts, _ = lowered(attention(shape, TensorProto.BOOL))
    assert sum(counts.values()) == 1
    whole = np.broadcast_to(keep, (B, H, N, N)).copy()
    wanted = run(attention([B, H, N, N], TensorProto.BOOL).model(), feed(mask=whole))[0]
    np.testing.assert_allclose(run(model, feed(mask=keep))[0], wanted, atol=1e-5)


def test_a_cache_stays_and_so_does_the_operator_set() -> None:
    b = Builder(23)
    x = b.input("x", [B, N, C])
    past = [b.input(name, [B, H, 3, D]) for name in ("past_k", "past_v")]
    out, k, v = b("Attention", x, x, x, "", *past, outputs=3, q_num_heads=H, kv_num_heads=H)
    for value in (out, k, v):
        b.output(value)
    model, counts, notes = lowered(b)
    assert not counts and model.opset_imports[""] == 23
    assert any("it has a cache" in note for note in notes)
    assert any("Attention came after operator set 21" in note for note in notes)


# ---- packed projections ------------------------------------------------------------------------------
PACKED = ["gather", "split", "slices"]


@pytest.mark.parametrize("form", PACKED)
def test_a_packed_projection_becomes_three(form: str) -> None:
    model, counts, _ = lowered(attention(packed=form), forced("packed_linear", "apart"))
    assert counts == {"packed projections apart": 1, "joined_attention": 1}
    assert kinds(model) == ["MatMul", "Add"] * 3 + ["joined_attention", "MatMul"]
    wanted = run(attention(packed=form).model(), feed())[0]
    np.testing.assert_allclose(run(model, feed())[0], wanted, atol=1e-5)


@pytest.mark.parametrize("form", PACKED)
def test_a_packed_projection_is_cut_where_that_is_as_fast(form: str) -> None:
    model, counts, _ = lowered(attention(packed=form), forced("packed_linear", "packed"))
    assert "packed projections apart" not in counts
    assert kinds(model) == ["MatMul", "Add", "Split", "joined_attention", "MatMul"]
    wanted = run(attention(packed=form).model(), feed())[0]
    np.testing.assert_allclose(run(model, feed())[0], wanted, atol=1e-5)


def test_a_split_projection_becomes_three() -> None:
    def built() -> Builder:
        b = Builder(21)
        x = b.input("x", [B, N, C])
        for part in b.split(b("MatMul", x, b.weight(C, 12)), [2, 4, 6], 2):
            b.output(part)
        return b

    model, counts, _ = lowered(built(), forced("packed_linear", "apart"))
    assert counts == {"packed projections apart": 1}
    assert kinds(model) == ["MatMul"] * 3
    assert [v.name for v in model.graph.outputs] == [
        v.name for v in from_proto(built().model()).graph.outputs
    ]
    for a, b in zip(run(model, feed()), run(built().model(), feed()), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


# ---- norms -------------------------------------------------------------------------------------------
def norm_of_a_sum(twice: bool = False) -> Builder:
    b = Builder(21)
    x = b.input("x", [B, N, C])
    total = b("Add", x, b("MatMul", x, b.weight(C, C)))
    y = b("LayerNormalization", total, b.weight(C), b.weight(C), axis=-1)
    b.output(y)
    if twice:
        b.output(total)
    return b


def test_a_sum_in_front_of_a_norm() -> None:
    model, counts, _ = lowered(norm_of_a_sum(), forced("add_norm", "apart"))
    assert counts == {"residual sums kept apart from norms": 1}
    assert kinds(model) == ["MatMul", "Sum", "LayerNormalization"]
    np.testing.assert_allclose(run(model, feed())[0], run(norm_of_a_sum().model(), feed())[0], atol=1e-5)


def test_a_sum_that_onnxruntime_leaves_alone_stays() -> None:
    for b, form in ((norm_of_a_sum(), "fused"), (norm_of_a_sum(twice=True), "apart")):
        model, counts, _ = lowered(b, forced("add_norm", form))
        assert not counts and kinds(model) == ["MatMul", "Add", "LayerNormalization"]


@pytest.mark.parametrize("axis", [-1, 1])
def test_rms_norms_are_written_out_and_found_again(axis: int) -> None:
    b = Builder(23)
    x = b.input("x", [B, N, C])
    shape = [C] if axis == -1 else [N, C]
    b.output(b("RMSNormalization", x, b.weight(*shape), axis=axis, epsilon=1e-3))
    wanted = run(b.model(), feed())[0]
    model, counts, _ = lowered(b)
    assert counts == {"RMSNormalization written out": 1} and model.opset_imports[""] == 21
    np.testing.assert_allclose(run(model, feed())[0], wanted, atol=1e-5)
    assert normalise(model).rules["RMSNormalization"] == 1


# ---- what 1.20 must not meet --------------------------------------------------------------------------
def merged_twice(r: tuple[int, int]) -> OnnxGraph:
    """Two merges with budgets of their own; the first has no sizes."""
    graph = OnnxGraph(from_proto(attention().model()))
    value = graph.ops[-1].inputs[0]
    assert value is not None
    size = None
    for budget in r:
        slots = graph.insert("match_tokens", [value], {"r": budget}, after=graph.ops[-2])
        position = next(i for i, o in enumerate(graph.ops) if slots[0] in o.outputs)
        made = graph.insert("merge_tokens", [value, size, *slots], {"axis": 1}, after=graph.ops[position])
        value, size = made
    graph.add_output(value, "merged")
    return graph


def test_one_function_for_each_op() -> None:
    """onnxruntime 1.20 does not tell overloads apart."""
    graph = merged_twice((2, 1))
    plain = run(to_proto(graph.model, "standard"), feed())
    counts, _ = lower(graph.model)
    names = [function.name for function in graph.model.functions.values()]
    assert sorted(names) == ["joined_attention", "match_tokens", "merge_tokens"]
    assert counts["merges given sizes of 1"] == 1
    budgets = [n.attributes["r"].as_int() for n in graph.model.graph if n.op_type == "match_tokens"]
    assert budgets == [2, 1]
    for a, b in zip(run(graph.model, feed()), plain, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_variants_that_cannot_be_one_have_names_of_their_own() -> None:
    graph = merged_twice((2, 1))
    merged, size = graph.ops_of("elision")[-1].outputs
    for mode in ("sum", "mean"):
        (pooled,) = graph.insert(
            "pool_tokens", [merged, size], {"axis": 1, "mode": mode}, after=graph.ops[-1]
        )
        graph.add_output(pooled, mode)
    plain = run(to_proto(graph.model, "standard"), feed())
    counts, _ = lower(graph.model)
    assert counts["pool_tokens under another name"] == 1
    names = [function.name for function in graph.model.functions.values()]
    assert len(names) == len(set(names)) and {"pool_tokens", "pool_tokens_2"} <= set(names)
    read = OnnxGraph(ir.from_proto(to_proto(graph.model)))
    assert [op.target for op in read.ops_of("elision")].count("elision.pool_tokens") == 2
    for a, b in zip(run(graph.model, feed()), plain, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_lowering_again_does_nothing() -> None:
    graph = merged_twice((2, 1))
    lower(graph.model)
    once = [repr(node) for node in graph.model.graph]
    counts, _ = lower(graph.model)
    assert not counts and [repr(node) for node in graph.model.graph] == once


def test_labels_come_down_only_where_nothing_is_newer() -> None:
    b = Builder(24)
    x = b.input("x", [B, N, C])
    b.output(b("Reshape", b("Relu", b("Transpose", x, perm=[0, 2, 1])), b.ints(0, -1)))
    model = from_proto(b.model())
    model.ir_version = 11
    assert not relabel(model) and model.opset_imports[""] == 21 and model.ir_version == 10
    old = Builder(13)
    old.output(old("Relu", old.input("x", [B, N, C])))
    model = from_proto(old.model())
    assert not relabel(model) and model.opset_imports[""] == 13
    new = Builder(24)
    new.output(new("Swish", new.input("x", [B, N, C])))
    model = from_proto(new.model())
    assert relabel(model) == ["Swish came after operator set 21"] and model.opset_imports[""] == 24


def test_a_lowered_file_is_normalised_like_any_other() -> None:
    model = from_proto(to_proto(from_proto(attention().model())))
    report = normalise(model)
    assert report.attentions == 1 and not model.functions
    assert len(OnnxGraph(model).ops_of("attention")) == 1
    np.testing.assert_allclose(run(model, feed())[0], run(attention().model(), feed())[0], atol=1e-5)


def test_a_merged_file_keeps_its_dialect() -> None:
    """The converter writes functions into the graph; not ours."""
    model = from_proto(to_proto(merged_twice((2, 1)).model))
    wanted = run(model, feed())
    normalise(model)
    assert {"match_tokens", "merge_tokens"} <= {f.name for f in model.functions.values()}
    OnnxGraph(model).verify()
    for a, b in zip(run(model, feed()), wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
