"""Every configuration of every Triton kernel compiles for the GPUs we name, without spills and in shared memory."""

from __future__ import annotations

import re
from typing import Any

import pytest

# ruff: noqa: E402  (what follows needs Triton)
triton = pytest.importorskip("triton", reason="Triton comes with torch for GPUs only")
import torch

from .compiled import TARGETS, Launch, build, launches, resources

F32, F16, BF16, I32, U8 = torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.uint8
DTYPES = (F16, BF16, F32)
MAPS = [((8, 208), I32), ((8, 192), I32), ((8, 16), I32)]
Call = tuple[str, list[Any], dict[str, Any]]


def _attention(width: int, dtype: torch.dtype, mask: Any, size: bool, causal: bool) -> Call:
    features = ((4, 12, 1024, width), dtype)
    masks = None if mask is None else ((4, 1, 1024, 1024), mask)
    return "attention", [features] * 3 + [masks, ((4, 1024), F32) if size else None], {"causal": causal}


def _nbits(
    rows: int,
    dtype: torch.dtype,
    bits: int,
    group: int,
    zeros: Any = None,
    columns: int = 4096,
    channels: int = 4096,
    scales: torch.dtype = F32,
) -> Call:
    groups = -(-columns // group)
    weight = [((channels, groups, group * bits // 8), U8), ((channels, groups), scales)]
    zero = None if zeros is None else ((channels, groups), zeros)
    operands = [((1, rows, columns), dtype), *weight, zero, ((channels,), F32)]
    return "linear_nbits", operands, {"bits": bits, "group": group}


def _cached(
    heads: int, shared: int, width: int, dtype: torch.dtype, cache: Any = None, bias: int = 0, **attrs: Any
) -> Call:
    rows, capacity = 16, 4096
    new = ((1, shared, rows, width), dtype)
    caches = ((shared, capacity, width), cache or dtype)
    seen = [((rows,), I32), ((rows, 2), I32), ((rows, 16), I32), ((bias, capacity), F32) if bias else None]
    return "cached_attention", [((1, heads, rows, width), dtype), new, new, caches, caches, *seen], attrs


def calls(dtype: torch.dtype) -> dict[str, Call]:
    """The ways to launch the kernels that differ in what is compiled, by name."""
    x = ((8, 208, 768), dtype)
    found: dict[str, Call] = {
        "match": ("match_tokens", [((8, 4096, 64), dtype)], {"r": 1024, "prefix": 1}),
        "match, no prefix": ("match_tokens", [((8, 4096, 768), dtype)], {"r": 1024}),
        "match, original order": ("match_tokens", [((8, 197, 64), dtype)], {"r": 16, "order": "original"}),
        "merge": ("merge_tokens", [x, ((8, 208), F32), *MAPS], {"axis": 1}),
        "merge, no sizes": ("merge_tokens", [x, None, *MAPS], {"axis": 1}),
        "restore": ("restore_tokens", [((8, 192, 768), dtype), ((8, 208), I32)], {"axis": 1}),
    }
    for width in (64, 80, 128, 256):
        found[f"attention {width}"] = _attention(width, dtype, None, True, False)
        found[f"attention {width}, no sizes"] = _attention(width, dtype, None, False, False)
        found[f"attention {width}, causal"] = _attention(width, dtype, None, False, True)
        found[f"attention {width}, bool mask, causal"] = _attention(width, dtype, torch.bool, True, True)
        found[f"attention {width}, added mask"] = _attention(width, dtype, dtype, True, False)
    for rows in (1, 64):
        found |= {
            f"nbits 4, {rows} rows": _nbits(rows, dtype, 4, 32),
            f"nbits 4, {rows} rows, integers": _nbits(rows, dtype, 4, 128, U8),
            f"nbits 4, {rows} rows, offsets": _nbits(rows, dtype, 4, 32, F16, scales=F16),
            f"nbits 8, {rows} rows, groups of 16": _nbits(rows, dtype, 8, 16, U8, 1536, 576),
            f"nbits 8, {rows} rows, a head": _nbits(rows, dtype, 8, 1024, None, 1024, 151936),
        }
    full: dict[str, Any] = {"bias": 16, "softcap": 50.0, "window": 1024}
    for width in (64, 80, 128, 256):
        found |= {
            f"cached {width}": _cached(32, 8, width, dtype),
            f"cached {width}, of everything": _cached(16, 16, width, dtype, **full),
            f"cached {width}, one key head": _cached(71, 1, width, dtype, key_bias=True, bias=1),
            f"cached {width}, another cache": _cached(9, 3, width, dtype, F16 if dtype == F32 else F32),
        }
    return found


def check(launch: Launch, config: Any, target: str) -> None:
    need = resources(build(launch, config, TARGETS[target]))
    about = f"{launch.name}, {config}, {target}: {need}"
    assert 0 < need.registers <= TARGETS[target].registers, about
    assert need.shared_bytes <= TARGETS[target].shared, about
    assert need.spilled_bytes == 0, about


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "name", ["match", "merge", "restore", "attention 64", "nbits 4, 64 rows", "cached 64"]
)
def test_the_first_configuration_compiles(name: str, target: str) -> None:
    for launch in launches(*calls(F16)[name]):
        check(launch, launch.configs()[0], target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", list(calls(F16)))
def test_every_configuration_compiles(name: str, dtype: torch.dtype, target: str) -> None:
    for launch in launches(*calls(dtype)[name]):
        for config in launch.configs():
            check(launch, config, target)


@pytest.mark.parametrize("target", TARGETS)
def test_any_number_of_rows_is_multiplied_alike(target: str) -> None:
    """A row has the same bits in any company only if the compiler takes the same products for 1 tile and for 4."""
    found = set()
    for rows in (1, 64):
        launch = launches(*_nbits(rows, F16, 4, 32, U8))[0]
        for config in launch.configs()[: None if rows == 64 else 1]:
            compiled = build(launch, config, TARGETS[target])
            layouts = re.findall(
                r"versionMajor = \d|instrShape = \[[\d, ]*\]|kWidth = \d+", compiled.asm["ttgir"]
            )
            products = re.findall(
                r"\b(?:mma\.sync|wgmma|tcgen05\.mma|v_mfma)[\w.]*",
                compiled.asm.get("ptx") or compiled.asm["amdgcn"],
            )
            assert layouts and products
            found.add((*sorted(set(layouts)), *sorted(set(products))))
    assert len(found) == 1, found


@pytest.mark.parametrize(("target", "limit"), [("cuda80", {"maxnreg": 32}), ("gfx942", {"waves_per_eu": 8})])
def test_spills_are_seen(target: str, limit: dict[str, int]) -> None:
    """The measure itself: with fewer registers than the kernel needs, it reports spills."""
    launch = launches(*calls(F16)["match"])[0]
    need = resources(build(launch, launch.configs()[0], TARGETS[target], **limit))
    assert need.spilled_bytes > 64 and need.registers <= 64
