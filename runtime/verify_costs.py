"""What a verification of M rows costs here: measured once for each compiled model, runtime, machine and thread count,
and kept. How large draft trees should be follows from it."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..passes.errors import ElisionError
from .files import write_text
from .lm_step import StepModel, tree
from .table import cache_folder, processor, version

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64)
PASTS = (64, 512, 1536)
ROUNDS = 5
FORMAT = 1


@dataclass(frozen=True)
class VerifyCosts:
    """seconds[i][j]: the median of a call of rows[j] rows after pasts[i] tokens, never falling with the rows."""

    rows: tuple[int, ...]
    pasts: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def curve(self, past: int, most: int) -> list[float]:
        """Seconds of 0, 1, ..., `most` rows after `past` tokens: linear between what was measured, and beyond."""
        place = bisect.bisect_right(self.pasts, past)
        low, high = max(0, place - 1), min(place, len(self.pasts) - 1)
        span = self.pasts[high] - self.pasts[low]
        share = min(1.0, max(0.0, (past - self.pasts[low]) / span)) if span else 0.0
        known = [(1 - share) * a + share * b for a, b in zip(self.seconds[low], self.seconds[high])]
        wanted = np.arange(most + 1)
        found = np.interp(wanted, self.rows, known)
        if most > self.rows[-1] and len(known) > 1:
            slope = (known[-1] - known[-2]) / (self.rows[-1] - self.rows[-2])
            beyond = wanted > self.rows[-1]
            found[beyond] = known[-1] + slope * (wanted[beyond] - self.rows[-1])
        return found.tolist()

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "rows": self.rows, "pasts": self.pasts, "seconds": self.seconds}

    @staticmethod
    def from_json(data: Any) -> VerifyCosts:
        """Raises ValueError, KeyError, TypeError or OverflowError for anything else than what `to_json` gave."""
        if data["format"] != FORMAT:
            raise ValueError("another format")
        made = VerifyCosts(
            tuple(map(int, data["rows"])),
            tuple(map(int, data["pasts"])),
            tuple(tuple(map(float, line)) for line in data["seconds"]),
        )
        whole = made.rows[:1] == (1,) and made.pasts and len(made.seconds) == len(made.pasts)
        rising = all(a < b for axis in (made.rows, made.pasts) for a, b in itertools.pairwise(axis))
        if not whole or not rising or not all(_is_line(line, len(made.rows)) for line in made.seconds):
            raise ValueError("a damaged curve")
        return made


def _is_line(line: Sequence[float], count: int) -> bool:
    return (
        len(line) == count
        and 0 < line[0] <= line[-1] < math.inf
        and all(a <= b for a, b in itertools.pairwise(line))
    )


def flat(seconds: float, most: int = 64) -> VerifyCosts:
    """Costs where every call takes the same time."""
    return VerifyCosts((1, most), (0,), ((seconds, seconds),))


def measure(
    model: StepModel, rows: Sequence[int] = ROWS, pasts: Sequence[int] = PASTS, rounds: int = ROUNDS,
    notify: Callable[[str], None] = lambda _step: None,
) -> VerifyCosts:  # fmt: skip
    """Times the model's own calls. Overwrites the cache; what it holds is of no matter to the time."""
    rows = tuple(count for count in sorted(set(rows)) if count <= model.capacity // 2) or (1,)
    pasts = tuple(past for past in sorted(set(pasts)) if past + rows[-1] <= model.capacity) or (0,)
    lines = []
    for past in pasts:
        notify(f"timing verification after {past} tokens")
        found: dict[int, list[float]] = {count: [] for count in rows}
        for turn in range(rounds + 1):
            for count in rows:
                given = tree(0, past, [0] * count, [max(-1, (i - 1) // 2) for i in range(count)])
                begun = time.perf_counter()
                model.largest(given)
                if turn:  # the first one warms up
                    found[count].append(time.perf_counter() - begun)
        lines.append(tuple(monotone([statistics.median(times) for times in found.values()])))
    return VerifyCosts(rows, pasts, tuple(lines))


def monotone(values: Sequence[float]) -> list[float]:
    """The closest never falling sequence, by squares (pool adjacent violators)."""
    blocks: list[list[float]] = []  # [mean, count]
    for value in values:
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, count = blocks.pop()
            total = blocks[-1][1] + count
            blocks[-1] = [(blocks[-1][0] * blocks[-1][1] + mean * count) / total, total]
    return [mean for mean, count in blocks for _ in range(int(count))]


# ---- kept ----------------------------------------------------------------------------------------------
def costs_for(
    model: StepModel, name: str | None, threads: int, notify: Callable[[str], None] = lambda _step: None,
    *, anew: bool = False,
) -> VerifyCosts:  # fmt: skip
    """The kept curve of the compiled model called `name`, or one measured now and kept (None: not kept)."""
    file = None if name is None else _file(name, threads)
    if file is not None and not anew and file.is_file():
        try:
            return VerifyCosts.from_json(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            file.unlink(missing_ok=True)  # damaged: measured anew
    found = measure(model, notify=notify)
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ElisionError(f"{file.parent}: costs cannot be kept here ({error.strerror})") from None
        write_text(file, json.dumps(found.to_json()))
    return found


def _file(name: str, threads: int) -> Path:
    machine = [name, processor(), threads or os.cpu_count(), version("onnxruntime"), version("torch")]
    key = hashlib.sha256(json.dumps(machine).encode()).hexdigest()[:32]
    return cache_folder() / "lm-costs" / f"{key}.json"
