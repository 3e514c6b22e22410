"""Budgets by content: an image keeps as many tokens as its scores ask for, up to a static capacity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from elision.passes.ir.fx import FxGraph
from torch import Tensor

from tests.zoo.timm_models import vit

from .drop_models import (
    CLOSE,
    call_of,
    drop,
    dropped,
    gone_in,
    hidden,
    image_tokens,
    run,
    sliced,
)

NAME = "llava_batch"
MASS: dict[str, Any] = {"policy": "hired", "budget": 0.5, "adaptive": "mass", "mass": 0.3}
OUTLIERS: dict[str, Any] = {"policy": "cls-topk", "budget": 0.25, "adaptive": "outliers"}


def counted(options: dict[str, Any], args: tuple[Tensor, ...], **more: Any) -> tuple[Tensor, Tensor]:
    """What comes out, and how many tokens each picture keeps by the op that counts."""
    made = dropped(NAME, **options, **more)[0].copy()
    assert isinstance(made, FxGraph)
    (op,) = [op for op in made.ops if op.target.endswith("elision.adaptive_counts")]
    made.add_output(op.output, "counts")
    return run(made, args)


@pytest.mark.parametrize(
    "options", [MASS, OUTLIERS, {**OUTLIERS, "policy": "similarity", "adaptive": "mass", "mass": 0.1}]
)
def test_a_text_has_what_its_picture_needs_and_nothing_attends_to_the_rest(options: dict[str, Any]) -> None:
    call = call_of(NAME)
    out, counts = counted(options, call.args)
    kept = int(options["budget"] * 64)
    assert out.isfinite().all() and ((counts >= 1) & (counts <= kept)).all()
    gone = gone_in(out)
    left = image_tokens(NAME, call.args) & ~gone
    assert left.sum(1).tolist() == counts.tolist()
    assert not (gone & ~image_tokens(NAME, call.args)).any()
    wanted = hidden(call, gone)
    torch.testing.assert_close(out[~gone], wanted[~gone], **CLOSE)


def test_counts_differ_between_pictures_and_a_text_does_not_see_the_other() -> None:
    call = call_of(NAME)
    args = (*call.args[:2], torch.stack([20 * call.args[2][0], torch.zeros_like(call.args[2][0])]))
    out, counts = counted(MASS, args)
    assert counts[0] != counts[1]
    for row in range(2):
        alone, own = counted(MASS, sliced(args, row))
        assert own.tolist() == counts[row : row + 1].tolist()
        torch.testing.assert_close(alone[0], out[row], **CLOSE)


@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.slow)])
def test_padding_changes_nothing(side: str) -> None:
    out, counts = counted(MASS, call_of(NAME).args)
    padded, again = counted(MASS, call_of(NAME, side=side).args, side=side)
    assert again.tolist() == counts.tolist()
    text = padded[:, 4:] if side == "left" else padded[:, :-4]
    torch.testing.assert_close(text, out, **CLOSE)


def test_all_of_the_scores_and_room_for_all_is_no_change_of_the_answer() -> None:
    options = {"policy": "cls-topk", "budget": 63, "adaptive": "mass", "mass": 1.0}
    call = call_of(NAME)
    out, counts = counted(options, call.args)
    plain = run(dropped(NAME, policy="cls-topk", budget=63)[0], call.args)
    assert counts.tolist() == [63, 63]
    torch.testing.assert_close(out, plain, atol=0, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["internvl", "llava_next", "qwen2_5_vl", "mllama", "paligemma"])
@pytest.mark.parametrize("adaptive", ["mass", "outliers"])
def test_other_models(name: str, adaptive: str) -> None:
    call = call_of(name)
    graph, _ = dropped(name, policy="cls-topk", budget=0.5, adaptive=adaptive, mass=0.3)
    out = run(graph, call.args)
    assert out.isfinite().all()
    if name == "mllama":
        return
    gone = gone_in(out)
    torch.testing.assert_close(out[~gone], hidden(call, gone)[~gone], **CLOSE)


def test_fastv_counts_in_each_text() -> None:
    options: dict[str, Any] = {"policy": "fastv", "budget": 0.5, "adaptive": "mass", "mass": 0.3}
    call = call_of(NAME)
    out, counts = counted(options, call.args)
    left = image_tokens(NAME, call.args) & ~gone_in(out)
    assert left.sum(1).tolist() == counts.tolist()


def test_an_encoder_drops_by_content_too() -> None:
    torch.manual_seed(0)
    model = vit().eval().requires_grad_(False)
    args = (torch.randn(2, 3, 32, 32),)
    graph, _ = drop(
        FxGraph.trace(model, args), args, policy="cls-topk", budget=0.5, adaptive="mass", mass=0.3
    )
    out = run(graph, args)
    assert out.isfinite().all()
    for row in range(2):
        torch.testing.assert_close(run(graph, (args[0][[row, row]],))[0], out[row], **CLOSE)


def test_a_vision_part_says_which_slots_hold_nobody() -> None:
    torch.manual_seed(0)
    model = vit(num_classes=0, global_pool="").eval().requires_grad_(False)
    args = (torch.randn(2, 3, 32, 32),)
    graph, outcome = drop(FxGraph.trace(model, args), args, **MASS, outputs="kept")
    features, keep, size = run(graph, args)
    assert features.shape[:2] == keep.shape == size.shape == (2, 9)
    assert any("elision_size is 0 for slots that hold nobody" in note for note in outcome.notes)
    assert size[:, 0].tolist() == [1, 1] and 0 < size.sum() < 18
    whole = run(model, args)
    torch.testing.assert_close(features, torch.take_along_dim(whole, keep[..., None].long(), 1), **CLOSE)
