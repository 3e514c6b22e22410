"""A smaller model as drafter, and a whole speculative engine as the drafter of a larger one.

Both run a step graph of their own with a cache of their own, which follows the committed text: what was guessed and
accepted is in it already, what was not is overwritten.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from .acceptance import Acceptance
from .draft_tree import Proposal
from .drafters import Draft, Drafter, Guess, Verified
from .lm_step import CHUNK, Slots, StepModel, chain, prompt_chunks, tree_rows
from .tree_policy import Marginal, Room
from .verify import walk
from .verify_costs import VerifyCosts

SPARE = 64
"""Slots for guesses besides those of the text."""

_BUCKETS = 10


class DraftModel:
    """A step graph that drafters share: its slots, and what a call takes."""

    def __init__(self, model: StepModel, vocabulary: int) -> None:
        """vocabulary: ids of the target; those that only the draft model knows are never guessed."""
        self.model, self.vocabulary = model, vocabulary
        self.slots = Slots(model.capacity)
        self._seconds = 0.0

    def seconds(self) -> float:
        return self._seconds

    def timed(self, begun: float) -> None:
        spent = time.perf_counter() - begun
        self._seconds = spent if self._seconds == 0 else 0.9 * self._seconds + 0.1 * spent


class _Followed:
    """The cache of one sequence. ids: the committed text. fed: how many of its tokens the cache holds."""

    def __init__(self, shared: DraftModel, ids: Sequence[int], room: int) -> None:
        self.shared, self.ids, self.fed = shared, list(ids), 0
        self.start, self.held = -1, 0
        for wanted in (len(ids) + room + SPARE, len(ids) + SPARE):
            start = shared.slots.take(wanted)
            if start is not None:
                self.start, self.held = start, wanted
                break
        known = self.ids[:-1]
        if self.start >= 0 and known and max(known) < shared.model.vocabulary:
            for rows in prompt_chunks(self.start, known, CHUNK):
                shared.model.largest(rows, [len(rows) - 1])
            self.fed = len(known)

    def has_room(self, more: int) -> bool:
        """Whether all that is pending and `more` rows have slots, and no id is unknown to the model."""
        if self.start < 0 or len(self.ids) + more > self.held:
            return False
        return max(self.ids[self.fed :], default=0) < self.shared.model.vocabulary

    def close(self) -> None:
        if self.start >= 0:
            self.shared.slots.give_back(self.start)
            self.start = -1


# ---- a model -------------------------------------------------------------------------------------------
class ModelDrafter:
    """kind: DETERMINISTIC guesses the best ids; the others draw from the model's distribution at `temperature`."""

    costly = True

    def __init__(
        self, shared: DraftModel, kind: Proposal = Proposal.DETERMINISTIC, temperature: float = 1.0,
        name: str = "model", width: int = 4,
    ) -> None:  # fmt: skip
        self.shared, self.kind, self.temperature, self.name, self.width = (
            shared,
            kind,
            temperature,
            name,
            width,
        )

    def begin(self, ids: Sequence[int], room: int) -> Draft:
        return _ModelDraft(self, _Followed(self.shared, ids, room))

    def seconds(self) -> float:
        return self.shared.seconds()


class _ModelDraft:
    """A state: the number of a node in this round's own tree, of which node 0 is the last committed token."""

    def __init__(self, drafter: ModelDrafter, cache: _Followed) -> None:
        self._drafter, self._cache = drafter, cache
        self._clear()

    def _clear(self) -> None:
        self._tokens, self._above, self._places = [-1], [-1], [-1]
        self._below: dict[tuple[int, int], int] = {}
        self._used = 0  # slots that hold guesses
        self._scores: dict[int, Any] = {}

    def root(self) -> int:
        self._clear()
        return 0

    def step(self, state: int, token: int) -> int:
        node = self._below.get((state, token))
        if node is None:
            node = self._below[(state, token)] = len(self._tokens)
            self._tokens.append(token)
            self._above.append(state)
            self._places.append(-1)
        return node

    def expand(self, states: Sequence[int]) -> list[list[Guess]]:
        drafter = self._drafter
        found = self._compute(states, whole=False)
        if found is None:
            return [[] for _ in states]
        guesses = []
        for values, ids in found:
            chances = np.exp(values - values[0])
            chances /= chances.sum()
            guesses.append(
                [
                    Guess(int(token), (drafter.name, min(rank, 3), int(_BUCKETS * p)), float(p), drafter.name)
                    for rank, (token, p) in enumerate(zip(ids[: drafter.width], chances))
                    if token < drafter.shared.vocabulary
                ]
            )
        return guesses

    def distribution(self, states: Sequence[int]) -> list[np.ndarray]:
        """What guesses are drawn from, float64 [V] for each state: all 0 where the model has no room left."""
        vocabulary = self._drafter.shared.vocabulary
        found = self._compute(states, whole=True)
        if found is None:
            return [np.zeros(vocabulary) for _ in states]
        result = []
        for scores in found:
            scores = scores[:vocabulary].astype(np.float64) / max(self._drafter.temperature, 1e-5)
            p = np.exp(scores - scores.max())
            result.append(np.pad(p / p.sum(), (0, vocabulary - len(p))))
        return result

    def _compute(self, states: Sequence[int], *, whole: bool) -> list[Any] | None:
        """The scores after each state, in one call for those that are new: all, or (values, ids) of the largest."""
        new = [state for state in dict.fromkeys(states) if state not in self._scores]
        if new:
            cache, model = self._cache, self._drafter.shared.model
            if not cache.has_room(self._used + len(new)) or any(
                self._tokens[node] >= model.vocabulary for node in new
            ):
                return None
            begun = time.perf_counter()
            if new[0] == 0:
                pending = cache.ids[cache.fed :]
                rows, keep = chain(cache.start, cache.fed, pending), [len(pending) - 1]
                cache.fed += len(pending)
                new = [0]
            else:
                rows, keep = self._rows(new), None
            answer = model.step(rows, keep) if whole else model.largest(rows, keep)
            for place, node in enumerate(new):
                if whole:
                    self._scores[node] = answer[place].copy()  # type: ignore[index]
                else:
                    self._scores[node] = (answer.values[place].copy(), answer.ids[place].copy())  # type: ignore[union-attr]
            self._drafter.shared.timed(begun)
        if any(state not in self._scores for state in states):
            return None
        return [self._scores[state] for state in states]

    def _rows(self, nodes: Sequence[int]) -> Any:
        """Rows for nodes below the root, all of whose ancestors are in the cache."""
        cache = self._cache
        paths = []
        for node in nodes:
            self._places[node] = cache.start + cache.fed + self._used
            self._used += 1
            path, above = [self._places[node]], self._above[node]
            while above > 0:
                path.append(self._places[above])
                above = self._above[above]
            paths.append(path[::-1])
        longest = max(map(len, paths))
        rows = tree_rows(
            cache.start, cache.fed, [self._tokens[n] for n in nodes], [-1] * len(nodes), [0] * len(nodes)
        )
        ancestors = np.array([path + [-1] * (longest - len(path)) for path in paths], np.int32)
        positions = np.array([cache.fed + len(path) - 1 for path in paths], np.int64)
        slots = np.array([path[-1] for path in paths], np.int32)
        return type(rows)(rows.ids, positions, slots, rows.prefix, ancestors)

    def observe(self, seen: Verified) -> None:
        cache, node, kept = self._cache, 0, []
        asked = cache.fed == len(cache.ids)  # the root is in the cache only if its guesses were asked for
        for token in seen.new if asked else ():
            node = self._below.get((node, token), -1)
            if node < 0 or self._places[node] < 0:
                break
            kept.append(self._places[node])
        if kept:
            target = cache.start + cache.fed + np.arange(len(kept))
            if kept != target.tolist():
                cache.shared.model.move(np.asarray(kept), target)
            cache.fed += len(kept)
        cache.ids += seen.new
        cache.fed = min(cache.fed, len(cache.ids) - 1)  # the last is fed again, to be asked what follows
        self._clear()

    def close(self) -> None:
        self._cache.close()


# ---- an engine -----------------------------------------------------------------------------------------
class Hierarchical:
    """A speculative engine as drafter (SpecMQuant's hierarchy, Zhang et al. 2025): the middle model verifies trees of
    `inner`, and what it commits is a chain for the target, which so verifies few rows and likely ones."""

    kind = Proposal.DETERMINISTIC
    costly = True

    def __init__(
        self, shared: DraftModel, inner: Drafter, costs: VerifyCosts, name: str = "hierarchical"
    ) -> None:
        if inner.kind is not Proposal.DETERMINISTIC:
            raise ValueError("the inner drafter's guesses are tested greedily: it must not draw at random")
        self.shared, self.inner, self.costs, self.name = shared, inner, costs, name
        self.acceptance, self.policy = Acceptance(), Marginal()
        self.rate = 0.0  # seconds of a token of the chain

    def begin(self, ids: Sequence[int], room: int) -> Draft:
        return _HierarchicalDraft(self, _Followed(self.shared, ids, room), self.inner.begin(ids, room))

    def seconds(self) -> float:
        return self.rate or self.costs.curve(0, 1)[1]


class _Shifted:
    """A draft whose text is some guesses longer."""

    def __init__(self, draft: Draft, state: Any) -> None:
        self._draft, self._state = draft, state

    def root(self) -> Any:
        return self._state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._draft, name)


class _HierarchicalDraft:
    """A state: how many tokens of the chain were followed, None off the chain. `computed`: tokens of text and chain
    that the cache holds."""

    def __init__(self, drafter: Hierarchical, cache: _Followed, inner: Draft) -> None:
        self._drafter, self._cache, self._inner = drafter, cache, inner
        self._chain: list[int] = []
        self._computed = cache.fed

    def root(self) -> int | None:
        self._chain = []
        self._computed = min(self._computed, len(self._cache.ids) - 1)
        return 0

    def step(self, state: int | None, token: int) -> int | None:
        on = state is not None and state < len(self._chain) and self._chain[state] == token
        return state + 1 if on and state is not None else None

    def expand(self, states: Sequence[int | None]) -> list[list[Guess]]:
        return [[] if state is None else self._guess(state) for state in states]

    def _guess(self, state: int) -> list[Guess]:
        while len(self._chain) <= state:
            if not self._extend():
                return []
        name = self._drafter.name
        return [Guess(self._chain[state], (name, min(state, 7)), 0.8 if state < 4 else 0.7, name)]

    def _extend(self) -> bool:
        """One round of the middle model: at least one more token of the chain. False where there is no room."""
        drafter, cache, model = self._drafter, self._cache, self._drafter.shared.model
        text = [*cache.ids, *self._chain]
        pending = text[self._computed : -1]
        spare = cache.held - len(text) if cache.start >= 0 else 0
        if spare < 2 or max(text[self._computed :]) >= min(model.vocabulary, drafter.shared.vocabulary):
            return False
        begun = time.perf_counter()
        state = self._inner.root()
        for token in self._chain:
            state = self._inner.step(state, token)
        room = Room(min(spare, 32), 16, drafter.costs.curve(len(text), 33))
        inner: Any = _Shifted(self._inner, state)
        grown = drafter.policy.grow(drafter.inner, inner, text[-1], drafter.acceptance, room)
        count = len(pending)
        tokens = [*pending, *grown.tokens]
        parents = [*range(-1, count - 1), *(count - 1 if p < 0 else p + count for p in grown.parents)]
        depths = [*range(count), *(depth + count for depth in grown.depths)]
        rows = tree_rows(cache.start, self._computed, tokens, parents, depths)
        best = model.largest(rows, range(count, len(tokens))).ids[:, 0].tolist()
        path, new = walk(
            grown, lambda node, _tokens: best[node], lambda token: token < drafter.shared.vocabulary
        )
        base = cache.start + self._computed + count
        if path != list(range(len(path))):
            model.move(base + np.asarray(path), base + np.arange(len(path)))
        drafter.acceptance.verified(grown, path)
        self._computed += count + len(path)
        self._chain += [token for token in new if token < drafter.shared.vocabulary]
        spent = (time.perf_counter() - begun) / max(1, len(new))
        drafter.rate = spent if drafter.rate == 0 else 0.9 * drafter.rate + 0.1 * spent
        return bool(new)

    def observe(self, seen: Verified) -> None:
        self._inner.observe(seen)
        agreed = 0
        for token, guess in zip(seen.new, self._chain):
            if token != guess:
                break
            agreed += 1
        before = len(self._cache.ids)
        self._cache.ids += seen.new
        self._computed = min(self._computed, before + agreed, len(self._cache.ids) - 1)
        self._chain = []

    def close(self) -> None:
        self._inner.close()
        self._cache.close()
