"""Rows of a step graph: chains and trees of several sequences over one cache; what they see, one by one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Rows:
    """Where rows stand and what they see: `seen[m]` is row m's list of slots in logical order."""

    slots: Tensor
    prefix: Tensor
    ancestors: Tensor
    seen: list[list[int]]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.slots, self.prefix, self.ancestors]


def rows_of(placed: list[tuple[int, tuple[int, int], list[int]]], columns: int = 0) -> Rows:
    """Rows from (slot, prefix, ancestors) each; `columns` widens the table of ancestors."""
    columns = max(columns, *(len(path) for _, _, path in placed))
    table = torch.full((len(placed), columns), -1, dtype=torch.int32)
    for row, (_, _, path) in enumerate(placed):
        table[row, : len(path)] = torch.tensor(path, dtype=torch.int32)
    seen = [[*range(first, first + run), *path] for _, (first, run), path in placed]
    slots = torch.tensor([slot for slot, _, _ in placed], dtype=torch.int32)
    prefix = torch.tensor([list(span) for _, span, _ in placed], dtype=torch.int32)
    return Rows(slots, prefix, table, seen)


def trees(capacity: int, sequences: list[tuple[int, int]], padding: int = 0, seed: int = 0) -> Rows:
    """A random tree of `rows` rows behind `run` committed slots for every (run, rows); then rows of padding.

    The slots behind the prefixes are dealt out at random: logical order and order of memory have nothing in common."""
    draw = torch.Generator().manual_seed(seed)
    placed: list[tuple[int, tuple[int, int], list[int]]] = []
    starts = [sum(run for run, _ in sequences[:i]) for i in range(len(sequences))]
    taken = sum(run for run, _ in sequences)
    free = (torch.randperm(capacity - 1 - taken, generator=draw) + taken).tolist()
    for start, (run, rows) in zip(starts, sequences):
        paths: list[list[int]] = []
        for _ in range(rows):
            parent = int(torch.randint(len(paths), (1,), generator=draw)) if paths else -1
            slot = free.pop()
            paths.append([*(paths[parent] if parent >= 0 else []), slot])
            placed.append((slot, (start, run), paths[-1]))
    placed += [(capacity - 1, (0, 0), [capacity - 1])] * padding
    return rows_of(placed)


def chain(run: int, rows: int, start: int = 0) -> Rows:
    """Rows one after the other, each listing those before it."""
    first = start + run
    return rows_of([(first + m, (start, run), list(range(first, first + m + 1))) for m in range(rows)])


def chunk(run: int, rows: int, start: int = 0) -> Rows:
    """The same rows as a piece of a long prompt: the prefix of each reaches into the rows of this very call."""
    return rows_of([(start + run + m, (start, run + m), [start + run + m]) for m in range(rows)])


def operands(
    rows: Rows,
    heads: int,
    shared: int,
    capacity: int,
    width: int = 8,
    value_width: int | None = None,
    cache: torch.dtype = torch.float32,
) -> list[Tensor | None]:
    """Random q, k, v, caches, and the rows."""
    count, value_width = len(rows.slots), width if value_width is None else value_width
    return [
        torch.randn(1, heads, count, width),
        torch.randn(1, shared, count, width),
        torch.randn(1, shared, count, value_width),
        torch.randn(shared, capacity, width).to(cache),
        torch.randn(shared, capacity, value_width).to(cache),
        *rows.tensors,
    ]


def one_by_one(
    rows: Rows, given: list[Tensor | None], attrs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """What the op must give, in float64: row by row and head by head over the keys that the row sees."""
    q, k, v, key_cache, value_cache = (x.double() for x in given[:5] if x is not None)
    bias = given[8] if len(given) > 8 else None
    keys, values = key_cache.clone(), value_cache.clone()
    for m, slot in enumerate(rows.slots.tolist()):
        keys[:, slot], values[:, slot] = k[0, :, m], v[0, :, m]
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    out = torch.zeros(1, heads, len(rows.seen), v.shape[-1], dtype=torch.float64)
    for m, seen in enumerate(rows.seen):
        for h in range(heads):
            logits, kept = [], []
            for t, slot in enumerate(seen):
                distance = len(seen) - 1 - t
                if attrs.get("window", 0) and distance >= attrs["window"]:
                    continue
                scale = attrs.get("scale") or 1 / math.sqrt(q.shape[-1])
                logit = float(q[0, h, m] @ keys[h // group, slot]) * scale
                if attrs.get("softcap", 0):
                    logit = attrs["softcap"] * math.tanh(logit / attrs["softcap"])
                if bias is not None:
                    at = min(t if attrs.get("key_bias") else distance, bias.shape[1] - 1)
                    logit += float(bias[h if bias.shape[0] > 1 else 0, at])
                logits.append(logit)
                kept.append(slot)
            if kept:
                weights = torch.softmax(torch.tensor(logits, dtype=torch.float64), 0)
                out[0, h, m] = weights @ values[h // group, kept]
    return out, keys, values
