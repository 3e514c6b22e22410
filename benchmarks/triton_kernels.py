"""The Triton kernels against what the hardware allows: a roofline model for every configuration, times on a GPU.

Without a GPU only the model is printed: bytes, operations and the least time of every launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from elision.kernels.gpu import load
from elision.kernels.gpu.roofline import GPUS, Gpu, Work, work
from rich.console import Console
from rich.table import Table

HALF = torch.float16
MODELLED = "H100 SXM"


@dataclass
class Case:
    """One call of an op: its launches as (kernel, configurations), the lengths of the model, and the operands."""

    op: str
    label: str
    sizes: dict[str, int]
    launches: list[tuple[str, list[Any]]]
    operands: Callable[[str], list[Any]]
    attrs: dict[str, Any]


def _of_tokens(batch: int, count: int, width: int, key: int, gone: int) -> list[Case]:
    from elision.kernels.gpu import match_tokens, merge_tokens, restore_tokens, selection

    a, left = (count - 1) // 2, count - gone
    sizes = {"batch": batch, "item": 2, "count": count, "a": a, "b": count // 2, "left": left, "slots": left}
    sizes |= {"gone": gone, "width": width}
    label = f"{batch} x {count} tokens"

    def metric(device: str) -> Any:
        return torch.randn(batch, count, key, device=device, dtype=HALF)

    def maps(device: str) -> list[Any]:
        return list(torch.ops.elision.match_tokens(metric(device), r=gone, prefix=1))

    return [
        Case(
            "match_tokens",
            f"{label} of {key}, r={gone}",
            {**sizes, "width": key},
            [
                ("best_partner", [c for c in match_tokens.CONFIGS if c.kwargs["ITEM"] == 2]),
                ("rank_scores", selection.RANK_CONFIGS),
                ("write_map", selection.WRITE_CONFIGS),
            ],
            lambda device: [metric(device)],
            {"r": gone, "prefix": 1},
        ),
        Case(
            "merge_tokens",
            f"{label} of {width}, r={gone}",
            sizes,
            [("link_sources", merge_tokens.LINK_CONFIGS), ("merge_rows", merge_tokens.MERGE_CONFIGS)],
            lambda device: [
                torch.randn(batch, count, width, device=device, dtype=HALF),
                torch.ones(batch, count, device=device),
                *maps(device),
            ],
            {"axis": 1},
        ),
        Case(
            "restore_tokens",
            f"{label} of {width}, r={gone}",
            sizes,
            [("gather_rows", restore_tokens.CONFIGS)],
            lambda device: [
                torch.randn(batch, left, width, device=device, dtype=HALF),
                maps(device)[0],
            ],
            {"axis": 1},
        ),
    ]


def _attention(batch: int, heads: int, n: int, width: int) -> Case:
    from elision.kernels.gpu import attention

    sizes = {"batch": batch, "item": 2, "heads": heads, "key_heads": heads, "n": n, "m": n, "width": width}
    sizes |= {"out_width": width, "causal": 0, "mask": 0}
    block = {"BLOCK_D": width, "BLOCK_E": width, "MASK": 0, "q": torch.empty(0, dtype=HALF)}
    return Case(
        "attention",
        f"{batch} x {heads} heads, {n} tokens of {width}, sizes",
        sizes,
        [("attend", [c for c in attention.CONFIGS if attention.fits(c, block)])],
        lambda device: [
            *(torch.randn(batch, heads, n, width, device=device, dtype=HALF) for _ in range(3)),
            None,
            torch.ones(batch, n, device=device),
        ],
        {},
    )


def _nbits(rows: int, columns: int, channels: int) -> Case:
    """A product with 4 bits and a scale for every 32 columns."""
    from elision.kernels.gpu import linear_nbits

    splits = linear_nbits.splits(columns, channels, 2)
    sizes = {"batch": 1, "item": 2, "rows": rows, "columns": columns, "channels": channels}
    sizes |= {"bits": 4, "group": 32, "splits": splits}
    configs = [c for c in linear_nbits.CONFIGS if c.kwargs["BLOCK_K"] == linear_nbits.TABLE[2][0]]
    launches: list[tuple[str, list[Any]]] = [("multiply_groups", configs)]
    if splits > 1:
        launches.append(("add_partials", linear_nbits.ADD_CONFIGS))
    return Case(
        "linear_nbits",
        f"{rows} rows, {columns} -> {channels}, 4 bits, groups of 32",
        sizes,
        launches,
        lambda device: [
            torch.randn(1, rows, columns, device=device, dtype=HALF),
            torch.randint(0, 256, (channels, columns // 32, 16), device=device, dtype=torch.uint8),
            torch.rand(channels, columns // 32, device=device),
        ],
        {"bits": 4, "group": 32},
    )


def _cached(rows: int, heads: int, shared: int, width: int, keys: int) -> Case:
    """A chain of new rows behind a prefix."""
    from elision.kernels.gpu import cached_attention

    sizes = {"batch": 1, "item": 2, "rows": rows, "heads": heads, "key_heads": shared, "width": width}
    sizes |= {"out_width": width, "keys": keys + rows, "splits": cached_attention.SPLITS}
    asked = {"WIDTH": width, "BLOCK_E": width, "MIXED": False, "q": torch.empty(0, dtype=HALF)}

    def operands(device: str) -> list[Any]:
        new = [torch.randn(1, n, rows, width, device=device, dtype=HALF) for n in (heads, shared, shared)]
        caches = [torch.randn(shared, keys + rows, width, device=device, dtype=HALF) for _ in range(2)]
        slots = torch.arange(keys, keys + rows, dtype=torch.int32, device=device)
        paths = torch.where(torch.ones(rows, rows, device=device).tril() > 0, slots, -1)
        prefix = torch.tensor([[0, keys]] * rows, dtype=torch.int32, device=device)
        return [*new, *caches, slots, prefix, paths.to(torch.int32)]

    return Case(
        "cached_attention_",
        f"{rows} rows behind {keys}, {heads} heads on {shared}, of {width}",
        sizes,
        [
            ("write_rows", cached_attention.WRITE_CONFIGS),
            ("attend_cache", [c for c in cached_attention.CONFIGS if cached_attention.fits(c, asked)]),
            ("combine_splits", cached_attention.COMBINE_CONFIGS),
        ],
        operands,
        {},
    )


def cases(quick: bool) -> list[Case]:
    found = [*_of_tokens(64, 197, 768, 64, 16), _attention(64, 12, 197, 64)]
    found += [_nbits(rows, 4096, 4096) for rows in (1, 16)] + [_cached(8, 32, 8, 128, 2048)]
    if not quick:
        found += [
            *(_nbits(rows, 4096, 14336) for rows in (1, 8, 16, 64)),
            *(_cached(rows, 32, 8, 128, 8192) for rows in (1, 8, 16, 64)),
            *_of_tokens(8, 4097, 1024, 64, 1024),
            _attention(8, 16, 4097, 64),
            _attention(2, 16, 4097, 128),
        ]
    return found


def show(console: Console, case: Case, gpu: Gpu) -> float:
    """Print the model of every launch and configuration; the least time of the op in seconds."""
    table = Table(title=f"{case.op}: {case.label}, float16, limits of {gpu.name}", title_justify="left")
    for name in ("kernel", "configuration"):
        table.add_column(name)
    for name in ("programs", "least MB", "read MB", "GFLOP", "FLOP/B", "bound by", "least µs"):
        table.add_column(name, justify="right")
    total = 0.0
    for kernel, configs in case.launches:
        rows: list[tuple[Any, Work]] = [(c, work(kernel, case.sizes, c.kwargs)) for c in configs]
        total += min(w.seconds(gpu, 2) for _, w in rows)
        for config, w in rows:
            blocks = "x".join(str(v) for k, v in config.kwargs.items() if k.startswith("BLOCK"))
            table.add_row(
                kernel,
                f"{blocks}, {config.num_warps} warps, {config.num_stages} stages",
                str(w.programs),
                f"{w.least / 1e6:.2f}",
                f"{w.read / 1e6:.2f}",
                f"{w.flops / 1e9:.3f}",
                f"{w.intensity:.1f}",
                w.bound(gpu, 2),
                f"{w.seconds(gpu, 2) * 1e6:.2f}",
            )
    console.print(table)
    return total


def measure(case: Case) -> float:
    """Median seconds of the op on the GPU."""
    import triton

    operands = case.operands("cuda")
    call = getattr(torch.ops.elision_triton, case.op)
    return triton.testing.do_bench(lambda: call(*operands, **case.attrs), return_mode="median") / 1e3


def here() -> tuple[str, Gpu | None]:
    """The name of this machine's GPU ("" where there is none), and its limits where they are known."""
    if not torch.cuda.is_available():
        return "", None
    name = torch.cuda.get_device_name()
    known = [gpu for key, gpu in GPUS.items() if key.split()[0] in name]
    return name, known[0] if known else None


def run(quick: bool = False) -> dict[str, Any]:
    load()
    console = Console(width=150)
    name, gpu = here()
    if not name:
        console.print(f"No GPU here: the model alone, for {MODELLED}. Nothing below was measured.")
    elif gpu is None:
        console.print(f"The limits of {name} are not known: shares are of {MODELLED}'s.")
    gpu = gpu or GPUS[MODELLED]
    results = []
    for case in cases(quick):
        least = show(console, case, gpu)
        result: dict[str, Any] = {"op": case.op, "case": case.label, "least_us": round(least * 1e6, 2)}
        if name:
            taken = measure(case)
            result |= {"us": round(taken * 1e6, 2), "share_of_limit": round(least / taken, 3)}
            console.print(f"{case.op}: {taken * 1e6:.1f} µs, {least / taken:.0%} of the limit\n")
        results.append(result)
    shares = [f"{r['op']} {r['share_of_limit']:.0%}" for r in results if "share_of_limit" in r]
    return {
        "what": "Triton kernels, share of the hardware's limit (roofline)",
        "aim": "to see the distance",
        "figure": ", ".join(shares) if shares else f"not measured: no GPU (modelled for {gpu.name})",
        "gpu": name or None,
        "limits_of": gpu.name,
        "cases": results,
    }
