"""Blocks of GGUF files as weights of `linear_nbits`, without rounding anything again.

Every block type but the wholly different ones (codebooks, 2 and 3 bits) is codes with a scale, and a zero point or an
offset, per 16 or 32 weights. Types of 5 and 6 bits are kept in bytes. The layouts were written down from the format's
reference reader (the package gguf), against which tests compare bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import ModelFileError
from .layout import Quantized, from_codes

FLOATS = ("F32", "F16", "BF16", "F64")
"""Types that hold plain numbers: nothing to import."""


def import_blocks(kind: str, data: np.ndarray, name: str = "a tensor") -> Quantized | None:
    """Raw blocks uint8 [N, bytes of a row] of GGUF type `kind` ("Q4_0", ...); None for a type of plain numbers.

    Raises ModelFileError for a type that is not known here."""
    if kind in FLOATS:
        return None
    if kind not in _READERS:
        known = ", ".join([*_READERS, *FLOATS])
        raise ModelFileError(f"{name} is stored as {kind}, which cannot be read (known: {known})")
    size, read = _READERS[kind]
    if data.ndim != 2 or data.shape[1] % size:
        raise ModelFileError(f"{name}: rows of {list(data.shape)} bytes are no {kind} blocks of {size} bytes")
    blocks = np.ascontiguousarray(data).view(np.uint8).reshape(data.shape[0], -1, size)
    codes, scales, zeros, bits = read(blocks)
    codes = codes.reshape(data.shape[0], scales.shape[1], -1)
    return from_codes(codes, scales, zeros, bits, scales.shape[1] * codes.shape[2])


_Parts = tuple[np.ndarray, np.ndarray, np.ndarray | None, int]


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 numbers that stand at byte `at` of every block."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)[..., 0]


def _nibbles(data: np.ndarray) -> np.ndarray:
    """[..., n] bytes -> [..., 2n]: all low halves, then all high ones."""
    return np.concatenate([data & 15, data >> 4], -1)


def _bits(data: np.ndarray) -> np.ndarray:
    """[..., n] bytes -> [..., 8n] bits, the lowest of each byte first."""
    return np.unpackbits(np.ascontiguousarray(data), axis=-1, bitorder="little")


def _q4_0(b: np.ndarray) -> _Parts:
    return _nibbles(b[..., 2:]), _half(b, 0), None, 4


def _q4_1(b: np.ndarray) -> _Parts:
    return _nibbles(b[..., 4:]), _half(b, 0), _half(b, 2), 4


def _q5_0(b: np.ndarray) -> _Parts:
    codes = _nibbles(b[..., 6:]) | _bits(b[..., 2:6]) << 4
    return codes + np.uint8(128 - 16), _half(b, 0), None, 8


def _q5_1(b: np.ndarray) -> _Parts:
    return _nibbles(b[..., 8:]) | _bits(b[..., 4:8]) << 4, _half(b, 0), _half(b, 2), 8


def _q8_0(b: np.ndarray) -> _Parts:
    return (
        b[..., 2:] ^ 0x80,
        _half(b, 0),
        None,
        8,
    )  # two's complement with its sign turned is the number + 128


def _k_scales(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and offsets of the 8 groups of a Q4_K or Q5_K block: 6-bit factors of two float16 numbers."""
    low, middle, high = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    scale = np.concatenate([low & 63, (high & 15) | (low >> 2 & 48)], -1)
    minimum = np.concatenate([middle & 63, (high >> 4) | (middle >> 2 & 48)], -1)
    d, least = _half(b, 0).astype(np.float32)[..., None], _half(b, 2).astype(np.float32)[..., None]
    rows = b.shape[0]
    return (d * scale).reshape(rows, -1), -(least * minimum).reshape(rows, -1)


def _interleaved(data: np.ndarray) -> np.ndarray:
    """128 bytes -> 256 codes: each run of 32 bytes holds two groups of 32, in its low and in its high halves."""
    return _nibbles(data.reshape(*data.shape[:-1], 4, 32)).reshape(*data.shape[:-1], 256)


def _q4_k(b: np.ndarray) -> _Parts:
    scales, offsets = _k_scales(b)
    return _interleaved(b[..., 16:]), scales, offsets, 4


def _q5_k(b: np.ndarray) -> _Parts:
    scales, offsets = _k_scales(b)
    # Byte j of the 32 has the fifth bit of element j of group g in its bit g.
    fifth = _bits(b[..., 16:48, None]).swapaxes(-1, -2).reshape(*b.shape[:-1], 256)
    return _interleaved(b[..., 48:]) | fifth << 4, scales, offsets, 8


def _q6_k(b: np.ndarray) -> _Parts:
    low = _nibbles(b[..., :128].reshape(*b.shape[:-1], 2, 64)).reshape(*b.shape[:-1], 256)
    pairs = b[..., 128:192].reshape(*b.shape[:-1], 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8)
    high = (pairs & 3).reshape(*b.shape[:-1], 256)
    factors = np.ascontiguousarray(b[..., 192:208]).view(np.int8)
    scales = _half(b, 208).astype(np.float32)[..., None] * factors
    return (low | high << 4) + np.uint8(128 - 32), scales.reshape(b.shape[0], -1), None, 8


_READERS: dict[str, tuple[int, Callable[[np.ndarray], _Parts]]] = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q5_0": (22, _q5_0),
    "Q5_1": (24, _q5_1),
    "Q8_0": (34, _q8_0),
    "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k),
    "Q6_K": (210, _q6_k),
}
