"""Toy transformers, each with one thing that an analysis must find."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention over [B, N, C], queries from x, keys and values from `context` (default x)."""

    def __init__(self, width: int = 16, heads: int = 2, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        return x.reshape(b, n, self.heads, c // self.heads).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        rotary: Tensor | None = None,
    ) -> Tensor:
        source = x if context is None else context
        q, k, v = self.split(self.q(x)), self.split(self.k(source)), self.split(self.v(source))
        if rotary is not None:
            q, k = q * rotary, k * rotary
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """Pre-norm block, optionally with cross-attention."""

    def __init__(self, width: int = 16, causal: bool = False, cross: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attention = Attention(width, causal=causal)
        self.cross = Attention(width) if cross else None
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        rotary: Tensor | None = None,
    ) -> Tensor:
        x = x + self.attention(self.norm1(x), mask=mask, rotary=rotary)
        if self.cross is not None:
            x = x + self.cross(self.norm3(x), context)
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """[B, 3, 8, 8] -> patches of 2 -> blocks. `head`: what becomes of the tokens.

    prefix, suffix: learned tokens joined to the 16 patches."""

    def __init__(
        self, prefix: int = 0, suffix: int = 0, head: str = "tokens", depth: int = 2, causal: bool = False
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 2, 2)
        self.first = nn.Parameter(torch.randn(1, prefix, 16)) if prefix else None
        self.last = nn.Parameter(torch.randn(1, suffix, 16)) if suffix else None
        self.position = nn.Parameter(torch.randn(1, 16 + prefix + suffix, 16))
        self.blocks = nn.ModuleList(Block(causal=causal) for _ in range(depth))
        self.head, self.prefix = head, prefix
        self.conv = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        parts = [self.first, x, self.last]
        x = torch.cat([p.expand(x.shape[0], -1, -1) for p in parts if p is not None], 1) + self.position
        for block in self.blocks:
            x = block(x)
        if self.head == "first":
            return x[:, 0]
        if self.head == "mean":
            return x[:, self.prefix :].mean(1)
        if self.head == "grid":
            return self.conv(x[:, self.prefix :].transpose(1, 2).reshape(x.shape[0], 16, 4, 4))
        return x


class Windowed(nn.Module):
    """Attention inside 2 by 2 windows of a 4 by 4 grid; the residual stream is the grid."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:  # [B, 4, 4, 16]
        b = len(x)
        w = x.reshape(b, 2, 2, 2, 2, 16).permute(0, 1, 3, 2, 4, 5).reshape(b * 4, 4, 16)
        y = self.attention(w).reshape(b, 2, 2, 2, 2, 16).permute(0, 1, 3, 2, 4, 5).reshape(b, 4, 4, 16)
        return x + y


class Text(nn.Module):
    """Ids and a padding mask; a pairwise bias and a rotary table that runs over positions."""

    def __init__(self, length: int = 12) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.bias = nn.Parameter(torch.randn(1, 2, length, length))
        self.register_buffer("rotary", torch.rand(length, 8) + 0.5)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, ids: Tensor, valid: Tensor) -> Tensor:
        x = self.table(ids)
        mask = self.bias + (1 - valid.to(x.dtype))[:, None, None, :] * -1e9
        for block in self.blocks:
            x = block(x, mask=mask, rotary=self.rotary)
        weight = valid[..., None].to(x.dtype)
        return (x * weight).sum(1) / weight.sum(1)


class EncoderDecoder(nn.Module):
    """Two spaces: 10 source tokens, 6 target tokens that are causal and read the source."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Block(), Block(causal=True, cross=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.decoder(target * 1.5, self.encoder(source * 1.5))


def text_inputs(batch: int = 2, length: int = 12) -> tuple[Tensor, Tensor]:
    ids = torch.arange(batch * length).reshape(batch, length) * 7 % 50
    valid = torch.ones(batch, length, dtype=torch.int64)
    for sample in range(batch):
        valid[sample, length - 2 * sample :] = 0
    return ids, valid
