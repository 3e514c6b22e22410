"""The pass window: what it refuses, and what looks like it."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from elision.passes import NothingMatched, PassContext, Refused
from elision.passes.incremental_pairs import PairTable, Unfit, read_full
from elision.passes.ir.fx import FxGraph
from elision.passes.window import Window
from elision.runtime.lm_export import plain_causal_graph
from torch import nn
from torch.nn import functional as F

from ..zoo.causal import causal_model
from .causal_toys import VOCABULARY, WIDTH, Padded, Toy, Typed, dynamic_rotary, traced
from .window_models import CAPACITY, IDS, SIZES, Open, Pair, V, near, plain, some, windowed


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
