"""The torch.fx view's primitives for turning one graph into another: parts, inputs, plain ops, signature, lengths."""

import numpy as np
import pytest
import torch
from elision.passes.errors import ElisionError, Refused
from elision.passes.ir.fx import FxGraph

DYNAMIC = torch.export.Dim.AUTO


class Sums(torch.nn.Module):
    """ids [B, S] and x [B, T, 4] -> rows of a table by position [S, 4], and x plus a number of its length."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.arange(40.0).reshape(10, 4), requires_grad=False)

    def forward(self, ids, x):
        rows = self.table[torch.arange(ids.shape[1])]
        return rows[None] + ids[..., None], x.reshape(x.shape[0] * x.shape[1], 4) * 2.0


def sums():
    args = (torch.ones(2, 3).long(), torch.ones(2, 5, 4))
    shapes = ({0: DYNAMIC, 1: DYNAMIC}, {0: DYNAMIC, 1: DYNAMIC})
    return FxGraph.trace(Sums(), args, dynamic_shapes=shapes)


def rows(graph):
    return next(v for v in graph.values() if v.producer and v.producer.kind in ("gather", "embedding"))


def test_evaluate_runs_only_what_is_behind_the_values():
    graph = sums()
    before = graph.text()
    for length in (1, 4, 10):
        (found,) = graph.evaluate([rows(graph)], {graph.inputs[0]: np.zeros((1, length), np.int64)})
        np.testing.assert_array_equal(found, np.arange(40.0).reshape(10, 4)[:length])
    assert graph.text() == before
    with pytest.raises(ElisionError, match="cannot be evaluated without the input %x"):
        graph.evaluate([graph.outputs[1]], {graph.inputs[0]: np.zeros((1, 2), np.int64)})
    with pytest.raises(ElisionError, match=r"the graph does not run: .*out of (range|bounds)"):
        graph.evaluate([rows(graph)], {graph.inputs[0]: np.zeros((1, 11), np.int64)})


def test_bfloat16_goes_in_and_comes_out_as_ml_dtypes():
    graph = FxGraph.trace(torch.nn.Tanh(), (torch.ones(3, dtype=torch.bfloat16),))
    array = torch.tensor([1.0, -2.0, 0.5]).bfloat16().view(torch.int16).numpy()
    ml_dtypes = pytest.importorskip("ml_dtypes")
    (found,) = graph.evaluate(graph.outputs, {graph.inputs[0]: array.view(ml_dtypes.bfloat16)})
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), np.tanh([1.0, -2.0, 0.5]), atol=5e-3)


def test_a_length_is_fixed_everywhere():
    graph = sums()
    graph.fix_length(graph.inputs[0], 0, 1)
    ids, x = graph.inputs
    assert ids.shape[0] == 1
    assert graph.outputs[0].shape[0] == 1
    graph.fix_length(x, 0, 1)
    graph.verify()
    x = graph.inputs[1]
    assert graph.outputs[1].shape == (x.shape[1], 4)
    graph.fix_length(x, 0, 1)  # it is
    with pytest.raises(Refused, match="%x has length 1 along axis 0, not 3"):
        graph.fix_length(x, 0, 3)
    first, second = graph.run(torch.full((1, 2), 5), torch.ones(1, 3, 4))
    torch.testing.assert_close(first, torch.arange(8.0).reshape(1, 2, 4) + 5)
    torch.testing.assert_close(second, torch.full((3, 4), 2.0))


def test_new_inputs_plain_ops_and_a_new_signature():
    graph = sums()
    graph.fix_length(graph.inputs[0], 0, 1)
    ids, old = graph.inputs[0], rows(graph)
    place = graph.add_input("place.0", "int64", [ids.shape[1]])
    wide = graph.add_input("wide", "float32", [ids.shape[1], "W", 4])
    again = graph.add_input("again", "float32", ["W"])
    assert again.shape[0] == wide.shape[1]
    table = graph.insert_constant(np.arange(40, dtype=np.float32).reshape(1, 10, 4) * 10, "tens")
    picked = graph.insert_plain("gather", [table, place], {"axis": 1}, after=None)
    assert picked.shape == (1, ids.shape[1], 4)
    turned = graph.insert_plain("transpose", [picked], {"perm": (0, 2, 1)}, after=picked.producer)
    turned = graph.insert_plain("transpose", [turned], {"perm": (0, 2, 1)}, after=turned.producer)
    flat = graph.insert_plain("reshape", [turned], {"shape": picked.shape[1:]}, after=turned.producer)
    cast = graph.insert_plain("cast", [flat], {"dtype": "float64"}, after=flat.producer)
    back = graph.insert_plain("cast", [cast], {"dtype": "float32"}, after=cast.producer)
    graph.replace_uses(old, back)
    graph.set_signature([("input_ids", ids), ("place.0", place)], [("logits", graph.outputs[0])])
    graph.verify()
    assert graph.input_names == ["input_ids", "place.0"]
    assert [v.name for v in graph.inputs] == ["input_ids", "place_0"]
    assert graph.output_names == ["logits"]
    twin = graph.copy()
    for one in (graph, twin):
        assert one.input_names == ["input_ids", "place.0"]
        (found,) = one.to_module()(torch.ones(1, 2).long(), torch.tensor([7, 0]))
        torch.testing.assert_close(found[0], torch.tensor([[280.0, 290, 300, 310], [0, 10, 20, 30]]) + 1)


def test_lengths_of_an_input_that_goes_are_read_elsewhere():
    class Lengths(torch.nn.Module):
        def forward(self, ids, x):
            return x.relu() + torch.zeros(ids.shape[1], 1)

    shapes = ({1: DYNAMIC}, {0: DYNAMIC})
    graph = FxGraph.trace(Lengths(), (torch.ones(1, 6).long(), torch.ones(6, 2)), dynamic_shapes=shapes)
    graph.set_signature([("x", graph.inputs[1])], [("y", graph.outputs[0])])
    graph.verify()
    (found,) = graph.to_module()(-torch.ones(3, 2))
    assert found.shape == (3, 2)


def test_an_input_that_is_needed_cannot_go():
    graph = sums()
    with pytest.raises(Refused, match=r"\(%\w+\) still needs the input %ids"):
        graph.set_signature([("x", graph.inputs[1])], [("y", graph.outputs[0])])
