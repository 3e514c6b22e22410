"""A masked diffusion model that computes a window, against the full sampler at equal numbers of denoising steps.

Three parts. `trained`: the model of examples/train_diffusion.py, 512 positions, 128 of them a prompt from held-out
files, a token a step; speed, and what the text is worth to a judge. `large`: 12 layers of 512 channels at random, 2,048
positions; the full sampler's steps all cost the same, so some are timed and the rest is counted. `eager`: the same
large model and policy in plain PyTorch (eager, cached), driven by the same sampler, and both hosts of ours."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from elision.runtime.canvas_plan import canvas_ids
from elision.runtime.canvas_policies import NoCache, Window
from elision.runtime.canvas_rules import Rule
from elision.runtime.canvas_sampler import Sampler
from elision.runtime.canvas_step import Scored
from elision.runtime.lm_step import Rows

import elision

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "benchmarks" / "results" / "windowed.json"
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from diffusion_quality import (  # noqa: E402
    DIFFUSION,
    Excerpt,
    distinct_2,
    held_out_prompts,
    judge_nll,
    repeated_4_grams,
)

from tests.runtime.canvas_models import Diffusion, LladaLike  # noqa: E402

POSITIONS, PROMPT = 512, 128
LARGE = 2048
WINDOW = Window(128, 32, 32)
POLICIES = {"full": NoCache(), "window": WINDOW}
SHORT = 128
SPEED = 4
"""Prompts that are timed; quality is read off more of them."""
RUNTIMES = ("onnxruntime", "torch")


def run(quick: bool) -> dict[str, Any]:
    parts = {
        "trained": lambda: _trained(2 if quick else 8, 64 if quick else POSITIONS - PROMPT),
        "large": lambda: _large(512 if quick else LARGE),
        "eager": lambda: _eager(256 if quick else 1024),
    }
    # ELISION_PARTS names those that are run; the others stay as they were kept.
    chosen = os.environ.get("ELISION_PARTS", ",".join(parts)).split(",")
    kept = {} if set(parts) <= set(chosen) else json.loads(KEPT.read_text(encoding="utf-8"))
    trained, large, eager = (part() if name in chosen else kept[name] for name, part in parts.items())
    one = trained["onnxruntime"]
    return {
        "what": "windowed diffusion (W 128, A 32, R 32) against the full sampler, equal steps: trained model with 512 "
        f"positions; 12 x 512 with {large['positions']}; plain PyTorch with the same policy",
        "aim": "8x fewer token computations, 6x faster, quality within 5 %; 30x, early stop 60x; 1.3x of eager",
        "figure": f"{one['fewer']:.1f}x fewer, {one['faster']:.1f}x faster, infilling "
        f"{-trained['infilling_loss']:+.1%}, judge {trained['nll']:+.1%}; {large['faster']:.0f}x, early stop "
        f"{large['early_stop']:.0f}x; {eager['faster']:.2f}x of eager",
        "trained": trained,
        "large": large,
        "eager": eager,
    }


# ---- the trained model -----------------------------------------------------------------------------------
def _trained(count: int, new: int) -> dict[str, Any]:
    excerpts = held_out_prompts(count, PROMPT)
    found: dict[str, Any] = {"prompts": count, "new_tokens": new}
    for runtime in RUNTIMES:
        generator = elision.DiffusionGenerator(str(DIFFUSION), runtime=runtime, context=1024)
        results: dict[str, list[Any]] = {name: [] for name in POLICIES}
        for excerpt in excerpts[:SPEED]:
            for name, policy in POLICIES.items():
                results[name].append(generator.generate(excerpt.prompt, new, policy=policy, eos=[]).result)
        ratios = [a.seconds / b.seconds for a, b in zip(results["full"], results["window"])]
        computed = {name: sum(one.computed for one in all_of) for name, all_of in results.items()}
        spent = {name: sum(one.seconds for one in all_of) for name, all_of in results.items()}
        found[runtime] = {
            "faster": statistics.median(ratios),
            "fewer": computed["full"] / computed["window"],
            "seconds": {name: statistics.median(one.seconds for one in results[name]) for name in results},
            "rest_share": sum(one.rest_seconds for one in results["window"]) / spent["window"],
            "refresh_share": sum(one.refresh_seconds for one in results["window"]) / spent["window"],
        }
        if runtime == RUNTIMES[0]:
            found["infilling"] = _infilling(generator, excerpts, new)
            found["text"] = _text(generator, excerpts, new)
    found["infilling_loss"] = max(1 - one["window"] / one["full"] for one in found["infilling"].values())
    found["nll"] = found["text"]["window"]["nll"] / found["text"]["full"]["nll"] - 1
    hosts = [found[runtime]["seconds"]["window"] for runtime in RUNTIMES]
    found["onnx_of_faster"] = hosts[0] / min(hosts)
    return found


def _infilling(generator: Any, excerpts: list[Excerpt], new: int) -> dict[str, dict[str, float]]:
    """Share of masked places of held-out text that get their true token, decided one by one by confidence: half of the
    places at random, and 30 % of them in runs of 6."""
    found: dict[str, dict[str, float]] = {}
    for kind in ("half", "runs"):
        right, total = dict.fromkeys(POLICIES, 0), 0
        for number, one in enumerate(excerpts):
            true = np.asarray(one.prompt + one.rest)[: PROMPT + new]
            random = np.random.default_rng(number)
            masked = random.random(len(true)) < 0.5
            if kind == "runs":
                masked = np.repeat(random.random(len(true) // 6 + 1) < 0.3, 6)[: len(true)]
            masked[:8] = False
            canvas = np.where(masked, generator.facts.mask, true)
            total += int(masked.sum())
            for name, policy in POLICIES.items():
                ids = generator.generate(canvas, 0, policy=policy, eos=[]).result.token_ids
                right[name] += int((np.asarray(ids) == true)[masked].sum())
        found[kind] = {name: count / total for name, count in right.items()}
    return found


def _text(generator: Any, excerpts: list[Excerpt], new: int) -> dict[str, Any]:
    """Means over the prompts of text in random order at temperature 0.7 (decided by confidence, this model repeats
    itself under any policy, which a judge likes); "true": of the text that really follows."""
    how = {"rule": "random", "temperature": 0.7, "eos": []}
    texts = {
        name: [generator.generate(one.prompt, new, policy=policy, **how).result.token_ids for one in excerpts]
        for name, policy in POLICIES.items()
    }
    texts["true"] = [(one.prompt + one.rest)[: PROMPT + new] for one in excerpts]
    return {
        name: {
            "nll": statistics.mean(judge_nll(ids, PROMPT) for ids in all_of),
            "distinct_2": statistics.mean(distinct_2(ids[PROMPT:]) for ids in all_of),
            "repeated_4_grams": statistics.mean(repeated_4_grams(ids[PROMPT:]) for ids in all_of),
        }
        for name, all_of in texts.items()
    }


# ---- a larger one at random ------------------------------------------------------------------------------
def _model() -> Diffusion:
    torch.manual_seed(0)
    return LladaLike(
        vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=LARGE, mask_token_id=8191, eos_token_id=8190,
    ).eval()  # fmt: skip


def _large(positions: int) -> dict[str, Any]:
    """A prompt of 64 tokens, one token a step; beside WINDOW one with half as many active tokens."""
    generator = elision.DiffusionGenerator(_model(), context=positions)
    prompt = np.random.default_rng(0).integers(0, 8000, 64)
    canvas = canvas_ids(prompt.tolist(), positions - 64, generator.facts.mask)
    steps = positions - 64
    full = _first_steps(
        Sampler(generator.model, generator.facts.mask, policy=NoCache(), steps=steps), canvas, 5
    )
    window, half = (
        Sampler(generator.model, generator.facts.mask, policy=policy, steps=steps).run([canvas])[0]
        for policy in (WINDOW, Window(128, 16, 32))
    )
    # A short answer: a text that ends after 128 tokens stops there; the full sampler goes on to the end.
    stop = _first_steps(
        Sampler(generator.model, generator.facts.mask, policy=WINDOW, steps=steps), canvas, 64
    )
    return {
        "positions": positions,
        "steps": steps,
        "full_step_seconds": full,
        "window_seconds": window.seconds,
        "computed": window.computed,
        "fewer": window.full / window.computed,
        "faster": full * window.steps / window.seconds,
        "faster_16_active": full * half.steps / half.seconds,
        "early_stop": full * steps / (stop * SHORT),
        "early_stop_steps": SHORT,
        "rest_share": window.rest_seconds / window.seconds,
        "refresh_share": window.refresh_seconds / window.seconds,
    }


def _first_steps(sampler: Sampler, canvas: np.ndarray, count: int) -> float:
    """Mean seconds of the first steps, the very first one left out where there are few."""
    events = sampler.stream([canvas])
    if count < 10:
        next(events)
    begun = time.perf_counter()
    for _ in range(count):
        next(events)
    return (time.perf_counter() - begun) / count


# ---- plain PyTorch -----------------------------------------------------------------------------------------
class Eager:
    """A `CanvasModel` as one writes it in PyTorch: rows go through the layers, keys and values into a cache by index,
    and what is seen is picked out of it."""

    def __init__(self, model: Diffusion, capacity: int) -> None:
        self.model, self.capacity, self.vocabulary, self.largest_k = model, capacity, 8192, 8
        self.cache = torch.zeros_like(model.cache(capacity))

    def refresh(self, start: int, ids: np.ndarray, keep: np.ndarray, whole: bool = False) -> Scored:
        places = torch.arange(len(ids))
        return self._run(torch.from_numpy(ids), places, start + places, start + places, keep)

    def step(self, rows: Rows, keep: np.ndarray, whole: bool = False) -> Scored:
        first, count = rows.prefix[0].tolist()
        single = rows.ancestors[0][rows.ancestors[0] >= 0]
        seen = torch.cat([torch.arange(first, first + count), torch.from_numpy(single.astype(np.int64))])
        write = torch.from_numpy(rows.slots.astype(np.int64))
        return self._run(torch.from_numpy(rows.ids), torch.from_numpy(rows.positions), write, seen, keep)

    @torch.inference_mode()
    def _run(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        write: torch.Tensor,
        seen: torch.Tensor,
        keep: np.ndarray,
    ) -> Scored:
        logits = self.model.stale(ids, positions, self.cache, write, [(torch.arange(len(ids)), seen)])
        logits = logits[torch.from_numpy(keep)]
        values, found = logits.topk(self.largest_k)
        logs = logits.log_softmax(-1)
        entropy = -(logs.exp() * logs).sum(-1)
        return Scored(found.numpy(), values.numpy(), logits.logsumexp(-1).numpy(), entropy.numpy())


def _eager(positions: int) -> dict[str, Any]:
    model = _model()
    sides: dict[str, Any] = {"eager": Eager(model, positions)}
    mask = model.config.mask_token_id
    for runtime in RUNTIMES:
        sides[runtime] = elision.DiffusionGenerator(_model(), runtime=runtime, context=positions).model
    prompt = np.random.default_rng(0).integers(0, 8000, 64)
    canvas = canvas_ids(prompt.tolist(), positions - 64, mask)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    tokens: dict[str, list[int]] = {}
    for _ in range(3):
        for name, side in sides.items():
            sampler = Sampler(side, mask, policy=WINDOW, rule=Rule(), steps=(positions - 64) // 4)
            result = sampler.run([canvas])[0]
            seconds[name].append(result.seconds)
            tokens[name] = result.token_ids
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "positions": positions,
        "seconds": middle,
        "faster": middle["eager"] / middle["onnxruntime"],
        "onnx_of_faster": middle["onnxruntime"] / min(middle["onnxruntime"], middle["torch"]),
        "same_tokens": {
            name: float(np.mean(np.asarray(tokens[name]) == np.asarray(tokens["eager"]))) for name in RUNTIMES
        },
    }
