"""Small random-weight models of many architectures, made by the libraries people use.

Each takes well under a second on one core. Weights and inputs depend on nothing but names and seeds.
"""

from __future__ import annotations

from . import audio, diffusion, text, timm_models, vision
from .model import Built, ZooModel, pick, randomise, smooth_image

ZOO: dict[str, ZooModel] = {
    model.name: model for part in (vision, text, audio, timm_models, diffusion) for model in part.MODELS
}

__all__ = ["ZOO", "Built", "ZooModel", "pick", "randomise", "smooth_image"]
