"""elision.testing and the worked example, on torch and ONNX graphs alike."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from elision.passes import base, testing
from elision.passes.errors import ElisionError, NothingMatched
from elision.passes.ir.graph import Graph
from onnx import TensorProto, helper

ROOT = Path(__file__).parents[2]
X = torch.arange(24.0).reshape(2, 3, 4)


class Model(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.transpose(1, 2).transpose(2, 1).relu()
        return y.permute(1, 2, 0).permute(2, 0, 1)


def onnx_model() -> Any:
    nodes = [
        helper.make_node("Transpose", ["x"], ["a"], perm=[0, 2, 1]),
        helper.make_node("Transpose", ["a"], ["b"], perm=[0, 2, 1]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Transpose", ["c"], ["d"], perm=[1, 2, 0]),
        helper.make_node("Transpose", ["d"], ["y"], perm=[2, 0, 1]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3, 4]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pass of examples/own_pass.py, registered for one test."""
    monkeypatch.setattr(base, "_REGISTRY", base.known_passes())  # a copy, with the built-in passes loaded
    return runpy.run_path(str(ROOT / "examples" / "own_pass.py"))["DropTransposes"]


def test_own_pass_on_torch(own: Any) -> None:
    before = testing.capture(Model(), (X,))
    after = testing.apply(before, "drop-transposes", (X,))
    testing.expect_diff(
        before,
        after,
        """
        ...
        - %transpose: float32[2, 4, 3] = aten.transpose(%x) {perm=[0, 2, 1]}
        - %transpose_1: float32[2, 3, 4] = aten.transpose(%transpose) {perm=[0, 2, 1]}
        - %relu: float32[2, 3, 4] = aten.relu(%transpose_1) {fn=relu}
        + %relu: float32[2, 3, 4] = aten.relu(%x) {fn=relu}
        - %permute: float32[3, 4, 2] = aten.permute(%relu) {perm=[1, 2, 0]}
        - %permute_1: float32[2, 3, 4] = aten.permute(%permute) {perm=[2, 0, 1]}
        - return %permute_1
        + return %relu
        """,
    )
    assert testing.drift(before, after, (X,))[0].max_abs == 0


def test_own_pass_on_onnx(own: Any) -> None:
    before = testing.capture(onnx_model())
    report = testing.report(before, own(), (X.numpy(),))
    assert report.passes[0].statistics == {"pairs": 2}
    assert [op.kind for op in report.graph.ops] == ["elementwise"]
    assert report.drift is not None and report.drift[0].max_abs == 0
    assert report.graph.outputs[0].name == "y"


def test_own_pass_takes_its_option_and_says_when_nothing_matches(own: Any) -> None:
    before = testing.capture(Model(), (X,))
    once = testing.apply(before, own(limit=1), (X,))
    assert len(once.ops_of("transpose")) == 2
    bare = testing.capture(torch.nn.ReLU(), (X,))
    with pytest.raises(NothingMatched, match="drop-transposes: no two transposes"):
        testing.apply(bare, own())


def test_example_runs_as_a_script(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_REGISTRY", base.known_passes())  # a copy, with the built-in passes loaded
    monkeypatch.setattr(sys, "argv", ["own_pass.py"])
    runpy.run_path(str(ROOT / "examples" / "own_pass.py"), run_name="__main__")
    assert "{'pairs': 1}" in capsys.readouterr().out


def test_example_is_about_thirty_lines(own: Any) -> None:
    text = (ROOT / "examples" / "own_pass.py").read_text()
    body = text[text.index("@register") : text.index("if __name__")].strip().splitlines()
    assert len(body) <= 32


def test_docs_show_the_example_as_it_is() -> None:
    text = (ROOT / "examples" / "own_pass.py").read_text()
    body = text[text.index("@register") : text.index("if __name__")].strip()
    assert body in (ROOT / "docs" / "own_pass.md").read_text()


def test_the_test_in_the_docs_passes(own: Any) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own_pass.md").read_text(), re.DOTALL)
    (block,) = [text for text in blocks if "def test_" in text]

    class Small(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.transpose(1, 2).transpose(2, 1).relu()

    scope: dict[str, Any] = {"torch": torch, "Model": Small}
    exec(block, scope)
    scope["test_drop_transposes"]()
    assert len(block.strip().splitlines()) <= 18


@pytest.mark.parametrize(
    "target",
    [
        lambda: onnx_model(),
        lambda: onnx_ir.from_proto(onnx_model()),
        lambda: torch.export.export(Model(), (X,)),
        lambda: testing.capture(Model(), (X,)),
        lambda: Model(),
    ],
)
def test_capture_takes_every_form(target: Any) -> None:
    graph = testing.capture(target(), (X,))
    assert isinstance(graph, Graph)
    np.testing.assert_array_equal(testing.run(graph, (X,))[0], X.numpy())


def test_capture_and_run_refuse_other_things() -> None:
    with pytest.raises(ElisionError, match="cannot capture a graph from int"):
        testing.capture(3)
    with pytest.raises(ElisionError, match="the graph takes 1 inputs"):
        testing.run(testing.capture(onnx_model()), ())


def test_capture_leaves_the_original(own: Any) -> None:
    model = onnx_ir.from_proto(onnx_model())
    testing.apply(testing.capture(model), own())
    assert len(list(model.graph)) == 5


def test_a_diff_that_is_not_expected_shows_both(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXPECTTEST_ACCEPT", raising=False)
    before = testing.capture(Model(), (X,))
    testing.expect_diff(before, before, "(no difference)")
    with pytest.raises(AssertionError, match=r"(?s)expected\nsomething\n--- actual\n\.\.\.\n- %transpose"):
        testing.expect_diff(before, testing.apply(before, own()), "something")


def test_accept_mode_rewrites_the_literal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "accepted.py"
    source.write_text(
        "from elision.passes.testing import expect_diff\n"
        "def check(a, b):\n"
        '    expect_diff(a, b, """\\\nold\n""")\n'
    )
    monkeypatch.setenv("EXPECTTEST_ACCEPT", "1")
    monkeypatch.syspath_prepend(tmp_path)
    import accepted  # type: ignore[import-not-found]

    before = testing.capture(torch.nn.ReLU(), (X,))
    accepted.check(before, testing.capture(torch.nn.Tanh(), (X,)))
    monkeypatch.delenv("EXPECTTEST_ACCEPT")
    scope: dict[str, Any] = {}
    exec(source.read_text(), scope)  # the rewritten test passes without accepting
    scope["check"](before, testing.capture(torch.nn.Tanh(), (X,)))
    assert "aten.tanh" in source.read_text()
