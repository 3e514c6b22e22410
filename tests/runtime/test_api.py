"""elision.optimize, Result and elision.export_onnx."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import elision

from . import toys

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def test_import_is_light():
    heavy = ("torch", "onnx", "onnxruntime", "rich")
    code = f"import sys, elision; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists():
    for name in elision.__all__:
        assert getattr(elision, name) is not None
    with pytest.raises(AttributeError):
        _ = elision.nonsense


@pytest.mark.parametrize("times", [1, 2])
def test_module(model, times):
    result = elision.optimize(model, f"toy-drop-relu{{times={times}}}", (X,))
    torch.testing.assert_close(result.module(X), toys.without_relus(model, X, times))
    assert result.report.passes[0].statistics == {"relus": times}
    assert result.report.drift[0].max_abs > 0
    with pytest.raises(AttributeError, match="module"):
        _ = result.model


@pytest.mark.parametrize("example", [(X,), [X], {"input": X}, X], ids=["tuple", "list", "dict", "tensor"])
def test_forms_of_example_inputs(model, example):
    result = elision.optimize(model, "toy-drop-relu", example)
    torch.testing.assert_close(result.module(X), toys.without_relus(model, X, 1))


def test_original_is_untouched_and_weights_are_shared(model):
    before = model(X)
    result = elision.optimize(model, "toy-drop-relu", (X,))
    assert torch.equal(model(X), before)
    result.module(X).sum().backward()
    assert model[0].weight.grad is not None


def test_exported_program_and_graph_module(model):
    program = torch.export.export(model, (X,))
    expected = toys.without_relus(model, X, 1)
    torch.testing.assert_close(elision.optimize(program, "toy-drop-relu").module(X), expected)
    traced = program.module()
    torch.testing.assert_close(elision.optimize(traced, "toy-drop-relu", (X,)).module(X), expected)
    symbolic = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(elision.optimize(symbolic, "toy-drop-relu", (X,)).module(X), expected)


def test_dynamic_batch(model):
    shapes = ({0: torch.export.Dim("batch")},)
    result = elision.optimize(model, "toy-drop-relu", (X,), dynamic_shapes=shapes)
    assert result.module(torch.zeros(7, 8)).shape == (7, 4)


def test_torch_result_is_saved_as_an_exported_program(model, tmp_path):
    shapes = ({0: torch.export.Dim("batch")},)
    result = elision.optimize(model, "toy-drop-relu", (X,), dynamic_shapes=shapes)
    result.save(tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    other = torch.randn(6, 8)
    torch.testing.assert_close(loaded(other), result.module(other))
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]


def test_onnx_path_and_proto(onnx_file, tmp_path):
    x = X.numpy()
    for target in (onnx_file, str(onnx_file), onnx.load(onnx_file)):
        result = elision.optimize(target, "toy-drop-relu{times=2}", (x,))
        assert isinstance(result.model, onnx.ModelProto)
        result.save(tmp_path / "out.onnx")
        (after,) = elision.session(tmp_path / "out.onnx").run(None, {"x": x})
        assert (after < 0).any()
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]


def test_onnx_without_passes_is_the_same_function(onnx_file):
    result = elision.optimize(onnx_file)
    before = elision.session(onnx_file).run(None, {"x": X.numpy()})[0]
    after = elision.session(result.model.SerializeToString()).run(None, {"x": X.numpy()})[0]
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)


def test_export_onnx(model, tmp_path):
    path = tmp_path / "model.onnx"
    shapes = ({0: torch.export.Dim("batch")},)
    elision.export_onnx(model, (X,), path, passes="toy-drop-relu", dynamic_shapes=shapes)
    loaded = elision.session(path)
    other = torch.randn(3, 8)
    (found,) = loaded.run(None, {loaded.get_inputs()[0].name: other.numpy()})
    np.testing.assert_allclose(found, toys.without_relus(model, other, 1).detach().numpy(), atol=1e-5)


BAD_MODULE_INPUTS = {
    "too many": (X, X),
    "too few": (),
    "shape": (torch.zeros(4, 7),),
    "name": {"nonsense": X},
    "text": "abc",
    "number": 3,
    "none": None,
}


@pytest.mark.parametrize("example", BAD_MODULE_INPUTS.values(), ids=BAD_MODULE_INPUTS.keys())
def test_module_inputs_that_do_not_fit(model, example, tmp_path):
    with pytest.raises(elision.ElisionError) as caught:
        elision.optimize(model, "toy-drop-relu", example)
    assert "\n" not in str(caught.value)
    with pytest.raises(elision.ElisionError) as caught:
        elision.export_onnx(model, example, tmp_path / "out.onnx", passes="toy-drop-relu")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


BAD_ONNX_INPUTS = {
    "too many": (X, X),
    "shape": (np.zeros((4, 7), np.float32),),
    "rank": (np.zeros(8, np.float32),),
    "type": (np.zeros((4, 8), np.float64),),
    "name": {"nonsense": X},
    "missing": {},
    "object": (object(),),
    "ragged": ([[1.0], [1.0, 2.0]],),
    "text": "abc",
}


@pytest.mark.parametrize("example", BAD_ONNX_INPUTS.values(), ids=BAD_ONNX_INPUTS.keys())
def test_onnx_inputs_that_do_not_fit(onnx_file, example):
    with pytest.raises(elision.ElisionError) as caught:
        elision.optimize(onnx_file, "toy-drop-relu", example)
    assert "\n" not in str(caught.value)


def test_errors_of_passes_come_through(model, onnx_file):
    with pytest.raises(elision.NothingMatched):
        elision.optimize(torch.nn.Linear(8, 8), "toy-drop-relu", (X,))
    with pytest.raises(elision.Refused):
        elision.optimize(onnx_file, "toy-drop-relu{times=-1}")
    with pytest.raises(elision.PipelineError, match="toy-drop-relu"):
        elision.optimize(model, "toy-drop-rleu", (X,))
    with pytest.raises(elision.ElisionError, match="int"):
        elision.optimize(3, "toy-drop-relu", (X,))  # type: ignore[arg-type]


def test_saving_where_it_cannot_be(model, onnx_file, tmp_path):
    torch_result = elision.optimize(model, "toy-drop-relu", (X,))
    onnx_result = elision.optimize(onnx_file, "toy-drop-relu")
    for path in (tmp_path / "no" / "x.pt2", tmp_path / "x.onnx", tmp_path):
        with pytest.raises(elision.ElisionError):
            torch_result.save(path)
    for path in (tmp_path / "no" / "x.onnx", tmp_path / "x.pt2", tmp_path):
        with pytest.raises(elision.ElisionError):
            onnx_result.save(path)
    assert not list(Path(tmp_path).iterdir())
