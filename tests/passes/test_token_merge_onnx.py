"""Token merging on ONNX graphs, run by plain onnxruntime: the same laws as on torch graphs."""

import numpy as np
import onnxruntime
import pytest
import torch
from elision.passes.base import PassContext
from elision.passes.ir.onnx import OnnxGraph
from elision.passes.onnx.io import load_model, save_model
from elision.passes.onnx.normalise import normalise
from elision.passes.token_merge import TokenMerge

from ..analysis import toys
from .test_token_merge import equal_pairs, without_positions


def exported(module, args, path, dynamic_shapes=None):
    torch.onnx.export(
        module.eval().requires_grad_(False),  # a mask with gradients stops the exporter
        args,
        str(path),
        dynamo=True,
        opset_version=18,
        dynamic_shapes=dynamic_shapes,
        verbose=False,
    )
    model = load_model(path)
    normalise(model)
    return OnnxGraph(model)


def run(graph, path, args):
    graph.verify()
    save_model(graph.model, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, {name: arg.numpy() for name, arg in zip(names, args)})


@pytest.mark.parametrize("where", ["after", "around"])
@pytest.mark.parametrize(("head", "prefix"), [("tokens", 0), ("first", 1), ("mean", 1), ("grid", 3)])
def test_law_merging_equal_tokens_changes_nothing(tmp_path, where, head, prefix):
    torch.manual_seed(0)
    module = without_positions(toys.Encoder(prefix=prefix, head=head))
    image = equal_pairs(3)
    batch = torch.export.Dim("batch", min=1, max=16)
    graph = exported(module, (image,), tmp_path / "before.onnx", dynamic_shapes=({0: batch},))
    same = {"proportional": True, "destinations": "bipartite", "order": "original"}
    TokenMerge(r=3, where=where, **same).run(graph, PassContext())
    for count in (3, 1):
        found = run(graph, tmp_path / "after.onnx", (image[:count],))[0]
        with torch.no_grad():
            np.testing.assert_allclose(found, module(image[:count]).numpy(), atol=3e-5, rtol=1e-3)


def test_both_hosts_merge_the_same_tokens(tmp_path):
    from elision.passes.ir.fx import FxGraph

    torch.manual_seed(0)
    module, image = toys.Encoder(prefix=1, head="first").eval(), torch.randn(2, 3, 8, 8)
    context = PassContext(want_map=True)
    onnx_graph = exported(module, (image,), tmp_path / "before.onnx")
    fx_graph = FxGraph.trace(module, (image,))
    for graph in (onnx_graph, fx_graph):
        TokenMerge(r=3).run(graph, context)
    with torch.no_grad():
        expected = [tensor.numpy() for tensor in fx_graph.run(image)]
    found = run(onnx_graph, tmp_path / "after.onnx", (image,))
    np.testing.assert_allclose(found[0], expected[0], atol=2e-5, rtol=1e-3)
    np.testing.assert_array_equal(found[1], expected[1])


def test_padding_and_neighbours_do_not_matter(tmp_path):
    torch.manual_seed(1)
    module, (ids, valid) = toys.Text(), toys.text_inputs(3)
    graph = exported(module, (ids, valid), tmp_path / "before.onnx")
    TokenMerge(r=2).run(graph, PassContext())
    whole = run(graph, tmp_path / "after.onnx", (ids, valid))[0]
    other = torch.where(valid.bool(), ids, (ids * 3 + 5) % 50)
    again = run(graph, tmp_path / "after.onnx", (other, valid))[0]
    np.testing.assert_allclose(again, whole, atol=1e-6)
