"""Small models and two toy passes for the runtime's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from . import toys


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def model() -> torch.nn.Module:
    return toys.two_relus()


@pytest.fixture(scope="session")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with one symbolic batch axis, two Relus and a few weights."""
    path = tmp_path_factory.mktemp("models") / "model.onnx"
    path.write_bytes(toys.onnx_model().SerializeToString())
    return path
