"""The lowering table: (operation, target, shape class) -> the form or kernel that runs it fastest.

Filled by measurement, never by assumption: `lowering_defaults` is what was measured where Elision is made, and
`elision tune-kernels` measures the machine at hand. Only the runtime reads such a table from the disk; passes get it
through `PassContext.table`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

ONNXRUNTIME, TORCH_CPU, TORCH_CUDA, MLIR = "onnxruntime", "torch-cpu", "torch-cuda", "mlir"
TARGETS = (ONNXRUNTIME, TORCH_CPU, TORCH_CUDA, MLIR)

REFERENCE, KERNEL = "reference", "kernel"
"""Forms of a dialect op on a torch target: its own ATen, and our kernel for the target."""


@dataclass(frozen=True)
class ShapeClass:
    """What a choice depends on: words that must agree, and lengths as powers of two, of which the nearest will do.

    Written "float32 sized tokens=256 width=64"."""

    words: tuple[str, ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, *words: str, **lengths: Any) -> ShapeClass:
        """The class of some lengths; what is no number (a symbolic length) says nothing."""
        known = [(name, bucket(length)) for name, length in lengths.items() if is_length(length)]
        return cls(tuple(word for word in words if word), tuple(known))

    @classmethod
    def parse(cls, text: str) -> ShapeClass:
        """The inverse of str(). Raises ValueError."""
        words, sizes = [], []
        for part in text.split():
            name, equals, number = part.partition("=")
            if equals:
                sizes.append((name, int(number)))
            else:
                words.append(part)
        if any(number < 1 for _, number in sizes):
            raise ValueError(f"{text!r} is no shape class")
        return cls(tuple(words), tuple(sizes))

    def __str__(self) -> str:
        return " ".join([*self.words, *(f"{name}={number}" for name, number in self.sizes)])

    def distance(self, other: ShapeClass) -> float:
        """How far the lengths are apart, in doublings; infinite where the words differ."""
        if self.words != other.words:
            return math.inf
        theirs = dict(other.sizes)
        return sum(abs(math.log2(n / theirs[name])) for name, n in self.sizes if name in theirs)


def is_length(length: Any) -> bool:
    return (isinstance(length, int) or getattr(length, "is_Integer", False) is True) and int(length) > 0


def bucket(length: Any) -> int:
    """The nearest power of two, on the scale of doublings."""
    return 1 << round(math.log2(int(length)))


@dataclass(frozen=True)
class Choice:
    """The form to take; `gain`: how many times faster than the form it is measured against."""

    form: str
    gain: float = 1.0


Entries = Mapping[tuple[str, str], Mapping[ShapeClass, Choice]]
"""By (operation, target)."""


@dataclass(frozen=True)
class Table:
    """Choices by operation, target and shape class. `source` says in words where they come from; what this table does
    not know at all, `fallback` may."""

    entries: Entries
    source: str
    fallback: Table | None = field(default=None, repr=False)

    def choose(self, op: str, target: str, wanted: ShapeClass) -> Choice | None:
        """The choice of the nearest class with the same words (the first among equals); None: nothing measured."""
        known = self.entries.get((op, target), {})
        near = min(known, key=wanted.distance, default=None)
        if near is not None and wanted.distance(near) < math.inf:
            return known[near]
        return None if self.fallback is None else self.fallback.choose(op, target, wanted)

    @cached_property
    def digest(self) -> str:
        """Differs whenever any choice does (cache keys)."""
        own = json.dumps(self.to_json(), sort_keys=True)
        inner = "" if self.fallback is None else self.fallback.digest
        return hashlib.sha256(f"{own} {inner}".encode()).hexdigest()[:16]

    def count(self) -> int:
        return sum(len(classes) for classes in self.entries.values())

    def to_json(self) -> dict[str, Any]:
        """{target: {operation: {class: [form, gain]}}}, without source and fallback."""
        data: dict[str, Any] = {}
        for (op, target), classes in self.entries.items():
            data.setdefault(target, {})[op] = {str(c): [x.form, round(x.gain, 3)] for c, x in classes.items()}
        return data

    @classmethod
    def from_json(cls, data: Any, source: str, fallback: Table | None = None) -> Table:
        """The inverse of `to_json`. Raises ValueError for anything that is no table."""
        entries: dict[tuple[str, str], dict[ShapeClass, Choice]] = {}
        try:
            for target, ops in data.items():
                if target not in TARGETS:
                    raise ValueError(f"unknown target {target!r}")
                for op, classes in ops.items():
                    entries[op, target] = {
                        ShapeClass.parse(text): Choice(_word(form), float(gain))
                        for text, (form, gain) in classes.items()
                    }
        except (AttributeError, TypeError) as error:
            raise ValueError(f"not a lowering table ({error})") from None
        return cls(entries, source, fallback)


def _word(form: Any) -> str:
    if not isinstance(form, str):
        raise ValueError(f"a form is a word, not {form!r}")
    return form


# ---- shape classes -----------------------------------------------------------------------------------
def attention_class(
    dtype: str, q: Sequence[Any] | None, k: Sequence[Any] | None, *, masked: bool, sized: bool, causal: bool
) -> ShapeClass:
    """Attention by element type, what is added to its logits, the number of keys and the width of a head."""
    words = (dtype, "masked" if masked else "", "sized" if sized else "", "causal" if causal else "")
    plain = "" if masked or sized or causal else "plain"
    return ShapeClass.of(*words, plain, tokens=k[-2] if k else None, width=q[-1] if q else None)


def rows_class(dtype: str, shape: Sequence[Any] | None, *words: str) -> ShapeClass:
    """Norms, GELUs and products, which see [..., rows, width]: the last axis and all known ones before it."""
    rows = math.prod(int(length) for length in (shape or ())[:-1] if is_length(length))
    return ShapeClass.of(dtype, *words, rows=rows, width=shape[-1] if shape else None)


def dialect_class(
    op: str, shapes: Iterable[Sequence[Any] | None], dtypes: Iterable[str | None], attrs: Mapping[str, Any]
) -> ShapeClass:
    """The class of a dialect op: attention as above, others by the tokens and the width of their first operand."""
    shapes, dtypes = list(shapes), list(dtypes)
    dtype = dtypes[0] or "float32"
    if op == "attention":
        mask, size = (i < len(shapes) and shapes[i] is not None for i in (3, 4))
        causal = bool(attrs.get("causal"))
        return attention_class(dtype, shapes[0], shapes[1], masked=mask, sized=size, causal=causal)
    first = shapes[0] or ()
    axis = attrs.get("axis", len(first) - 2)
    tokens = first[axis] if isinstance(axis, int) and -len(first) <= axis < len(first) else None
    return ShapeClass.of(dtype, tokens=tokens, width=first[-1] if len(first) > 1 else None)
