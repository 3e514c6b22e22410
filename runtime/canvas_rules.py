"""Which masks of a canvas a step decides, and on what tokens: rules that combine with every policy.

A schedule says how many (`Pace`), a rule which ones, a draw which token each would become. At temperature 0 and without
guidance the few largest logits of each row are all that is needed, so that a vocabulary is never looked at here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..passes.errors import ElisionError
from ..passes.options import nearest
from .canvas_plan import Canvas
from .canvas_policies import section_of
from .canvas_step import Scored
from .lm_step import largest_of

CONFIDENCE, ENTROPY, MARGIN, RANDOM, THRESHOLD, LEFT = RULES = (
    "confidence",
    "entropy",
    "margin",
    "random",
    "threshold",
    "left",
)
EVEN, EQUAL, LINEAR = SCHEDULES = ("even", "equal", "linear")
FREE, HOLD, LAST = EOS_RULES = ("free", "hold", "last")
SOFTMAX, GUMBEL = NOISES = ("softmax", "gumbel")

ROUND = 1 << 22
"""Logits that are looked at in one go where all are needed."""


@dataclass(frozen=True)
class Rule:
    """by: the masks that are decided first are those with the highest "confidence" (probability of the token chosen;
    low-confidence remasking of LLaDA), the lowest "entropy" or the largest "margin" (between the two most probable
    tokens; both Dream's), a "random" choice, the "left" ones; or, by "threshold", all whose token has a probability
    above `threshold`, at least one (Fast-dLLM).

    schedule: see `Pace`. position_temperature: above 0, positions are drawn, in proportion to
    exp(what is ranked / position_temperature), without replacement (Dream's alg_temp).

    eos: "hold": a mask does not become an end of text while masks stand before it. "last": masks that would become one
    are decided after all other candidates. "free": neither. Probabilities are those of the whole vocabulary."""

    by: str = CONFIDENCE
    schedule: str = EVEN
    threshold: float = 0.9
    position_temperature: float = 0.0
    eos: str = FREE
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        """Raises ElisionError for a value that means nothing."""
        _known("rule", self.by, RULES)
        _known("schedule", self.schedule, SCHEDULES)
        _known("rule for the end of text", self.eos, EOS_RULES)
        if not 0 <= self.threshold <= 1:
            raise ElisionError(f"a threshold is between 0 and 1, not {self.threshold}")
        if not (math.isfinite(self.position_temperature) and self.position_temperature >= 0):
            raise ElisionError(f"a temperature of positions is 0 or more, not {self.position_temperature}")
        if not 0 < self.epsilon < 1:
            raise ElisionError(f"the schedule's epsilon lies between 0 and 1, not {self.epsilon}")


def _known(what: str, value: str, names: Sequence[str]) -> None:
    if value not in names:
        raise ElisionError(f"unknown {what} {value!r}{nearest(value, names)}")


@dataclass(frozen=True)
class Draw:
    """How a row's token is chosen. temperature 0: the most probable one, the lowest id of equals. Above 0: noise
    "softmax" draws from the softmax of logits / temperature (Dream), and confidences are those of that distribution;
    "gumbel" adds noise to the logits, and confidences are those without noise or temperature (LLaDA). top_p, then
    top_k, leave the most probable ids, at temperatures above 0."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    noise: str = SOFTMAX

    def __post_init__(self) -> None:
        """Raises ElisionError for a value that means nothing."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ElisionError(f"temperature is 0 or more, not {self.temperature}")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ElisionError("top-k is 0 or more, and top-p above 0 and at most 1")
        _known("noise", self.noise, NOISES)


class Pace:
    """How many masks each step decides, so that a canvas is done in `steps` steps.

    Steps are divided among the sections of a policy, as evenly as whole numbers allow, the longer shares first; each
    has one at least. With m masks now, M at the section's begin, at step i of S: "even": m / (S - i), rounded up: no
    step is without a decision, and masks that a window held back are caught up with. "equal": M / S, the remainder one
    by one to the first steps (LLaDA). "linear": floor(m (1 - t[i+1] / t[i])), t from 1 to epsilon in S equal parts, and
    the rest at the last step (Dream). After the S-th step, all that may be decided is."""

    def __init__(self, canvas: Canvas, sections: list[tuple[int, int]], rule: Rule, steps: int) -> None:
        share, more = divmod(steps, len(sections))
        self.canvas, self.rule, self.sections = canvas, rule, sections
        self.shares = {low: max(1, share + (n < more)) for n, (low, _) in enumerate(sections)}
        self.low, self.step, self.first = -1, 0, 0

    def wanted(self) -> int:
        """Of the step that is now made; to be asked once for each. At least one mask is left."""
        masks = self.canvas.masks
        low, high = section_of(self.sections, int(masks[0]))
        left = int(np.searchsorted(masks, high))
        if low != self.low:
            self.low, self.step, self.first = low, 0, left
        steps, now = self.shares[low], self.step
        self.step += 1
        if self.rule.by == THRESHOLD:
            return 1
        if now >= steps:
            return left
        if self.rule.schedule == EVEN:
            return -(-left // (steps - now))
        if self.rule.schedule == EQUAL:
            return self.first // steps + (now < self.first % steps)
        if now == steps - 1:
            return left
        times = np.linspace(1, self.rule.epsilon, steps + 1)[now : now + 2]
        return int(left * (1 - times[1] / times[0]))


@dataclass(frozen=True)
class Choices:
    """Of C candidates: the token each would become, int64; its probability, float64; what is ranked, float64, the
    highest first."""

    tokens: np.ndarray
    probability: np.ndarray
    rank: np.ndarray


class Chooser:
    """From scores to decisions. mask_id is never chosen; ends: the ids that end a text."""

    def __init__(self, rule: Rule, draw: Draw, mask_id: int, ends: Sequence[int] = ()) -> None:
        self.rule, self.draw, self.mask_id = rule, draw, mask_id
        self.ends = np.unique(np.asarray(ends, np.int64))
        self.banned = 1 + (len(self.ends) if rule.eos == HOLD else 0)
        self.needed = self.banned + (2 if rule.by == MARGIN else 1)

    def whole(self, largest_k: int) -> bool:
        """Whether all logits are needed of a model that gives the `largest_k` largest."""
        return self.draw.temperature > 0 or self.needed > largest_k

    def choose(self, scored: Scored, held: np.ndarray, random: np.random.Generator) -> Choices:
        """scored: one row for each candidate [C]. held: bool [C], the candidates with masks before them. Raises
        ElisionError for scores that are no numbers."""
        if not np.isfinite(scored.log_sum).all():
            raise ElisionError("the model's scores are not finite: its weights are damaged")
        if self.draw.temperature > 0:
            tokens, probability, second, entropy = self._drawn(scored, held, random)
        else:
            if scored.ids.shape[1] < self.needed and scored.logits is not None:
                found = largest_of(scored.logits, self.needed)
                scored = Scored(found.ids, found.values, scored.log_sum, scored.entropy)
            tokens, probability, second = self._best(scored, held)
            entropy = scored.entropy
        by = self.rule.by
        if by == ENTROPY:
            rank = -np.asarray(entropy, np.float64)
        elif by == MARGIN:
            rank = probability - second
        elif by == RANDOM:
            rank = random.random(len(tokens))
        elif by == LEFT:
            rank = -np.arange(len(tokens), dtype=np.float64)
        else:
            rank = probability.copy()
        if self.rule.eos == LAST:
            rank[np.isin(tokens, self.ends)] = -np.inf
        return Choices(tokens, probability, rank)

    def pick(self, choices: Choices, count: int, random: np.random.Generator) -> np.ndarray:
        """int64: numbers of the candidates that are decided, the first ranked first, the leftmost of equals. count:
        how many, at most; the threshold rule takes its own number, but no fewer."""
        rank = choices.rank
        if self.rule.by == THRESHOLD:
            count = max(count, int(np.count_nonzero(rank > self.rule.threshold)))
        if self.rule.position_temperature > 0:
            # The largest of rank / T + Gumbel noise are draws without replacement from softmax(rank / T).
            rank = rank / self.rule.position_temperature - np.log(-np.log(_uniform(random, len(rank))))
        return np.argsort(-rank, kind="stable")[:count]

    def _best(self, scored: Scored, held: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens, their probabilities, those of the next best)."""
        banned = self._is_banned(scored.ids, held)
        rows, log_sum = np.arange(len(banned)), scored.log_sum.astype(np.float64)
        first = np.argmin(banned, 1)
        tokens = scored.ids[rows, first]
        probability = np.exp(scored.values[rows, first] - log_sum)
        second = probability
        if self.rule.by == MARGIN:
            banned[rows, first] = True
            second = np.exp(scored.values[rows, np.argmin(banned, 1)] - log_sum)
        return tokens, probability, second

    def _is_banned(self, ids: np.ndarray, held: np.ndarray) -> np.ndarray:
        """bool, of ids [C, k]."""
        banned = ids == self.mask_id
        if self.rule.eos == HOLD and len(self.ends):
            banned |= np.isin(ids, self.ends) & held[:, None]
        return banned

    def _drawn(
        self, scored: Scored, held: np.ndarray, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(tokens, their probabilities, these less the margins, entropies)."""
        logits = scored.logits
        assert logits is not None
        size = max(1, ROUND // max(1, logits.shape[1]))
        parts = [
            self._drawn_part(logits[n : n + size], scored.log_sum[n : n + size], held[n : n + size], random)
            for n in range(0, len(logits), size)
        ]
        if not parts:
            return np.zeros(0, np.int64), np.zeros(0), np.zeros(0), np.zeros(0)
        tokens, probability, second, entropy = (np.concatenate(items) for items in zip(*parts))
        return tokens, probability, second, scored.entropy if self.draw.noise == GUMBEL else entropy

    def _drawn_part(
        self, logits: np.ndarray, log_sum: np.ndarray, held: np.ndarray, random: np.random.Generator
    ) -> tuple[np.ndarray, ...]:
        count, draw, rows = len(logits), self.draw, np.arange(len(logits))
        scores = logits.astype(np.float64)
        scores[:, self.mask_id] = -np.inf
        if self.rule.eos == HOLD and len(self.ends):
            scores[np.ix_(held, self.ends)] = -np.inf
        if draw.noise == GUMBEL:
            noisy = _filtered(scores / draw.temperature, draw)
            noisy -= np.log(-np.log(_uniform(random, noisy.shape)))
            tokens = noisy.argmax(1)
            weights = np.exp(scores - log_sum[:, None].astype(np.float64))
        else:
            weights = _softmax(_filtered(scores / draw.temperature, draw))
            sums = np.cumsum(weights, 1)
            aims = random.random(count)[:, None] * sums[:, -1:]
            tokens = np.minimum((sums <= aims).sum(1), logits.shape[1] - 1)
            lost = weights[rows, tokens] == 0  # an aim that was rounded up to the very end
            tokens[lost] = weights[lost].argmax(1)
        probability = weights[rows, tokens]
        entropy = -(weights * np.log(np.maximum(weights, 1e-300))).sum(1)
        if self.rule.by != MARGIN:
            return tokens, probability, probability, entropy
        top = np.partition(weights, -2, 1)[:, -2:]
        return tokens, probability, probability - (top[:, 1] - top[:, 0]), entropy


def _uniform(random: np.random.Generator, shape: int | tuple[int, ...]) -> np.ndarray:
    """Uniform numbers, never 0."""
    return np.maximum(random.random(shape), 1e-300)


def _softmax(scores: np.ndarray) -> np.ndarray:
    """float64 [C, V] -> float64 [C, V]."""
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def _filtered(scores: np.ndarray, draw: Draw) -> np.ndarray:
    """scores float64 [C, V], with -inf for what top-p and then top-k leave out. The most probable always stays."""
    if draw.top_p < 1:
        order = np.argsort(-scores, 1, kind="stable")
        weights = _softmax(np.take_along_axis(scores, order, 1))
        out = np.cumsum(weights, 1) - weights >= draw.top_p
        out[:, 0] = False
        dropped = np.zeros_like(out)
        np.put_along_axis(dropped, order, out, 1)
        scores = np.where(dropped, -np.inf, scores)
    if 0 < draw.top_k < scores.shape[1]:
        limit = np.partition(scores, -draw.top_k, 1)[:, -draw.top_k, None]
        scores = np.where(scores < limit, -np.inf, scores)
    return scores


def scored_of(logits: np.ndarray, k: int) -> Scored:
    """What is known of rows of which all logits float32 [R, V] are given; some may be -inf."""
    found = largest_of(logits, k)
    log_sum, entropy = np.empty(len(logits), np.float32), np.empty(len(logits), np.float32)
    for row, scores in enumerate(logits):
        scores = scores.astype(np.float64)
        best = scores.max()
        weights = np.exp(scores - best)
        total = weights.sum()
        log_sum[row] = best + np.log(total)
        finite = np.where(weights > 0, scores, best)
        entropy[row] = best + np.log(total) - (weights * finite).sum() / total
    return Scored(found.ids, found.values, log_sum, entropy, logits)
