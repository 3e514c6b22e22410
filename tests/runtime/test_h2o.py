"""Caches that keep some keys: the chosen ones against a brute force over transformers' own attention."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from elision.passes.errors import ElisionError, Refused
from elision.runtime.drafter_ngram import Ngram
from elision.runtime.h2o import H2O, choose
from elision.runtime.h2o_model import EvictingSteps, score_names
from elision.runtime.lm_step import chain, joined, tree
from elision.runtime.perplexity import perplexity
from elision.runtime.speculation import Speculation
from elision.runtime.verify_costs import flat

import elision

from ..zoo.causal import VOCABULARY
from .lm_zoo import LIMIT, make

RUNTIMES = ("torch", "onnxruntime")
POLICY = H2O(8, recent=3, sinks=2)


@cache
def compiled(runtime: str, scored: bool = True, name: str = "llama") -> Any:
    policy = H2O(LIMIT) if scored else None
    return elision.Generator(make(name), runtime=runtime, context=LIMIT, h2o=policy)


def evicting(runtime: str, policy: H2O) -> EvictingSteps:
    """Around the compiled model; one of these at a time is in use."""
    return compiled(runtime).model.under(policy)


@cache
def wide() -> Any:
    """With room for several sequences."""
    model = make("llama", positions=4 * LIMIT)
    return elision.Generator(model, runtime="torch", context=4 * LIMIT, h2o=H2O(LIMIT))


def text(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCABULARY, count).tolist()


# ---- the policy ----------------------------------------------------------------------------------------
def test_choice_is_that_of_sorting() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        sinks, recent = int(rng.integers(0, 4)), int(rng.integers(1, 5))
        policy = H2O(sinks + recent + int(rng.integers(0, 5)), recent, sinks)
        count = int(rng.integers(1, 24))
        scores = rng.integers(0, 6, (3, count)).astype(float)  # with many equal ones
        kept = choose(scores, policy)
        for row, found in zip(scores, kept.tolist(), strict=True):
            ends = {i for i in range(count) if i < sinks or i >= count - recent}
            rest = sorted((i for i in range(count) if i not in ends), key=lambda i: (-row[i], i))
            wanted = set(range(count)) if count <= policy.size else ends | set(rest[: policy.heavy])
            assert found == sorted(wanted) and len(found) == min(count, policy.size)


def test_shares() -> None:
    assert (H2O(100).last, H2O(100).heavy) == (48, 48)
    assert H2O(9).to_json() == {"size": 9, "recent": 2, "sinks": 4}
    assert choose(np.array([[5.0, 1, 4, 2, 3]]), H2O(3, 1, 1)).tolist() == [[0, 2, 4]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 4}, "a cache of 4 keys has no room for the first 4 and 1 recent ones"),
        ({"size": 8, "recent": 7, "sinks": 2}, "no room for the first 2 and 7 recent ones"),
        ({"size": 8, "recent": 0}, "1 or more recent keys stay, not 4 and 0"),
        ({"size": 8, "sinks": -1}, "0 or more first"),
    ],
)
def test_numbers_without_room(given: dict[str, int], message: str) -> None:
    with pytest.raises(ElisionError, match=message):
        H2O(**given)


# ---- against a brute force -----------------------------------------------------------------------------
class Forgetful:
    """transformers' llama, one token a call, every layer and key head with a list of the positions that it still sees.
    Nothing is moved: what is dropped is left out of the softmax."""

    def __init__(self, policy: H2O, name: str = "llama") -> None:
        transformers.AttentionInterface.register("forgetful", self.attend)
        self.model, self.policy = make(name), policy
        self.model.set_attn_implementation("forgetful")
        self.kept: dict[tuple[int, int], list[int]] = {}
        self.scores: dict[tuple[int, int, int], float] = {}
        self.past = transformers.DynamicCache()

    def attend(self, module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **_: Any) -> Any:
        heads, shared, position = q.shape[1], k.shape[1], k.shape[2] - 1
        out = torch.zeros(1, 1, heads, v.shape[-1])
        for h in range(shared):
            seen = self.kept.setdefault((module.layer_idx, h), [])
            seen.append(position)
            for one in range(h * heads // shared, (h + 1) * heads // shared):
                weights = torch.softmax(q[0, one, 0] @ k[0, h, seen].T * scaling, -1)
                out[0, 0, one] = weights @ v[0, h, seen]
                for place, weight in zip(seen, weights.tolist()):
                    key = (module.layer_idx, h, place)
                    self.scores[key] = self.scores.get(key, 0.0) + weight
        return out, None

    @torch.no_grad()
    def feed(self, token: int) -> np.ndarray:
        """The logits; keys that are too many go."""
        logits = self.model(torch.tensor([[token]]), past_key_values=self.past, use_cache=True).logits[0, -1]
        policy = self.policy
        for (layer, head), seen in self.kept.items():
            if len(seen) > policy.size:
                middle = seen[policy.sinks : len(seen) - policy.last]
                gone = set(sorted(middle, key=lambda p: (-self.scores[layer, head, p], p))[policy.heavy :])
                seen[:] = [p for p in seen if p not in gone]
        return logits.numpy()


@cache
def wanted(policy: H2O, count: int, name: str = "llama") -> tuple[np.ndarray, Forgetful]:
    slow = Forgetful(policy, name)
    return np.stack([slow.feed(token) for token in text(count)]), slow


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("policy", [POLICY, H2O(7, recent=2, sinks=0), H2O(6, recent=4, sinks=2)], ids=str)
def test_kept_keys_and_logits_are_those_of_a_brute_force(runtime: str, policy: H2O) -> None:
    count = 30
    logits, slow = wanted(policy, count)
    model = evicting(runtime, policy)
    for position, token in enumerate(text(count)):
        found = model.step(chain(0, position, [token]))[0]
        np.testing.assert_allclose(found, logits[position], atol=2e-4 * np.abs(logits).max())
    cell = model.cells[0]
    cell.settle(count)
    assert cell.cached == policy.size and cell.past == count
    for layer, known in enumerate(cell.positions):
        for head, row in enumerate(known[:, : cell.cached]):
            assert row.tolist() == slow.kept[layer, head]
            assert row[: policy.sinks].tolist() == list(range(policy.sinks))
            assert row[-policy.last :].tolist() == list(range(count - policy.last, count))
            sums = [slow.scores[layer, head, place] for place in row.tolist()]
            np.testing.assert_allclose(cell.sums[layer][head, : cell.cached], sums, rtol=1e-3)
    assert len({tuple(kept) for kept in slow.kept.values()}) > 1 or not policy.heavy


def test_positions_are_those_of_the_text() -> None:
    """What the runner is given: positions go on, slots do not."""
    model, seen = evicting("torch", POLICY), []
    inner = model._model

    class Spy:
        layers, key_scores = inner.layers, inner.key_scores

        def step(self, rows: Any, keep: Any = None) -> Any:
            seen.append((rows.positions.tolist(), rows.slots.tolist(), rows.prefix.tolist()))
            return inner.step(rows, keep)

    model._model = Spy()  # type: ignore[assignment]
    for position, token in enumerate(text(12)):
        model.step(chain(0, position, [token]))
    assert seen[7:] == [([7], [7], [[0, 7]])] + [([p], [8], [[0, 8]]) for p in range(8, 12)]


# ---- rounds --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_refused_guesses_leave_no_trace(runtime: str) -> None:
    """Rounds of trees of which one path is accepted, and the same tokens as chains, settle the same."""
    ids, junk = text(40), text(40, seed=5)
    states = []
    for guessing in (True, False):
        model, past = evicting(runtime, POLICY), 11
        model.largest(chain(0, 0, ids[:past]), [past - 1])
        rng = np.random.default_rng(1)
        while past < 34:
            count = int(rng.integers(1, 5))
            accepted = ids[past : past + count]
            if guessing:
                # Node 0 is right, then each level has a wrong node before the right one.
                tokens, parents, path = [accepted[0]], [-1], [0]
                for token in accepted[1:]:
                    tokens += [junk[past], token, junk[past + 1]]
                    parents += [path[-1]] * 2 + [len(tokens) - 3]
                    path.append(len(tokens) - 2)
                model.largest(tree(0, past, tokens, parents))
                assert model.cells[0].cached <= POLICY.size  # nobody has dropped or added anything yet
                nodes = np.array(path)
                if path != list(range(count)):
                    model.move(past + nodes, past + np.arange(count))
            else:
                model.largest(tree(0, past, accepted, list(range(-1, count - 1))))
            past += count
        found = model.step(chain(0, past, [ids[past]]))[0].copy()
        cell = model.cells[0]
        held = [x[:, : cell.cached].copy() for layer in model._model.layers for x in layer]
        sums = [one[:, : cell.cached].copy() for one in cell.sums]
        states.append((cell.cached, [p[:, : cell.cached].copy() for p in cell.positions], sums, held, found))
    one, other = states
    assert one[0] == other[0] == POLICY.size
    for a, b in zip(one[1], other[1], strict=True):
        np.testing.assert_array_equal(a, b)
    for part in (2, 3):
        for a, b in zip(one[part], other[part], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
    np.testing.assert_allclose(one[4], other[4], atol=1e-3)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_large_cache_gives_the_tokens_and_bits_of_plain_decoding(runtime: str) -> None:
    plain, scored = compiled(runtime, scored=False), compiled(runtime)
    assert scored.settings["exactness"] == "lossy" and scored.settings["h2o"]["size"] == LIMIT
    prompts = [text(n, seed=n) for n in (1, 9, 30)]
    both = [[one.token_ids for one in g.generate(prompts, 25, eos=[])] for g in (plain, scored)]
    assert both[0] == both[1]
    rows = joined([chain(0, 0, text(20))])
    np.testing.assert_array_equal(plain.model.step(rows).copy(), scored.model.step(rows))


def test_drafts_and_batches() -> None:
    """Two cells of a cache, more prompts than cells, with trees and without: all tokens of plain decoding while nothing
    is dropped; when it is, those of each prompt alone."""
    plain = compiled("torch", scored=False)
    prompts = [(text(3, seed=n) * 5)[:13] for n in range(5)]
    expected = [one.token_ids for one in plain.generate(prompts, 12, eos=[])]
    whole = wide()
    assert len(whole.model.cells) == 2
    for drafting in (None, Speculation(Ngram(), flat(1e-3), guard=False)):
        generator = elision.Generator.around(whole.model, whole.facts, speculation=drafting)
        assert [one.token_ids for one in generator.generate(prompts, 12, eos=[])] == expected
        generator.model = whole.model.under(POLICY)
        assert len(generator.model.cells) == 3
        found = generator.generate(prompts, 40, eos=[])
        assert [one.new_tokens for one in found] == [40] * 5
        if drafting is None:
            alone = [generator.generate(prompt, 40, eos=[]).token_ids for prompt in prompts]
            assert [one.token_ids for one in found] == alone


def test_sequences_of_one_call_keep_their_own() -> None:
    model, one, two = wide().model.under(POLICY), text(25, seed=1), text(25, seed=2)
    slots = model.own_slots()
    starts = [slots.take(25), slots.take(25)]
    assert starts == [0, 4 * LIMIT] and slots.take(4 * LIMIT + 1) is None
    apart = []
    for start, ids in zip(starts, (one, two)):
        model.step(chain(start, 0, ids[:12]))
        for position in range(12, 25):
            apart.append(model.step(chain(start, position, [ids[position]]))[0].copy())
    for start, ids in zip(starts, (one, two)):
        model.step(chain(start, 0, ids[:12]))
    together = []
    for position in range(12, 25):
        rows = joined([chain(start, position, [ids[position]]) for start, ids in zip(starts, (one, two))])
        together.append(model.step(rows).copy())
    np.testing.assert_allclose(np.concatenate(np.stack(together, 1)), np.stack(apart), atol=1e-4)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_long_prompt_is_read_in_pieces(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elision.runtime.h2o_model.ROUND", 4)
    ids = text(31)
    whole = evicting(runtime, POLICY)
    keep = [2, 12, 29, 30]
    scores, best = whole.step(chain(0, 0, ids), keep).copy(), whole.largest(chain(0, 0, ids), keep)
    by_hand, rows = evicting(runtime, POLICY), []
    for low, high in [(0, 12), *((n, min(31, n + 4)) for n in range(12, 31, 4))]:
        rows.append(by_hand.step(chain(0, low, ids[low:high])).copy())
    np.testing.assert_array_equal(scores, np.concatenate(rows)[keep])
    np.testing.assert_array_equal(best.ids[:, 0], scores.argmax(1))
    assert perplexity(compiled(runtime), text(50))["tokens"] == 49


# ---- errors --------------------------------------------------------------------------------------------
def refusal(model: EvictingSteps, *calls: Any) -> str:
    with pytest.raises(ElisionError) as caught:
        for rows in calls:
            model.step(rows)
    return str(caught.value)


def test_what_cannot_be() -> None:
    model, ids = evicting("torch", POLICY), text(9)
    assert "3 tokens are to be seen, but 0 are settled" in refusal(model, chain(0, 3, [4]))
    assert "cannot go back" in refusal(model, chain(0, 0, ids), chain(0, 9, [4]), chain(0, 5, [4]))
    assert "those that it gives itself" in refusal(model, chain(7, 0, [4]))
    gap = replace(chain(0, 9, [4]), slots=np.array([11], np.int32))
    assert "behind the settled tokens" in refusal(model, chain(0, 0, ids), gap)
    few = compiled("torch").model
    assert "have room for 1 sequences" in refusal(few, chain(LIMIT, 0, [4]))
    with pytest.raises(ElisionError, match="compiled without the scores of its keys"):
        score_names(["logits"])


@pytest.mark.parametrize("name", ["bloom", "gemma2"])
def test_models_that_count_places_are_refused(name: str) -> None:
    with pytest.raises(Refused, match="a cache that forgets keys would give the others wrong places"):
        elision.Generator(make(name), runtime="torch", context=LIMIT, h2o=POLICY)
