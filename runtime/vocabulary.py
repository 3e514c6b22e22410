"""Texts with a vocabulary of their own: several tokens of a word become one before the model.

The pass `dynamic-vocab` gives a model an input with the embeddings of new tokens; `DynamicVocabulary` makes it, and the
ids that read it (Feher et al., Retrofitting large language models with dynamic tokenization, ACL 2025)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..passes.errors import ElisionError
from .tensors import like
from .vocabulary_merges import RULES, BatchMerges, Cut, MergeList, Piece
from .vocabulary_predictors import PREDICTORS, EmbeddingCache, Predictor
from .vocabulary_source import Source, read_source
from .vocabulary_words import SPECIAL, Boundary, Words

_MOST_WORDS = 1 << 16


@dataclass(frozen=True, eq=False)
class DynamicBatch:
    """What a model reads of a batch, and how it lies in the texts as they were tokenized.

    ids int64 [B, N'], mask [B, N'] (1: a token), table [M, C], or [B, M, C] where the pass was told per_text. slot
    int32 [B, N]: the new place of every token, -1 for padding. size int64 [B, N']: how many tokens it is made of, 0 for
    padding. All are tensors or all arrays."""

    ids: Any
    mask: Any
    table: Any
    slot: Any
    size: Any
    names: tuple[str, str, str] = field(default=("input_ids", "attention_mask", "table"), repr=False)

    @property
    def inputs(self) -> dict[str, Any]:
        """ids, mask and table under the names of the model's inputs."""
        return dict(zip(self.names, (self.ids, self.mask, self.table)))

    @property
    def tokens_before(self) -> int:
        """Tokens of the texts, padding left out."""
        return int((self.slot >= 0).sum())

    @property
    def tokens_after(self) -> int:
        """Tokens that the model reads, padding left out."""
        return int((self.size > 0).sum())

    def select(self, values: Any) -> Any:
        """values [B, N] of the tokens, of the first of each new token [B, N']: for token types. 0 for padding."""
        slot, new = np.asarray(self.slot), np.zeros_like(np.asarray(self.ids), dtype=np.asarray(values).dtype)
        rows, places = np.nonzero(slot >= 0)
        new_place = rows * new.shape[1] + slot[rows, places]
        first = np.unique(new_place, return_index=True)[1]
        new.reshape(-1)[new_place[first]] = np.asarray(values)[rows[first], places[first]]
        return like(new, values)

    def restore(self, outputs: Any) -> Any:
        """outputs [B, N', ...] of the new tokens, for every token as it was [B, N, ...]; zeros for padding."""
        slot, given = (
            np.asarray(self.slot),
            np.asarray(outputs.detach() if hasattr(outputs, "detach") else outputs),
        )
        found = given[np.arange(len(slot))[:, None], np.maximum(slot, 0)]
        real = (slot >= 0).reshape(*slot.shape, *[1] * (given.ndim - 2))
        return like(np.where(real, found, np.zeros((), given.dtype)), outputs)


class DynamicVocabulary:
    """Turns batches of texts into the inputs of a model that `dynamic-vocab` was applied to.

    target: the result of `elision.optimize`, the ONNX file it was saved as, or the table of embeddings [V, C] itself.
    tokenizer: that of the model (package tokenizers, transformers' fast ones, or a tokenizer.json); without one, words
        must be given with the ids.
    merges: "tails" (a word's first token stays, of the others three become one), "words" (a whole word becomes one),
        other `CutWords`, a `MergeList` or the file of one, `BatchMerges(count)`, or a function from a word's ids to its
        pieces. With all but `BatchMerges` a text's result does not depend on the others of its batch.
    predictor: "average", "first-and-average", a `TrainedPredictor` or the file of one, or a function of `Pieces`.
    boundary: what a word is: "pretoken", what the tokenizer splits a text into first, or "word", what is between two
        spaces. special: ids that are never merged, besides the tokenizer's own.
    lengths, rows: numbers of tokens and of the table's rows to pad to, for graphs with static shapes; () for no
        padding. Where the graph has one static number, that is the default.
    max_length: the most tokens of a text, after merging; 0: any number. pad: the id of padding; left: it comes first.
    cache: how many predicted embeddings are kept."""

    def __init__(
        self,
        target: Any,
        tokenizer: Any = None,
        merges: str | MergeList | BatchMerges | Cut = "tails",
        *,
        predictor: str | Predictor = "average",
        boundary: Boundary = "pretoken",
        special: Iterable[int] = (),
        lengths: Sequence[int] = (),
        rows: Sequence[int] = (),
        max_length: int = 0,
        pad: int = 0,
        left: bool = False,
        cache: int = 5000,
    ) -> None:
        if cache < 0 or max_length < 0:
            raise ElisionError(f"cache and max_length are at least 0, not {cache} and {max_length}")
        self.source: Source = read_source(target)
        self.words = None if tokenizer is None else Words(tokenizer, boundary)
        self.special = {*special, *(self.words.special if self.words else ())}
        self.merges = _merges(merges)
        self.lengths = sorted(lengths) or self.source.lengths
        self.rows = sorted(rows) or self.source.capacities
        self.max_length, self.pad, self.left = max_length, pad, left
        self.cache = EmbeddingCache(_predictor(predictor), self.source.rows, self._text, cache)
        self._cuts: dict[Piece, list[Piece]] = {}

    # ---- batches -------------------------------------------------------------------------------------
    def encode(self, texts: Sequence[str]) -> DynamicBatch:
        """The batch of these texts, tokenized with the special tokens of the model. Tensors for a torch result or a
        tensor, arrays for a file or an array. Raises ElisionError where a text is too long."""
        if self.words is None:
            raise ElisionError("texts need a tokenizer; without one give ids")
        ids, words = self.words.encode(texts)
        return self._batch(
            ids, words, [np.arange(len(row)) for row in ids], max(map(len, ids), default=0), None
        )

    def __call__(self, ids: Any, mask: Any = None, words: Any = None) -> DynamicBatch:
        """The batch of token ids [B, N] with a mask [B, N] (> 0: a token; None: all).

        words [B, N]: tokens with the same number, one behind the other, are a word; -1: a special token. By default the
        tokenizer says so. Arrays or tensors, and so is the result. Raises ElisionError where an id is none of the
        vocabulary's, where a text is too long, or where words are neither given nor known."""
        given = np.asarray(ids)
        real = np.ones(given.shape, bool) if mask is None else np.asarray(mask) > 0
        if given.ndim != 2 or real.shape != given.shape or given.dtype.kind not in "iu":
            raise ElisionError(
                f"ids and mask are [batch, length], not {list(given.shape)} and {list(real.shape)}"
            )
        places = [np.nonzero(row)[0] for row in real]
        rows = [row[at].tolist() for row, at in zip(given, places)]
        if words is not None:
            numbers = [row[at].tolist() for row, at in zip(np.asarray(words), places)]
        elif self.words is not None:
            numbers = [self.words.of(row) for row in rows]
        else:
            raise ElisionError("where words begin is not known: give a tokenizer, or words with the ids")
        return self._batch(rows, numbers, places, given.shape[1], ids)

    def forget(self) -> None:
        """Forget predicted embeddings, and how words were cut."""
        self.cache.clear()
        self._cuts.clear()

    def learn(self, texts: Iterable[str], count: int, *, least: int = 2, longest: int = 0) -> MergeList:
        """The list of the `count` merges that save most tokens in these texts: see `MergeList.learn`."""
        if self.words is None:
            raise ElisionError("texts need a tokenizer")
        ids, words = self.words.encode(list(texts))
        found = (word for row, numbers in zip(ids, words) for word in self.split(row, numbers))
        return MergeList.learn(found, count, least=least, longest=longest)

    # ---- inside --------------------------------------------------------------------------------------
    def _batch(
        self,
        ids: list[list[int]],
        words: list[list[int]],
        places: list[np.ndarray],
        length: int,
        like: Any,
    ) -> DynamicBatch:
        vocabulary = self.source.count
        flat = [token for row in ids for token in row]
        if flat and not 0 <= min(flat) <= max(flat) < vocabulary:
            raise ElisionError(
                f"an id is none of the vocabulary's {vocabulary}: {min(flat)} to {max(flat)} are given"
            )
        split = [self.split(row, numbers) for row, numbers in zip(ids, words)]
        cut, kept = self._cut(split)
        pieces = [[piece for word in row for piece in self._pieces(word, cut, kept)] for row in split]
        tables = [{} for _ in pieces] if self.source.per_text else [{}] * len(pieces)
        new: list[list[int]] = []
        for row, table in zip(pieces, tables):
            new.append([p[0] if len(p) == 1 else vocabulary + table.setdefault(p, len(table)) for p in row])
        count = self._bucket(max(map(len, new), default=0), self.lengths, "tokens", self.max_length)
        batch = len(ids)
        made = np.full((batch, count), self.pad, np.int64)
        size = np.zeros((batch, count), np.int64)
        slot = np.full((batch, length), SPECIAL, np.int32)
        for index, (row, at) in enumerate(zip(new, places)):
            start = count - len(row) if self.left else 0
            made[index, start : start + len(row)] = row
            sizes = [len(piece) for piece in pieces[index]]
            size[index, start : start + len(row)] = sizes
            slot[index, at] = start + np.repeat(np.arange(len(row)), sizes)
        arrays = (made, (size > 0).astype(np.int64), self._table(tables), slot, size)
        return DynamicBatch(*(self._given(array, like) for array in arrays), names=self.source.names)

    def split(self, ids: list[int], numbers: list[int]) -> list[Piece]:
        """The words of a text of which the number of every token's word is given; special tokens are words of their
        own."""
        found: list[Piece] = []
        last = SPECIAL
        for token, number in zip(ids, numbers):
            if number == last != SPECIAL and token not in self.special:
                found[-1] = (*found[-1], token)
            else:
                found.append((token,))
            last = SPECIAL if token in self.special else number
        return found

    def _cut(self, split: list[list[Piece]]) -> tuple[Cut, dict[Piece, list[Piece]]]:
        """How this batch's words are cut, and what is known of it."""
        if isinstance(self.merges, BatchMerges):
            return self.merges.of(word for row in split for word in row), {}
        if len(self._cuts) > _MOST_WORDS:
            self._cuts.clear()
        return self.merges, self._cuts

    def _pieces(self, word: Piece, cut: Cut, kept: dict[Piece, list[Piece]]) -> list[Piece]:
        if len(word) == 1:
            return [word]
        found = kept.get(word)
        if found is None:
            found = [tuple(piece) for piece in cut(word)]
            if sum(found, ()) != word or () in found:
                raise ElisionError(
                    f"the merges cut the word {list(word)} into {found}, which are no pieces of it"
                )
            kept[word] = found
        return found

    def _table(self, tables: list[dict[Piece, int]]) -> np.ndarray:
        width = self.source.width
        unlike = tables if self.source.per_text else tables[:1]
        most = self._bucket(max(map(len, unlike), default=0) or 1, self.rows, "new tokens")
        made = np.zeros((len(unlike), most, width), np.float32)
        if not self.source.per_text and not tables:
            made = np.zeros((1, most, width), np.float32)
        for rows, table in zip(made, unlike):
            if table:
                rows[: len(table)] = self.cache.rows(list(table))
        return made if self.source.per_text else made[0]

    def _bucket(self, count: int, buckets: Sequence[int], what: str, most: int = 0) -> int:
        if most and count > most:
            raise ElisionError(f"a text has {count} {what} after merging, more than max_length {most}")
        found = next((b for b in buckets if b >= count), None) if buckets else count
        if found is None:
            raise ElisionError(f"{count} {what} do not fit the largest bucket of {max(buckets)}")
        return found

    def _text(self, piece: Piece) -> str:
        return "" if self.words is None else self.words.text(piece)

    def _given(self, array: np.ndarray, like: Any) -> Any:
        """An array, or a tensor where the model or the ids are torch's; floats in the embeddings' own type."""
        if hasattr(like, "detach") or (like is None and self.source.torch):
            import torch

            made = torch.from_numpy(array)
            if like is not None:
                made = made.to(like.device)
            return made.to(getattr(torch, self.source.dtype)) if made.is_floating_point() else made
        if array.dtype.kind != "f" or self.source.dtype == "float32":
            return array
        import ml_dtypes

        return array.astype(ml_dtypes.bfloat16 if self.source.dtype == "bfloat16" else self.source.dtype)


def _merges(given: Any) -> Any:
    if isinstance(given, str) and given in RULES:
        return RULES[given]
    if callable(given) or isinstance(given, BatchMerges):
        return given
    return MergeList.load(given)


def _predictor(given: Any) -> Any:
    if isinstance(given, str) and given in PREDICTORS:
        return PREDICTORS[given]
    if callable(given):
        return given
    from .vocabulary_predictors import TrainedPredictor

    return TrainedPredictor.load(given)
