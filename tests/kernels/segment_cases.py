"""Operands for the ops on units of several tokens: what to call, with which attributes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Call = tuple[str, str, Callable[[], list[Tensor | None]], dict[str, Any]]

NUMBERS = torch.tensor(
    [
        [0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 4, 5],
        [0, 1, 2, 3, 4, 5, 6, 7, -1, -1, -1, -1],
        [-1, -1, 5, 5, 5, -1, -1, 5, 5, 2, 2, 2],
    ]
)
VALID = torch.tensor([[1.0] * 12, [1.0] * 7 + [0.0] * 5, [0.0] * 3 + [1.0] * 9])


def segment_map(left: int = 6, **attrs: Any) -> list[Tensor]:
    """slot, keep, size, used and fits of NUMBERS in `left` slots."""
    return list(torch.ops.elision.segment_tokens(NUMBERS, VALID, count=left, **attrs))


def segment_calls() -> list[Call]:
    shared = {"axis": 1}
    last = {"axis": 3, "rank": 4}
    mask = torch.rand(3, 2, 5, 12) > 0.6

    def mapped(x: Tensor, weight: Tensor | None = None, left: int = 6) -> Callable[[], list[Tensor | None]]:
        return lambda: [x, weight, *segment_map(left)[:2]]

    weight = torch.rand(3, 12)
    long = torch.arange(300).expand(2, 300) // 3
    long_map = torch.ops.elision.segment_tokens(long, count=120)[:2]
    calls: list[Call] = [
        ("segment_tokens", label, lambda o=operands: list(o), attrs)
        for label, operands, attrs in (
            ("count", (NUMBERS,), {"count": 8}),
            ("all", (NUMBERS, VALID), {"count": 40}),
            ("padded", (NUMBERS, VALID), {"count": 7}),
            ("shared padding", (NUMBERS, VALID[1:2]), {"ratio": 0.5}),
            ("does not fit", (NUMBERS, VALID), {"count": 4}),
            ("bucket", (NUMBERS, VALID), {"ratio": 0.4, "bucket": 4}),
            ("ends", (NUMBERS, VALID), {"count": 8, "prefix": 1, "suffix": 2}),
            ("ends, does not fit", (NUMBERS, VALID), {"count": 6, "prefix": 2, "suffix": 1}),
            ("slots", (NUMBERS, None, torch.arange(9)), {}),
            ("int32", (NUMBERS.int(), VALID), {"count": 7}),
        )
    ]
    calls += [
        ("merge_segments", "plain", mapped(torch.randn(3, 12, 5)), shared),
        ("merge_segments", "weighted", mapped(torch.randn(3, 12, 5), weight), shared),
        (
            "merge_segments",
            "some without weight",
            mapped(torch.randn(3, 12, 5), (weight - 0.5).relu()),
            shared,
        ),
        ("merge_segments", "rank 2", mapped(torch.randn(3, 12)), shared),
        ("merge_segments", "heads", mapped(torch.randn(3, 2, 12, 4), weight), {"axis": 2}),
        ("merge_segments", "tokens first", mapped(torch.randn(12, 3, 4)), {"axis": 0, "batch_axis": 1}),
        ("merge_segments", "half", mapped(torch.randn(3, 12, 5).half(), weight), shared),
        ("merge_segments", "many", lambda: [torch.randn(2, 300, 4), torch.rand(2, 300), *long_map], shared),
        (
            "merge_segments",
            "no batch",
            lambda: [torch.randn(12, 4), None, *(m[:1] for m in segment_map()[:2])],
            {"axis": 0, "batch_axis": -1},
        ),
        (
            "segment_weights",
            "plain",
            lambda: [torch.randn(3, 12, 5), torch.randn(5), segment_map()[0]],
            shared,
        ),
        (
            "segment_weights",
            "zeros, half",
            lambda: [torch.randn(3, 12, 5).half(), torch.zeros(5), segment_map()[0]],
            shared,
        ),
        (
            "segment_weights",
            "one map",
            lambda: [torch.randn(2, 3, 12, 4), torch.randn(12), segment_map()[0][:2]],
            {"axis": 2},
        ),
        ("any_tokens", "keys", lambda: [mask, *segment_map()[:2]], last),
        ("any_tokens", "queries", lambda: [mask.mT, *segment_map()[:2]], {"axis": 2, "rank": 4}),
        ("any_tokens", "one of rank 2", lambda: [mask[0, 0], *segment_map()[:2]], last),
        ("any_tokens", "unused slots", lambda: [mask, *segment_map(11)[:2]], last),
    ]
    return calls
