"""Token merging in numpy, one sample and one token at a time, written from the papers to check the ops against."""

from __future__ import annotations

import numpy as np


def match(
    metric: np.ndarray, r: int, prefix: int = 0, suffix: int = 0, order: str = "published"
) -> tuple[list[int], list[int]]:
    """metric [N, D] -> slot of every token, and the kept token of every slot."""
    count = len(metric)
    free = range(prefix, count - suffix)
    r = max(0, min(r, (count - prefix - suffix) // 2))
    if r == 0:
        return list(range(count)), list(range(count))
    a = [i for i in free if i % 2 == 0]
    b = [i for i in free if i % 2 == 1]
    best: dict[int, tuple[float, int]] = {}
    for i in a:
        similar = [_cosine(metric[i], metric[j]) for j in b]
        winner = int(np.argmax(similar))
        best[i] = (similar[winner], b[winner])
    ranking = sorted(a, key=lambda i: -best[i][0])  # stable: the earlier of equals first
    merged, stay = ranking[:r], ranking[r:]
    if prefix:
        stay = sorted(stay)
    keep = [*range(prefix), *stay, *b, *range(count - suffix, count)]
    if order == "original":
        keep = sorted(keep)
    slot = {token: place for place, token in enumerate(keep)}
    for i in merged:
        slot[i] = slot[best[i][1]]
    return [slot[i] for i in range(count)], keep


def merge(x: np.ndarray, size: np.ndarray, slot: list[int], slots: int) -> tuple[np.ndarray, np.ndarray]:
    """x [N, C], size [N] -> weighted mean per slot [slots, C] and sizes [slots]; slots of size 0 hold zeros."""
    total, new_size = np.zeros((slots, x.shape[1])), np.zeros(slots)
    for token, place in enumerate(slot):
        if place >= 0:
            total[place] += x[token].astype(np.float64) * size[token]
            new_size[place] += size[token]
    return total / np.maximum(new_size, 1e-30)[:, None], new_size


def _cosine(u: np.ndarray, v: np.ndarray) -> float:
    length = float(np.linalg.norm(u) * np.linalg.norm(v))
    return float(u @ v) / length if length else 0.0
