"""How fast a kernel could be: bytes and operations of every launch and configuration, and what GPUs can do with them.

A launch moves at least the bytes of its operands and results, once (`least`). A configuration also reads again what
several programs share; caches serve that, so `read` says how much they are asked for. Operations are those that the
configuration carries out, padding of its blocks included. Needs no Triton and no GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MATRICES = ("best_partner", "attend", "multiply_groups", "attend_cache")
"""The kernels that multiply matrices."""


@dataclass(frozen=True)
class Gpu:
    """Peaks from the makers' data sheets, dense: bytes a second, and operations a second by bytes of an element.

    float32 products are taken plainly by the matching, and in three tf32 steps by all others on tensor cores."""

    name: str
    bandwidth: float
    half: float
    single: float
    single_by_tf32: float

    def operations(self, itemsize: int, kernel: str) -> float:
        if kernel not in MATRICES:
            return self.single  # no products of matrices
        if itemsize == 2:
            return self.half
        return self.single if kernel == "best_partner" else self.single_by_tf32


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
    attend: heads, key_heads, n, m, width, out_width, causal (0 or 1), mask (bytes of the mask that are read);
    multiply_groups: rows, columns, channels, bits, group, splits; add_partials: rows, channels, splits;
    write_rows: rows, key_heads, width, out_width; attend_cache: and heads, keys (that each row sees), splits;
    combine_splits: rows, heads, out_width, splits."""
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


def _multiply_groups(s: Mapping[str, int], c: Mapping[str, Any]) -> Work:
    tiles = min(4, 1 << (_up(s["rows"], 16) - 1).bit_length())  # of 16 rows in a program
    row_blocks, blocks = _up(s["rows"], 16 * tiles), _up(s["channels"], c["BLOCK_N"])
    weight = s["channels"] * (s["columns"] * s["bits"] // 8 + _up(s["columns"], s["group"]) * 4)
    x = s["rows"] * s["columns"] * s["item"]
    out = s["rows"] * s["channels"] * (4 * s["splits"] if s["splits"] > 1 else s["item"])
    weights = blocks * c["BLOCK_N"] * _up(s["columns"], c["BLOCK_K"]) * c["BLOCK_K"]
    return Work(
        "multiply_groups",
        s["batch"] * row_blocks * blocks * s["splits"],
        s["batch"] * (weight + x + out),
        s["batch"] * (weight * row_blocks + x * blocks + out),
        s["batch"] * row_blocks * weights * (2 * 16 * tiles + 3),
    )


def _add_partials(s: Mapping[str, int], c: Mapping[str, Any]) -> Work:
    results = s["batch"] * s["rows"] * s["channels"]
    moved = results * (4 * s["splits"] + s["item"])
    return Work("add_partials", _up(results, c["BLOCK"]), moved, moved, results * s["splits"])


def _write_rows(s: Mapping[str, int], c: Mapping[str, Any]) -> Work:
    rows = s["batch"] * s["rows"] * s["key_heads"]
    moved = rows * 2 * (s["width"] + s["out_width"]) * s["item"]
    return Work("write_rows", rows, moved + 4 * s["batch"] * s["rows"], moved + 4 * rows * s["rows"], 0)


def _attend_cache(s: Mapping[str, int], c: Mapping[str, Any]) -> Work:
    """As if the rows saw the same slots."""
    group, both = s["heads"] // s["key_heads"], s["width"] + s["out_width"]
    lanes = min(16, 1 << (group - 1).bit_length())
    tiles = s["batch"] * _up(s["rows"], 16 // lanes) * s["key_heads"] * _up(group, lanes)
    steps = _up(s["keys"], c["BLOCK_N"])
    own = s["batch"] * s["rows"] * s["heads"]
    moved = own * (s["width"] * s["item"] + min(s["splits"], steps) * (4 * s["out_width"] + 8))
    cache = s["keys"] * both * s["item"]
    padded = _up(s["width"], c["BLOCK_C"]) * c["BLOCK_C"] + max(16, 1 << (s["out_width"] - 1).bit_length())
    return Work(
        "attend_cache",
        tiles * s["splits"],
        s["batch"] * s["key_heads"] * cache + moved,
        tiles * cache + moved,
        tiles * steps * 16 * c["BLOCK_N"] * (2 * padded + 2 * 16 + 6),
    )


def _combine_splits(s: Mapping[str, int], c: Mapping[str, Any]) -> Work:
    rows = s["batch"] * s["rows"] * s["heads"]
    moved = rows * (s["splits"] * (4 * s["out_width"] + 8) + s["out_width"] * s["item"])
    return Work(
        "combine_splits", _up(rows, c["BLOCK_R"]), moved, moved, rows * s["splits"] * 2 * s["out_width"]
    )


_MODELS = {
    "best_partner": _best_partner,
    "rank_scores": _rank_scores,
    "write_map": _write_map,
    "link_sources": _link_sources,
    "merge_rows": _merge_rows,
    "gather_rows": _gather_rows,
    "attend": _attend,
    "multiply_groups": _multiply_groups,
    "add_partials": _add_partials,
    "write_rows": _write_rows,
    "attend_cache": _attend_cache,
    "combine_splits": _combine_splits,
}
