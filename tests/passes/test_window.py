"""The pass window: a step over old keys and values and the refresh that made them, of several models in both hosts."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers as hf
from elision.kernels import cpu
from elision.passes import NothingMatched, PassContext, PipelineError, Refused, diff_graphs, run_pipeline
from elision.passes.errors import VerificationError
from elision.passes.incremental_pairs import PairTable, Unfit, read_full
from elision.passes.ir.fx import FxGraph
from elision.passes.ir.graph import Graph, static
from elision.passes.ir.onnx import OnnxGraph
from elision.passes.onnx.io import from_proto, to_proto
from elision.passes.pipeline import format, parse
from elision.passes.window import Window, check_window
from elision.runtime.lm_compile import plain_graph
from elision.runtime.lm_export import plain_causal_graph
from elision.runtime.lm_onnx import start_session
from elision.runtime.lm_step import Rows
from elision.runtime.runners import fx_runner
from elision.runtime.table import table_for
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from ..onnx.causal_files import quiet
from ..runtime.canvas_models import EagerCanvas, make
from ..zoo.causal import causal_model
from .causal_toys import VOCABULARY, WIDTH, Padded, Toy, Typed, dynamic_rotary, traced

CAPACITY, V = 48, 40
TARGETS = {"fx": "torch", "onnx": "onnxruntime"}
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
IDS: dict[str, Any] = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "eos_token_id": 2,
}

MODELS: dict[str, Callable[[], Any]] = {
    "llada": lambda: make("llada", dtype=torch.float32),
    "llada-tied": lambda: make("llada", dtype=torch.float32, tie_word_embeddings=True),
    "dream": lambda: make("dream", dtype=torch.float32),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)),
    "modernbert": lambda: hf.ModernBertForMaskedLM(
        hf.ModernBertConfig(**SIZES, **IDS, global_attn_every_n_layers=1)
    ),
    "albert": lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(**SIZES, embedding_size=16)),
}
EXPORTED = ("dream", "bert")
"""Exported to ONNX in every run of the tests, which takes seconds each; the others in `make test-all`."""

BOTH = [
    *((name, "fx") for name in MODELS),
    *(pytest.param(name, "onnx", marks=[] if name in EXPORTED else [pytest.mark.slow]) for name in MODELS),
]


@functools.cache
def model_of(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]().eval().requires_grad_(False)
        if not hasattr(model, "stale"):  # else its weights are drawn already
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.25)
    return model


@functools.cache
def _exported(name: str, host: str) -> Graph:
    return plain_graph(model_of(name), TARGETS[host], lambda _step: None)[0]


def plain(name: str, host: str = "fx") -> Graph:
    return _exported(name, host).copy()


def eager(name: str, ids: np.ndarray) -> np.ndarray:
    return model_of(name)(torch.from_numpy(ids)[None]).logits[0].numpy()


def windowed(graph: Graph, before: str = "", **options: Any) -> Any:
    """What the manager says of the pass on a graph, which stays."""
    single = Window(**{"capacity": CAPACITY, **options})
    first = "normalise" if graph.host == "onnx" else ""
    passes = [*parse(",".join(filter(None, [first, before]))), single]
    context = PassContext(force=True, target=TARGETS[graph.host])
    return run_pipeline(graph, passes, context=context)


def runner(graph: Any) -> Callable[[list[np.ndarray]], list[np.ndarray]]:
    if graph.host == "onnx":
        session = start_session(to_proto(graph.model).SerializeToString(), 1)
        return lambda given: session.run(None, dict(zip(graph.input_names, given)))
    module = graph.to_module()

    def run(given: list[np.ndarray]) -> list[np.ndarray]:
        with torch.no_grad():
            return [item.numpy() for item in module(*map(torch.from_numpy, given))]

    return run


class Pair:
    """Both graphs, run in their host. Slots that were never written hold `empty`."""

    def __init__(self, step: Graph, refresh: Graph, empty: float = 7.0) -> None:
        self._step, self._refresh = runner(step), runner(refresh)
        self.extra = refresh.input_names[1:]
        shapes = [static(value.shape) or () for value in step.inputs[5:]]
        self.caches = [np.full(shape, empty, np.float32) for shape in shapes]

    def refresh(self, ids: np.ndarray, start: int = 0) -> np.ndarray:
        count = len(ids)
        known = {"attention_mask": np.ones((1, count), np.int64), "position_ids": np.arange(count)[None]}
        logits, *kept = self._refresh([ids[None], *(known[name] for name in self.extra)])
        for cache, new in zip(self.caches, kept, strict=True):
            cache[:, start : start + count] = new[0]
        return logits[0]

    def step(self, rows: Rows) -> np.ndarray:
        given = [rows.ids[None], rows.positions[None], rows.slots, rows.prefix, rows.ancestors]
        logits, *caches = self._step([*given, *(cache.copy() for cache in self.caches)])
        self.caches = [cache.copy() for cache in caches]
        return logits[0]


def pair_of(name: str, host: str = "fx", **options: Any) -> Pair:
    report = windowed(plain(name, host), **options)
    return Pair(report.graph, report.passes[-1].extra["refresh"])


kept_pair = functools.cache(pair_of)


def some(ids: np.ndarray, part: np.ndarray, start: int = 0, run: int | None = None, extras: Any = ()) -> Rows:
    """The positions `part` of a canvas, each of which sees the positions below `run`, and `extras`."""
    run = len(ids) if run is None else run
    ancestors = np.full((len(part), len(extras) + 1), -1, np.int32)
    ancestors[:, : len(extras)] = start + np.asarray(extras, np.int32)
    return Rows(
        ids[part],
        part.astype(np.int64),
        (start + part).astype(np.int32),
        np.tile(np.array([[start, run]], np.int32), (len(part), 1)),
        ancestors,
    )


def near(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * max(1.0, float(np.abs(wanted).max())))


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


class Open(Toy):
    """Attention of all to all."""

    def attend(self, input_ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


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
    return run_pipeline(graph, single, context=context, runner=fx_runner(examples, {}))


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


# ---- refused -------------------------------------------------------------------------------------------
class Encoder(nn.Module):
    """T5's encoder with a head: its positions are a bias over distances."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"vocab_size": V, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        self.model = hf.T5EncoderModel(hf.T5Config(**sizes))
        self.head = nn.Linear(32, V)

    def forward(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.head(self.model(input_ids).last_hidden_state))


class Across(Open):
    """Attends to something else too."""

    def forward(self, input_ids: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        x = self.embed(input_ids)
        x = x + self.attend(input_ids, x)
        return self.head(x + F.scaled_dot_product_attention(x, memory, memory))


class Convolved(Open):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.mix = lambda x: self.conv(x.transpose(1, 2)).transpose(1, 2)


def across() -> FxGraph:
    auto = torch.export.Dim.AUTO
    module, args = Across().eval(), (torch.ones(1, 7).long(), torch.ones(1, 5, WIDTH))
    return FxGraph.from_export(
        torch.export.export(module, args, dynamic_shapes=({1: auto}, {1: auto}), strict=False)
    )


def toy(module: nn.Module, *more: Any) -> FxGraph:
    return FxGraph.from_export(traced(module, *more))


def traced_model(model: Any) -> FxGraph:
    return FxGraph.from_export(plain_causal_graph(model.eval()))


def local() -> Any:
    return hf.ModernBertForMaskedLM(hf.ModernBertConfig(**SIZES, **IDS, local_attention=8))


SDPA = r"aten\.scaled_dot_product_attention \(%scaled_dot_product_attention(_\d+)?\) cannot be cached: "
MASK = rf"the mask (%\w+, )*%\w+ of {SDPA}"
CAUSAL = "hides later tokens: the attention is causal"
HIDES = "hides tokens, and only an attention of all to all can be windowed"
BIAS = "adds a bias of positions"


@pytest.mark.parametrize(
    ("graph", "said"),
    [
        (lambda: traced_model(causal_model("llama")), MASK + CAUSAL),
        (lambda: toy(Toy()), SDPA + "it " + CAUSAL),
        (lambda: toy(Toy(mask=lambda i, j: j <= i)), MASK + CAUSAL),
        (lambda: traced_model(local()), MASK + HIDES),
        (lambda: toy(Toy(mask=lambda i, j: (i - j).abs() < 4)), MASK + HIDES),
        (lambda: toy(Toy(mask=lambda i, j: j // 4 <= i // 4)), MASK + HIDES),
        (lambda: traced_model(Encoder()), MASK + BIAS),
        (lambda: toy(Toy(mask=lambda i, j: -0.1 * (i - j).abs())), MASK + BIAS),
        (lambda: traced_model(causal_model("t5")), MASK + CAUSAL),
        (across, "%memory depends on an input that holds no tokens of the canvas"),
        (
            lambda: toy(Convolved()),
            r"aten\.conv1d \(%conv1d\) convolves over the tokens: a new row of %\w+ would not be enough",
        ),
        (
            lambda: toy(Open(mix=lambda x: x.cumsum(1))),
            r"aten\.cumsum \(%cumsum\) \(cumsum\) mixes the tokens: a new row of %\w+ would not be enough",
        ),
        (
            lambda: toy(Open(mix=lambda x: x - x.mean(1, keepdim=True))),
            r"aten\.mean \(%mean\) takes the mean over the tokens: a new row of %\w+ would not be enough",
        ),
        (
            lambda: toy(Open(before=dynamic_rotary)),
            r"%\w+ is not the same at the first 2 positions when more follow: aten\.mul \(%\w+\) reads it",
        ),
        (
            lambda: toy(Padded()),
            r"aten\.__and__ \(%\w+\) reads %\w+, which has a number for every two positions, outside an attention",
        ),
        (
            lambda: toy(Typed(), torch.ones(1, 7).long()),
            "the input %token_type_ids runs along the tokens of %input_ids and is neither their mask nor their "
            "positions",
        ),
    ],
)  # fmt: skip
def test_what_no_window_can_compute_is_refused_by_name(graph, said):
    graph = graph()
    before = graph.text()
    with pytest.raises(Refused) as error:
        Window(capacity=CAPACITY).run(graph, PassContext())
    assert re.fullmatch(said, str(error.value)), str(error.value)
    assert graph.text() == before, "a refused graph is as it was"


@pytest.mark.parametrize(
    ("host", "said"),
    [
        (
            "fx",
            r"%\w+ has 64 positions for 65 tokens: aten.reshape \(%\w+\) reads it; a smaller capacity may do",
        ),
        ("onnx", r"%\w+ has 64 positions for 65 tokens: Gather \(%\w+\) reads it; a smaller capacity may do"),
    ],
)
def test_more_slots_than_learned_positions(host, said):
    windowed(plain("bert", host), capacity=64)
    with pytest.raises(Refused) as error:
        windowed(plain("bert", host), capacity=65)
    assert re.fullmatch("window: " + said, str(error.value)), str(error.value)


def test_nothing_to_window():
    table = toy(nn.Sequential(nn.Embedding(9, 4)))
    with pytest.raises(NothingMatched) as error:
        Window().run(table, PassContext())
    assert str(error.value) == (
        "window found no input 'input_ids' with token ids among input_1; option ids names it"
    )
    with pytest.raises(NothingMatched) as error:
        Window(ids="input_1").run(table, PassContext())
    assert str(error.value) == (
        "window found no self-attention over the tokens of %input_1 (0 attentions among 1 operations)"
    )
    with pytest.raises(Refused) as refused:
        Window(ids="tokens").run(table, PassContext())
    assert str(refused.value) == "the graph has no input 'tokens': it has input_1"


@pytest.mark.parametrize(
    "module",
    [
        Toy(mask=lambda i, j: j >= 0 * i),
        Toy(mask=lambda i, j: 0.0 * (i - j)),
        Toy(mask=lambda i, j: -0.1 * i + 0 * j),
        Open(mix=lambda x: x + torch.arange(x.shape[1]).sin()[:, None]),
        Open(before=lambda x: x + torch.linspace(0, 1, 64)[: x.shape[1], None]),
        Open(mix=lambda x: x.unflatten(-1, (4, 4)).softmax(-1).flatten(2)),
        Open(heads=1),
    ],
)
def test_what_looks_like_it_but_is_all_to_all(module):
    """A mask that hides nothing, a bias that a row's softmax does not see, positions of any kind."""
    torch.manual_seed(0)
    module.embed.reset_parameters()
    report = windowed(toy(module))
    pair = Pair(report.graph, report.passes[-1].extra["refresh"])
    ids = np.random.default_rng(6).integers(0, VOCABULARY, 13)
    logits = pair.refresh(ids)
    near(logits, module(torch.from_numpy(ids)[None])[0].numpy())
    near(pair.step(some(ids, np.array([12, 0, 5]))), logits[[12, 0, 5]])


def test_tables_of_all_to_all():
    everything = np.ones((5, 5), bool)
    for masks in ([], [everything], [np.zeros((1, 5, 5))], [np.arange(5.0)[:, None] * np.ones(5)]):
        rule = read_full([PairTable(masks, 5, False)])
        assert rule.window == 0 and rule.bias is None
    hidden = everything.copy()
    hidden[2, 1] = False
    for masks, causal in (([hidden], False), ([], True), ([np.where(hidden, 0.0, -1e30)], False)):
        with pytest.raises(Unfit):
            read_full([PairTable(masks, 5, causal)])
    with pytest.raises(Unfit, match="adds a bias of positions"):
        read_full([PairTable([np.arange(5.0)[None] * np.ones((5, 1))], 5, False)])
