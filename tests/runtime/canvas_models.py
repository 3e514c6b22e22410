"""Two small masked diffusion models, written from what is published about LLaDA and Dream, and a stand-in for their
compiled graphs.

Both are pre-norm transformers with RMSNorm, rotary positions and SwiGLU, without a causal mask. `LladaLike`: as many
key heads as query heads, no biases, logits of a position are for itself. `DreamLike` (a Qwen2 made bidirectional):
grouped key heads, biases on q, k and v, and logits that are for the next position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from elision.runtime.canvas_rules import scored_of
from elision.runtime.canvas_step import Scored
from elision.runtime.lm_step import Rows
from torch import Tensor, nn
from torch.nn import functional

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
IDS: dict[str, Any] = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "eos_token_id": 2,
}
"""Of small models that transformers has."""


@dataclass
class Config:
    """What both have, under the names that checkpoints use."""

    model_type: str = "llada"
    vocab_size: int = 40
    hidden_size: int = 32
    intermediate_size: int = 48
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    max_position_embeddings: int = 128
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    shift_logits: bool = False
    mask_token_id: int = 39
    eos_token_id: int = 38

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Norm(nn.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(width)), epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [..., M, d]; cos, sin [M, d]."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.width = config.hidden_size // self.heads
        size, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(size, self.heads * self.width, bias=bias)
        self.k_proj = nn.Linear(size, self.kv_heads * self.width, bias=bias)
        self.v_proj = nn.Linear(size, self.kv_heads * self.width, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.width, size, bias=False)

    def split(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, M, size] -> q [B, heads, M, d], k and v [B, kv_heads, M, d]."""
        batch, count = x.shape[0], x.shape[1]
        q = self.q_proj(x).view(batch, count, self.heads, self.width).transpose(1, 2)
        k = self.k_proj(x).view(batch, count, self.kv_heads, self.width).transpose(1, 2)
        v = self.v_proj(x).view(batch, count, self.kv_heads, self.width).transpose(1, 2)
        return turned(q, cos, sin), turned(k, cos, sin), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, M, size], from k and v [B, kv_heads, N, d] that all rows see."""
        groups = self.heads // self.kv_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.attend(*self.split(x, cos, sin))


class Mlp(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Diffusion(nn.Module):
    """forward: input_ids int64 [B, N] -> an object with `logits` [B, N, V]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        width = config.hidden_size // config.num_attention_heads
        frequencies = config.rope_theta ** (-torch.arange(0, width, 2).double() / width)
        self.register_buffer("frequencies", frequencies.float(), persistent=False)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [M, d] of positions [M]."""
        angle = positions[:, None].to(self.frequencies.dtype) * self.frequencies
        angle = torch.cat([angle, angle], -1)
        return angle.cos(), angle.sin()

    def forward(self, input_ids: Tensor) -> Any:
        cos, sin = self.angles(torch.arange(input_ids.shape[1], device=input_ids.device))
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return SimpleNamespace(logits=self.lm_head(self.norm(x)))

    def cache(self, slots: int) -> Tensor:
        """[layers, 2, kv_heads, slots, d], of NaN: what is read before it is written shows."""
        config = self.config
        width = config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, 2, config.num_key_value_heads, slots, width)
        return torch.full(shape, float("nan"), dtype=self.lm_head.weight.dtype)

    @torch.no_grad()
    def stale(
        self,
        ids: Tensor,
        positions: Tensor,
        cache: Tensor,
        write: Tensor,
        seen: Sequence[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Logits [M, V] of the rows ids [M] at positions [M]. In each layer their keys and values go into the slots
        write [M] of a cache; then the rows of each pair in `seen` attend to that pair's slots, however old they are."""
        cos, sin = self.angles(positions)
        x = self.embed_tokens(ids)[None]
        for number, layer in enumerate(self.layers):
            attention = layer.self_attn
            q, k, v = attention.split(layer.input_layernorm(x), cos, sin)
            cache[number, 0][:, write], cache[number, 1][:, write] = k[0], v[0]
            mixed = torch.empty_like(x)
            for rows, slots in seen:
                keys, values = cache[number, 0][None][:, :, slots], cache[number, 1][None][:, :, slots]
                mixed[:, rows] = attention.attend(q[:, :, rows], keys, values)
            x = x + mixed
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.lm_head(self.norm(x))[0]


class LladaLike(Diffusion):
    def __init__(self, **changes: Any) -> None:
        super().__init__(Config(**changes))


class DreamLike(Diffusion):
    def __init__(self, **changes: Any) -> None:
        own = {
            "model_type": "dream",
            "num_key_value_heads": 2,
            "attention_bias": True,
            "shift_logits": True,
        }
        super().__init__(Config(**(own | changes)))


def make(kind: str, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> Diffusion:
    """ "llada" or "dream", with weights that make scores lie far apart and depend on what is around."""
    torch.manual_seed(seed)
    model = {"llada": LladaLike, "dream": DreamLike}[kind](**changes).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
        elif len(parameter) and not torch.equal(parameter, torch.ones_like(parameter)):
            parameter.normal_(0, 0.3)
    model.embed_tokens.weight.normal_(0, 1)
    if not model.config.tie_word_embeddings:
        model.lm_head.weight.normal_(0, 1.5 / model.config.hidden_size**0.5)
    return model.to(dtype)


class EagerCanvas:
    """A `CanvasModel`. calls: (kind, how many rows, positions, ids) of each; checks what the protocol asks for."""

    def __init__(self, model: Diffusion, capacity: int = 96, largest_k: int = 8) -> None:
        self.model, self.capacity, self.largest_k = model, capacity, largest_k
        self.vocabulary = model.config.vocab_size
        self.cache = model.cache(capacity)
        self.calls: list[tuple[str, np.ndarray, np.ndarray]] = []
        self.last: Scored | None = None

    def refresh(self, start: int, ids: np.ndarray, keep: np.ndarray, whole: bool = False) -> Scored:
        count = len(ids)
        assert ids.dtype == np.int64 and start >= 0 and start + count <= self.capacity
        self.calls.append(("refresh", np.arange(count), ids.copy()))
        slots = torch.arange(start, start + count)
        seen = [(torch.arange(count), slots)]
        logits = self.model.stale(torch.from_numpy(ids), torch.arange(count), self.cache, slots, seen)
        return self._scored(logits, keep, whole)

    def step(self, rows: Rows, keep: np.ndarray, whole: bool = False) -> Scored:
        assert rows.ids.dtype == rows.positions.dtype == np.int64
        assert rows.slots.dtype == rows.prefix.dtype == rows.ancestors.dtype == np.int32
        assert len(rows) and len(np.unique(rows.slots)) == len(rows) and rows.slots.max() < self.capacity
        self.calls.append(("step", rows.positions.copy(), rows.ids.copy()))
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, ((start, count), single) in enumerate(zip(rows.prefix.tolist(), rows.ancestors.tolist())):
            slots = (*range(start, start + count), *(slot for slot in single if slot >= 0))
            assert rows.slots[row] in slots and len(set(slots)) == len(slots)
            groups.setdefault(slots, []).append(row)
        seen = [(torch.tensor(group), torch.tensor(slots)) for slots, group in groups.items()]
        write = torch.from_numpy(rows.slots.astype(np.int64))
        ids, positions = torch.from_numpy(rows.ids), torch.from_numpy(rows.positions)
        return self._scored(self.model.stale(ids, positions, self.cache, write, seen), keep, whole)

    def _scored(self, logits: Tensor, keep: np.ndarray, whole: bool) -> Scored:
        assert keep.dtype == np.int64 and len(keep) and len(np.unique(keep)) == len(keep)
        if self.last is not None:  # results are good until the next call, and no longer
            for array in (self.last.values, self.last.log_sum, self.last.entropy, self.last.logits):
                if array is not None:
                    array.fill(np.nan)
        scored = scored_of(logits.numpy()[keep], self.largest_k)
        self.last = scored
        return scored if whole else Scored(scored.ids, scored.values, scored.log_sum, scored.entropy)
