"""Operands for the kernels, drawn from a seed: odd lengths, every layout, padding, masks, strides, element types."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cases import CASES, call

KERNELS = ("match_tokens", "match_padded_tokens", "mean_heads", "merge_tokens", "restore_tokens", "attention")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float64: 0.0, torch.float32: 2e-5, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Draw:
    """One call of a kernel."""

    label: str
    op: str
    operands: list[Tensor | None]
    attrs: dict[str, Any]


def seeded(text: str) -> random.Random:
    """A generator for this text, and torch's own set by it."""
    seed = zlib.crc32(text.encode())
    torch.manual_seed(seed)
    return random.Random(seed)


def kernel(op: str, operands: list[Tensor | None], attrs: dict[str, Any]) -> list[Tensor]:
    """The C++ kernel; always a list."""
    out = getattr(torch.ops.elision_cpu, op)(*operands, **attrs)
    return list(out) if isinstance(out, tuple) else [out]


def expected(draw: Draw) -> list[Tensor]:
    """The reference, of features in float32: a kernel differs by its rounding at the end."""
    wide = [t.float() if t is not None and t.dtype in FLOATS else t for t in draw.operands]
    return call(draw.op, wide, draw.attrs)


def compare(draw: Draw, found: list[Tensor]) -> None:
    """Integers are the same; features agree within the rounding of their type."""
    first = next(t for t in draw.operands if t is not None)
    for one, other in zip(found, expected(draw), strict=True):
        if not one.is_floating_point():
            assert torch.equal(one, other), draw.label
            continue
        allowed = TOLERANCE[one.dtype]
        assert one.dtype in (first.dtype, torch.float32), draw.label
        torch.testing.assert_close(
            one.float(),
            other.float(),
            rtol=allowed,
            atol=allowed,
            equal_nan=True,
            msg=lambda text, label=draw.label: f"{label}: {text}",
        )


# ---- matching ------------------------------------------------------------------------------------------
def margin(metric: Tensor, size: Tensor | None, prefix: int, suffix: int) -> float:
    """How far apart the scores are that decide a matching: the smallest gap between the two best partners of a
    token and between the best scores of two tokens."""
    smallest = 1.0
    for sample in range(metric.shape[0]):
        rows = metric[sample].double()
        if size is not None:
            rows = rows[size[sample % size.shape[0]] > 0]
        n = rows.shape[0]
        rows = torch.nn.functional.normalize(rows, dim=-1)
        a, b = rows[prefix + prefix % 2 : n - suffix : 2], rows[prefix + 1 - prefix % 2 : n - suffix : 2]
        if not len(a) or not len(b):
            continue
        best = (a @ b.T).topk(min(2, len(b)), dim=1).values
        if best.shape[1] == 2:
            smallest = min(smallest, float((best[:, 0] - best[:, 1]).min()))
        if len(a) > 1:
            smallest = min(smallest, float(best[:, 0].sort().values.diff().min()))
    return smallest


def matching(seed: int) -> Draw:
    rng = seeded(f"matching {seed}")
    batch, count = rng.choice([1, 1, 2, 3]), rng.choice([1, 2, 3, 8, 17, 31, 50, 63, 130, 197, 301])
    width, dtype = rng.choice([3, 8, 16, 17, 24, 33, 64]), rng.choice(FLOATS)
    if count > 100:
        batch, dtype, width = 1, torch.float32, rng.choice([17, 64])
    prefix = rng.choice([0, 0, 1, 2, 3])
    attrs: dict[str, Any] = {"prefix": prefix, "suffix": rng.choice([0, 0, 1, 2])}
    attrs["order"] = rng.choice(["published", "original"])
    if rng.random() < 0.5:
        attrs["r"] = rng.choice([0, 1, 5, 20, 1000])
    else:
        attrs["ratio"] = rng.choice([0.0, 0.1, 0.29, 0.5, 1.0])
    padded = rng.random() < 0.6
    for _ in range(100):
        metric = torch.randn(batch, count, width).to(dtype)
        size = torch.randint(1, 4, (batch if rng.random() < 0.7 else 1, count)).float()
        size[torch.rand_like(size) < rng.choice([0.0, 0.2, 0.6])] = 0  # holes in the middle
        if margin(metric, size if padded else None, attrs["prefix"], attrs["suffix"]) > 2e-6:
            break
    else:
        raise AssertionError("no metric with scores that are far enough apart")
    if padded:
        filler = rng.choice([torch.nan, torch.inf, -torch.inf, 7.0])
        metric[(size == 0).expand(batch, count)] = filler
    op = "match_padded_tokens" if padded else "match_tokens"
    label = f"{op} {seed}: {batch}x{count}x{width} {dtype} {attrs}"
    return Draw(label, op, [metric, size] if padded else [metric], attrs)


# ---- features ------------------------------------------------------------------------------------------
def features(rng: random.Random, batch: int, count: int, dtype: torch.dtype) -> tuple[Tensor, dict[str, int]]:
    """A value with tokens and batch on axes of its own, and the attributes that say which."""
    rank = rng.choice([2, 3, 3, 4, 5])
    axes = list(range(rank))
    axis = rng.choice(axes)
    batch_axis = rng.choice([a for a in axes if a != axis])
    shape = [rng.choice([1, 2, 3, 5, 8, 17]) for _ in axes]
    shape[axis], shape[batch_axis] = count, batch
    if rank == 3 and axis == 1 and batch_axis == 0:
        shape[2] = rng.choice([1, 15, 16, 33, 64])
    return arranged(rng, torch.randn(shape).to(dtype)), {"axis": axis, "batch_axis": batch_axis}


def arranged(rng: random.Random, x: Tensor) -> Tensor:
    """The same values, sometimes with other strides."""
    how = rng.choice(["dense", "dense", "permuted", "sliced"])
    if how == "permuted":
        order = list(range(x.dim()))
        rng.shuffle(order)
        return x.permute(order).contiguous().permute([order.index(a) for a in range(x.dim())])
    if how == "sliced":
        wide = torch.zeros([*x.shape[:-1], 2 * x.shape[-1] + 1], dtype=x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    return x


def merging(seed: int) -> Draw:
    rng = seeded(f"merging {seed}")
    batch, count, dtype = rng.choice([1, 2, 3]), rng.choice([2, 5, 14, 37, 100, 210]), rng.choice(FLOATS)
    r = rng.choice([0, 1, count // 3, count])
    x, attrs = features(rng, batch, count, dtype)
    rows = rng.choice([batch, batch, 1])
    size: Tensor | None = None
    if rng.random() < 0.7:
        size = torch.randint(0, 4, (rng.choice([batch, 1]), count)).float()
        maps = call("match_padded_tokens", [torch.randn(rows, count, 6), size[:rows]], {"r": r})
        if rng.random() < 0.5 and rows == batch == size.shape[0]:
            padding = size == 0
            shape = [1] * x.dim()
            shape[attrs["axis"]], shape[attrs["batch_axis"]] = count, batch
            hole = (padding if attrs["batch_axis"] < attrs["axis"] else padding.t()).reshape(shape)
            x = torch.where(hole, torch.nan, x)
    else:
        maps = call("match_tokens", [torch.randn(rows, count, 6)], {"r": r})
    if rng.random() < 0.15:  # no batch axis at all
        x, attrs = (
            x.select(attrs["batch_axis"], 0),
            {"axis": attrs["axis"] - (attrs["batch_axis"] < attrs["axis"])},
        )
        attrs["batch_axis"] = -1
        size = None if size is None else size[:1]
        maps = [m[:1] for m in maps]
    label = f"merge_tokens {seed}: {list(x.shape)} {dtype} map of {rows} {attrs}"
    return Draw(label, "merge_tokens", [x, size, *maps], attrs)


ANY = (*FLOATS, torch.float64, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool)


def restoring(seed: int) -> Draw:
    rng = seeded(f"restoring {seed}")
    batch, count, left = rng.choice([1, 2, 3]), rng.choice([1, 5, 13, 64, 333]), rng.choice([1, 4, 9, 50])
    dtype = rng.choice(ANY)
    y, attrs = features(rng, batch, left, torch.float32)
    slot = torch.randint(-1, left, (rng.choice([batch, 1]), count), dtype=torch.int32)
    if y.shape[attrs["batch_axis"]] != slot.shape[0]:
        slot = slot.expand(batch, count)
    y = y > 0 if dtype == torch.bool else (10 * y).to(torch.int8).to(dtype)
    return Draw(f"restore_tokens {seed}: {list(y.shape)} {dtype} {attrs}", "restore_tokens", [y, slot], attrs)


def averaging(seed: int) -> Draw:
    rng = seeded(f"averaging {seed}")
    shape = [
        rng.choice([1, 2]),
        rng.choice([1, 2, 3, 12]),
        rng.choice([0, 1, 9, 70]),
        rng.choice([1, 4, 17, 64]),
    ]
    k = arranged(rng, torch.randn(shape).to(rng.choice(FLOATS)))
    return Draw(f"mean_heads {seed}: {shape} {k.dtype} {k.stride()}", "mean_heads", [k], {})


# ---- attention -----------------------------------------------------------------------------------------
def heads_of(
    rng: random.Random, batch: int, heads: int, tokens: int, width: int, dtype: torch.dtype
) -> Tensor:
    """[b, h, n, d], dense, with heads side by side as projections leave them, or sliced out of something wider."""
    how = rng.choice(["dense", "joined", "sliced", "odd"])
    if how == "joined":
        return torch.randn(batch, tokens, heads, width).to(dtype).transpose(1, 2)
    if how == "sliced":
        return torch.randn(batch, tokens, heads, 3 * width).to(dtype)[..., width : 2 * width].transpose(1, 2)
    if how == "odd":
        return torch.randn(batch, heads, width, tokens).to(dtype).transpose(2, 3)
    return torch.randn(batch, heads, tokens, width).to(dtype)


def attending(seed: int, queries: int | None = None, keys: int | None = None) -> Draw:
    rng = seeded(f"attending {seed} {queries} {keys}")
    large = queries is not None
    n = queries if queries is not None else rng.choice([1, 2, 7, 12, 13, 24, 25, 50])
    m = keys if keys is not None else rng.choice([1, 3, 16, 17, 33, 50, 65])
    batch, shared = (1, 1) if large else (rng.choice([1, 2]), rng.choice([1, 2, 3]))
    heads, dtype = shared * rng.choice([1, 1, 2]), rng.choice(FLOATS)
    width, value_width = rng.choice([1, 5, 8, 16, 40, 64]), rng.choice([1, 6, 16, 33, 64])
    q = heads_of(rng, batch, heads, n, width, dtype)
    k, v = (heads_of(rng, batch, shared, m, w, dtype) for w in (width, value_width))
    mask, size = None, None
    if rng.random() < 0.6:
        lengths = [rng.choice([1, full]) for full in (batch, heads)] + [rng.choice([1, n]), m]
        mask = torch.rand(lengths) > 0.3
        kind = rng.choice(["bool", "additive", "other float", "all false"])
        if kind == "all false":
            mask[..., : rng.choice([1, lengths[2]]), :] = False  # rows without any key
        if "e" in kind and kind != "all false":
            mask = torch.where(mask, torch.randn(lengths), -3e4)
            mask = mask.to(dtype if kind == "additive" else rng.choice(FLOATS))
        mask = mask[rng.choice([0, 0, 1]) if lengths[0] == 1 else 0 :] if mask.shape[0] > 1 else mask
        if lengths[0] == lengths[1] == 1 and rng.random() < 0.3:
            mask = mask[0, 0]
    if rng.random() < 0.5:
        size = torch.randint(1, 5, (rng.choice([1, batch]), m)).float()
        size[:, 1:][torch.rand(size[:, 1:].shape) < 0.2] = 0
    attrs: dict[str, Any] = {}
    if rng.random() < 0.3:
        attrs["causal"] = True
    if rng.random() < 0.3:
        attrs["scale"] = 0.21
    kinds = "no mask" if mask is None else f"mask {list(mask.shape)} {mask.dtype}"
    sized = "no size" if size is None else f"size {list(size.shape)}"
    label = f"attention {seed}: {list(q.shape)} {list(k.shape)} {dtype} {kinds} {sized} {attrs}"
    return Draw(label, "attention", [q, k, v, mask, size], attrs)


def empties() -> Iterator[Draw]:
    """Lengths of 0, one axis at a time."""
    for batch, count, width in ((0, 5, 4), (2, 0, 4), (2, 1, 4), (2, 5, 0)):
        metric, size = torch.randn(batch, count, width), torch.ones(batch, count)
        yield Draw(f"match empty {batch}x{count}x{width}", "match_tokens", [metric], {"r": 2})
        yield Draw(
            f"match padded empty {batch}x{count}x{width}", "match_padded_tokens", [metric, size], {"r": 2}
        )
        yield Draw(
            f"mean empty {batch}x{count}x{width}", "mean_heads", [torch.randn(batch, 2, count, width)], {}
        )
        line = torch.arange(count, dtype=torch.int32).expand(batch, count)
        maps = [line, line, line[:, :0]]
        yield Draw(f"merge empty {batch}x{count}x{width}", "merge_tokens", [metric, None, *maps], {"axis": 1})
        yield Draw(f"restore empty {batch}x{count}x{width}", "restore_tokens", [metric, line], {"axis": 1})
        q, k = torch.randn(batch, 2, count, width), torch.randn(batch, 2, 3, width)
        yield Draw(f"attention without queries {batch}x{count}x{width}", "attention", [q, k, k], {})
    q = torch.randn(1, 2, 3, 4)
    yield Draw("attention without keys", "attention", [q, q[:, :, :0], q[:, :, :0]], {})
    yield Draw("attention without values", "attention", [q, q, q[..., :0]], {})


def draws() -> Iterator[Draw]:
    """Every call that all variants are compared on."""
    for case in CASES:
        if case.op in KERNELS and case.label != "rank 3":  # which the kernel refuses
            seeded(str(case))
            yield Draw(str(case), case.op, case.make(), case.attrs)
    for seed in range(60):
        yield matching(seed)
        yield merging(seed)
        yield restoring(seed)
        yield attending(seed)
    for seed in range(20):
        yield averaging(seed)
    for seed, (queries, keys) in enumerate(((300, 513), (3, 1100), (577, 40), (288, 512), (25, 1024))):
        yield attending(seed, queries, keys)
    yield from empties()
