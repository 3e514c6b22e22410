"""The pass skip-layers: the graph without some layers is the model whose list of layers was shortened."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from elision.passes import parse, testing
from elision.passes.errors import NothingMatched, PipelineError, Refused
from elision.passes.ir.fx import FxGraph
from elision.passes.skip_layers import SkipLayers, numbers, spread
from elision.runtime.lm_export import plain_causal_graph

from ..zoo.causal import CAUSAL, ENCODER_DECODERS, VOCABULARY, causal_model, source_of
from .layer_models import IDS, close, deep_llama, inputs_of, odd, shortened, whole
from .step_runs import Steps, check_steps, logits_of

FAST = {"llama", "gemma2", "gpt-neox", "opt", "falcon-grouped", "granite", "bart"}
"""Every kind of residual stream: sums in parallel, norms in the branch and in the stream, scaled branches."""

NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CAUSAL]


@pytest.mark.parametrize("name", NAMES)
def test_the_graph_is_that_of_the_shortened_model(name):
    model, graph = causal_model(name), whole(name)
    for gone in [1] if name in ENCODER_DECODERS else [0, 1]:  # T5's first layer has the biases of all
        report = testing.report(graph, [SkipLayers(layers=gone)], inputs_of(name))
        made = report.graph
        found = testing.run(made, inputs_of(name))[0]
        close(found[0], logits_of(shortened(model, [gone]), source_of(model))(IDS[0].tolist()))
        assert len(made.ops_of("attention", "softmax")) < len(graph.ops_of("attention", "softmax"))
        assert report.passes[0].statistics == {"layers": 2, "layers left out": 1}


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_onnx(name):
    graph = whole(name, "onnxruntime")
    made = testing.apply(graph, "skip-layers{layers=1}", inputs_of(name))
    model = causal_model(name)
    found = testing.run(made, inputs_of(name))[0]
    close(found[0], logits_of(shortened(model, [1]), source_of(model))(IDS[0].tolist()))
    after = testing.apply(graph, "incremental{capacity=48},skip-layers{layers=0}")
    assert after.input_names[5:7] == ["key_cache.1", "value_cache.1"] and len(after.ops_of("attention")) <= 1
    assert after.output_names == ["logits", "key_cache.1.out", "value_cache.1.out"]


@pytest.fixture(scope="module")
def deep():
    return FxGraph.from_export(plain_causal_graph(deep_llama()))


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        ("layers=3", [3]),
        ('layers="1-3"', [1, 2, 3]),
        ("layers=[0,5]", [0, 5]),
        ('layers=["0-1",3,"5"]', [0, 1, 3, 5]),
        ("share=0.5", [1, 3, 4]),
        ("share=0.3", [2, 4]),
        ("share=0.9", [1, 2, 3, 4]),
    ],
)
def test_which_layers(deep, options, gone):
    if options.startswith("share"):
        room = {"share=0.5": spread(3, 6), "share=0.3": spread(2, 6), "share=0.9": spread(4, 6)}
        gone = room[options]
        assert 0 not in gone and 5 not in gone and len(set(gone)) == len(gone)
    made = testing.apply(deep, f"skip-layers{{{options}}}")
    assert len(made.ops_of("attention")) == 6 - len(gone)
    close(testing.run(made, [IDS])[0][0], logits_of(shortened(deep_llama(), gone))(IDS[0].tolist()))


def test_nothing_left_out_is_the_identity(deep):
    report = testing.report(deep, "skip-layers{share=0}")
    assert not report.changed and report.graph.text() == deep.text()


def test_before_and_after_the_caches(deep):
    """Either way the step graph writes what the shortened model would."""
    plain = logits_of(shortened(deep_llama(), [1, 4]))
    before = testing.apply(deep, 'skip-layers{layers="1,4"},incremental{capacity=48}')
    report = testing.report(deep, 'incremental{capacity=48},skip-layers{layers="1,4"}')
    after = report.graph
    assert before.input_names[5:] == [f"{what}_cache.{i}" for i in range(4) for what in ("key", "value")]
    kept = [f"{what}_cache.{i}" for i in (0, 2, 3, 5) for what in ("key", "value")]
    assert after.input_names[5:] == kept
    assert after.output_names[1:] == [f"{name}.out" for name in kept]
    assert len(after.ops) == len(before.ops)
    assert any("went with them: key_cache" in note for note in report.passes[1].notes)
    for graph in (before, after):
        check_steps(Steps(graph), plain, np.random.default_rng(0), VOCABULARY)


def test_the_manager_compares_plain_graphs(deep):
    report = testing.report(deep, "skip-layers{layers=2}", [IDS])
    drift = report.passes[0].drift
    assert drift is not None and len(drift) == 1 and drift[0].max_abs > 0.01
    assert report.cost_after.flops < report.cost_before.flops
    stepped = testing.report(deep, "incremental{capacity=48},skip-layers{layers=2}", [IDS])
    assert [d.max_abs for d in stepped.passes[1].drift[:1]] == [pytest.approx(drift[0].max_abs, rel=1e-3)]


def test_an_attention_spelled_out():
    config = type(causal_model("llama").config)(
        **{**causal_model("llama").config.to_dict(), "attn_implementation": "eager"}
    )
    model = type(causal_model("llama"))(config).eval().requires_grad_(False)
    graph = FxGraph.from_export(plain_causal_graph(model), raise_attention=False)
    assert graph.ops_of("softmax") and not graph.ops_of("attention")
    made = testing.apply(graph, "skip-layers{layers=0}")
    close(testing.run(made, [IDS])[0][0], logits_of(shortened(model, [0]))(IDS[0].tolist()))


# ---- refusals ------------------------------------------------------------------------------------------
def test_a_plain_toy_is_taken():
    assert len(testing.apply(odd(), "skip-layers{layers=1}").ops_of("attention")) == 1


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "gate",
            r"aten.mul \(%mul\) makes %mul, which is not %add with the result of aten.scaled_dot_product",
        ),
        ("bypass", r"have no value between them that all of the tokens' data passes through"),
        ("wide", r"which is not %add with the result of"),
        ("inside", r"the output %linear_3 is made inside a layer that is left out, and is no cache of it"),
    ],
)
def test_refuses_what_is_no_residual_layer(how, message):
    graph = odd(how)
    text = graph.text()
    with pytest.raises(Refused, match=message):
        testing.apply(graph, "skip-layers{layers=1}")
    with pytest.raises(Refused, match=message):
        SkipLayers(layers=1).run(graph, None)  # type: ignore[arg-type]
    assert graph.text() == text


def test_refuses_layers_that_are_not_there():
    graph = whole("llama")
    for text, error, message in [
        ("layers=2", Refused, "the graph has 2 layers, 0 to 1: there is no layer 2"),
        ("layers=[0,1]", Refused, r"layers \[0, 1\] are all that the graph has"),
        ("share=0.5", NothingMatched, "keeps the first and the last layer, and the graph has 2"),
        ("layers=0 output=1", Refused, "the graph has 1 outputs, and no output 1"),
        ("layers=0 ids=tokens", NothingMatched, "no input 'tokens' with token ids among input_ids"),
    ]:
        with pytest.raises(error, match=message):
            testing.apply(graph, f"skip-layers{{{text}}}")


def test_nothing_matches_without_an_attention():
    module = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9))
    graph = testing.capture(module, (torch.ones(1, 3).long(),))
    with pytest.raises(NothingMatched, match="no attention among the tokens of %input"):
        testing.apply(graph, [SkipLayers(ids=graph.input_names[0])])
    plain = testing.capture(torch.nn.Linear(4, 9), (torch.ones(1, 3, 4),))
    with pytest.raises(NothingMatched, match="does not come from an embedding of"):
        testing.apply(plain, [SkipLayers(ids=plain.input_names[0])])


def test_options():
    assert numbers("") == [] and numbers("3") == [3] and numbers([5, "1-2, 2"]) == [1, 2, 5]
    for text in ('layers="3-1"', "layers=many", 'layers="1,,2"', "share=1.0", "output=-1", 'layers="-1"'):
        with pytest.raises(PipelineError):
            parse(f"skip-layers{{{text}}}")
    assert str(parse('skip-layers{layers="10-19"}')[0]) == 'skip-layers{layers="10-19"}'
    assert parse("skip-layers")[0] == SkipLayers(share=0.5)
    for layers in range(3, 40):
        for count in range(1, layers - 1):
            found = spread(count, layers)
            assert len(set(found)) == count and min(found) > 0 and max(found) < layers - 1
