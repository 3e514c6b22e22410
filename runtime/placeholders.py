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
    if rows.size and (rows.min() < 0 or rows.max() >= each):
        raise ElisionError(f"kept says token {int(rows.max() if rows.min() >= 0 else rows.min())} of {each}")
    if (where.sum(1) % each).any():
        raise ElisionError(f"a text has a part of a picture of {each} tokens only")
    left = np.zeros((pictures, each), bool)
    np.put_along_axis(left, rows, True, 1)
    if (left.sum(1) != rows.shape[1]).any():
        raise ElisionError("kept says a token twice")
    stays = ~where
    stays[where] = left.ravel()
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


def _integers(given: Any, name: str) -> np.ndarray:
    array = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given)
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise ElisionError(f"{name} must be integers [rows, tokens], not {array.dtype} {list(array.shape)}")
    return array
