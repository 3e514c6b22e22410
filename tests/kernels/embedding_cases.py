"""Operands for the table of few bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .linear_cases import Call, quantized


def _operands(shape: tuple[int, ...], width: int, **kwargs: Any) -> list[Tensor | None]:
    return [torch.randint(0, 11, shape), *quantized(11, width, **kwargs)]


def embedding_calls() -> list[Call]:
    """(op, label, function that makes the operands, attributes)."""
    found: list[Call] = []
    for label, shape, width, kwargs, dtype in (
        ("4 bits", (2, 3), 64, {"bits": 4, "group": 32}, "float32"),
        ("8 bits", (5,), 64, {"bits": 8, "group": 32, "scales": torch.float16}, "float32"),
        ("4 bits zeros", (2, 3), 40, {"bits": 4, "group": 32, "zeros": "ints"}, "float32"),
        ("4 bits offsets", (1, 4), 40, {"bits": 4, "group": 16, "zeros": "floats"}, "float32"),
        ("8 bits half", (1, 4), 90, {"bits": 8, "group": 96}, "float16"),
    ):
        attrs = {"bits": kwargs["bits"], "group": kwargs["group"], "width": width, "dtype": dtype}
        make = lambda s=shape, w=width, k=kwargs: _operands(s, w, **k)  # noqa: E731
        found.append(("embedding_nbits", label, make, attrs))
    return [*found, *_overlay_calls()]


def _overlay_calls() -> list[Call]:
    """Ids on both sides of a table of 7 rows."""

    def operands(
        ids: tuple[int, ...],
        rows: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        kind: torch.dtype = torch.int64,
    ) -> list[Tensor | None]:
        own = torch.randn(*ids, rows[-1], dtype=dtype)
        return [own, torch.randint(0, 7 + rows[-2], ids).to(kind), torch.randn(rows)]

    half, short = torch.float16, torch.int32
    return [
        ("own_ids", "plain", lambda: [torch.randint(0, 12, (2, 5))], {"first": 7}),
        ("own_ids", "int32", lambda: [torch.tensor([-1, 3, 6, 7, 9], dtype=short)], {"first": 7}),
        ("overlay_rows", "one table", lambda: operands((2, 5), (3, 4)), {"first": 7}),
        ("overlay_rows", "flat", lambda: operands((9,), (3, 4), half), {"first": 7}),
        ("overlay_rows", "per sequence", lambda: operands((2, 5), (2, 3, 4), half, short), {"first": 7}),
        ("overlay_rows", "shared", lambda: operands((3, 5), (1, 3, 4)), {"first": 7}),
        ("overlay_rows", "three axes", lambda: operands((2, 3, 2), (2, 3, 4)), {"first": 7}),
    ]
