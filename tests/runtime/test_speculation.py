"""Whatever is drafted, and however badly: texts are those of plain decoding, and the numbers reported add up."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from elision.passes.errors import ElisionError
from elision.runtime.drafter_ngram import Ngram
from elision.runtime.drafter_recycling import Recycling
from elision.runtime.drafters import Union
from elision.runtime.generate import Generator
from elision.runtime.lm_caches import Caches
from elision.runtime.lm_facts import Facts
from elision.runtime.tree_policy import Beam, DySpec, Fixed, Marginal
from hypothesis import given, settings
from hypothesis import strategies as st

from .draft_double import Hashing, Scripted, Wild, drafting, knows, oracle
from .lm_double import byte_tokenizer

V = 12
PROMPTS = [[1], [4, 4, 2], [7, 0, 7, 0, 7], [3, 9, 11, 5, 5, 5, 8, 1, 0]]
CHAIN = Fixed((1,) * 5)
NAMED = {
    "chain": lambda: CHAIN,
    "fixed": lambda: Fixed((3, 2, 1, 1)),
    "marginal": Marginal,
    "beam": Beam,
    "dyspec": DySpec,
    "wild": lambda: Wild(V),
}


def plain(prompts, count, model=None, facts=None, batch=8, **options):
    generator = Generator.around(model or Hashing(V), facts or Facts(V), batch=batch)
    return generator.generate(prompts, count, **options)


def said(results):
    return [(one.token_ids, one.text, one.finish) for one in results]


def drafted(
    prompts, count, drafter, policy=CHAIN, *, model=None, facts=None, batch=8, guard=False, **options
):
    """The results; all that drafts must leave behind is checked."""
    generator = Generator.around(
        model or Hashing(V),
        facts or Facts(V),
        batch=batch,
        speculation=drafting(drafter, policy, guard=guard),
    )
    results = generator.generate(prompts, count, trace=True, **options)
    for one in results:
        adds_up(one)
        room = generator.context + 1 - one.prompt_tokens
        no_deeper(one.trace, min(count, room))
    assert getattr(drafter, "open", 0) == 0
    return results


def no_deeper(trace, limit):
    """No node could only be written after the end."""
    written = 1
    for record in trace:
        depths = [0]
        for parent in record["parents"][1:]:
            depths.append(depths[parent] + 1)
        assert written + max(depths) < limit
        written += len(record["new"])


def adds_up(one):
    report, trace = one.speculation, one.trace
    later = max(0, len(one.token_ids) - 1)
    assert report["verifications"] == len(trace) and report["rows_verified"] == sum(
        len(r["tokens"]) for r in trace
    )
    if trace:
        assert report["tokens_per_verification"] == round(later / len(trace), 4)
    else:
        assert later == 0 and report["tokens_per_verification"] is None
    assert [token for record in trace for token in record["new"]] == one.token_ids[1:]
    accepted = 0
    for record in trace:
        path = record["accepted"]
        assert path[0] == 0 and [record["parents"][node] for node in path[1:]] == path[:-1]
        assert [record["tokens"][node] for node in path[1:]] == record["new"][:-1]
        # The token that ends a text counts for the drafter that had it.
        below = [n for n, parent in enumerate(record["parents"]) if parent == path[-1]]
        accepted += len(path) - 1 + (record["new"][-1] in [record["tokens"][n] for n in below])
    assert sum(report["accepted_from"].values()) == accepted


# ---- token for token -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options", [{}, {"repetition_penalty": 1.3}, {"ngram": 3}, {"repetition_penalty": 0.8}]
)
@pytest.mark.parametrize("policy", NAMED)
def test_greedy_texts(policy, options):
    expected = said(plain(PROMPTS, 30, eos=[], **options))
    model = Hashing(V)
    known = [[*prompt, *ids] for prompt, (ids, _, _) in zip(PROMPTS, expected)]
    for drafter in (
        oracle(model),
        oracle(model, right=0.7, width=3),
        Scripted(lambda ids: [model.best(ids)[1]]),
        knows(known, V),
        Scripted(lambda ids: []),
    ):
        found = drafted(PROMPTS, 30, drafter, NAMED[policy](), model=model, eos=[], **options)
        assert said(found) == expected


@pytest.mark.parametrize("policy", ["marginal", "fixed", "beam", "dyspec"])
@pytest.mark.parametrize(
    "drafter", [Ngram, Recycling, lambda: Ngram(remember=True), lambda: Union([Ngram(), Recycling()])]
)
def test_our_drafters(drafter, policy):
    drafter, policy = drafter(), NAMED[policy]()
    for options in ({}, {"repetition_penalty": 1.2}, {"temperature": 0.6, "seed": 3, "top_k": 5}):
        expected = said(plain(PROMPTS, 40, eos=[2], **options))
        for guard in (False, True):  # with the guard timing decides what is drafted, never what is said
            found = drafted(PROMPTS, 40, drafter, policy, batch=3, guard=guard, eos=[2], **options)
            assert said(found) == expected
    expected = plain(PROMPTS, 60, eos=[])
    found = drafted(PROMPTS, 60, drafter, policy, eos=[])
    assert said(found) == said(expected)
    assert max(one.speculation["tokens_per_verification"] for one in found) > 1.5


def test_an_oracle_is_always_right():
    model = Hashing(V, order=None)
    found = drafted([[5, 1]], 25, oracle(model), model=model, eos=[])[0]
    assert found.token_ids == plain([5, 1], 25, Hashing(V, order=None), eos=[]).token_ids
    assert found.speculation["verifications"] == 4 and found.speculation["rows_verified"] == 24
    assert found.speculation["accepted_from"] == {"scripted": 20}
    assert set(found.speculation["acceptance"]["by_depth"].values()) == {1.0}
    assert model.calls == [2, 6, 6, 6, 6] and model.moved == 0


def test_what_is_always_wrong_only_costs_time():
    model = Hashing(V)
    found = drafted([[5, 1]], 25, Scripted(lambda ids: [model.best(ids)[2]]), model=model, eos=[])[0]
    assert found.token_ids == plain([5, 1], 25, eos=[]).token_ids
    assert found.speculation["verifications"] == 24 and found.speculation["accepted_from"] == {}
    assert set(found.speculation["acceptance"]["by_depth"].values()) == {0.0}


def test_accepted_branches_are_moved_where_they_belong():
    """The right guess seems the unlikelier one, and lies behind the other's branch, until that has been learned."""
    model = Hashing(V, order=None)
    drafter = Scripted(lambda ids: [model.best(ids)[1], model.best(ids)[0]])
    found = drafted(PROMPTS, 25, drafter, Fixed((2, 2, 2)), model=model, eos=[])
    assert said(found) == said(plain(PROMPTS, 25, Hashing(V, order=None), eos=[]))
    assert 0 < model.moved < sum(call > 2 for call in model.calls) / 2
    wild = Hashing(V, order=None)
    found = drafted(PROMPTS, 25, oracle(wild, width=2), Wild(V, size=40), model=wild, eos=[])
    assert said(found) == said(plain(PROMPTS, 25, Hashing(V, order=None), eos=[]))
    assert wild.moved > 5


@given(st.integers(0, 2**32), st.integers(0, 40), st.sampled_from([1, 3, None]), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_trees_of_any_shape(seed, count, order, size):
    model = Hashing(V, order=order, seed=seed, capacity=120)
    expected = said(plain(PROMPTS, count, Hashing(V, order=order, seed=seed), eos=[3]))
    drafter = oracle(model, right=0.8, width=2)
    found = drafted(PROMPTS, count, drafter, Wild(V, seed, size), model=model, batch=2, eos=[3])
    assert said(found) == expected


# ---- ends ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("policy", [CHAIN, Fixed((2, 2, 1)), Wild(V)])
def test_any_number_of_new_tokens(policy):
    whole = plain(PROMPTS, 20, eos=[])
    for count in range(21):
        model = Hashing(V)
        found = drafted(PROMPTS, count, oracle(model, right=0.9), policy, model=model, eos=[])
        assert [one.token_ids for one in found] == [one.token_ids[:count] for one in whole]
        assert {one.finish for one in found} == {"length"}


@pytest.mark.parametrize("policy", [CHAIN, Wild(V)])
def test_an_end_inside_of_what_was_accepted(policy):
    """At every place of a run, the draft going on behind it."""
    model = Hashing(V, order=None, spread=1.0)
    (whole,) = plain([[6]], 40, Hashing(V, order=None, spread=1.0), eos=[])
    places = set()
    for end in range(V):
        expected = plain([[6]], 40, Hashing(V, order=None, spread=1.0), eos=[end])
        found = drafted([[6]], 40, knows([[6, *whole.token_ids]], V), policy, model=model, eos=[end])
        assert said(found) == said(expected)
        if found[0].finish == "eos" and found[0].trace:
            last = found[0].trace[-1]
            assert last["new"][-1] == end
            places.add((len(last["new"]), len(last["tokens"]) - len(last["accepted"])))
    assert len({place for place, _ in places}) > 2 and max(behind for _, behind in places) > 1


def test_the_context_ends_a_text():
    for positions in range(1, 24):
        prompt, facts = [5, 1, 7][:positions], Facts(V, positions)
        expected = plain([prompt], 40, facts=facts, eos=[])
        assert expected[0].finish == "context" and len(prompt) + expected[0].new_tokens == positions + 1
        for policy in (CHAIN, Fixed((2, 2, 2)), Wild(V)):
            model = Hashing(V)
            found = drafted([prompt], 40, oracle(model), policy, model=model, facts=facts, eos=[])
            assert said(found) == said(expected)


@pytest.mark.parametrize("policy", [CHAIN, Fixed((3, 2, 1)), Wild(V)])
def test_caches_that_are_just_large_enough(policy):
    expected = plain(PROMPTS, 16, eos=[])
    for prompt, want in zip(PROMPTS, expected):
        for spare in range(4):
            model = Hashing(V, capacity=len(prompt) + 15 + spare)
            found = drafted([prompt], 16, oracle(model, right=0.9, width=2), policy, model=model, eos=[])
            assert said(found) == said([want])
    for capacity in (24, 34, 36, 40, 70):  # others wait for slots, or find no room for trees
        model = Hashing(V, capacity=capacity)
        found = drafted(PROMPTS, 16, oracle(model, right=0.9, width=2), policy, model=model, eos=[])
        assert said(found) == said(expected)


def test_what_does_not_fit_is_said_as_ever():
    with pytest.raises(ElisionError, match="cache is too small"):
        drafted([[1, 2, 3]], 20, Ngram(), model=Hashing(V, capacity=21))


# ---- batches -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch", [1, 2, 3, 7])
@pytest.mark.parametrize("policy", [CHAIN, Fixed((2, 2, 1, 1)), Marginal()])
def test_ragged_batches(batch, policy):
    prompts = [[number, number % 5, 3][: 1 + number % 3] for number in range(10)]
    expected = plain(prompts, 25, Hashing(V, order=3), eos=[1])
    for capacity in (700, 110):  # with little room some get none for trees
        model = Hashing(V, order=3, capacity=capacity)
        drafter = oracle(model, right=0.7, width=2)
        found = drafted(prompts, 25, drafter, policy, model=model, batch=batch, eos=[1])
        assert said(found) == said(expected)
        assert len({len(one.trace) for one in found}) > 2
        largest = max(len(record["tokens"]) for one in found for record in one.trace)
        assert (max(model.calls) > largest) == (batch > 1) or capacity < 700


def test_several_prompts_as_events():
    model = Hashing(V)
    generator = Generator.around(
        model, Facts(V), batch=3, speculation=drafting(oracle(model, right=0.8), CHAIN)
    )
    done = {}
    for number, piece, result in generator.events(PROMPTS, 20, eos=[]):
        assert piece == "" and number not in done
        if result is not None:
            done[number] = result.token_ids
    assert [done[number] for number in range(4)] == [one.token_ids for one in plain(PROMPTS, 20, eos=[])]


# ---- text ----------------------------------------------------------------------------------------------
LETTERS = [
    *(3 + byte for byte in b"abc d"),
    *(3 + byte for byte in "é".encode()),
    3 + 0xE2,
    3 + 0x82,
    3 + 0xAC,
]
TOKENIZER = byte_tokenizer()


def writer(drafter=None, policy=CHAIN, order=2):
    model = Hashing(260, letters=LETTERS, order=order)
    made = None if drafter is None else drafting(drafter(model), policy)
    return Generator.around(model, Facts(260), TOKENIZER, speculation=made)


@pytest.mark.parametrize(
    "drafter", [oracle, lambda model: oracle(model, right=0.7, width=2), lambda model: Ngram()]
)
@pytest.mark.parametrize("policy", [CHAIN, Fixed((2, 2, 1)), Wild(260)])
def test_stop_strings(drafter, policy):
    """Any piece of two or three characters: its end lies anywhere in what a round commits."""
    prompts = ["ab", "é c"]
    whole = writer(order=None).generate(prompts, 30, eos=[])
    stops = {
        one.text[i : i + size] for one in whole for i in range(0, len(one.text) - 3, 2) for size in (1, 3)
    }
    fast = writer(drafter, policy, None)
    for stop in sorted(stops):
        expected = writer(order=None).generate(prompts, 30, eos=[], stop=[stop, "no"])
        assert said(fast.generate(prompts, 30, eos=[], stop=[stop, "no"])) == said(expected)
        assert "stop" in {one.finish for one in expected}
    assert len(stops) > 10


def test_pieces_of_text_are_whole():
    expected = writer().generate("ab", 40, eos=[])
    stream = writer(oracle).stream("ab", 40, eos=[], trace=True)
    pieces = list(stream)
    assert "".join(pieces) == expected.text == stream.result.text and len(pieces) > 3
    assert said([stream.result]) == said([expected])
    adds_up(stream.result)


def test_a_stream_that_is_left_early():
    expected = writer().generate("ab", 60, eos=[])
    generator = writer(lambda model: oracle(model, right=0.8))
    drafter = generator.speculation.drafter
    for count in range(1, 6):
        stream = generator.stream("ab", 60, eos=[])
        text = "".join(next(stream) for _ in range(count))
        result = stream.result
        assert drafter.open == 1 and result.finish is None
        assert 1 <= result.new_tokens < 60 and result.token_ids == expected.token_ids[: result.new_tokens]
        assert expected.text.startswith(result.text) and result.text.startswith(text)
        del stream
        gc.collect()
        assert drafter.open == 0
    assert generator.generate("ab", 60, eos=[]).token_ids == expected.token_ids


# ---- reports -------------------------------------------------------------------------------------------
def test_reports():
    model = Hashing(V)
    speculation = drafting(oracle(model, right=0.6), CHAIN)
    generator = Generator.around(model, Facts(V), speculation=speculation)
    one = generator.generate([5, 1], 25, eos=[])
    assert one.trace is None and one.to_json()["speculation"] == one.speculation
    assert one.speculation["drafter"] == "scripted" and one.speculation["tree"] == "fixed"
    assert one.speculation["mode"] == "exact" and 0 < one.speculation["acceptance"]["by_depth"]["1"] < 1
    for name in ("draft_seconds", "verify_seconds", "rest_seconds"):
        assert one.speculation[name] >= 0
    assert one.speculation["verify_seconds"] > 0
    traced = generator.generate([5, 1], 25, eos=[], trace=True)
    adds_up(traced)
    assert "trace" not in traced.to_json()
    assert "speculation" not in plain([5, 1], 3, eos=[]).to_json()
    nothing = generator.generate([5, 1], 1, eos=[], trace=True)
    assert nothing.speculation["verifications"] == 0 and nothing.trace == []


def test_drafters_are_told_what_was_verified():
    """That every round is consistent is checked by the draft itself."""
    model = Hashing(V)
    drafter = oracle(model, right=0.7, width=2)
    (one,) = drafted([[5, 1]], 20, drafter, Fixed((2, 2)), model=model, eos=[])
    assert [token for seen in drafter.seen for token in seen.new] == one.token_ids[1:]
    for seen in drafter.seen:
        for node, best in enumerate(seen.best):
            ids = [
                *([5, 1] + one.token_ids)[: len([5, 1])],
                *_before(drafter.seen, seen, one),
                *seen.tree.path(node),
            ]
            assert best.tolist() == model.best(ids)[: len(best)]


def _before(all_seen, until, one):
    count = 1
    for seen in all_seen:
        if seen is until:
            break
        count += len(seen.new)
    return one.token_ids[:count]


@given(st.integers(1, 12), st.data())
def test_caches_move_all_at_once(count, data):
    slots = st.lists(st.integers(0, 11), min_size=count, max_size=count)
    source = np.array(data.draw(slots))
    target = np.array(data.draw(st.lists(st.integers(0, 11), min_size=count, max_size=count, unique=True)))
    caches = Caches({
        "a": ((2, 12, 3), np.float32), "b": ((2, 12, 3), np.float32), "c": ((1, 12, 5), np.int8),
        "d": ((2, 12, 3), np.float16),
    })  # fmt: skip
    random = np.random.default_rng(count)
    for view in caches.views.values():
        view[:] = random.integers(-99, 99, view.shape)
    before = {name: view.copy() for name, view in caches.views.items()}
    caches.move(source, target)
    for name, view in caches.views.items():
        expected = before[name].copy()
        for old, new in zip(source, target):
            expected[:, new] = before[name][:, old]
        assert np.array_equal(view, expected) and view.dtype == before[name].dtype
