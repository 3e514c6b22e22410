"""Models that come in parts: tokens dropped where the tower is, fewer of them read where the text is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from elision.passes.parts import Parts
from elision.runtime.api import open_onnx
from elision.runtime.cli import app
from typer.testing import CliRunner

import elision
from tests.passes.drop_models import call_of, hidden
from tests.zoo.export import quiet
from tests.zoo.vlm import VLMS
from tests.zoo.vlm_parts import part_files, parts_of

NAME = "llava_batch"
PASSES = "token-drop{policy=cls-topk budget=0.25 layer=-2}"
KEPT = 16


def optimized(folder: Path, *wanted: str, passes: str = PASSES, fixed: bool = False, **more: Any) -> Any:
    with quiet():
        return elision.optimize(part_files(NAME, folder, *wanted, fixed=fixed), passes, force=True, **more)


def ran(model: Any, *feeds: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return [np.asarray(x) for x in session.run(None, dict(zip(names, feeds, strict=True)))]


def wanted_logits(kept: np.ndarray, places: np.ndarray) -> np.ndarray:
    """What the eager model says of the tokens that are left when nothing attends to the others."""
    call = call_of(NAME)
    gone = torch.ones(call.args[0].shape, dtype=torch.bool).scatter(1, torch.from_numpy(places), False)
    assert int(gone.sum()) == len(kept) * (64 - KEPT)
    found = hidden(call, gone)
    return torch.take_along_dim(found, torch.from_numpy(places)[..., None], 1).numpy()


def test_vision_and_language_are_one_call(zoo_folder: Path) -> None:
    result = optimized(
        zoo_folder, "vision", "embed", "language", passes="token-drop{policy=cls-topk budget=0.25}"
    )
    assert list(result.parts) == ["vision", "embed", "language"]
    assert result["language"].untouched and result["embed"].untouched and not result["vision"].untouched
    assert any(
        "language must have a placeholder for each token that is left" in note for note in result.notes
    )
    ids, mask, pixels = (x.numpy() for x in call_of(NAME).args)
    features, kept = ran(result["vision"].model, pixels)
    assert features.shape == (2, KEPT, 64) and kept.shape == (2, KEPT)
    whole = ran(part_files(NAME, zoo_folder, "vision")["vision"], pixels)[0]
    np.testing.assert_allclose(features, np.take_along_axis(whole, kept[..., None], 1), atol=1e-5)
    short, places = elision.drop_placeholders(ids, kept, VLMS[NAME].placeholder)
    assert short.shape == (2, 77 - 64 + KEPT)
    embeds = ran(result["embed"].model, short)[0]
    embeds[short == VLMS[NAME].placeholder] = features.reshape(-1, 64)
    logits = ran(result["language"].model, embeds, np.take_along_axis(mask, places, 1), places)[0]
    np.testing.assert_allclose(logits, wanted_logits(kept, places), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_tower_a_projector_and_a_text_that_writes_the_features_itself(zoo_folder: Path) -> None:
    result = optimized(zoo_folder, "tower", "projector", "text")
    assert (
        "token-drop: %last_hidden_state of tower goes into %states of projector (they have the same shape)"
        in (result.notes)
    )
    assert any("goes into %image_features of text (they have the same name)" in n for n in result.notes)
    ids, mask, pixels = (x.numpy() for x in call_of(NAME).args)
    states, pooled, kept = ran(result["tower"].model, pixels)
    assert states.shape == (2, KEPT + 1, 32) and pooled.shape == (2, 32) and (kept[:, 0] == 0).all()
    features = ran(result["projector"].model, states)[0]
    short, places = elision.drop_placeholders(ids, kept, VLMS[NAME].placeholder, before=1)
    logits = ran(result["text"].model, short, features, np.take_along_axis(mask, places, 1), places)[0]
    np.testing.assert_allclose(logits, wanted_logits(kept[:, 1:], places), atol=1e-4, rtol=1e-4)


def test_a_picture_is_judged_alone(zoo_folder: Path) -> None:
    model = optimized(zoo_folder, "vision")["vision"].model
    pixels = call_of(NAME).args[2].numpy()
    together = ran(model, pixels)
    for row in range(2):
        alone = ran(model, pixels[row : row + 1])
        np.testing.assert_array_equal(alone[1][0], together[1][row])
        np.testing.assert_allclose(alone[0][0], together[0][row], atol=1e-5)


@pytest.mark.slow
def test_a_budget_of_one_leaves_every_part_as_it_is(zoo_folder: Path) -> None:
    result = optimized(zoo_folder, "tower", "projector", "text", passes="token-drop{budget=1}")
    assert all(one.untouched for one in result.parts.values())


@pytest.mark.parametrize(
    ("wanted", "fixed", "message"),
    [
        (
            ("tower", "projector"),
            True,
            "part projector takes exactly 65 tokens in %states: export it with a symbolic number of them",
        ),
        pytest.param(
            ("vision", "text"),
            True,
            "part text takes exactly 64 tokens in %image_features",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("vision", "embed", "language"),
            True,
            "part language takes texts of exactly 77 tokens",
            marks=pytest.mark.slow,
        ),
        (("embed", "language"), False, "no part has a tower whose attention scores the tokens"),
        (("vision", "tower", "language"), False, "the parts vision and tower all have a tower"),
    ],
)
def test_parts_that_cannot_take_fewer(
    wanted: tuple[str, ...], fixed: bool, message: str, zoo_folder: Path
) -> None:
    with pytest.raises(elision.Refused, match=message) as error:
        optimized(zoo_folder, *wanted, fixed=fixed)
    assert "\n" not in str(error.value)


def test_modules_are_parts_too() -> None:
    parts = parts_of(NAME, "tower", "projector")
    with quiet():
        result = elision.optimize_parts(
            {name: part.module for name, part in parts.items()},
            PASSES,
            {name: part.args for name, part in parts.items()},
            dynamic_shapes={name: part.dynamic for name, part in parts.items()},
            force=True,
        )
    with torch.no_grad():
        (states, _), kept = result["tower"].module(*parts["tower"].args)
        features = result["projector"].module(states)
        whole = parts["projector"].module(*parts["projector"].args)
    picked = torch.take_along_dim(whole, kept[:, 1:, None].long() - 1, 1)
    torch.testing.assert_close(features, picked, atol=1e-4, rtol=1e-4)


def test_other_passes_run_on_the_parts_that_they_fit(zoo_folder: Path) -> None:
    result = optimized(zoo_folder, "vision", "embed", passes=f"{PASSES},quantize{{bits=8}}")
    assert not result["vision"].untouched
    names = [single.name for single in result["vision"].report.passes]
    assert "token-drop" in names and "quantize" in names


# ---- links -----------------------------------------------------------------------------------------------
def test_names_go_before_shapes(zoo_folder: Path) -> None:
    files = part_files(NAME, zoo_folder, "vision", "embed", "language")
    parts = Parts({name: open_onnx(file) for name, file in files.items()})
    assert [(link.source, link.target, link.by) for link in parts.links] == [("embed", "language", "name")]
    alone = Parts({name: open_onnx(files[name]) for name in ("vision", "language")})
    assert [(link.source, link.target, link.by) for link in alone.links] == [("vision", "language", "shape")]


# ---- the command line ------------------------------------------------------------------------------------
def said(*words: str) -> Any:
    return CliRunner().invoke(app, ["optimize", *words])


def test_the_command_writes_all_parts(zoo_folder: Path, tmp_path: Path) -> None:
    files = part_files(NAME, zoo_folder, "vision", "language")
    folder = tmp_path / "out"
    words = [f"--part={name}={file}" for name, file in files.items()]
    found = said(*words, "-p", PASSES, "-o", str(folder), "--force")
    assert found.exit_code == 0, found.output
    assert sorted(file.name for file in folder.iterdir()) == ["language.onnx", "vision.onnx"]
    assert "elision.drop_placeholders" in " ".join(found.output.split())
    pixels = call_of(NAME).args[2].numpy()
    assert ran(folder / "vision.onnx", pixels)[0].shape == (2, KEPT, 64)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--part", "vision"], "a part is given as NAME=FILE.onnx"),
        (["--part", "a=x.onnx", "--part", "a=y.onnx"], "there is a part a already"),
        (["--part", "a=no.onnx", "--dry-run"], "no.onnx: no such file"),
        (["--part", "a=no.onnx"], "say into which folder"),
        (["--part", "a=no.onnx", "-o", "/nowhere/at/all"], "no folder, and none can be made"),
        (["--part", "a=no.onnx", "m.onnx", "--dry-run"], "with --part there is no other file"),
        ([], "say which file, or which parts"),
    ],
)
def test_parts_that_are_none(words: list[str], message: str) -> None:
    found = said(*words)
    assert found.exit_code == 2
    assert message in " ".join(found.output.split())


def test_examples_of_a_part_that_is_none(zoo_folder: Path) -> None:
    with pytest.raises(elision.ElisionError, match="there is no part 'text'; the model has vision"):
        optimized(zoo_folder, "vision", example_inputs={"text": ()})


def test_a_failed_part_leaves_no_file(zoo_folder: Path, tmp_path: Path) -> None:
    files = part_files(NAME, zoo_folder, "tower", "projector", fixed=True)
    words = [f"--part={name}={file}" for name, file in files.items()]
    assert said(*words, "-p", PASSES, "-o", str(tmp_path / "out"), "--force").exit_code == 2
    assert not (tmp_path / "out").exists()
