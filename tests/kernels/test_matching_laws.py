"""Laws of the matching ops, on random tokens, and against an independent reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from . import onnx_call, published
from .cases import call

LAWS = settings(max_examples=40, deadline=None)

shapes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "batch": st.sampled_from([1, 3]),
        "count": st.integers(2, 24),
        "r": st.integers(0, 14),
        "prefix": st.integers(0, 3),
        "suffix": st.integers(0, 2),
        "order": st.sampled_from(["published", "original"]),
        "kind": st.sampled_from(["random", "ties", "zero", "bf16"]),
    }
)


def draw(p: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """A metric and the attributes. "ties": rows out of four axes, so that every cosine is 0 or 1 exactly."""
    torch.manual_seed(p["seed"])
    prefix = min(p["prefix"], p["count"])
    attrs = {
        "r": p["r"],
        "prefix": prefix,
        "suffix": min(p["suffix"], p["count"] - prefix),
        "order": p["order"],
    }
    shape = (p["batch"], p["count"], 4)
    if p["kind"] == "ties":
        return torch.eye(4)[torch.randint(0, 4, shape[:2])], attrs
    if p["kind"] == "zero":
        return torch.zeros(shape), attrs
    metric = torch.randn(shape)
    return (metric.bfloat16() if p["kind"] == "bf16" else metric), attrs


def check_map(slot: Tensor, keep: Tensor, source: Tensor) -> None:
    """Every token is kept or merged, and every slot's representative lies in it."""
    count = slot.shape[1]
    both = torch.cat([keep, source], dim=1).long().sort(dim=1).values
    assert torch.equal(both, torch.arange(count).expand_as(both))
    places = torch.arange(keep.shape[1], dtype=torch.int32).expand_as(keep)
    assert torch.equal(slot.gather(1, keep.long()), places)
    assert {slot.dtype, keep.dtype, source.dtype} == {torch.int32}


@LAWS
@given(shapes)
def test_match_tokens_is_the_published_matching(p: dict[str, Any]) -> None:
    metric, attrs = draw(p)
    slot, keep, source = call("match_tokens", [metric], attrs)
    check_map(slot, keep, source)
    for sample in range(p["batch"]):
        expected = published.match(metric[sample].double().numpy(), **attrs)
        assert (slot[sample].tolist(), keep[sample].tolist()) == expected


@LAWS
@given(shapes)
def test_protected_tokens_stay_where_they_are(p: dict[str, Any]) -> None:
    metric, attrs = draw(p)
    slot, keep, _ = call("match_tokens", [metric], attrs)
    prefix, suffix, count, left = attrs["prefix"], attrs["suffix"], slot.shape[1], keep.shape[1]
    ends = [*range(prefix), *range(count - suffix, count)]
    assert slot[:, ends].tolist() == [[*range(prefix), *range(left - suffix, left)]] * p["batch"]
    if attrs["order"] == "original":
        assert torch.equal(keep, keep.sort(dim=1).values)


@LAWS
@given(shapes)
def test_without_padding_both_matchings_agree(p: dict[str, Any]) -> None:
    metric, attrs = draw(p)
    plain = call("match_tokens", [metric], attrs)
    padded = call("match_padded_tokens", [metric, torch.ones(metric.shape[:2])], attrs)
    assert all(torch.equal(one, other) for one, other in zip(plain, padded))


@LAWS
@given(shapes, st.integers(1, 9))
def test_padding_changes_nothing_for_the_real_tokens(p: dict[str, Any], padding: int) -> None:
    metric, attrs = draw(p)
    metric = metric[:1]
    count = metric.shape[1]
    total = count + padding
    where = torch.randperm(total)[:count].sort().values
    neighbours = torch.randn(2, total, 4)
    wide = torch.cat([torch.full((1, total, 4), torch.nan), neighbours])
    wide[0, where] = metric[0].float()
    size = torch.ones(3, total)
    size[0] = 0
    size[0, where] = torch.randint(1, 4, (count,)).float()

    slot, keep, source = call("match_padded_tokens", [wide, size], attrs)
    alone_slot, alone_keep, alone_source = call("match_tokens", [metric.float()], attrs)
    left = alone_keep.shape[1]
    if source.shape[1] == 0:  # nothing at all is removed: then nothing moves either
        assert torch.equal(slot[0], torch.arange(total, dtype=torch.int32))
        return
    assert torch.equal(slot[0, where], alone_slot[0])
    assert torch.equal(keep[0, :left].long(), where[alone_keep[0].long()])
    merged = alone_source.shape[1]
    assert torch.equal(source[0, :merged].long(), where[alone_source[0].long()])
    # What remains holds padding only, and what is dropped is padding.
    assert (size[0, keep[0, left:].long()] == 0).all()
    assert (slot[0, source[0, merged:].long()] == -1).all()
    padded = torch.ones(total, dtype=torch.bool)
    padded[where] = False
    assert ((slot[0, padded] == -1) | (slot[0, padded] >= left)).all()


@settings(max_examples=15, deadline=None)
@given(shapes)
def test_onnx_breaks_ties_like_torch(p: dict[str, Any]) -> None:
    metric, attrs = draw({**p, "kind": "zero" if p["kind"] == "zero" else "ties"})
    size = (torch.rand(metric.shape[:2]) > 0.3).float()
    for op, operands in (("match_tokens", [metric]), ("match_padded_tokens", [metric, size])):
        found = onnx_call.run(op, operands, attrs)
        assert all(torch.equal(one, other) for one, other in zip(found, call(op, operands, attrs)))


@LAWS
@given(st.integers(0, 60), st.sampled_from([0.0, 0.1, 0.29, 0.3, 0.5, 0.75]))
def test_a_ratio_means_its_decimal(count: int, ratio: float) -> None:
    from elision.kernels.lengths import wanted

    assert wanted(count, -1, ratio) == count * round(100 * ratio) // 100


@pytest.mark.parametrize("seed", [-1, 0, 7])
@pytest.mark.parametrize("grid", [(4, 4, 2, 2), (7, 5, 2, 2), (6, 9, 3, 2)])
def test_grid_has_one_destination_in_every_cell(grid: tuple[int, int, int, int], seed: int) -> None:
    height, width, sy, sx = grid
    metric = torch.randn(3, height * width, 8)
    attrs = {"height": height, "width": width, "sy": sy, "sx": sx, "seed": seed, "r": height * width}
    slot, keep, source = call("match_grid_tokens", [metric], attrs)
    check_map(slot, keep, source)
    assert torch.equal(keep, keep[:1].expand_as(keep))  # one partition for the batch
    cells = [(int(p) // width // sy, int(p) % width // sx) for p in keep[0]]
    assert sorted(cells) == [(y, x) for y in range(height // sy) for x in range(width // sx)]
    unit = torch.nn.functional.normalize(metric, dim=-1)
    for sample in range(3):
        similar = unit[sample, source[sample].long()] @ unit[sample, keep[sample].long()].T
        assert torch.equal(slot[sample, source[sample].long()].long(), similar.argmax(1))


def test_grid_keeps_the_least_similar() -> None:
    metric = torch.randn(1, 16, 8)
    attrs = {"height": 4, "width": 4, "ratio": 0.25}
    slot, keep, source = call("match_grid_tokens", [metric], attrs)
    check_map(slot, keep, source)
    unit = torch.nn.functional.normalize(metric[0], dim=-1)
    cells = torch.tensor([0, 2, 8, 10])
    movable = torch.tensor([i for i in range(16) if i not in cells])
    best = (unit[movable] @ unit[cells].T).amax(1)
    assert set(source[0].tolist()) == set(movable[best.argsort(descending=True)[:4]].tolist())


def test_bad_attributes_are_refused() -> None:
    metric = torch.randn(1, 8, 4)
    for op, attrs, message in (
        ("match_tokens", {"r": 2, "order": "random"}, "order is one of"),
        ("match_tokens", {}, "give r >= 0 or a ratio"),
        ("match_tokens", {"ratio": 1.5}, "give r >= 0 or a ratio"),
        ("match_grid_tokens", {"r": 2, "height": 3, "width": 3}, "8 tokens are no grid of 3 x 3"),
        ("match_grid_tokens", {"r": 2, "height": 1, "width": 8}, "no cell of 2 x 2 fits"),
        ("match_grid_tokens", {"height": 2, "width": 4}, "give r >= 0 or a ratio"),
    ):
        with pytest.raises(ValueError, match=message):
            call(op, [metric], attrs)


def test_reference_agrees_on_a_case_worked_by_hand() -> None:
    metric = np.array([[1, 0], [1, 0.1], [0, 1], [0.2, 1], [1, 1], [1, 0]], dtype=np.float64)
    # 0 is 5's equal; 2 is like 3; 4 is nearest to 3.
    assert published.match(metric, 1) == ([4, 2, 0, 3, 1, 4], [2, 4, 1, 3, 5])
    assert published.match(metric, 2, prefix=1) == ([0, 1, 2, 2, 2, 3], [0, 1, 3, 5])
