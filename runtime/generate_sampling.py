"""From the scores of one row to the next id: penalties, temperature, top-k, top-p.

The order of the steps and what each does are those of transformers' logits processors, so that greedy decoding and
the distribution that is sampled from are the same. Sampling itself takes one uniform number a token from a generator
seeded by (seed, number of the sequence): the same scores give the same ids on every runtime, in any batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ..passes.errors import ElisionError
from .lm_step import Largest


@dataclass(frozen=True)
class Sampling:
    """temperature 0: the best id, the lowest of several. top_k 0, top_p 1: all ids. repetition_penalty: ids that have
    been seen get their scores divided (multiplied, where negative) by it. ngram: no sequence of so many ids comes
    twice (0: any may). suppress: never chosen; suppress_first: not as the first new id; forced_first: what follows a
    prompt of one id; forced_last: what the last id is that may come. The last six are the model's own
    (generation_config) where nothing else is said."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0
    ngram: int = 0
    suppress: tuple[int, ...] = ()
    suppress_first: tuple[int, ...] = ()
    forced_first: int | None = None
    forced_last: int | None = None

    def __post_init__(self) -> None:
        """Raises ElisionError for a value that means nothing."""
        _finite("temperature", self.temperature, 0, None)
        _finite("top-p", self.top_p, 0, 1)
        _finite("repetition penalty", self.repetition_penalty, 0, None)
        if self.top_p == 0 or self.repetition_penalty == 0:
            raise ElisionError("top-p and the repetition penalty are greater than 0")
        if self.top_k < 0 or self.seed < 0:
            raise ElisionError("top-k and the seed are 0 or more")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def to_json(self) -> dict[str, Any]:
        """What differs from plain greedy decoding, and always the temperature."""
        plain = asdict(Sampling())
        own = {key: value for key, value in asdict(self).items() if value != plain[key]}
        return {"temperature": self.temperature} | own


def _finite(name: str, value: float, low: float, high: float | None) -> None:
    if not math.isfinite(value) or value < low or (high is not None and value > high):
        within = f"between {low} and {high}" if high is not None else f"{low} or more"
        raise ElisionError(f"{name} is {within}, not {value}")


# field of generation_config -> ours
_FROM_MODEL = {
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "ngram",
    "suppress_tokens": "suppress",
    "begin_suppress_tokens": "suppress_first",
    "forced_bos_token_id": "forced_first",
    "forced_eos_token_id": "forced_last",
}


def from_model(config: Mapping[str, Any], given: Sampling, asked: Sequence[str] = ()) -> Sampling:
    """`given`, with what the model's generation_config says about fields that are not in `asked`.

    Temperature, top-k and top-p never come from there: sampling is only done when it is asked for."""
    found: dict[str, Any] = {}
    for theirs, ours in _FROM_MODEL.items():
        value = config.get(theirs)
        if value is not None and ours not in asked:
            if isinstance(value, list | tuple):
                value = tuple(value) if ours.startswith("suppress") else value[0]
            found[ours] = value
    return replace(given, **found)


def adjusted(
    scores: np.ndarray, history: Sequence[int], new: int, how: Sampling, *, last: bool = False
) -> np.ndarray:
    """scores float [V] -> float32 [V] after bans and penalties, before temperature. history: all ids so far, the prompt
    too; new: how many of them are new; last: no id may come after this one. `scores` is not written to."""
    scores = np.array(scores, np.float32)
    if how.repetition_penalty != 1 and len(history):
        seen = np.unique(np.asarray(history))
        values = scores[seen]
        penalty = np.float32(how.repetition_penalty)
        scores[seen] = np.where(values < 0, values * penalty, values / penalty)
    if how.ngram > 0:
        scores[_would_repeat(history, how.ngram)] = -np.inf
    if how.suppress:
        scores[[item for item in how.suppress if item < len(scores)]] = -np.inf
    if new == 0 and how.suppress_first:
        scores[[item for item in how.suppress_first if item < len(scores)]] = -np.inf
    for wanted, now in ((how.forced_first, len(history) == 1), (how.forced_last, last)):
        if now and wanted is not None:
            scores[:] = -np.inf
            scores[wanted] = 0
    return scores


def _would_repeat(history: Sequence[int], size: int) -> list[int]:
    """The ids that would end a run of `size` ids that has been there before."""
    last = tuple(history[len(history) - size + 1 :]) if size > 1 else ()
    if len(history) < size:
        return []
    runs = range(len(history) - size + 1)
    return [history[i + size - 1] for i in runs if tuple(history[i : i + size - 1]) == last]


def distribution(scores: np.ndarray, how: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """(ids int64, probabilities float64) that can be sampled, best first, lowest id first among equals.

    scores: float [V], as `adjusted` gives them. Greedy decoding has one id of probability 1."""
    if how.greedy:
        return np.array([np.argmax(scores)], np.int64), np.ones(1)
    ids = _best(scores, how.top_k)
    logits = scores[ids].astype(np.float64) / how.temperature
    weights = np.exp(logits - logits[0])
    weights /= weights.sum()
    if how.top_p < 1:
        # An id stays as long as those before it do not reach top_p by themselves; the best one always stays.
        kept = max(1, int(np.count_nonzero(np.cumsum(weights) - weights < how.top_p)))
        ids, weights = ids[:kept], weights[:kept] / weights[:kept].sum()
    return ids, weights


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """Ids by falling score, the lowest first among equals: all that are possible, or those no worse than number
    `count`."""
    possible = np.flatnonzero(scores > -np.inf)
    if 0 < count < len(possible):
        limit = np.partition(scores[possible], -count)[-count]
        possible = possible[scores[possible] >= limit]
    return possible[np.argsort(-scores[possible], kind="stable")]


class Sampler:
    """Chooses the ids of one sequence, the `number`-th of a batch. plain: the best id is taken and nothing bans or
    penalises any, so that of a row's scores only the largest matter. random: the stream that ids are drawn from."""

    def __init__(self, how: Sampling, number: int = 0) -> None:
        self.how = how
        self.plain = how.greedy and replace(how, seed=0, top_k=0, top_p=1.0) == Sampling()
        self.random = np.random.Generator(np.random.PCG64([how.seed, number]))

    def best(self, largest: Largest, row: int) -> int:
        """The next id where decoding is `plain`. Raises ElisionError as `choose` does."""
        if not math.isfinite(largest.values[row, 0]):
            raise ElisionError(_BROKEN)
        return int(largest.ids[row, 0])

    def choose(self, scores: np.ndarray, history: Sequence[int], new: int, *, last: bool = False) -> int:
        """The next id. Raises ElisionError for scores that are no numbers, which broken weights give."""
        scores, best = self._adjusted(scores, history, new, last)
        if self.how.greedy:
            return best
        ids, weights = distribution(scores, self.how)
        place = int(np.searchsorted(np.cumsum(weights), self.random.random(), side="right"))
        return int(ids[min(place, len(ids) - 1)])

    def dense(
        self, scores: np.ndarray, history: Sequence[int], new: int, *, last: bool = False
    ) -> np.ndarray:
        """The distribution that `choose` draws from, float64 [V]."""
        scores, _ = self._adjusted(scores, history, new, last)
        ids, weights = distribution(scores, self.how)
        p = np.zeros(len(scores))
        p[ids] = weights
        return p

    def _adjusted(
        self, scores: np.ndarray, history: Sequence[int], new: int, last: bool
    ) -> tuple[np.ndarray, int]:
        scores = adjusted(scores, history, new, self.how, last=last)
        best = int(np.argmax(scores))  # the position of the first NaN, where there is one
        if not np.isfinite(scores[best]):
            raise ElisionError(_BROKEN)
        return scores, best


_BROKEN = "the model's scores are not finite: its weights are damaged, or nothing may be chosen"
