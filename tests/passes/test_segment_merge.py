"""Merging by units on small graphs: what a unit becomes, who is repaired, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from elision.passes.base import PassContext
from elision.passes.errors import NothingMatched, PipelineError, Refused
from elision.passes.ir.fx import FxGraph
from elision.passes.segment_merge import SegmentMerge
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import elision

from ..analysis import toys

LENGTH, WIDTH = 12, 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.again = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (t.unflatten(2, (2, 8)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        found = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(found.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.again(x))))


class Encoder(nn.Module):
    """Two layers over token ids; `head` says what comes out."""

    def __init__(self, head: str = "tokens") -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding, self.position = nn.Embedding(50, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = head

    def forward(self, ids: Tensor, valid: Tensor) -> Tensor:
        x = self.embedding(ids) + self.position.weight
        mask = valid.bool()[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
        if self.head == "first":
            return x[:, 0]
        if self.head == "mean":
            weight = valid[..., None].float()
            return (x * weight).sum(1) / weight.sum(1)
        return x


def example(batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(1, 50, (batch, LENGTH), generator=generator)
    valid = (torch.arange(LENGTH) < torch.tensor([LENGTH - 2 * i for i in range(batch)])[:, None]).long()
    return ids * valid, valid


BATCH = torch.export.Dim("batch", min=1, max=32)


def merged(module: nn.Module, **options) -> FxGraph:
    graph = FxGraph.trace(module.eval(), example(), dynamic_shapes=({0: BATCH}, {0: BATCH}))
    outcome = SegmentMerge(**options).run(graph, PassContext())
    graph.verify()
    assert outcome.changed
    return graph


SHARED = {
    (head, options): merged(Encoder(head), **dict(options))
    for head, options in (
        ("tokens", (("capacity", 1.0),)),
        ("tokens", (("capacity", 1.0), ("layer", 1), ("proportional", False))),
        ("tokens", (("capacity", 1.0), ("layer", -1), ("strategy", "learned"))),
        ("mean", (("capacity", 0.75),)),
        ("first", (("capacity", "dynamic"), ("layer", 1))),
    )
}


@pytest.mark.parametrize("key", [k for k in SHARED if ("capacity", 1.0) in k[1]], ids=str)
def test_identity_where_every_token_is_a_unit(key) -> None:
    """Bit for bit, rows of padding too, on whichever side it stands."""
    module, graph = Encoder(key[0]).eval(), SHARED[key]
    ids, valid = example(4)
    own = torch.arange(LENGTH).expand(4, LENGTH)
    for mask in (valid, valid.flip(1)):
        assert torch.equal(graph.run(ids, mask, own), module(ids, mask))


def eager(module: Encoder, ids: Tensor, numbers: list[int], layer: int) -> Tensor:
    """One sample without padding, its units averaged behind `layer` layers; attention counts their tokens."""
    x = module.embedding(ids)[None] + module.position.weight[: len(ids)]
    starts = [i for i, n in enumerate(numbers) if i == 0 or n != numbers[i - 1]]
    stops = [*starts[1:], len(numbers)]
    bias: Tensor | None = None
    for index, block in enumerate([*module.blocks, None]):
        if index == layer:
            x = torch.stack([x[0, a:b].mean(0) for a, b in zip(starts, stops)])[None]
            bias = torch.log(torch.tensor([float(b - a) for a, b in zip(starts, stops)])).reshape(1, 1, 1, -1)
        if block is not None:
            x = block(x, bias)
    return torch.cat(
        [x[:, i : i + 1].expand(1, b - a, WIDTH) for i, (a, b) in enumerate(zip(starts, stops))], 1
    )


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=6, max_size=LENGTH), st.integers(0, 10**6))
def test_units_are_averaged_as_in_the_eager_model(steps: list[int], seed: int) -> None:
    numbers = np.cumsum(steps).tolist()
    module, graph = Encoder().eval(), SHARED["tokens", (("capacity", 1.0),)]
    ids = torch.randint(1, 50, (len(numbers),), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        want = eager(module, ids, numbers, 0)
        rest = LENGTH - len(numbers)
        row = nn.functional.pad(ids, (0, rest))[None]
        valid = (torch.arange(LENGTH) < len(numbers)).long()[None]
        segments = torch.tensor([numbers + [-1] * rest])
        found = graph.run(row, valid, segments)[:, : len(numbers)]
    torch.testing.assert_close(found, want, atol=2e-5, rtol=1e-4)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_padding_and_neighbours_do_not_matter(data) -> None:
    """A sample's result is the same alone, among others, with other ids in its padding, and with padding by number."""
    key = data.draw(st.sampled_from([k for k in SHARED if k[0] != "first"]))
    graph = SHARED[key]
    ids, valid = example(3)
    steps = data.draw(
        st.lists(st.lists(st.integers(0, 1), min_size=LENGTH, max_size=LENGTH), min_size=3, max_size=3)
    )
    segments = torch.tensor(np.cumsum(steps, 1))
    with torch.no_grad():
        whole = graph.run(ids, valid, segments)
        alone = torch.cat(
            [graph.run(ids[i : i + 1], valid[i : i + 1], segments[i : i + 1]) for i in range(3)]
        )
        other = torch.where(valid.bool(), ids, (ids + 7) % 50)
        numbered = torch.where(valid.bool(), segments, -1)
        refilled = graph.run(other, valid, numbered)
    rows = valid.bool() if key[0] == "tokens" else torch.ones(3, dtype=torch.bool)
    torch.testing.assert_close(alone[rows], whole[rows])
    torch.testing.assert_close(refilled[rows], whole[rows])


def test_a_dynamic_number_of_slots_is_what_a_static_one_is() -> None:
    """And more slots than there are units change nothing. The first token, which is picked, is a unit by itself."""
    ids, valid = example(3)
    segments = (torch.arange(LENGTH).expand(3, LENGTH) + 1) // 2
    module = Encoder("first")
    static = merged(module, capacity=7.0, layer=1)
    dynamic = SHARED["first", (("capacity", "dynamic"), ("layer", 1))]
    with torch.no_grad():
        want = static.run(ids, valid, segments)
        for count in (7, 8, LENGTH):
            torch.testing.assert_close(dynamic.run(ids, valid, segments, torch.arange(count)), want)
        assert not torch.allclose(want, module(ids, valid))
    assert elision.slots_of(segments.numpy()).tolist() == list(range(7))


def test_what_does_not_fit_shares_slots_or_is_nan() -> None:
    ids, valid = example(3)
    own = torch.arange(LENGTH).expand(3, LENGTH)
    shared, strict = (merged(Encoder("first"), capacity=10.0, overflow=how) for how in ("share", "nan"))
    with torch.no_grad():
        assert torch.isfinite(shared.run(ids, valid, own)).all()
        found = strict.run(ids, valid, own)
        assert torch.isnan(found[0]).all() and torch.isfinite(found[1:]).all()  # 12, 10 and 8 units
        torch.testing.assert_close(found[1:], Encoder("first").eval()(ids, valid)[1:])


def test_a_mean_counts_tokens_and_not_units() -> None:
    """Behind the last layer merging then changes nothing at all in the mean."""
    module = Encoder("mean").eval()
    ids, valid = example(3)
    graph = merged(module, capacity=0.5, layer=-1)
    segments = torch.arange(LENGTH).expand(3, LENGTH) // 2
    with torch.no_grad():
        torch.testing.assert_close(graph.run(ids, valid, segments), module(ids, valid), atol=1e-5, rtol=1e-4)


def test_training_reaches_the_weights_as_in_the_eager_model() -> None:
    """Gradients of weights before and behind the merge, and of the learned query, against autograd of the same sums."""
    module = Encoder().eval()
    graph = merged(module, strategy="learned", capacity=0.5)
    run = graph.to_module()
    query = run.get_parameter("segments_query")
    assert torch.equal(query, torch.zeros(WIDTH)) and "segments_query" in run.state_dict()
    with torch.no_grad():
        query.copy_(torch.linspace(-2, 2, WIDTH))
    ids, valid = example(1)
    segments = torch.arange(LENGTH)[None] // 2
    names = ["embedding.weight", "blocks.0.qkv.weight", "blocks.1.down.bias"]
    wanted = [module.get_parameter(name) for name in names]
    found = torch.autograd.grad(run(ids, valid, segments).square().sum(), [*wanted, query])

    twin = query.detach().clone().requires_grad_()
    x = module.embedding(ids) + module.position.weight
    pairs = x.unflatten(1, (6, 2))
    share = torch.softmax(pairs @ twin / WIDTH**0.5, 2)
    x = (share[..., None] * pairs).sum(2)
    for block in module.blocks:
        x = block(x, torch.full((1, 1, 1, 6), np.log(2.0), dtype=torch.float32))
    want = torch.autograd.grad(x.repeat_interleave(2, 1).square().sum(), [*wanted, twin])
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-3)
    assert float(want[-1].abs().max()) > 1e-3


def test_the_module_takes_the_numbers_by_place_or_by_name() -> None:
    ids, valid = example(3)
    segments = torch.arange(LENGTH).expand(3, LENGTH) // 2
    result = elision.optimize(Encoder(), "segment-merge{capacity=6}", (ids, valid), force=True)
    notes = result.report.passes[0].notes
    assert "the graph takes segments int64 [3, 12] behind its other inputs, a number for each token" in notes
    assert torch.equal(result.module(ids, valid, segments), result.module(ids, valid, segments=segments))
    assert result.report.passes[0].drift is not None
    named = elision.optimize(Encoder(), "segment-merge{capacity=6}", {"ids": ids, "valid": valid}, force=True)
    torch.testing.assert_close(
        named.module(ids=ids, valid=valid, segments=segments), result.module(ids, valid, segments)
    )


def test_a_saved_result_keeps_the_argument(tmp_path) -> None:
    ids, valid = example(3)
    segments = torch.arange(LENGTH).expand(3, LENGTH) // 2
    result = elision.optimize(Encoder(), "segment-merge{capacity=6}", (ids, valid), force=True)
    loaded = torch.export.load(result.save(tmp_path / "merged.pt2")).module()
    torch.testing.assert_close(loaded(ids, valid, segments=segments), result.module(ids, valid, segments))


def test_no_saving_is_declined_and_leaves_the_bits() -> None:
    ids, valid = example(3)
    module = Encoder().eval()
    result = elision.optimize(module, "segment-merge{capacity=1}", (ids, valid))
    assert result.report.passes[0].declined and result.untouched
    assert torch.equal(result.module(ids, valid), module(ids, valid))


def test_only_the_encoder_is_merged_and_the_decoder_reads_less() -> None:
    module = toys.EncoderDecoder()
    graph = FxGraph.trace(module.eval(), (torch.randn(2, 10, 16), torch.randn(2, 6, 16)))
    SegmentMerge(layer=1, capacity=5.0).run(graph, PassContext())
    reads = [op for op in graph.ops if op.target == "elision.attention" and op.inputs[0].shape[-2] == 6]
    assert reads and all(op.inputs[1].shape[-2] == 5 for op in reads)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"capacity": 0.0}, "capacity is a share"),
        ({"capacity": 2.5}, "capacity is a share"),
        ({"bucket": 0}, "bucket must be at least 1"),
        ({"input": "a b"}, "input must be a name"),
        ({"capacity": "some"}, "option capacity must be"),
        ({"strategy": "mean"}, "option strategy must be"),
    ],
)
def test_options(options, sentence) -> None:
    with pytest.raises(PipelineError, match=sentence):
        SegmentMerge(**options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"layer": 3}, "there is no layer 3: the 12 tokens pass 2 layers"),
        ({"layer": -4}, "there is no layer -4"),
        ({"capacity": 2.0}, "capacity leaves 2 slots of 12 tokens, where at least 3 are needed"),
        ({"input": "ids"}, "has an input called 'ids' already"),
    ],
)
def test_refusals(options, sentence) -> None:
    graph = FxGraph.trace(Encoder().eval(), example())
    before = graph.text()
    with pytest.raises(Refused, match=sentence):
        SegmentMerge(**options).run(graph, PassContext())
    assert graph.text() == before


def test_what_it_does_not_apply_to() -> None:
    with pytest.raises(NothingMatched, match="segment-merge found no self-attention over tokens"):
        SegmentMerge().run(FxGraph.trace(nn.Linear(4, 4), (torch.ones(2, 4),)), PassContext())
    graph = merged(Encoder(), capacity=0.5)
    with pytest.raises(Refused, match="is over tokens that were merged or dropped before"):
        SegmentMerge(input="more").run(graph, PassContext())
    ids, valid = example(2)
    compiled = torch.compile(
        Encoder().eval(), backend="elision", options={"passes": "segment-merge{capacity=6}", "force": True}
    )
    with pytest.raises(Refused, match=r"adds the input .*, which callers of a compiled model cannot give"):
        compiled(ids, valid)
