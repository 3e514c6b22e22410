"""The lowering table, and `lower` on torch graphs: kernels where they pay, ATen for MLIR, reasons in the report."""

from __future__ import annotations

import pytest
import torch
from elision.kernels import OPS
from elision.kernels.kernel import Kernel
from elision.passes import lower as lowering_pass
from elision.passes.base import PassContext
from elision.passes.errors import NothingMatched, PipelineError
from elision.passes.ir.fx import FxGraph
from elision.passes.lowering import (
    ONNXRUNTIME,
    TARGETS,
    TORCH_CPU,
    TORCH_CUDA,
    Choice,
    ShapeClass,
    Table,
    attention_class,
    dialect_class,
    rows_class,
)
from elision.passes.lowering_defaults import DEFAULTS
from elision.passes.pipeline import parse
from elision.passes.testing import report


# ---- the table ---------------------------------------------------------------------------------------
def table(**choices: str) -> Table:
    """{class text: form} for match_tokens on torch-cpu."""
    classes = {ShapeClass.parse(text): Choice(form) for text, form in choices.items()}
    return Table({("match_tokens", TORCH_CPU): classes}, "a test")


def test_classes_are_read_as_they_are_written():
    wanted = attention_class(
        "float32", (2, 6, 200, 60), (2, 6, 190, 60), masked=False, sized=True, causal=False
    )
    assert str(wanted) == "float32 sized tokens=256 width=64"
    assert ShapeClass.parse(str(wanted)) == wanted
    assert str(rows_class("float16", (4, 257, 384))) == "float16 rows=1024 width=512"
    with pytest.raises(ValueError, match="no shape class"):
        ShapeClass.parse("float32 tokens=0")


def test_a_symbolic_length_says_nothing():
    import sympy

    n = sympy.Symbol("n")
    assert str(dialect_class("match_tokens", [(n, n, 64)], ["float32"], {})) == "float32 width=64"
    assert str(dialect_class("merge_tokens", [(2, 100, 64)], ["float32"], {"axis": 1})) == (
        "float32 tokens=128 width=64"
    )


def test_the_nearest_class_with_the_same_words_decides():
    found = table(**{"float32 tokens=64 width=64": "reference", "float32 tokens=1024 width=64": "kernel"})

    def form(text: str) -> str | None:
        choice = found.choose("match_tokens", TORCH_CPU, ShapeClass.parse(text))
        return None if choice is None else choice.form

    assert form("float32 tokens=64 width=64") == "reference"
    assert form("float32 tokens=128 width=32") == "reference"
    assert form("float32 tokens=4096 width=64") == "kernel"
    assert form("float16 tokens=64 width=64") is None
    assert found.choose("match_tokens", TORCH_CUDA, ShapeClass.parse("float32")) is None


def test_what_a_table_lacks_its_fallback_has():
    own = Table.from_json(table(**{"float32 tokens=64": "reference"}).to_json(), "a file", DEFAULTS)
    shape = ShapeClass.of("float32", tokens=64, width=64)
    assert own.choose("match_tokens", TORCH_CPU, shape) == Choice("reference")
    assert own.choose("merge_tokens", TORCH_CPU, shape) == DEFAULTS.choose("merge_tokens", TORCH_CPU, shape)
    assert own.digest != DEFAULTS.digest
    assert own.digest == Table.from_json(own.to_json(), "another place", DEFAULTS).digest


@pytest.mark.parametrize(
    "data",
    [
        [],
        {"torch-cpu": []},
        {"nowhere": {}},
        {"torch-cpu": {"match_tokens": {"float32": "kernel"}}},
        {"torch-cpu": {"match_tokens": {"float32": [1, 2]}}},
        {"torch-cpu": {"match_tokens": {"float32 tokens=many": ["kernel", 1.0]}}},
        {"torch-cpu": {"match_tokens": {"float32": ["kernel", "fast"]}}},
    ],
)
def test_what_is_no_table(data):
    with pytest.raises(ValueError):
        Table.from_json(data, "a test")


def test_the_shipped_table_is_about_ops_that_exist():
    forms = {TORCH_CPU: {"kernel", "reference"}, TORCH_CUDA: {"kernel", "reference"}}
    for (op, target), classes in DEFAULTS.entries.items():
        assert target in TARGETS and classes
        if target != ONNXRUNTIME:
            assert op in OPS
            assert {choice.form for choice in classes.values()} <= forms[target]


# ---- torch graphs ------------------------------------------------------------------------------------
class Matches(torch.nn.Module):
    """Two ops of the dialect, of which one has a kernel in these tests."""

    def forward(self, x):
        slot, keep, source = torch.ops.elision.match_tokens(x, r=2)
        return torch.ops.elision.merge_tokens(x, None, slot, keep, source, axis=1)[0]


X = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def kernels(monkeypatch):
    """One kernel for torch-cpu, that counts its calls; what it refuses can be set."""
    calls, state = [], {"refuses": ""}
    library = torch.library.Library("elision_cpu_test", "DEF")
    library.define(OPS["match_tokens"].schema)

    def run(metric, **attrs):
        calls.append(attrs)
        return OPS["match_tokens"].spelled_out(metric, **attrs)

    library.impl("match_tokens", run, "CompositeExplicitAutograd")
    torch.library.register_fake(
        "elision_cpu_test::match_tokens", OPS["match_tokens"].spelled_out, lib=library
    )

    class Counted(Kernel):
        @property
        def overload(self):
            return torch.ops.elision_cpu_test.match_tokens.default

    kernel = Counted("match_tokens", TORCH_CPU, lambda *_: state["refuses"])
    monkeypatch.setattr(lowering_pass, "kernels_of", lambda target: ({"match_tokens": kernel}, ""))
    yield calls, state
    library._destroy()


def test_a_kernel_takes_the_place_of_its_op(kernels):
    calls, _ = kernels
    before = FxGraph.trace(Matches(), (X,))
    done = report(before, "lower", (X,))
    (single,) = done.passes
    assert single.changed
    assert single.statistics == {"match_tokens as torch-cpu kernel": 1, "merge_tokens as ATen": 1}
    assert single.notes == ["merge_tokens: no kernel for torch-cpu"]
    assert calls
    targets = [op.target for op in done.graph.ops]
    assert targets == ["elision_cpu_test.match_tokens", "elision.merge_tokens"]
    torch.testing.assert_close(done.graph.run(X), Matches()(X), rtol=0, atol=0)


def test_a_kernel_that_refuses_and_one_that_is_slower_stay_away(kernels):
    _, state = kernels
    slow = table(**{"float32 tokens=16 width=8": "reference"})
    done = report(FxGraph.trace(Matches(), (X,)), "lower", (X,), table=slow)
    assert not done.changed
    assert "match_tokens: ATen is as fast at this size" in done.passes[0].notes
    state["refuses"] = "too narrow"
    done = report(FxGraph.trace(Matches(), (X,)), "lower", (X,))
    assert not done.changed
    assert "match_tokens: too narrow" in done.passes[0].notes


def test_on_a_gpu_only_what_was_measured_there_is_taken(kernels):
    done = report(FxGraph.trace(Matches(), (X,)), "lower{target=torch-cuda}", (X,))
    assert not done.changed
    assert any("not measured on this GPU" in note for note in done.passes[0].notes)
    measured = {"torch-cuda": {"match_tokens": {"float32 tokens=16 width=8": ["kernel", 2.0]}}}
    found = Table.from_json(measured, "a test")
    done = report(FxGraph.trace(Matches(), (X,)), "lower{target=torch-cuda}", (X,), table=found)
    assert done.passes[0].statistics["match_tokens as torch-cuda kernel"] == 1


def test_nothing_to_lower_is_said_and_is_no_error():
    done = report(FxGraph.trace(torch.nn.ReLU(), (X,)), "lower", (X,))
    assert not done.changed
    assert any("the graph has no op of the dialect" in note for note in done.passes[0].notes)


def test_targets_of_other_graphs_and_unknown_ones():
    graph = FxGraph.trace(torch.nn.ReLU(), (X,))
    with pytest.raises(NothingMatched, match="onnxruntime runs no torch graphs"):
        report(graph, "lower{target=onnxruntime}", (X,))
    with pytest.raises(PipelineError, match="did you mean 'torch-cuda'"):
        parse("lower{target=torch-cud}")


@pytest.mark.parametrize("dynamic", [False, True])
def test_mlir_gets_aten_only(dynamic):
    shapes = ({0: torch.export.Dim("batch", min=1, max=8)},) if dynamic else None
    graph = FxGraph.trace(Matches(), (X,), dynamic_shapes=shapes)
    done = report(graph, "lower{target=mlir}", (X,))
    assert done.changed
    assert not done.graph.ops_of("elision")
    torch.testing.assert_close(done.graph.run(X), Matches()(X), rtol=0, atol=0)


def test_kernels_are_understood_like_their_ops():
    """Cost and kind of a lowered op are those of the op."""
    from elision.passes import cost

    if not lowering_pass.kernels_of(TORCH_CPU)[0]:
        pytest.skip("the C++ kernels are not built")
    before = FxGraph.trace(Matches(), (X,))
    force = Table(
        {("match_tokens", TORCH_CPU): {ShapeClass.parse("float32"): Choice("kernel")}}, "a test", DEFAULTS
    )
    done = report(before, "lower", (X,), table=force)
    assert done.graph.ops_of("elision")[0].target == "elision_cpu.match_tokens"
    assert cost.estimate(done.graph).flops == cost.estimate(before).flops


def test_backend_key_holds_the_table(monkeypatch):
    from elision.runtime import backend

    ours = {"force": False}
    first = backend.cache_key([], ours, {})["post_grad_custom_pre_pass"].uuid()
    monkeypatch.setattr(backend, "table_for", lambda host: table(**{"float32 tokens=64": "reference"}))
    assert backend.cache_key([], ours, {})["post_grad_custom_pre_pass"].uuid() != first


def test_context_default_is_the_shipped_table():
    assert PassContext().table is None
    assert lowering_pass.default_table() is DEFAULTS
