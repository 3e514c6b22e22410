"""`elision optimize` with the passes that add an input or bring weights: files that plain onnxruntime runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from elision.runtime.cli import app
from safetensors.numpy import save_file
from typer.testing import CliRunner

from tests.zoo import ZOO
from tests.zoo.export import onnx_file
from tests.zoo.text import LENGTH, WIDTH

MERGE = "segment-merge{layer=1 capacity=16}"


@pytest.fixture(scope="module")
def bert(zoo_folder: Path) -> Path:
    return onnx_file(ZOO["bert"], zoo_folder)


def example(batch: int = 2) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in ZOO["bert"].inputs(batch).items()}


def optimise(file: Path, passes: str, out: Path, **arrays: np.ndarray):
    """The report of the command as JSON, and a plain session of what it wrote; or the line of a mistake."""
    options = []
    if arrays:
        np.savez(out.with_suffix(".npz"), **arrays)
        options = ["--inputs", str(out.with_suffix(".npz"))]
    given = ["optimize", str(file), "-o", str(out), "-p", passes, "--force", "--json", *options]
    result = CliRunner().invoke(app, given)
    if result.exit_code:
        assert result.exit_code == 2 and not out.exists()
        (line,) = result.stderr.splitlines()
        return line, None
    return json.loads(result.stdout), onnxruntime.InferenceSession(out)


def named(report: dict, name: str) -> dict:
    return next(single for single in report["passes"] if single["name"] == name)


def test_segments_of_the_user(bert: Path, tmp_path: Path) -> None:
    words = np.sort(np.random.default_rng(0).integers(0, 14, (2, LENGTH)), axis=1)
    report, session = optimise(bert, MERGE, tmp_path / "m.onnx", **example(), segments=words)
    merged = named(report, "segment-merge")
    assert "outputs were compared with the units of the given segments" in merged["notes"]
    assert merged["drift"][0]["max_abs"] > 0
    assert [i.name for i in session.get_inputs()] == ["input_ids", "attention_mask", "segments"]
    (found,) = session.run(None, {**example(), "segments": words})
    plain = onnxruntime.InferenceSession(bert).run(None, example())[0]
    assert np.abs(found - plain).max() == pytest.approx(merged["drift"][0]["max_abs"], abs=1e-5)


@pytest.mark.parametrize("given", [True, False])
def test_segments_that_were_made_up(bert: Path, tmp_path: Path, given: bool) -> None:
    report, session = optimise(bert, MERGE, tmp_path / "m.onnx", **(example() if given else {}))
    notes = named(report, "segment-merge")["notes"]
    assert "outputs were compared with neighbours as units, evenly over the tokens" in notes
    assert report["drift"][0]["correlation"] > 0.5
    own = np.arange(LENGTH)[None].repeat(3, 0)
    assert np.isfinite(session.run(None, {**example(3), "segments": own})[0]).all()


def test_gates_out_of_a_file(bert: Path, tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal(WIDTH).astype(np.float32)
    gates = tmp_path / "gates.safetensors"
    save_file({"gate.weight": weight, "gate.bias": np.ones(1, np.float32)}, gates)
    text = f'token-gate{{layer=1 capacity=dynamic protect_ids=[1,2] gates="{gates}"}}'
    report, session = optimise(bert, text, tmp_path / "m.onnx", **example())
    assert "the longest sample's of 24 tokens at most are left" in named(report, "token-gate")["notes"][-1]
    three, one = session.run(None, example(3))[0], session.run(None, example(1))[0]
    np.testing.assert_allclose(three[:1], one, atol=1e-4)
    line, _ = optimise(bert, text.replace("gates.s", "missing.s"), tmp_path / "n.onnx", **example())
    assert "missing.safetensors" in line


def test_tables_of_new_ids(bert: Path, tmp_path: Path) -> None:
    """The given table is what verification runs with; ids of the vocabulary do not read it."""
    table = np.random.default_rng(0).standard_normal((3, WIDTH)).astype(np.float32)
    report, session = optimise(bert, "dynamic-vocab", tmp_path / "m.onnx", **example(), table=table)
    assert named(report, "dynamic-vocab")["drift"][0]["max_abs"] == 0
    feeds = {**example(), "table": table}
    plain = onnxruntime.InferenceSession(bert).run(None, example())[0]
    np.testing.assert_allclose(session.run(None, feeds)[0], plain, atol=1e-5)
    feeds["input_ids"] = feeds["input_ids"].copy()
    feeds["input_ids"][0, 3] = 102
    assert np.abs(session.run(None, feeds)[0][0] - plain[0]).max() > 1e-3


def test_bench_with_an_input_more(bert: Path, tmp_path: Path) -> None:
    """Under a pipeline with given or made-up segments, and against the file that was written."""
    words = np.arange(LENGTH)[None].repeat(2, 0) // 2
    np.savez(tmp_path / "in.npz", **example(), segments=words)
    common = ["--rounds", "3", "--force", "--json"]
    given = ["--inputs", str(tmp_path / "in.npz")]
    optimise(bert, MERGE, tmp_path / "m.onnx")
    for sides, more in (
        ([str(bert), "-p", MERGE], given),
        ([str(bert), "-p", MERGE], []),
        ([str(bert), str(tmp_path / "m.onnx")], given),
    ):
        result = CliRunner().invoke(app, ["bench", *sides, *more, *common])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["drift"][0]["max_abs"] > 0


@pytest.mark.parametrize(
    ("passes", "more", "sentence"),
    [
        (MERGE, {"units": np.zeros((2, LENGTH), np.int64)}, "no input is called 'units'"),
        (
            MERGE,
            {"segments": np.zeros((2, 5), np.int64)},
            "'segments' is int64 [2, 5], the new input is int64",
        ),
        (MERGE, {"segments": np.zeros((2, LENGTH), np.float32)}, "'segments' is float32 [2, 24]"),
        ("dynamic-vocab", {"table": np.zeros((3, 5), np.float32)}, "the new input is float32 [any, 32]"),
        (
            "token-gate{layer=1}",
            {"segments": np.zeros((2, LENGTH), np.int64)},
            "no input is called 'segments'",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(
    bert: Path, tmp_path: Path, passes: str, more: dict[str, np.ndarray], sentence: str
) -> None:
    line, _ = optimise(bert, passes, tmp_path / "m.onnx", **example(), **more)
    assert sentence in line
