"""Pipelines that join families of passes, end to end on small models, and the table of every pair."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from elision.runtime.canvas_open import open_canvas
from elision.runtime.diffusion import DiffusionGenerator

import elision

from .runtime import test_generate_images as images
from .runtime.canvas_pairs import model_of
from .zoo import ZOO, composition
from .zoo.code import CODE
from .zoo.composition_models import HOSTS, SUBJECTS, attempt
from .zoo.export import exported, onnx_file, onnx_outputs, quiet
from .zoo.model import Built, ZooModel, pick
from .zoo.outcome import as_arrays

SLOW_ONNX = ["torch", pytest.param("onnx", marks=pytest.mark.slow)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("composition")


def optimised(entry: ZooModel, host: str, folder: Path, passes: str) -> Any:
    target: Any = onnx_file(entry, folder) if host == "onnx" else exported(entry)
    with quiet():
        return elision.optimize(target, passes, entry.build(2).args, force=True)


def outputs(result: Any, args: tuple[torch.Tensor, ...]) -> np.ndarray:
    """The first output of a result in its host: torch, or plain ONNX Runtime."""
    if result.graph.host == "onnx":
        return onnx_outputs(result.model, Built(torch.nn.Identity(), args))[0]
    with torch.no_grad():
        return as_arrays(pick(result.module(*args)))[0]


# ---- pipelines -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", SLOW_ONNX)
def test_merge_quantize_and_lower(host: str, folder: Path) -> None:
    entry = ZOO["vit"]
    args = entry.build(2).args
    result = optimised(entry, host, folder, "token-merge{r=2},quantize{bits=8},lower")
    merged, few, lowered = (s for s in result.report.passes if s.name != "normalise")
    assert merged.changed and few.changed and lowered.changed
    assert merged.drift[0].correlation > 0.95 and few.drift[0].correlation > 0.99
    alone = optimised(entry, host, folder, "token-merge{r=2}")
    pair = np.corrcoef(outputs(result, args).ravel(), outputs(alone, args).ravel())
    assert pair[0, 1] > 0.99
    tokens = result.report.cost_after.tokens_per_block
    assert [int(n) for n in tokens] == [17, 15, 13]


@pytest.mark.parametrize("host", SLOW_ONNX)
def test_segment_merge_quantize_and_lower(host: str, folder: Path) -> None:
    entry = next(e for e in CODE if e.name == "codebert")
    args = entry.build(2).args
    result = optimised(entry, host, folder, "segment-merge{layer=1},quantize{bits=8},lower")
    plain = optimised(entry, host, folder, "segment-merge{layer=1}")
    segments = (torch.arange(args[0].shape[1]) // 2).expand(len(args[0]), -1).contiguous()
    found, wanted = (outputs(each, (*args, segments)) for each in (result, plain))
    assert found.shape == wanted.shape == outputs(optimised(entry, host, folder, ""), args).shape
    assert 0.99 < np.corrcoef(found.ravel(), wanted.ravel())[0, 1] < 1
    assert all(s.drift for s in result.report.passes if s.changed and not s.exact)


@pytest.mark.parametrize("host", SLOW_ONNX)
def test_dynamic_vocabulary_and_few_bits(host: str, folder: Path) -> None:
    """Ids of the vocabulary are embedded as before; a new id by the row that is given for it, in either order."""
    for passes in ("dynamic-vocab,quantize{bits=8 method=rtn}", "quantize{bits=8 method=rtn},dynamic-vocab"):
        report = attempt(SUBJECTS["bert"], host, folder, passes)
        assert report.passes[1].drift is not None
        few = attempt(SUBJECTS["bert"], host, folder, "quantize{bits=8 method=rtn}")
        assert report.drift[0].max_abs == pytest.approx(few.drift[0].max_abs, rel=0.3)


def test_window_and_few_bits_on_a_canvas() -> None:
    given = {"runtime": "torch", "context": 48, "threads": 1}
    whole = open_canvas(model_of("llada"), **given)
    few = open_canvas(model_of("llada"), bits=8, group=16, method="rtn", **given)
    assert few.settings["bits"] == 8 and few.settings["step_against_refresh"] <= 1e-5
    how = {"window": 12, "active": 4, "refresh": 5}
    one, other = (
        DiffusionGenerator.around(each.model, each.facts).generate([1, 2, 3], 24, **how)
        for each in (whole, few)
    )
    assert one.refreshes == other.refreshes == 5 and other.token_computations < other.token_computations_full
    assert other.new_tokens == 24
    # Chosen greedily from scores that lie far apart: rounding moves few choices, if any.
    assert np.mean(np.array(one.token_ids) == np.array(other.token_ids)) > 0.5


def test_drop_cache_few_bits_and_drafts_with_pictures() -> None:
    """Speculation commits what plain decoding of the same compiled model does, of a picture with a quarter left."""
    options = {"bits": 8, "method": "rtn"}
    plain = images.generator("torch", images.DROP, **options)
    drafting = images.generator("torch", images.DROP, drafter="ngram", guard=False, **options)
    ids, seen = images.prompt(1, 1), images.picture(1)
    one, other = (each.generate(ids, 16, images=seen, eos=[]) for each in (plain, drafting))
    assert one.token_ids == other.token_ids and other.speculation is not None
    assert other.speculation["rows_verified"] > 15


@pytest.mark.parametrize(
    ("first", "second"), [("token-gate", "segment-merge"), ("segment-merge", "token-gate")]
)
def test_a_gate_and_segments_are_for_different_graphs(first: str, second: str, folder: Path) -> None:
    found = composition.cell("torch", first, second, folder)
    left = "tokens that were merged or left out"
    wanted = f"{second} after {first}: the graph has {left} by then; "
    assert found.sentence == wanted + "the other order does not work either, so choose one of them"


# ---- the table -----------------------------------------------------------------------------------------
@cache
def lines(host: str) -> dict[tuple[str, str], str]:
    return composition.lines_of(composition.page().read_text(encoding="utf-8"), host)


@pytest.mark.parametrize(("first", "second"), composition.FAST)
def test_the_page_says_what_the_passes_do(first: str, second: str, folder: Path) -> None:
    assert composition.cell("torch", first, second, folder).line == lines("torch")[first, second]


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("first", composition.TEXTS)
def test_the_whole_page(first: str, host: str, folder: Path) -> None:
    found = [composition.cell(host, first, second, folder) for second in composition.TEXTS]
    known = lines(host)
    assert {(c.first, c.second): c.line for c in found if c.subject} == {
        pair: line for pair, line in known.items() if pair[0] == first
    }


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
def test_the_order_that_an_error_names_works(host: str) -> None:
    for (first, second), line in lines(host).items():
        if f"put {second} before {first}" in line:
            assert "works" in lines(host)[second, first]


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("where", ["before", "around", "after"])
def test_merging_in_front_of_where_a_file_makes_its_mask(where: str, host: str, folder: Path) -> None:
    """torch.onnx writes the mask right before the attention, behind where tokens merge (found by random pipelines)."""
    report = attempt(SUBJECTS["bert"], host, folder, f"token-merge{{r=2 where={where}}}")
    assert report.drift[0].correlation > 0.99
