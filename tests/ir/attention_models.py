"""Attention written out by hand, in the forms that libraries used before the fused call existed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
FORMS: dict[str, Forward] = {}
BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 3, 5, 7, 8

bias = torch.randn(1, HEADS, QUERIES, KEYS)
keep = torch.ones(BATCH, 1, 1, KEYS, dtype=torch.bool)
keep[1, ..., 4:] = False
lowest = torch.finfo(torch.float32).min


def form(function: Forward) -> Forward:
    FORMS[function.__name__] = function
    return function


def fold(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, *x.shape[-2:])


@form
def scale_on_scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return ((q @ k.transpose(-2, -1)) / WIDTH**0.5).softmax(-1) @ v


@form
def scale_on_both(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return ((q * WIDTH**-0.25) @ (k * WIDTH**-0.25).mT).softmax(-1) @ v


@form
def scale_after_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return ((q @ k.mT + bias) * 0.3).softmax(-1) @ v


@form
def no_scale_bias(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (bias + q @ k.mT).softmax(-1) @ v


@form
def bias_and_padding(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.mT * 0.2 + bias
    scores += (~keep).float() * lowest
    return torch.dropout(scores.float().softmax(-1).type_as(q), 0.1, False) @ v


@form
def masked_fill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT * 0.2).masked_fill(~keep, float("-inf")).softmax(-1) @ v


@form
def masked_fill_over_bias(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT * 0.2 + bias).masked_fill(~keep, lowest).softmax(-1) @ v


@form
def where_number(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.where(keep, q @ k.mT, torch.full([], lowest)).softmax(-1) @ v


@form
def where_scalar(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.where(keep, q @ k.mT * 0.25, -1e9).softmax(-1) @ v


@form
def folded_bmm(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = torch.bmm(torch.softmax(torch.bmm(fold(q), fold(k).transpose(1, 2)) * 0.35, -1), fold(v))
    return out.view(-1, HEADS, QUERIES, WIDTH)


@form
def folded_baddbmm(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    wide = fold(bias.expand(q.shape[0], -1, -1, -1))
    scores = torch.baddbmm(wide, fold(q), fold(k).mT, beta=0.5, alpha=0.35)
    return torch.bmm(scores.softmax(-1), fold(v)).view(-1, HEADS, QUERIES, WIDTH)


@form
def folded_empty_baddbmm(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    empty = torch.empty(q.shape[0] * HEADS, QUERIES, KEYS)
    scores = torch.baddbmm(empty, fold(q), fold(k).mT, beta=0, alpha=0.35)
    return torch.bmm(scores.softmax(-1), fold(v)).view(-1, HEADS, QUERIES, WIDTH)


@form
def folded_scores_mask_unfolded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.bmm(fold(q) * 0.35, fold(k).mT).view(-1, HEADS, QUERIES, KEYS) + bias
    scores = scores.masked_fill(~keep, lowest).view(-1, QUERIES, KEYS)
    return torch.bmm(scores.softmax(-1), fold(v)).view(-1, HEADS, QUERIES, WIDTH)


@form
def einsum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) * 0.35
    return torch.einsum("bhnm,bhmd->bhnd", scores.softmax(-1), v)


@form
def maximum_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.mT * 0.35
    return (scores - scores.amax(-1, keepdim=True).detach()).softmax(-1) @ v


@form
def per_head_temperature(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    temperature = torch.linspace(0.1, 1, HEADS).reshape(HEADS, 1, 1)
    return (q @ k.mT * temperature + bias).softmax(-1) @ v


@form
def single_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = q[:, 0] * 1.0, k[:, 0] * 1.0, v[:, 0] * 1.0
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).mul(0.3).softmax(2), v)


class Attention(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.form = FORMS[name]

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.form(q, k, v).transpose(1, 2) + 0


def operands(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    shapes = ((BATCH, HEADS, n, WIDTH) for n in (QUERIES, KEYS, KEYS))
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)
