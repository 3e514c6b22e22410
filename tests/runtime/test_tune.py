"""tune-kernels: measuring, the table's file, and that everything uses it."""

from __future__ import annotations

import json
import warnings

import numpy as np
import onnx
import pytest
import torch
from elision.kernels import OPS
from elision.passes.errors import ElisionError
from elision.passes.lowering import ONNXRUNTIME, TORCH_CPU, Choice, ShapeClass, Table
from elision.passes.lowering_defaults import DEFAULTS
from elision.runtime import doctor, tune, tune_onnx, tune_torch
from elision.runtime import table as tables
from elision.runtime.cli import main

import elision

SHAPE = ShapeClass.of("float32", "plain", tokens=16, width=4)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("ELISION_CACHE", str(folder))
    return folder


def measured(form: str = "attention") -> Table:
    return Table({("attention", ONNXRUNTIME): {SHAPE: Choice(form, 1.5)}}, "a test")


# ---- what is chosen ----------------------------------------------------------------------------------
def test_the_first_form_stays_unless_another_is_clearly_faster():
    def form(first: list[float], second: list[float]) -> tuple[str, float]:
        found = tune.chosen("op", SHAPE, {"first": first, "second": second})
        return found.choice.form, found.choice.gain

    assert form([2.0] * 8, [1.0] * 8) == ("second", 2.0)
    assert form([1.01] * 8, [1.0] * 8) == ("first", 1.0)
    # Only the slow runs of the first form are slower: a busy machine, not a better form.
    assert form([1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 9.0, 9.0], [1.0] * 8) == ("first", 1.0)


def test_every_form_of_every_case_computes_the_same():
    """The forms that are timed against each other are one function."""
    for case in tune_onnx.cases(ONNXRUNTIME, quick=True):
        outputs = [runner() for runner in case.make().values()]
        assert len(outputs) == len(tune_onnx.FORMS[case.op])
        for a, b in zip(*outputs, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4)


def test_the_forms_of_a_case_are_different_models(monkeypatch):
    """A case in which lowering makes the same of both forms would measure nothing."""
    models = []
    monkeypatch.setattr(tune_onnx, "plain_session", models.append)
    for case in tune_onnx.cases(ONNXRUNTIME, quick=True):
        models.clear()
        case.make()
        first, second = (sorted(n.op_type for n in onnx.load_from_string(m).graph.node) for m in models)
        assert first != second, case.op


def test_every_kernel_has_an_example():
    kernels, problem = tune_torch.kernels_of(TORCH_CPU)
    if problem:
        pytest.skip(problem)
    kernels = {name for name in kernels if not OPS[name].same_bits}  # among the others nothing is chosen
    assert kernels <= set(tune_torch.EXAMPLES)
    cases = tune_torch.cases(TORCH_CPU, quick=True)
    assert {case.op for case in cases} == kernels
    (found,) = tune.measure([case for case in cases if case.op == "mean_heads"], rounds=3, seconds=0.1)
    assert set(found.milliseconds) == {"reference", "kernel"} and min(found.milliseconds.values()) > 0


# ---- the file ----------------------------------------------------------------------------------------
def test_without_a_measurement_the_defaults_are_in_force(cache):
    assert tables.read(ONNXRUNTIME) is DEFAULTS
    assert not cache.exists()


def test_what_is_kept_is_read_again(cache):
    file = tables.save(ONNXRUNTIME, measured())
    assert file.parent == cache and [file] == list(cache.iterdir())
    found = tables.read(ONNXRUNTIME)
    assert found.entries == measured().entries and found.fallback is DEFAULTS
    assert json.loads(file.read_text())["conditions"]["onnxruntime"] == tables.version("onnxruntime")
    assert tables.read(TORCH_CPU) is DEFAULTS


@pytest.mark.parametrize("name", ["version", "processor", "vectors", "threads"])
def test_other_hardware_and_other_versions_have_tables_of_their_own(name, monkeypatch):
    tables.save(ONNXRUNTIME, measured())
    monkeypatch.setattr(tables, name, lambda *_: 7)
    assert tables.read(ONNXRUNTIME) is DEFAULTS


DAMAGE = {
    "cut off": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "not text": lambda text: "\udcff",
    "another format": lambda text: "[1, 2]",
    "another target": lambda text: text.replace('"onnxruntime": {', '"torch-cpu": {'),
    "another form": lambda text: text.replace('"attention",', "3,"),
    "deep": lambda text: "[" * 100_000,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_is_one_warning_and_the_defaults(how):
    file = tables.save(ONNXRUNTIME, measured())
    file.write_bytes(DAMAGE[how](file.read_text()).encode("utf-8", "surrogateescape"))
    with pytest.warns(UserWarning, match="is damaged") as caught:
        assert tables.read(ONNXRUNTIME) is DEFAULTS
    assert len(caught) == 1
    assert str(file) in str(caught[0].message) and "tune-kernels" in str(caught[0].message)


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ELISION_CACHE", str(tmp_path / "file" / "inside"))
    with pytest.raises(ElisionError, match="ELISION_CACHE"):
        tables.save(ONNXRUNTIME, measured())


# ---- who uses it -------------------------------------------------------------------------------------
class Attends(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        q, k, v = (part(x).unflatten(2, (2, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_export_and_optimize_take_the_measured_form(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 16, 8)
    kinds = []
    for form in ("joined_attention", "attention"):
        tables.save(ONNXRUNTIME, measured(form))
        result = elision.export_onnx(Attends(), (x,), tmp_path / "a.onnx", "lower")
        kinds.append({node.op_type for node in result.model.graph.node} & {"joined_attention", "attention"})
        again = elision.optimize(tmp_path / "a.onnx", "normalise,lower", (x.numpy(),))
        kinds.append({node.op_type for node in again.model.graph.node} & {"joined_attention", "attention"})
    assert kinds == [{"joined_attention"}] * 2 + [{"attention"}] * 2


def test_the_doctor_says_which_table_is_in_force():
    def found() -> dict[str, doctor.Finding]:
        return {finding.subject: finding for finding in doctor.examine()}

    assert "shipped" in found()["lowering table: onnxruntime"].detail
    file = tables.save(ONNXRUNTIME, measured())
    assert str(file) in found()["lowering table: onnxruntime"].detail
    file.write_text("no table")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "damaged" in found()["lowering table: onnxruntime"].detail


# ---- the command -------------------------------------------------------------------------------------
def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["tune-kernels", *arguments])
    return int(ended.value.code or 0)


def test_the_command_measures_and_writes(capsys, monkeypatch, cache):
    few = [case for case in tune_onnx.cases(ONNXRUNTIME, quick=True) if case.op == "add_norm"]
    monkeypatch.setattr(tune, "cases_of", lambda target, quick: few)
    assert command("--target", "onnxruntime", "--quick", "--json") == 0
    (document,) = json.loads(capsys.readouterr().out)
    assert document["target"] == "onnxruntime" and document["conditions"] == tables.conditions(ONNXRUNTIME)
    (item,) = document["measured"]
    assert item["operation"] == "add_norm" and set(item["milliseconds"]) == {"fused", "apart"}
    assert [str(file) for file in cache.iterdir()] == [document["file"]]
    assert tables.read(ONNXRUNTIME).count() == 1
    assert command("--target", "onnxruntime", "--quick") == 0
    assert "add_norm" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["onnxruntim", "mlir", "torch-cuda"])
def test_targets_that_cannot_be_measured(target, capsys):
    if target == "torch-cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command("--target", target, "--quick") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and target in error
