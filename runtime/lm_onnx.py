"""Runs a step graph in ONNX Runtime. Caches are input and output in one: the kernels write new rows in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..passes.errors import ElisionError, ModelFileError
from ..passes.image_ids import ROWS
from .inputs import first_line
from .lm_caches import Caches
from .lm_step import LARGEST, Largest, Rows, beside, is_tap, largest_of, named_inputs

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
        self._session = start_session(model, threads)
        self._binding = self._session.io_binding()
        self._inputs = {item.name: item for item in self._session.get_inputs()}
        self._scores = self._session.get_outputs()[0].name
        self._keeps = "keep" in self._inputs
        self._held: dict[str, np.ndarray] = {}
        self._outputs: dict[str, np.ndarray] = {}
        made = {item.name: item for item in self._session.get_outputs()}
        caches = [name for name in self._inputs if f"{name}.out" in made]
        if not caches:
            raise ModelFileError("the step graph has no caches")
        shapes = {name: (tuple(self._inputs[name].shape), _TYPES[self._inputs[name].type]) for name in caches}
        self._caches = Caches(shapes)
        for name in caches:
            self._bind(name, self._caches.views[name])
            self._bind_output(f"{name}.out", self._caches.views[name])
        self._ranks = "ask" in self._inputs and "indices" in made
        known = {self._scores, *(f"{name}.out" for name in caches)}
        self._taps = {name: int(made[name].shape[-1]) for name in made if is_tap(name)}
        self._spreads = self._ranks and "spread" in made
        ranked = {"values", "indices", "spread"} if self._ranks else set()
        for extra in set(made) - known - set(self._taps) - ranked:
            self._binding.bind_output(extra, "cpu")
        self.capacity = int(self._inputs[caches[0]].shape[1])
        self.vocabulary = vocabulary
        self.largest_k = int(made["indices"].shape[-1]) if self._ranks else min(LARGEST, vocabulary)
        self._prelude = None if prelude is None else start_session(prelude, threads)
        if ROWS in self._inputs:
            self.show(np.zeros((1, int(self._inputs[ROWS].shape[-1])), np.float32))
        self._begun = {name for name in self._inputs if name.startswith("cross.")}

    def _bind(self, name: str, array: np.ndarray) -> None:
        """The memory of an array, without a copy: it must live until the run is over."""
        self._held[name] = array
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _bind_output(self, name: str, array: np.ndarray) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def step(self, rows: Rows, keep: Sequence[int] | None = None) -> np.ndarray:
        wanted = np.arange(len(rows)) if keep is None else np.asarray(keep, np.int64)
        self._run(rows, wanted, len(wanted) if self._keeps else len(rows))
        scores = self._outputs[self._scores][0]
        return scores if self._keeps else scores[wanted]

    def largest(self, rows: Rows, keep: Sequence[int] | None = None) -> Largest:
        wanted = np.arange(len(rows)) if keep is None else np.asarray(keep, np.int64)
        found, _, _ = self.scored(rows, wanted, False)
        return replace(found, hidden=self.hidden)

    def scored(
        self, rows: Rows, keep: np.ndarray, whole: bool
    ) -> tuple[Largest, np.ndarray | None, np.ndarray | None]:
        """`largest`; the log-sum and entropy float32 [R, 2] of each row's scores, and with `whole` the scores
        themselves. Without a head that tells them there are scores alone, of which the rest is taken."""
        if not self._ranks:
            scores = self.step(rows, keep.tolist())
            return largest_of(scores, self.largest_k), None, scores
        self._run(rows, keep, len(keep) if whole else 0)
        found = Largest(self._outputs["values"][0], self._outputs["indices"][0])
        spread = self._outputs["spread"][0] if self._spreads else None
        return found, spread, self._outputs[self._scores][0] if whole else None

    @property
    def hidden(self) -> np.ndarray | None:
        """Hidden states [M, H] of the last call, where the step graph puts them out."""
        return beside([self._outputs[name][0] for name in self._taps if name in self._outputs])

    def _run(self, rows: Rows, keep: np.ndarray, scored: int) -> None:
        """scored: how many rows' scores are wanted whole, all that are kept or none."""
        if self._begun:
            raise ElisionError("an encoder-decoder needs encoder_inputs first")
        fed = {
            "input_ids": rows.ids[None],
            "position_ids": rows.positions[None],
            "slots": rows.slots,
            "prefix": rows.prefix,
            "ancestors": rows.ancestors,
            "keep": keep,
            "ask": np.arange(scored),
        }
        for name, array in fed.items():
            if name in self._inputs:
                self._bind(name, np.ascontiguousarray(array))
        self._output(self._scores, (1, scored, self.vocabulary), np.float32)
        for name, width in self._taps.items():
            self._output(name, (1, len(rows), width), np.float32)
        if self._ranks:
            self._output("values", (1, len(keep), self.largest_k), np.float32)
            self._output("indices", (1, len(keep), self.largest_k), np.int64)
        if self._spreads:
            self._output("spread", (1, len(keep), 2), np.float32)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime's own exceptions share no base but Exception
            raise ElisionError(f"onnxruntime cannot run the step graph: {first_line(error)}") from error

    def _output(self, name: str, shape: tuple[int, ...], dtype: Any) -> None:
        array = self._outputs.get(name)
        if array is None or array.shape != shape:
            array = self._outputs[name] = np.empty(shape, dtype)
            self._bind_output(name, array)

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        self._caches.move(source, target)

    @property
    def caches(self) -> dict[str, np.ndarray]:
        """The caches [heads, slots, width] by name, to be written into."""
        return self._caches.views

    def show(self, rows: np.ndarray) -> None:
        """See `lm_step.StepModel`."""
        self._bind(ROWS, np.ascontiguousarray(rows))

    def begin(self, inputs: dict[str, Any]) -> None:
        if self._prelude is None:
            raise ElisionError("this model has no encoder")
        names = [item.name for item in self._prelude.get_inputs()]
        results = self._prelude.run(None, named_inputs(inputs, names))
        for item, result in zip(self._prelude.get_outputs(), results):
            if item.name in self._inputs:
                self._bind(item.name, np.ascontiguousarray(result))
        self._begun = set()


def start_session(model: Path | bytes, threads: int) -> Any:
    import onnxruntime

    from .session import session

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    return session(model, options, providers=["CPUExecutionProvider"])
