"""Verification: text is plain decoding's own, or, where proposals are tested against it, of the same distribution."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from elision.runtime.draft_tree import Proposal, Tree, from_paths
from elision.runtime.generate import Generator
from elision.runtime.generate_sampling import Sampling, adjusted, distribution
from elision.runtime.lm_facts import Facts
from elision.runtime.tree_policy import DySpec, Fixed, Marginal, draw
from elision.runtime.verify import accepted_token, walk

from .draft_double import Drawing, Hashing, Scripted, chi_square, drafting, knows

P = np.array([0.32, 0.05, 0.25, 0.0, 0.2, 0.18])
Q = {
    "close": np.array([0.3, 0.1, 0.2, 0.05, 0.2, 0.15]),
    "far": np.array([0.02, 0.5, 0.03, 0.4, 0.03, 0.02]),
    "steep": np.array([0.7, 0.02, 0.2, 0.01, 0.05, 0.02]),
    "holes": np.array([0.0, 0.5, 0.0, 0.0, 0.5, 0.0]),
    "one": np.array([0.0, 0.0, 1.0, 0.0, 0.0, 0.0]),
    "the same": P,
}
SAMPLES = 8000


def drawn(kind, q, count, random):
    tree = Tree.of(0, kind)
    for _ in range(count):
        found = draw(tree, 0, q, random)
        if found is None:
            break
        tree.add(0, found[0])
    return tree


def counted(make, p=P, seed=0):
    """How often each token came, with a tree made anew for each."""
    random = np.random.default_rng(seed)
    tokens = [accepted_token(p, make(random), 0, random) for _ in range(SAMPLES)]
    return np.bincount(tokens, minlength=len(p))


def is_distributed(counts, p=P):
    found, limit = chi_square(counts, p * counts.sum())
    return found < limit


# ---- walks -------------------------------------------------------------------------------------------
def test_a_walk_goes_as_far_as_the_tree_is_right():
    tree = from_paths(9, [[1, 2, 3], [1, 4], [5]])
    text = [1, 4, 7, 8]
    path, tokens = walk(tree, lambda node, before: text[len(before)], lambda token: True)
    assert [tree.tokens[node] for node in path] == [9, 1, 4] and tokens == [1, 4, 7]
    assert tree.path(path[-1]) == [1, 4]


def test_a_walk_ends_with_the_text():
    tree = from_paths(9, [[1, 2, 3]])
    path, tokens = walk(tree, lambda node, before: [1, 2, 3, 4][len(before)], lambda token: token != 2)
    assert path == [0, 1] and tokens == [1, 2]


# ---- one token ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("q", Q)
@pytest.mark.parametrize("count", [1, 3, 6])
@pytest.mark.parametrize("kind", [Proposal.INDEPENDENT, Proposal.WITHOUT_REPLACEMENT])
def test_drawn_proposals_leave_the_distribution_alone(kind, count, q):
    assert is_distributed(counted(lambda random: drawn(kind, Q[q], count, random)))


@pytest.mark.parametrize("children", [[], [0], [3], [1, 2], [4, 3, 0], [0, 1, 2, 3, 4, 5]])
def test_chosen_proposals_leave_the_distribution_alone(children):
    tree = from_paths(0, [[token] for token in children])
    assert is_distributed(counted(lambda random: tree))


def test_a_distribution_of_one_token():
    p = np.array([0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    for kind in Proposal:
        for seed in range(50):
            random = np.random.default_rng(seed)
            tree = drawn(kind, Q["close"], 3, random) if kind is not Proposal.DETERMINISTIC else None
            assert accepted_token(p, tree or from_paths(0, [[1], [2]]), 0, random) == 2


def test_equal_draws_are_tested_again_and_again():
    """Only one child comes of them; that each is tested is what the distribution rests on."""
    q = np.array([0.05, 0.8, 0.05, 0.02, 0.05, 0.03])
    random = np.random.default_rng(1)
    trees = [drawn(Proposal.INDEPENDENT, q, 4, random) for _ in range(50)]
    assert any(len(tree) - 1 < len(tree.draws[0][1]) == 4 for tree in trees)
    assert is_distributed(counted(lambda random: drawn(Proposal.INDEPENDENT, q, 4, random)))

    def once(random):
        tree = drawn(Proposal.INDEPENDENT, q, 4, random)
        tree.draws = {0: (q, [tree.tokens[child] for child in tree.children(0)])}
        return tree

    assert not is_distributed(counted(once))


def test_a_wrong_rule_is_seen():
    """The samples are large enough to tell: draws of one kind, tested as those of another."""

    def wrong(kind, claimed, q):
        def make(random):
            tree = drawn(kind, q, 3, random)
            tree.kind = claimed
            return tree

        return not is_distributed(counted(make))

    assert wrong(Proposal.WITHOUT_REPLACEMENT, Proposal.INDEPENDENT, Q["steep"])
    assert wrong(
        Proposal.INDEPENDENT, Proposal.WITHOUT_REPLACEMENT, np.array([0.05, 0.8, 0.05, 0.02, 0.05, 0.03])
    )
    best = Tree.of(0, Proposal.WITHOUT_REPLACEMENT)
    best.draws[0] = (Q["close"], [0, 2, 4])
    for token in (0, 2, 4):
        best.add(0, token)
    assert not is_distributed(counted(lambda random: best))


@pytest.mark.parametrize("kind", [Proposal.INDEPENDENT, Proposal.WITHOUT_REPLACEMENT])
def test_good_draws_are_mostly_accepted(kind):
    """What the rule is for: a draft that knows the distribution is never rejected."""
    random = np.random.default_rng(2)
    for _ in range(300):
        tree = drawn(kind, P, 1, random)
        assert accepted_token(P, tree, 0, random) == tree.tokens[1]


def test_a_cut_tree_still_leaves_the_distribution_alone():
    """Draws that came after the last node are no draws: that they were equal to earlier ones is why they stayed."""
    q = np.array([0.5, 0.1, 0.1, 0.1, 0.1, 0.1])
    for kind in (Proposal.INDEPENDENT, Proposal.WITHOUT_REPLACEMENT):
        for count in (2, 3):
            assert is_distributed(counted(lambda random: drawn(kind, q, 4, random).cut(count, 1)))  # noqa: B023


def test_no_token_is_lost_to_rounding():
    """Sums that are a little off, or nothing, still give a possible token, and no warning."""
    random = np.random.default_rng(3)
    p = np.full(6, 1 / 6) * (1 - 1e-12)
    nothing = Tree.of(0, Proposal.WITHOUT_REPLACEMENT)
    with np.errstate(all="raise"):
        assert draw(nothing, 0, np.zeros(6), random) is None
        assert P[accepted_token(P, nothing, 0, random)] > 0
        for kind in (Proposal.INDEPENDENT, Proposal.WITHOUT_REPLACEMENT):
            tree = Tree.of(0, kind)
            tree.draws[0] = (p * (1 + 1e-9), [0, 1, 2, 3, 4, 5])
            for _ in range(200):
                assert 0 <= accepted_token(p, tree, 0, random) < 6
        tree = Tree.of(0, Proposal.INDEPENDENT)
        tree.draws[0] = (np.array([0.0, 1, 0, 0, 0, 0]), [0, 0, 1])  # a draw that q says cannot be
        assert all(P[accepted_token(P, tree, 0, random)] > 0 for _ in range(200))


def test_draws_follow_the_draft():
    random = np.random.default_rng(4)
    q = Q["close"]
    first = [draw(Tree.of(0, Proposal.INDEPENDENT), 0, q, random) for _ in range(SAMPLES)]
    assert is_distributed(np.bincount([token for token, _ in first], minlength=6), q)
    assert all(chance == pytest.approx(q[token]) for token, chance in first)
    tree = Tree.of(0, Proposal.WITHOUT_REPLACEMENT)
    taken = [draw(tree, 0, q, random) for _ in range(7)]
    assert sorted(token for token, _ in taken[:6]) == list(range(6)) and taken[6] is None
    left = 1.0
    for token, chance in taken[:6]:
        assert chance == pytest.approx(q[token] / left)
        left -= q[token]


# ---- several tokens --------------------------------------------------------------------------------------
V, COUNT = 6, 1500
HOW = {"temperature": 0.9, "top_k": 4, "repetition_penalty": 1.3}


def joint(model, start, forced, length):
    """The chance of every text of `length` ids after a forced first one."""
    how = Sampling(**HOW)
    chances = np.zeros((V,) * length)
    for text in itertools.product(range(V), repeat=length):
        ids, chance = [start, forced], 1.0
        for token in text:
            possible, weights = distribution(adjusted(model.scores(ids), ids, len(ids) - 1, how), how)
            chance *= dict(zip(possible.tolist(), weights.tolist())).get(token, 0.0)
            ids.append(token)
        chances[text] = chance
    return chances


def texts(model, speculation, length):
    facts = Facts(V, rules={"forced_bos_token_id": 2})
    generator = Generator.around(model, facts, batch=6, speculation=speculation)
    results = generator.generate([[1]] * COUNT, length + 1, eos=[], seed=7, **HOW)
    counts = np.zeros((V,) * length)
    for result in results:
        assert result.token_ids[0] == 2
        counts[tuple(result.token_ids[1:])] += 1
    return counts


def guesser(model, noise):
    """q: the model's distribution without its penalties, spoiled; some tokens never drawn."""

    def q(ids):
        found = model.scores(ids) * (1 - noise) + noise * 3 * np.sin(np.arange(V) * 7.0 + len(ids))
        weights = np.exp(found - found.max())
        weights[(ids[-1] + 1) % V] = 0
        return weights / weights.sum()

    return q


@pytest.mark.parametrize(
    "kind, policy, noise",
    [
        (Proposal.INDEPENDENT, Fixed((2, 2)), 0.9),
        (Proposal.INDEPENDENT, Fixed((1, 1)), 0.2),
        (Proposal.WITHOUT_REPLACEMENT, Fixed((3, 2)), 0.2),
        (Proposal.WITHOUT_REPLACEMENT, Fixed((6, 1)), 0.9),
        (Proposal.WITHOUT_REPLACEMENT, DySpec(6), 0.2),
        (Proposal.WITHOUT_REPLACEMENT, DySpec(4), 0.9),
    ],
)
def test_texts_keep_their_distribution(kind, policy, noise):
    model = Hashing(V, order=2, spread=1.2, seed=3, capacity=80)
    speculation = drafting(Drawing(guesser(model, noise), kind), policy, mode="sampling")
    found, limit = chi_square(texts(model, speculation, 3), COUNT * joint(model, 1, 2, 3))
    assert found < limit
    assert sum(speculation.acceptance.depths[2]) > 0  # trees were deeper than one level


def test_texts_keep_their_distribution_with_chosen_guesses():
    model = Hashing(V, order=2, spread=1.2, seed=3, capacity=80)
    drafter = Scripted(lambda ids: model.best(ids)[:2])
    speculation = drafting(drafter, Fixed((2, 2)), mode="sampling")
    found, limit = chi_square(texts(model, speculation, 3), COUNT * joint(model, 1, 2, 3))
    assert found < limit


def test_a_wrong_distribution_of_texts_is_seen():
    model = Hashing(V, order=2, spread=1.2, seed=3, capacity=80)
    expected = COUNT * joint(model, 1, 2, 3)
    found, limit = chi_square(texts(model, None, 3), expected)
    assert found < limit

    class Likeliest(Fixed):
        """Passes off the likeliest tokens as drawn ones."""

        def grow(self, drafter, draft, root, acceptance, room):
            tree = Tree.of(root, drafter.kind)
            (q,) = draft.distribution([draft.root()])
            order = np.argsort(-q)[:2].tolist()
            for token in order:
                tree.add(0, token)
            tree.draws[0] = (q, order)
            return tree

    drafter = Drawing(guesser(model, 0.2), Proposal.WITHOUT_REPLACEMENT)
    found, limit = chi_square(texts(model, drafting(drafter, Likeliest(), mode="sampling"), 3), expected)
    assert found > 2 * limit


# ---- one coin ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 4},
        {"top_p": 0.8},
        {"top_k": 6, "top_p": 0.9, "repetition_penalty": 1.4},
        {"ngram": 2},
        {"ngram": 3, "repetition_penalty": 0.7},
    ],
)
@pytest.mark.parametrize("policy", [Fixed((2, 1, 1, 1)), Marginal(), DySpec(9)])
def test_exact_mode_draws_what_plain_sampling_draws(options, policy):
    model = Hashing(12, order=3, spread=1.5)
    options = {"temperature": 1.1, "seed": 5, "eos": []} | options
    prompts = [[1], [4, 4, 2], [7, 0, 7, 0, 7]]
    plain = Generator.around(model, Facts(12)).generate(prompts, 24, **options)
    whole = [[*prompt, *one.token_ids] for prompt, one in zip(prompts, plain)]
    for right in (1.0, 0.6):
        drafter = knows(whole, 12, right=right)
        generator = Generator.around(model, Facts(12), speculation=drafting(drafter, policy))
        found = generator.generate(prompts, 24, **options)
        assert [one.token_ids for one in found] == [one.token_ids for one in plain]
        assert all(one.speculation["tokens_per_verification"] > 1.3 for one in found)
