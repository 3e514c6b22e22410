"""Token merging as a hand-made patch of one model class, in eager PyTorch: what the compiler is measured against.

Written from the description in Bolya et al., "Token Merging: Your ViT But Faster" (ICLR 2023), as a user of timm
would write it for speed: fused attention with log(size) as its mask, batched gathers and one scatter-add.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Merging:
    """The sizes that blocks hand on within one forward."""

    def __init__(self, r: int, prefix: int) -> None:
        self.r, self.prefix = r, prefix
        self.size: Tensor | None = None

    def __call__(self, x: Tensor, metric: Tensor) -> Tensor:
        """x [B, N, C] with its r most similar pairs merged; the first `prefix` tokens (0 or 1) stay first."""
        r = min(self.r, (x.shape[1] - self.prefix) // 2)
        if r <= 0:
            return x
        metric = F.normalize(metric, dim=-1)
        score = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
        if self.prefix:
            score[:, 0] = -torch.inf
        best, partner = score.max(-1)
        order = best.argsort(dim=-1, descending=True)
        gone, stay = order[:, :r], order[:, r:]
        if self.prefix:
            stay = stay.sort(dim=-1).values
        target = partner.gather(1, gone)
        size = torch.ones_like(x[..., :1]) if self.size is None else self.size
        weighted, size = self._sum(x * size, stay, gone, target), self._sum(size, stay, gone, target)
        self.size = size
        return weighted / size

    @staticmethod
    def _sum(x: Tensor, stay: Tensor, gone: Tensor, target: Tensor) -> Tensor:
        def rows(index: Tensor) -> Tensor:
            return index.unsqueeze(-1).expand(-1, -1, x.shape[-1])

        even, odd = x[:, ::2], x[:, 1::2]
        odd = odd.scatter_add(1, rows(target), even.gather(1, rows(gone)))
        return torch.cat([even.gather(1, rows(stay)), odd], dim=1)


def patch(model: Any, r: int) -> nn.Module:
    """`model`, a timm VisionTransformer without LayerScale or QK-norm, with every block merging r tokens."""
    merging = Merging(r, int(model.num_prefix_tokens))

    def block(self: Any, x: Tensor, **_: Any) -> Tensor:
        attn, normed = self.attn, self.norm1(x)
        q, k, v = attn.qkv(normed).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = None if merging.size is None else merging.size.log().transpose(1, 2).unsqueeze(1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + attn.proj(attended.transpose(1, 2).flatten(2))
        x = merging(x, k.mean(1))
        return x + self.mlp(self.norm2(x))

    def start(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        merging.size = None
        return type(self).forward_features(self, x, *args, **kwargs)

    for single in model.blocks:
        single.forward = MethodType(block, single)
    model.forward_features = MethodType(start, model)
    return model
