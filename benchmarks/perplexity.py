"""Perplexity of the shipped text for every number of bits, through the step graphs and their kernels: SmolLM2-135M,
whose file has about 4 bits (32: the plain float32 values of them)."""

from __future__ import annotations

from typing import Any

from elision.runtime.perplexity import perplexity
from smollm import PACKAGE

import elision

BITS: tuple[int | None, ...] = (32, 16, 8, 4, None)


def run(quick: bool = False) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for bits in BITS[-1:] if quick else BITS:
        found = perplexity(elision.Generator(PACKAGE, bits=bits, context=1024))
        rows.append({"bits": found["settings"]["bits"], **found})
    base = rows[0]["perplexity"]
    for row in rows:
        row["ratio"] = row["perplexity"] / base
    figures = [f"{row['bits']}: {row['perplexity']:.2f} ({row['ratio']:.4f})" for row in rows]
    return {
        "what": "SmolLM2-135M: perplexity of the shipped text by bits, and to the first",
        "aim": "4 bits within 3 % of float32",
        "figure": ", ".join(figures),
        "rows": rows,
    }
