"""The training loop of train_diffusion.py: noise, optimisers, a moving average of the weights, checkpoints.

What a step sees depends on the seed and the step's number only, so a run that was cut off goes on from its last
checkpoint as if nothing had happened.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusion_data import EOS, MASK
from torch import Tensor, nn

LEAST_NOISE = 0.04
"""Share of masked ids where there are fewest: the weight 1/t grows without bound below."""

EARLY, EARLY_NOISE = 0.35, 0.6
"""For this share of the steps, no more than this share of a row is masked: what stands between two neighbours is
learned first, and almost empty canvases teach little before that."""

WARM_UP = 50
DECAY = 0.45
"""Share of the steps over which the rate falls to zero, at the end."""

CHECKPOINT_SECONDS = 90


@dataclass
class Progress:
    """What a run has used so far. losses: (step, mean loss since the one before)."""

    step: int = 0
    tokens: int = 0
    wall: float = 0.0
    cpu: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)

    def curve(self, every: int = 50) -> dict[str, float]:
        """Mean loss of every 50 steps, by the last of them."""
        parts: dict[str, list[float]] = {}
        for step, loss in self.losses:
            parts.setdefault(str(min(-(-step // every) * every, self.step)), []).append(loss)
        return {end: round(float(np.mean(losses)), 3) for end, losses in parts.items()}


@dataclass(frozen=True)
class Noised:
    """shown: ids with masks, [B, N]. places: flat indices of the masks. targets: their true ids. weights: theirs, which
    sum to 1."""

    shown: Tensor
    places: Tensor
    targets: Tensor
    weights: Tensor


def noised(
    ids: np.ndarray, random: np.random.Generator, most: float = 1.0, lengths: tuple[int, int] | None = None
) -> Noised:
    """Masks a canvas of ids [B, N]: half of the rows keep a prompt of random length, the rest of a row is masked with
    its share t. The shares are spread evenly over the rows, and exactly round(t n) of n ids are masked, which
    makes the weighted loss (an upper bound of the negative log-likelihood) vary less from batch to batch.

    most: the largest share. lengths: smallest and largest prompt of every row instead.
    """
    rows, length = ids.shape
    low, high = lengths or (0, length * 3 // 4)
    prompts = random.integers(low, high + 1, rows)
    if lengths is None:
        prompts[random.random(rows) < 0.5] = 0
    spread = (np.arange(rows) + random.random()) / rows
    shares = LEAST_NOISE + (most - LEAST_NOISE) * random.permutation(spread)
    masked = np.zeros((rows, length), bool)
    weights = np.zeros((rows, length), np.float32)
    for row, (prompt, share) in enumerate(zip(prompts, shares)):
        free = length - prompt
        count = max(1, round(share * free))
        chosen = prompt + random.permutation(free)[:count]
        masked[row, chosen] = True
        weights[row, chosen] = free / count
    places = np.flatnonzero(masked)
    weights = weights.ravel()[places]
    return Noised(
        torch.from_numpy(np.where(masked, MASK, ids)),
        torch.from_numpy(places),
        torch.from_numpy(ids.ravel()[places]),
        torch.from_numpy(weights / (length * rows - prompts.sum())),
    )


def diffusion_loss(
    model: Any, body: Any, ids: np.ndarray, random: np.random.Generator, done: float = 1.0
) -> Tensor:
    """Cross entropy at the masked places, weighted by 1/t. body: the model without its head, compiled or not; the head
    runs at those places only. done: share of the training that is over."""
    noise = noised(ids, random, EARLY_NOISE if done < EARLY else 1.0)
    hidden = body(noise.shown).last_hidden_state.flatten(0, 1)[noise.places]
    logits = model.decoder(model.head(hidden))
    return (
        nn.functional.cross_entropy(logits.float(), noise.targets, reduction="none") * noise.weights
    ).sum()


def next_token_loss(
    model: Any, body: Any, ids: np.ndarray, random: np.random.Generator, done: float = 1.0
) -> Tensor:
    """Cross entropy of every id, given those before it. What follows the first <eos> does not count."""
    given = torch.from_numpy(ids)
    logits = model.lm_head(body(given[:, :-1]).last_hidden_state)
    targets = given[:, 1:].masked_fill(given[:, :-1] == EOS, -100)
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)


def rate(step: int, steps: int) -> float:
    """Factor of the learning rate: a warm-up, a plateau, a straight fall."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / (DECAY * steps))


def optimizers(model: nn.Module, highest: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, at twice the rate of AdamW for the embedding and the vectors."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    made: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=2 * highest, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=highest, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    for update in made:
        for group in update.param_groups:
            group["highest"] = group["lr"]
    return made


class Average:
    """Moving average of a model's weights, over fewer steps at the beginning."""

    def __init__(self, model: nn.Module, decay: float = 0.995) -> None:
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            self.weights[name].lerp_(parameter, share)

    @torch.no_grad()
    def put_into(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(self.weights[name])


def train(
    model: Any,
    batch: Callable[[int, np.random.Generator], np.ndarray],
    loss_of: Callable[[Any, Any, np.ndarray, np.random.Generator, float], Tensor],
    steps: int,
    highest: float,
    seed: int,
    checkpoint: Path,
    stop_after: float = float("inf"),
) -> Progress:
    """Trains `model` in place and leaves the averaged weights in it; the progress says what that took.

    batch: ids [B, N] of a step, drawn from a generator. highest: learning rate of the plateau. checkpoint: a file that
    is written now and then, and read at the beginning if it is there. stop_after: seconds of wall time, for a pilot.
    """
    # Written out, attention is fused by Inductor and 1.4x as fast as the kernel that torch has for CPUs.
    model.train().set_attn_implementation("eager")
    body = torch.compile(model.model, dynamic=False)
    updates, average, progress = optimizers(model, highest), Average(model), Progress()
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=False)
        model.load_state_dict(state["model"])
        for update, kept in zip(updates, state["updates"]):
            update.load_state_dict(kept)
        average.weights, progress = state["average"], state["progress"]
        print(f"goes on after step {progress.step}", flush=True)
    wall, cpu, saved, recent = time.perf_counter(), time.process_time(), time.perf_counter(), []
    base = progress.wall, progress.cpu
    while progress.step < steps and progress.wall - base[0] < stop_after:
        random = np.random.default_rng([seed, progress.step])
        ids = batch(progress.step, random)
        for update in updates:
            for group in update.param_groups:
                group["lr"] = group["highest"] * rate(progress.step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, body, ids, random, progress.step / steps)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for update in updates:
            update.step()
            update.zero_grad()
        progress.step += 1
        average.update(model, progress.step)
        progress.tokens += ids.size
        recent.append(loss.item())
        progress.wall = base[0] + time.perf_counter() - wall
        progress.cpu = base[1] + time.process_time() - cpu
        if progress.step % 10 == 0 or progress.step == steps:
            progress.losses.append((progress.step, round(float(np.mean(recent)), 4)))
            print(
                f"step {progress.step}/{steps}  loss {np.mean(recent):.3f}  {progress.tokens / 1e6:.2f} M tokens  "
                f"wall {progress.wall:.0f} s  cpu {progress.cpu:.0f} s",
                flush=True,
            )
            recent = []
            if time.perf_counter() - saved > CHECKPOINT_SECONDS or progress.step == steps:
                _save(checkpoint, model, updates, average, progress)
                saved = time.perf_counter()
    average.put_into(model)
    model.eval().set_attn_implementation("sdpa")
    return progress


def _save(
    path: Path,
    model: nn.Module,
    updates: list[torch.optim.Optimizer],
    average: Average,
    progress: Progress,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "model": model.state_dict(),
        "updates": [update.state_dict() for update in updates],
        "average": average.weights,
        "progress": progress,
    }
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)
