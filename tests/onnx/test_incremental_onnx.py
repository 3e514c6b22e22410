"""The pass incremental on ONNX files of other people's exporters: new rows equal the recomputed text.

Everything runs in plain onnxruntime: the function bodies of our ops are in the files.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from elision.passes.errors import NothingMatched, Refused
from elision.passes.ir.onnx import OnnxGraph
from elision.passes.onnx.io import from_proto, load_model, save_model
from elision.passes.onnx.normalise import normalise
from onnx import TensorProto

from ..passes.step_runs import check_steps, logits_of
from ..zoo.causal import CAUSAL, VOCABULARY, causal_model, source_of
from .causal_files import OrtSteps, decoder_past_file, opened, past_file, plain_file, stepped
from .onnx_tools import Builder

FAST = {"llama", "gemma2", "gpt2", "mpt", "falcon-alibi", "cohere", "t5"}
"""Exporting takes seconds; these are every kind of position, mask and head."""


def some_slow(names, fast):
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("causal")


@pytest.mark.parametrize("name", some_slow(CAUSAL, FAST))
def test_exported_without_a_cache(name: str, files: Path) -> None:
    model, graph = causal_model(name), opened(plain_file(files, name))
    assert not graph.ops_of("softmax")
    source = source_of(model)
    steps, outcome = stepped(graph, source)
    assert outcome.statistics["cached attentions"] == 2
    assert graph.input_names[:5] == ["input_ids", "position_ids", "slots", "prefix", "ancestors"]
    assert graph.output_names[1:] == [f"{n}.out" for n in graph.input_names[5:9]]
    check_steps(steps, logits_of(model, source), np.random.default_rng(0), VOCABULARY)


DECODERS = [name for name in CAUSAL if name not in ("t5", "bart", "whisper")]


@pytest.mark.parametrize("name", some_slow(DECODERS, {"opt"}))
def test_masks_and_positions_as_inputs(name: str, files: Path) -> None:
    graph = opened(plain_file(files, name, masked=name not in ("mpt", "bloom", "falcon-alibi")))
    steps, _ = stepped(graph)
    assert len(graph.inputs) == 9
    check_steps(steps, logits_of(causal_model(name)), np.random.default_rng(1), VOCABULARY)


# The older exporter has no operator for what the others do without a mask of their own.
OLD = [("opt", 14), ("mpt", 17), ("opt", 17), ("bloom", 17), ("t5", 17)]


@pytest.mark.parametrize("name, opset", OLD)
def test_files_of_the_older_exporter(name: str, opset: int, files: Path) -> None:
    model = causal_model(name)
    source = source_of(model)
    steps, _ = stepped(opened(plain_file(files, name, opset=opset)), source)
    check_steps(steps, logits_of(model, source), np.random.default_rng(2), VOCABULARY)


PAST = [("llama", False), ("bloom", False), ("opt", False), ("gpt2", False), ("gpt2", True), ("opt", True)]
PAST += [
    pytest.param(n, d, marks=pytest.mark.slow) for n in ("qwen3", "phi3", "stablelm") for d in (True, False)
]


@pytest.mark.parametrize("name, dynamo", PAST)
def test_exported_with_a_cache(name: str, dynamo: bool, files: Path) -> None:
    graph = opened(past_file(files, name, dynamo))
    assert len(graph.inputs) >= 6
    steps, outcome = stepped(graph)
    assert outcome.statistics["cached attentions"] == 2
    assert any("4 inputs with keys and values" in note for note in outcome.notes)
    check_steps(steps, logits_of(causal_model(name)), np.random.default_rng(3), VOCABULARY)


@pytest.mark.parametrize("name", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_a_decoder_that_is_given_the_encoders_keys(name: str, files: Path) -> None:
    """Its past goes; the keys and values of the encoder stay what they are, inputs."""
    model, graph = causal_model(name), opened(decoder_past_file(files, name))
    steps, outcome = stepped(graph)
    assert any("4 inputs with keys and values" in note for note in outcome.notes)
    assert graph.input_names[9:] == [f"cross.{i}" for i in range(4)]
    source = source_of(model)
    with torch.no_grad():
        cache = model(source, decoder_input_ids=torch.tensor([[3]])).past_key_values.cross_attention_cache
    steps.crosses = [x.numpy() for layer in cache.layers for x in (layer.keys, layer.values)]
    check_steps(steps, logits_of(model, source), np.random.default_rng(6), VOCABULARY)


def test_saved_with_the_weights_beside_it(files: Path, tmp_path: Path) -> None:
    """The step graph as a file, its weights mapped; the operator set says nothing of our library."""
    graph = opened(plain_file(files, "llama"))
    stepped(graph)
    save_model(graph.model, tmp_path / "step.onnx", external=True)
    assert os.path.getsize(tmp_path / "step.onnx.data") > 10_000
    again = OnnxGraph(load_model(tmp_path / "step.onnx"))
    assert again.input_names == graph.input_names
    steps = OrtSteps(graph, file=tmp_path / "step.onnx")
    check_steps(steps, logits_of(causal_model("llama")), np.random.default_rng(4), VOCABULARY)


def test_a_file_whose_weights_lie_beside_it(files: Path, tmp_path: Path) -> None:
    """Positions are evaluated in a model of its own, which must not look for the file."""
    onnx.save(
        onnx.load(plain_file(files, "gpt2")),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        size_threshold=64,
    )
    graph = opened(tmp_path / "m.onnx")
    steps, _ = stepped(graph)
    check_steps(steps, logits_of(causal_model("gpt2")), np.random.default_rng(5), VOCABULARY)


def test_a_capacity_beyond_the_learned_positions(files: Path) -> None:
    with pytest.raises(
        Refused, match=r"looks up entry 299 of .*, which has 128: a capacity of 300 is too large"
    ):
        stepped(opened(plain_file(files, "gpt2")), capacity=300)


# ---- refusals ----------------------------------------------------------------------------------------
def little(mix: str = "", causal: bool = True, ids: str = "input_ids") -> OnnxGraph:
    """One attention over embedded ids, with `mix` somewhere in the stream."""
    b = Builder(opset=23)
    given = b.input(ids, [1, "n"], TensorProto.INT64)
    x = b("Gather", b.weight(20, 8), given)
    if mix == "Conv":
        turned = b("Transpose", x, perm=[0, 2, 1])
        x = b("Transpose", b("Conv", turned, b.weight(8, 8, 3), pads=[2, 0]), perm=[0, 2, 1])
    elif mix == "CumSum":
        x = b("CumSum", x, b.const(1, np.int64))
    elif mix == "ReduceMean":
        x = b("Add", x, b.reduce("ReduceMean", x, [1]))
    heads = b("Transpose", b("Reshape", x, b.ints(0, 0, 2, 4)), perm=[0, 2, 1, 3])
    out = b("Attention", heads, heads, heads, is_causal=int(causal))
    b.output(b("Reshape", b("Transpose", out, perm=[0, 2, 1, 3]), b.ints(0, 0, 8)))
    model = from_proto(b.model())
    normalise(model)
    return OnnxGraph(model)


def test_a_causal_attention_alone_is_taken() -> None:
    graph = little()
    stepped(graph)
    assert [op.target for op in graph.ops_of("elision")] == ["elision.cached_attention"]


@pytest.mark.parametrize("mix", ["Conv", "CumSum", "ReduceMean"])
def test_what_mixes_tokens_is_refused_by_name(mix: str) -> None:
    graph = little(mix)
    with pytest.raises(Refused, match=mix):
        stepped(graph)


def test_an_attention_that_is_not_causal_is_refused() -> None:
    with pytest.raises(Refused, match=r"Attention \(%.*\) cannot be cached: .* not causal"):
        stepped(little(causal=False))


def test_without_token_ids_nothing_matches() -> None:
    with pytest.raises(NothingMatched, match="no input 'input_ids'"):
        stepped(little(ids="x"))
