"""The example of a pass that adds an input, and what docs/own_pass.md says of hooks."""

from __future__ import annotations

import runpy
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from elision.passes import Outcome, PassContext, VerificationError, base, testing
from elision.passes.base import Pass
from onnx import TensorProto, helper

import elision

ROOT = Path(__file__).parents[2]
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pass of examples/own_input.py, registered for one test."""
    monkeypatch.setattr(base, "_REGISTRY", base.known_passes())
    return runpy.run_path(str(ROOT / "examples" / "own_input.py"))["PickSamples"]


def test_samples_are_picked_in_torch(own: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
    result = elision.optimize(model, "pick-samples", (X,))
    assert result.report.passes[0].drift[0].max_abs == 0
    torch.testing.assert_close(result.module(X, torch.tensor([3, 0])), model(X)[[3, 0]])


def test_samples_are_picked_in_onnx(own: Any) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [5, 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    after = testing.apply(testing.capture(model), own(input="rows"), (X.numpy(),))
    assert after.input_names == ["x", "rows"]
    (found,) = after.evaluate(after.outputs, dict(zip(after.inputs, [X.numpy(), np.array([4, 4, 1])])))
    np.testing.assert_array_equal(found, X.relu().numpy()[[4, 4, 1]])


def test_a_wrong_one_is_found_out(own: Any) -> None:
    class Wrong(own):
        def run(self, graph: Any, context: PassContext) -> Outcome:
            outcome = super().run(graph, context)
            outcome.signature.after[-1] = outcome.signature.after[-1][::-1].copy()
            outcome.signature.added = None
            return outcome

    with pytest.raises(VerificationError, match="pick-samples must preserve the function"):
        testing.apply(testing.capture(torch.nn.Linear(4, 2).eval(), (X,)), Wrong(), (X,))


def test_the_page_shows_the_example_and_names_every_hook() -> None:
    page = (ROOT / "docs" / "own_pass.md").read_text(encoding="utf-8")
    text = (ROOT / "examples" / "own_input.py").read_text(encoding="utf-8")
    assert text[text.index("@register") : text.index("if __name__")].strip() in page
    hooks = {name for name in vars(Pass) if not name.startswith("_")} - {"with_options", "key"}
    hooks |= {entry.name for kind in (Outcome, PassContext) for entry in fields(kind)}
    assert not {name for name in hooks if f"`{name}" not in page and f" `{name}" not in page}
