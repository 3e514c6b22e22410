"""com.microsoft operators, by hand and as onnxruntime's own optimisers write them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from elision.passes.ir.onnx import OnnxGraph
from elision.passes.onnx.io import from_proto, to_proto
from elision.passes.onnx.normalise import normalise
from onnx import TensorProto, helper

from .onnx_tools import Builder, check, run

B, N, H, D = 2, 6, 2, 8
C = H * D
MS = "com.microsoft"


def feed(batch: int = B, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).normal(size=(batch, N, C)).astype(np.float32)}


def start() -> tuple[Builder, str]:
    b = Builder(17)
    return b, b.input("x", ["batch", N, C])


@pytest.mark.parametrize("op", ["Gelu", "BiasGelu", "FastGelu", "FastGelu with bias", "QuickGelu"])
def test_gelus(op: str) -> None:
    b, x = start()
    name = op.split()[0]
    inputs = [x, b.weight(C)] if "ias" in op else [x]
    b.output(b(name, *inputs, domain=MS, **({"alpha": 1.3} if name == "QuickGelu" else {})))
    graph, _ = check(b.model(), feed())
    assert all(op.raw.domain == "" for op in graph.ops)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("extra", [False, True])
def test_skip_norms(rms: bool, extra: bool) -> None:
    b, x = start()
    skip = b("Relu", x)
    if rms:
        inputs = [x, skip, b.weight(C)] + ([b.weight(C)] if extra else [])
        name = "SkipSimplifiedLayerNormalization"
    else:
        inputs = [x, skip, b.weight(C), b.weight(C)] + ([b.weight(C)] if extra else [])
        name = "SkipLayerNormalization"
    outs = ["y", "", "", "total"] if extra else ["y"]
    b.nodes.append(helper.make_node(name, inputs, outs, domain=MS, epsilon=1e-5, name="norm"))
    b.output(b("MatMul", "y", b.weight(C, C)))
    if extra:
        b.output("total")
    graph, _ = check(b.model(), feed())
    assert [op.attrs["fn"] for op in graph.ops_of("norm")] == ["rms_norm" if rms else "layer_norm"]


def test_simplified_norm_under_the_standard_domain() -> None:
    b, x = start()
    b.output(b("SimplifiedLayerNormalization", x, b.weight(C), epsilon=1e-5, axis=-1))
    graph, _ = check(b.model(), feed())
    assert [op.target for op in graph.ops] == ["RMSNormalization"]


def test_fused_matmul() -> None:
    b, x = start()
    b.output(b("FusedMatMul", x, x, domain=MS, alpha=0.25, transB=1))
    graph, _ = check(b.model(), feed())
    assert graph.ops_of("matmul")


MASKS = {"none": None, "lengths": ["batch"], "keys": ["batch", N], "pairs": ["batch", N, N]}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("bias", [False, True])
def test_attention(mask: str, bias: bool) -> None:
    b, x = start()
    feeds = feed()
    inputs = [x, b.weight(C, 3 * C), b.weight(3 * C) if bias else ""]
    shape = MASKS[mask]
    if shape:
        inputs.append(b.input("mask", shape, TensorProto.INT32))
        full = [B if d == "batch" else d for d in shape]
        random = np.random.default_rng(0)
        feeds["mask"] = (
            np.array([4, 6], np.int32) if len(full) == 1 else (random.random(full) > 0.4).astype(np.int32)
        )
    b.output(b("Attention", *inputs, domain=MS, num_heads=H))
    graph, _ = check(b.model(), feeds, Attention=1)
    assert not graph.ops_of("unknown")


def test_causal_attention_with_pairwise_bias() -> None:
    b, x = start()
    inputs = [x, b.weight(C, 3 * C), b.weight(3 * C), "", "", b.weight(1, H, N, N)]
    b.output(b("Attention", *inputs, domain=MS, num_heads=H, unidirectional=1, scale=0.3))
    graph, _ = check(b.model(), feed(), Attention=1)
    assert graph.ops_of("attention")[0].attrs["causal"] is True


@pytest.mark.parametrize("form", ["packed", "packed keys"])
def test_packed_operands(form: str) -> None:
    """onnxruntime runs these only on a GPU, so they are compared with the separate form."""
    weights = [np.random.default_rng(i).normal(0, 0.3, (C, C)).astype(np.float32) for i in range(3)]

    def build(packed: bool) -> onnx.ModelProto:
        b, x = start()
        q, k, v = (b("MatMul", x, b.const(w)) for w in weights)
        if packed:
            split = [b("Reshape", y, b.ints(-1, N, H, 1, D)) for y in (q, k, v)]
            if form == "packed":
                inputs = [b("Concat", *split, axis=3)]
            else:
                inputs = [q, b("Concat", *split[1:], axis=3)]
        else:
            inputs = [q, k, v]
        b.output(b("MultiHeadAttention", *inputs, domain=MS, num_heads=H))
        return b.model()

    model = from_proto(build(True))
    normalise(model)
    assert [op.kind for op in OnnxGraph(model).ops].count("attention") == 1
    (found,), (wanted,) = run(model, feed()), run(build(False), feed())
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("form", ["separate", "keys as heads", "cross"])
@pytest.mark.parametrize("bias", [False, True])
def test_multi_head_attention(form: str, bias: bool) -> None:
    b, x = start()
    other = b("Slice", x, b.ints(1), b.ints(4), b.ints(1)) if form == "cross" else x
    q, k, v = (b("MatMul", y, b.weight(C, C)) for y in (x, other, other))
    if form == "keys as heads":
        split = [b("Transpose", b("Reshape", y, b.ints(-1, N, H, D)), perm=[0, 2, 1, 3]) for y in (k, v)]
        inputs = [q, *split]
    else:
        inputs = [q, k, v]
    if bias:
        inputs.append(b.weight(3 * C))
    b.output(b("MultiHeadAttention", *inputs, domain=MS, num_heads=H))
    graph, _ = check(b.model(), feed(), feed(3), Attention=1)
    assert not graph.ops_of("unknown")


def test_multi_head_attention_with_masks() -> None:
    b, x = start()
    padding = b.input("mask", ["batch", N], TensorProto.INT32)
    q, k, v = (b("MatMul", x, b.weight(C, C)) for _ in range(3))
    pairs = b.weight(1, H, N, N)
    b.output(b("MultiHeadAttention", q, k, v, "", padding, pairs, domain=MS, num_heads=H))
    mask = np.array([[1] * 6, [1, 1, 1, 0, 0, 0]], np.int32)
    check(b.model(), {**feed(), "mask": mask}, Attention=1)


def test_an_operator_with_a_cache_stays() -> None:
    b, x = start()
    q, k, v = (b("MatMul", x, b.weight(C, C)) for _ in range(3))
    past = b.const(np.zeros((B, H, 2, D)))
    outs = ["y", "key", "value"]
    inputs = [q, k, v, "", "", "", past, past]
    b.nodes.append(helper.make_node("MultiHeadAttention", inputs, outs, domain=MS, num_heads=H, name="a"))
    b.output("y")
    b.output("key")
    graph, report = check(b.model(), feed(), Attention=0)
    assert any("cache" in line for line in report.near_misses)
    assert [op.target for op in graph.ops_of("unknown")] == ["com.microsoft.MultiHeadAttention"]


def test_an_operator_that_nobody_knows_passes_through() -> None:
    b, x = start()
    b.nodes.append(helper.make_node("Mystery", [x], ["m"], domain="somewhere.else", name="m"))
    b.output(b("Relu", b("MatMul", "m", b.weight(C, C))))
    proto = b.model()
    proto.opset_import.append(helper.make_opsetid("somewhere.else", 1))
    model = from_proto(proto)
    normalise(model)
    kept = [(n.domain, n.op_type) for n in to_proto(model).graph.node]
    assert ("somewhere.else", "Mystery") in kept


@pytest.mark.parametrize("opset", [14, 17])
def test_what_the_transformer_optimiser_writes(tmp_path, opset: int) -> None:
    """BERT as onnxruntime.transformers fuses it: EmbedLayerNormalization, Attention, SkipLayerNormalization."""
    import torch
    import transformers
    from onnxruntime.transformers import optimizer

    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=50,
        max_position_embeddings=16,
        attn_implementation="eager",
    )
    module = transformers.BertModel(config, add_pooling_layer=False).eval()

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = module

        def forward(self, ids, mask):
            return self.bert(input_ids=ids, attention_mask=mask).last_hidden_state

    ids = torch.randint(0, 50, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    path = tmp_path / "bert.onnx"
    axes = {"ids": {0: "batch", 1: "tokens"}, "mask": {0: "batch", 1: "tokens"}}
    torch.onnx.export(
        Plain(), (ids, mask), str(path), input_names=["ids", "mask"], output_names=["y"],
        dynamo=False, opset_version=opset, dynamic_axes=axes,
    )  # fmt: skip
    feeds = {"ids": ids.numpy(), "mask": mask.numpy()}
    graph, _ = check(onnx.load(path), feeds, Attention=2, Gelu=2)
    assert len(graph.ops_of("norm")) == 5
    assert not graph.ops_of("unknown")
    fused = optimizer.optimize_model(str(path), model_type="bert", num_heads=4, hidden_size=32, opt_level=0)
    domains = {node.domain for node in fused.model.graph.node}
    assert MS in domains
    graph, _ = check(fused.model, feeds)
    assert len(graph.ops_of("attention")) == 2
    assert len(graph.ops_of("norm")) == 5
    assert {op.raw.domain for op in graph.ops} == {""}


@pytest.mark.parametrize("level", ["ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED"])
def test_what_a_session_writes(tmp_path, level: str) -> None:
    """A file that onnxruntime saved after its own graph optimisations."""
    import onnxruntime

    b = Builder(14)
    x = b.input("x", ["batch", N, C])
    centred = b("Sub", x, b.reduce("ReduceMean", x, [-1]))
    variance = b("Add", b.reduce("ReduceMean", b("Pow", centred, b.const(2.0)), [-1]), b.const(1e-5))
    y = b("Add", b("Mul", b("Div", centred, b("Sqrt", variance)), b.weight(C)), b.weight(C))
    parts = [b("Reshape", b("MatMul", y, b.weight(C, C)), b.ints(-1, N, H, D)) for _ in range(3)]
    q, k, v = (
        b("Transpose", p, perm=perm) for p, perm in zip(parts, ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]))
    )
    out = b("MatMul", b("Softmax", b("Div", b("MatMul", q, k), b.const(D**0.5)), axis=-1), v)
    b.output(b("Add", x, b("Reshape", b("Transpose", out, perm=[0, 2, 1, 3]), b.ints(-1, N, C))))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    onnxruntime.InferenceSession(b.model().SerializeToString(), options, providers=["CPUExecutionProvider"])
    saved = onnx.load(tmp_path / "optimised.onnx")
    graph, _ = check(saved, feed(), feed(1), Attention=1)
    assert len(graph.ops_of("norm")) == 1
