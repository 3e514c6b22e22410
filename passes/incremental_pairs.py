"""What the mask and bias of a causal attention say, read off their evaluated tables [heads, queries, keys].

A cached row knows only how far back a key is, or where it stands. So a table f(i, j) must be, for j <= i and up to
a number for each row (which softmax does not see), a function of the distance i - j or of the key j alone, and it
must hide all keys behind the query and, besides, nothing or what lies beyond a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ALL_ROWS = 512
"""Up to this length the bias of every row is compared; beyond it of so many rows, the last one among them."""
_SAMPLE = 128

LOW = -1e8
"""What is added to hide a key is this or less: exporters fill with the least float, -1e30 or -1e9, and no bias of
positions comes near."""

_FORMS = ((True, False), (False, False), (False, True), (True, True))
"""(by key, up to a number for each row), the most faithful to the plain graph's rounding first."""


class Unfit(Exception):
    """Why a table cannot be said in those terms, as the end of a sentence."""


@dataclass(frozen=True)
class PairRule:
    """`window` 0: all keys up to the query. `bias` [1 or heads, length] float32 over the distance, or over the
    key's position when `by_key`."""

    window: int = 0
    bias: np.ndarray | None = None
    by_key: bool = False


class PairTable:
    """Masks that act one after another, as one table at one length.

    Each is an array that broadcasts to [1, heads, length, length]: bool (True: may attend) or additive, where LOW
    (half of the lowest number with 16 bits) or less hides. Raises Unfit."""

    def __init__(self, masks: Sequence[np.ndarray], length: int, causal: bool) -> None:
        self.length = length
        self.later = np.triu(np.ones((length, length), bool), 1)
        self.hidden = (
            np.broadcast_to(self.later, (1, length, length)) if causal else np.zeros((1, 1, 1), bool)
        )
        stride = 1 if length <= _ALL_ROWS else length // _SAMPLE
        self.rows = np.arange(length)[::-stride][::-1]
        additive = []
        for mask in masks:
            mask = _three(mask, length)
            if mask.dtype == bool:
                self.hidden = self.hidden | ~mask
                continue
            hides = mask <= (-32752.0 if mask.dtype == np.float16 else LOW)
            if hides.any():
                self.hidden = self.hidden | hides
            additive.append(mask if mask.shape[1] == 1 else mask[:, self.rows])
        self.hidden = np.broadcast_to(self.hidden, (self.hidden.shape[0], length, length))
        self.bias = np.zeros((1, 1, 1))
        if additive:
            unseen = self.hidden[:, self.rows]
            for mask in additive:  # what is hidden may be anything
                self.bias = self.bias + np.where(unseen, 0.0, mask.astype(np.float64))
            if not np.isfinite(self.bias).all():
                raise Unfit("has NaN or infinity among what is seen")

    def window(self) -> int:
        """How many keys a row sees at most; the length where it sees all up to its own."""
        if not self.hidden[:, self.later].all():
            raise Unfit("lets a token see later ones: the attention is not causal")
        if not (self.hidden == self.hidden[:1]).all():
            raise Unfit("hides other keys from one head than from another")
        seen = ~self.hidden[0]
        count = int(seen[-1].sum())
        place = np.arange(self.length)
        distance = place[:, None] - place[None]
        if count < 1 or not (seen == ((distance >= 0) & (distance < count))).all():
            raise Unfit("hides keys in another way than by a window")
        return count

    def fitted(self, by_key: bool, relative: bool, window: int) -> np.ndarray | None:
        """The bias as [1 or heads, length] over keys or distances, float64, where that is all it says; else None.
        Distances beyond the window are 0."""
        rows, keys = self.rows, np.arange(self.length)
        if by_key and window < self.length:
            return None  # the last row does not see all keys
        bias = np.broadcast_to(self.bias, (self.bias.shape[0], len(rows), self.length))
        allowed = 1e-6
        if relative:
            own = bias[:, :, 0] if by_key else bias[:, np.arange(len(rows)), rows]
            allowed += 4 * float(np.finfo(np.float32).eps) * float(np.abs(bias).max())
            bias = bias - own[:, :, None]
        distance = rows[:, None] - keys[None]
        seen = (distance >= 0) & (distance < window)
        table = bias[:, -1] if by_key else np.where(keys < window, bias[:, -1, ::-1], 0.0)
        expected = table[:, None] if by_key else table[:, np.maximum(distance, 0)]
        difference = np.where(seen, np.abs(expected - bias), 0.0)
        return table if difference.max() <= allowed else None


def read_rule(tables: Sequence[PairTable]) -> PairRule:
    """The rule that all tables (of rising lengths) follow. Raises Unfit."""
    windows = [table.window() for table in tables]
    last = tables[-1]
    window = windows[-1]
    for table, found in zip(tables, windows):
        if found != min(window, table.length):
            raise Unfit(
                f"has a window of {found} keys at {table.length} tokens, of {window} at {last.length}"
            )
    shown = 0 if window == last.length else window
    if not any(table.bias.any() for table in tables):
        return PairRule(shown)
    for by_key, relative in _FORMS:
        fits = [t.fitted(by_key, relative, w) for t, w in zip(tables, windows)]
        whole = fits[-1]
        if whole is None or any(fit is None or not _starts(whole, fit) for fit in fits):
            continue
        bias = whole.astype(np.float32)
        bias = bias[:1] if (bias == bias[:1]).all() else bias
        return PairRule(shown, bias, by_key) if bias.any() else PairRule(shown)
    raise Unfit("is neither a function of the distance nor of the key")


def read_full(tables: Sequence[PairTable]) -> PairRule:
    """The rule of attention of all to all, where that is what the tables say. Raises Unfit."""
    for table in tables:
        if table.hidden.any():
            causal = bool(table.hidden[:, table.later].all())
            raise Unfit(
                "hides later tokens: the attention is causal"
                if causal
                else "hides tokens, and only an attention of all to all can be windowed"
            )
        if np.ptp(table.bias, axis=-1).max() > 1e-6:
            raise Unfit("adds a bias of positions")
    return PairRule()


def _starts(whole: np.ndarray, start: np.ndarray) -> bool:
    length = start.shape[1]
    allowed = 1e-6 + 4 * float(np.finfo(np.float32).eps) * float(np.abs(whole).max())
    return bool((np.abs(whole[:, :length] - start) <= allowed).all())


def _three(array: np.ndarray, length: int) -> np.ndarray:
    """[1 or heads, 1 or length, 1 or length] of a mask with any leading axes."""
    while array.ndim < 2:
        array = array[None]
    if array.shape[-1] not in (1, length) or array.shape[-2] not in (1, length):
        raise Unfit(f"has the shape {list(array.shape)} at {length} tokens")
    return array.reshape(-1, *array.shape[-2:])
