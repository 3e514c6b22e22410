"""Is the text the same? Every drafter and tree on both runtimes against plain decoding of the same runtime, token by
token, over all prompts; SmolLM2-135M at 4 bits, 128 new tokens, prompts in batches.

ELISION_PROMPTS names a file of prompts, ELISION_CASES chooses ("onnxruntime auto marginal, torch self marginal")."""

from __future__ import annotations

import os
import time
from typing import Any

from smollm import PACKAGE
from speculation import CONTEXT, NEW, prompts

import elision

TREES = ("marginal", "fixed", "beam", "dyspec")
DRAFTERS = ("ngram", "recycling", "model", "self", "hierarchical")
CASES = [
    (runtime, drafter, tree)
    for runtime in ("onnxruntime", "torch")
    for drafter, tree in (
        *(("auto", tree) for tree in TREES),
        *((drafter, "marginal") for drafter in DRAFTERS),
    )
]


def run(quick: bool) -> dict[str, Any]:
    chosen = [entry["prompt"] for entry in prompts()][:: 20 if quick else 1]
    new = 32 if quick else NEW
    asked = os.environ.get("ELISION_CASES")
    cases = CASES if asked is None else [tuple(part.split()) for part in asked.split(",")]
    rows, expected = [], {}
    for runtime, drafter, tree in cases:
        options: dict[str, Any] = {"bits": 4, "runtime": runtime, "context": 4 * CONTEXT}
        plain = elision.Generator(PACKAGE, **options)
        ids = [plain.encode(prompt)[: CONTEXT - new] for prompt in chosen]
        if runtime not in expected:
            expected[runtime] = [one.token_ids for one in plain.generate(ids, max_new_tokens=new, eos=[])]
        if drafter in ("model", "hierarchical"):  # half of the layers of a small model guess nothing right
            options["draft_model"] = PACKAGE
        drafting = elision.Generator(PACKAGE, drafter=drafter, tree=tree, guard=False, **options)
        begun = time.perf_counter()
        found = drafting.generate(ids, max_new_tokens=new, eos=[])
        told = [one.speculation for one in found]
        row = {
            "runtime": runtime,
            "drafter": drafter,
            "tree": tree,
            "prompts": len(ids),
            "differ": sum(one.token_ids != ids for one, ids in zip(found, expected[runtime], strict=True)),
            "tokens_per_verification": round(
                sum(one.new_tokens - 1 for one in found) / sum(entry["verifications"] for entry in told), 3
            ),
            "rows_per_verification": round(
                sum(entry["rows_verified"] for entry in told) / sum(entry["verifications"] for entry in told),
                3,
            ),
            "exactness": plain.settings["exactness"],
            "seconds": round(time.perf_counter() - begun, 1),
        }
        rows.append(row)
        print(row, flush=True)
    differ = sum(row["differ"] for row in rows)
    return {
        "what": f"SmolLM2-135M, 4 bits, {len(chosen)} prompts, {new} new tokens: {len(rows)} drafters, trees, runtimes",
        "figure": f"{differ} texts of {sum(row['prompts'] for row in rows)} differ from plain decoding",
        "aim": "none differs",
        "rows": rows,
    }
