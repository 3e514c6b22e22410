"""What a step of M rows costs, T(M)/T(1): SmolLM2-135M at 4 bits, ours against onnxruntime-genai's int4 graph.

Speculative verification lives on this curve being flat."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
from elision.runtime.lm_step import chain
from smollm import PACKAGE, PeerSteps, peer_folder

import elision

ROWS, PAST = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64), 128


def run(quick: bool) -> dict[str, Any]:
    rounds = 3 if quick else 21
    generator = elision.Generator(PACKAGE, bits=4, context=512)
    other = PeerSteps(peer_folder(), 512)
    ids = np.random.default_rng(0).integers(100, 40000, PAST + max(ROWS))
    generator.model.step(chain(0, 0, ids[:PAST].tolist()))
    other.step(ids[:PAST], 0)
    sides = {
        "elision": lambda count: generator.model.step(chain(0, PAST, ids[PAST : PAST + count].tolist())),
        "onnxruntime-genai": lambda count: other.step(ids[PAST : PAST + count], PAST),
    }
    times: dict[str, dict[int, list[float]]] = {name: {count: [] for count in ROWS} for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            time.sleep(0.1)  # the other session's threads go on turning for a while
            side(1)
            for count in ROWS:
                begun = time.perf_counter()
                side(count)
                if turn:
                    times[name][count].append(time.perf_counter() - begun)
    ms = {
        name: {c: statistics.median(found) * 1e3 for c, found in side.items()} for name, side in times.items()
    }
    ratios = {name: {c: round(found / side[1], 2) for c, found in side.items()} for name, side in ms.items()}
    mine, theirs = ratios["elision"], ratios["onnxruntime-genai"]
    return {
        "what": "SmolLM2-135M, 4 bits: cost of verifying M rows, T(M)/T(1)",
        "figure": f"T(8) {mine[8]}, T(16) {mine[16]} (onnxruntime-genai's graph: {theirs[8]}, {theirs[16]})",
        "aim": "T(8) 1.5, T(16) 2.2",
        "ratios": ratios,
        "ms": {name: {c: round(found, 3) for c, found in side.items()} for name, side in ms.items()},
    }
