"""Runs a step graph in ONNX Runtime. Caches are input and output in one: the kernels write new rows in place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..passes.errors import ElisionError, ModelFileError
from .inputs import first_line
from .lm_step import Rows, named_inputs

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}


class OnnxSteps:
    """See `lm_step.StepModel`. model: a file, whose external data are mapped, or a serialised model. prelude: of an
    encoder-decoder, the graph that computes what the decoder attends to."""

    def __init__(
        self, model: Path | bytes, vocabulary: int, prelude: Path | bytes | None = None, threads: int = 0
    ) -> None:
        self._session = _session(model, threads)
        self._binding = self._session.io_binding()
        self._inputs = {item.name: item for item in self._session.get_inputs()}
        self._scores = self._session.get_outputs()[0].name
        self._keeps = "keep" in self._inputs
        self._held: dict[str, np.ndarray] = {}
        made = {item.name for item in self._session.get_outputs()}
        caches = [name for name in self._inputs if f"{name}.out" in made]
        if not caches:
            raise ModelFileError("the step graph has no caches")
        for name in caches:
            item = self._inputs[name]
            cache = self._held[name] = np.zeros(tuple(item.shape), _TYPES[item.type])
            self._bind(name, cache)
            self._bind_output(f"{name}.out", cache)
        for extra in made - {self._scores} - {f"{name}.out" for name in caches}:
            self._binding.bind_output(extra, "cpu")
        self.capacity = int(self._inputs[caches[0]].shape[1])
        self.vocabulary = vocabulary
        self._prelude = None if prelude is None else _session(prelude, threads)
        self._begun = {name for name in self._inputs if name.startswith("cross.")}

    def _bind(self, name: str, array: np.ndarray) -> None:
        """The memory of an array, without a copy: it must live until the run is over."""
        self._held[name] = array
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _bind_output(self, name: str, array: np.ndarray) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def step(self, rows: Rows, keep: Sequence[int] | None = None) -> np.ndarray:
        if self._begun:
            raise ElisionError("an encoder-decoder needs encoder_inputs first")
        wanted = np.arange(len(rows)) if keep is None else np.asarray(keep, np.int64)
        fed = {
            "input_ids": rows.ids[None],
            "position_ids": rows.positions[None],
            "slots": rows.slots,
            "prefix": rows.prefix,
            "ancestors": rows.ancestors,
            "keep": wanted,
        }
        for name, array in fed.items():
            if name in self._inputs:
                self._bind(name, np.ascontiguousarray(array))
        count = len(wanted) if self._keeps else len(rows)
        scores = self._held.get("")
        if scores is None or scores.shape[1] != count:
            scores = self._held[""] = np.empty((1, count, self.vocabulary), np.float32)
            self._bind_output(self._scores, scores)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime's own exceptions share no base but Exception
            raise ElisionError(f"onnxruntime cannot run the step graph: {first_line(error)}") from error
        return scores[0] if self._keeps else scores[0][wanted]

    def begin(self, inputs: dict[str, Any]) -> None:
        if self._prelude is None:
            raise ElisionError("this model has no encoder")
        names = [item.name for item in self._prelude.get_inputs()]
        results = self._prelude.run(None, named_inputs(inputs, names))
        for item, result in zip(self._prelude.get_outputs(), results):
            if item.name in self._inputs:
                self._bind(item.name, np.ascontiguousarray(result))
        self._begun = set()


def _session(model: Path | bytes, threads: int) -> Any:
    import onnxruntime

    from .session import session

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    return session(model, options, providers=["CPUExecutionProvider"])
