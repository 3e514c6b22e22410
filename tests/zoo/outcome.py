"""What a pass does to a zoo model in one of the hosts: it merges, or it refuses with a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import elision

from .export import exported, onnx_file, onnx_outputs, quiet
from .model import Built, ZooModel

HOSTS = ("torch", "onnx")


@dataclass(frozen=True)
class Outcome:
    """`result` is None where the pass refused or found nothing; then `sentence` says why."""

    entry: ZooModel
    host: str
    passes: str
    result: Any = None
    sentence: str = ""
    kind: str = ""

    @property
    def merges(self) -> bool:
        return self.result is not None

    @property
    def before(self) -> list[int]:
        """Tokens in each attention as the merging pass found them: other people's files are normalised first."""
        return [int(n) for n in self._merging.cost_before.tokens_per_block]

    @property
    def after(self) -> list[int]:
        """And as it left them."""
        return [int(n) for n in self._merging.cost_after.tokens_per_block]

    @property
    def _merging(self) -> Any:
        (report,) = [p for p in self.result.report.passes if p.name == "token-merge"]
        return report

    def run(self, call: Built) -> list[np.ndarray]:
        """Outputs of the optimised model for `call`."""
        if self.host == "onnx":
            return onnx_outputs(self.result.model, call)
        return as_arrays(call.run(self.result.module))


def attempt(entry: ZooModel, host: str, passes: str, folder: Path, **options: Any) -> Outcome:
    """Apply `passes` to `entry`. Only Refused and NothingMatched are answers; every other error is a bug."""
    target: Any = onnx_file(entry, folder) if host == "onnx" else exported(entry)
    try:
        with quiet():
            result = elision.optimize(
                target, passes, example_inputs=entry.build(2).args, force=True, **options
            )
    except (elision.Refused, elision.NothingMatched) as error:
        return Outcome(entry, host, passes, sentence=str(error), kind=type(error).__name__)
    return Outcome(entry, host, passes, result)


@cache
def merged(entry: ZooModel, host: str, folder: Path) -> Outcome:
    """`entry` with the passes that the zoo names for it; each is done once in a process."""
    return attempt(entry, host, entry.passes, folder)


def original(entry: ZooModel, host: str, call: Built, folder: Path) -> list[np.ndarray]:
    """Outputs of the unchanged model in the same host."""
    if host == "onnx":
        return onnx_outputs(onnx_file(entry, folder), call)
    with torch.no_grad():
        return as_arrays(call.run())


def as_arrays(tensors: list[torch.Tensor]) -> list[np.ndarray]:
    return [t.detach().float().numpy() if t.is_floating_point() else t.numpy() for t in tensors]


def real_rows(entry: ZooModel, call: Built, output: np.ndarray) -> np.ndarray:
    """`output` without the rows of padding, [rows, ...]; all of it where outputs are not per token."""
    if not (entry.mask and entry.per_token):
        return output
    names = list(entry.inputs(1))
    mask = call.args[names.index(entry.mask)].numpy()
    counts = mask.sum(1) if mask.shape[1] == output.shape[1] else frames(entry, mask.sum(1))
    return np.concatenate([row[: int(count)] for row, count in zip(output, counts)])


def frames(entry: ZooModel, samples: np.ndarray) -> np.ndarray:
    """Tokens that so many samples of audio give."""
    for kernel, stride in entry.strides:
        samples = (samples - kernel) // stride + 1
    return samples


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's, over everything."""
    return float(np.corrcoef(a.astype(np.float64).ravel(), b.astype(np.float64).ravel())[0, 1])
