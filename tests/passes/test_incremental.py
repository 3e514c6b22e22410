"""The pass incremental on models of many architectures: new rows equal the recomputed text."""

from functools import cache

import numpy as np
import pytest
import torch
from elision.passes import PassContext, VerificationError, run_pipeline
from elision.passes.incremental import Incremental
from elision.passes.ir.fx import FxGraph
from elision.runtime.lm_export import plain_causal_graph
from elision.runtime.runners import FxRunner

from ..zoo.causal import CAUSAL, VOCABULARY, causal_model, source_of
from .step_runs import Steps, check_steps, close, logits_of

CAPACITY = 48
DYNAMIC = torch.export.Dim.AUTO


@cache
def _exported(name):
    return FxGraph.from_export(plain_causal_graph(causal_model(name)))


def plain_graph(name):
    return _exported(name).copy()


def stepped(graph, source=None, more=None, **options):
    """The step graph and its state; `graph` becomes the former. more: inputs of the prelude besides the source."""
    outcome = Incremental(capacity=CAPACITY, **options).run(graph, PassContext())
    graph.verify()
    prelude = outcome.extra.get("prelude")
    crosses = []
    if prelude is not None:
        prelude.verify()
        feeds = {v: (more or {}).get(v.name, source.numpy()) for v in prelude.inputs}
        crosses = prelude.evaluate(prelude.outputs, feeds)
    return Steps(graph, crosses), outcome


def traced(model, shapes, **inputs):
    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, **given):
            return self.model(**given, use_cache=False).logits

    program = torch.export.export(Logits(), (), inputs, dynamic_shapes={"given": shapes}, strict=False)
    return FxGraph.from_export(program)


@pytest.mark.parametrize("name", CAUSAL)
def test_new_rows_equal_the_recomputed_text(name):
    model = causal_model(name)
    source = source_of(model)
    graph = plain_graph(name)
    steps, outcome = stepped(graph, source)
    assert outcome.statistics["cached attentions"] == 2
    assert graph.input_names[:5] == ["input_ids", "position_ids", "slots", "prefix", "ancestors"]
    assert graph.input_names[5:9] == ["key_cache.0", "value_cache.0", "key_cache.1", "value_cache.1"]
    assert graph.output_names[1:] == [f"{n}.out" for n in graph.input_names[5:9]]
    check_steps(steps, logits_of(model, source), np.random.default_rng(0), VOCABULARY)


@pytest.mark.parametrize(
    ("name", "heads"), [("llama", 2), ("falcon-rotary", 1), ("falcon-grouped", 2), ("gemma2", 2), ("gpt2", 4)]
)
def test_caches_hold_each_head_once(name, heads):
    steps, _ = stepped(plain_graph(name))
    assert {cache.shape[0] for cache in steps.caches} == {heads}


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_law_rows_of_one_call_are_rows_of_several(name):
    graph = plain_graph(name)
    stepped(graph)
    rng = np.random.default_rng(1)
    ids = rng.integers(3, VOCABULARY, 13).tolist()
    whole = Steps(graph)
    logits = whole.text(ids)
    for chunks in ([1] * 12, [5, 5], [12]):
        parts = Steps(graph)
        close(parts.text(ids, chunks), logits)
        for one, other in zip(parts.caches, whole.caches):
            np.testing.assert_allclose(one, other, atol=1e-5)
            assert np.abs(other).max() > 0.1


def test_attentions_say_what_the_masks_said():
    def attributes(name):
        graph = plain_graph(name)
        Incremental(capacity=CAPACITY).run(graph, PassContext())
        ops = [op for op in graph.ops if op.target.endswith("cached_attention")]
        return [op.attrs for op in ops], ops

    windows = [attrs["window"] for attrs in attributes("gemma3")[0]]
    assert windows == [8, 0]
    capped = attributes("gemma2")[0]
    assert [attrs["softcap"] for attrs in capped] == [2.0, 2.0]
    assert capped[0]["scale"] == pytest.approx(256**-0.5)
    for name, by_key in (("bloom", True), ("mpt", False), ("falcon-alibi", True), ("t5", False)):
        found, ops = attributes(name)
        assert {attrs["key_bias"] for attrs in found} == {by_key}
        assert ops[0].inputs[8].shape == (4, CAPACITY)
    assert attributes("llama")[1][0].inputs[8] is None


def test_masks_positions_and_batches_of_the_plain_graph_go():
    model = causal_model("qwen2")
    ids = torch.randint(3, VOCABULARY, (2, 7))
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(7).repeat(2, 1),
    }
    graph = traced(model, {name: {0: DYNAMIC, 1: DYNAMIC} for name in inputs}, **inputs)
    steps, _ = stepped(graph)
    assert len(graph.inputs) == 9
    check_steps(steps, logits_of(model), np.random.default_rng(2), VOCABULARY)


def test_a_graph_that_keeps_its_last_rows_gives_all():
    model = causal_model("gemma2")  # a soft cap follows the picked rows
    graph = traced(
        model,
        {"input_ids": {1: DYNAMIC}, "logits_to_keep": None},
        input_ids=torch.ones(1, 7).long(),
        logits_to_keep=1,
    )
    before = graph.copy()
    assert before.outputs[0].shape[1] == 1
    steps, _ = stepped(graph)
    check_steps(steps, logits_of(model), np.random.default_rng(3), VOCABULARY)
    ids = torch.randint(3, VOCABULARY, (1, 9))
    report = run_pipeline(
        before,
        f"incremental{{capacity={CAPACITY}}}",
        context=PassContext(example_inputs=[ids]),
        runner=lambda graph: [],
    )
    assert report.drift[0].max_abs < 1e-5


def test_spelled_out_attention_is_cached_too():
    config = type(causal_model("llama").config)(
        **{**causal_model("llama").config.to_dict(), "attn_implementation": "eager"}
    )
    model = type(causal_model("llama"))(config).eval().requires_grad_(False)
    assert model.config._attn_implementation == "eager"
    steps, _ = stepped(FxGraph.from_export(plain_causal_graph(model)))
    check_steps(steps, logits_of(model), np.random.default_rng(4), VOCABULARY)


def test_the_manager_compares_a_chain_with_the_plain_graph():
    for name in ("llama", "t5"):
        model = causal_model(name)
        graph = plain_graph(name)
        source, ids = source_of(model), torch.randint(3, VOCABULARY, (1, 11))
        examples = [ids] if source is None else [source, ids]
        runner = FxRunner([], dict(zip([v.name for v in graph.inputs], examples)))
        report = run_pipeline(
            graph,
            f"incremental{{capacity={CAPACITY}}}",
            context=PassContext(example_inputs=examples),
            runner=runner,
        )
        assert report.passes[0].drift is not None
        assert report.passes[0].drift[0].max_abs < 1e-5
        assert report.drift is not None
        assert report.drift[0].output == graph.outputs[0].name
        assert report.cost_after.by_op["cached_attention"].count == 2
        assert report.cost_after.tokens_per_block[-2:] == [11, 11]
        assert len(graph.inputs) == len(examples), "the input graph is left as it was"


class Forgetful(Incremental):
    """Wrong on purpose: its rows do not see the first key."""

    name = "forgetful"

    def run(self, graph, context):
        outcome = super().run(graph, context)
        prefix = outcome.signature.after[3]
        prefix[:, 0], prefix[:, 1] = 1, np.maximum(prefix[:, 1] - 1, 0)
        return outcome


def test_the_manager_finds_a_graph_of_rows_that_is_wrong():
    graph = plain_graph("llama")
    context = PassContext(example_inputs=[torch.randint(3, VOCABULARY, (1, 9))])
    with pytest.raises(VerificationError, match="forgetful must preserve the function, but output"):
        run_pipeline(graph, [Forgetful(capacity=CAPACITY)], context=context, runner=lambda graph: [])


def test_without_examples_nothing_is_compared_and_that_is_told():
    graph = plain_graph("llama")
    report = run_pipeline(graph, f"incremental{{capacity={CAPACITY}}}", runner=lambda graph: [])
    assert report.drift is None
    assert "the graph takes other inputs now, so its outputs were not compared" in report.passes[0].notes
