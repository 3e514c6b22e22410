"""Embeddings of pieces from those of their tokens."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ..passes.errors import ElisionError
from .files import write_atomically
from .vocabulary_merges import Piece


@dataclass(frozen=True)
class Pieces:
    """Pieces to be embedded: their token ids, their text ("" where no tokenizer is known), and the embeddings of their
    tokens, float32 [K, L, C], with a mask, bool [K, L]."""

    ids: Sequence[Piece]
    texts: Sequence[str]
    rows: np.ndarray
    mask: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """float32 [K, C]"""
        weight = self.mask[:, :, None]
        return (self.rows * weight).sum(1) / weight.sum(1)

    @property
    def first(self) -> np.ndarray:
        """float32 [K, C]"""
        return self.rows[:, 0]

    @property
    def last(self) -> np.ndarray:
        """float32 [K, C]"""
        return self.rows[np.arange(len(self.rows)), self.mask.sum(1) - 1]


class Predictor(Protocol):
    """Gives the embeddings float32 [K, C] of pieces, each by itself: results are kept. A hypernetwork (ZeTT, Minixhofer
    et al., NeurIPS 2024) goes by `texts`."""

    def __call__(self, pieces: Pieces) -> np.ndarray: ...


def average(pieces: Pieces) -> np.ndarray:
    """The mean of the tokens' embeddings."""
    return pieces.mean


def first_and_average(pieces: Pieces) -> np.ndarray:
    """Half the first token's embedding, half the mean of all."""
    return (pieces.first + pieces.mean) / 2


PREDICTORS: dict[str, Predictor] = {"average": average, "first-and-average": first_and_average}


@dataclass(frozen=True, eq=False)
class TrainedPredictor:
    """The mean and a correction of it: mean + W2 relu(W1 [first; last; mean; ln length] + b1). A new one, with W2 = 0,
    is the average.

    up [D, 3 C + 1], bias [D], down [C, D]; float16 or float32. examples/train_vocabulary.py trains one."""

    up: np.ndarray
    bias: np.ndarray
    down: np.ndarray

    def __call__(self, pieces: Pieces) -> np.ndarray:
        mean = pieces.mean
        if self.down.shape[0] != mean.shape[1] or self.up.shape[1] != 3 * mean.shape[1] + 1:
            raise ElisionError(
                f"the predictor is for embeddings of {self.down.shape[0]}, not {mean.shape[1]} numbers"
            )
        length = np.log(pieces.mask.sum(1, dtype=np.float32))[:, None]
        features = np.concatenate([pieces.first, pieces.last, mean, length], 1)
        inner = np.maximum(features @ self.up.T.astype(np.float32) + self.bias.astype(np.float32), 0)
        return mean + inner @ self.down.T.astype(np.float32)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a .safetensors file, whole or not at all."""
        from safetensors.numpy import save_file

        parts = {name: np.ascontiguousarray(getattr(self, name)) for name in ("up", "bias", "down")}
        return write_atomically(Path(path), lambda temporary: save_file(parts, temporary))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TrainedPredictor:
        """Read what `save` wrote. Raises ElisionError for anything else."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            found = load_file(path)
            return cls(found["up"], found["bias"], found["down"])
        except (OSError, KeyError, SafetensorError) as error:
            raise ElisionError(f"{path}: no predictor of embeddings ({error})") from None


class EmbeddingCache:
    """Predicted embeddings, up to `size` of them: those used last are kept."""

    def __init__(
        self,
        predictor: Predictor,
        lookup: Callable[[np.ndarray], np.ndarray],
        text: Callable[[Piece], str],
        size: int,
    ) -> None:
        self.predictor, self.lookup, self.text, self.size = predictor, lookup, text, size
        self.predicted = 0  # how many were not found
        self._kept: OrderedDict[Piece, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Keep nothing."""
        self._kept.clear()

    def rows(self, wanted: Sequence[Piece]) -> np.ndarray:
        """The embeddings float32 [K, C] of these pieces, each of which is there once."""
        new = [piece for piece in wanted if piece not in self._kept]
        found = dict(zip(new, self._predict(new))) if new else {}
        rows = []
        for piece in wanted:
            row = found.get(piece)
            if row is None:
                self._kept.move_to_end(piece)
                row = self._kept[piece]
            rows.append(row)
        for piece, row in found.items():
            self._kept[piece] = row
        while len(self._kept) > self.size:
            self._kept.popitem(last=False)
        return np.stack(rows)

    def _predict(self, new: Sequence[Piece]) -> np.ndarray:
        self.predicted += len(new)
        longest = max(map(len, new))
        ids = np.array([[*piece, *[piece[0]] * (longest - len(piece))] for piece in new], np.int64)
        mask = np.arange(longest)[None] < np.array([len(piece) for piece in new])[:, None]
        rows = np.asarray(self.lookup(ids.ravel()), np.float32).reshape(*ids.shape, -1)
        pieces = Pieces(new, [self.text(piece) for piece in new], rows, mask)
        made = np.asarray(self.predictor(pieces), np.float32)
        if made.shape != (len(new), rows.shape[2]) or not np.isfinite(made).all():
            raise ElisionError(
                f"the predictor gave {list(made.shape)} for {len(new)} pieces of {rows.shape[2]} numbers, or what is "
                "no number"
            )
        return made
