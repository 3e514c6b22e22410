"""Pictures among the words: their features as rows of a text, and a prompt in which they have ids of their own.

A compiled vision-language model has two graphs. The vision part makes rows of a picture, all of them or those that a
pass `token-drop` keeps; the step graph reads row n where a token's id is V + n (pass `image-ids`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from ..passes.errors import ElisionError
from .placeholders import numbers_of, staying

VISION = "vision"
"""The vision part's file (in ONNX) or folder."""

Run = Callable[[list[np.ndarray]], list[np.ndarray]]


@dataclass(frozen=True)
class ImageFacts:
    """placeholder: the id that stands for image tokens in a prompt. first: the id of row 0 (V). rows: tokens of one
    image; kept: how many of them become rows at most. width: C. shapes: of what the vision part reads for one image, by
    name. reach: positions that the step graph has. compact: whether tokens count from 0 without those left out. fixed:
    what else the example said of its image, as `said_of` has it: it is the same for all."""

    placeholder: int
    first: int
    rows: int
    kept: int
    width: int
    shapes: dict[str, list[int]]
    reach: int
    compact: bool = False
    fixed: dict[str, list[str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ImageFacts:
        return ImageFacts(**data)


def said_of(item: Any) -> list[str] | None:
    """Whole numbers (sizes, grids, masks) as a text for each entry of the first axis; None for anything else."""
    array = as_array(item)
    if array.dtype.kind not in "iub" or not array.ndim:
        return None
    rows = [np.ascontiguousarray(row, np.int64) for row in array]
    return [
        str(row.tolist())
        if row.size <= 16
        else f"{list(row.shape)} with {sha256(row.tobytes()).hexdigest()[:12]}"
        for row in rows
    ]


def as_array(item: Any) -> np.ndarray:
    """A tensor, an array or lists of numbers."""
    return item.detach().cpu().numpy() if hasattr(item, "detach") else np.asarray(item)


@dataclass(frozen=True)
class Written:
    """A prompt with pictures. ids: of its tokens, V + n for row n. places: int64, the position of each. rows: float32
    [R, C]. images: how many there are. first: V. tokens: how many image tokens there were. seconds: that the vision
    part took."""

    ids: list[int]
    places: np.ndarray
    rows: np.ndarray
    images: int
    first: int
    tokens: int
    seconds: float = 0.0

    @property
    def words(self) -> list[int]:
        """The ids that are none of pictures."""
        return [token for token in self.ids if token < self.first]

    def to_json(self) -> dict[str, Any]:
        """What a report says: how many images, how many tokens they have, and how many the text reads."""
        counts = {"images": self.images, "tokens": self.tokens, "kept": len(self.rows)}
        return {**counts, "vision_seconds": round(self.seconds, 6)}


class Pictures:
    """The vision part of a model. run: arrays in the order of `facts.shapes` -> features [.., C]; where some were left
    out, the places of those that were kept, [images, kept] int; with a budget by content also their sizes."""

    def __init__(self, run: Run, facts: ImageFacts) -> None:
        self._run, self.facts = run, facts

    def written(self, where: str, ids: Sequence[int], images: Mapping[str, Any] | None) -> Written | None:
        """`ids` with a placeholder for every image, or one for every token of every image, and their features. None
        without images. Raises ElisionError where images and placeholders do not fit."""
        facts = self.facts
        marks = sum(token == facts.placeholder for token in ids)
        given = {} if images is None else self._arrays(images)
        count = (
            0
            if images is None
            else next(iter(given.values())).shape[0] // next(iter(facts.shapes.values()))[0]
        )
        if marks not in (count, count * facts.rows):
            raise ElisionError(
                f"{where} has {marks} image tokens (id {facts.placeholder}) for {count} images: give one for each "
                f"image, or the {facts.rows} that each becomes"
            )
        if not count:
            return None
        whole = [
            token
            for known in ids
            for token in [known] * (facts.rows if known == facts.placeholder and marks == count else 1)
        ]
        begun = time.perf_counter()
        rows, places = self._features(given, count)
        seconds = time.perf_counter() - begun
        return replace(self._placed(np.asarray(whole, np.int64), rows, places, count), seconds=seconds)

    def _placed(self, whole: np.ndarray, rows: np.ndarray, places: np.ndarray, count: int) -> Written:
        """Each image token's own id; those that were left out go, the others keep their positions."""
        facts = self.facts
        image = whole == facts.placeholder
        stays = staying(image, places)
        whole[image & stays] = facts.first + np.argsort(places)
        kept = np.flatnonzero(stays)
        positions = np.arange(len(kept)) if facts.compact else kept
        return Written(whole[kept].tolist(), positions, rows, count, facts.first, int(image.sum()))

    def _arrays(self, images: Mapping[str, Any]) -> dict[str, np.ndarray]:
        found, counts = {}, set()
        for name, shape in self.facts.shapes.items():
            if name not in images:
                raise ElisionError(
                    f"images lack {name!r}; the vision part reads {', '.join(self.facts.shapes)}"
                )
            array = as_array(images[name]).astype(np.float32)
            if array.ndim != len(shape) or list(array.shape[1:]) != shape[1:] or array.shape[0] % shape[0]:
                raise ElisionError(
                    f"{name} {list(array.shape)} is no number of images {shape}, which was compiled for"
                )
            counts.add(array.shape[0] // shape[0])
            found[name] = array
        if len(counts) != 1 or 0 in counts:
            raise ElisionError(f"images have {' and '.join(map(str, sorted(counts)))} entries")
        for name, known in self.facts.fixed.items():
            told = said_of(images[name]) if name in images else None
            wanted = known * counts.copy().pop()
            if told is not None and told != wanted:
                other = next((one for one, own in zip(told, wanted) if one != own), f"{len(told)} entries")
                raise ElisionError(
                    f"{name} of a picture is {other}, and {known[0]} of the example that was compiled for: all "
                    "pictures have its form"
                )
        return found

    def _features(self, given: Mapping[str, np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows [R, C] of all images, and the number of each among all their tokens."""
        facts, rows, places = self.facts, [], []
        for number in range(count):
            part = [
                given[name][number * shape[0] : (number + 1) * shape[0]]
                for name, shape in facts.shapes.items()
            ]
            features, *told = self._run(part)
            made, own = np.asarray(features, np.float32).reshape(-1, facts.width), np.arange(facts.rows)
            if told:  # with slots that may be empty also their sizes
                size = told[1] if len(told) > 1 else None
                own = numbers_of(told[0], facts.rows // len(told[0]), size)
                made = made if size is None else made[size.reshape(-1) > 0]
            rows.append(made)
            places.append(own + number * facts.rows)
        return np.concatenate(rows), np.concatenate(places)


def load_pictures(folder: Path, runtime: str, facts: ImageFacts, threads: int) -> Pictures:
    """The vision part that was kept with a compiled model. Raises ModelFileError for a damaged one."""
    if runtime == "onnxruntime":
        from .lm_onnx import start_session

        session = start_session(folder / f"{VISION}.onnx", threads)
        names = [item.name for item in session.get_inputs()]

        def run(arrays: list[np.ndarray]) -> list[np.ndarray]:
            return session.run(None, dict(zip(names, arrays)))

        return Pictures(run, facts)
    import torch
    from torch.utils._pytree import tree_leaves

    from .lm_torch_file import load

    module, _ = load(folder / VISION)

    @torch.inference_mode()
    def compute(arrays: list[np.ndarray]) -> list[np.ndarray]:
        return [item.numpy() for item in tree_leaves(module(*map(torch.from_numpy, arrays)))]

    return Pictures(compute, facts)
