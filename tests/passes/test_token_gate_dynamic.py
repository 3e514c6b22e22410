"""A hard gate with as many slots as the longest sample needs, and tokens that stay because of their id."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from elision.passes import cost
from elision.passes.errors import NothingMatched, PipelineError, Refused
from elision.passes.ir.fx import FxGraph
from elision.passes.token_gate import TokenGate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import elision
from tests import reference_gate as reference
from tests.zoo.export import export, onnx_outputs, quiet, saved
from tests.zoo.outcome import real_rows
from tests.zoo.text import MODELS

from .gate_models import CLOSE, args_of, gated, run, t5, t5_graph, weights

LAWS = settings(max_examples=15, deadline=None)
ZOO = {entry.name: entry for entry in MODELS}


def ids_name(graph: FxGraph) -> str:
    return graph.input_names[0]


@cache
def dynamic(special: tuple[int, ...] = (), softmax1: bool = False) -> FxGraph:
    """`t5` with a gate before block 1, any batch, any length, and as many slots as it takes."""
    graph = t5_graph()
    named = {"protect_ids": special, "ids": ids_name(graph)} if special else {}
    options = {"layer": 1, "capacity": "dynamic", "softmax1": softmax1, **named}
    return gated(graph, arrays=weights(3), **options)[0]


def expected(args: tuple[Tensor, ...], **more: object) -> Tensor:
    made = weights(3)
    gate = reference.Gate(made["weight"], made["bias"], 1, **more)  # type: ignore[arg-type]
    with torch.no_grad():
        return reference.run(t5().inner, *args, gate, hard=True)[0]


def lengths(graph: FxGraph) -> list[int]:
    """How many keys the gated attentions of the encoder have in a run, told by spying on the ops."""
    return [op.inputs[1].shape[-2] for op in graph.ops if op.target.endswith("elision.attention")]


@LAWS
@given(
    st.lists(st.integers(2, 14), min_size=1, max_size=4),
    st.integers(0, 5),
    st.booleans(),
    st.integers(0, 99),
    st.sampled_from([(), (3, 7, 11, 12, 50)]),
)
def test_law_samples_are_alone_whatever_the_padding(
    sizes: list[int], more: int, left: bool, seed: int, special: tuple[int, ...]
) -> None:
    """All that a sample keeps stays, in any batch and with any padding, and it is what a static capacity that is large
    enough gives."""
    args = args_of(tuple(sizes), max(sizes) + more, left=left, seed=seed)
    torch.testing.assert_close(run(dynamic(special), args), expected(args, special=special), **CLOSE)


def test_the_length_is_that_of_the_longest_sample() -> None:
    graph, args = dynamic(), args_of()
    made = weights(3)
    gate = reference.Gate(made["weight"], made["bias"], 1)
    kept = []
    for row, real in zip(args[0], args[1]):
        with torch.no_grad():
            _, added, _ = reference.encode(t5().inner, row[real > 0], gate, hard=True)
        kept.append(len(added))
    (longest,) = [op for op in graph.ops if op.target.endswith("longest_row")]
    assert longest.output.shape is not None and len(set(map(str, lengths(graph)))) == 1
    feeds = dict(zip(graph.inputs, (arg.numpy() for arg in args)))
    slots = graph.evaluate([longest.output], feeds)[0]
    assert slots.tolist() == list(range(max(kept))) and len(set(kept)) > 1 and max(kept) < 14
    # Costs are those of a batch of which nothing goes: the graph does not say how much will.
    example = [arg.numpy() for arg in args]
    assert cost.estimate(graph, example_inputs=example).tokens_per_block[1:3] == [14, 14]


@torch.no_grad()
def test_exported_compiled_and_saved(tmp_path: Path) -> None:
    args, other = args_of(), args_of((9, 4, 7), 14)
    one = TokenGate(layer=1, capacity="dynamic", softmax1=True, arrays=weights(3))
    result = elision.optimize(t5(), [one], args)
    wanted = [expected(call, softmax1=True) for call in (args, other)]
    (report,) = [p for p in result.report.passes if p.name == "token-gate"]
    assert "the longest sample's of 14 tokens at most are left" in report.notes[-1]
    loaded = torch.export.load(result.save(tmp_path / "t5.pt2")).module()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(result.module, fullgraph=True, backend="aot_eager")
        for call, want in zip((args, other), wanted):
            torch.testing.assert_close(loaded(*call), want, **CLOSE)
            torch.testing.assert_close(compiled(*call), want, **CLOSE)


@pytest.mark.slow
@torch.no_grad()
def test_the_compile_backend_needs_torch_to_capture_numbers() -> None:
    args = args_of()
    one = TokenGate(layer=1, capacity="dynamic", arrays=weights(3))
    compiled = torch.compile(t5(), backend="elision", options={"passes": [one]})
    with pytest.raises(Refused, match=r"set torch\._dynamo\.config\.capture_scalar_outputs = True"):
        compiled(*args)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(t5(), backend="elision", options={"passes": [one]})
        torch.testing.assert_close(compiled(*args), expected(args), **CLOSE)


@pytest.mark.parametrize("name", ["bert_tokens", pytest.param("modernbert", marks=pytest.mark.slow)])
def test_files_say_what_graphs_say(name: str, tmp_path: Path) -> None:
    """Outputs by token too: deleted ones read what they had at the gate."""
    entry = ZOO[name]
    call = entry.build(3)
    program = export(entry.build(2), entry.dynamic_shapes())
    file = saved(program, list(entry.inputs(2)), tmp_path / "model.onnx")
    found = []
    for capacity in ("dynamic", 0.99):
        one = TokenGate(layer=1, capacity=capacity, protect_ids=(5, 9), arrays=weights(3))
        result = elision.optimize(str(file), [one], entry.build(2).args, force=True)
        found.append(real_rows(entry, call, onnx_outputs(result.model, call)[0]))
    np.testing.assert_allclose(*found, atol=2e-5, rtol=1e-4)
    with quiet():
        graph = FxGraph.from_export(export(entry.build(2), entry.dynamic_shapes()))
    options = {"layer": 1, "capacity": "dynamic", "protect_ids": (5, 9), "ids": ids_name(graph)}
    traced = run(gated(graph, arrays=weights(3), **options)[0], call.args)
    np.testing.assert_allclose(real_rows(entry, call, traced.numpy()), found[0], atol=5e-4, rtol=1e-3)


def test_a_batch_of_which_nothing_stays() -> None:
    """Gates that delete all, and no end that always stays: one slot, which holds nobody."""
    nothing = {"weight": torch.zeros(32), "bias": torch.tensor([-20.0])}
    graph, _ = gated(t5_graph(), layer=1, capacity="dynamic", last=0, softmax1=True, arrays=nothing)
    assert run(graph, args_of()).isfinite().all()


# ---- by id -----------------------------------------------------------------------------------------------
def test_tokens_stay_because_of_their_id() -> None:
    """Wherever they stand; padding of such an id is still padding."""
    args = args_of((14, 9, 11), 14, seed=4)
    args[0][args[1] == 0] = 17
    args[0][:, 3] = 17
    graph, _ = gated(t5_graph(), layer=1, capacity=0.9, arrays=weights(3))
    special = (17, int(args[0][0, 0]))
    options = {"layer": 1, "capacity": 0.9, "protect_ids": special, "ids": ids_name(t5_graph())}
    kept, _ = gated(t5_graph(), arrays=weights(3), **options)
    wanted = expected(args, special=special, capacity=0.9)
    torch.testing.assert_close(run(kept, args), wanted, **CLOSE)
    assert not torch.allclose(run(graph, args), wanted, atol=1e-3)


def test_soft_gates_do_not_touch_them_either() -> None:
    args, made = args_of(seed=4), weights(3)
    special = tuple(args[0][0, 2:5].tolist())
    options = {"mode": "soft", "layer": 1, "protect_ids": special, "ids": ids_name(t5_graph(False))}
    logits, gate = run(gated(t5_graph(False), arrays=made, **options)[0], args)
    one = reference.Gate(made["weight"], made["bias"], 1, special=special)
    with torch.no_grad():
        wanted, gates = reference.run(t5().inner, *args, one, hard=False)
    torch.testing.assert_close(gate, gates, **CLOSE)
    torch.testing.assert_close(logits, wanted, **CLOSE)
    assert (gate[0, 2:5] == 0).all()


def test_more_protected_tokens_than_slots_is_no_result() -> None:
    args = args_of((14, 9), 14)
    args[0][0, :10] = 17
    options = {"layer": 1, "capacity": 0.5, "protect_ids": (17,), "ids": ids_name(t5_graph())}
    found = run(gated(t5_graph(), arrays=weights(3), **options)[0], args)
    assert found[0].isnan().all()
    torch.testing.assert_close(found[1:], expected(args, special=(17,), capacity=0.5)[1:], **CLOSE)


def test_ids_that_are_not_there_are_named() -> None:
    with pytest.raises(NothingMatched, match="no input 'input_ids' with token ids among"):
        gated(t5_graph(), layer=1, protect_ids=(1,))
    decoder = t5_graph().input_names[2]
    with pytest.raises(Refused, match=r"does not have one id for each of the .* tokens"):
        gated(t5_graph(), layer=1, protect_ids=(1,), ids=decoder)
    with pytest.raises(PipelineError, match="protect_ids"):
        TokenGate(protect_ids=("a",))
