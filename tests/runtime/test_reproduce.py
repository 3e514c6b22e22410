"""Reproducers: written by a failing pass, replayed, and safe to open."""

from __future__ import annotations

import json

import pytest
import torch
from elision.runtime import reproduce
from hypothesis import given, settings
from hypothesis import strategies as st

import elision

from . import toys


class Attention(torch.nn.Module):
    """A little of everything that the encoder meets: views with symbolic sizes, dtypes, None, floats."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(8, 24)
        self.big = torch.nn.Linear(128, 8)
        self.register_buffer("table", torch.arange(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, count, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        y = torch.relu(y) + self.table[:count].to(torch.float32)[:, None]
        return torch.where(y > 0, y, torch.full_like(y, float("-inf"))).clamp(min=-1.0)


def failed(target, passes, example=None, **options) -> elision.ElisionError:
    with pytest.raises(elision.ElisionError) as caught:
        elision.optimize(target, passes, example, **options)
    return caught.value


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_graph_round_trip(tmp_path, dynamic):
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},) if dynamic else None
    example = (torch.randn(3, 5, 8),)
    error = failed(Attention().eval(), "toy-drop-relu,toy-crash", example, dynamic_shapes=shapes)
    path = reproduce.write(error, tmp_path / "r.json", source="a test")
    outcome = reproduce.replay(path)
    assert outcome.same
    assert outcome.found == ("KeyError", "'left'")
    document = json.loads(path.read_text())
    assert document["pipeline"] == "toy-crash,lower"  # the graph is the one that the failing pass got
    assert document["whole_pipeline"] == "toy-drop-relu,toy-crash,lower"
    graph, runner = reproduce.decode_graph(document["graph"])
    assert [op.target for op in graph.ops] == [op.target for op in error.graph.ops]
    assert runner is not None and runner(graph)[0].shape == (3, 5, 8)


def test_onnx_graph_round_trip(onnx_file, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "EMBED", 64)  # the weights are left out and made up again
    error = failed(onnx_file, "toy-drop-relu,toy-crash")
    path = reproduce.write(error, tmp_path / "r.json", source=onnx_file)
    assert json.loads(path.read_text())["graph"]["made_up_weights"]
    outcome = reproduce.replay(path)
    assert outcome.same, outcome.lines()


def test_refusals_are_replayed_too(onnx_file, tmp_path):
    error = failed(onnx_file, "toy-drop-relu{times=-1}")
    outcome = reproduce.replay(reproduce.write(error, tmp_path / "r.json"))
    assert outcome.same
    assert outcome.expected == ("Refused", "toy-drop-relu cannot put relus back")


def test_a_pass_that_was_repaired(onnx_file, tmp_path, monkeypatch):
    error = failed(onnx_file, "toy-crash")
    path = reproduce.write(error, tmp_path / "r.json")
    monkeypatch.setattr(toys.Crash, "run", toys.DropRelu.run)
    monkeypatch.setattr(toys.Crash, "Options", toys.DropRelu.Options)
    outcome = reproduce.replay(path)
    assert not outcome.same
    assert "does not fail" in outcome.lines()[1]


def test_only_errors_of_passes(tmp_path):
    with pytest.raises(elision.ElisionError, match="nothing to reproduce"):
        reproduce.write(elision.ElisionError("no pass"), tmp_path / "r.json")


def test_functions_are_never_looked_up_outside_torch_ops(onnx_file, tmp_path):
    error = failed(toys.two_relus(), "toy-crash", (torch.randn(2, 8),))
    path = reproduce.write(error, tmp_path / "r.json")
    for target in (
        "os.system",
        "ops.os.system.default",
        "ops.aten.__class__.default",
        "builtins.eval",
        "ops....",
    ):
        document = json.loads(path.read_text())
        for node in document["graph"]["nodes"]:
            if node["op"] == "call_function":
                node["target"] = target
        path.write_text(json.dumps(document))
        with pytest.raises(elision.ElisionError) as caught:
            reproduce.replay(path)
        assert "\n" not in str(caught.value)
        path = reproduce.write(error, tmp_path / "r.json")


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("reproducers")
    errors = [
        failed(toys.onnx_model(), "toy-crash"),
        failed(toys.two_relus(), "toy-crash", (torch.randn(2, 8),)),
    ]
    return [reproduce.write(e, folder / f"{i}.json").read_text() for i, e in enumerate(errors)]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_broken_files_are_one_line(documents, tmp_path_factory, data):
    text = data.draw(st.sampled_from(documents))
    start = data.draw(st.integers(0, len(text)))
    length = data.draw(st.integers(0, 40))
    new = data.draw(st.text(max_size=8))
    path = tmp_path_factory.mktemp("broken") / "r.json"
    path.write_text(text[:start] + new + text[start + length :], encoding="utf-8", errors="replace")
    try:
        reproduce.replay(path)
    except elision.ElisionError as error:
        assert "\n" not in str(error)
