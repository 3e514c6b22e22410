"""n-grams of any length: what followed the longest earlier occurrence of the text's end may follow it again.

A suffix automaton over prompt and output finds that occurrence, in constant time a token (Blumer et al. 1985; as a
drafter, SAM-Decoding, Hu et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

from .draft_tree import Proposal
from .drafters import Draft, Guess, Verified

MOST = 3
"""How many different continuations of one place are guessed."""

REMEMBERED = 1 << 16
"""Tokens of earlier texts that are kept, where any are."""

_NEWER = (
    16  # how many states are told of a newer occurrence: the longest matches, which are the ones looked up
)
_PRIORS = (0.0, 0.2, 0.4, 0.55, 0.65, 0.75, 0.8, 0.85, 0.9)


class Automaton:
    """Knows every piece of the text fed so far. State 0 is the empty piece; the pieces of a state end at the same
    places. `length`: of the longest of them; `link`: the state of its longest ending that occurs elsewhere too; `end`:
    where one of its occurrences ended, mostly the latest."""

    def __init__(self) -> None:
        self.size = 0
        self.moves: list[dict[int, int]] = [{}]
        self.end = [0]
        self._link, self._length = [-1], [0]
        self._last = 0

    def feed(self, token: int) -> None:
        moves, link, length, end = self.moves, self._link, self._length, self.end
        self.size += 1
        made, state = self._state({}, 0, length[self._last] + 1, self.size), self._last
        while state >= 0 and token not in moves[state]:
            moves[state][token] = made
            state = link[state]
        if state >= 0:
            there = moves[state][token]
            if length[there] == length[state] + 1:
                link[made] = there
            else:
                twin = self._state(dict(moves[there]), link[there], length[state] + 1, end[there])
                while state >= 0 and moves[state].get(token) == there:
                    moves[state][token] = twin
                    state = link[state]
                link[there] = link[made] = twin
        self._last = made
        state = link[made]
        for _ in range(_NEWER):
            if state <= 0:
                break
            end[state] = self.size
            state = link[state]

    def _state(self, moves: dict[int, int], link: int, length: int, end: int) -> int:
        self.moves.append(moves)
        self._link.append(link)
        self._length.append(length)
        self.end.append(end)
        return len(self.moves) - 1

    def step(self, place: tuple[int, int], token: int) -> tuple[int, int]:
        """(state, length) of the longest ending of a text that occurs here, after one more token of that text."""
        state, matched = place
        while state and token not in self.moves[state]:
            state = self._link[state]
            matched = min(matched, self._length[state])  # the place may be older than what was fed
        there = self.moves[state].get(token)
        return (0, 0) if there is None else (there, matched + 1)


class Ngram:
    """remember: whether what one sequence wrote may help another one."""

    name = "ngram"
    kind = Proposal.DETERMINISTIC
    costly = False

    def __init__(self, *, remember: bool = False) -> None:
        self._remember = remember
        self.earlier, self.text = Automaton(), []

    def begin(self, ids: Sequence[int], room: int) -> Draft:
        return NgramDraft(self, ids)

    def seconds(self) -> float:
        return 0.0

    def keep(self, text: Sequence[int]) -> None:
        if not self._remember:
            return
        text = text[-REMEMBERED + 1 :]
        if len(self.text) + len(text) >= REMEMBERED:
            self.earlier, self.text = Automaton(), []
        for token in (*text, -1):  # no text goes on in another one
            self.earlier.feed(token)
            self.text.append(token)


Places = tuple[tuple[int, int], tuple[int, int], int]


class NgramDraft:
    """A state: the place in this text, the place in earlier ones, depth.

    The automaton of this text is one token behind, so that the text's own end is no occurrence of itself."""

    def __init__(self, drafter: Ngram, ids: Sequence[int]) -> None:
        self._drafter, self._earlier, self._before = drafter, drafter.earlier, drafter.text
        self._own, self._text = Automaton(), []
        self._place = self._place_before = (0, 0)
        for token in ids:
            self._feed(token)

    def _feed(self, token: int) -> None:
        if self._text:
            self._own.feed(self._text[-1])
        self._text.append(token)
        self._place = self._own.step(self._place, token)
        self._place_before = self._earlier.step(self._place_before, token)

    def root(self) -> Places:
        return self._place, self._place_before, 1

    def step(self, state: Places, token: int) -> Places:
        own, before, depth = state
        return self._own.step(own, token), self._earlier.step(before, token), depth + 1

    def expand(self, states: Sequence[Places]) -> list[list[Guess]]:
        return [self._guesses(*state) for state in states]

    def _guesses(self, own: tuple[int, int], before: tuple[int, int], depth: int) -> list[Guess]:
        automaton, text, (state, matched) = self._own, self._text, own
        if before[1] > matched:
            automaton, text, (state, matched) = self._earlier, self._before, before
        if not matched:
            return []
        end = automaton.end[state]
        tokens = [text[end]] if end < len(text) else []
        for token in reversed(automaton.moves[state]):  # the latest to be found first
            if len(tokens) == MOST:
                break
            if token not in tokens:
                tokens.append(token)
        level, several = min(matched, len(_PRIORS) - 1), min(len(tokens), 2)
        first = _PRIORS[level] if several == 1 else 0.6 * _PRIORS[level]
        return [
            Guess(token, ("ngram", level, several, rank), first if rank == 0 else min(first, 0.15), "ngram")
            for rank, token in enumerate(tokens)
            if token >= 0
        ]

    def observe(self, seen: Verified) -> None:
        for token in seen.new:
            self._feed(token)

    def close(self) -> None:
        self._drafter.keep(self._text)
