"""Joins between token spaces, found by data flow alone, however the graph writes them."""

from __future__ import annotations

import pytest
import torch
from elision.passes.analysis import analyse
from elision.passes.analysis.joins import find_joins
from elision.passes.ir.fx import FxGraph
from torch import nn

from . import toys

ARGS = (
    torch.randn(2, 3, 8, 8),
    torch.tensor([[1, 2, 3, *[49] * 16, 4, 5], [6, 7, *[49] * 16, 8, 9, 10]]),
)
"""Images of 16 patches, and texts of 21 tokens in which 49 stands for a patch."""


class Joined(nn.Module):
    """Features of a picture among the embeddings of a text, written there in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.tower, self.block = toys.Encoder(), toys.Block(causal=True)
        self.project, self.table = nn.Linear(16, 16), nn.Embedding(50, 16)

    def forward(self, image: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        features = self.project(self.tower(image))
        return self.block(self.join(features, self.table(ids), ids == 49))

    def join(self, features: torch.Tensor, text: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        if self.how == "scatter":
            return text.masked_scatter(inside[..., None].expand_as(text), features)
        places = inside.long().cumsum(1).sub(1).clamp(min=0)
        if self.how == "put":
            rows = torch.arange(2)[:, None].expand(2, 16)
            return text.index_put((rows, inside.long().topk(16, dim=1).indices.sort().values), features)
        if self.how == "where":
            spread = features.gather(1, places[..., None].expand_as(text))
            return torch.where(inside[..., None], spread, text)
        return torch.cat([features, text], 1)


class Two(nn.Module):
    """A picture and a text, each with a tower of its own, that meet in one number (CLIP)."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text, self.table = (
            toys.Encoder(prefix=1),
            toys.Block(causal=True),
            nn.Embedding(50, 16),
        )

    def forward(self, image: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.image(image)[:, 0] @ self.text(self.table(ids))[:, -1].T


class Chain(Joined):
    """The picture reaches the text by way of a resampler of 4 tokens, and only so."""

    def __init__(self, depth: int) -> None:
        super().__init__("concat")
        self.asks = nn.Parameter(torch.randn(1, 4, 16))
        self.resampler = nn.ModuleList(toys.Block(cross=True) for _ in range(depth))

    def forward(self, image: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        seen, asks = self.tower(image), self.asks.expand(2, -1, -1)
        for block in self.resampler:
            asks = block(asks, seen)
        return self.block(self.join(self.project(asks), self.table(ids), ids == 49))


class Crossed(nn.Module):
    """A text whose blocks read a picture by attention (Mllama)."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.table = toys.Encoder(), nn.Embedding(50, 16)
        self.blocks = nn.ModuleList(toys.Block(causal=True, cross=True) for _ in range(2))

    def forward(self, image: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        seen, x = self.tower(image), self.table(ids)
        for block in self.blocks:
            x = block(x, seen)
        return x


def joins(module: nn.Module) -> list[str]:
    analysis = analyse(FxGraph.trace(module.eval(), ARGS))
    return [join.sentence(analysis) for join in find_joins(analysis)]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("scatter", "are written among the tokens by aten.masked_scatter (%masked_scatter)"),
        ("put", "are written among the tokens by aten.index_put (%index_put)"),
        ("where", "are written among the tokens by aten.gather (%gather)"),
        ("concat", "are written among the tokens by aten.cat (%cat_1)"),
    ],
)
def test_features_among_the_embeddings_of_a_text(how: str, expected: str) -> None:
    assert joins(Joined(how)) == [f"the 16 tokens of space 0 {expected} of space 1"]


def test_attention_to_a_picture_is_told_apart() -> None:
    assert joins(Crossed()) == [
        "the 16 tokens of space 0 are read by aten.scaled_dot_product_attention (%scaled_dot_product_attention_3) "
        "of space 1"
    ]


def test_the_join_says_where_and_between_what() -> None:
    graph = FxGraph.trace(Joined("scatter").eval(), ARGS)
    analysis = analyse(graph)
    (join,) = find_joins(analysis)
    assert (join.source.length, join.target.length, join.crossing) == (16, 21, None)
    assert join.op.output is join.value and join.value.shape == (2, 21, 16)
    (crossed,) = find_joins(analyse(FxGraph.trace(Crossed().eval(), ARGS)))
    assert crossed.crossing is crossed.op and crossed.crossing.kind == "attention"


def test_towers_that_meet_in_a_number_are_not_joined() -> None:
    assert joins(Two()) == []


def test_one_space_is_not_joined() -> None:
    analysis = analyse(FxGraph.trace(toys.Encoder().eval(), ARGS[:1]))
    assert find_joins(analysis) == []


def test_what_comes_by_way_of_a_third_is_joined_to_that() -> None:
    found = joins(Chain(2))
    assert len(found) == 2
    assert "16 tokens of space 0 are read by" in found[0] and found[0].endswith("of space 1")
    assert found[1] == "the 4 tokens of space 1 are written among the tokens by aten.cat (%cat_1) of space 2"


def test_a_third_of_one_block_is_between_them_too() -> None:
    assert not any("space 0" in line and "space 2" in line for line in joins(Chain(1)))
