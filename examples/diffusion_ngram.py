"""The predictor that the diffusion model has to beat: four-grams with back-off, counted on the same files."""

from __future__ import annotations

import numpy as np

ORDER = 4


class NGrams:
    """Counts of all runs of up to ORDER ids. Knows the left context only."""

    def __init__(self, ids: np.ndarray, vocabulary: int) -> None:
        """ids: [n], one long text."""
        self.vocabulary = vocabulary
        self._contexts: list[np.ndarray] = []  # per order, the contexts seen, sorted
        self._best: list[np.ndarray] = []  # and the id that follows each most often
        self._totals: list[np.ndarray] = []  # how often each was seen
        self._kinds: list[np.ndarray] = []  # how many different ids follow it
        self._grams: list[np.ndarray] = []  # contexts with an id, sorted
        self._counts: list[np.ndarray] = []
        ids = ids.astype(np.int64)
        for size in range(ORDER):
            key = self._keys(ids, size)[: len(ids) - size] * vocabulary + ids[size:]
            grams, counts = np.unique(key, return_counts=True)
            of = grams // vocabulary
            first = np.flatnonzero(np.r_[True, of[1:] != of[:-1]])
            order = np.lexsort((-counts, of))
            self._contexts.append(of[first])
            self._best.append(grams[order][first] % vocabulary)
            self._totals.append(np.add.reduceat(counts, first))
            self._kinds.append(np.diff(np.r_[first, len(of)]))
            self._grams.append(grams)
            self._counts.append(counts)

    def _keys(self, ids: np.ndarray, size: int) -> np.ndarray:
        """Runs of `size` ids as one number each, by where they begin."""
        key = np.zeros(len(ids), np.int64)
        for place in range(size):
            key[: len(ids) - place] = key[: len(ids) - place] * self.vocabulary + ids[place:]
        return key

    def fill(self, ids: np.ndarray, masked: np.ndarray) -> np.ndarray:
        """ids, masked: [B, N]. The likeliest id at every place, given the unmasked ids just before it, up to the last
        masked one; the longest context that was seen in training decides."""
        rows, length = ids.shape
        found = np.full((rows, length), self._best[0][0])
        key = np.zeros((rows, length), np.int64)
        open_ = np.ones((rows, length), bool)
        for size in range(1, ORDER):
            before = np.zeros_like(ids)
            before[:, size:] = ids[:, :-size]
            open_[:, :size] = False
            open_[:, size:] &= ~masked[:, :-size]
            key += before * self.vocabulary ** (size - 1)
            place, seen = self._find(self._contexts[size], key)
            use = open_ & seen
            found[use] = self._best[size][place[use]]
        return found

    def nats(self, ids: np.ndarray) -> float:
        """Mean negative log-likelihood per token of ids [n], all orders mixed after Witten and Bell."""
        ids = ids.astype(np.int64)
        p = np.full(len(ids), 1 / self.vocabulary)
        for size in range(ORDER):
            context = self._keys(ids, size)[: len(ids) - size]
            place, seen = self._find(self._contexts[size], context)
            gram, known = self._find(self._grams[size], context * self.vocabulary + ids[size:])
            total, kinds = self._totals[size][place], self._kinds[size][place]
            count = np.where(known, self._counts[size][gram], 0)
            mixed = (count + kinds * p[size:]) / (total + kinds)
            p[size:] = np.where(seen, mixed, p[size:])
        return float(-np.log(p).mean())

    @staticmethod
    def _find(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where keys stand in a sorted table, and whether they do."""
        place = np.minimum(np.searchsorted(table, keys), len(table) - 1)
        return place, table[place] == keys
