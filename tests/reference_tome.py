"""Token merging in eager PyTorch, to check the compiler against.

Written from the description in Bolya et al., "Token Merging: Your ViT But Faster" (ICLR 2023), for timm's
vision transformers of any trim: LayerScale, QK-norm, any number of prefix tokens. A block is run in its own
parts; only the merge between its attention and its MLP is added, and log(size) to the attention logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Merged:
    """What a merged forward saw. tokens: length that the MLP of each block got. size [B, N'] and slot [B, N]
    (which of the last tokens each first token went to) after the last block."""

    tokens: list[int] = field(default_factory=list)
    size: Tensor | None = None
    slot: Tensor | None = None


def schedule(r: int | Sequence[int], blocks: int, inflect: float = 0.0) -> list[int]:
    """Tokens to remove in each block: r everywhere, a list filled up with 0, or a line through r.

    With `inflect` the first block removes int(r * (1 - inflect)) and the last about 2r minus that."""
    if not isinstance(r, int):
        return (list(r) + [0] * blocks)[:blocks]
    if not inflect:
        return [r] * blocks
    first = int(r * (1 - inflect))
    last = 2 * r - first
    return [int(first + (last - first) * i / max(1, blocks - 1)) for i in range(blocks)]


def match(metric: Tensor, r: int, prefix: int = 0) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching of metric [B, N, D]. Returns slot [B, N], the new place of every token, and
    keep [B, N'], the token whose place it was.

    Even positions look for their most similar odd position; the r most similar pairs merge. The first
    `prefix` tokens neither move nor receive. Order: prefix, even tokens that stay, odd tokens. The even
    ones are in order of position with a prefix, else of falling similarity, as published."""
    batch, count, _ = metric.shape
    r = max(0, min(r, (count - prefix) // 2))
    positions = torch.arange(count)
    if r == 0:
        same = positions.expand(batch, count).clone()
        return same, same
    unit = metric.float() / metric.float().norm(dim=-1, keepdim=True).clamp(min=1e-12)
    even, odd = positions[0::2], positions[1::2]
    similarity = unit[:, even] @ unit[:, odd].transpose(1, 2)
    similarity[:, even < prefix, :] = -torch.inf
    similarity[:, :, odd < prefix] = -torch.inf
    best, partner = similarity.max(-1)
    ranking = best.argsort(dim=-1, descending=True, stable=True)
    slots, keeps = [], []
    for sample in range(batch):
        gone, staying = ranking[sample, :r], ranking[sample, r:]
        if prefix:
            staying = staying.sort().values
        kept_even = [int(even[i]) for i in staying if even[i] >= prefix]
        kept_odd = [int(p) for p in odd if p >= prefix]
        keep = torch.tensor([*range(prefix), *kept_even, *kept_odd])
        slot = torch.empty(count, dtype=torch.int64)
        slot[keep] = torch.arange(len(keep))
        slot[even[gone]] = slot[odd[partner[sample, gone]]]
        slots.append(slot)
        keeps.append(keep)
    return torch.stack(slots), torch.stack(keeps)


def merge(x: Tensor, size: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of x [B, N, C] per slot, weighted by size [B, N]; also the sizes of the slots [B, N']."""
    places = int(slot.max()) + 1
    belongs = F.one_hot(slot, places).to(x.dtype).transpose(1, 2)  # [B, N', N]
    weight = belongs * size[:, None, :].to(x.dtype)
    new_size = weight.sum(-1)
    return (weight @ x) / new_size[..., None], new_size


@contextmanager
def token_merging(
    model: nn.Module,
    r: int | Sequence[int],
    *,
    proportional: bool = True,
    inflect: float = 0.0,
    weighted_pool: bool = True,
) -> Iterator[Merged]:
    """Within the context, `model` (a timm VisionTransformer) merges tokens. One forward per context.

    weighted_pool: a mean pool counts a merged token as many times as tokens went into it (the published patch
    for timm does not)."""
    blocks: Any = model.blocks
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    plan = schedule(r, len(blocks), inflect)
    record = Merged()
    for block, removed in zip(blocks, plan):
        block.forward = _block_forward(block, removed, prefix, proportional, record)
    pool: Any = model.pool
    if weighted_pool:
        model.pool = lambda x, pool_type=None: _pool(model, pool, x, pool_type, record, prefix)  # type: ignore
    try:
        yield record
    finally:
        for block in blocks:
            del block.forward
        if weighted_pool:
            del model.pool


def merged_call(
    model: nn.Module, *inputs: Tensor, r: int | Sequence[int], **options: Any
) -> tuple[Any, Merged]:
    """One forward of `model` with merging: its output, and what happened on the way."""
    with torch.no_grad(), token_merging(model, r, **options) as record:
        return model(*inputs), record


def _block_forward(block: Any, removed: int, prefix: int, proportional: bool, record: Merged) -> Any:
    def forward(x: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        assert attn_mask is None
        keys: list[Tensor] = []
        handle = block.attn.k_norm.register_forward_hook(lambda _module, _args, out: keys.append(out))
        bias = None
        if proportional and record.size is not None:
            bias = record.size.log()[:, None, None, :].to(x.dtype)
        try:
            attended = block.attn(block.norm1(x), attn_mask=bias)
        finally:
            handle.remove()
        x = x + block.drop_path1(block.ls1(attended))
        x = _merge_step(x, keys[0].mean(1), removed, prefix, record)
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    return forward


def _merge_step(x: Tensor, metric: Tensor, removed: int, prefix: int, record: Merged) -> Tensor:
    slot, keep = match(metric, removed, prefix)
    if keep.shape[1] < x.shape[1]:
        ones = torch.ones(x.shape[:2])
        x, record.size = merge(x, ones if record.size is None else record.size, slot)
        record.slot = slot if record.slot is None else slot.gather(1, record.slot)
    record.tokens.append(x.shape[1])
    return x


def _pool(model: Any, pool: Any, x: Tensor, pool_type: str | None, record: Merged, prefix: int) -> Tensor:
    kind = model.global_pool if pool_type is None else pool_type
    if record.size is None or model.attn_pool is not None or kind != "avg":
        return pool(x, pool_type)
    weight = record.size[:, prefix:, None].to(x.dtype)
    return (x[:, prefix:] * weight).sum(1) / weight.sum(1)
