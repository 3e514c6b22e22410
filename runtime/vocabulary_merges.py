"""Which tokens of a word become one: fixed lists of merges, merges by frequency, and rules that need no list.

A *word* is the token ids between two boundaries, a *piece* a run of them that becomes one token. Merges are those of
byte pair encoding (Sennrich et al., ACL 2016) over tokens instead of bytes."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..passes.errors import ElisionError
from .files import write_atomically

Piece = tuple[int, ...]
"""Token ids that are one token; of one id, that token."""

Cut = Callable[[Piece], list[Piece]]
"""A word's pieces, in order. It must depend on the word alone: results are kept."""

_FORMAT = "elision-merges"


@dataclass(frozen=True)
class CutWords:
    """The first `keep` tokens of a word stay, those behind them become one, or one for every `longest` of them (0: any
    number). What a tokenizer puts first says most: the embedding of a whole word is harder to predict."""

    keep: int = 1
    longest: int = 3

    def __post_init__(self) -> None:
        if self.keep < 0 or self.longest < 0:
            raise ElisionError(f"keep and longest are at least 0, not {self.keep} and {self.longest}")

    def __call__(self, word: Piece) -> list[Piece]:
        """The word's pieces."""
        kept = [(token,) for token in word[: self.keep]]
        step = self.longest or len(word)
        return [*kept, *(word[at : at + step] for at in range(self.keep, len(word), step))]


RULES: dict[str, Cut] = {"words": CutWords(0, 0), "tails": CutWords()}


@dataclass(frozen=True)
class MergeList:
    """Pairs of pieces that become one, those that come first first. A text's pieces depend on the text alone."""

    pairs: tuple[tuple[Piece, Piece], ...]

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "_ranks", {pair: rank for rank, pair in reversed(list(enumerate(self.pairs)))}
        )

    def __call__(self, word: Piece) -> list[Piece]:
        """The word's pieces: of all neighbours that are in the list, the earliest of the list is joined, everywhere in
        the word from the left, until there is none."""
        ranks: dict[tuple[Piece, Piece], int] = self._ranks  # type: ignore[attr-defined]
        pieces: list[Piece] = [(token,) for token in word]
        while len(pieces) > 1:
            best = min(itertools.pairwise(pieces), key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            pieces = _joined(pieces, best)
        return pieces

    @classmethod
    def learn(
        cls,
        words: Iterable[Sequence[int]],
        count: int,
        *,
        least: int = 2,
        longest: int = 0,
    ) -> MergeList:
        """The `count` merges that save most tokens in a corpus, given as its words (one as often as it occurs).

        Again and again the pair of neighbours that is most frequent becomes one; the first met of equals. least: a
        pair must occur so often. longest: the most tokens in a piece, 0 for any number. Fewer than `count` where no
        pair is left."""
        pairs: list[tuple[Piece, Piece]] = []
        corpus: list[tuple[list[Piece], int]] = []
        for word, times in Counter(map(tuple, words)).items():
            if len(word) > 1:
                corpus.append(([(token,) for token in word], times))
        found, where = _pairs(corpus, longest)
        while found and len(pairs) < count:
            best = max(found, key=found.__getitem__)
            if found[best] < least:
                break
            pairs.append(best)
            for index in sorted(where[best]):
                pieces, times = corpus[index]
                new = _joined(pieces, best)
                _count(found, where, index, pieces, -times, longest)
                _count(found, where, index, new, times, longest)
                corpus[index] = new, times
        return cls(tuple(pairs))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the list as JSON, whole or not at all."""
        data = {"format": _FORMAT, "pairs": [[list(a), list(b)] for a, b in self.pairs]}
        return write_atomically(
            Path(path), lambda temporary: Path(temporary).write_text(json.dumps(data), encoding="utf-8")
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MergeList:
        """Read what `save` wrote. Raises ElisionError for anything else."""
        try:
            data: Any = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["format"] != _FORMAT:
                raise ValueError(f"the format is {data['format']!r}")
            return cls(tuple((tuple(map(int, a)), tuple(map(int, b))) for a, b in data["pairs"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ElisionError(f"{path}: no list of merges ({error})") from None


@dataclass(frozen=True)
class BatchMerges:
    """Up to `count` merges by frequency within each batch: a text's tokens depend on the others of its batch."""

    count: int
    longest: int = 4

    def __post_init__(self) -> None:
        if self.count < 0 or self.longest < 0:
            raise ElisionError(f"count and longest are at least 0, not {self.count} and {self.longest}")

    def of(self, words: Iterable[Sequence[int]]) -> MergeList:
        """The merges of a batch with these words."""
        return MergeList.learn(words, self.count, longest=self.longest)


Found = dict[tuple[Piece, Piece], int]
Where = dict[tuple[Piece, Piece], set[int]]


def _pairs(corpus: list[tuple[list[Piece], int]], longest: int) -> tuple[Found, Where]:
    found: Found = {}
    where: Where = {}
    for index, (pieces, times) in enumerate(corpus):
        _count(found, where, index, pieces, times, longest)
    return found, where


def _count(found: Found, where: Where, index: int, pieces: list[Piece], times: int, longest: int) -> None:
    """Add `times` to the pairs of word `index`; a pair that occurs no more goes."""
    for pair in itertools.pairwise(pieces):
        if longest and len(pair[0]) + len(pair[1]) > longest:
            continue
        found[pair] = found.get(pair, 0) + times
        places = where.setdefault(pair, set())
        if times > 0:
            places.add(index)
        if found[pair] <= 0:
            del found[pair], where[pair]


def _joined(pieces: list[Piece], pair: tuple[Piece, Piece]) -> list[Piece]:
    made: list[Piece] = []
    at = 0
    while at < len(pieces):
        if at + 1 < len(pieces) and (pieces[at], pieces[at + 1]) == pair:
            made.append(pair[0] + pair[1])
            at += 2
        else:
            made.append(pieces[at])
            at += 1
    return made
