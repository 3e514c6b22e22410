"""The table of contents of a GGUF file, and its tensors as raw blocks.

Written from the format's description (ggml/docs/gguf.md). Reading it here takes a fraction of a second, finds files
that end too early before anything is loaded, and says so in one line.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..passes.errors import ModelFileError

# number: name, weights of a block, bytes of a block
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
}

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST = 1 << 30  # bytes of one string, entries of one array: more is a broken file


@dataclass(frozen=True)
class Entry:
    """One tensor. shape: outermost first, as torch has it; [N, K] for a matrix. start: its first byte in the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    bytes: int


@dataclass(frozen=True)
class Contents:
    """`fields` are the numbers and texts of the header (arrays are left out), `tensors` what follows it."""

    path: Path
    fields: dict[str, Any]
    tensors: tuple[Entry, ...]

    def quantized(self) -> list[Entry]:
        """The matrices of few bits."""
        return [t for t in self.tensors if TYPES_BY_NAME[t.kind][1] > 1]

    def blocks(self, entry: Entry) -> np.ndarray:
        """uint8 [N, bytes of a row], mapped from the file."""
        whole = np.memmap(self.path, np.uint8, "r", entry.start, (entry.bytes,))
        return whole.reshape(-1, entry.bytes // math.prod(entry.shape[:-1]))


TYPES_BY_NAME = {name: (name, weights, size) for name, weights, size in TYPES.values()}


class _Short(Exception):
    """The file ends in the middle of something."""


def read(path: Path) -> Contents:
    """The table of contents. Raises ModelFileError for a file that is no GGUF, ends too early, or has tensors of a
    type that nobody knows."""
    try:
        with path.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            return _read(path, handle, size)
    except _Short:
        raise ModelFileError(f"{path}: the GGUF file is truncated, it ends inside its header") from None
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror})") from None


def _read(path: Path, handle: BinaryIO, size: int) -> Contents:
    if handle.read(4) != b"GGUF":
        raise ModelFileError(f"{path}: not a GGUF file")
    (version,) = _take(handle, "I")
    if version not in (2, 3):
        raise ModelFileError(f"{path}: GGUF version {version} cannot be read (2 and 3 can, little endian)")
    count, pairs = _take(handle, "QQ")
    fields: dict[str, Any] = {}
    for _ in range(pairs):
        key = _string(handle)
        (kind,) = _take(handle, "I")
        value = _value(path, handle, kind)
        if value is not None:
            fields[key] = value
    listed = list(_entries(path, handle, count))
    alignment = int(fields.get("general.alignment", 32)) or 32
    base = -(-handle.tell() // alignment) * alignment
    tensors = tuple(Entry(t.name, t.kind, t.shape, base + t.start, t.bytes) for t in listed)
    end = max((t.start + t.bytes for t in tensors), default=0)
    if end > size:
        raise ModelFileError(f"{path}: the GGUF file is truncated, {size:,} bytes instead of {end:,}")
    return Contents(path, fields, tensors)


def _entries(path: Path, handle: BinaryIO, count: int) -> Iterator[Entry]:
    for _ in range(count):
        name = _string(handle)
        (rank,) = _take(handle, "I")
        if rank > 8:
            raise ModelFileError(f"{path}: tensor {name!r} has {rank} axes; the file is damaged")
        shape = tuple(reversed(_take(handle, "Q" * rank)))
        kind, offset = _take(handle, "IQ")
        if kind not in TYPES:
            raise ModelFileError(f"{path}: tensor {name!r} has the unknown quantization type {kind}")
        label, weights, size = TYPES[kind]
        last = shape[-1] if shape else 1
        if last % weights:
            raise ModelFileError(f"{path}: rows of {name!r} are {last} long, which {label} cannot store")
        yield Entry(name, label, shape, offset, math.prod(shape) // weights * size)


def _take(handle: BinaryIO, layout: str) -> tuple[Any, ...]:
    layout = "<" + layout
    data = handle.read(struct.calcsize(layout))
    if len(data) < struct.calcsize(layout):
        raise _Short
    return struct.unpack(layout, data)


def _string(handle: BinaryIO) -> str:
    (length,) = _take(handle, "Q")
    data = handle.read(length) if length < _LONGEST else b""
    if len(data) < length:
        raise _Short
    return data.decode("utf-8", errors="replace")


def _value(path: Path, handle: BinaryIO, kind: int) -> Any:
    """A field's value; None for an array, which is only stepped over."""
    if kind in _SCALARS:
        return _take(handle, _SCALARS[kind])[0]
    if kind == _STRING:
        return _string(handle)
    if kind != _ARRAY:
        raise ModelFileError(f"{path}: a field of the unknown type {kind}; the file is damaged")
    inner, length = _take(handle, "IQ")
    if length > _LONGEST:
        raise _Short
    if inner in _SCALARS:
        handle.seek(length * struct.calcsize("<" + _SCALARS[inner]), os.SEEK_CUR)
        return None
    if inner != _STRING:
        raise ModelFileError(f"{path}: an array of arrays; the file is damaged")
    for _ in range(length):
        _string(handle)
    return None
