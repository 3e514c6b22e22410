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

    @property
    def plain(self) -> bool:
        """Whether `key_scores` has all attributes of it."""
        return self.bias is None and not (self.attrs or {}).get("window")

    def make_scored(self) -> list[Tensor | None]:
        """The operands of `key_scores`."""
        q, _, _, keys, _, _, prefix, ancestors = self.make()
        return [q, keys, prefix, ancestors]


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


@dataclass(frozen=True)
class Joined:
    """One call of joined_cached_attention. rotary: (kind, channels)."""

    label: str
    step: Step
    rotary: tuple[int, int] = (0, 0)
    norm: str = ""
    packed: bool = False
    flat: bool = False
    dtype: torch.dtype = torch.float32
    attrs: dict[str, Any] | None = None

    @property
    def all_attrs(self) -> dict[str, Any]:
        own = {"heads": self.step.heads, "kv_heads": self.step.shared, "rotary": self.rotary[0]}
        return {**own, **(self.step.attrs or {}), **(self.attrs or {})}

    def make(self) -> list[Tensor | None]:
        step = self.step
        q, k, v, *rest = step.make()
        joined = [x.transpose(1, 2).flatten(2).to(self.dtype) for x in (q, k, v) if x is not None]
        first = [torch.cat(joined, -1), None, None] if self.packed else joined
        rest += [None] * (6 - len(rest))
        rows = len(step.rows.seen)
        shape = (rows, self.rotary[1]) if self.flat else (1, rows, self.rotary[1])
        turn = [torch.randn(shape), torch.randn(shape)] if self.rotary[0] else [None, None]
        wide = {"": 0, "head": step.width, "all": step.width * step.heads}[self.norm]
        narrow = wide if self.norm == "head" else step.width * step.shared
        norms = [torch.randn(wide), torch.randn(narrow)] if self.norm else [None, None]
        return [*first, *rest, *turn, *norms]


def _joined() -> list[Joined]:
    forest = steps.trees(CAPACITY, [(9, 6), (4, 5), (0, 3)], padding=2)
    plain = Step("", forest, heads=6, shared=2)
    return [
        Joined("plain", plain),
        Joined("packed", Step("", forest, heads=6, shared=2, value_width=6), packed=True),
        Joined("halves", plain, rotary=(1, 8)),
        Joined("packed halves", plain, rotary=(1, 8), packed=True, flat=True),
        Joined("part of the halves", plain, rotary=(1, 4), packed=True),
        Joined("pairs", plain, rotary=(2, 8)),
        Joined("part of the pairs", plain, rotary=(2, 6), flat=True),
        Joined("norm per head", plain, (1, 8), "head", packed=True, attrs={"eps": 1e-5, "norm_offset": 1.0}),
        Joined("norm of all heads", plain, (1, 8), "all"),
        Joined("window and bias", Step("", forest, 4, 2, 8, 8, (4, 9), attrs={"window": 7}), (1, 8)),
        Joined("half", Step("", forest, 4, 2, cache=torch.float16), (1, 8), dtype=torch.float16),
    ]


JOINED = _joined()
