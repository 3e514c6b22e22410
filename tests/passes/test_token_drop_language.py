"""FastV in a language model alone: image tokens told by the features it takes, by their id, or by a mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from elision.passes.errors import PipelineError, Refused
from elision.passes.ir.fx import FxGraph
from elision.passes.token_drop import TokenDrop
from torch import Tensor

from tests.zoo.export import export, quiet
from tests.zoo.model import Built
from tests.zoo.vlm import VLMS
from tests.zoo.vlm_parts import Text, parts_of

from .drop_models import CLOSE, call_of, drop, dropped, image_tokens, run

NAME = "llava_batch"
OPTIONS: dict[str, Any] = {"policy": "fastv", "budget": 0.25}


def graph_of(part: str) -> tuple[FxGraph, tuple[Tensor, ...]]:
    made = parts_of(NAME, part)[part]
    with quiet():
        return FxGraph.from_export(export(Built(made.module, made.args))), made.args


def whole() -> Tensor:
    """What the model in one graph says with the same tokens gone."""
    return run(dropped(NAME, **OPTIONS)[0], call_of(NAME).args)


def test_features_that_come_in_say_where_the_image_is() -> None:
    graph, args = graph_of("text")
    made, outcome = drop(graph, args, **OPTIONS)
    assert "48 of 77 tokens are gone" in outcome.notes[-1]
    torch.testing.assert_close(run(made, args), whole(), **CLOSE)


def joined() -> tuple[Tensor, ...]:
    """Embeddings with features among them, mask and positions."""
    parts = parts_of(NAME, "text")["text"]
    ids, features, mask, positions = parts.args
    assert isinstance(parts.module, Text)
    with torch.no_grad():
        embeds = parts.module.embeddings(ids)
    embeds[ids == VLMS[NAME].placeholder] = features.reshape(-1, embeds.shape[-1])
    return embeds, mask, positions


def test_a_mask_says_where_the_image_is() -> None:
    graph, _ = graph_of("language")
    args = joined()
    made, outcome = drop(graph, args, **OPTIONS, image_tokens="mask", image_count=64)
    assert made.input_names[-1] == "image_tokens"
    assert any("the graph takes %image_tokens int64" in note for note in outcome.notes)
    among = image_tokens(NAME, call_of(NAME).args).long()
    (out,) = run(made, (*args, among))
    torch.testing.assert_close(out, whole(), **CLOSE)
    (none,) = run(made, (*args, torch.zeros_like(among)))
    assert none.isnan().all()  # all 77 tokens would have to stay


def test_ids_say_where_the_image_is() -> None:
    graph, args = graph_of("text")
    number = str(VLMS[NAME].placeholder)
    made, _ = drop(graph, args, **OPTIONS, image_tokens=number, image_count=64)
    torch.testing.assert_close(run(made, args), whole(), **CLOSE)


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        ("language", {}, "for a language model alone, image_tokens says which tokens are those of images"),
        ("language", {"image_tokens": "mask"}, "needs image_count"),
        (
            "language",
            {"image_tokens": "mask", "image_count": 78},
            "a text of 77 tokens has no 78 image tokens",
        ),
        ("language", {"image_tokens": "3", "image_count": 4}, "image_tokens=3: 0 inputs hold the ids"),
    ],
)
def test_what_is_refused(part: str, options: dict[str, Any], message: str) -> None:
    graph, args = graph_of(part)
    with pytest.raises(Refused, match=message):
        drop(graph, args, **OPTIONS, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "fastv", "image_tokens": "all"}, "image_tokens is an id or mask, not all"),
        ({"policy": "hired", "image_tokens": "mask"}, "image_tokens is for fastv"),
        ({"policy": "fastv", "image_count": 0}, "image_count must be at least 1"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        TokenDrop(**options)
