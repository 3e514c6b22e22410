"""The command line: what commands print; every mistake is one line on stderr with exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from elision.runtime.cli import app
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import elision

from . import toys

DROP = "toy-drop-relu"


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def said(result) -> str:
    """The one line of a mistake."""
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("elision: ")
    assert "internal error" not in lines[0]
    return lines[0]


# ---- what works --------------------------------------------------------------------------------------
def test_help_names_every_command():
    result = run()
    assert result.exit_code == 0
    for command in ("explain", "optimize", "diff", "bench", "passes", "reproduce", "doctor"):
        assert command in result.stdout


def test_version():
    assert run("--version").stdout.strip() == f"elision {elision.__version__}"


def test_module_entry_point():
    done = subprocess.run([sys.executable, "-m", "elision", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_optimize(onnx_file, tmp_path):
    result = run("optimize", onnx_file, "-o", tmp_path / "out.onnx", "--passes", DROP)
    assert result.exit_code == 0, result.output
    assert DROP in result.stdout and "operations:" in result.stdout and "wrote" in result.stdout
    onnx.checker.check_model(onnx.load(tmp_path / "out.onnx"))
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]


def test_optimize_json_and_dry_run(onnx_file, tmp_path):
    result = run("optimize", onnx_file, "-o", tmp_path / "out.onnx", "-p", DROP, "--json", "--dry-run")
    data = json.loads(result.stdout)
    assert result.exit_code == 0
    assert data["written"] is None
    assert {p["name"]: p for p in data["passes"]}[DROP]["statistics"] == {"relus": 1}
    assert data["drift"][0]["output"] == "y"
    assert not list(tmp_path.iterdir())


def test_optimize_with_inputs_and_report(onnx_file, tmp_path):
    np.savez(tmp_path / "inputs.npz", x=np.zeros((3, 8), np.float32))
    out, report = tmp_path / "out.onnx", tmp_path / "report.html"
    result = run(
        "optimize", onnx_file, "-o", out, "-p", DROP, "--inputs", tmp_path / "inputs.npz", "--report", report
    )
    assert result.exit_code == 0, result.output
    assert report.read_text().startswith("<!doctype html>")
    assert len(onnx.load(out).graph.output) == 1


def test_diff(onnx_file, tmp_path):
    run("optimize", onnx_file, "-o", tmp_path / "b.onnx", "-p", DROP)
    result = run("diff", onnx_file, tmp_path / "b.onnx")
    assert result.exit_code == 0
    assert "- " in result.stdout and "Relu" in result.stdout
    data = json.loads(run("diff", onnx_file, tmp_path / "b.onnx", "--json").stdout)
    assert data["changes"]["removed"] >= 1
    assert "the same" in run("diff", onnx_file, onnx_file).stdout


def test_bench(onnx_file, tmp_path):
    run("optimize", onnx_file, "-o", tmp_path / "b.onnx", "-p", DROP)
    result = run("bench", onnx_file, tmp_path / "b.onnx", "--rounds", 3)
    assert result.exit_code == 0, result.output
    assert "times as fast" in result.stdout
    data = json.loads(run("bench", onnx_file, "--passes", DROP, "--rounds", 3, "--json").stdout)
    assert [side["runs"] for side in data["sides"]] == [3, 3]
    assert data["ratio_low"] <= data["ratio"] <= data["ratio_high"]


def test_explain(onnx_file):
    assert run("explain", onnx_file).exit_code == 0
    json.loads(run("explain", onnx_file, "--json").stdout)


def test_passes():
    assert DROP in run("passes").stdout
    said = "how many of the largest logits"
    assert said in run("passes", "head").stdout and said not in run("passes").stdout
    (found,) = json.loads(run("passes", DROP, "--json").stdout)
    assert found["options"] == [{"name": "times", "type": "an integer", "default": "1", "help": ""}]


def test_doctor():
    result = run("doctor", "--json")
    findings = {finding["subject"]: finding for finding in json.loads(result.stdout)}
    assert findings["onnxruntime"]["state"] == "ok"
    assert findings["torch.compile backend"]["state"] == "ok"
    assert "onnxruntime" in run("doctor").stdout


def test_failing_pass_leaves_a_reproducer(onnx_file, tmp_path):
    out = tmp_path / "out.onnx"
    line = said(run("optimize", onnx_file, "-o", out, "-p", "toy-crash"))
    (written,) = tmp_path.iterdir()
    assert str(written) in line
    result = run("reproduce", written)
    assert result.exit_code == 0
    assert "fails the same way" in result.stdout
    assert json.loads(run("reproduce", written, "--json").stdout)["same"] is True


def test_refusal_leaves_a_reproducer_only_on_request(onnx_file, tmp_path):
    out, kept = tmp_path / "out.onnx", tmp_path / "kept.json"
    said(run("optimize", onnx_file, "-o", out, "-p", "toy-drop-relu{times=-1}"))
    assert not list(tmp_path.iterdir())
    said(run("optimize", onnx_file, "-o", out, "-p", "toy-drop-relu{times=-1}", "--reproducer", kept))
    assert [p.name for p in tmp_path.iterdir()] == ["kept.json"]


# ---- mistakes ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments, text",
    [
        (["nonsense"], "nonsense"),
        (["optimize"], "FILE.onnx"),
        (["optimize", "{model}"], "-o"),
        (["optimize", "{model}", "-o", "{out}", "-p", "toy-drop-rleu"], "toy-drop-relu"),
        (["optimize", "{model}", "-o", "{out}", "-p", "toy-drop-relu{tmies=1}"], "times"),
        (["optimize", "{model}", "-o", "{out}", "-p", "toy-drop-relu{times=-1}"], "cannot"),
        (["optimize", "{model}", "-o", "{out}", "-p", "toy-drop-relu{times=2"], "never closed"),
        (["optimize", "{missing}", "-o", "{out}"], "no such file"),
        (["optimize", "{folder}", "-o", "{out}"], "folder"),
        (["optimize", "{model}", "-o", "{folder}/no/out.onnx"], "no such folder"),
        (["optimize", "{model}", "-o", "{folder}"], "a folder"),
        (["optimize", "{model}", "-o", "{out}", "--inputs", "{missing}"], "no such file"),
        (["optimize", "{model}", "-o", "{out}", "--inputs", "{model}"], "npz"),
        (["optimize", "{model}", "-o", "{out}", "--nonsense"], "--nonsense"),
        (["diff", "{model}"], "B.onnx"),
        (["diff", "{model}", "{missing}"], "no such file"),
        (["bench", "{model}"], "--passes"),
        (["bench", "{model}", "{model}", "--passes", DROP], "not both"),
        (["bench", "{model}", "{model}", "--rounds", "1"], "rounds"),
        (["bench", "{model}", "{model}", "--rounds", "many"], "--rounds"),
        (["explain", "{missing}"], "no such file"),
        (["passes", "toy-drop-rleu"], "toy-drop-relu"),
        (["reproduce", "{missing}"], "no such file"),
        (["reproduce", "{model}"], "not a reproducer"),
    ],
)
def test_mistakes(onnx_file, tmp_path, arguments, text):
    names = {
        "model": onnx_file,
        "missing": tmp_path / "missing",
        "folder": tmp_path,
        "out": tmp_path / "o.onnx",
    }
    filled = []
    for argument in arguments:
        for name, value in names.items():
            argument = argument.replace("{" + name + "}", str(value))
        filled.append(argument)
    assert text in said(run(*filled))
    assert not list(tmp_path.iterdir())


def test_read_only_folder(onnx_file, tmp_path, monkeypatch):
    """Root may write anywhere, so the refusal of the system is played."""
    import tempfile

    def refused(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    assert "Permission denied" in said(run("optimize", onnx_file, "-o", tmp_path / "out.onnx", "-p", DROP))


def test_external_data_outside_the_folder_is_refused(tmp_path):
    model = toys.onnx_model()
    tensor = model.graph.initializer[0]
    raw = onnx.numpy_helper.to_array(tensor).tobytes()
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(raw)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": "../secret.bin", "length": str(len(raw))}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    for command in (["explain"], ["optimize", "-o", folder / "out.onnx"]):
        assert "outside" in said(run(*command[:1], folder / "model.onnx", *command[1:]))
    assert [p.name for p in folder.iterdir()] == ["model.onnx"]


def test_a_model_without_attention(onnx_file, tmp_path):
    if "token-merge" not in elision.known_passes():
        pytest.fail("token-merge is not registered")
    line = said(run("optimize", onnx_file, "-o", tmp_path / "out.onnx", "-p", "token-merge{r=4}"))
    assert "attention" in line
    assert not list(tmp_path.iterdir())


# ---- anything at all ---------------------------------------------------------------------------------
quick = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

ORIGINAL = toys.onnx_model().SerializeToString()


@st.composite
def mutated(draw) -> bytes:
    """The file cut off, with bytes flipped, pieces removed or put in."""
    data = bytearray(ORIGINAL)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["cut", "flip", "remove", "insert", "set"])):
            case "cut":
                del data[at:]
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "remove":
                del data[at : at + draw(st.integers(1, 20))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "set" if data:
                data[at] = draw(st.integers(0, 255))
    return bytes(data)


@quick
@given(data=mutated(), command=st.sampled_from(["optimize", "explain", "diff"]))
def test_mutated_files(tmp_path, onnx_file, data, command):
    path, out = tmp_path / "mutated.onnx", tmp_path / "out.onnx"
    path.write_bytes(data)
    out.unlink(missing_ok=True)
    rest = {"optimize": ["-o", out, "-p", DROP], "explain": [], "diff": [onnx_file]}[command]
    result = run(command, path, *rest)
    if result.exit_code == 0:
        return  # the change hit a weight or a name
    said(result)
    assert {p.name for p in tmp_path.iterdir()} <= {"mutated.onnx", "mutated.reproducer.json"}


@quick
@given(
    text=st.one_of(
        st.text(max_size=30),
        st.text(alphabet='toy-dropelu{}[]=," 0123456789.\\timesnf', max_size=40),
        st.sampled_from([DROP, f"{DROP}{{times=2}}", "token-merge{r=16}"]).flatmap(
            lambda text: st.tuples(st.integers(0, len(text)), st.text(max_size=3)).map(
                lambda change: text[: change[0]] + change[1] + text[change[0] + 1 :]
            )
        ),
    )
)
def test_mutated_pipelines(tmp_path, onnx_file, text):
    out = tmp_path / "out.onnx"
    out.unlink(missing_ok=True)
    result = run("optimize", onnx_file, "-o", out, f"--passes={text}")
    if result.exit_code == 0:
        assert out.exists()
        return
    said(result)
    assert not [p for p in tmp_path.iterdir() if "reproducer" not in p.name]


def test_nothing_is_left_in_the_current_folder(tmp_path, onnx_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("optimize", onnx_file, "--dry-run", "-p", DROP).exit_code == 0
    assert not list(tmp_path.iterdir())
