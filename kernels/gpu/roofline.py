"""How fast a kernel could be: bytes and operations of every launch and configuration, and what GPUs can do with them.

A launch moves at least the bytes of its operands and results, once (`least`). A configuration also reads again what
several programs share; caches serve that, so `read` says how much they are asked for. Operations are those that the
configuration carries out, padding of its blocks included. Needs no Triton and no GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """Peaks from the makers' data sheets, dense: bytes a second, and operations a second by bytes of an element.

    float32 products are taken plainly by the matching, and in three tf32 steps by the attention on tensor cores."""

    name: str
    bandwidth: float
    half: float
    single: float
    single_by_tf32: float

    def operations(self, itemsize: int, kernel: str) -> float:
        if kernel not in ("best_partner", "attend"):
            return self.single  # no products of matrices
        if itemsize == 2:
            return self.half
        return self.single_by_tf32 if kernel == "attend" else self.single


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100 80GB", 2.04e12, 312e12, 19.5e12, 156e12 / 3),
        Gpu("H100 SXM", 3.35e12, 989e12, 67e12, 495e12 / 3),
        Gpu("H200", 4.8e12, 989e12, 67e12, 495e12 / 3),
        Gpu("B200", 8.0e12, 2250e12, 75e12, 1100e12 / 3),
        Gpu("MI300X", 5.3e12, 1307e12, 163e12, 163e12),
    )
}


@dataclass(frozen=True)
class Work:
    """One launch in one configuration: bytes that must move, bytes that programs read and write, operations."""

    kernel: str
    programs: int
    least: int
    read: int
    flops: int

    @property
    def intensity(self) -> float:
        """Operations for every byte that must move."""
        return self.flops / self.least

    def seconds(self, gpu: Gpu, itemsize: int) -> float:
        """The least time: that of the memory or that of the arithmetic, whichever is longer."""
        return max(self.least / gpu.bandwidth, self.flops / gpu.operations(itemsize, self.kernel))

    def bound(self, gpu: Gpu, itemsize: int) -> str:
        memory, arithmetic = self.least / gpu.bandwidth, self.flops / gpu.operations(itemsize, self.kernel)
        return "memory" if memory >= arithmetic else "arithmetic"


def _up(a: int, b: int) -> int:
    return -(-a // b)


def work(kernel: str, sizes: Mapping[str, int], config: Mapping[str, Any]) -> Work:
    """The work of one launch. `sizes` names lengths: batch, item (bytes of an element), and by kernel

    best_partner: a, b, width; rank_scores: a; write_map: count, a, gone; link_sources: count, left, gone;
    merge_rows: left, gone, width; gather_rows: count, slots, width;
    attend: heads, key_heads, n, m, width, out_width, causal (0 or 1), mask (bytes of the mask that are read)."""
    return _MODELS[kernel](sizes, config)


def _best_partner(s: Mapping[str, int], c: Mapping[str, Any]) -> Work:
    blocks_a, blocks_b = _up(s["a"], c["BLOCK_A"]), _up(s["b"], c["BLOCK_B"])
    width = _up(s["width"], c["BLOCK_D"]) * c["BLOCK_D"]
    pairs = blocks_a * c["BLOCK_A"] * blocks_b * c["BLOCK_B"]
    squares = 2 * width * blocks_a * blocks_b * (c["BLOCK_A"] + c["BLOCK_B"])
    results = s["a"] * 8
    tiles = blocks_a * blocks_b * (c["BLOCK_A"] + c["BLOCK_B"]) * s["width"] * s["item"]
    return Work(
        "best_partner",
        s["batch"] * blocks_a,
        s["batch"] * ((s["a"] + s["b"]) * s["width"] * s["item"] + results),
        s["batch"] * (tiles + results),
        s["batch"] * (pairs * (2 * width + 3) + squares),
    )


def _rank_scores(s: Mapping[str, int], c: Mapping[str, Any]) -> Work:
    blocks, steps = _up(s["a"], c["BLOCK_I"]), _up(s["a"], c["BLOCK_J"])
    compared = blocks * c["BLOCK_I"] * steps * c["BLOCK_J"]
    return Work(
        "rank_scores",
        s["batch"] * blocks,
        s["batch"] * s["a"] * 8,
        s["batch"] * (blocks * s["a"] * 4 + s["a"] * 8),
        s["batch"] * compared * 5,
    )


def _write_map(s: Mapping[str, int], c: Mapping[str, Any]) -> Work:
    blocks, steps = _up(s["count"], c["BLOCK_I"]), _up(s["a"], c["BLOCK_J"])
    least = 4 * (2 * s["a"] + 2 * s["count"])
    return Work(
        "write_map",
        s["batch"] * blocks,
        s["batch"] * least,
        s["batch"] * (least + blocks * s["a"] * 4),
        s["batch"] * blocks * c["BLOCK_I"] * steps * c["BLOCK_J"] * 3,
    )


def _link_sources(s: Mapping[str, int], c: Mapping[str, Any]) -> Work:
    entries = s["left"] + s["gone"]
    blocks, steps = _up(entries, c["BLOCK_E"]), _up(s["gone"], c["BLOCK_J"])
    least = 4 * (3 * s["gone"] + entries)
    return Work(
        "link_sources",
        s["batch"] * blocks,
        s["batch"] * least,
        s["batch"] * (entries * 4 + blocks * s["gone"] * 12),
        s["batch"] * blocks * c["BLOCK_E"] * steps * c["BLOCK_J"] * 5,
    )


def _merge_rows(s: Mapping[str, int], c: Mapping[str, Any]) -> Work:
    columns = _up(s["width"], c["BLOCK_F"])
    rows = 2 * s["left"] + s["gone"]  # those that stay are read and written, the sources are read
    features = rows * s["width"] * s["item"]
    index = 4 * (4 * s["left"] + 3 * s["gone"])
    return Work(
        "merge_rows",
        s["batch"] * _up(s["left"], c["BLOCK_S"]) * columns,
        s["batch"] * (features + index),
        s["batch"] * (features + index * columns),
        s["batch"] * (2 * s["gone"] + 2 * s["left"]) * s["width"],
    )


def _gather_rows(s: Mapping[str, int], c: Mapping[str, Any]) -> Work:
    columns = _up(s["width"], c["BLOCK_F"])
    read = min(s["slots"], s["count"])
    return Work(
        "gather_rows",
        s["batch"] * _up(s["count"], c["BLOCK_N"]) * columns,
        s["batch"] * ((read + s["count"]) * s["width"] * s["item"] + 4 * s["count"]),
        s["batch"] * (2 * s["count"] * s["width"] * s["item"] + 4 * s["count"] * columns),
        0,
    )


def _attend(s: Mapping[str, int], c: Mapping[str, Any]) -> Work:
    blocks, rows, keys = _up(s["n"], c["BLOCK_M"]), c["BLOCK_M"], c["BLOCK_N"]
    steps = sum(
        _up(min(s["m"], (b + 1) * rows) if s["causal"] else s["m"], keys) for b in range(blocks)
    )  # blocks of keys, over all blocks of queries
    padded = sum(max(16, 1 << (s[name] - 1).bit_length()) for name in ("width", "out_width"))
    heads = s["batch"] * s["heads"]
    own = heads * s["n"] * (s["width"] + s["out_width"]) * s["item"]
    once = s["batch"] * s["key_heads"] * s["m"] * (s["width"] + s["out_width"]) * s["item"]
    again = heads * steps * keys * ((s["width"] + s["out_width"]) * s["item"] + 4)
    return Work(
        "attend",
        heads * blocks,
        own + once + s["batch"] * s["m"] * 4 + s["mask"],
        own + again + s["mask"],
        heads * steps * rows * keys * (2 * padded + 6),
    )


_MODELS = {
    "best_partner": _best_partner,
    "rank_scores": _rank_scores,
    "write_map": _write_map,
    "link_sources": _link_sources,
    "merge_rows": _merge_rows,
    "gather_rows": _gather_rows,
    "attend": _attend,
}
