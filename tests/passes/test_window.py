"""The pass window: a step over old keys and values and the refresh that made them, of several models in both hosts."""

from __future__ import annotations

import functools
import io
import re
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from elision.kernels import cpu
from elision.passes import PassContext, PipelineError, diff_graphs, run_pipeline
from elision.passes.errors import VerificationError
from elision.passes.ir.fx import FxGraph
from elision.passes.ir.graph import Graph, static
from elision.passes.ir.onnx import OnnxGraph
from elision.passes.onnx.io import from_proto
from elision.passes.pipeline import format, parse
from elision.passes.window import Window, check_window
from elision.runtime.lm_compile import plain_graph
from elision.runtime.runners import FxRunner
from elision.runtime.table import table_for
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ..onnx.causal_files import quiet
from ..runtime.canvas_models import EagerCanvas, make
from .causal_toys import traced
from .window_models import (
    BOTH,
    CAPACITY,
    TARGETS,
    Open,
    Pair,
    V,
    eager,
    kept_pair,
    model_of,
    near,
    plain,
    some,
    windowed,
)


# ---- exactness -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "host"), BOTH)
def test_a_step_after_a_refresh_is_the_refresh_and_that_the_model(name, host):
    pair, rng = kept_pair(name, host), np.random.default_rng(0)
    for count, start in ((1, 0), (2, 5), (11, 0), (30, 18)):
        ids = rng.integers(0, V, count)
        logits = pair.refresh(ids, start)
        near(logits, eager(name, ids))
        fresh = [cache.copy() for cache in pair.caches]
        every = np.arange(count)
        few = rng.choice(count, (count + 1) // 2, replace=False)
        for part in (every, every[::-1], np.sort(few), few, every[-1:]):
            near(pair.step(some(ids, part, start)), logits[part])
            run = int(rng.integers(0, count + 1))
            extras = run + rng.permutation(count - run)
            near(pair.step(some(ids, part, start, run, extras)), logits[part])
        for cache, was in zip(pair.caches, fresh):
            near(cache, was)


@pytest.mark.parametrize("host", TARGETS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_law_any_split_into_computed_and_cached_rows(host, data):
    ids = np.array(data.draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=20)))
    count = len(ids)
    pair, start = kept_pair("dream", host), data.draw(st.integers(0, CAPACITY - count))
    part = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True)))
    run = data.draw(st.integers(0, count))
    extras = data.draw(st.permutations(range(run, count)))
    logits = pair.refresh(ids, start)
    near(pair.step(some(ids, part, start, run, extras)), logits[part])


@pytest.mark.parametrize("kind", ["llada", "dream"])
@pytest.mark.parametrize("host", ["fx", pytest.param("onnx", marks=pytest.mark.slow)])
def test_old_keys_and_values_and_rows_that_see_less(kind, host):
    """Steps after steps on a canvas that changes, against the model's own layers over the same cache."""
    pair, rng = kept_pair(kind, host), np.random.default_rng(1)
    double = EagerCanvas(make(kind), CAPACITY)
    start, count = 3, 24
    ids = rng.integers(0, V, count)
    extent = 20
    near(
        pair.refresh(ids[:extent], start), whole(double.refresh(start, ids[:extent], np.arange(extent), True))
    )
    for _ in range(12):
        ids[rng.integers(0, extent, 3)] = rng.integers(0, V, 3)
        run = int(rng.integers(4, extent))
        extras = rng.choice(np.arange(run, extent), rng.integers(0, extent - run + 1), replace=False)
        part = rng.permutation([*range(run), *extras])[: rng.integers(1, run)]
        rows = some(ids, part, start, run, extras)
        near(pair.step(rows), whole(double.step(rows, np.arange(len(part)), True)))


def whole(scored: Any) -> np.ndarray:
    return scored.logits.astype(np.float32)


@pytest.mark.skipif(not cpu.available(), reason="the C++ kernels are not built")
@pytest.mark.parametrize("host", TARGETS)
def test_what_no_row_sees_may_be_nan(host):
    """In the graphs as they are run: slots that nobody wrote, and tokens that are far."""
    model: Any = make("dream", dtype=torch.float32)
    model.embed_tokens.weight[37] = torch.nan  # an id that is in the far field only
    graph = plain_graph(model, TARGETS[host], lambda _step: None)[0]
    report = windowed(graph)
    context = PassContext(force=True, target=TARGETS[host], table=table_for(host))
    lowered = [
        run_pipeline(part, "lower", context=context).graph
        for part in (report.graph, report.passes[-1].extra["refresh"])
    ]
    pair = Pair(*lowered, empty=np.nan)
    rng = np.random.default_rng(2)
    ids = np.concatenate([rng.integers(0, 37, 18), [37] * 12])
    seen = ids[:18]
    logits = pair.refresh(seen, 4)
    near(logits, eager("dream", seen))
    for part in (np.arange(18), np.array([5]), rng.permutation(18)[:7]):
        near(pair.step(some(seen, part, 4)), logits[part])
        near(pair.step(some(seen, part, 4, 9, rng.permutation(np.arange(9, 18)))), logits[part])
    for cache in pair.caches:
        assert np.isnan(cache[:, :4]).all() and np.isnan(cache[:, 22:]).all()
        assert np.isfinite(cache[:, 4:22]).all()


# ---- what comes out ------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", TARGETS)
def test_inputs_outputs_and_statistics(host):
    graph = plain("dream", host)
    before = graph.text()
    report = windowed(graph, window=16, active=4, refresh=8)
    assert graph.text() == before, "the input graph is left as it was"
    step, single = report.graph, report.passes[-1]
    refresh = single.extra["refresh"]
    refresh.verify()
    logits = graph.output_names[0]
    assert step.input_names == [
        "input_ids", "position_ids", "slots", "prefix", "ancestors",
        "key_cache.0", "value_cache.0", "key_cache.1", "value_cache.1",
    ]  # fmt: skip
    assert step.output_names == [logits, *(f"{name}.out" for name in step.input_names[5:])]
    assert refresh.input_names == ["input_ids"]
    assert refresh.output_names == [logits, "key.0", "value.0", "key.1", "value.1"]
    tokens = refresh.inputs[0].shape[1]
    assert refresh.outputs[0].shape == (1, tokens, V)
    assert {value.shape for value in refresh.outputs[1:]} == {(1, 2, tokens, 8)}
    assert {value.shape for value in step.inputs[5:]} == {(2, CAPACITY, 8)}, "each of the grouped heads once"
    assert single.statistics["cached attentions"] == 2 and single.statistics["cross inputs"] == 0
    assert single.extra["settings"] == {"window": 16, "active": 4, "refresh": 8}
    assert f"2 attentions read a cache of {CAPACITY} slots" in single.notes
    cached = [op for op in step.ops if op.target.endswith("cached_attention")]
    assert len(cached) == 2 and all(op.operand(8) is None for op in cached)
    assert [op.attrs["window"] for op in cached] == [0, 0]
    assert [op.attrs["scale"] for op in cached] == pytest.approx([8**-0.5] * 2)


@pytest.mark.parametrize(("name", "heads"), [("llada", 4), ("llada-tied", 4), ("dream", 2), ("bert", 4)])
def test_caches_hold_each_head_once(name, heads):
    assert {cache.shape for cache in kept_pair(name).caches} == {(heads, CAPACITY, 8)}


def named_lengths(graph: Graph) -> list[str]:
    """The text without what versions of torch number differently."""
    lines = "\n".join(graph.text()).replace(str(graph.inputs[0].shape[1]), "M")  # type: ignore[index]
    lines = re.sub(r"sym_size_int(_\d+)?", "length", lines)
    return re.sub(r"\bs\d+\b", "A", lines).split("\n")


def test_diff_of_a_tiny_graph():
    before = FxGraph.from_export(traced(Open(mix=lambda x: x + torch.arange(x.shape[1]).sin()[:, None])))
    report = windowed(before, capacity=8)
    refresh = report.passes[-1].extra["refresh"]
    found = diff_graphs(named_lengths(before), named_lengths(report.graph), context=0, lengths=False)
    assert found == STEP_DIFF.strip()
    found = diff_graphs(named_lengths(before), named_lengths(refresh), context=0, lengths=False)
    assert found == REFRESH_DIFF.strip()


STEP_DIFF = """
...
+ %position_ids: int64[1, M] = input
+ %slots: int32[M] = input
+ %prefix: int32[M, 2] = input
+ %ancestors: int32[M, A] = input
+ %key_cache_0: float32[2, 8, 8] = input
+ %value_cache_0: float32[2, 8, 8] = input
...
+ %reshape_default: int64[M] = aten.reshape(%position_ids, by %length)
+ %index_select_default: float32[M] = aten.index_select(%slice_1_table, %reshape_default) {axis=0}
...
- %scaled_dot_product_attention: float32[1, 2, M, 8] = aten.scaled_dot_product_attention(%transpose, %transpose_1, %transpose_2, none) {scale=0.353553, causal=False}
+ %cached_attention_default_out: float32[1, 2, M, 8], %cached_attention_default_new_key_cache: float32[2, 8, 8], %cached_attention_default_new_value_cache: float32[2, 8, 8] = elision.cached_attention(%transpose, %transpose_1, %transpose_2, %key_cache_0, %value_cache_0, %slots, %prefix, %ancestors, none) {scale=0.353553, softcap=0, window=0, key_bias=False}
- %transpose_3: float32[1, M, 2, 8] = aten.transpose(%scaled_dot_product_attention) {perm=[0, 2, 1, 3]}
+ %transpose_3: float32[1, M, 2, 8] = aten.transpose(%cached_attention_default_out) {perm=[0, 2, 1, 3]}
...
- %arange: int64[M] = aten.arange(by %length) {fn=arange, end=M}
- %sin: float32[M] = aten.sin(%arange) {fn=sin}
- %slice_1: float32[M] = aten.slice(%sin)
- %unsqueeze: float32[M, 1] = aten.unsqueeze(%slice_1)
+ %unsqueeze: float32[M, 1] = aten.unsqueeze(%index_select_default)
...
- return %linear_1
+ return %linear_1, %cached_attention_default_new_key_cache, %cached_attention_default_new_value_cache
"""  # noqa: E501

REFRESH_DIFF = """
...
- return %linear_1
+ return %linear_1, %transpose_1, %transpose_2
"""


# ---- what is put in ------------------------------------------------------------------------------------
class Masked(nn.Module):
    """A model with its mask and positions given."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor:
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids
        ).logits


@functools.cache
def masked_file() -> bytes:
    """BERT in batches of any size, as other people's exporters would have it."""
    ids = torch.ones(2, 7).long()
    dynamic = torch.export.Dim.DYNAMIC
    file = io.BytesIO()
    with quiet():
        exported = torch.onnx.export(
            Masked(model_of("bert")),
            (ids, torch.ones_like(ids), torch.arange(7).repeat(2, 1)),
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: dynamic, 1: dynamic},) * 3,
            input_names=["input_ids", "attention_mask", "position_ids"],
            output_names=["logits"],
        )
    assert exported is not None
    exported.save(file)
    return file.getvalue()


def test_a_file_with_mask_positions_and_any_batch():
    graph = OnnxGraph(from_proto(onnx.load_from_string(masked_file())))
    report = windowed(graph)
    refresh = report.passes[-1].extra["refresh"]
    assert len(report.graph.inputs) == 9
    assert refresh.input_names[0] == "input_ids"
    assert set(refresh.input_names) <= {"input_ids", "attention_mask", "position_ids"}
    pair, rng = Pair(report.graph, refresh), np.random.default_rng(3)
    for count in (1, 13):
        ids = rng.integers(0, V, count)
        logits = pair.refresh(ids, 2)
        near(logits, eager("bert", ids))
        part = rng.permutation(count)[: (count + 1) // 2]
        near(pair.step(some(ids, part, 2)), logits[part])


def test_a_traced_graph_with_mask_positions_and_any_batch():
    ids = torch.ones(2, 7).long()
    auto = torch.export.Dim.AUTO
    given = (ids, torch.ones_like(ids), torch.arange(7).repeat(2, 1))
    program = torch.export.export(
        Masked(model_of("modernbert")), given, dynamic_shapes=({0: auto, 1: auto},) * 3, strict=False
    )
    report = windowed(FxGraph.from_export(program))
    pair = Pair(report.graph, report.passes[-1].extra["refresh"])
    ids = np.random.default_rng(4).integers(0, V, 12)
    logits = pair.refresh(ids)
    near(logits, eager("modernbert", ids))
    near(pair.step(some(ids, np.array([3, 11, 0]))), logits[[3, 11, 0]])


def test_other_names_of_the_inputs():
    graph = FxGraph.from_export(traced(nn.Sequential(Open())))
    name = graph.input_names[0]
    assert name != "input_ids"
    report = windowed(graph, ids=name)
    assert report.passes[-1].extra["refresh"].input_names == [name]


@pytest.mark.parametrize("host", TARGETS)
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized(bits, host):
    """Weights are rounded before there are two graphs, so both have the same."""
    graph = plain("dream", host)
    report = windowed(graph, before=f"quantize{{bits={bits} group=16 method=rtn}}")
    pair = Pair(report.graph, report.passes[-1].extra["refresh"])
    ids = np.random.default_rng(5).integers(0, V, 15)
    logits = pair.refresh(ids)
    part = np.array([14, 2, 7])
    near(pair.step(some(ids, part)), logits[part])
    apart = np.abs(logits - eager("dream", ids)).max() / np.abs(logits).max()
    assert 1e-4 < apart < (0.1 if bits == 8 else 1.0)


# ---- the manager ---------------------------------------------------------------------------------------
def compared(single: Any) -> Any:
    graph = plain("llada")
    examples = [torch.randint(0, V, (1, 11))]
    context = PassContext(example_inputs=examples)
    return run_pipeline(graph, single, context=context, runner=FxRunner(examples, {}))


def test_the_manager_compares_a_step_with_the_plain_graph():
    report = compared(f"window{{capacity={CAPACITY}}}")
    assert report.passes[0].drift[0].max_abs < 1e-5
    assert report.cost_after.by_op["cached_attention"].count == 2


class Blind(Window):
    """Wrong on purpose: its rows do not see the last key."""

    name = "blind"

    @staticmethod
    def example_rows(count):
        slots, prefix, ancestors = Window.example_rows(count)
        return [slots, prefix - np.array([[0, 1]], np.int32), ancestors]


def test_the_manager_finds_a_step_that_is_wrong():
    with pytest.raises(VerificationError, match="blind must preserve the function, but output"):
        compared([Blind(capacity=CAPACITY)])


def test_as_text():
    text = "window{window=64 active=16 refresh=8}"
    (single,) = parse(text)
    assert isinstance(single, Window) and format([single]) == text
    options = single.options
    assert (options.window, options.active, options.refresh, options.capacity) == (64, 16, 8, 2048)
    (plain_one,) = parse("window")
    assert (plain_one.options.window, plain_one.options.active, plain_one.options.refresh) == (128, 32, 32)
    report = run_pipeline(plain("bert"), "window{window=8 active=2 refresh=4 capacity=20}")
    assert report.passes[0].extra["settings"] == {"window": 8, "active": 2, "refresh": 4}
    assert static(report.graph.inputs[5].shape) == (4, 20, 8)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"active": 0}, "at least 1 token is active, not 0"),
        ({"refresh": 0}, "there is a refresh every 1 or more steps, not 0"),
        ({"window": 4, "active": 8}, "a window of 4 tokens has no room for 8 active ones"),
        ({"window": -1}, "a window of -1 tokens has no room for 32 active ones"),
    ],
)
def test_numbers_that_no_window_has(given, said):
    with pytest.raises(PipelineError) as error:
        Window(**given)
    assert str(error.value).removeprefix("window: ") == said
    with pytest.raises(PipelineError, match=re.escape(said)):
        parse("window{" + " ".join(f"{name}={value}" for name, value in given.items()) + "}")
    with pytest.raises(PipelineError) as error:
        check_window(**{"window": 128, "active": 32, "refresh": 32, **given})
    assert str(error.value) == said


def test_other_options():
    with pytest.raises(PipelineError, match="capacity must be at least 2, not 1"):
        Window(capacity=1)
    with pytest.raises(PipelineError, match="unknown option 'activ'; did you mean 'active'"):
        parse("window{activ=3}")
