"""Ids of image tokens: the text without pictures says what the whole model says, in both hosts."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from elision.passes import NothingMatched, PassContext, Refused, parse, run_pipeline
from elision.passes.image_ids import ImageIds
from elision.passes.ir.fx import FxGraph
from elision.passes.ir.graph import Graph
from elision.passes.ir.onnx import OnnxGraph
from torch import nn

from tests.zoo.vlm import VLMS, placeholder_checks

SLOW = ["llava_next", "llava_onevision", "internvl", "blip2"]
WRITTEN = ["llava", "smolvlm", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


class OneText(nn.Module):
    """A model of the zoo in one text without padding, of any length."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor, pictures: list[torch.Tensor]) -> torch.Tensor:
        return self.inner(input_ids, torch.ones_like(input_ids), *pictures)


@cache
def traced(name: str) -> tuple[torch.export.ExportedProgram, tuple[torch.Tensor, ...]]:
    model = VLMS[name]
    ids, _, *pictures = model.inputs(1).values()
    with placeholder_checks(False), torch.no_grad():
        program = torch.export.export(
            OneText(model.module()).eval(),
            (ids, pictures),
            dynamic_shapes=({1: torch.export.Dim.AUTO}, [{} for _ in pictures]),
            strict=False,
        )
    return program, (ids, *pictures)


def graph_of(name: str, host: str) -> tuple[Graph, tuple[torch.Tensor, ...]]:
    program, given = traced(name)
    if host == "fx":
        return FxGraph.from_export(program), given
    program._guards_code = []
    with torch.no_grad():
        made = torch.onnx.export(program, dynamo=True, verbose=False)
    assert made is not None
    context = PassContext(target="onnxruntime")
    return run_pipeline(OnnxGraph(made.model), parse("normalise"), context=context).graph, given


def outputs(graph: Graph, given: list[np.ndarray]) -> list[np.ndarray]:
    return graph.evaluate(graph.outputs, dict(zip(graph.inputs, given, strict=True)))


@pytest.mark.parametrize("host", ["fx", "onnx"])
@pytest.mark.parametrize("name", WRITTEN)
def test_ids_of_rows_say_what_placeholders_said(name: str, host: str) -> None:
    graph, given = graph_of(name, host)
    whole, model = graph.copy(), VLMS[name]
    outcome = ImageIds().run(graph, PassContext(example_inputs=given))
    graph.verify()
    assert graph.input_names == ["input_ids", "image_rows"]
    images, vision = outcome.extra["images"], outcome.extra["vision"]
    assert images == {"placeholder": model.placeholder, "first": 200, "rows": model.image_tokens}
    assert vision.output_names == ["features"] and len(vision.inputs) == len(given) - 1
    ids, *pictures = (np.array(item) for item in given)
    if host == "onnx" and name == "smolvlm":
        return  # onnxruntime has no kernel for its tower's attention before it is lowered
    (features,) = outputs(vision, pictures)
    rows = features.reshape(-1, features.shape[-1])
    (expected,) = outputs(whole, [ids, *pictures])
    places = ids == model.placeholder
    ids[places] = 200 + np.arange(places.sum())
    (found,) = outputs(graph, [ids, rows])
    np.testing.assert_array_equal(found, expected)
    # Two of the picture's tokens left out, and the rows in another order: ids alone say which is which.
    kept = np.delete(np.arange(ids.shape[1]), [8, 10])
    turned = ids.copy()
    turned[places] = 200 + len(rows) - 1 - np.arange(places.sum())
    (one,) = outputs(graph, [ids[:, kept], rows])
    (other,) = outputs(graph, [turned[:, kept], rows[::-1].copy()])
    np.testing.assert_array_equal(one, other)


def test_the_pass_compares_itself_on_the_example() -> None:
    graph, given = graph_of("llava", "fx")
    whole = graph.copy()
    signature = ImageIds().run(graph, PassContext(example_inputs=given)).signature
    assert signature is not None and signature.before is not None and signature.after is not None
    np.testing.assert_array_equal(outputs(graph, signature.after)[0], outputs(whole, signature.before)[0])


class Small(nn.Module):
    """A tower and a text of one attention each; `how` the features get into the text."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.table, self.tower, self.text = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, input_ids: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        attend = nn.functional.scaled_dot_product_attention
        seen = self.tower(attend(image[:, None], image[:, None], image[:, None])[:, 0])
        x, marked = self.table(input_ids), (input_ids == 7)[..., None]
        if self.how == "reversed":
            seen = seen.flip(1)
            x = x.flip(1).masked_scatter(marked.flip(1), seen).flip(1)
            x = x.masked_scatter(marked, image[0])
        elif self.how == "added":
            x = x + torch.zeros_like(x).masked_scatter(marked, seen[0])
        elif self.how == "scaled":
            x = x.masked_scatter(marked, 2 * seen[0] + x[0, :4])
        else:
            x = x.masked_scatter(marked, seen[0])
        x = x + attend(x[:, None], x[:, None], x[:, None], is_causal=True)[:, 0]
        return self.text(x) * torch.where(marked, 2.0, 1.0) if self.how == "read twice" else self.text(x)


def small(how: str) -> Graph:
    torch.manual_seed(0)
    ids = torch.tensor([[1, 7, 7, 7, 7, 2]])
    shapes = {"input_ids": {1: torch.export.Dim.AUTO}, "image": {}}
    program = torch.export.export(
        Small(how).eval().requires_grad_(False),
        (ids, torch.randn(1, 4, 8)),
        dynamic_shapes=shapes,
        strict=False,
    )
    return FxGraph.from_export(program)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("read twice", "reads %input_ids for more than where the features of images go"),
        ("added", "is made of nothing, where one value with the embeddings of a text is wanted"),
        ("scaled", "does not write the rows of %.* over one of the ids 7, in their order"),
        ("reversed", "does not write|is made of"),
    ],
)
def test_what_is_no_writing_over_placeholders_is_refused(how: str, sentence: str) -> None:
    graph = small(how)
    before = graph.text()
    with pytest.raises(Refused, match=sentence):
        ImageIds().run(graph, PassContext())
    assert graph.text() == before


def test_a_text_alone_has_no_images() -> None:
    class Text(Small):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.table(input_ids)[:, None]
            return self.text(nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0])

    program = torch.export.export(
        Text("").eval(),
        (torch.ones(1, 6, dtype=torch.int64),),
        dynamic_shapes=({1: torch.export.Dim.AUTO},),
        strict=False,
    )
    with pytest.raises(NothingMatched, match="image-ids found no place"):
        ImageIds().run(FxGraph.from_export(program), PassContext())
