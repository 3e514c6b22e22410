"""Speculative decoding of SmolLM2-135M at 4 bits against our own plain decoding and onnxruntime-genai's.

One prompt after the other, batch 1, greedy, ends of text ignored so that all sides write as many tokens. The drafter
keeps what it learned from earlier prompts, as it does for a user. ELISION_PROMPTS names a file of prompts (JSON lines
with `kind` and `prompt`); without it, those in data/prompts.jsonl are used."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from smollm import PACKAGE, peer_folder

import elision

NEW, CONTEXT = 128, 2048
SIDES = ("onnxruntime-genai", "plain", "auto")
REPEATING = ("code", "summarising", "context")
"""Kinds of prompts whose answers repeat what was in them."""


def prompts() -> list[dict[str, str]]:
    file = os.environ.get("ELISION_PROMPTS") or Path(__file__).parent / "data" / "prompts.jsonl"
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]


def run(quick: bool) -> dict[str, Any]:
    chosen = prompts()
    if quick:
        kinds = sorted({entry["kind"] for entry in chosen})
        chosen = [next(entry for entry in chosen if entry["kind"] == kind) for kind in kinds]
    new = 32 if quick else NEW
    plain = elision.Generator(PACKAGE, bits=4, context=CONTEXT)
    drafting = elision.Generator(PACKAGE, bits=4, context=CONTEXT, drafter="auto")
    peer = Peer()
    for side in (plain, drafting):
        side.generate("Hello", max_new_tokens=16, eos=[])
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    different = 0
    for entry in chosen:
        ids = plain.encode(entry["prompt"])[: CONTEXT - new]
        results = {"onnxruntime-genai": peer.generate(ids, new)}
        for name, generator in (("plain", plain), ("auto", drafting)):
            time.sleep(0.1)  # the other side's threads go on turning for a while
            results[name] = generator.generate(ids, max_new_tokens=new, eos=[]).to_json()
        different += results["plain"]["token_ids"] != results["auto"]["token_ids"]
        for name in SIDES:
            found[name].append({"kind": entry["kind"], **results[name]})
    return summary(found, different, new)


def summary(found: dict[str, list[dict[str, Any]]], different: int, new: int) -> dict[str, Any]:
    kinds = sorted({entry["kind"] for entry in found["plain"]})
    groups = {kind: (kind,) for kind in kinds} | {"all": tuple(kinds), "repeating": REPEATING}
    speeds: dict[str, dict[str, float]] = defaultdict(dict)
    for group, members in groups.items():
        for side in SIDES:
            taken = [entry for entry in found[side] if entry["kind"] in members]
            seconds = sum(entry["decode_seconds"] for entry in taken)
            speeds[group][side] = round(sum(entry["new_tokens"] - 1 for entry in taken) / seconds, 1)
    told = [entry["speculation"] for entry in found["auto"]]
    rounds = sum(entry["verifications"] for entry in told)
    tokens = sum(entry["new_tokens"] - 1 for entry in found["auto"])
    spent = {part: sum(entry[f"{part}_seconds"] for entry in told) for part in ("draft", "verify", "rest")}
    ratios = {
        group: {
            "of genai": round(values["auto"] / values["onnxruntime-genai"], 3),
            "of plain": round(values["auto"] / values["plain"], 3),
        }
        for group, values in speeds.items()
    }
    by_prompt = [
        b["tokens_per_second"] / a["tokens_per_second"]
        for a, b in zip(found["plain"], found["auto"], strict=True)
    ]
    return {
        "what": f"SmolLM2-135M, 4 bits, {len(found['plain'])} prompts, {new} new tokens, drafter auto",
        "figure": f"{ratios['all']['of genai']:.2f}x of onnxruntime-genai, "
        f"{ratios['repeating']['of genai']:.2f}x where context repeats, "
        f"{ratios['all']['of plain']:.2f}x of our plain decoding, "
        f"{tokens / rounds:.2f} tokens a verification, {different} texts differ",
        "aim": "1.8x, 2.5x, 2.0 tokens a verification, no text differs",
        "texts_that_differ": different,
        "tokens_per_second": speeds,
        "ratios": ratios,
        "least_kind": min(ratios[kind]["of plain"] for kind in kinds),
        "median_prompt": round(statistics.median(by_prompt), 3),
        "tokens_per_verification": round(tokens / rounds, 3),
        "rest_share": round(spent["rest"] / sum(spent.values()), 4),
        "draft_share": round(spent["draft"] / sum(spent.values()), 4),
    }


class Peer:
    """onnxruntime-genai's plain decoding of its own int4 model."""

    def __init__(self) -> None:
        import onnxruntime_genai as genai

        self._genai, self._model = genai, genai.Model(str(peer_folder()))

    def generate(self, ids: list[int], new: int) -> dict[str, Any]:
        length = len(ids) + new
        options = self._genai.GeneratorParams(self._model)
        options.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = self._genai.Generator(self._model, options)
        begun = time.perf_counter()
        generator.append_tokens(np.asarray(ids, np.int32)[None])
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(new - 1):
            generator.generate_next_token()
        ended = time.perf_counter()
        return {"new_tokens": new, "prefill_seconds": first - begun, "decode_seconds": ended - first}
