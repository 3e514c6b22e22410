"""Token spaces: found, told apart, with their ends and what must keep its place."""

import pytest
import torch
from elision.passes.analysis import analyse, explain
from elision.passes.analysis.masks import causal_because, padding_mask
from elision.passes.ir.fx import FxGraph

from . import toys

IMAGE = (torch.ones(2, 3, 8, 8),)


def analysis(module, args):
    return analyse(FxGraph.trace(module.eval(), args))


def only(module, args=IMAGE):
    (space,) = analysis(module, args).spaces
    return space


@pytest.mark.parametrize(
    ("options", "prefix", "suffix"),
    [
        ({}, 0, 0),
        ({"prefix": 1}, 1, 0),
        ({"prefix": 5, "head": "grid"}, 5, 0),
        ({"suffix": 4}, 0, 4),
        ({"prefix": 1, "suffix": 2}, 1, 2),
        ({"head": "first"}, 1, 0),
    ],
)
def test_protected_tokens_come_from_joins_and_picks(options, prefix, suffix):
    space = only(toys.Encoder(**options))
    assert (space.prefix, space.suffix) == (prefix, suffix)
    assert len(space.blocks) == 2 and all(block.add is not None for block in space.blocks)


def test_a_grid_without_class_token_is_a_product_of_two_axes():
    found = analysis(toys.Encoder(head="grid"), IMAGE)
    assert found.grid(found.spaces[0]) == (4, 4)
    assert found.grid(analysis(toys.Encoder(prefix=1), IMAGE).spaces[0]) is None


def test_two_spaces_with_a_cross_attention_between_them():
    args = (torch.randn(2, 10, 16), torch.randn(2, 6, 16))
    found = analysis(toys.EncoderDecoder(), args)
    source, target = found.spaces
    assert (source.length, len(source.blocks), len(source.read_by), len(source.reads)) == (10, 1, 1, 0)
    assert (target.length, len(target.blocks), len(target.read_by), len(target.reads)) == (6, 1, 0, 1)
    assert target.reads == source.read_by
    assert causal_because(found, target.blocks[0].attention) == "it is marked causal"
    assert causal_because(found, source.blocks[0].attention) == ""


def test_a_window_is_not_an_axis_of_the_stream():
    found = analysis(toys.Windowed(), (torch.ones(2, 4, 4, 16),))
    (space,) = found.spaces
    (block,) = space.blocks
    assert space.length == 4 and block.add is not None
    assert found.token_axes(space, block.add.output) == []


def test_padding_mask_positions_and_biases():
    found = analysis(toys.Text(), toys.text_inputs())
    (space,) = found.spaces
    mask = padding_mask(found, space)
    assert mask is not None and mask is space.blocks[0].attention.operand(3)
    facts = explain(found.graph).spaces[0]
    assert facts.pairwise == [f"%{mask.name}"]
    assert "%rotary" in facts.positions


def test_masks_written_with_comparisons_and_triangles_are_causal():
    class Compared(toys.Block):
        def forward(self, x):
            n = torch.arange(x.shape[1])
            return super().forward(x, mask=n[None, :] <= n[:, None])

    class Triangle(toys.Block):
        def forward(self, x):
            return super().forward(x, mask=torch.ones(7, 7).tril().bool())

    class Constant(toys.Block):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.full((7, 7), float("-inf")).triu(1))

        def forward(self, x):
            return super().forward(x, mask=self.mask)

    class Biased(Constant):  # a bias of positions for each head, folded into the triangle
        def __init__(self):
            super().__init__()
            self.mask = torch.randn(1, 2, 7, 7) + torch.full((7, 7), -1e9).triu(1)

    class OnlyBias(Constant):
        def __init__(self):
            super().__init__()
            self.mask = torch.randn(1, 2, 7, 7)

    class Local(toys.Block):
        def forward(self, x):
            n = torch.arange(x.shape[1])
            return super().forward(x, mask=(n[None, :] - n[:, None]).abs() <= 2)

    x = (torch.randn(2, 7, 16),)
    kinds = {Compared: True, Triangle: True, Constant: True, Biased: True, OnlyBias: False, Local: False}
    for kind, causal in kinds.items():
        found = analysis(kind(), x)
        assert bool(causal_because(found, found.spaces[0].blocks[0].attention)) is causal, kind


def test_dynamic_lengths_are_symbols():
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens", min=4)
    graph = FxGraph.trace(toys.Block(), (torch.randn(2, 9, 16),), dynamic_shapes=({0: batch, 1: tokens},))
    (space,) = analyse(graph).spaces
    assert not isinstance(space.length, int) and space.batch


def test_explain_in_words():
    graph = FxGraph.trace(toys.Encoder(prefix=1, head="grid").eval(), IMAGE)
    found = explain(graph)
    text = "\n".join(found.lines())
    assert "token space 0: 17 tokens, born at aten.cat (%cat)" in text
    assert "2 self-attentions" in text and "2 in a residual stream" in text
    assert "protected: the first 1: aten.cat (%cat) joins learned tokens to the content" in text
    assert "position-like values: %position" in text
    assert "ends: aten.reshape" in text and "gives the tokens another shape" in text
    assert found.to_json()["spaces"][0]["length"] == 17


def test_no_attention_is_said():
    graph = FxGraph.trace(torch.nn.Linear(4, 4), (torch.ones(2, 4),))
    assert "no token space: no attention was found" in explain(graph).lines()


def test_the_last_tokens_of_a_fixed_number_keep_their_place() -> None:
    class Last(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = toys.Encoder()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.encoder(x)[:, -2:]

    space = only(Last())
    assert (space.prefix, space.suffix) == (0, 2)
    assert "picks the last tokens" in space.protected_because[0]
