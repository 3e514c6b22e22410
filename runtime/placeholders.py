"""The text's side of dropped image tokens: input ids without the placeholders of tokens that are gone."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..passes.errors import ElisionError
from .tensors import like


class Shortened(NamedTuple):
    """`input_ids` [B, N'] and `places` int64 [B, N'], the positions that its tokens had in the whole text: what a mask
    [B, N] becomes is `numpy.take_along_axis(mask, places, 1)`, and `places` are position ids that keep every token
    where it was."""

    input_ids: Any
    places: Any


def drop_placeholders(
    input_ids: Any, kept: Any, placeholder: int, *, before: int = 0, padding: int | None = None
) -> Shortened:
    """Leave the placeholders of dropped tokens out of `input_ids` int [B, N].

    kept int [pictures, K]: which tokens of each picture are left, as `elision_kept` says, pictures in the order of the
    texts' rows. placeholder: its id. before: so many of a picture's kept rows are class tokens in front of those
    that have placeholders. padding: texts of different lengths get this id behind them (places there: the last).
    Arrays and tensors give their like.

    Raises ElisionError when the placeholders are no pictures of one number of tokens, when `kept` says a place
    twice or one that is none of a picture's, or when texts get different lengths and no padding is given."""
    ids, rows = _integers(input_ids, "input_ids"), _integers(kept, "kept")
    if before:
        rows = rows[:, before:] - before
    where = ids == placeholder
    total, pictures = int(where.sum()), len(rows)
    if not pictures or not total or total % pictures:
        raise ElisionError(f"{total} placeholders are no {pictures} pictures of one number of tokens")
    each = total // pictures
    numbers = numbers_of(rows, each)
    if (where.sum(1) % each).any():
        raise ElisionError(f"a text has a part of a picture of {each} tokens only")
    stays = staying(where, numbers)
    lengths = stays.sum(1)
    longest = int(lengths.max())
    if padding is None and (lengths != longest).any():
        raise ElisionError(
            f"the texts would have from {int(lengths.min())} to {longest} tokens: say which id is padding"
        )
    places = np.argsort(~stays, axis=1, kind="stable")[:, :longest]
    found = np.take_along_axis(ids, places, 1)
    beyond = np.arange(longest) >= lengths[:, None]
    if padding is not None:
        found = np.where(beyond, np.asarray(padding, ids.dtype), found)
    places = np.where(beyond, ids.shape[1] - 1, places)
    return Shortened(like(found, input_ids), like(places, input_ids))


def numbers_of(kept: np.ndarray, each: int, size: np.ndarray | None = None) -> np.ndarray:
    """The numbers of kept tokens among those of all pictures, int64 [R]. kept int [pictures, K], each from 0 to
    `each` - 1; size [pictures, K]: 0 for entries that are nobody's. Raises ElisionError for other places, and for one
    that is said twice."""
    if kept.size and (kept.min() < 0 or kept.max() >= each):
        raise ElisionError(f"kept says token {int(kept.max() if kept.min() >= 0 else kept.min())} of {each}")
    numbers = (kept.astype(np.int64) + each * np.arange(len(kept))[:, None]).reshape(-1)
    if size is not None:
        numbers = numbers[size.reshape(-1) > 0]
    if len(np.unique(numbers)) != len(numbers):
        raise ElisionError("kept says a token twice")
    return numbers


def staying(where: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Which tokens are left where the image tokens `where` bool [...] go, but for those of these numbers."""
    left = np.zeros(int(where.sum()), bool)
    left[numbers] = True
    stays = ~where
    stays[where] = left
    return stays


def _integers(given: Any, name: str) -> np.ndarray:
    array = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given)
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise ElisionError(f"{name} must be integers [rows, tokens], not {array.dtype} {list(array.shape)}")
    return array
