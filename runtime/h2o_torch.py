"""`TorchSteps` of a graph that says how much attention keys got (pass `key-scores`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .h2o_model import layers_of, score_names
from .lm_step import Rows
from .lm_torch import TorchSteps


class ScoredTorchSteps(TorchSteps):
    """See `h2o_model.ScoredSteps`. Raises ElisionError for a graph without key scores."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        names = score_names(self._outputs)
        self._scored = [self._outputs.index(name) for name in names]
        self.layers = layers_of(self._block, len(names))
        self._last: list[np.ndarray] = []

    def _run(self, rows: Rows, keep: np.ndarray, scored: int) -> list[torch.Tensor]:
        results = super()._run(rows, keep, scored)
        self._last = [results[place].numpy() for place in self._scored]
        return results

    def key_scores(self) -> list[np.ndarray]:
        return self._last
