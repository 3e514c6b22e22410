"""A step model whose sequences keep a limited number of keys (`h2o`), for a decoding loop that knows nothing of it.

The loop counts slots as if every token had one: a sequence's run of them is as long as the context. Here these are
turned into the few slots that the sequence has, its cell. What a round accepted is learned from the next call, whose
rows see the accepted tokens; only then attention is added up and keys are dropped, so that a guess that was refused
leaves no trace. Rows keep the positions of the text, and keys the rotary angles they were written with.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from ..passes.errors import ElisionError
from .h2o import H2O, choose
from .lm_caches import Caches
from .lm_step import Largest, Rows, Slots, StepModel, joined

LOSSY = "lossy"
"""What `exactness` says then: text depends on what was dropped, and with a drafter on when."""

ROUND = 64
"""Slots besides the kept ones, for the rows of a round: a tree, or a piece of a prompt."""

LIMIT = 1 << 26
"""Bytes of key scores that one call may put out while a prompt is read."""

_SCORES = re.compile(r"key_scores\.(\d+)")


class ScoredSteps(StepModel, Protocol):
    """A `StepModel` whose caches may forget keys.

    layers: for each attention its caches of keys and values, [key heads, C, width], to be edited in place."""

    layers: list[tuple[np.ndarray, np.ndarray]]

    def key_scores(self) -> list[np.ndarray]:
        """Of the last call, for each attention: float32 [M, key heads, C], good until the next call."""
        ...


def score_names(outputs: Iterable[str]) -> list[str]:
    """The outputs with key scores in the order of the attentions. Raises ElisionError where there are none."""
    found = [(int(match[1]), name) for name in outputs if (match := _SCORES.fullmatch(name))]
    if not found:
        raise ElisionError(
            "this model was compiled without the scores of its keys, so that none can be dropped"
        )
    return [name for _, name in sorted(found)]


def layers_of(caches: Caches, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    views = caches.views
    return [(views[f"key_cache.{i}"], views[f"value_cache.{i}"]) for i in range(count)]


def forgetting(opened: Any, policy: H2O) -> tuple[EvictingSteps, dict[str, Any]]:
    """The model and the settings of an `lm_open.Opened` that was compiled with key scores."""
    own = {"h2o": policy.to_json(), "exactness": LOSSY}
    return EvictingSteps(opened.model, policy), opened.settings | own


class EvictingSteps:
    """See `lm_step.StepModel`. Between two calls a sequence has `policy.size` keys at most; in a call those of its rows
    come to them. Sequences are told apart by the run of slots that they got from `own_slots()`."""

    def __init__(self, model: ScoredSteps, policy: H2O) -> None:
        self._model, self.policy = model, policy
        self.capacity, self.vocabulary, self.largest_k = model.capacity, model.vocabulary, model.largest_k
        room = min(policy.size + ROUND, model.capacity)
        heads = [keys.shape[0] for keys, _ in model.layers]
        count = max(1, model.capacity // room)
        self.cells = [Cell(model, policy, number * room, room, heads) for number in range(count)]
        self._most = max(ROUND, LIMIT // (4 * model.capacity * sum(heads)))

    def under(self, policy: H2O) -> EvictingSteps:
        """The same model and caches under another policy: use one of the two at a time."""
        return EvictingSteps(self._model, policy)

    def own_slots(self) -> Cells:
        """Gives sequences their runs of slots."""
        return Cells(len(self.cells), self.capacity)

    def step(self, rows: Rows, keep: Sequence[int] | None = None) -> np.ndarray:
        found = list(self._results(self._model.step, rows, keep))
        return found[0] if len(found) == 1 else np.concatenate(found)

    def largest(self, rows: Rows, keep: Sequence[int] | None = None) -> Largest:
        found = list(self._results(self._model.largest, rows, keep))
        if len(found) == 1:
            return found[0]
        return Largest(
            np.concatenate([one.values for one in found]), np.concatenate([one.ids for one in found])
        )

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        """Rows of the last call that lie in the slots `source` into `target`, all of one sequence."""
        if len(source):
            self._cell(int(source[0])).move(
                np.asarray(source) % self.capacity, np.asarray(target) % self.capacity
            )

    def show(self, rows: np.ndarray) -> None:
        raise ElisionError("h2o reads the prompt for itself, and cannot read the pictures in it")

    def begin(self, inputs: dict[str, Any]) -> None:
        self._model.begin(inputs)

    # ---- rows ------------------------------------------------------------------------------------------
    def _results(
        self, call: Callable[[Rows, Sequence[int]], Any], rows: Rows, keep: Sequence[int] | None
    ) -> Iterator[Any]:
        """What `call` says of the kept rows, piece by piece."""
        wanted = np.arange(len(rows)) if keep is None else np.asarray(keep, np.int64)
        for low, high, part in self._pieces(rows):
            inside = np.flatnonzero((wanted >= low) & (wanted < high))
            found = call(part, (wanted[inside] - low).tolist())
            self._seen(rows.prefix[low:high, 0])
            yield found if high - low == len(rows) else _copied(found)

    def _pieces(self, rows: Rows) -> Iterator[tuple[int, int, Rows]]:
        """(first row, end, rows in the slots that there are): one piece, or several of a long prompt."""
        if (rows.prefix[:, 0] % self.capacity).any():
            raise ElisionError("the slots of a cache that drops keys are those that it gives itself")
        edges = [0, *(np.flatnonzero(np.diff(rows.prefix[:, 0])) + 1).tolist(), len(rows)]
        spans = list(itertools.pairwise(edges))
        if len(spans) > 1:
            parts = []
            for low, high in spans:
                cell, part = self._cell(int(rows.prefix[low, 0])), cut(rows, low, high)
                cell.settle(int(part.prefix[0, 1]))
                parts.append(cell.placed(part, self.capacity))
            yield 0, len(rows), joined(parts)
            return
        cell, low = self._cell(int(rows.prefix[0, 0])), 0
        while low < len(rows):
            cell.settle(int(rows.prefix[low, 1]))
            fits = max(1, min(cell.room - cell.cached, self._most))
            high = min(len(rows), low + fits)
            yield low, high, cell.placed(cut(rows, low, high), self.capacity)
            low = high

    def _seen(self, starts: np.ndarray) -> None:
        """The scores of the rows that were just computed for each sequence; starts [M]: where that of a row begins."""
        scores = self._model.key_scores()
        for start in dict.fromkeys(starts.tolist()):
            self._cell(start).saw(scores, np.flatnonzero(starts == start))

    def _cell(self, slot: int) -> Cell:
        number = slot // self.capacity
        if number >= len(self.cells):
            raise ElisionError(f"the caches have room for {len(self.cells)} sequences, this is another one")
        return self.cells[number]


class Cell:
    """The slots start ... start + room - 1 and what one sequence has in them.

    past: tokens that are settled; each head has the keys of `cached` of them, in the order of the text. For each
    attention [key heads, room]: sums float64, the attention that these got; positions int64, where they stand."""

    def __init__(self, model: ScoredSteps, policy: H2O, start: int, room: int, heads: Sequence[int]) -> None:
        self._model, self._policy, self.start, self.room = model, policy, start, room
        self.past = self.cached = 0
        self.sums = [np.zeros((count, room)) for count in heads]
        self.positions = [np.zeros((count, room), np.int64) for count in heads]
        self._scores: list[np.ndarray] = []  # of the last call's rows: [M, key heads, room]
        self._order = np.zeros(0, np.int64)  # which of these rows lies in the slots behind the cached ones

    def settle(self, past: int) -> None:
        """Rows of the last call that are tokens now, `past` of them in all; keys that are too many go. 0: a new text.
        Raises ElisionError where tokens are taken back."""
        if past == 0:
            self.past = self.cached = 0
        elif not self.past <= past <= self.past + len(self._order):
            raise ElisionError(
                f"{past} tokens are to be seen, but {self.past} are settled and {len(self._order)} came after them: a "
                "cache that drops keys cannot go back"
            )
        new = past - self.past
        accepted, low, high = self._order[:new], self.cached, self.cached + new
        for layer, scores in enumerate(self._scores if new else ()):
            gained = scores[accepted].sum(0, dtype=np.float64)
            self.sums[layer][:, :low] += gained[:, :low]
            self.sums[layer][:, low:high] = gained[:, low + accepted]
            self.positions[layer][:, low:high] = np.arange(self.past, past)
        self.past, self.cached, self._order = past, high, self._order[:0]
        if self.cached > self._policy.size:
            self._drop()

    def _drop(self) -> None:
        count, size = self.cached, self._policy.size
        for layer, caches in enumerate(self._model.layers):
            kept = choose(self.sums[layer][:, :count], self._policy)
            for cache in caches:
                held = cache[:, self.start : self.start + count]
                held[:, :size] = np.take_along_axis(held, kept[:, :, None], 1)
            for known in (self.sums[layer], self.positions[layer]):
                known[:, :size] = np.take_along_axis(known, kept, 1)
        self.cached = size

    def placed(self, rows: Rows, capacity: int) -> Rows:
        """Rows that follow the settled tokens in the slots of this cell. Raises ElisionError for too many."""
        if self.cached + len(rows) > self.room:
            raise ElisionError(f"{len(rows)} rows do not fit: {self.room} slots, {self.cached} of them taken")
        shift = self.start + self.cached - self.past - int(rows.prefix[0, 0])
        prefix = rows.prefix + np.array([[0, self.cached - self.past]], np.int32)
        prefix[:, 0] = self.start
        ancestors = np.where(rows.ancestors >= 0, rows.ancestors + np.int32(shift), rows.ancestors)
        self._order = np.argsort(rows.slots)
        if (rows.slots[self._order] % capacity != self.past + np.arange(len(rows))).any():
            raise ElisionError("rows of a cache that drops keys lie in the slots behind the settled tokens")
        return Rows(rows.ids, rows.positions, rows.slots + np.int32(shift), prefix, ancestors)

    def saw(self, scores: list[np.ndarray], rows: np.ndarray) -> None:
        """scores: of the call, [M, key heads, C]; rows: which of them are of this sequence."""
        self._scores = [one[rows, :, self.start : self.start + self.room] for one in scores]

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        source, target = source - self.past, target - self.past
        base, order = self.start + self.cached, self._order.copy()
        order[target] = self._order[source]
        self._model.move(base + source, base + target)
        self._order = order


class Cells(Slots):
    """A run as long as the context for each sequence, as many as there are cells."""

    def __init__(self, count: int, capacity: int) -> None:
        super().__init__(capacity)
        self._free = list(range(0, count * capacity, capacity))

    def take(self, count: int) -> int | None:
        """The first slot of a free run, None where there is none now."""
        return self._free.pop(0) if self._free and count <= self.total else None

    def give_back(self, start: int) -> None:
        self._free = sorted([*self._free, start])


def cut(rows: Rows, low: int, high: int) -> Rows:
    """Rows low ... high - 1."""
    if high - low == len(rows):
        return rows
    return Rows(
        *(array[low:high] for array in (rows.ids, rows.positions, rows.slots, rows.prefix, rows.ancestors))
    )


def _copied(found: Any) -> Any:
    if isinstance(found, Largest):
        return Largest(found.values.copy(), found.ids.copy())
    return found.copy()
