"""The perplexity of a text under a step graph: what weights of few bits cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..passes.errors import ElisionError
from .lm_step import chain

ROWS = 64
"""Rows of one call; all their scores are wanted, a row of the vocabulary each."""


def shipped_text() -> str:
    """The text that comes with Elision for this: none of it is in the text that weights are calibrated on."""
    return (Path(__file__).parent / "data" / "evaluation.txt").read_text(encoding="utf-8")


def perplexity(generator: Any, text: str | Sequence[int] | None = None) -> dict[str, Any]:
    """exp of the mean negative log likelihood of every token but the first, as a dictionary with the counts.

    text: a text or token ids; None: the shipped one. It is cut into pieces that fit the generator's context, each
    read from an empty cache. Raises ElisionError for a text of fewer than two tokens."""
    ids = generator.encode(shipped_text() if text is None else text)
    total, count = 0.0, 0
    for start in range(0, len(ids), generator.context):
        piece = ids[start : start + generator.context]
        losses = likelihoods(generator.model, piece)
        total -= float(losses.sum())
        count += len(losses)
    if not count:
        raise ElisionError("a perplexity takes a text of two tokens or more")
    return {"perplexity": math.exp(total / count), "tokens": count, "settings": dict(generator.settings)}


def likelihoods(model: Any, ids: Sequence[int]) -> np.ndarray:
    """float64 [len(ids) - 1]: the log likelihood of each id after those before it."""
    found = []
    for first in range(0, len(ids) - 1, ROWS):
        rows = ids[first : min(first + ROWS, len(ids) - 1)]
        scores = model.step(chain(0, first, rows)).astype(np.float64)
        highest = scores.max(1, keepdims=True)
        norm = highest[:, 0] + np.log(np.exp(scores - highest).sum(1))
        wanted = np.asarray(ids[first + 1 : first + 1 + len(rows)])
        found.append(scores[np.arange(len(rows)), wanted] - norm)
    return np.concatenate(found) if found else np.zeros(0)
