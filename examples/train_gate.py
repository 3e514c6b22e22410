"""Trains delete gates on a small byte-level model, from nothing, and tells what deleting costs.

    python examples/train_gate.py --out DIR --seed 0

The model has ByT5's shape and vocabulary (bytes, no tokenizer) and learns to fill in spans that are missing from the
docstrings of Python's standard library. Then, for each of several deletion rates, a copy is trained on with a soft
gate before its third encoder block (the pass `token-gate`, a controller holds the rate), and one copy as long without
one. At last the gates are hard: DIR/gate.json has the loss on held-out files for soft and hard gates, the rate, and the
estimated work of the graph; DIR/gate.png the curve; DIR/gates-RATE.safetensors the gates.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers as hf
from elision.passes.token_gate import TokenGate
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import elision

FIRST_BYTE, EOS, SENTINELS, VOCABULARY = 3, 1, 16, 3 + 256 + 16
"""As in ByT5: padding 0, end 1, unknown 2, then the bytes; sentinels behind them."""

WINDOW, SPAN, NOISE = 96, 8, 0.15
"""Bytes of a sample, the mean length of a missing span, and the share of the bytes that is missing."""

SOURCE, TARGET, BATCH = 96, 32, 16
LAYER, SLACK = 2, 0.1
"""The block that the gate stands before, and by how much of the tokens the capacity exceeds the rate's share."""

TUNING, KP, KI = 2e-4, 3e-3, 3e-5
"""The rate that copies learn at, and the controller's gains. All are low: the paper's are for 5,000 steps of a large
model, and what the regulariser asks of the blocks before the gate must stay small beside the loss, or they close it
faster than its controller sees."""

RATES = (0.3, 0.5, 0.7, 0.85)


# ---- data ------------------------------------------------------------------------------------------------
def docstrings() -> tuple[bytes, bytes]:
    """Those of the standard library's files, to learn from and held out (one file in ten)."""
    parts: tuple[list[str], list[str]] = ([], [])
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py")):
        if "site-packages" in file.parts or "test" in file.parts or "tests" in file.parts:
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        held_out = zlib.crc32(file.name.encode()) % 10 == 0
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                found = ast.get_docstring(node)
                if found and len(found) > 40:
                    parts[held_out].append(" ".join(found.split()))
    return "\n".join(parts[0]).encode(), "\n".join(parts[1]).encode()


@dataclass(frozen=True)
class Batch:
    """source, mask [B, SOURCE], given, wanted [B, TARGET] int64; wanted is -100 where nothing is asked."""

    source: Tensor
    mask: Tensor
    given: Tensor
    wanted: Tensor

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.source, self.mask, self.given


def batches(text: bytes, seed: int) -> Iterator[Batch]:
    """Samples without end: windows of the text with spans cut out (Raffel et al., T5)."""
    data, random = np.frombuffer(text, np.uint8).astype(np.int64) + FIRST_BYTE, np.random.default_rng(seed)
    while True:
        rows = [sample(data, random) for _ in range(BATCH)]
        source = padded([row[0] for row in rows], SOURCE, 0)
        wanted = padded([row[1] for row in rows], TARGET, -100)
        given = torch.cat([torch.zeros(BATCH, 1, dtype=torch.int64), wanted[:, :-1].clamp(min=0)], 1)
        yield Batch(source, (source != 0).long(), given, wanted)


def sample(data: np.ndarray, random: np.random.Generator) -> tuple[list[int], list[int]]:
    """A window without some spans, a sentinel in the place of each; and the spans behind their sentinels."""
    length = int(random.integers(WINDOW // 2, WINDOW))
    start = int(random.integers(0, len(data) - length))
    window = data[start : start + length]
    count = max(1, round(length * NOISE / SPAN))
    places = np.sort(random.choice(length // (2 * SPAN), min(count, length // (2 * SPAN)), replace=False))
    source: list[int] = []
    target: list[int] = []
    done = 0
    for index, place in enumerate(places):
        first = int(place) * 2 * SPAN + int(random.integers(0, SPAN))
        stop = min(first + int(random.integers(SPAN // 2, SPAN * 3 // 2 + 1)), length)
        sentinel = FIRST_BYTE + 256 + index
        source += [*window[done:first].tolist(), sentinel]
        target += [sentinel, *window[first:stop].tolist()]
        done = stop
    return [*source, *window[done:].tolist(), EOS][:SOURCE], [*target, EOS][:TARGET]


def padded(rows: list[list[int]], length: int, fill: int) -> Tensor:
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows])


# ---- the model -------------------------------------------------------------------------------------------
class Filler(nn.Module):
    """source, mask, given -> logits [B, TARGET, V]."""

    def __init__(self) -> None:
        super().__init__()
        config = hf.T5Config(
            **{"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 192, "num_heads": 4},
            **{"num_layers": 6, "num_decoder_layers": 2, "dropout_rate": 0.0, "use_cache": False},
            **{"decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"},
        )
        self.model = hf.T5ForConditionalGeneration(config)

    def forward(self, source: Tensor, mask: Tensor, given: Tensor) -> Tensor:
        return self.model(input_ids=source, attention_mask=mask, decoder_input_ids=given).logits


def loss_of(logits: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), batch.wanted.flatten(), ignore_index=-100)


def learn(
    module: nn.Module, step: Callable[[Batch], Tensor], text: bytes, steps: int, rate: float, seed: int
) -> None:
    """AdamW for so many steps, the rate rising for a twentieth of them and falling to 0 from a fifth on."""
    optimiser = torch.optim.AdamW(module.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.01)
    for index, batch in zip(range(1, steps + 1), batches(text, seed)):
        passed = index / steps
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, 20 * passed, 1.25 * (1 - passed))
        optimiser.zero_grad()
        loss = step(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        if index % 100 == 0:
            print(f"  step {index} of {steps}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def judge(run: Callable[..., Any], text: bytes, count: int) -> dict[str, float]:
    """The loss of each byte on `count` fixed batches; with gates also the share that they delete."""
    total = bytes_asked = deleted = tokens = 0.0
    for _, batch in zip(range(count), batches(text, 999)):
        found = run(*batch.args)
        logits, gate = found if isinstance(found, tuple) else (found, None)
        asked = float((batch.wanted != -100).sum())
        total, bytes_asked = total + float(loss_of(logits, batch)) * asked, bytes_asked + asked
        if gate is not None:
            real = batch.mask > 0
            deleted, tokens = deleted + float(((gate < -15) & real).sum()), tokens + float(real.sum())
    made = {"loss": total / bytes_asked}
    return made if not tokens else {**made, "deleted": deleted / tokens}


@torch.no_grad()
def few_deleted(module: nn.Module, example: tuple[Tensor, ...]) -> None:
    """Sets the gate's bias so that it deletes a tenth of a batch: what it has deleted learns little, so that a gate
    that starts above its rate would stay there."""
    gate = module(*example)[1][example[1] > 0]
    bias = next(p for name, p in module.named_parameters() if "elision_gate" in name and p.numel() == 1)
    bias -= torch.logit(1 + gate / 30).quantile(0.1)


def gated(
    base: Filler, rate: float, text: bytes, held_out: bytes, steps: int, count: int, out: Path, seed: int
) -> dict[str, Any]:
    """A copy trained on with a gate that deletes `rate` of the tokens, judged soft and hard."""
    filler = copy.deepcopy(base)
    example = next(batches(text, seed)).args
    soft = elision.optimize(filler, [TokenGate(mode="soft", layer=LAYER, softmax1=True)], example, force=True)
    module = soft.module
    few_deleted(module, example)
    control = elision.GateController(rate, kp=KP, ki=KI)

    def step(batch: Batch) -> Tensor:
        logits, gate = module(*batch.args)
        return loss_of(logits, batch) + control(gate, batch.mask)

    learn(module, step, text, steps, TUNING, seed)
    gates = {name: p.detach().clone() for name, p in module.named_parameters() if "elision_gate" in name}
    save_file(gates, str(out / f"gates-{rate:g}.safetensors"))
    capacity = round(1 - rate + SLACK, 3)
    one = TokenGate(layer=LAYER, softmax1=True, capacity=capacity, arrays=gates)
    hard = elision.optimize(filler, [one], example, force=True)
    work = [cost.flops for cost in (hard.report.cost_before, hard.report.cost_after)]
    return {
        "target": rate,
        "capacity": capacity,
        "alpha": control.alpha,
        "soft": judge(module, held_out, count),
        "hard": judge(hard.module, held_out, count),
        "work": work[1] / work[0],
    }


def draw(found: dict[str, Any], file: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    rates = [100 * run["soft"]["deleted"] for run in found["gates"]]
    for mode, marker in (("soft", "o"), ("hard", "s")):
        axes.plot(rates, [run[mode]["loss"] for run in found["gates"]], f"{marker}-", label=f"{mode} gates")
    axes.axhline(found["without"]["loss"], color="grey", linestyle=":", label="no gate, trained as long")
    axes.set(xlabel="bytes deleted before block 3 of 6, %", ylabel="loss per byte, nats")
    axes.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2400, help="of the model, without a gate")
    parser.add_argument("--gate-steps", type=int, default=600, help="of each copy")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judge", type=int, default=40, help="held-out batches that a loss is measured on")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    text, held_out = docstrings()
    print(f"{len(text)} bytes to learn from, {len(held_out)} held out", flush=True)
    base, again, count = Filler(), options.seed + 2, options.judge
    print(f"{sum(p.numel() for p in base.parameters()) / 1e6:.2f} M parameters", flush=True)
    learn(base, lambda b: loss_of(base(*b.args), b), text, options.steps, 2e-3, options.seed + 1)
    longer = copy.deepcopy(base)
    learn(longer, lambda b: loss_of(longer(*b.args), b), text, options.gate_steps, TUNING, again)
    found: dict[str, Any] = {
        "bytes": len(text),
        "steps": [options.steps, options.gate_steps],
        "base": judge(base, held_out, count),
        "without": judge(longer, held_out, count),
        "gates": [],
    }
    for rate in RATES:
        run = gated(base, rate, text, held_out, options.gate_steps, count, options.out, again)
        print(json.dumps(run), flush=True)
        found["gates"].append(run)
        (options.out / "gate.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found, options.out / "gate.png")


if __name__ == "__main__":
    main()
