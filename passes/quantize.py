"""quantize: products and tables with weights of few bits, made from the weights of the graph or taken from its file.

Only how weights are stored changes. Every product with a constant weight becomes `linear_nbits`, and tables that ids
are looked up in become `embedding_nbits`. The product over a vocabulary and its table keep more bits, and are stored
once where they are one matrix. Convolutions stay. After Frantar et al., GPTQ, ICLR 2023.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from .base import Outcome, Pass, PassContext, register
from .errors import ElisionError, NothingMatched, PipelineError, Refused
from .formats.calibrated import quantize_calibrated
from .formats.layout import Quantized, dequantize
from .formats.rounding import quantize
from .ir.graph import Graph
from .order import FIXED, LOWERED
from .quantize_emit import Emitter
from .quantize_find import HEAD, LINEAR, Found, Target, find_targets
from .quantize_report import Report
from .quantize_samples import Inputs, visit_targets
from .tunable import Knob

Bits = Literal[4, 8, 16, 32]

RUNS = 12
"""Into so many runs, at most, a search divides the products."""


@dataclass(frozen=True)
class QuantizeOptions:
    """bits: of the products, or a list that is spread over them in the order of the graph, each number for a run of
    equally many; 16 keeps rows of 16 bits, 32 changes nothing. group: how many weights share a scale (a
    multiple of 16; 0: a whole row). symmetric: without zero points; offsets: with symmetric=false
    a least weight instead of a zero point. head_bits, embedding_bits: of the product over a
    vocabulary and of its table; 32 leaves them.
    method: rtn rounds to the nearest; mse looks for the scale of least error; gptq makes errors good by later weights,
    which takes samples; auto is gptq where there are samples, else mse. activations: for encoders, all at 8 bits with
    inputs rounded too. keep_source: weights that come from a quantized file stay as the file has them.
    scales: how they are stored, as float32 in ONNX files, whose operators take no other, else as float16; auto rounds
    them to float16 in both. form: of products in ONNX files, elision or matmulnbits (ONNX Runtime's own)."""

    bits: Bits | list[Bits] = 4
    group: int = 32
    symmetric: bool = True
    offsets: bool = False
    head_bits: Bits | None = None
    embedding_bits: Bits | None = None
    method: Literal["auto", "rtn", "mse", "gptq"] = "auto"
    activations: bool = False
    keep_source: bool = True
    scales: Literal["auto", "float16", "float32"] = "auto"
    form: Literal["auto", "elision", "matmulnbits"] = "auto"

    def __post_init__(self) -> None:
        if self.group < 0 or self.group % 16:
            raise PipelineError(f"group must be a multiple of 16, or 0 for whole rows, not {self.group}")
        if self.offsets and self.symmetric:
            raise PipelineError("offsets=true takes symmetric=false")
        if not self.levels:
            raise PipelineError("bits must have at least one number")
        # In a list 32 says where nothing is rounded.
        if self.activations and not {*self.levels} <= ({8, 32} if isinstance(self.bits, list) else {8}):
            raise PipelineError(f"activations=true takes bits=8, not bits={self.bits}")

    @property
    def levels(self) -> list[Bits]:
        """The bits of every run of products; one where all have the same."""
        return self.bits if isinstance(self.bits, list) else [self.bits]

    @property
    def nothing(self) -> bool:
        """True when every weight stays as it is."""
        return min(self.levels) == 32

    def bits_of(self, targets: Sequence[Target]) -> dict[Target, int]:
        """4, 8, 16 or 32 for each. Heads and tables have 8 bits unless that is more than all the rest."""
        products = [target for target in targets if target.role == LINEAR]
        least, runs = min(self.levels), len(self.levels)
        found: dict[Target, int] = {
            target: self.levels[i * runs // len(products)] for i, target in enumerate(products)
        }
        for target in targets:
            if target.role != LINEAR:
                given = self.head_bits if target.role == HEAD else self.embedding_bits
                rest = 8 if least < 16 else least if target.role == HEAD else 32
                found[target] = 32 if self.nothing else rest if given is None else given
        return found


@register
class Quantize(Pass):
    """Stores the weights of products and tables in few bits. Refuses a graph in which there are none."""

    name = "quantize"
    exact = False
    before = (LOWERED, FIXED)
    summary = "weights of 4 or 8 bits, rounded, calibrated or taken from the file"
    Options = QuantizeOptions

    @classmethod
    def tunable(cls, graph: Graph, given: Mapping[str, Any]) -> list[Knob]:
        """Bits for runs of products."""
        found = find_targets(graph)
        products = sum(target.role == LINEAR for target in found.targets)
        if not products:
            raise nothing_to_round(found)
        values = (32, 8) if given.get("activations") else (32, 8, 4)
        return [Knob("bits", values, min(products, RUNS), neutral=True)]

    def run(self, graph: Graph, context: PassContext) -> Outcome:
        """Raises NothingMatched without a product or table, Refused for gptq without samples."""
        options: QuantizeOptions = self.options
        if options.nothing:
            return Outcome(notes=["bits=32 leaves every weight as it is"])
        samples = context.samples or ([context.example_inputs] if context.example_inputs else [])
        if options.method == "gptq" and not samples:
            raise Refused("quantize: method gptq takes samples to run the graph on, and there are none")
        found = find_targets(graph)
        if not found.targets:
            raise nothing_to_round(found)
        bits = options.bits_of(found.targets)
        targets = [target for target in found.targets if bits[target] != 32]
        calibrated = bool(context.samples) or options.method == "gptq"
        wide = graph.host == "onnx" and options.scales == "auto"
        chooser = _Chooser(options, bits, context, calibrated, wide)
        notes = [f"{count} left: {reason}" for reason, count in found.left.items()]
        if samples and not all(chooser.kept(target) is not None for target in targets):
            try:
                sequential = visit_targets(graph, targets, samples, chooser.visit)
            except ElisionError as error:
                if chooser.calibrated:
                    raise
                notes.append(f"errors of outputs are not known: {error}")
            else:
                if chooser.calibrated:
                    seen = "quantized" if sequential else "unquantized"
                    notes.append(f"calibrated on {chooser.tokens} rows, which came out of {seen} layers")
        for target in targets:
            if target not in chooser.chosen:
                chooser.choose(target, None)
        emitter = Emitter(graph, options.form)
        for target in targets:
            emitter.emit(target, chooser.chosen[target])
        graph.remove_dead()
        report = chooser.report
        return Outcome(
            changed=True,
            notes=[*notes, *report.notes()],
            statistics=report.statistics(),
            extra={"layers": report.layers},
        )


def nothing_to_round(found: Found) -> NothingMatched:
    """The error for a graph without targets."""
    reasons = "; ".join(f"{count}: {reason}" for reason, count in found.left.items())
    return NothingMatched(
        f"quantize found no product or table with a constant weight{f' ({reasons})' if reasons else ''}"
    )


class _Chooser:
    """Chooses the quantized form of every target, each matrix once."""

    def __init__(
        self,
        options: QuantizeOptions,
        bits: Mapping[Target, int],
        context: PassContext,
        calibrated: bool,
        wide: bool,
    ) -> None:
        self.options = options
        self.bits = bits
        self.formats: Any = context.formats if options.keep_source else None
        self.calibrated = calibrated
        self.wide = wide
        self.report = Report()
        self.chosen: dict[Target, Quantized | np.ndarray] = {}
        self.tokens = 0
        self._made: dict[Any, Quantized | np.ndarray] = {}

    def visit(self, target: Target, inputs: Inputs) -> np.ndarray | None:
        """For `visit_targets`: the matrix that stands for the chosen form."""
        self.choose(target, inputs)
        return self._values(self.chosen[target])

    def choose(self, target: Target, inputs: Inputs | None) -> None:
        bits = self.bits[target]
        key = (*_identity(target), bits)
        known = key in self._made
        source = False
        if not known:
            kept = self.kept(target)
            source = kept is not None
            weight = np.ascontiguousarray(target.weight)
            made = kept if kept is not None else self._rounded(weight, bits, target, inputs)
            self._made[key] = widened(made) if self.wide and isinstance(made, Quantized) else made
        result = self.chosen[target] = self._made[key]
        if inputs is not None and inputs.arrays:
            self.tokens = max(self.tokens, inputs.count)
        values = target.weight if source else self._values(result)
        self.report.add(target, result, values, inputs, source=source, shared=known)

    def kept(self, target: Target) -> Quantized | None:
        """The target's form in the file it came from, where that is asked for: no sample changes it."""
        if self.formats is None or self.bits[target] > 8:
            return None
        return self.formats.lookup(np.ascontiguousarray(target.weight))

    def _rounded(
        self, weight: np.ndarray, bits: int, target: Target, inputs: Inputs | None
    ) -> Quantized | np.ndarray:
        if bits == 16:
            return sixteen(weight)
        options = self.options
        group = options.group or -(-weight.shape[1] // 32) * 32
        common: dict[str, Any] = {
            "bits": bits,
            "group": group,
            "symmetric": options.symmetric,
            "offsets": options.offsets,
            "scales": "float32" if options.scales == "float32" or not in_range(weight, bits) else "float16",
        }
        method = options.method
        if method == "auto":
            method = "gptq" if self.calibrated else "mse"
        if method == "gptq" and bits == 4 and inputs is not None and inputs.arrays:
            return quantize_calibrated(weight, inputs.moments, spread=inputs.spread, **common)
        known = self.calibrated and inputs is not None and inputs.arrays
        importance = np.diag(inputs.moments) if known and inputs is not None else None
        return quantize(weight, search=method != "rtn", importance=importance, **common)

    def _values(self, made: Quantized | np.ndarray) -> np.ndarray:
        return dequantize(made) if isinstance(made, Quantized) else made.astype(np.float32)


def _identity(target: Target) -> tuple[Any, ...]:
    """Equal for two views of one matrix; of a head and its table also for equal matrices: hosts copy tied ones."""
    weight = target.weight
    if target.role == LINEAR:
        return weight.shape, weight.strides, weight.__array_interface__["data"][0]
    return weight.shape, hash(np.ascontiguousarray(weight).tobytes())


def widened(made: Quantized) -> Quantized:
    """With scales and offsets as float32."""
    offsets = made.zeros is not None and made.zeros.dtype != np.uint8
    zeros = made.zeros.astype(np.float32) if offsets and made.zeros is not None else made.zeros
    return replace(made, scales=made.scales.astype(np.float32), zeros=zeros)


def sixteen(weight: np.ndarray) -> np.ndarray:
    """As float16 where that holds every number exactly, else as bfloat16."""
    import ml_dtypes

    if weight.dtype.itemsize == 2:
        return weight
    with np.errstate(over="ignore"):
        half = weight.astype(np.float16)
    return half if np.array_equal(half.astype(weight.dtype), weight) else weight.astype(ml_dtypes.bfloat16)


def in_range(weight: np.ndarray, bits: int) -> bool:
    """Whether scales of this weight are ordinary float16 numbers: no larger, and not so small that digits are lost."""
    largest = float(np.abs(weight).max(initial=0)) / (8 if bits == 4 else 127)
    return 2.0**-12 <= largest < 2.0**15 or largest == 0
