"""`OnnxSteps` of a graph that says how much attention keys got (pass `key-scores`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from .h2o_model import layers_of, score_names
from .lm_onnx import OnnxSteps
from .lm_step import Rows


class ScoredOnnxSteps(OnnxSteps):
    """See `h2o_model.ScoredSteps`. Raises ElisionError for a graph without key scores."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._names = score_names(item.name for item in self._session.get_outputs())
        self.layers = layers_of(self._caches, len(self._names))

    def _run(self, rows: Rows, keep: np.ndarray, scored: int) -> None:
        for name, (keys, _) in zip(self._names, self.layers):
            self._output(name, (len(rows), *keys.shape[:2]), np.float32)
        super()._run(rows, keep, scored)

    def key_scores(self) -> list[np.ndarray]:
        return [self._outputs[name] for name in self._names]
