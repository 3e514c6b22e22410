"""The bit test: are the scores of a row the same alone and among others?

Speculative decoding checks many tokens in one call, and gives the very text of plain decoding only where it makes no
difference to a row who else is in the call. Every row of a chain and of a tree is computed alone, one after the other,
and then again among M rows; the scores are compared bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .lm_step import Largest, Rows, StepModel, chain, tree

EXACT, NEAR_TIE = "exact", "near-tie"
COUNTS = (2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 64)
"""How many rows are tried when a model is compiled; all of 1 to 64 in the tests."""

PAST = 5


@dataclass(frozen=True)
class Verdict:
    """name: "exact" or "near-tie". rows: the counts that were tried. differing: "chain 7" and so on, for those in which
    a bit was different. largest: the largest difference of two scores that should be the same."""

    name: str
    rows: tuple[int, ...]
    differing: tuple[str, ...] = ()
    largest: float = 0.0
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"verdict": self.name, "rows": [min(self.rows), max(self.rows)]}
        if self.differing:
            found |= {"differing": list(self.differing), "largest": self.largest}
        return found


def examine(model: StepModel, counts: Sequence[int] = COUNTS, seed: int = 0) -> Verdict:
    """Runs the bit test. The cache is written to: at most `PAST` and twice the largest count of slots are used, fewer
    rows where it has no room for them."""
    room = (model.capacity - PAST) // 2
    counts = tuple(count for count in sorted(set(counts)) if count <= room) or (1,)
    most = max(counts)
    random = np.random.default_rng(seed)
    ids = random.integers(0, model.vocabulary, PAST + most).tolist()
    parents = [-1, *(int(random.integers(max(0, i - 6), i)) for i in range(1, most))]
    model.step(chain(0, 0, ids[:PAST]))
    branches = {
        "chain": tree(0, PAST, ids[PAST:], [i - 1 for i in range(most)]),
        "tree": tree(0, PAST, ids[PAST:], parents),
    }
    differing, largest = [], 0.0
    for name, rows in branches.items():
        # Alone, in slots of its own, so that where a key lies is tried too.
        elsewhere = _moved(rows, PAST, most)
        alone = np.concatenate([model.step(_taken(elsewhere, [i])).copy() for i in range(most)])
        best = [_copied(model.largest(_taken(elsewhere, [i]))) for i in range(most)]
        for count in counts:
            among = model.step(_taken(rows, range(count))).copy()
            found = model.largest(_taken(rows, range(count)))
            values, numbers = (np.concatenate(part[:count]) for part in zip(*best, strict=True))
            same = same_bits(found.values, values) and np.array_equal(found.ids, numbers)
            if not (same and same_bits(among, alone[:count])):
                differing.append(f"{name} {count}")
                apart = np.abs(among - alone[:count]).max(), np.abs(found.values - values).max()
                largest = max(largest, *map(float, apart))
    # A prompt is read with each row's prefix reaching into the same call.
    read = model.step(chain(0, PAST, ids[PAST:]))
    alone = model.step(_taken(branches["chain"], range(most))).copy() if most > 1 else read
    if not same_bits(read, alone):
        differing.append(f"prompt {most}")
        largest = max(largest, float(np.abs(read - alone).max()))
    return Verdict(NEAR_TIE if differing else EXACT, counts, tuple(differing), largest)


def _copied(found: Largest) -> tuple[np.ndarray, np.ndarray]:
    return found.values.copy(), found.ids.copy()


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(np.ascontiguousarray(a).view(np.uint32), np.ascontiguousarray(b).view(np.uint32))


def _taken(rows: Rows, which: Sequence[int]) -> Rows:
    """Some rows, without columns of ancestors that none of them needs."""
    index = np.asarray(which)
    ancestors = rows.ancestors[index]
    width = int((ancestors >= 0).sum(1).max())
    return Rows(
        rows.ids[index], rows.positions[index], rows.slots[index], rows.prefix[index], ancestors[:, :width]
    )


def _moved(rows: Rows, first: int, by: int) -> Rows:
    """The same rows in slots that lie `by` further on, in reverse."""
    count = len(rows)

    def there(slots: np.ndarray) -> np.ndarray:
        return np.where(slots >= first, first + by + count - 1 - (slots - first), slots).astype(np.int32)

    return Rows(rows.ids, rows.positions, there(rows.slots), rows.prefix, there(rows.ancestors))
