"""Token dropping with other passes in front of it or behind it: each chain works, or says why not."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from elision.passes import PassContext, run_pipeline
from elision.passes.ir.fx import FxGraph

import elision
from tests.zoo.export import quiet
from tests.zoo.vlm import VLMS, export

from .drop_models import call_of, dropped, gone_in, run
from .test_image_ids import traced

NAME = "internvl"
DROP = "token-drop{policy=cls-topk budget=0.25}"


@cache
def program() -> torch.export.ExportedProgram:
    with quiet():
        return export(VLMS[NAME])


def chained(passes: str) -> Any:
    call = call_of(NAME)
    with quiet():
        return elision.optimize(program(), passes, call.args, force=True)


@pytest.mark.parametrize(
    ("passes", "least"),
    [
        (f"{DROP},quantize{{bits=8}}", 0.99),
        pytest.param(f"{DROP},quantize{{bits=4 group=32}}", 0.75, marks=pytest.mark.slow),
        pytest.param(f"quantize{{bits=8}},{DROP}", 0.99, marks=pytest.mark.slow),
    ],
)
def test_quantized_weights_and_fewer_tokens(passes: str, least: float) -> None:
    call = call_of(NAME)
    result = chained(passes)
    assert all(single.changed for single in result.report.passes if single.name in ("token-drop", "quantize"))
    found = run(result.module, call.args)
    wanted = run(dropped(NAME, policy="cls-topk", budget=0.25)[0], call.args)
    assert gone_in(found).sum(1).tolist() == gone_in(wanted).sum(1).tolist()
    both = ~gone_in(found) & ~gone_in(wanted)
    pairs = torch.stack([found[both].flatten(), wanted[both].flatten()])
    assert torch.corrcoef(pairs)[0, 1] > least


@pytest.mark.slow
def test_kernels_that_round_may_choose_otherwise_between_equals() -> None:
    """Quantized products round their inputs in kernels and not before: here the 16th and 17th score are 2 % apart."""
    call = call_of("llava_batch")
    with quiet():
        result = elision.optimize(
            export(VLMS["llava_batch"]), f"{DROP},quantize{{bits=8}}", call.args, force=True
        )
    lowered = result.report.passes[-1]
    assert lowered.name == "lower" and lowered.exact
    turned = [note for note in lowered.notes if "outputs were compared under equal choices" in note]
    moved = [d for d in lowered.drift or [] if d.cosine < 0.99]
    assert bool(turned) == bool(moved)  # where no kernel is built, nothing is rounded


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (
            f"{DROP},incremental{{capacity=96}}",
            r"the token ids %.* have the static length 29: a graph of new rows needs a dynamic one; .* writes tokens "
            "of pictures among those of the text, whose rows then depend on each other: image-ids comes before, and "
            "token-drop goes on the vision part",
        ),
        (
            f"token-merge{{r=4}},{DROP}",
            "^token-drop after token-merge: the graph has tokens that were merged",
        ),
        (f"{DROP},token-merge{{r=4}}", "token-merge"),
    ],
)
def test_what_does_not_go_together_says_so(passes: str, message: str) -> None:
    with pytest.raises((elision.Refused, elision.NothingMatched), match=message) as error:
        chained(passes)
    assert "\n" not in str(error.value)


def test_a_text_of_any_length_says_that_image_ids_comes_first() -> None:
    graph = FxGraph.from_export(traced("llava")[0])
    with pytest.raises(
        elision.Refused, match=r"masked_scatter.* reads tokens where .* image-ids comes before"
    ):
        run_pipeline(graph, f"{DROP},incremental{{capacity=96}}", context=PassContext(force=True))


@pytest.mark.parametrize("weights", ["", pytest.param("quantize{bits=8},", marks=pytest.mark.slow)])
def test_a_cache_of_the_kept_tokens_says_what_recomputation_says(weights: str) -> None:
    """Of one traced graph: image-ids, the vision part with fewer tokens, the text with a cache; against the whole graph
    with fewer tokens, which computes every row again for each new token."""
    ready, (ids, pixels) = PassContext(force=True), traced("llava")[1]
    graph = FxGraph.from_export(traced("llava")[0])
    fewer = f"{weights}{DROP[:-1]} outputs=kept}}"
    whole = run_pipeline(graph, fewer, context=ready).graph
    split = run_pipeline(graph, "image-ids", context=ready)
    vision = run_pipeline(split.passes[0].extra["vision"], fewer, context=ready).graph
    step = run_pipeline(split.graph, f"{weights}incremental{{capacity=64 reach=128}}", context=ready).graph
    features, kept = vision.evaluate(vision.outputs, {vision.inputs[0]: pixels.numpy()})
    about = split.passes[0].extra["images"]
    words = ids.numpy()
    short, places = elision.drop_placeholders(words, kept, about["placeholder"])
    short[short == about["placeholder"]] = about["first"] + np.arange(kept.size)
    caches = {
        name: np.zeros([int(dim) for dim in value.shape or ()], np.float32)
        for name, value in zip(step.input_names, step.inputs)
        if "cache" in name
    }
    past, new, positions = 0, short[0], places[0]
    for _ in range(4):
        slots = past + np.arange(len(new), dtype=np.int32)
        prefix = np.stack([np.zeros_like(slots), slots], 1)
        feeds = {"input_ids": new[None], "position_ids": positions[None], "slots": slots, "prefix": prefix,
                 "ancestors": slots[:, None], "image_rows": features[0], **caches}  # fmt: skip
        found = step.evaluate(
            step.outputs, {v: feeds[name] for name, v in zip(step.input_names, step.inputs)}
        )
        results = dict(zip(step.output_names, found))
        caches = {name: results[f"{name}.out"] for name in caches}
        scores = found[0][0, -1]
        again = whole.evaluate(whole.outputs[:1], dict(zip(whole.inputs, (words, pixels.numpy()))))[0][0, -1]
        np.testing.assert_allclose(scores, again, atol=2e-4, rtol=1e-3)
        past, new, positions = past + len(new), scores.argmax(keepdims=True), positions[-1:] + 1
        words = np.concatenate([words, new[None]], 1)
    assert past == words.shape[1] - 1 - 48
