"""What a cache that keeps few keys costs in quality: SmolLM2-135M with 4 bits, by the share of a text's keys that stay.

Perplexity of the shipped text, and how often the best next token is that of the whole cache, the text being the same.
Beside it the same number of keys without heavy hitters: the first and the last ones only."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from elision.runtime.h2o import H2O
from elision.runtime.lm_step import chain
from elision.runtime.perplexity import shipped_text
from smollm import PACKAGE

import elision

CONTEXT = 1024
SHARES = (1.0, 0.5, 0.25, 0.12, 0.06)
ROWS, SINKS = 8, 4
"""Rows of one call: so many keys more than the limit are there at most."""


def read(model: Any, ids: list[int]) -> tuple[float, np.ndarray]:
    """The perplexity of the ids but the first, and the best id at each of their places."""
    losses, best = [], []
    for first in range(0, len(ids) - 1, ROWS):
        rows = ids[first : min(first + ROWS, len(ids) - 1)]
        scores = model.step(chain(0, first, rows)).astype(np.float64)
        wanted = np.asarray(ids[first + 1 : first + 1 + len(rows)])
        highest = scores.max(1)
        norm = highest + np.log(np.exp(scores - highest[:, None]).sum(1))
        losses.append(norm - scores[np.arange(len(rows)), wanted])
        best.append(scores.argmax(1))
    return math.exp(float(np.concatenate(losses).mean())), np.concatenate(best)


def run(quick: bool = False) -> dict[str, Any]:
    generator = elision.Generator(PACKAGE, bits=4, context=CONTEXT, h2o=H2O(CONTEXT))
    ids = generator.encode(shipped_text())[: 256 if quick else CONTEXT]
    rows: list[dict[str, Any]] = []
    whole = np.zeros(0)
    for share in (1.0, 0.25) if quick else SHARES:
        size = math.ceil(share * len(ids))
        policies = {"heavy": H2O(size, sinks=SINKS), "recent": H2O(size, size - SINKS, SINKS)}
        for name, policy in policies.items():
            if share == 1.0 and name == "recent":
                continue
            found, best = read(generator.model.under(policy), ids)
            whole = best if share == 1.0 else whole
            agreement = float((best == whole).mean())
            rows.append(
                {
                    "share": share,
                    "kept": name,
                    "perplexity": found,
                    "agreement": agreement,
                    **policy.to_json(),
                }
            )
    shown = [row for row in rows if row["kept"] == "heavy"]
    figures = [f"{row['share']:.0%}: {row['perplexity']:.2f} ({row['agreement']:.1%})" for row in shown]
    return {
        "what": f"SmolLM2-135M, {len(ids)} tokens: perplexity (and equal best tokens) by the share of keys that stay",
        "aim": "half the keys within 3 %",
        "figure": ", ".join(figures),
        "rows": rows,
    }
