"""A plain graph of texts with pictures in two: the vision part, and the text that reads its rows by id."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..passes.base import Pass, PassContext
from ..passes.errors import ElisionError, Refused
from ..passes.ir.graph import Graph, static
from ..passes.pipeline import parse
from .api import quietly
from .lm_compile import Tell, run
from .lm_images import ImageFacts, said_of
from .table import table_for

REACH = 8192
"""Positions that the tables have at most where the cache has fewer slots: masks are evaluated for pairs of them."""


@dataclass
class Parted:
    """text: a plain graph of `input_ids` and `image_rows`. vision: lowered; its outputs `features`, and `elision_kept`
    where tokens were left out. notes: what the passes had to say."""

    text: Graph
    vision: Graph
    facts: ImageFacts
    notes: list[str]


def parted(
    graph: Graph,
    module: Any,
    images: Mapping[str, Any],
    drop: str,
    capacity: int,
    positions: int | None,
    tell: Tell,
) -> Parted:
    """graph: of `module` with an example of what it reads of a picture. drop: passes for the vision part, as text.
    capacity: slots of the cache. positions: of the model. Raises ElisionError where the features of pictures cannot be
    set apart, or where the model reads them in another way."""
    target = "onnxruntime" if graph.host == "onnx" else "torch"
    context = PassContext(force=True, target=target, table=table_for(graph.host))
    before = "normalise," if graph.host == "onnx" else ""
    split = run(graph, parse(f"{before}image-ids"), context, tell)
    known = split.passes[-1].extra
    names = known["vision"].input_names
    pictures = [images[name].numpy() for name in names]
    _check_reading(module, images, split, pictures, context, tell)
    chosen = dropping(drop)
    done = run(known["vision"], [*chosen, *parse("lower")], context, tell)
    shape = static(done.graph.outputs[0].shape)
    if shape is None:
        raise Refused(f"the number of features %{done.graph.outputs[0].name} of a picture is no constant")
    rows, kept = known["images"]["rows"], math.prod(shape[:-1])
    compact = any(getattr(one.options, "positions", "keep") == "compact" for one in chosen)
    reach = max(capacity, min(capacity * rows // max(1, kept), positions or REACH, REACH))
    facts = ImageFacts(
        **known["images"],
        kept=kept,
        width=shape[-1],
        shapes={name: list(item.shape) for name, item in zip(names, pictures)},
        reach=capacity if compact else reach,
        compact=compact,
        fixed={name: told for name, item in images.items() if (told := said_of(item)) is not None},
    )
    notes = [f"{one.name}: {note}" for one in [*split.passes, *done.passes] for note in one.notes]
    return Parted(split.graph, done.graph, facts, notes)


def _check_reading(
    module: Any,
    images: Mapping[str, Any],
    split: Any,
    pictures: Sequence[np.ndarray],
    context: PassContext,
    tell: Tell,
) -> None:
    """Whether the model's own `generate` reads a prompt with a picture as the two graphs do. Raises Refused where it
    does not: where image tokens see each other both ways, for example, which a trace without a cache hides."""
    import torch

    if not hasattr(module, "generate"):
        raise Refused(f"{type(module).__name__} has no generate to compare its reading of an image with")
    tell("comparing with the model's own reading of an image")
    known = split.passes[-1].extra
    text, vision = (
        run(graph.copy(), parse("lower"), context, tell).graph for graph in (split.graph, known["vision"])
    )
    (features,) = vision.evaluate(vision.outputs, dict(zip(vision.inputs, pictures)))
    about = known["images"]
    ids = np.array([[3, 4, *[about["placeholder"]] * about["rows"], 5, 3]])
    own = ids.copy()
    own[0, 2:-2] = about["first"] + np.arange(about["rows"])
    rows = features.reshape(-1, features.shape[-1])
    (scores,) = text.evaluate(text.outputs[:1], dict(zip(text.inputs, (own, rows))))
    how = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    given = torch.from_numpy(ids)
    with quietly(f"{type(module).__name__} cannot read a prompt with an image"), torch.no_grad():
        made = module.generate(
            input_ids=given, attention_mask=torch.ones_like(given), **images, **how
        ).logits[0][0]
    off = np.abs(made.float().numpy() - scores[0, -1].astype(np.float32)).max()
    if not off <= 1e-3 * float(made.abs().max()):
        raise Refused(
            f"{type(module).__name__}.generate reads a prompt with an image otherwise than one token after the other "
            f"(scores differ by {off:.3g})"
        )


def dropping(text: str) -> list[Pass]:
    """Passes for the vision part; what drops tokens puts the kept ones out unless it says otherwise. Raises
    ElisionError."""
    found: list[Pass] = []
    for one in parse(text) if text else []:
        if one.name == "token-drop" and "outputs" not in one.given:
            one = one.with_options(outputs="kept")
        if one.name == "token-drop" and one.options.policy == "fastv":
            raise ElisionError(
                f"{one}: fastv drops inside the language model, whose layers would have caches of two lengths"
            )
        if one.name == "token-drop" and one.options.outputs != "kept":
            raise ElisionError(
                f"{one}: the tokens of a picture that go must be gone for the text (outputs=kept)"
            )
        found.append(one)
    return found
