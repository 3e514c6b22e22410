"""Linear layers of GPTQ and AWQ checkpoints as weights of `linear_nbits`, and as plain matrices.

Both keep a layer as int32 words under one prefix: qweight, qzeros, scales, and g_idx where columns are in order of
activity.

    GPTQ  qweight [K * bits / 32, N], words along K, the lowest bits first; qzeros [G, N * bits / 32] along N, less one
          in version 1 of the format; scales [G, N]; g_idx [K]: the group of every column
    AWQ   qweight [K, N / 8], eight 4-bit codes along N in the order 0 2 4 6 1 3 5 7; qzeros [G, N / 8] in the same

The layouts were written down from the formats' public descriptions (Frantar et al., 2023; Lin et al., 2024).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import ModelFileError
from .layout import Quantized, dequantize, from_codes

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where the code of each of eight channels stands in a word."""

_PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class Scheme:
    """What a checkpoint's configuration says. method: gptq or awq; version: 1 or 2, of gptq's zero points."""

    method: str
    bits: int
    group: int
    version: int = 1


def scheme_of(config: Mapping[str, object]) -> Scheme:
    """From the quantization_config of a checkpoint. Raises ModelFileError for a scheme that is not known here."""
    method = str(config.get("quant_method", "none"))
    if method not in ("gptq", "awq"):
        raise ModelFileError(f"weights quantized by {method} cannot be read (known: gptq, awq)")
    bits = config.get("bits", config.get("w_bit", 4))
    group = config.get("group_size", config.get("q_group_size", 128))
    if bits not in (4, 8) or (method == "awq" and bits != 4):
        raise ModelFileError(
            f"{method} weights of {bits} bits cannot be read (known: 4{', 8' * (method == 'gptq')})"
        )
    if not isinstance(group, int) or not isinstance(bits, int):
        raise ModelFileError(f"{method} weights in groups of {group} cannot be read")
    layout = str(config.get("checkpoint_format", config.get("version", "")))
    if method == "awq" and layout.lower() not in ("", "gemm"):
        raise ModelFileError(f"awq weights in the layout {layout} cannot be read (known: gemm)")
    return Scheme(method, bits, group, 2 if layout == "gptq_v2" else 1)


def layers(names: Iterable[str]) -> list[str]:
    """The prefixes of quantized layers among the names of tensors."""
    return [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]


def read_layer(tensors: Mapping[str, np.ndarray], prefix: str, scheme: Scheme) -> Quantized:
    """One layer. Raises ModelFileError when a part is missing or the shapes do not fit together."""
    parts = {part: tensors.get(f"{prefix}.{part}") for part in _PARTS}
    missing = [part for part in _PARTS[:3] if parts[part] is None]
    if missing:
        raise ModelFileError(f"{prefix}: the tensor {missing[0]} is missing")
    weight, zeros, scales = (np.asarray(parts[part]) for part in _PARTS[:3])
    per_word = 32 // scheme.bits
    if scheme.method == "awq":
        codes = _unpacked(weight, scheme.bits)[:, :, _AWQ_ORDER].reshape(len(weight), -1)
        points = _unpacked(zeros, scheme.bits)[:, :, _AWQ_ORDER].reshape(len(zeros), -1)
    else:
        codes = _unpacked(weight, scheme.bits).swapaxes(1, 2).reshape(-1, weight.shape[1])
        points = _unpacked(zeros, scheme.bits).reshape(len(zeros), -1)
        if scheme.version == 1:
            points = points + 1 & 2**scheme.bits - 1
    width, channels = codes.shape
    count = len(scales)
    group = width if scheme.group < 0 else scheme.group
    if scales.shape != (-(-width // group), channels) or points[:, :channels].shape != scales.shape:
        raise ModelFileError(
            f"{prefix}: qweight {list(weight.shape)}, qzeros {list(zeros.shape)} and scales {list(scales.shape)} "
            f"do not fit together with {scheme.bits} bits ({per_word} to a word) in groups of {group}"
        )
    index = parts["g_idx"]
    order = None if index is None else _order(np.asarray(index), group, count, prefix)
    if order is not None:
        codes = codes[order]
    step = group if group % 16 == 0 else -(-group // 16) * 16
    if step != group and count > 1:
        raise ModelFileError(f"{prefix}: groups of {group} cannot be read (a multiple of 16)")
    padded = np.zeros((channels, count * step), np.uint8)
    padded[:, :width] = codes.T
    points = np.ascontiguousarray(points[:, :channels].T, np.uint8)
    stored = np.ascontiguousarray(scales.T)
    if stored.dtype.name not in ("float16", "float32"):
        stored = stored.astype(np.float32)  # bfloat16
    middle = 2 ** (scheme.bits - 1)
    shape = channels, count, step
    return from_codes(
        padded.reshape(shape), stored, None if (points == middle).all() else points, scheme.bits, width, order
    )


def dequantized(
    tensors: Mapping[str, np.ndarray], scheme: Scheme
) -> Iterator[tuple[str, np.ndarray, Quantized | None]]:
    """(name, array, quantized form or None) of a state dict that a plain model loads: prefix.weight float32 [N, K] for
    every quantized layer, all other tensors as they are."""
    prefixes = set(layers(tensors))
    for name, array in tensors.items():
        prefix, _, part = name.rpartition(".")
        if prefix not in prefixes or part not in _PARTS:
            yield name, array, None
        elif part == "qweight":
            made = read_layer(tensors, prefix, scheme)
            yield f"{prefix}.weight", dequantize(made), made


def _unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [a, b] -> uint8 [a, b, 32 / bits], the lowest bits first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return (words.view(np.uint32)[..., None] >> shifts & np.uint32(2**bits - 1)).astype(np.uint8)


def _order(index: np.ndarray, group: int, count: int, prefix: str) -> np.ndarray | None:
    """The columns sorted by their group; None where they are so already."""
    if np.array_equal(index, np.arange(len(index)) // group):
        return None
    order = np.argsort(index, kind="stable").astype(np.int64)
    if not np.array_equal(index[order], np.arange(len(index)) // group) or index.max(initial=0) >= count:
        raise ModelFileError(f"{prefix}: g_idx has groups that are not of {group} columns each")
    return order
