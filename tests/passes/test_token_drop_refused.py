"""Where token dropping says no, in one sentence, and what it does to graphs without a text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from elision.passes.errors import NothingMatched, PipelineError, Refused
from elision.passes.ir.fx import FxGraph
from elision.passes.token_drop import TokenDrop
from torch import Tensor, nn

import elision
from tests.analysis import toys
from tests.zoo import ZOO
from tests.zoo.export import exported, quiet
from tests.zoo.timm_models import vit

from .drop_models import CLOSE, call_of, drop, dropped, flags_of, graph_of, module_of, run

IMAGE = (torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8),)
DEPTH = 3


def traced(module: nn.Module, args: tuple[Tensor, ...]) -> FxGraph:
    return FxGraph.trace(module.eval().requires_grad_(False), args)


# ---- what makes no sense ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.0}, "budget is a share of the tokens above 0 and up to 1, or a number of them, not 0"),
        ({"budget": -0.5}, "budget is a share"),
        ({"budget": 1.5}, "budget is a share of .*, not 1.5"),
        ({"budget": -3}, "budget is a share"),
        ({"policy": "hierd"}, "did you mean hired"),
        ({"policy": "best"}, "policy"),
        ({"alpha": 1.2}, "alpha must be from 0 to 1, not 1.2"),
        ({"contextual": 0.0}, "contextual must be above 0 and below 1"),
        ({"tiles": 0}, "at least 1"),
        (
            {"tiles": 4, "grid": (2, 2)},
            "an image of 4 pictures is the whole and a grid of 3, which 2 by 2 is",
        ),
        ({"neighbours": 0}, "neighbours must be at least 1, not 0"),
        (
            {"policy": "cls-topk", "tiles": 5, "grid": (2, 2)},
            "tiles share the budget of an image out under hired",
        ),
        ({"policy": "fastv", "compat": "reference"}, "compat=reference is known for hired, not for fastv"),
        ({"positions": "short"}, "positions"),
        ({"mass": 0.0}, "mass must be above 0 and up to 1, not 0"),
        (
            {"adaptive": "mass", "policy": "uniform"},
            "needs scores that say how many tokens matter, not uniform",
        ),
        ({"adaptive": "mass", "policy": "visionzip"}, "not visionzip"),
        ({"adaptive": "mass", "tiles": 5, "grid": (2, 2)}, "not tiles, which share a budget out"),
        (
            {"adaptive": "outliers", "positions": "compact"},
            "empty slots, so positions=compact would count them",
        ),
        ({"adaptive": "outliers", "compat": "reference"}, "none of the published rules of hired"),
        ({"nothing_like_it": 1}, "nothing_like_it"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match=message) as error:
        TokenDrop(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("budget", [float("nan"), float("inf")])
def test_budgets_that_are_no_numbers(budget: float) -> None:
    with pytest.raises(PipelineError, match="option budget must be a number"):
        TokenDrop(budget=budget)


def test_every_value_can_be_said_in_a_pipeline() -> None:
    assert elision.parse("token-drop{budget=0.25 compat=ours}")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llava_batch", {"layer": 7}, "there is no attention 7 in a space of 65 tokens with 3 of them"),
        ("llava_batch", {"layer": -4}, "there is no attention -4"),
        ("llava_batch", {"policy": "fastv", "layer": 0}, "drops before block 1 to 2, not 0"),
        ("llava_batch", {"policy": "fastv", "layer": 3}, "drops before block 1 to 2, not 3"),
        ("llava_batch", {"tiles": 5, "grid": (2, 2)}, "1 pictures, which are no images of 5 pictures each"),
        ("llava_next", {"tiles": 3, "grid": (2, 1)}, "5 pictures, which are no images of 3 pictures each"),
        ("internvl", {"policy": "visionzip"}, "64 tokens of the tower, several of which become one"),
        ("internvl", {"policy": "prumerge"}, "64 tokens of the tower, several of which become one"),
    ],
)
def test_models_that_it_does_not_fit(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message) as error:
        dropped(name, budget=0.25, **options)
    assert "\n" not in str(error.value)


class Language(nn.Module):
    """The language model of llava_batch alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = module_of("llava_batch").get_submodule("inner.model.language_model")

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.inner(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


def language(*masks: Tensor) -> tuple[FxGraph, tuple[Tensor, ...]]:
    args = (torch.arange(24).reshape(2, 12), *masks)
    with quiet():
        return traced(Language(), args), args


def test_a_causal_text_is_refused_where_attention_is_asked() -> None:
    graph, args = language(torch.ones(2, 12, dtype=torch.int64))
    with pytest.raises(Refused, match="is causal: its rows do not say which tokens later ones need"):
        drop(graph, args, policy="cls-topk", budget=0.5)
    with pytest.raises(Refused, match="policy=fastv needs the features of an image among the tokens"):
        drop(graph, args, policy="fastv", budget=0.5)


def test_a_causal_text_without_a_mask_is_refused_too() -> None:
    graph, args = language()
    with pytest.raises(Refused, match="is causal"):
        drop(graph, args, policy="cls-topk", budget=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "visionzip"}, "policy=visionzip needs an image that joins a text"),
        ({"policy": "prumerge"}, "policy=prumerge needs an image that joins a text"),
        ({"policy": "fastv"}, "policy=fastv needs the features of an image"),
        ({"policy": "cls-topk", "layer": 0}, "drops before block 1 to 1, not 0"),
        ({"policy": "tail", "layer": 2}, "drops before block 0 to 1, not 2"),
    ],
)
def test_encoders_that_it_does_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        drop(traced(toys.Encoder(prefix=1), IMAGE), IMAGE, budget=0.5, **options)


def test_no_attention_is_no_match() -> None:
    args = (torch.ones(2, 4),)
    with pytest.raises(NothingMatched, match="found no self-attention over tokens"):
        drop(traced(nn.Linear(4, 4), args), args, budget=0.5)


# ---- encoders --------------------------------------------------------------------------------------------
def blocks_of(model: nn.Module, image: Tensor, layer: int, keep: Tensor | None) -> Tensor:
    """timm's VisionTransformer with the tokens `keep` [B, K] only, from block `layer` on."""
    parts = {name: model.get_submodule(name) for name in ("patch_embed", "blocks", "norm")}
    with torch.no_grad():
        x = model._pos_embed(parts["patch_embed"](image))  # type: ignore[operator]
        for index, block in enumerate(parts["blocks"].children()):
            if index == layer and keep is not None:
                x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
            x = block(x)
        return model.forward_head(parts["norm"](x))  # type: ignore[operator]


def tokens_after(program: torch.export.ExportedProgram, passes: str, args: tuple[Tensor, ...]) -> Any:
    with quiet():
        result = elision.optimize(program, passes, args, force=True)
    (report,) = [p for p in result.report.passes if p.name == "token-drop"]
    return result, [int(n) for n in report.cost_after.tokens_per_block]


@pytest.mark.parametrize(("layer", "counts"), [(None, [17, 9, 9]), (2, [17, 17, 9])])
def test_a_class_token_says_which_patches_go_on(layer: int | None, counts: list[int]) -> None:
    entry = ZOO["timm_vit"]
    call = entry.build(3)
    more = "" if layer is None else f" layer={layer}"
    passes = f"token-drop{{policy=cls-topk budget=0.5{more}}}"
    result, after = tokens_after(exported(entry), passes, entry.build(2).args)
    assert after == counts
    out = call.run(result.module)[0]
    assert out.shape == call.run()[0].shape
    graph = FxGraph.from_export(exported(entry))
    made, _ = drop(graph, call.args, policy="cls-topk", budget=0.5, layer=layer)
    again, flags = flags_of(made, call.args)
    torch.testing.assert_close(again, out, **CLOSE)
    keep = (flags != 0).nonzero()[:, 1].reshape(3, 9)
    assert (keep[:, 0] == 0).all() and (flags[:, 0] == -1).all()
    torch.testing.assert_close(out, blocks_of(call.module, call.args[0], layer or 1, keep), **CLOSE)


def test_the_tail_goes_before_the_first_block_and_the_mean_is_of_the_rest() -> None:
    torch.manual_seed(0)
    model = vit(class_token=False, global_pool="avg").eval().requires_grad_(False)
    args = (torch.randn(2, 3, 32, 32),)
    program = torch.export.export(model, args)
    result, after = tokens_after(program, "token-drop{policy=tail budget=4}", args)
    assert after == [4] * DEPTH
    keep = torch.arange(4).expand(2, -1)
    torch.testing.assert_close(run(result.module, args), blocks_of(model, args[0], 0, keep), **CLOSE)


@pytest.mark.parametrize("policy", ["cls-topk", "similarity", "uniform", "random", "tail"])
@pytest.mark.parametrize(("prefix", "head"), [(0, "tokens"), (1, "first"), (1, "mean"), (3, "tokens")])
def test_encoders_keep_their_outputs(policy: str, prefix: int, head: str) -> None:
    module = toys.Encoder(prefix=prefix, head=head)
    graph, outcome = drop(traced(module, IMAGE), IMAGE, policy=policy, budget=0.25)
    out, wanted = run(graph, IMAGE), run(module, IMAGE)
    assert outcome.changed and out.shape == wanted.shape and out.isfinite().all()
    if head == "tokens":
        assert (out == 0).all(-1).sum(1).tolist() == [12, 12]
        assert not (out[:, :prefix] == 0).all(-1).any()


def test_encoders_with_few_tokens_stay_as_they_are() -> None:
    graph = traced(toys.Encoder(prefix=1), IMAGE)
    made, outcome = drop(graph, IMAGE, policy="tail", budget=16)
    assert not outcome.changed and made.text() == graph.text()


def test_padding_of_an_encoder_is_dropped_first() -> None:
    ids, valid = toys.text_inputs(3)
    graph, _ = drop(traced(toys.Text(), (ids, valid)), (ids, valid), policy="uniform", budget=0.5)
    other = torch.where(valid.bool(), ids, (ids * 3 + 5) % 50)
    torch.testing.assert_close(run(graph, (ids, valid)), run(graph, (other, valid)))


def test_graphs_are_shared_and_not_changed() -> None:
    before = graph_of("llava_batch").text()
    dropped("llava_batch", policy="cls-topk", budget=0.25)
    assert graph_of("llava_batch").text() == before
    assert call_of("llava_batch").run()[0].isfinite().all()
