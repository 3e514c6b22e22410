"""The pass taps: hidden states as transformers gives them. And ids beyond the vocabulary, the pass extra-embeddings."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from elision.passes import parse, testing
from elision.passes.errors import NothingMatched, PipelineError, Refused
from elision.passes.extra_embeddings import set_extra_rows
from elision.passes.ir.fx import FxGraph
from elision.passes.taps import Taps, places
from elision.runtime.lm_export import plain_causal_graph

from ..zoo.causal import CAUSAL, VOCABULARY, causal_model, source_of
from .layer_models import IDS, close, inputs_of, odd, shortened, whole
from .step_runs import Steps, logits_of

FAST = {"llama", "gemma2", "gpt-neox", "bart"}
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CAUSAL]


def hidden_states(name, ids=IDS):
    """What transformers calls so: of the last layer after the final norm."""
    model, source = causal_model(name), source_of(causal_model(name))
    with torch.no_grad():
        if source is None:
            return model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        out = model(source, decoder_input_ids=ids, use_cache=False, output_hidden_states=True)
    return out.decoder_hidden_states


def check(name, host):
    graph = whole(name, host)
    made = testing.apply(graph, "taps{where=[last,0,1]}", inputs_of(name))
    logits, last, first, second = testing.run(made, inputs_of(name))
    theirs = hidden_states(name)
    scale = 32**-0.5 if name == "t5" else 1.0  # which T5 applies before its head
    close(last, theirs[-1].numpy() * scale)
    close(first, theirs[1].numpy())
    assert second.shape == first.shape and second.dtype == last.dtype == np.float32
    close(logits, testing.run(graph, inputs_of(name))[0])


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states(name):
    check(name, "torch")


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_onnx(name):
    check(name, "onnxruntime")
    made = testing.apply(whole(name, "onnxruntime"), "taps{where=[0,last]}")
    assert made.output_names == ["logits", "hidden.0", "hidden"]


@pytest.mark.parametrize("host", ["torch", "onnxruntime"])
def test_all_rows_stay_though_few_are_scored(host):
    passes = (
        "incremental{capacity=48},taps,keep-rows,fix-rows,head{k=4 beside=true},keep-rows{name=ask},lower"
    )
    made = testing.apply(whole("llama", host), passes)
    names = made.output_names
    assert names[-3:] == ["hidden", "values", "indices"]
    count = IDS.shape[1]
    at = np.arange(count, dtype=np.int32)
    rows = {
        "input_ids": IDS.numpy(),
        "position_ids": at[None].astype(np.int64),
        "slots": at,
        "prefix": np.stack([np.zeros_like(at), at], 1),
        "ancestors": at[:, None],
        "keep": np.array([count - 1]),
        "ask": np.array([], np.int64),
    }
    feeds = {
        value: rows.get(
            name, np.zeros([int(d) for d in value.shape or ()], np.float32) if "cache" in name else None
        )
        for name, value in zip(made.input_names, made.inputs)
    }
    found = made.evaluate([made.outputs[names.index(n)] for n in ("hidden", "indices")], feeds)
    close(found[0], hidden_states("llama")[-1].numpy())
    logits = logits_of(causal_model("llama"))(IDS[0].tolist())
    assert found[1].shape == (1, 1, 4) and found[1][0, 0, 0] == logits[-1].argmax()


def test_before_the_caches_and_with_layers_left_out():
    """A tap stays through both passes; one behind a layer that is left out gives what that layer would have read."""
    made = testing.apply(whole("llama"), "taps{where=0},incremental{capacity=48}")
    assert made.output_names[1:3] == ["hidden.0", "key_cache.0.out"]
    steps = Steps(made)
    steps.text(IDS[0].tolist())
    few = testing.apply(whole("llama"), 'taps{where="0,last"},skip-layers{layers=1}')
    found = testing.run(few, [IDS])
    close(found[1], hidden_states("llama")[1].numpy())
    with torch.no_grad():
        out = shortened(causal_model("llama"), [1])(IDS, use_cache=False, output_hidden_states=True)
    close(found[2], out.hidden_states[-1].numpy())


def test_bfloat16_comes_as_float32():
    model = copy.deepcopy(causal_model("llama")).to(torch.bfloat16)
    made = testing.apply(FxGraph.from_export(plain_causal_graph(model)), "taps{where=[last,0]}")
    assert [value.dtype for value in made.outputs] == ["bfloat16", "float32", "float32"]
    assert [value.rank for value in made.outputs] == [3, 3, 3]


def test_refusals():
    graph = whole("llama")
    stepped = "incremental{capacity=48}"
    for text, error, message in [
        ("taps{where=2}", Refused, "the graph has 2 layers, 0 to 1: there is no layer 2"),
        (
            "taps,taps",
            Refused,
            "taps after taps: the graph has an output called 'hidden' already; a graph takes it once",
        ),
        (
            f"{stepped},keep-rows,taps",
            Refused,
            "^taps after keep-rows: .* has no row for every token of .*; put taps before keep-rows$",
        ),
        ("taps{output=3}", Refused, "the graph has 1 outputs, and no output 3"),
        ("taps{ids=x}", NothingMatched, "no input 'x' with token ids"),
    ]:
        with pytest.raises(error, match=message):
            testing.apply(graph, text)
    with pytest.raises(Refused, match="which is not %add with the result of"):
        testing.apply(odd("gate"), "taps{where=0}")
    text = odd("bypass")
    assert testing.apply(text, "taps").output_names[-1] == "hidden"  # needs no layers


def test_options():
    assert places("last") == ["last"] and places([1, "last", "1-2"]) == [1, "last", 2]
    for text in ('where=""', "where=[]", "where=first", "where=-1", "output=-1"):
        with pytest.raises(PipelineError):
            parse(f"taps{{{text}}}")
    assert parse("taps")[0] == Taps(where="last")


# ---- extra embeddings ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "host"), [("llama", "torch"), ("gemma2", "torch"), ("bart", "torch"), ("bart", "onnxruntime")]
)
def test_ids_beyond_the_vocabulary(name, host):
    """Tied heads (Gemma 2, BART) score the old ids; a new id is any other with its embedding."""
    graph, inputs = whole(name, host), inputs_of(name)
    made = testing.apply(graph, "extra-embeddings{count=2}", inputs)
    np.testing.assert_array_equal(testing.run(made, inputs)[0], testing.run(graph, inputs)[0])
    before = len(made.text())
    table = causal_model(name).get_input_embeddings().weight.detach().numpy()
    set_extra_rows(made, table[[7, 11]])
    made.verify()
    assert len(made.text()) == before
    known, new = (torch.tensor([[5, 7, 11, 8]]), torch.tensor([[5, VOCABULARY, VOCABULARY + 1, 8]]))
    found = testing.run(made, [*inputs[:-1], new])[0]
    assert found.shape[-1] == VOCABULARY
    np.testing.assert_array_equal(found, testing.run(graph, [*inputs[:-1], known])[0])


def test_new_ids_have_the_mean_embedding_and_go_through_the_caches():
    made = testing.apply(whole("llama"), "extra-embeddings{count=1},incremental{capacity=48},keep-rows")
    plain = testing.apply(whole("llama"), "extra-embeddings{count=1},incremental{capacity=48}")
    assert made.outputs[0].shape[-1] == VOCABULARY
    rows = Steps(plain).text([4, VOCABULARY, 6])
    assert rows.shape == (3, VOCABULARY) and np.isfinite(rows).all()
    model = causal_model("llama")
    embeddings = model.get_input_embeddings().weight
    given = torch.stack([embeddings[4], embeddings.mean(0), embeddings[6]])[None]
    with torch.no_grad():
        close(rows, model(inputs_embeds=given, use_cache=False).logits[0].numpy())


def test_extra_embeddings_refusals():
    graph = whole("llama")
    with pytest.raises(PipelineError, match="count must be at least 1, not 0"):
        parse("extra-embeddings{count=0}")
    with pytest.raises(Refused, match=r"weights of few bits by then; put extra-embeddings before quantize$"):
        testing.apply(graph, "quantize{bits=8 method=rtn},extra-embeddings")
    with pytest.raises(NothingMatched, match="no input 'x' with token ids"):
        testing.apply(graph, "extra-embeddings{ids=x}")
    made = testing.apply(graph, "extra-embeddings{count=2}")
    with pytest.raises(Refused, match=r"rows \[2, 31\] do not fit the table"):
        set_extra_rows(made, np.zeros((2, 31), np.float32))
