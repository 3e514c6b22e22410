"""Operands for the ops of step graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import steps
from .steps import Rows

CAPACITY = 40


@dataclass(frozen=True)
class Step:
    """One call of cached_attention; `bias` is (heads, length)."""

    label: str
    rows: Rows
    heads: int = 4
    shared: int = 4
    width: int = 8
    value_width: int = 8
    bias: tuple[int, int] | None = None
    cache: torch.dtype = torch.float32
    attrs: dict[str, Any] | None = None

    def make(self) -> list[Tensor | None]:
        found = steps.operands(
            self.rows, self.heads, self.shared, CAPACITY, self.width, self.value_width, self.cache
        )
        return [*found, torch.randn(*self.bias)] if self.bias else found


def _all() -> list[Step]:
    forest = steps.trees(CAPACITY, [(9, 6), (4, 5), (0, 3)], padding=2)
    return [
        Step("chain", steps.chain(7, 3)),
        Step("one row", steps.chain(0, 1)),
        Step("tree", steps.trees(CAPACITY, [(12, 9)])),
        Step("forest", forest),
        Step("chunk", steps.chunk(5, 12), heads=6, shared=2),
        Step("grouped", forest, heads=6, shared=2, value_width=5),
        Step("window", forest, shared=2, attrs={"window": 5, "scale": 0.3}),
        Step("softcap", forest, attrs={"softcap": 2.0}),
        Step("bias by distance", forest, shared=2, bias=(4, CAPACITY)),
        Step("bias of all heads", forest, bias=(1, CAPACITY)),
        Step("bias by key", forest, bias=(4, CAPACITY), attrs={"key_bias": True}),
        Step("short bias", forest, bias=(4, 6), attrs={"window": 9, "softcap": 5.0}),
        Step("half cache", forest, shared=2, cache=torch.float16),
    ]


STEPS = _all()
