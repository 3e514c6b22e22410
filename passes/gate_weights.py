"""The weights of a delete gate: fresh ones, and trained ones out of arrays under whatever names they were saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import PipelineError

GateWeights = tuple[np.ndarray, np.ndarray]
"""weight [C] and bias [1], float32."""


def fresh_gate(width: int, seed: int) -> GateWeights:
    """Xavier's uniform weight and a bias of 1, with which most tokens stay (MrT5)."""
    most = (6 / (width + 1)) ** 0.5
    drawn = np.random.default_rng(seed).uniform(-most, most, width)
    return drawn.astype(np.float32), np.ones(1, np.float32)


def read_gate(arrays: Mapping[str, Any], where: str) -> GateWeights:
    """The gate among `arrays` (tensors or arrays): the one whose name ends in "weight", [C] or [1, C], and that which
    ends in "bias". The weight of a norm, [C], by a name with "norm" in it, is multiplied in. Raises PipelineError."""
    found: dict[str, list[np.ndarray]] = {"weight": [], "bias": [], "norm": []}
    for name, item in arrays.items():
        what = "norm" if "norm" in name else next((k for k in ("weight", "bias") if name.endswith(k)), None)
        if what is not None:
            found[what].append(_flat(item))
    counts = {what: len(items) for what, items in found.items()}
    if counts["weight"] != 1 or counts["bias"] != 1 or counts["norm"] > 1:
        raise PipelineError(
            f"{where}: a gate is one weight and one bias, not {', '.join(sorted(arrays)) or 'nothing'}"
        )
    weight, bias = found["weight"][0], found["bias"][0]
    if found["norm"]:
        if found["norm"][0].shape != weight.shape:
            raise PipelineError(f"{where}: the norm has {len(found['norm'][0])} channels, not {len(weight)}")
        weight = weight * found["norm"][0]
    if bias.shape != (1,):
        raise PipelineError(f"{where}: the bias of a gate is one number, not {len(bias)}")
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise PipelineError(f"{where}: the gate has numbers that are not finite")
    return weight, bias


def _flat(item: Any) -> np.ndarray:
    if hasattr(item, "detach"):
        item = item.detach().cpu().float().numpy()
    return np.asarray(item, np.float32).reshape(-1)
