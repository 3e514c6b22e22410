"""Plain decoding of SmolLM2-135M at 4 bits against onnxruntime-genai's int4 model: tokens a second, and of a prompt."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
from smollm import PACKAGE, gguf_file, peer_folder

import elision

PROMPT, NEW = 256, 64
BANDWIDTH = 30e9  # bytes a second that these cores read from memory; shared/design measured it


def run(quick: bool) -> dict[str, Any]:
    rounds, new = (2, 16) if quick else (11, NEW)
    import onnxruntime_genai as genai

    model = genai.Model(str(peer_folder()))
    ids = np.random.default_rng(0).integers(100, 40000, PROMPT)
    generators = {bits: elision.Generator(PACKAGE, bits=bits, context=512) for bits in (4, 8)}
    torch_side = elision.Generator(PACKAGE, bits=4, context=512, runtime="torch")

    def peer() -> tuple[float, float]:
        options = genai.GeneratorParams(model)
        options.set_search_options(max_length=512, min_length=512, do_sample=False)
        peer_generator = genai.Generator(model, options)
        begun = time.perf_counter()
        peer_generator.append_tokens(ids[None].astype(np.int32))
        peer_generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(new - 1):
            peer_generator.generate_next_token()
        return PROMPT / (first - begun), (new - 1) / (time.perf_counter() - first)

    def ours(generator: Any) -> tuple[float, float]:
        found = generator.generate(ids.tolist(), max_new_tokens=new, eos=[])
        return PROMPT / found.prefill_seconds, found.tokens_per_second

    sides = {
        "onnxruntime-genai int4": peer,
        "elision 4 bits": lambda: ours(generators[4]),
        "elision 8 bits": lambda: ours(generators[8]),
        "elision 4 bits, torch": lambda: ours(torch_side),
    }
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            time.sleep(0.1)  # the other side's threads go on turning for a while
            found = side()
            if turn:  # the first warms up
                speeds[name].append(found)
    middle = {
        name: {
            "prefill": round(statistics.median(p for p, _ in found), 1),
            "decode": round(statistics.median(d for _, d in found), 1),
        }
        for name, found in speeds.items()
    }
    first, second = speeds["onnxruntime-genai int4"], speeds["elision 4 bits"]
    prefill, decode = (
        statistics.median(b[part] / a[part] for a, b in zip(first, second, strict=True)) for part in (0, 1)
    )
    size = gguf_file().stat().st_size  # its blocks are kept, so this is what a token reads
    return {
        "what": f"SmolLM2-135M, 4 bits, {PROMPT} prompt and {new} new tokens, against onnxruntime-genai int4",
        "figure": f"decode {decode:.2f}x ({middle['elision 4 bits']['decode']:.0f} tokens/s), "
        f"prefill {prefill:.2f}x ({middle['elision 4 bits']['prefill']:.0f} tokens/s)",
        "aim": "decode 1.15x, prefill 1.5x",
        "decode_ratio": round(decode, 3),
        "prefill_ratio": round(prefill, 3),
        "tokens_per_second": middle,
        "bytes": size,
        "floor": f"{BANDWIDTH / size:.0f} tokens/s: the weights read at {BANDWIDTH / 1e9:.0f} GB/s",
    }
