"""Trains the two models that the quality of windowed diffusion is measured with, from nothing, on two CPU cores.

    python examples/train_diffusion.py diffusion    # a masked diffusion model, examples/models/pycode-diffusion
    python examples/train_diffusion.py judge        # an autoregressive one that scores text, .../pycode-judge

Both learn Python from the library of the running interpreter (diffusion_data.py). The recipe has a bar: the diffusion
model must fill in masked text of held-out files clearly better than four-grams do, or the exit status is 1. What it
took and what came out is in training.json. A run that was cut off goes on where it was when started again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from diffusion_data import (
    EOS,
    MASK,
    PAD,
    VOCABULARY,
    Corpus,
    encoded,
    held_out,
    save_tokenizer,
    sources,
    train_tokenizer,
    write_prompts,
)
from diffusion_ngram import NGrams
from diffusion_quality import infilling_accuracy
from diffusion_training import diffusion_loss, next_token_loss, noised, train
from torch import Tensor, nn

CANVAS = 512
BATCH_TOKENS = 4096
SHARES = (0.15, 0.5)
"""Shares of masked ids at which infilling is measured."""

MARGIN = 1.25
"""The bar: so many times the four-grams' accuracy, at every share."""

STEPS = {"diffusion": 1800, "judge": 800}
RATE = {"diffusion": 2e-3, "judge": 2e-3}
FOLDERS = {"diffusion": "pycode-diffusion", "judge": "pycode-judge"}


def diffusion_model() -> nn.Module:
    """A bidirectional transformer: every layer sees the whole canvas, positions are rotary."""
    config = transformers.ModernBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        max_position_embeddings=2048,
        global_attn_every_n_layers=1,
        rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}},
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=EOS,
        cls_token_id=EOS,
        sep_token_id=EOS,
        mask_token_id=MASK,
    )
    return transformers.ModernBertForMaskedLM(config)


def judge_model() -> nn.Module:
    """A small causal transformer over the same ids."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=EOS,
    )
    return transformers.LlamaForCausalLM(config)


def canvas_length(step: int, steps: int) -> int:
    """Short canvases first, since they cost less per id and the nearest context is learned first; then whole ones, and
    now and then one of twice the length, so that positions beyond the canvas are not new."""
    if step < 0.5 * steps:
        return CANVAS // 2
    return 2 * CANVAS if step % 8 == 0 else CANVAS


@torch.no_grad()
def infilled(model: Any, ids: np.ndarray, masked: np.ndarray) -> np.ndarray:
    """The likeliest id at every place after one forward over canvases of ids [B, N]; never the mask."""
    shown = torch.from_numpy(np.where(masked, MASK, ids))
    rows = []
    for part in shown.split(16):
        logits = model(part).logits
        logits[..., MASK] = -math.inf
        rows.append(logits.argmax(-1))
    return torch.cat(rows).numpy()


def measure_diffusion(model: Any, canvases: np.ndarray, ngrams: NGrams, text: np.ndarray) -> dict[str, Any]:
    """Infilling accuracy beside the four-grams', and the bound on the likelihood. canvases: [n, N]; text: ids [n]."""
    random = np.random.default_rng(0)
    shares: dict[str, dict[str, float]] = {}
    nothing = np.zeros(canvases.shape, bool)
    given_all = ngrams.fill(canvases, nothing)
    for share in SHARES:
        masked = random.random(canvases.shape) < share
        shares[f"{share:.0%}"] = {
            "model": infilling_accuracy(infilled(model, canvases, masked)[masked], canvases[masked]),
            "4-grams": infilling_accuracy(ngrams.fill(canvases, masked)[masked], canvases[masked]),
            "4-grams, left context never masked": infilling_accuracy(given_all[masked], canvases[masked]),
        }
    bound: list[Tensor] = []
    with torch.no_grad():
        for part in np.array_split(canvases, max(1, len(canvases) // 16)):
            noise = noised(part, random, lengths=(0, 0))
            logits = model(noise.shown).logits.flatten(0, 1)[noise.places]
            nats = nn.functional.cross_entropy(logits, noise.targets, reduction="none")
            bound.append((nats * noise.weights).sum())
    return {
        "infilling accuracy": shares,
        "nats per token, upper bound": float(torch.stack(bound).mean()),
        "nats per token of 4-grams": ngrams.nats(text),
        "bar": f"the 4-grams' accuracy times {MARGIN}",
        "passed": all(found["model"] > MARGIN * found["4-grams"] for found in shares.values()),
    }


@torch.no_grad()
def measure_judge(model: Any, canvases: np.ndarray, ngrams: NGrams, text: np.ndarray) -> dict[str, Any]:
    """Likelihood of held-out text."""
    nats = [
        next_token_loss(model, model.model, part, np.random.default_rng(0)).item()
        for part in np.array_split(canvases, max(1, len(canvases) // 16))
    ]
    mean, other = float(np.mean(nats)), ngrams.nats(text)
    return {
        "nats per token": mean,
        "perplexity": math.exp(mean),
        "nats per token of 4-grams": other,
        "bar": "fewer nats than the 4-grams",
        "passed": mean < other,
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [
            line.split(":")[1] for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def save(model: Any, folder: Path, fill: Any) -> None:
    """Writes the model in half precision, and what `fill` adds, to a temporary folder; then puts that in place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    temporary.chmod(0o755)
    model.half().save_pretrained(temporary)
    model.float()
    config = json.loads((temporary / "config.json").read_text())
    config["dtype"] = "float32"  # what to compute in; the file holds float16, since it is half as large
    (temporary / "config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    (temporary / "generation_config.json").unlink(missing_ok=True)
    (temporary / "model.safetensors").chmod(0o644)
    fill(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=sorted(STEPS))
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "models")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "elision-training")
    parser.add_argument(
        "--steps", type=int, help="training steps; the default is what the models there were given"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pilot", type=float, help="stop after so many seconds, measure, keep nothing")
    options = parser.parse_args()
    kind, steps = options.model, options.steps or STEPS[options.model]
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    started = time.perf_counter()
    files = list(sources())
    parts = [[file for file in files if held_out(file[0]) == kept] for kept in (False, True)]
    tokenizer = train_tokenizer([text for _, text in parts[0]])
    learned, kept = (encoded(tokenizer, [text for _, text in part]) for part in parts)
    ngrams = NGrams(learned.ids, VOCABULARY)
    print(
        f"{len(parts[0])} files, {len(learned.ids) / 1e6:.2f} M tokens to learn from; {len(parts[1])} files, "
        f"{len(kept.ids) / 1e6:.2f} M tokens held out; read in {time.perf_counter() - started:.0f} s; "
        f"unigrams {unigram_nats(learned, kept):.3f} nats per token, 4-grams {ngrams.nats(kept.ids):.3f}",
        flush=True,
    )

    def batch(step: int, random: np.random.Generator) -> np.ndarray:
        length = canvas_length(step, steps) if kind == "diffusion" else CANVAS
        return learned.canvases(BATCH_TOKENS // length, length, random)

    model = diffusion_model() if kind == "diffusion" else judge_model()
    size = sum(parameter.numel() for parameter in model.parameters())
    loss_of = diffusion_loss if kind == "diffusion" else next_token_loss
    checkpoint = options.work / f"{kind}-{steps}-{options.seed}{'-pilot' if options.pilot else ''}.pt"
    progress = train(
        model, batch, loss_of, steps, RATE[kind], options.seed, checkpoint, options.pilot or math.inf
    )

    canvases = kept.full_canvases(CANVAS)[:: 4 if options.pilot else 1]
    measure = measure_diffusion if kind == "diffusion" else measure_judge
    result = measure(model, canvases, ngrams, kept.ids)
    record = {
        "model": f"{kind}, {size / 1e6:.2f} M parameters",
        "data": {
            "from": f"the library of Python {platform.python_version()}",
            "files": len(parts[0]),
            "tokens": len(learned.ids),
            "held-out files": len(parts[1]),
            "held-out tokens": len(kept.ids),
        },
        "training": {
            "seed": options.seed,
            "steps": progress.step,
            "tokens": progress.tokens,
            "wall seconds": round(progress.wall),
            "cpu seconds": round(progress.cpu),
            "machine": machine(),
        },
        "held-out text": result,
        "loss": progress.curve(),
    }
    print(json.dumps({name: record[name] for name in ("model", "training", "held-out text")}, indent=2))
    if options.pilot:
        return

    def fill(folder: Path) -> None:
        save_tokenizer(tokenizer, folder)
        (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if kind == "diffusion":
            write_prompts(folder / "prompts.jsonl", tokenizer, parts[1], 24, 128, CANVAS)

    save(model, options.folder / FOLDERS[kind], fill)
    if not result["passed"]:
        sys.exit(f"the bar was not reached: {result['bar']}")


def unigram_nats(learned: Corpus, kept: Corpus) -> float:
    """Nats per token of held-out text, from the frequencies of ids alone."""
    counts = np.bincount(learned.ids, minlength=VOCABULARY) + 1.0
    return float(-np.log(counts / counts.sum())[kept.ids].mean())


if __name__ == "__main__":
    main()
