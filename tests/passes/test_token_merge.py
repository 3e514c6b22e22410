"""Token merging on toy graphs: exact where tokens are equal, repaired by role, refused where unsafe."""

import pytest
import torch
from elision.passes.base import PassContext
from elision.passes.errors import NothingMatched, PipelineError, Refused
from elision.passes.ir.fx import FxGraph
from elision.passes.merge_plan import schedule
from elision.passes.token_merge import TokenMerge
from hypothesis import given, settings
from hypothesis import strategies as st

from ..analysis import toys


def merged(module, args, dynamic_shapes=None, context=None, **options):
    graph = FxGraph.trace(module.eval(), args, dynamic_shapes=dynamic_shapes)
    outcome = TokenMerge(**options).run(graph, context or PassContext())
    graph.verify()
    return graph, outcome


def count(graph, name):
    return sum(op.target.endswith(f"elision.{name}") for op in graph.ops)


def equal_pairs(batch=2):
    """Images whose 16 patches are equal in pairs of neighbours: 0 and 1, 2 and 3, ..."""
    patches = torch.randn(batch, 3, 4, 2, 2, 2).repeat_interleave(2, dim=3)  # [b, c, rows, columns, 2, 2]
    return patches.permute(0, 1, 2, 4, 3, 5).reshape(batch, 3, 8, 8)


def without_positions(module):
    torch.nn.init.zeros_(module.position)
    return module


@pytest.mark.parametrize("where", ["after", "before", "around"])
@pytest.mark.parametrize("head", ["tokens", "first", "mean", "grid"])
@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize(("r", "order"), [(3, "original"), ([7], "published")])
def test_law_merging_equal_tokens_changes_nothing(where, head, prefix, r, order):
    torch.manual_seed(0)
    module = without_positions(toys.Encoder(prefix=prefix, head=head))
    image = equal_pairs()
    same = {"proportional": True, "destinations": "bipartite"}  # around a sub-layer both are not the default
    graph, _ = merged(module, (image,), r=r, order=order, where=where, **same)
    with torch.no_grad():
        torch.testing.assert_close(graph.run(image), module(image), atol=2e-5, rtol=1e-4)


def test_the_tokens_really_become_fewer():
    graph, outcome = merged(toys.Encoder(prefix=1, head="first"), (torch.randn(2, 3, 8, 8),), r=3)
    lengths = [
        op.inputs[0].shape[-2] for op in graph.ops if op.kind == "linear" and len(op.inputs[0].shape) == 3
    ]
    assert lengths[0] == 17 and 14 in lengths and lengths[-1] == 11
    assert count(graph, "match_tokens") == 2 and count(graph, "restore_tokens") == 0
    assert outcome.changed and "17 tokens, 11 are left; 1 first tokens keep their place" in outcome.notes[0]


@pytest.mark.parametrize("options", [{"r": 0}, {"ratio": 0.0}, {"r": [0, 0]}])
def test_zero_budget_leaves_the_graph_alone(options):
    image = torch.randn(2, 3, 8, 8)
    module = toys.Encoder(prefix=1)
    before = FxGraph.trace(module.eval(), (image,)).text()
    graph, outcome = merged(module, (image,), **options)
    assert not outcome.changed and graph.text() == before


def test_dense_ends_get_all_rows_back():
    image = torch.randn(2, 3, 8, 8)
    for head in ("tokens", "grid"):
        module = toys.Encoder(prefix=1, head=head)
        graph, _ = merged(module, (image,), r=4)
        assert graph.run(image).shape == module(image).shape
        assert count(graph, "restore_tokens") == 1


def test_positions_masks_and_biases_take_the_rows_of_kept_tokens():
    module = toys.Text()
    graph, _ = merged(module, toys.text_inputs(), r=2)
    # block 2: one rotary table, the bias on both axes and the padding's line that is added to it; the pooling weight
    # crosses both cuts
    assert count(graph, "select_tokens") == 1 + 2 + 1 + 2
    assert count(graph, "match_padded_tokens") == 2 and count(graph, "pool_tokens") == 1


def test_padding_and_neighbours_do_not_matter():
    torch.manual_seed(1)
    module = toys.Text()
    ids, valid = toys.text_inputs(3)
    graph, _ = merged(module, (ids, valid), r=2)
    with torch.no_grad():
        whole = graph.run(ids, valid)
        other = torch.where(valid.bool(), ids, (ids * 3 + 5) % 50)
        torch.testing.assert_close(graph.run(other, valid), whole)
        assert not torch.allclose(whole, module(ids, valid))
        shuffled = graph.run(ids.flip(0), valid.flip(0)).flip(0)
        torch.testing.assert_close(shuffled, whole)


def test_encoder_is_merged_and_the_causal_decoder_says_why_not():
    module = toys.EncoderDecoder()
    args = (torch.randn(2, 10, 16), torch.randn(2, 6, 16))
    graph, outcome = merged(module, args, r=4)
    assert any("is causal (it is marked causal)" in note for note in outcome.notes)
    cross = [op for op in graph.ops if op.target.endswith("elision.attention")]
    assert len(cross) == 1 and cross[0].inputs[1].shape[-2] == 6
    assert graph.run(*args).shape == (2, 6, 16)


def test_windows_are_refused_with_a_sentence():
    with pytest.raises(
        Refused, match=r"attends within parts of the tokens.*its 4 tokens are not one axis of %add"
    ):
        merged(toys.Windowed(), (torch.ones(2, 4, 4, 16),), r=1)


def test_causal_models_are_refused():
    with pytest.raises(Refused, match="is causal"):
        merged(toys.Encoder(causal=True), (torch.ones(2, 3, 8, 8),), r=1)


def test_no_attention_is_no_match():
    with pytest.raises(NothingMatched, match="found no self-attention over tokens"):
        merged(torch.nn.Linear(4, 4), (torch.ones(2, 4),), r=1)


@torch.library.custom_op("elision_test::strange", mutates_args=())
def strange(x: torch.Tensor) -> torch.Tensor:
    return x.flip(1)


@strange.register_fake
def _(x):
    return torch.empty_like(x)


class Strange(toys.Encoder):
    def __init__(self, where):
        super().__init__()
        self.where = where

    def forward(self, image):
        if self.where == "before":
            return super().forward(torch.ops.elision_test.strange(image))
        return torch.ops.elision_test.strange(super().forward(image))


def test_an_unknown_op_is_passed_by_or_refused():
    image = torch.randn(2, 3, 8, 8)
    graph, _ = merged(Strange("before"), (image,), r=2)
    assert graph.run(image).shape == (2, 16, 16)
    with pytest.raises(
        Refused, match=r"elision_test\.strange.*reads %.*whose tokens are cut, and has no known role"
    ):
        merged(Strange("after"), (image,), r=2)


def test_lengths_read_as_data_keep_their_meaning():
    tokens = torch.export.Dim("tokens", min=8)

    class Dynamic(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = toys.Block()

        def forward(self, x):
            x = self.block(x)
            return x / x.shape[1] + torch.arange(x.shape[1]).float().mean()

    module, x = Dynamic(), torch.randn(2, 6, 16).repeat_interleave(2, dim=1)
    graph, _ = merged(module, (x,), dynamic_shapes=({1: tokens},), r=4)
    for length in (12, 20):
        x = torch.randn(2, length // 2, 16).repeat_interleave(2, dim=1)
        with torch.no_grad():
            torch.testing.assert_close(graph.run(x), module(x), atol=1e-5, rtol=1e-4)


def test_dynamic_batch():
    module = toys.Encoder(prefix=1, head="mean")
    batch = torch.export.Dim("batch", min=1, max=16)
    graph, _ = merged(module, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: batch},), r=2)
    images = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        whole = graph.run(images)
        alone = torch.cat([graph.run(image[None]) for image in images])
    torch.testing.assert_close(whole, alone, atol=1e-5, rtol=1e-4)


def test_gradients_reach_the_weights_through_merging():
    torch.manual_seed(0)
    module = without_positions(toys.Encoder(prefix=1, head="first")).eval()
    image = equal_pairs()
    module(image).square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    graph, _ = merged(module, (image,), r=4, order="original")
    graph.run(image).square().sum().backward()
    for name, parameter in module.named_parameters():
        if name in wanted and not name.startswith("position"):
            torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-4, rtol=1e-3)


def test_the_map_as_an_output_says_which_tokens_became_one():
    module = without_positions(toys.Encoder(prefix=1, head="first"))
    image = equal_pairs(1)
    graph, _ = merged(module, (image,), context=PassContext(want_map=True), r=[8])
    _, slots = graph.run(image)
    assert slots.shape == (1, 17) and slots.dtype == torch.int32
    assert sorted(set(slots[0].tolist())) == list(range(9)) and slots[0, 0] == 0
    assert slots[0, 1::2].tolist() == slots[0, 2::2].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either r"),
        ({"r": 1, "ratio": 0.5}, "give either r"),
        ({"r": -1}, "must not be negative"),
        ({"ratio": 1.0}, "below 1"),
        ({"ratio": 0.5, "schedule": "down"}, "needs one number r"),
        ({"r": 1, "where": "before", "metric": "keys"}, "use metric=hidden"),
        ({"r": 1, "destinations": "grid"}, "needs where=around"),
        ({"r": 1, "metric": "key"}, "metric must be one of keys, hidden"),
        ({"r": 1, "where": "before", "metric": ["hidden", "keys"]}, "use metric=hidden"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(PipelineError, match=message):
        TokenMerge(**options)


def test_a_list_longer_than_the_model():
    with pytest.raises(Refused, match="r has 3 numbers, and the space of 16 tokens 2 blocks"):
        merged(toys.Encoder(), (torch.ones(2, 3, 8, 8),), r=[1, 1, 1])


def test_a_metric_for_every_block():
    args = (torch.randn(2, 3, 8, 8),)
    torch.manual_seed(0)
    module = toys.Encoder()
    texts = {}
    for metric, keys in (
        ("keys", 2),
        ("hidden", 0),
        (["keys", "hidden"], 1),
        (["hidden"], 1),
        (["hidden"] * 2, 0),
    ):
        graph, _ = merged(module, args, r=3, metric=metric)
        texts[str(metric)] = "\n".join(graph.text())
        assert count(graph, "mean_heads") == keys
    assert texts["['hidden', 'hidden']"] == texts["hidden"]
    assert len(set(texts.values())) == 4
    with pytest.raises(Refused, match="metric has 3 words, and the space of 16 tokens 2 blocks"):
        merged(module, args, r=3, metric=["keys"] * 3)


@pytest.mark.parametrize(("options", "most"), [({}, 8), ({"where": "around"}, 12)])
def test_more_than_a_block_can_merge(options, most):
    with pytest.raises(
        Refused, match=f"r=13 is out of range: one block can merge at most {most} of these 16 tokens"
    ):
        merged(toys.Encoder(), (torch.ones(2, 3, 8, 8),), r=13, **options)


@given(st.integers(0, 40), st.integers(2, 40))
@settings(deadline=None)
def test_law_schedules_keep_the_total(r, blocks):
    down, up = schedule(r, "down", blocks), schedule(r, "up", blocks)
    assert down[0] == 2 * r and down[-1] == 0 and up[0] == 0 and up[-1] == 2 * r
    assert down == sorted(down, reverse=True) and up == sorted(up)
    assert abs(sum(down) - r * blocks) < blocks and abs(sum(up) - r * blocks) < blocks


def test_short_lists_are_filled_up():
    assert schedule([4, 2], "constant", 4) == [4, 2, 0, 0]
