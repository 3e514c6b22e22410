"""com.microsoft's GroupQueryAttention taken apart, and the files that onnxruntime-genai's builder makes of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import transformers as hf
from elision.passes.ir.onnx import OnnxGraph
from elision.passes.onnx.cache import drop_cache
from elision.passes.onnx.io import from_proto, load_model, to_proto
from elision.passes.onnx.normalise import normalise
from onnx import TensorProto

from ..passes.step_runs import check_steps, close, path_to, random_tree
from ..zoo.causal import VOCABULARY, causal_model
from .causal_files import opened, session, stepped
from .onnx_tools import Builder, check, run

H, SHARED, D, N = 4, 2, 32, 9

FORMS = {
    "packed": {},
    "apart": {"apart": True},
    "rotary": {"do_rotary": 1},
    "rotary pairs": {"do_rotary": 1, "rotary_interleaved": 1},
    "partial rotary": {"do_rotary": 1, "part": 16},
    "rotary at positions": {"do_rotary": 1, "positions": True},
    "window": {"local_window_size": 3},
    "cap": {"softcap": 2.0, "scale": 0.5},
    "bias": {"bias": True},
    "bias in a window": {"bias": True, "local_window_size": 4},
}


@pytest.mark.parametrize("form", FORMS)
def test_taken_apart(form: str) -> None:
    given = dict(FORMS[form])
    apart, part = given.pop("apart", False), given.pop("part", D)
    positions, bias = (given.pop(name, False) for name in ("positions", "bias"))
    b = Builder(21)
    x = b.input("x", [1, "n", (H + 2 * SHARED) * D])
    inputs = [x, "", ""]
    if apart:
        inputs = b.split(x, [H * D, SHARED * D, SHARED * D], 2)
    length = b("Cast", b("Shape", x, start=1, end=2), to=TensorProto.INT32)
    inputs += ["", "", b("Sub", length, b.const([1], np.int32)), b.squeeze(length, [0])]
    angles = np.arange(16)[:, None] * 0.4 ** np.arange(part // 2)
    rotary = given.get("do_rotary", 0)
    inputs += [b.const(np.cos(angles)), b.const(np.sin(angles))] if rotary else ["", ""]
    feed = {"x": np.random.default_rng(0).normal(size=(1, N, (H + 2 * SHARED) * D)).astype(np.float32)}
    if positions:
        feed["at"] = np.arange(N, dtype=np.int64)[None]
    inputs.append(b.input("at", [1, "n"], TensorProto.INT64) if positions else "")
    inputs.append(b.const(np.random.default_rng(1).normal(size=(1, H, N, N))) if bias else "")
    while not inputs[-1]:
        inputs.pop()
    out = b("GroupQueryAttention", *inputs, domain="com.microsoft", num_heads=H, kv_num_heads=SHARED, **given)
    b.output(out)
    graph, _ = check(b.model(), feed, **{"GroupQueryAttention taken apart": 1, "Attention": 1})
    (op,) = graph.ops_of("attention")
    assert op.attrs["causal"]
    assert op.inputs[1].shape[1] == SHARED
    assert not graph.ops_of("unknown")


def test_norms_of_the_heads() -> None:
    """onnxruntime has them on GPUs only: the same as norms in front of the operator."""

    def model(inside: bool) -> onnx.ModelProto:
        b = Builder(23)
        x = b.input("x", [1, "n", (H + 2 * SHARED) * D])
        q, k, v = b.split(x, [H * D, SHARED * D, SHARED * D], 2)
        weights = [b.const(np.linspace(0.5, 2, D)), b.const(np.linspace(2, 1, D))]
        if not inside:
            split = [b("Reshape", y, b.ints(0, 0, -1, D)) for y in (q, k)]
            normed = [b("RMSNormalization", y, w, epsilon=1e-3) for y, w in zip(split, weights)]
            q, k = (b("Reshape", y, b.ints(0, 0, -1)) for y in normed)
        length = b("Cast", b("Shape", x, start=1, end=2), to=TensorProto.INT32)
        inputs = [q, k, v, "", "", b("Sub", length, b.const([1], np.int32)), b.squeeze(length, [0])]
        inputs += ["", "", "", "", "", "", "", *weights] if inside else []
        attrs = {"num_heads": H, "kv_num_heads": SHARED} | ({"qk_norm_epsilon": 1e-3} if inside else {})
        b.output(b("GroupQueryAttention", *inputs, domain="com.microsoft", **attrs))
        return b.model()

    feed = {"x": np.random.default_rng(0).normal(size=(1, N, (H + 2 * SHARED) * D)).astype(np.float32)}
    graph = from_proto(model(inside=True))
    normalise(graph)
    (wanted,), (found,) = run(model(inside=False), feed), run(graph, feed)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_sink_stays_with_its_reason() -> None:
    b = Builder(21)
    x = b.input("x", [1, "n", (H + 2 * SHARED) * D])
    length = b("Cast", b("Shape", x, start=1, end=2), to=TensorProto.INT32)
    counts = [b("Sub", length, b.const([1], np.int32)), b.squeeze(length, [0])]
    inputs = [x, "", "", "", "", *counts, "", "", "", "", b.const(np.ones(H))]
    b.output(b("GroupQueryAttention", *inputs, domain="com.microsoft", num_heads=H, kv_num_heads=SHARED))
    feed = {"x": np.random.default_rng(0).normal(size=(1, N, (H + 2 * SHARED) * D)).astype(np.float32)}
    graph, report = check(b.model(), feed)
    assert [op.target for op in graph.ops_of("unknown")] == ["com.microsoft.GroupQueryAttention"]
    assert any("a sink" in line for line in report.near_misses)


# ---- files of the builder ----------------------------------------------------------------------------
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# The operator wants heads of 16 channels, or 32, ...
WIDE = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**SIZES, original_max_position_embeddings=64)),
}


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The model.onnx that the builder makes of a model of the zoo, by name and precision."""
    pytest.importorskip("onnxruntime_genai")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("builder")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", eos_token="w2", pad_token="w0"
    )

    def make(name: str, precision: str) -> Path:
        source, target = folder / name, folder / f"{name}-{precision}"
        if not source.exists():
            (WIDE[name]() if name in WIDE else causal_model(name)).save_pretrained(source)
            fast.save_pretrained(source)
        if not target.exists():
            command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", target]
            command += ["-p", precision, "-e", "cpu", "-c", folder / "cache"]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        return target / "model.onnx"

    return make


def plain_of(file: Path):
    """ids -> logits [n, V] of the file itself, with an empty past."""
    proto, running = onnx.load(file, load_external_data=False), session(file)
    empty = {}
    for item in proto.graph.input:
        if item.name.startswith("past"):
            dims = item.type.tensor_type.shape.dim
            # A window's cache has its own size; what lies in it is not looked at.
            old = 64 if "sliding" in dims[2].dim_param else 0
            empty[item.name] = [1, dims[1].dim_value, old]
    width = load_model(file)
    drop_cache(width)
    normalise(width)
    head = OnnxGraph(width).ops_of("attention")[0].inputs[1].shape[3]

    def run(ids):
        feeds = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)}
        feeds |= {name: np.zeros((*shape, head), np.float32) for name, shape in empty.items()}
        return running.run(["logits"], feeds)[0][0]

    return run


BUILT = [("qwen3", "fp32"), ("gemma2", "fp32"), ("qwen3", "int4")]
BUILT += [
    pytest.param(name, precision, marks=pytest.mark.slow)
    for name, precision in (("llama", "fp32"), ("llama", "int4"), ("phi3", "fp32"), ("gemma2", "int4"))
]


@pytest.mark.parametrize("name, precision", BUILT)
def test_files_of_the_builder(name: str, precision: str, built) -> None:
    """New rows equal what the file itself says of the whole text."""
    file = built(name, precision)
    graph = opened(file)
    steps, outcome = stepped(graph)
    assert outcome.statistics["cached attentions"] == 2
    assert any("4 inputs with keys and values" in note for note in outcome.notes)
    kinds = {op.target for op in graph.ops_of("elision")}
    assert ("elision.linear_nbits" in kinds) == (precision == "int4")
    plain, rng = plain_of(file), np.random.default_rng(0)
    if precision == "fp32":
        check_steps(steps, plain, rng, VOCABULARY)
        return
    # Products round their inputs to 8 bits: a last bit in an attention becomes a whole step there.
    text, parents = rng.integers(3, VOCABULARY, 11).tolist(), random_tree(rng, 9)
    wanted = plain(text)
    near = 0.02 * float(np.abs(wanted).max())
    np.testing.assert_allclose(steps.text(text, chunks=(1, 4)), wanted, rtol=0, atol=near)
    ids = rng.integers(3, VOCABULARY, 9).tolist()
    for node, found in enumerate(steps.tree(ids, parents)):
        path = [ids[n] for n in path_to(parents, node)]
        np.testing.assert_allclose(found, plain([*text, *path])[-1], rtol=0, atol=near)


def test_the_plain_form_of_a_built_file(built) -> None:
    """Without its cache the file says the same of a text."""
    file = built("qwen3", "fp32")
    model = load_model(file)
    assert drop_cache(model) == 4
    assert drop_cache(model) == 0
    normalise(model)
    assert [v.name for v in model.graph.outputs] == ["logits"]
    ids = np.arange(3, 20)
    feeds = {"input_ids": ids[None], "attention_mask": np.ones((1, 17), np.int64)}
    running = session(to_proto(model))
    (found,) = running.run(None, {i.name: feeds[i.name] for i in running.get_inputs()})
    close(found[0], plain_of(file)(ids))
