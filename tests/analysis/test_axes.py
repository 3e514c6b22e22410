"""Axis types: equal axes get equal types, whatever reshapes lie between them."""

import math

import pytest
import torch
from elision.passes.analysis.axes import AxisTypes, aligned, find
from elision.passes.ir.fx import FxGraph
from hypothesis import given, settings
from hypothesis import strategies as st


class Apply(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def types(function, *args, dynamic_shapes=None):
    graph = FxGraph.trace(Apply(function), args, dynamic_shapes=dynamic_shapes)
    return graph, AxisTypes(graph)


def ends(function, *args, **kwargs):
    """Types of the first input and of the first output."""
    graph, axes = types(function, *args, **kwargs)
    return axes.types(graph.inputs[0]), axes.types(graph.outputs[0])


def test_length_one_is_the_empty_product():
    before, after = ends(lambda x: x.unsqueeze(1) * 2, torch.ones(3, 5))
    assert after == [before[0], (), before[1]]


def test_broadcasting_equates_axes_of_equal_length_only():
    graph, axes = types(lambda x, y: x + y, torch.ones(3, 5), torch.ones(5))
    x, y = graph.inputs
    assert axes.type(x, 1) == axes.type(y, 0) != axes.type(x, 0)


def test_heads_split_and_join_give_the_width_back():
    def heads(x):
        q = x.reshape(2, 7, 4, 8).transpose(1, 2)
        return q.transpose(1, 2).reshape(2, 7, 32)

    before, after = ends(heads, torch.ones(2, 7, 32))
    assert before == after
    assert len(before[2]) == 2


def test_windows_are_another_space_than_the_grid():
    def windows(x):  # [B, 8, 8, C] -> [B * 4, 16, C]
        x = x.reshape(2, 2, 4, 2, 4, 6).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(8, 16, 6)

    before, after = ends(windows, torch.ones(2, 8, 8, 6))
    assert len(after[0]) == 3 and len(after[1]) == 2
    assert after[1] not in before and after[0][0] == before[0][0]
    assert {*before[1], *before[2]} == {*after[0][1:], *after[1]}


def test_a_grid_flattened_to_tokens_comes_back_as_a_grid():
    def there_and_back(x):
        tokens = x.flatten(2).transpose(1, 2)
        return (tokens * 2).transpose(1, 2).reshape(2, 3, 4, 5)

    before, after = ends(there_and_back, torch.ones(2, 3, 4, 5))
    assert before == after


def test_a_class_token_put_in_front_and_taken_off_again():
    def joined(x):
        y = torch.cat([torch.zeros(2, 1, 6), x], dim=1)
        return torch.cat([y[:, :1], y[:, 1:] * 2], dim=1), y, y[:, 1:]

    graph, axes = types(joined, torch.ones(2, 9, 6))
    again, y, rest = graph.outputs
    assert axes.type(again, 1) == axes.type(y, 1)
    assert axes.type(rest, 1) == axes.type(graph.inputs[0], 1) != axes.type(y, 1)
    assert axes.intervals_of(y, 1) == {axes.type(rest, 1): ((1, 1), (0, 0))}


def test_symbolic_lengths():
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")

    def folded(x):  # [b, n, h, d] -> [b * n, h * d] -> [b, n, h * d] would be a guard too many for torch 2.11
        return x.unflatten(2, (4, 8)).transpose(1, 2).transpose(1, 2).flatten(2)

    before, after = ends(folded, torch.ones(2, 7, 32), dynamic_shapes=(({0: batch, 1: tokens},),))
    assert before == after


def test_contraction_is_not_an_output_axis():
    graph, axes = types(lambda x, w: x @ w, torch.ones(2, 3, 4), torch.ones(4, 4))
    x, w = graph.inputs
    assert axes.type(x, 2) == axes.type(w, 0) != axes.type(graph.outputs[0], 2)


@given(st.lists(st.sampled_from([1, 2, 3, 4, 5, 6]), min_size=2, max_size=5), st.data())
@settings(max_examples=40, deadline=None)
def test_law_a_reshape_and_its_inverse_keep_the_types(shape, data):
    flat = math.prod(shape)
    cut = data.draw(st.integers(0, len(shape)))
    middle = [math.prod(shape[:cut]), math.prod(shape[cut:])]
    assert math.prod(middle) == flat
    before, after = ends(lambda x: (x.reshape(middle) + 1).reshape(shape), torch.ones(shape))
    assert before == after


@given(st.permutations([2, 3, 5, 7]))
@settings(max_examples=20, deadline=None)
def test_law_types_follow_a_permutation(order):
    perm = [[2, 3, 5, 7].index(d) for d in order]
    before, after = ends(lambda x: x.permute(perm) * 1.5, torch.ones(2, 3, 5, 7))
    assert after == [before[p] for p in perm]


def test_alignment_takes_the_smallest_groups():
    graph, axes = types(lambda x: x.reshape(2, 3, 20), torch.ones(6, 4, 5))
    x = [find(a) for a in axes._of(graph.inputs[0]) if a is not None]
    y = [find(a) for a in axes._of(graph.outputs[0]) if a is not None]
    assert [(len(a), len(b)) for a, b in aligned(x, y)] == [(1, 2), (2, 1)]


@pytest.mark.parametrize("count", [40, 400])
def test_two_passes_type_every_value_of_a_long_chain(count):
    def chain(x):
        for _ in range(count):
            x = (x.reshape(2, 5, 2, 4) + 1).transpose(1, 2).transpose(1, 2).reshape(2, 5, 8)
        return x

    before, after = ends(chain, torch.ones(2, 5, 8))
    assert before == after
