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
    return found
