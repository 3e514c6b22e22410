"""elision.session is onnxruntime.InferenceSession."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

import elision

X = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)


def test_same_as_onnxruntime(onnx_file):
    ours = elision.session(onnx_file, providers=["CPUExecutionProvider"])
    theirs = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    assert isinstance(ours, onnxruntime.InferenceSession)
    assert ours.get_providers() == theirs.get_providers()
    assert np.array_equal(ours.run(None, {"x": X})[0], theirs.run(None, {"x": X})[0])


def test_options_reach_onnxruntime(onnx_file, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "seen.onnx")
    elision.session(onnx_file, sess_options=options)
    assert (tmp_path / "seen.onnx").exists()


def test_bytes(onnx_file):
    assert elision.session(onnx_file.read_bytes()).run(None, {"x": X})[0].shape == (3, 4)


def test_bad_files(tmp_path, onnx_file):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(onnx_file.read_bytes()[:100])
    for path in (tmp_path / "missing.onnx", tmp_path, broken, b"nonsense"):
        with pytest.raises(elision.ModelFileError) as caught:
            elision.session(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(elision.ElisionError) as caught:
        elision.session(onnx_file, sess_options="nonsense")
    assert "\n" not in str(caught.value)
