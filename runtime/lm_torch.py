"""Runs a step graph in PyTorch, its caches written in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..passes.errors import ElisionError
from ..passes.image_ids import ROWS
from .lm_caches import Caches
from .lm_step import LARGEST, Largest, Rows, beside, is_tap, largest_of, named_inputs


class TorchSteps:
    """See `lm_step.StepModel`.

    module: takes the inputs called `inputs`, in this order, and gives a flat list of outputs called `outputs`.
    caches: the shape of each cache by its name; they hold float32. prelude: computes the inputs that hold what an
    encoder read. width: of rows of pictures, where the module takes them."""

    def __init__(
        self,
        module: Any,
        inputs: Sequence[str],
        outputs: Sequence[str],
        caches: Mapping[str, Sequence[int]],
        vocabulary: int,
        prelude: Any = None,
        prelude_inputs: Sequence[str] = (),
        prelude_outputs: Sequence[str] = (),
        threads: int = 0,
        width: int = 0,
    ) -> None:
        self._module, self._inputs, self._outputs = module, list(inputs), list(outputs)
        self._prelude, self._prelude_names = prelude, (list(prelude_inputs), list(prelude_outputs))
        self._block = Caches({name: (tuple(shape), np.float32) for name, shape in caches.items()})
        self._values: dict[str, torch.Tensor] = {
            name: torch.from_numpy(view) for name, view in self._block.views.items()
        }
        self._caches = {f"{name}.out": name for name in caches}
        self._ranks = "ask" in self._inputs and "indices" in self._outputs
        self.largest_k = min(LARGEST, vocabulary)
        self.hidden: np.ndarray | None = None  # of the last call
        self.capacity = int(next(iter(caches.values()))[1])
        self.vocabulary = vocabulary
        if width:
            self.show(np.zeros((1, width), np.float32))
        if threads:
            torch.set_num_threads(threads)

    def step(self, rows: Rows, keep: Sequence[int] | None = None) -> np.ndarray:
        wanted = np.arange(len(rows)) if keep is None else np.asarray(keep, np.int64)
        scores = self._run(rows, wanted, len(wanted))[0][0]
        return (scores if "keep" in self._inputs else scores[wanted]).numpy()

    def largest(self, rows: Rows, keep: Sequence[int] | None = None) -> Largest:
        wanted = np.arange(len(rows)) if keep is None else np.asarray(keep, np.int64)
        found, _, _ = self.scored(rows, wanted, False)
        return replace(found, hidden=self.hidden)

    def scored(
        self, rows: Rows, keep: np.ndarray, whole: bool
    ) -> tuple[Largest, np.ndarray | None, np.ndarray | None]:
        """As of `lm_onnx.OnnxSteps`."""
        if not self._ranks:
            scores = self.step(rows, keep.tolist())
            return largest_of(scores, self.largest_k), None, scores
        results = dict(zip(self._outputs, self._run(rows, keep, len(keep) if whole else 0)))
        found = Largest(results["values"][0].numpy(), results["indices"][0].numpy())
        spread = results["spread"][0].numpy() if "spread" in results else None
        return found, spread, results[self._outputs[0]][0].numpy() if whole else None

    @property
    def caches(self) -> dict[str, np.ndarray]:
        """The caches [heads, slots, width] by name, to be written into."""
        return self._block.views

    @torch.inference_mode()
    def _run(self, rows: Rows, keep: np.ndarray, scored: int) -> list[torch.Tensor]:
        """scored: how many of the kept rows' scores are wanted whole, all of them or none."""
        values = self._values
        values["input_ids"] = torch.from_numpy(rows.ids)[None]
        values["position_ids"] = torch.from_numpy(rows.positions)[None]
        for name in ("slots", "prefix", "ancestors"):
            values[name] = torch.from_numpy(np.ascontiguousarray(getattr(rows, name)))
        values["keep"], values["ask"] = torch.from_numpy(keep), torch.arange(scored)
        missing = [name for name in self._inputs if name not in values]
        if missing:
            raise ElisionError(
                f"the model waits for {missing[0]!r}: an encoder-decoder needs encoder_inputs first"
            )
        results = self._module(*[values[name] for name in self._inputs])
        for name, result in zip(self._outputs, results):
            cache = self._caches.get(name)
            if cache is not None and result.data_ptr() != values[cache].data_ptr():
                values[cache].copy_(result)  # a graph that does not write in place
        self.hidden = beside(
            [result[0].numpy() for name, result in zip(self._outputs, results) if is_tap(name)]
        )
        return results

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        self._block.move(source, target)

    def show(self, rows: np.ndarray) -> None:
        """See `lm_step.StepModel`."""
        self._values[ROWS] = torch.from_numpy(np.ascontiguousarray(rows))

    @torch.inference_mode()
    def begin(self, inputs: dict[str, Any]) -> None:
        if self._prelude is None:
            raise ElisionError("this model has no encoder")
        names, made = self._prelude_names
        given = named_inputs(inputs, names)
        results = self._prelude(*[torch.from_numpy(np.asarray(given[name])) for name in names])
        self._values.update(zip(made, results))
