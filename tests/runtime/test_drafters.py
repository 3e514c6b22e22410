"""Drafters that look up what was there before: n-grams of any length, recycled tokens, and several together."""

from __future__ import annotations

import numpy as np
import pytest
from elision.runtime import drafter_ngram, drafter_recycling
from elision.runtime.draft_tree import Proposal, from_paths
from elision.runtime.drafter_ngram import Automaton, Ngram
from elision.runtime.drafter_recycling import Recycling
from elision.runtime.drafters import Guess, Union, Verified
from hypothesis import example, given, settings
from hypothesis import strategies as st

from .draft_double import Drawing, Scripted

texts = st.lists(st.integers(0, 2), min_size=1, max_size=40)


def longest(text, known):
    """(length, ends) of the longest end of `text` that occurs in `known`; ends: after which ids it does."""
    for length in range(min(len(text), len(known)), 0, -1):
        end = text[len(text) - length :]
        ends = [at for at in range(length, len(known) + 1) if known[at - length : at] == end]
        if ends:
            return length, ends
    return 0, []


def fed(text):
    automaton = Automaton()
    for token in text:
        automaton.feed(token)
    return automaton


def observed(new, tree=None, best=None):
    tree = tree or from_paths(0, [])
    best = np.zeros((len(tree), 4), np.int64) if best is None else np.asarray(best)
    return Verified(tree, best, list(range(len(new))), new)


# ---- the automaton -----------------------------------------------------------------------------------
@given(texts, texts)
def test_the_automaton_finds_what_a_search_finds(known, text):
    automaton, place = fed(known), (0, 0)
    assert automaton.size == len(known)
    for count, token in enumerate(text, 1):
        place = automaton.step(place, token)
        length, ends = longest(text[:count], known)
        assert place[1] == length
        if length:
            assert automaton.end[place[0]] in ends
            assert set(automaton.moves[place[0]]) == {known[end] for end in ends if end < len(known)}
        else:
            assert place[0] == 0


@given(st.lists(st.integers(0, 2), min_size=1, max_size=16), texts)
def test_the_latest_occurrence_is_known_while_few_are_told(known, text):
    """No piece of so short a text is further from the longest than those that are told of each token."""
    assert len(known) <= drafter_ngram._NEWER
    automaton, place = fed(known), (0, 0)
    for count, token in enumerate(text, 1):
        place = automaton.step(place, token)
        length, ends = longest(text[:count], known)
        if length:
            assert automaton.end[place[0]] == max(ends)


@given(texts, texts, texts, texts)
@example([0, 1, 2], [2], [3, 1, 2, 0], [0])
def test_a_place_stays_good_while_the_automaton_learns(known, text, more, new):
    """Another sequence may end, and be remembered, while this one is under way: places are never too long then, and
    all that they lead to was there."""
    automaton, place = fed(known), (0, 0)
    for token in text:
        place = automaton.step(place, token)
    for token in more:
        automaton.feed(token)
    whole = known + more
    for count in range(len(new) + 1):
        after = text + new[:count]
        length, _ = longest(after, whole)
        assert place[1] <= length
        piece = after[len(after) - place[1] :]
        ends = [at for at in range(place[1], len(whole) + 1) if whole[at - place[1] : at] == piece]
        if place[1]:
            assert automaton.end[place[0]] in ends
            assert set(automaton.moves[place[0]]) <= {whole[end] for end in ends if end < len(whole)}
        if count < len(new):
            place = automaton.step(place, new[count])


# ---- n-grams -----------------------------------------------------------------------------------------
@given(texts, st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=6), st.data())
@settings(max_examples=60)
def test_ngrams_are_what_followed_the_longest_earlier_occurrence(prompt, rounds, data):
    draft, text = Ngram().begin(prompt, 99), list(prompt)
    for new in [[], *rounds]:
        if new:
            draft.observe(observed(new))
            text += new
        known, state, guessed = text[:-1], draft.root(), []
        for _ in range(4):
            (guesses,) = draft.expand([state])
            length, ends = longest(text + guessed, known)
            # The text itself goes on after an occurrence at its end.
            followers = {text[end] for end in ends}
            tokens = [guess.token for guess in guesses]
            assert len(set(tokens)) == len(tokens) <= drafter_ngram.MOST
            assert set(tokens) <= followers and bool(tokens) == bool(followers)
            if len(text) <= drafter_ngram._NEWER and tokens:
                assert tokens[0] == text[max(ends)]
                assert set(tokens) == followers
            assert all(guess.key[1] == min(length, 8) and guess.origin == "ngram" for guess in guesses)
            if not tokens:
                break
            assert guesses[0].prior == max(guess.prior for guess in guesses)
            guessed.append(data.draw(st.sampled_from(tokens)))
            state = draft.step(state, guessed[-1])


def test_longer_matches_are_trusted_more():
    draft = Ngram().begin([1, 2, 3, 4, 5, 6, 9, 1, 2, 3], 9)
    (found,) = draft.expand([draft.root()])
    assert [guess.token for guess in found] == [4]
    (weaker,) = Ngram().begin([3, 4, 9, 3], 9).expand([Ngram().begin([3, 4, 9, 3], 9).root()])
    assert [guess.token for guess in weaker] == [4] and weaker[0].prior < found[0].prior
    (two,) = (draft := Ngram().begin([3, 4, 3, 5, 3], 9)).expand([draft.root()])
    assert [guess.token for guess in two] == [5, 4]  # the latest first
    assert two[0].prior < weaker[0].prior and two[0].key != weaker[0].key
    draft = Ngram().begin([1, 2, 3], 9)
    assert draft.expand([draft.root()]) == [[]]


@pytest.mark.parametrize("remember", [True, False])
def test_texts_are_remembered_where_they_are_to_be(remember):
    drafter = Ngram(remember=remember)
    first = drafter.begin([1, 2, 3], 9)
    first.observe(observed([4, 5]))
    first.close()
    draft = drafter.begin([8, 2, 3], 9)
    (found,) = draft.expand([draft.root()])
    assert [guess.token for guess in found] == ([4] if remember else [])
    (found,) = draft.expand([draft.step(draft.step(draft.root(), 4), 5)])
    assert found == []  # no text goes on in the next one
    draft.observe(observed([7, 2, 3]))
    (found,) = draft.expand([draft.root()])
    assert found[0].token == 7  # its own text goes first where it matches as far


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(drafter_ngram, "REMEMBERED", 50)
    drafter = Ngram(remember=True)
    running = drafter.begin([0, 1, 2], 9)
    for length in (20, 25, 49, 50, 60, 200, 7):
        draft = drafter.begin([number % 7 for number in range(length)], 9)
        draft.close()
        assert drafter.earlier.size == len(drafter.text) <= 50
        assert drafter.text[-8:] == [*[number % 7 for number in range(length - 7, length)], -1]
        (found,) = running.expand([running.root()])
        assert all(guess.token in range(7) for guess in found)
        running.observe(observed([3]))


# ---- recycling ---------------------------------------------------------------------------------------
def test_recycled_tokens():
    drafter = Recycling()
    draft = drafter.begin([5, 6, 7], 99)
    assert draft.expand([draft.root()]) == [[]]
    tree = from_paths(7, [[8, 9], [4]])  # 4 is rejected, and still tells something
    best = [[8, 4, 1, 0, 2], [9, 3, 1, 0, 2], [10, 3, 1, 0, 2], [11, 12, 1, 0, 2]]
    draft.observe(Verified(tree, np.array(best), [0, 1, 2], [8, 9, 10]))

    def guesses(*ids):
        other = drafter.begin(ids, 9)
        (found,) = other.expand([other.root()])
        return found

    for ids, tokens in (
        ((6, 7), [8, 4, 1, 0]),  # the root with the token before it
        ((7, 8), [9, 3, 1, 0]),
        ((8, 9), [10, 3, 1, 0]),
        ((7, 4), [11, 12, 1, 0]),
    ):
        pair, single, other = guesses(*ids), guesses(ids[1]), guesses(0, ids[1])
        assert [g.token for g in pair] == [g.token for g in single] == [g.token for g in other] == tokens
        assert pair[0].prior > single[0].prior and pair[0].key != single[0].key == other[0].key
        assert [g.prior for g in pair] == sorted((g.prior for g in pair), reverse=True)
    (found,) = draft.expand([draft.root()])
    assert found == []  # nothing came after 10 yet
    (found,) = draft.expand([draft.step(draft.root(), 7)])
    assert [g.token for g in found] == [8, 4, 1, 0]
    draft.observe(Verified(from_paths(10, []), np.array([[1, 2, 3, 4, 5]]), [0], [7]))
    assert [g.token for g in guesses(9, 10)] == [1, 2, 3, 4]
    (found,) = draft.expand([draft.root()])
    assert found[0].key[1] == 1  # of 10 with 7 after it nothing is known
    assert len({g.token for g in found}) == len(found) == drafter_recycling.WIDTH


def test_the_pair_says_more_than_the_token():
    drafter = Recycling()
    drafter.learn(1, 5, [10])
    drafter.learn(2, 5, [20])
    assert drafter.best(1, 5) == (2, [10]) and drafter.best(2, 5) == (2, [20])
    assert drafter.best(3, 5) == drafter.best(None, 5) == (1, [20])
    assert drafter.best(3, 6) == (0, [])


def test_old_pairs_give_way(monkeypatch):
    monkeypatch.setattr(drafter_recycling, "PAIRS", 3)
    drafter = Recycling()
    draft = drafter.begin([0, 1], 99)
    for token in (2, 3, 4):
        draft.observe(Verified(from_paths(token - 1, []), np.array([[token, 9]]), [0], [token]))
    assert drafter.best(0, 1) == (2, [2, 9])
    other = drafter.begin([0, 1], 99)
    other.observe(Verified(from_paths(1, []), np.array([[7, 9]]), [0], [7]))  # young again
    draft.observe(Verified(from_paths(4, [[8]]), np.array([[8, 9], [1, 9]]), [0, 1], [8, 1]))
    assert len(drafter._after_pair) == 3
    assert [drafter.best(*pair)[0] for pair in ((0, 1), (3, 4), (4, 8))] == [2, 2, 2]
    assert [drafter.best(*pair)[0] for pair in ((1, 2), (2, 3))] == [1, 1]


# ---- several together --------------------------------------------------------------------------------
guesses = st.lists(st.integers(0, 5), max_size=4, unique=True)


@given(st.lists(guesses, min_size=1, max_size=3), st.booleans())
def test_together_no_token_comes_twice(lists, first_only):
    parts = [Scripted(lambda ids, found=found: found) for found in lists]
    for number, part in enumerate(parts):
        part.name = f"part {number}"
    both = Union(parts, first_only=first_only)
    draft = both.begin([1], 9)
    expanded = draft.expand([draft.root(), draft.step(draft.root(), 2)])
    tokens = [guess.token for guess in expanded[0]]
    expected = list(dict.fromkeys(token for found in lists for token in found))
    if first_only:
        expected = next((found for found in lists if found), [])
    assert tokens == expected and [guess.token for guess in expanded[1]] == expected
    for guess in expanded[0]:
        first = next(number for number, found in enumerate(lists) if guess.token in found)
        assert guess.origin == f"part {first}"
    keys = [guess.key for guess in expanded[0]]
    assert len({(guess.key, guess.origin) for guess in expanded[0]}) == len(keys)
    if first_only:
        asked = next((number for number, found in enumerate(lists) if found), len(lists) - 1)
        assert [part.expanded for part in parts] == [int(number <= asked) for number in range(len(parts))]
    draft.observe(observed([2], from_paths(1, [])))
    draft.close()
    assert [part.open for part in parts] == [0] * len(parts) and all(len(part.seen) == 1 for part in parts)


def test_a_later_drafter_is_asked_where_the_first_has_nothing():
    first = Scripted(lambda ids: [3] if ids[-1] == 1 else [])
    second = Scripted(lambda ids: [ids[-1], 4])
    draft = Union([first, second], first_only=True).begin([1], 9)
    found = draft.expand([(ids, ids) for ids in ((1,), (2,), (5,))])
    assert [[guess.token for guess in one] for one in found] == [[3], [2, 4], [5, 4]]


def test_behind_others_a_guess_is_counted_apart():
    same = [Scripted(lambda ids: [1]), Scripted(lambda ids: [1, 2])]
    draft = Union(same).begin([0], 9)
    (found,) = draft.expand([draft.root()])
    assert found == [
        Guess(1, ("scripted", 0), 0.8, "scripted"),
        Guess(2, (("scripted", 1), 1), 0.4, "scripted"),
    ]


def test_what_a_union_is():
    cheap, dear = Scripted(lambda ids: []), Scripted(lambda ids: [], costly=True, seconds=0.5)
    assert not Union([cheap, cheap]).costly
    both = Union([cheap, dear], first_only=True)
    assert both.costly and both.seconds() == 0.5 and both.name == "scripted|scripted"
    assert Union([Ngram(), Recycling()]).name == "ngram+recycling"
    for kind in (Proposal.INDEPENDENT, Proposal.WITHOUT_REPLACEMENT):
        with pytest.raises(ValueError, match="at random"):
            Union([cheap, Drawing(lambda ids: np.ones(3), kind)])
