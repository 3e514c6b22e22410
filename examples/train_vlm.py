"""Trains the small vision-language model of examples/models/shapes-vlm from nothing, on one CPU core.

    python examples/train_vlm.py --out DIR --minutes 16 --seed 0

The tower learns first, from labels of patches and from captions that its class token tells: that stands in for the
contrastive training of a CLIP tower, and is why the class token attends to the objects. Then both parts learn to
answer questions. At last, some of the background is hidden from the decoder, as much as chance wants: a decoder that
always saw the same number of patches counts by the share of its attention that objects get, which holds for pictures
of one size only. No patch that shows an object is ever hidden. Accuracy is measured with pictures and questions of
another seed; training.json holds it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vlm_data as data
import vlm_model
from torch import Tensor, nn

BATCH, ASKED = 16, 14
"""Pictures of a step, and questions about each of them."""

TOWER_SHARE = 0.2
"""Share of the time in which the tower learns alone."""

FINISH_SHARE = 0.2
"""Share of the time, at the end, in which the number of background patches that the decoder sees varies."""

RATE, WARM_UP, DECAY = 2e-3, 60, 0.5
"""Highest learning rate, steps until it is reached, and the share of the time over which it falls to zero."""

NEAR, TEMPERATURE = 0.3, 0.06
"""Cosine above which a patch is said to be near a word, and the scale of differences from it."""

FINISH_FROM = 100_000
"""Number of the last part's first step: its pictures are others than those before."""

BAR = 0.9
"""Accuracy that is asked of the recipe; the exit status is 1 below."""


class Student(nn.Module):
    """The model with heads that only training needs, for many questions about a picture at once.

    The questions of a picture stand one after the other behind its tokens. None sees another, and each is at the
    positions it has when it is asked alone, so the picture is computed once for all of them.
    """

    def __init__(self, made: vlm_model.VisionLanguageModel) -> None:
        super().__init__()
        self.llava: Any = made.model
        width = vlm_model.CONFIG["vision_config"]["hidden_size"]
        self.live: int = vlm_model.CONFIG["vision_feature_layer"] + 1
        self.caption = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64))
        self.patch = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, len(data.SHAPES) + len(data.COLOURS) + 2)
        )
        first = data.FIRST_IMAGE + data.PATCHES
        part = torch.cat([torch.zeros(first), 1 + torch.arange(ASKED * data.WORDS) // data.WORDS])
        seen = (part[:, None] == part) | (part == 0)
        self.named = [
            torch.tensor([data.IDS[word] for word in words])
            for words in (data.SHAPES, data.PLURALS, data.COLOURS, data.PLACES)
        ]
        self.mask: Tensor
        self.positions: Tensor
        hidden = torch.zeros(seen.shape).masked_fill(~seen.tril(), torch.finfo(torch.bfloat16).min)
        self.register_buffer("mask", hidden[None, None], persistent=False)  # added to scores: 0 where seen
        within = torch.arange(ASKED * data.WORDS) % data.WORDS
        self.register_buffer(
            "positions", torch.cat([torch.arange(first), first + within])[None], persistent=False
        )

    def tower(self, pixels: Tensor) -> Tensor:
        """What the language model reads, and the class token before it: [B, 1 + PATCHES, width]."""
        tower = self.llava.model.vision_tower
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        for layer in tower.encoder.layers[: self.live]:
            hidden = layer(hidden, None)
        return hidden

    def tower_loss(self, hidden: Tensor, labels: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """labels: shapes, colours and places of what the patches show, and the captions."""
        shapes, colours, _, captions = labels
        told = nn.functional.binary_cross_entropy_with_logits(self.caption(hidden[:, 0]).float(), captions)
        shape, colour = (
            self.patch(hidden[:, 1:]).float().split([len(data.SHAPES) + 1, len(data.COLOURS) + 1], -1)
        )
        of = nn.functional.cross_entropy
        return (
            5 * told + of(shape.flatten(0, 1), shapes.flatten()) + of(colour.flatten(0, 1), colours.flatten())
        )

    def word_loss(self, hidden: Tensor, labels: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """What a projected patch shows should be near the words for it, and near none of them where nothing is."""
        shapes, colours, places, _ = labels
        inner = self.llava.model
        image = nn.functional.normalize(
            inner.multi_modal_projector(hidden[:, 1:]).flatten(0, 1).float(), dim=-1
        )
        loss = image.new_zeros(())
        for ids, label in zip(self.named, (shapes, shapes, colours, places)):
            words = nn.functional.normalize(inner.get_input_embeddings().weight[ids].float(), dim=-1)
            near = nn.functional.pad(image @ words.T, (1, 0), value=NEAR)
            loss = loss + nn.functional.cross_entropy(near / TEMPERATURE, label.flatten())
        return loss

    def answers(self, hidden: Tensor, words: Tensor, shown: Tensor | None = None) -> Tensor:
        """Logits of the word after each question, float32 [B ASKED, V]. words: [B, ASKED WORDS]. shown: bool [B,
        PATCHES], the image tokens that are not hidden; none is by default."""
        inner = self.llava.model
        embed = inner.get_input_embeddings()
        start = embed(words.new_full((len(words), 1), data.BOS))
        image = inner.multi_modal_projector(hidden[:, 1:])
        mask = self.mask.expand(len(words), -1, -1, -1)
        if shown is not None:
            columns = nn.functional.pad(shown, (data.FIRST_IMAGE, words.shape[1]), value=True)[:, None, None]
            mask = mask.masked_fill(~columns, torch.finfo(torch.bfloat16).min)
        states = inner.language_model(
            inputs_embeds=torch.cat([start, image.to(start.dtype), embed(words)], 1),
            attention_mask=mask,
            position_ids=self.positions.expand(len(words), -1),
            use_cache=False,
        ).last_hidden_state
        last = states[:, data.FIRST_IMAGE + data.PATCHES :].unflatten(1, (ASKED, data.WORDS))[:, :, -1]
        return self.llava.lm_head(last).float().flatten(0, 1)

    def answer_loss(
        self, hidden: Tensor, words: Tensor, answers: Tensor, shown: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Mean cross entropy of the answers [B, ASKED], and the share of them that is right."""
        logits = self.answers(hidden, words, shown)
        loss = nn.functional.cross_entropy(logits, answers.flatten())
        return loss, (logits.argmax(-1) == answers.flatten()).float().mean()


def batches(
    seed: int, step: int = 0
) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor], Tensor, Tensor]]:
    """Pictures, the labels of the tower, words [BATCH, ASKED WORDS] and answers [BATCH, ASKED], from a step on."""
    while True:
        pixels, scenes = data.pictures([seed, step], BATCH)
        asked = data.questions(scenes, [seed, step, 1], ASKED)
        labels = (*data.patch_labels(scenes), data.summaries(scenes))
        words, answers = asked.words.reshape(BATCH, -1), asked.answers.reshape(BATCH, -1)
        shapes, colours, places, captions = (torch.from_numpy(label) for label in labels)
        yield (
            torch.from_numpy(pixels),
            (shapes, colours, places, captions),
            torch.from_numpy(words),
            torch.from_numpy(answers),
        )
        step += 1


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, at twice the rate of AdamW for the rest."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and not any(
            part in name for part in ("embed", "lm_head", "caption", "patch")
        )
        (matrices if inner else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=2 * RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def background_shown(shapes: Tensor, random: torch.Generator) -> Tensor:
    """bool [B, PATCHES]: everything for half of the pictures, a part of the background for the others."""
    kept = torch.rand(len(shapes), 1, generator=random) * 2
    return (shapes > 0) | (torch.rand(shapes.shape, generator=random) < kept)


def train(student: Student, minutes: float, seed: int, finish: bool) -> dict[str, Any]:
    """Trains in place for so many minutes of processor time, which other programs do not use up. What that took.

    finish: the end of the training; what comes before, otherwise.
    """
    updates, random = optimizers(student), torch.Generator().manual_seed(seed)
    groups = [group for update in updates for group in update.param_groups]
    highest = [group["lr"] * (0.5 if finish else 1.0) for group in groups]
    started, cpu, done, step = time.perf_counter(), time.process_time(), 0.0, 0
    answering, recent = 0, []
    student.train()
    # Written out, attention is faster forwards and back than the kernel that torch has for CPUs.
    student.llava.set_attn_implementation("eager")
    for pixels, labels, words, answers in batches(seed, FINISH_FROM if finish else 0):
        joint = finish or done >= TOWER_SHARE
        if (
            joint and not finish and not answering
        ):  # a word that was read is said with the same vector at first
            student.llava.lm_head.weight.data.copy_(student.llava.get_input_embeddings().weight)
        answering += joint
        # Each part warms up when it begins to learn.
        factor = min(1.0, ((answering if joint else step) + 1) / WARM_UP, (1 - done) / DECAY)
        for group, rate in zip(groups, highest):
            group["lr"] = rate * factor
        with torch.autocast("cpu", torch.bfloat16):
            hidden = student.tower(pixels)
            loss = tower = student.tower_loss(hidden, labels) + student.word_loss(hidden, labels)
            answer, right = torch.zeros(()), torch.zeros(())
            if joint:
                shown = background_shown(labels[0], random) if finish else None
                answer, right = student.answer_loss(hidden, words, answers, shown)
                loss = answer + 0.3 * tower
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for update in updates:
            update.step()
            update.zero_grad()
        step += 1
        done = (time.process_time() - cpu) / (60 * minutes)
        recent.append((tower.item(), answer.item(), right.item()))
        if step % 50 == 0:
            mean = np.mean(recent, 0)
            print(
                f"step {step}  {done:.0%}  tower {mean[0]:.3f}  answers {mean[1]:.3f}  right {mean[2]:.3f}",
                flush=True,
            )
            recent = []
        if done >= 1:
            break
    student.eval()
    student.llava.set_attn_implementation("sdpa")
    return {
        "stage": "finish" if finish else "main",
        "seed": seed,
        "steps": step,
        "pictures": step * BATCH,
        "questions": answering * BATCH * ASKED,
        "wall seconds": round(time.perf_counter() - started),
        "cpu seconds": round(time.process_time() - cpu),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def kept(made: vlm_model.VisionLanguageModel, folder: Path, stages: list[dict[str, Any]]) -> dict[str, float]:
    """Writes the model and what its training took; the accuracy of what was written."""
    vlm_model.save(made, folder)
    found = vlm_model.accuracy(vlm_model.load(folder))
    stages[-1]["held-out accuracy"] = {name: round(share, 4) for name, share in found.items()}
    text = json.dumps({"stages": stages}, indent=2) + "\n"
    temporary = folder / f".training-{os.getpid()}.json"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(folder / "training.json")
    print(json.dumps(stages[-1], indent=2), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=vlm_model.FOLDER)
    parser.add_argument("--minutes", type=float, default=16, help="processor time of the training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--start", type=Path, help="a folder with the main stage's model: only the end is run"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    made = vlm_model.load(options.start) if options.start else vlm_model.build()
    student = Student(made)
    print(f"{sum(parameter.numel() for parameter in made.parameters()) / 1e6:.2f} M parameters", flush=True)
    stages: list[dict[str, Any]] = []
    if options.start:
        stages += json.loads((options.start / "training.json").read_text(encoding="utf-8"))["stages"]
    else:
        stages.append(train(student, options.minutes * (1 - FINISH_SHARE), options.seed, finish=False))
        kept(made, options.out, stages)
    stages.append(train(student, options.minutes * FINISH_SHARE, options.seed, finish=True))
    if kept(made, options.out, stages)["all"] < BAR:
        sys.exit(f"the bar was not reached: {BAR:.0%}")


if __name__ == "__main__":
    main()
