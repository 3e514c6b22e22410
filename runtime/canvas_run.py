"""Runs the two graphs of a canvas: see `canvas_step.CanvasModel`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..passes.errors import ElisionError
from .canvas_rules import scored_of
from .canvas_step import Scored
from .inputs import first_line
from .lm_onnx import OnnxSteps, start_session
from .lm_step import Rows
from .lm_torch import TorchSteps

REFRESH, STEP = "refresh.onnx", "step.onnx"


class _Refreshing(Protocol):
    """A refresh graph: its outputs by name, of inputs by name."""

    inputs: list[str]
    outputs: list[str]

    def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]: ...


class Canvases:
    """Both graphs, in either host. Keys and values of a refresh are copied into the caches of the steps."""

    def __init__(self, steps: OnnxSteps | TorchSteps, refresh: _Refreshing) -> None:
        self._steps, self._refresh = steps, refresh
        self.capacity, self.vocabulary, self.largest_k = steps.capacity, steps.vocabulary, steps.largest_k
        # key_cache.3 holds what the refresh puts out as key.3
        self._rows = {name.replace("_cache", ""): view for name, view in steps.caches.items()}

    def refresh(self, start: int, ids: np.ndarray, keep: np.ndarray, whole: bool = False) -> Scored:
        count, keep = len(ids), np.asarray(keep, np.int64)
        feeds = {
            "input_ids": np.ascontiguousarray(ids, np.int64)[None],
            "attention_mask": np.ones((1, count), np.int64),
            "position_ids": np.arange(count)[None],
            "keep": keep,
            "ask": np.arange(len(keep) if whole or "indices" not in self._refresh.outputs else 0),
        }
        found = self._refresh({name: feeds[name] for name in self._refresh.inputs})
        for name, view in self._rows.items():
            view[:, start : start + count] = found[name][0]
        logits = found[self._refresh.outputs[0]][0]
        if "indices" not in found:
            return scored_of(logits if "keep" in self._refresh.inputs else logits[keep], self.largest_k)
        spread = found["spread"][0]
        return Scored(
            found["indices"][0],
            found["values"][0],
            spread[:, 0],
            spread[:, 1],
            logits if whole else None,
        )

    def step(self, rows: Rows, keep: np.ndarray, whole: bool = False) -> Scored:
        found, spread, logits = self._steps.scored(rows, np.asarray(keep, np.int64), whole)
        if spread is None:
            assert logits is not None
            return scored_of(logits, self.largest_k)
        return Scored(found.ids, found.values, spread[:, 0], spread[:, 1], logits)


class OnnxRefresh:
    """In ONNX Runtime."""

    def __init__(self, model: Path | bytes, threads: int) -> None:
        self._session = start_session(model, threads)
        self.inputs = [item.name for item in self._session.get_inputs()]
        self.outputs = [item.name for item in self._session.get_outputs()]

    def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            return dict(zip(self.outputs, self._session.run(None, feeds)))
        except Exception as error:  # onnxruntime's own exceptions share no base but Exception
            raise ElisionError(f"onnxruntime cannot run the refresh graph: {first_line(error)}") from error


class TorchRefresh:
    """In PyTorch. module: takes the inputs called `inputs`, in this order, and gives a flat list of `outputs`."""

    def __init__(self, module: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self._module, self.inputs, self.outputs = module, list(inputs), list(outputs)

    def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        with torch.inference_mode():
            results = self._module(*[torch.from_numpy(feeds[name]) for name in self.inputs])
        return {name: result.numpy() for name, result in zip(self.outputs, results)}


def start_canvas(folder: Path, runtime: str, vocabulary: int, threads: int) -> Canvases:
    """The runner of a compiled folder. Raises ModelFileError for a damaged one."""
    if runtime == "onnxruntime":
        return Canvases(
            OnnxSteps(folder / STEP, vocabulary, None, threads), OnnxRefresh(folder / REFRESH, threads)
        )
    from .lm_torch_file import load

    (step, names), (refresh, its) = load(folder / "step"), load(folder / "refresh")
    steps = TorchSteps(step, names["inputs"], names["outputs"], names["caches"], vocabulary, threads=threads)
    return Canvases(steps, TorchRefresh(refresh, its["inputs"], its["outputs"]))
