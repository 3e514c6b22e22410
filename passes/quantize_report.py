"""What quantizing did to each layer: bytes, errors of the weight, errors of the output on sample rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .formats.layout import Quantized
from .quantize_find import Target
from .quantize_samples import Inputs

WORST = 3


@dataclass(frozen=True)
class Layer:
    """One product or table. weight_error: |w - w'| / |w| in the Frobenius norm; output_error: the same of the product
    with sample rows, None where there were none. source: taken from the file. shared: stored with another layer."""

    name: str
    role: str
    shape: tuple[int, int]
    bits: int
    group: int
    bytes_before: int
    bytes_after: int
    weight_error: float
    output_error: float | None
    source: bool
    shared: bool


class Report:
    """Collects layers."""

    def __init__(self) -> None:
        self._layers: list[Layer] = []

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Plain data."""
        return [asdict(layer) for layer in self._layers]

    def add(
        self,
        target: Target,
        made: Quantized | np.ndarray,
        values: np.ndarray,
        inputs: Inputs | None,
        *,
        source: bool,
        shared: bool,
    ) -> None:
        few = isinstance(made, Quantized)
        weight = target.weight
        rows, columns = weight.shape
        error, output = 0.0, None
        if inputs is not None and inputs.arrays:
            output = 0.0
        if values is not weight:
            gap = np.asarray(weight, np.float32) - values
            error = _relative(gap, weight)
            if inputs is not None and inputs.arrays:
                x = inputs.rows
                output = _relative(x @ gap.T, x @ np.asarray(weight, np.float32).T)
        self._layers.append(
            Layer(
                target.name,
                target.role,
                (rows, columns),
                made.bits if few else 16,
                made.group if few else 0,
                0 if shared else weight.nbytes,
                0 if shared else made.bytes if few else made.nbytes,
                error,
                output,
                source,
                shared,
            )
        )

    def statistics(self) -> dict[str, int | float | str]:
        """Counts by role and bits, bytes before and after, mean errors."""
        found: dict[str, int | float | str] = {}
        for layer in self._layers:
            key = f"{layer.role} at {layer.bits} bits"
            found[key] = int(found.get(key, 0)) + 1
        kept = sum(layer.source for layer in self._layers)
        if kept:
            found["taken from the file"] = kept
        found["weight bytes before"] = sum(layer.bytes_before for layer in self._layers)
        found["weight bytes after"] = sum(layer.bytes_after for layer in self._layers)
        found["mean weight error"] = _mean([layer.weight_error for layer in self._layers])
        outputs = [layer.output_error for layer in self._layers if layer.output_error is not None]
        if outputs:
            found["mean output error"] = _mean(outputs)
        return found

    def notes(self) -> list[str]:
        """The worst layers, in words."""
        if not any(layer.weight_error or layer.output_error for layer in self._layers):
            return []
        ranked = sorted(self._layers, key=lambda layer: -(layer.output_error or layer.weight_error))[:WORST]
        return [
            f"%{layer.name} [{layer.shape[0]}, {layer.shape[1]}] at {layer.bits} bits: "
            f"error of the weight {layer.weight_error:.2%}"
            + ("" if layer.output_error is None else f", of the output {layer.output_error:.2%}")
            for layer in ranked
        ]


def _relative(gap: np.ndarray, whole: np.ndarray) -> float:
    above, below = (sum(map(_square, np.array_split(a, max(1, len(a) // 256)))) for a in (gap, whole))
    return float(np.sqrt(above / below)) if below > 0 else float(above > 0)


def _square(rows: np.ndarray) -> float:
    """The sum of squares, of some rows at a time: float32 keeps its digits."""
    return float(np.square(rows, dtype=np.float32).sum())


def _mean(numbers: list[float]) -> float:
    return round(sum(numbers) / max(len(numbers), 1), 6)
