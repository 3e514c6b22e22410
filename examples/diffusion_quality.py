"""How good text is that a sampler wrote: measures that know ids only, never a model's class.

A low likelihood loss alone says little, since text that repeats itself has one too: read `judge_nll` together with
`distinct_2` and `repeated_4_grams`, and beside the figures of held-out text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

MODELS = Path(__file__).parent / "models"
DIFFUSION, JUDGE = MODELS / "pycode-diffusion", MODELS / "pycode-judge"

Scores = Callable[[torch.Tensor], torch.Tensor]
"""Logits [B, N, V] of ids [B, N], each row about the id after it."""


@dataclass(frozen=True)
class Excerpt:
    """Ids of held-out text: a prompt, and how it goes on in truth."""

    prompt: list[int]
    rest: list[int]


@cache
def load_tokenizer() -> Any:
    """The tokenizer that both models share, a tokenizers.Tokenizer."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(DIFFUSION / "tokenizer.json"))


@cache
def load_judge() -> Scores:
    """The autoregressive model of train_diffusion.py."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(JUDGE).float().eval()

    def scores(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(ids).logits

    return scores


def held_out_prompts(count: int, prompt_tokens: int = 128) -> list[Excerpt]:
    """The first `count` stored excerpts of 512 ids, cut after `prompt_tokens`; at most 24 are there. They are stored as
    text, and so are the same on any version of Python."""
    tokenizer, found = load_tokenizer(), []
    for line in (DIFFUSION / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:count]:
        row = json.loads(line)
        ids = [*tokenizer.encode(row["prompt"]).ids, *tokenizer.encode(row["rest"]).ids]
        found.append(Excerpt(ids[:prompt_tokens], ids[prompt_tokens:]))
    if len(found) < count:
        raise ValueError(f"{count} excerpts are asked for, {len(found)} are there")
    return found


def judge_nll(ids: Sequence[int], prompt: int, judge: Scores | None = None) -> float:
    """Nats per id after the first `prompt` (at least one) under a judge, given all ids before it."""
    if not 1 <= prompt < len(ids):
        raise ValueError(
            f"a prompt of {prompt} ids leaves none to score, or none to score with, of {len(ids)}"
        )
    row = torch.tensor([list(ids)])
    logits = (judge or load_judge())(row[:, :-1])[0, prompt - 1 :].float()
    return float(torch.nn.functional.cross_entropy(logits, row[0, prompt:]))


def distinct_2(ids: Sequence[int]) -> float:
    """Share of different pairs among the pairs of neighbours. 1 for fewer than two ids."""
    pairs = list(pairwise(ids))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def repeated_4_grams(ids: Sequence[int]) -> float:
    """Share of the runs of four ids that occurred before in the text. 0 for fewer than four ids."""
    runs = list(zip(ids, ids[1:], ids[2:], ids[3:]))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def infilling_accuracy(predicted: np.ndarray | Sequence[int], true: np.ndarray | Sequence[int]) -> float:
    """Share of the masked places where the predicted id is the true one."""
    first, second = np.asarray(predicted), np.asarray(true)
    if first.shape != second.shape or not first.size:
        raise ValueError(f"ids of shape {first.shape} against {second.shape}")
    return float((first == second).mean())
