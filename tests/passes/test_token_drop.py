"""Token dropping on vision-language models: the same as the eager model to which the dropped tokens are hidden."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch
from elision.passes.analysis.joins import written_join
from elision.passes.drop_survey import followed
from elision.passes.extract import part_that_makes
from elision.passes.ir.fx import FxGraph
from torch import Tensor, nn

import elision
from tests.zoo.export import export as export_call
from tests.zoo.export import quiet
from tests.zoo.model import Built
from tests.zoo.vlm import VLMS, export
from tests.zoo.vlm_inputs import IMAGE
from tests.zoo.vlm_models import llava

from .drop_models import (
    CLOSE,
    call_of,
    drop,
    dropped,
    flags_of,
    gone_in,
    graph_of,
    hidden,
    image_tokens,
    module_of,
    run,
    sliced,
)

FAST = ("llava_batch", "internvl", "llava_next")
SLOW = ("llava", "llava_onevision", "smolvlm", "paligemma", "gemma3", "qwen2_5_vl", "qwen3_vl")
"""Not blip2, whose positions are a running sum of the mask: hiding tokens moves the others there."""
RANKED = {"llava_batch": 64, "internvl": 16, "llava_next": 16, "llava": 64, "llava_onevision": 16} | {
    **dict.fromkeys(("smolvlm", "gemma3", "qwen2_5_vl", "qwen3_vl"), 16),
    "paligemma": 64,
}
"""Of so many tokens of a picture a policy chooses: those of a tile, or those that are left of them."""
PADDED = {"llava_batch": "left", "internvl": "right", "llava_next": "left"}
POLICIES = ("cls-topk", "hired", "similarity", "uniform", "random", "tail")
EVERY = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
QUICK = {
    *(("llava_batch", policy, 5 if policy in ("similarity", "random") else 0.25) for policy in POLICIES),
    *((name, "cls-topk", 0.25) for name in FAST),
    ("internvl", "similarity", 5),
    ("llava_next", "hired", 5),
}
CASES = [
    pytest.param(
        name,
        policy,
        budget,
        id=f"{name}-{policy}-{budget}",
        marks=[] if (name, policy, budget) in QUICK else pytest.mark.slow,
    )
    for name in (*FAST, *SLOW)
    for policy in POLICIES
    for budget in (0.25, 5)
]


@pytest.mark.parametrize(("name", "policy", "budget"), CASES)
def test_law_dropping_equals_hiding(name: str, policy: str, budget: float) -> None:
    graph, outcome = dropped(name, policy=policy, budget=budget)
    call = call_of(name)
    out, flags = flags_of(graph, call.args)
    gone = gone_in(out)
    count = RANKED[name]
    kept = 5 if budget == 5 else count // 4
    assert outcome.changed
    assert f"{kept} of {count} tokens of each image are kept" in outcome.notes[-1]
    assert (flags == 1).sum(1).tolist() == [kept] * len(flags)
    assert ((flags == 0) | (flags == 1)).sum(1).tolist() == [count] * len(flags)
    assert not (gone & ~image_tokens(name, call.args)).any()
    if VLMS[name].tiles == 1:
        assert gone.sum(1).tolist() == [count - kept] * 2
    torch.testing.assert_close(out[~gone], hidden(call, gone)[~gone], **CLOSE)
    assert not torch.allclose(out[~gone], call.run()[0][~gone], atol=1e-2)


@pytest.mark.parametrize("policy", [*POLICIES, "fastv", "visionzip", "prumerge"])
@pytest.mark.parametrize("budget", [1, 1.0])
def test_a_budget_of_one_leaves_the_graph_alone(policy: str, budget: float) -> None:
    graph, outcome = dropped("llava_batch", policy=policy, budget=budget)
    assert not outcome.changed and outcome.notes == ["nothing to drop: the budget is 1"]
    assert graph.text() == graph_of("llava_batch").text()


@pytest.mark.parametrize(
    ("name", "budget"), [("llava_batch", "1"), ("internvl", "1.0"), ("llava_next", "1.0")]
)
def test_a_budget_of_one_is_the_module_itself(name: str, budget: str) -> None:
    call = call_of(name)
    with quiet():
        program = export(VLMS[name])
        result = elision.optimize(program, f"token-drop{{budget={budget}}}", call.args, force=True)
    assert torch.equal(run(result.module, call.args), run(program.module(), call.args))


@pytest.mark.parametrize("policy", ["cls-topk", "fastv"])
def test_as_many_as_there_are_is_nothing_to_drop(policy: str) -> None:
    graph, outcome = dropped("llava_batch", policy=policy, budget=64)
    assert not outcome.changed and "nothing to drop: all 64 tokens" in outcome.notes[-1]
    assert graph.text() == graph_of("llava_batch").text()


def test_nothing_to_drop_leaves_a_folding_model_alone() -> None:
    graph, outcome = dropped("blip2", policy="tail", budget=8)
    assert not outcome.changed
    assert graph.text() == graph_of("blip2").text()


def test_a_folding_model_is_unfolded_and_cut() -> None:
    graph, outcome = dropped("blip2", policy="uniform", budget=0.5)
    out = run(graph, call_of("blip2").args)
    assert outcome.statistics["unfolded"] > 0
    assert gone_in(out).sum(1).tolist() == [4, 4] and out.isfinite().all()


# ---- samples on their own --------------------------------------------------------------------------------
@pytest.mark.parametrize("policy", ["hired", "similarity", "fastv", "visionzip", "prumerge"])
def test_rows_do_not_see_each_other(policy: str) -> None:
    graph, _ = dropped("llava_batch", policy=policy, budget=0.25)
    three = call_of("llava_batch", 3).args
    whole = run(graph, three)
    for row in range(3):
        torch.testing.assert_close(
            run(graph, sliced(three, row))[0], whole[row], atol=1e-5, rtol=1e-5, msg=f"row {row}"
        )


@pytest.mark.parametrize("policy", ["cls-topk", "fastv"])
def test_rows_of_pooled_features_do_not_see_each_other(policy: str) -> None:
    graph, _ = dropped("internvl", policy=policy, budget=0.25)
    three = call_of("internvl", 3).args
    whole = run(graph, three)
    for row in range(3):
        torch.testing.assert_close(run(graph, sliced(three, row))[0], whole[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"policy": "cls-topk"}, {"tiles": 5, "grid": (2, 2)}])
def test_rows_of_tiles_do_not_see_each_other(options: dict) -> None:
    three = call_of("llava_next", 3).args
    whole = run(dropped("llava_next", 3, budget=0.25, **options)[0], three)
    alone = dropped("llava_next", 1, budget=0.25, **options)[0]
    for row in range(3):
        torch.testing.assert_close(run(alone, sliced(three, row))[0], whole[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "side"),
    [
        pytest.param(name, side, marks=[] if side == quick else pytest.mark.slow)
        for name, quick in {**dict.fromkeys(SLOW, ""), **PADDED}.items()
        for side in ("left", "right")
    ],
)
def test_padding_changes_nothing(name: str, side: str) -> None:
    plain = run(dropped(name, policy="cls-topk", budget=0.25)[0], call_of(name).args)
    call = call_of(name, side=side)
    out = run(dropped(name, side=side, policy="cls-topk", budget=0.25)[0], call.args)
    real = call.args[1] > 0
    assert real.sum(1).tolist() == [plain.shape[1]] * 2 and out.shape[1] == plain.shape[1] + 4
    torch.testing.assert_close(out[real], plain.flatten(0, 1), **CLOSE)


@pytest.mark.parametrize("name", EVERY)
def test_two_images_in_a_text(name: str) -> None:
    graph, _ = dropped(name, images=2, policy="cls-topk", budget=0.25)
    call = call_of(name, images=2)
    out, flags = flags_of(graph, call.args)
    gone, count = gone_in(out), RANKED[name]
    assert (flags == 1).sum(1).tolist() == [count // 4] * (4 * VLMS[name].tiles)
    for span in VLMS[name].spans(2):
        inside = gone[:, span.start : span.stop].sum(1)
        if VLMS[name].tiles == 1:
            assert inside.tolist() == [count - count // 4] * 2
        else:
            assert (inside > 0).all()
    torch.testing.assert_close(out[~gone], hidden(call, gone)[~gone], **CLOSE)


def without_image(name: str, args: tuple[Tensor, ...], row: int) -> tuple[Tensor, ...]:
    """`args` where the text of `row` says something else in place of its image."""
    ids = args[0].clone()
    ids[row] = torch.where(ids[row] == VLMS[name].placeholder, 7, ids[row])
    return (ids, *args[1:])


@pytest.mark.parametrize("policy", ["cls-topk", "fastv"])
@pytest.mark.parametrize("row", [0, 1])
def test_a_row_that_does_not_fit_is_nan_and_the_others_are_right(policy: str, row: int) -> None:
    name = "llava_batch"
    call = call_of(name)
    graph, _ = dropped(name, policy=policy, budget=0.25)
    args = without_image(name, call.args, row)
    out = run(graph, args)
    assert out[row].isnan().all() and out[1 - row].isfinite().all()
    # The only image among the texts is the first one, whichever text it is written in.
    one = (args[0][1 - row][None], args[1][:1], args[2][:1])
    torch.testing.assert_close(out[1 - row], run(graph, one)[0], atol=1e-5, rtol=1e-5)


# ---- options ---------------------------------------------------------------------------------------------
def short_logits(gone: Tensor) -> Tensor:
    """llava_batch, eager, fed with the kept tokens only, at positions from 0 on."""
    module, args = module_of("llava_batch"), call_of("llava_batch").args
    seen: list[Tensor] = []

    def look(_: object, given: tuple, named: dict) -> None:
        seen.append(named["inputs_embeds"])

    inner = module.inner
    assert isinstance(inner, torch.nn.Module)
    language = inner.get_submodule("model.language_model")
    handle = language.register_forward_pre_hook(look, with_kwargs=True)
    run(module, args)
    handle.remove()
    short = seen[0][~gone].unflatten(0, (2, -1))
    with torch.no_grad():
        states = language(inputs_embeds=short, use_cache=False).last_hidden_state
        return inner.get_submodule("lm_head")(states)


def test_compact_positions_are_those_of_a_shorter_text() -> None:
    args = call_of("llava_batch").args
    compact = run(dropped("llava_batch", budget=0.25, positions="compact")[0], args)
    gone = gone_in(compact)
    assert gone.sum(1).tolist() == [48, 48]
    torch.testing.assert_close(compact[~gone].unflatten(0, (2, -1)), short_logits(gone), **CLOSE)
    kept = run(dropped("llava_batch", budget=0.25)[0], args)
    assert torch.equal(gone_in(kept), gone) and not torch.allclose(kept, compact, atol=1e-2)


@pytest.mark.parametrize("name", FAST)
def test_outputs_of_kept_tokens_only(name: str) -> None:
    args = call_of(name).args
    whole = run(dropped(name, policy="cls-topk", budget=0.25)[0], args)
    graph, outcome = dropped(name, policy="cls-topk", budget=0.25, outputs="kept")
    out, kept = run(graph, args)
    gone = gone_in(whole)
    assert outcome.signature is not None
    assert kept.dtype == torch.int32 and out.shape[:2] == kept.shape
    assert kept.shape[1] < whole.shape[1]
    for row in range(2):
        places = kept[row].long()
        assert torch.equal(places, places.sort().values)
        real = ~gone[row, places]  # slots behind the kept tokens, in rows that keep fewer, are filled up
        assert places[real].tolist() == (~gone[row]).nonzero()[:, 0].tolist()
        torch.testing.assert_close(out[row, real], whole[row, places[real]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{"policy": "cls-topk"}, {"policy": "hired", "tiles": 5, "grid": (2, 2), "alpha": 0.4}]
)
def test_a_vision_part_with_separators_keeps_what_the_whole_graph_keeps(options: dict) -> None:
    name, call = "llava_next", call_of("llava_next")
    features = followed(graph_of(name), written_join)[2].placed[0][0]
    vision = part_that_makes(graph_of(name), [("features", features)])
    assert isinstance(vision, FxGraph)
    pixels = call.args[2]
    graph, outcome = drop(vision, (pixels,), budget=0.25, outputs="kept", **options)
    out, kept, size = graph.evaluate(graph.outputs, {graph.inputs[0]: pixels.numpy()})
    real = size[0] > 0  # tokens of rows that are padding were chosen too, and come nowhere
    inside = image_tokens(name, call.args)
    left = ~gone_in(run(dropped(name, budget=0.25, **options)[0], call.args))
    assert kept[0, real].tolist() == left[inside].nonzero()[:, 0].tolist()
    whole = vision.evaluate(vision.outputs, {vision.inputs[0]: pixels.numpy()})[0]
    np.testing.assert_allclose(out[0, real], whole.reshape(-1, out.shape[-1])[kept[0, real]], **CLOSE)
    assert kept.shape == (1, 140 - 128 + 40)
    assert "and all of the 12 separators among them" in " ".join(outcome.notes)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("policy", ["cls-topk", "fastv"])
def test_the_map_as_an_output_says_which_tokens_are_left(name: str, policy: str) -> None:
    graph, outcome = dropped(name, policy=policy, budget=0.25, want_map=True)
    out, slots = run(graph, call_of(name).args)
    assert slots.dtype == torch.int32 and slots.shape == out.shape[:2]
    assert outcome.extra["token_map"] == {"prefix": 0, "suffix": 0}
    assert torch.equal(slots < 0, gone_in(out))
    for row in slots:
        assert (row[row >= 0].diff() > 0).all()


@pytest.mark.parametrize(
    "policy", ["cls-topk", *(pytest.param(one, marks=pytest.mark.slow) for one in ("fastv", "uniform"))]
)
def test_a_class_token_that_the_text_reads_stays(policy: str) -> None:
    call, program = class_token_and_all()
    graph, _ = drop(FxGraph.from_export(program), call.args, policy=policy, budget=0.25)
    out = run(graph, call.args)
    gone, inside = gone_in(out), call.args[0] == IMAGE
    assert gone.sum(1).tolist() == [48, 48] and not (gone & ~inside).any()
    assert not gone[:, inside[0].nonzero()[0]].any()  # the first of the 65 is the class token
    if policy != "fastv":
        torch.testing.assert_close(out[~gone], hidden(call, gone)[~gone], **CLOSE)


@cache
def class_token_and_all() -> tuple[Built, torch.export.ExportedProgram]:
    """LLaVA whose text reads the class token too (vision_feature_select_strategy=full)."""

    def make() -> nn.Module:
        wrapper = llava()
        wrapper.inner.config.vision_feature_select_strategy = "full"
        return wrapper

    call = dataclasses.replace(VLMS["llava"], make=make, image_tokens=65).build(2)
    with quiet():
        return call, export_call(call, None)


def test_random_is_drawn_by_the_seed() -> None:
    args = call_of("llava_batch").args
    gone = [
        gone_in(run(dropped("llava_batch", policy="random", budget=8, seed=seed)[0], args))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(gone[0], gone[1]) and not torch.equal(gone[0], gone[2])
    assert torch.equal(gone[0][0], gone[0][1])


@pytest.mark.parametrize(
    ("policy", "places"), [("tail", range(8)), ("uniform", range(4, 64, 8)), ("random", None)]
)
def test_policies_by_place(policy: str, places: range | None) -> None:
    args = call_of("llava_batch").args
    out = run(dropped("llava_batch", policy=policy, budget=8)[0], args)
    (span,) = VLMS["llava_batch"].spans()
    left = (~gone_in(out))[:, span.start : span.stop]
    assert left.sum(1).tolist() == [8, 8]
    if places is not None:
        assert left[0].nonzero()[:, 0].tolist() == list(places)


def test_the_layer_is_counted_from_either_end() -> None:
    args = call_of("llava_batch").args
    outs = [
        run(dropped("llava_batch", policy="cls-topk", budget=0.25, layer=layer)[0], args)
        for layer in (-1, 2, 0)
    ]
    assert torch.equal(outs[0], outs[1]) and not torch.equal(gone_in(outs[0]), gone_in(outs[2]))


def test_the_mean_over_heads_chooses_the_same() -> None:
    args = call_of("llava_batch").args
    one, other = (
        run(dropped("llava_batch", policy="cls-topk", budget=0.25, heads=heads)[0], args)
        for heads in ("sum", "mean")
    )
    assert torch.equal(gone_in(one), gone_in(other))


@pytest.mark.slow
def test_the_report_names_the_join_and_counts_fewer_tokens() -> None:
    call = call_of("llava_batch")
    with quiet():
        result = elision.optimize(
            export(VLMS["llava_batch"]), "token-drop{policy=cls-topk budget=0.25}", call.args, force=True
        )
    (report,) = [p for p in result.report.passes if p.name == "token-drop"]
    assert list(report.cost_before.tokens_per_block)[-3:] == [77] * 3
    assert list(report.cost_after.tokens_per_block)[-3:] == [29] * 3
    assert list(report.cost_after.tokens_per_block)[:-3] == [65] * 3
    torch.testing.assert_close(
        run(result.module, call.args),
        run(drop(graph_of("llava_batch"), call.args, policy="cls-topk", budget=0.25)[0], call.args),
        **CLOSE,
    )


def test_keys_that_a_text_reads_by_attention_become_fewer() -> None:
    """The first half of Mllama's keys are those of the first tile: keeping them is hiding the second."""
    call = call_of("mllama")
    graph, outcome = dropped("mllama", policy="tail", budget=0.5)
    assert outcome.notes[-1] == "2 attentions read 17 of 34 tokens"
    inputs = VLMS["mllama"].inputs(2)
    # Rows of which all is hidden attend to all in this model: let every text see the picture.
    inputs["cross_attention_mask"] = torch.ones_like(inputs["cross_attention_mask"])
    out, whole = run(graph, tuple(inputs.values())), call.module(*inputs.values())
    inputs["cross_attention_mask"][..., 1] = 0
    hidden_tile = call.module(*inputs.values())
    torch.testing.assert_close(out, hidden_tile, **CLOSE)
    assert (hidden_tile - whole).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["qwen2_5_vl", "mllama"])
def test_policies_that_need_tokens_one_by_one_refuse(name: str) -> None:
    with pytest.raises(elision.Refused, match="policy=visionzip"):
        dropped(name, policy="visionzip", budget=0.25)
