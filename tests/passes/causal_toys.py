"""Causal graphs of a few lines, each with one thing that a cache can or cannot keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 31
WIDTH = 16


class Toy(nn.Module):
    """Embedding, one self-attention with a residual, `mix` on the result, logits."""

    def __init__(
        self,
        mix: Callable[[Tensor], Tensor] = lambda x: x,
        mask: Callable[[Tensor, Tensor], Tensor] | None = None,
        before: Callable[[Tensor], Tensor] = lambda x: x,
        heads: int = 2,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.mix, self.mask, self.before, self.heads = mix, mask, before, heads

    def attend(self, input_ids: Tensor, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            place = torch.arange(input_ids.shape[1])
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(place[:, None], place[None]))
        return y.transpose(1, 2).flatten(2)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.before(self.embed(input_ids))
        return self.head(self.mix(x + self.attend(input_ids, x)))


class Padded(Toy):
    """Hides keys whose id is 0: a mask that the ids say."""

    def attend(self, input_ids: Tensor, x: Tensor) -> Tensor:
        keep = (input_ids != 0)[:, None, None, :]
        self.mask = lambda i, j: keep & (j <= i)
        return super().attend(input_ids, x)


class Typed(Toy):
    """Takes a second row of ids."""

    def __init__(self) -> None:
        super().__init__()
        self.types = nn.Embedding(2, WIDTH)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embed(input_ids) + self.types(token_type_ids)
        return self.head(x + self.attend(input_ids, x))


def dynamic_rotary(x: Tensor) -> Tensor:
    """Rotary positions whose base grows with the length (dynamic NTK)."""
    length = x.shape[1]
    base = 100.0 * (length / 4.0)
    inverse = base ** -(torch.arange(0, WIDTH, 2) / WIDTH)
    angle = torch.arange(length)[:, None] * inverse
    turned = torch.cat((-x[..., WIDTH // 2 :], x[..., : WIDTH // 2]), -1)
    return x * torch.cat((angle, angle), -1).cos() + turned * torch.cat((angle, angle), -1).sin()


class Convolved(Toy):
    """A causal convolution over the tokens behind the attention."""

    def __init__(self) -> None:
        super().__init__(mix=self.convolved)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3)

    def convolved(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)


def traced(module: nn.Module, *more: Any) -> torch.export.ExportedProgram:
    """`module` with the input `input_ids` of a dynamic length, and further inputs of that length."""
    ids = torch.ones(1, 7).long()
    shapes = tuple({1: torch.export.Dim.AUTO} for _ in (ids, *more))
    return torch.export.export(
        module.eval().requires_grad_(False), (ids, *more), dynamic_shapes=shapes, strict=False
    )
