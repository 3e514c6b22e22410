"""Draft trees, the policies that grow them, and what is counted of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from elision.runtime.acceptance import Acceptance
from elision.runtime.draft_tree import Proposal, Tree, from_paths
from elision.runtime.tree_policy import Beam, DySpec, Fixed, Marginal, Room
from hypothesis import given, settings
from hypothesis import strategies as st

from .draft_double import Drawing, Scripted

nodes = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 4), st.floats(0, 1)), max_size=14)


def grown(entries):
    tree = Tree.of(7)
    for number, (parent, token, value) in enumerate(entries):
        parent %= len(tree)
        tree.add(parent, token, ("key", number), value * tree.values[parent], f"origin {number % 3}")
    return tree


def is_tree(tree):
    assert len(tree) == len(tree.parents) == len(tree.depths) == len(tree.keys) == len(tree.values)
    assert len(tree) == len(tree.origins) and tree.parents[0] == -1 and tree.depths[0] == 0
    for node in range(1, len(tree)):
        assert 0 <= tree.parents[node] < node
        assert tree.depths[node] == tree.depths[tree.parents[node]] + 1 == len(tree.path(node))
        assert tree.child(tree.parents[node], tree.tokens[node]) == node
    for node in range(len(tree)):
        children = tree.children(node)
        assert [tree.parents[child] for child in children] == [node] * len(children)
        assert len({tree.tokens[child] for child in children}) == len(children)


def paths(tree):
    """path -> all that is known of its last node."""
    return {
        tuple(tree.path(node)): (tree.keys[node], tree.values[node], tree.origins[node])
        for node in range(len(tree))
    }


# ---- trees -------------------------------------------------------------------------------------------
@given(nodes)
def test_trees_hold_what_was_added(entries):
    tree = grown(entries)
    is_tree(tree)
    again = from_paths(7, [tree.path(node) for node in range(len(tree))])
    assert set(paths(again)) == set(paths(tree))
    assert tree.to_json()["tokens"] == tree.tokens and len(tree.to_json()["values"]) == len(tree)


@given(nodes)
def test_likely_ones_first_is_the_same_tree(entries):
    tree = grown(entries)
    made = tree.heavy_first()
    is_tree(made)
    assert paths(made) == paths(tree)
    for node in range(len(made)):
        values = [made.values[child] for child in made.children(node)]
        assert values == sorted(values, reverse=True)
    node = 0
    for number in range(len(made)):  # the likeliest path is a run of rows
        assert node == number
        if not made.children(node):
            break
        node = made.children(node)[0]


def test_equal_ones_keep_their_order():
    tree = from_paths(7, [[1, 2], [3], [4]])
    assert tree.heavy_first().tokens == [7, 1, 2, 3, 4]


@given(nodes, st.integers(1, 16), st.integers(0, 6))
def test_cut_trees_are_beginnings(entries, count, depth):
    tree = grown(entries)
    made = tree.cut(count, depth)
    is_tree(made)
    assert len(made) <= count and max(made.depths) <= depth
    shallow = [node for node in range(len(tree)) if tree.depths[node] <= depth][:count]
    expected = {tuple(tree.path(node)) for node in shallow}
    assert paths(made) == {path: known for path, known in paths(tree).items() if path in expected}


def test_draws_come_along():
    tree, q, r = Tree.of(7, Proposal.INDEPENDENT), np.full(9, 1 / 9), np.arange(9) / 36
    low, high = tree.add(0, 3, value=0.2), tree.add(0, 5, value=0.6)
    last = tree.add(high, 8, value=0.3)
    tree.draws = {0: (q, [3, 3, 5]), high: (r, [8])}
    made = tree.heavy_first()
    assert made.tokens == [7, 5, 8, 3] and made.draws == {0: (q, [3, 3, 5]), 1: (r, [8])}
    assert tree.cut(9, 9).draws == tree.draws
    assert tree.cut(9, 1).draws == {0: (q, [3, 3, 5]), high: (r, [])}
    assert tree.cut(2, 9).draws == {0: (q, [3])}
    assert tree.cut(3, 9).draws == {0: (q, [3, 3, 5]), high: (r, [])}
    assert (low, last) == (1, 3)


# ---- policies ----------------------------------------------------------------------------------------
class Table:
    """A drafter of a small world: the guesses after a path are its entry, {token: chance}."""

    name, kind = "table", Proposal.DETERMINISTIC

    def __init__(self, chances, costly=False, seconds=0.0):
        self.chances, self.costly, self._seconds, self.calls = chances, costly, seconds, 0

    def begin(self, ids, room):
        return self

    def seconds(self):
        return self._seconds

    def root(self):
        return ()

    def step(self, state, token):
        return (*state, token)

    def expand(self, states):
        from elision.runtime.drafters import Guess

        self.calls += 1
        return [
            [
                Guess(token, (state, token), chance, "table")
                for token, chance in self.chances.get(state, {}).items()
            ]
            for state in states
        ]


@st.composite
def worlds(draw, most=8):
    """At most `most` paths, each with the chance of its last token given the ones before."""
    chances, open_paths, count = {}, [()], 0
    while open_paths and count < most:
        path = open_paths.pop(0)
        left = 1.0
        for token in range(draw(st.integers(0, 3))):
            if count == most:
                break
            chance = draw(st.floats(0.05, 0.95)) * left
            left -= chance
            chances.setdefault(path, {})[token] = chance
            open_paths.append((*path, token))
            count += 1
    return chances


@st.composite
def cost_curves(draw, most=12):
    """Costs of 0 to `most` rows: never falling, with steps."""
    steps = draw(st.lists(st.sampled_from([0.0, 0.0, 0.02, 0.1, 0.5, 1.5]), min_size=most, max_size=most))
    costs = np.cumsum([1.0, *steps]).tolist()
    return [costs[0], *costs[:-1]]


def values(chances):
    """path -> the product of the chances along it."""
    found = {(): 1.0}
    for path in sorted(chances, key=len):
        for token, chance in chances[path].items():
            found[(*path, token)] = found[path] * chance
    return found


def grow(policy, drafter, room, acceptance=None):
    return policy.grow(drafter, drafter.begin([7], 99), 7, acceptance or Acceptance(), room)


@given(worlds(), cost_curves())
@settings(max_examples=60)
def test_marginal_is_the_best_of_all_trees(chances, costs):
    tree = grow(Marginal(), Table(chances), Room(10, 5, costs))
    is_tree(tree)
    known = values(chances)
    assert {path: value for path, (_, value, _) in paths(tree).items()} == pytest.approx(
        {path: known[path] for path in paths(tree)}
    )
    best = 0.0
    for count in range(len(known)):
        for chosen in itertools.combinations([path for path in known if path], count):
            if all(path[:-1] in chosen or len(path) == 1 for path in chosen):
                best = max(best, (1 + sum(known[path] for path in chosen)) / costs[count + 1])
    found = sum(tree.values) / costs[len(tree)]
    # Rows within `slack` of the best number's cost are filled.
    assert best / Marginal.slack - 1e-9 <= found <= best + 1e-9


@given(worlds(most=14), cost_curves(), st.integers(2, 9), st.integers(1, 4), st.booleans())
def test_no_policy_leaves_its_room(chances, costs, rows, depth, costly):
    room, drafter = Room(rows, depth, costs), Table(chances, costly, 0.01)
    for policy in (Marginal(), Fixed((3, 2, 2, 2, 2)), Beam(12, 3, 6), DySpec(12)):
        tree = grow(policy, drafter, room)
        is_tree(tree)
        assert len(tree) <= rows and max(tree.depths) <= depth
        assert set(paths(tree)) <= set(values(chances))


@given(worlds(most=10))
def test_marginal_takes_all_that_costs_nothing_and_nothing_that_costs_too_much(chances):
    everything = grow(Marginal(), Table(chances), Room(12, 9, [1.0] * 13))
    assert set(paths(everything)) == set(values(chances))
    alone = grow(Marginal(), Table(chances), Room(12, 9, [2.0**rows for rows in range(13)]))
    assert len(alone) == 1


def test_marginal_fills_rows_that_cost_nothing():
    chances = {(): {0: 0.5, 1: 0.006, 2: 0.001}}
    costs = [1, 1, 1, 1.005, 1.005, 3, 3]
    tree = grow(Marginal(), Table(chances), Room(6, 3, costs))
    assert (1.5 + 0.006) / 1.005 < 1.5  # so that two rows are the best number
    assert len(tree) == 3
    assert len(grow(Marginal(), Table(chances), Room(6, 3, [1, 1, 1, 1.2, 1.2, 3, 3]))) == 2


def test_marginal_waits_for_a_step_of_the_costs():
    """One row alone does not pay, three for the price of one do."""
    chances = {(): {token: 0.08 - 0.001 * token for token in range(3)}}
    costs = [1, 1, 1.2, 1.2, 1.2, 5, 5]
    assert len(grow(Marginal(), Table(chances), Room(6, 3, costs))) == 4
    assert len(grow(Marginal(), Table(chances), Room(3, 3, costs))) == 1


def test_marginal_learns_from_what_is_counted():
    acceptance, chances = Acceptance(), {(): {0: 0.9, 1: 0.05}}
    room = Room(2, 3, [1, 1, 1.2])
    assert grow(Marginal(), Table(chances), room, acceptance).tokens == [7, 0]
    for _ in range(40):
        acceptance.observe(((), 0), False)
        acceptance.observe(((), 1), True)
    assert grow(Marginal(), Table(chances), room, acceptance).tokens == [7, 1]


def test_marginal_pays_for_a_costly_drafter():
    chances = {(0,) * depth: {0: 0.9, 1: 0.05} for depth in range(9)}
    room = Room(20, 9, [1.0 + 0.01 * rows for rows in range(21)])
    cheap, dear = Table(chances, True, 0.01), Table(chances, True, 0.7)
    tree = grow(Marginal(), cheap, room)
    is_tree(tree)
    assert max(tree.depths) == cheap.calls == 9
    assert 1 <= max(grow(Marginal(), dear, room).depths) == dear.calls < 6
    assert len(grow(Marginal(), Table(chances, True, 5.0), room)) == 1


def test_what_a_costly_drafter_found_is_verified_where_rows_cost_less_than_they_bring():
    """The time it took is spent either way."""
    drafter = Table({(): {0: 0.5}}, costly=True, seconds=0.45)
    assert len(grow(Marginal(), drafter, Room(8, 4, [1.0] * 9))) == 2
    drafter = Table({(): {0: 0.5}}, costly=True, seconds=0.9)
    assert len(grow(Marginal(), drafter, Room(8, 4, [1.0] * 9))) == 2


WIDE = {
    path: {0: 0.5, 1: 0.3, 2: 0.1} for size in range(4) for path in itertools.product(range(3), repeat=size)
}


def test_fixed_shapes():
    room = Room(64, 9, [1.0] * 65)
    tree = grow(Fixed((3, 2, 1)), Table(WIDE), room)
    assert [tree.depths.count(depth) for depth in range(4)] == [1, 3, 6, 6]
    chain = grow(Fixed((1, 1, 1, 1, 1, 1)), Table(WIDE), room)
    assert chain.tokens == [7, 0, 0, 0, 0] and chain.values[-1] == pytest.approx(0.5**4)
    assert len(grow(Fixed((3, 2, 1)), Table({}), room)) == 1


@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_beam_and_dyspec_take_the_best(size):
    room = Room(64, 4, [1.0] * 65)
    best = sorted(values(WIDE).values(), reverse=True)[:size]
    assert sorted(grow(DySpec(size), Table(WIDE), room).values, reverse=True) == pytest.approx(best)
    beam = grow(Beam(size, 27, 4), Table(WIDE), room)  # no beam is too narrow here
    is_tree(beam)
    assert sorted(beam.values, reverse=True) == pytest.approx(best)
    narrow = grow(Beam(64, 2, 3), Table(WIDE), room)
    assert [narrow.depths.count(depth) for depth in range(5)] == [1, 3, 6, 6, 0]


def uniform(ids):
    q = np.zeros(9)
    q[[1, 4, 6]] = 1 / 3
    return q


@pytest.mark.parametrize("kind", [Proposal.INDEPENDENT, Proposal.WITHOUT_REPLACEMENT])
def test_policies_draw(kind):
    drafter, random = Drawing(uniform, kind), np.random.default_rng(0)
    shapes = set()
    for rows in (64, 5):
        for policy in (Fixed((4, 2)), DySpec(10)):
            tree = grow(policy, drafter, Room(rows, 2, [1.0] * 65, random))
            is_tree(tree)
            assert tree.kind is kind and len(tree) <= rows and max(tree.depths) <= 2
            assert set(tree.tokens[1:]) <= {1, 4, 6} and set(tree.origins[1:]) == {"drawing"}
            for node, (_, order) in tree.draws.items():
                assert list(dict.fromkeys(order)) == [tree.tokens[child] for child in tree.children(node)]
                if kind is Proposal.WITHOUT_REPLACEMENT:
                    assert len(set(order)) == len(order)
            assert all(tree.draws[node][1] for node in range(len(tree)) if tree.children(node))
            shapes.add(len(tree))
    assert 5 in shapes
    if kind is Proposal.WITHOUT_REPLACEMENT:
        assert max(shapes) == 10  # three of four draws, and two for each of them


def test_policies_stop_where_nothing_can_be_drawn():
    nothing = Drawing(lambda ids: np.zeros(4), Proposal.WITHOUT_REPLACEMENT)
    room = Room(9, 4, [1.0] * 10, np.random.default_rng(0))
    assert len(grow(Fixed((2, 2, 2)), nothing, room)) == len(grow(DySpec(6), nothing, room)) == 1
    silent = Scripted(lambda ids: [])
    assert len(grow(Fixed((2, 2, 2)), silent, room)) == 1 and silent.expanded == 1


# ---- counting ----------------------------------------------------------------------------------------
def test_children_of_accepted_nodes_are_counted_once():
    tree = Tree.of(7)
    first, second = tree.add(0, 1, "a"), tree.add(0, 2, "b")
    tree.add(first, 3, "never tested")
    third, fourth = tree.add(second, 4, "c"), tree.add(second, 5, "d")
    tree.add(fourth, 6)  # counted under no key
    found = Acceptance()
    before = {key: found.probability(key, 0.5) for key in "abcd"}
    found.verified(tree, [0, second, fourth])
    assert found.ranks == {0: [3, 0], 1: [2, 2]} and found.depths == {1: [2, 1], 2: [2, 1], 3: [1, 0]}
    assert found.to_json() == {"by_depth": {"1": 0.5, "2": 0.5, "3": 0.0}, "by_rank": {"0": 0.0, "1": 1.0}}
    rises = {key: found.probability(key, 0.5) - before[key] for key in "abcd"}
    assert rises["a"] == rises["c"] < 0 < rises["b"] == rises["d"]
    assert found.probability("never tested", 0.123) == 0.123
    assert third


@given(st.floats(0, 1), st.lists(st.booleans(), max_size=59))
def test_few_counts_are_a_mean_with_the_prior(prior, hits):
    found = Acceptance()
    assert found.probability("key", prior) == prior
    for hit in hits:
        found.observe("key", hit)
    assert found.probability("key", 0.3) == pytest.approx((4 * prior + sum(hits)) / (4 + len(hits)))


def test_old_counts_fade_and_a_new_text_softens_them():
    found, soft = Acceptance(), Acceptance()
    for one in (found, soft):
        for _ in range(500):
            one.observe("key", True)
        assert one.probability("key", 0.5) > 0.95
    soft.soften()
    for one in (found, soft):
        for _ in range(20):
            one.observe("key", False)
    assert soft.probability("key", 0.5) < 0.5 < found.probability("key", 0.5)
    for _ in range(300):
        found.observe("key", False)
    assert found.probability("key", 0.5) < 0.02
