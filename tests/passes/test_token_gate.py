"""The delete gate against the paper's equations, and its laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from elision.passes.errors import NothingMatched, PipelineError, Refused
from elision.passes.token_gate import TokenGate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import elision
from tests import reference_gate as reference

from ..analysis import toys
from .gate_models import CLOSE, args_of, gated, kept, run, t5, t5_graph, weights

LAWS = settings(max_examples=15, deadline=None)


def expected(args: tuple[Tensor, ...], made: dict[str, Tensor], *, hard: bool, **more: object):
    gate = reference.Gate(made["weight"], made["bias"], **more)  # type: ignore[arg-type]
    with torch.no_grad():
        return reference.run(t5().inner, *args, gate, hard=hard)


@pytest.mark.parametrize(
    ("layer", "softmax1"), [(1, False), (2, True), pytest.param(0, False, marks=pytest.mark.slow)]
)
def test_soft_gates_are_the_papers(layer: int, softmax1: bool) -> None:
    made = weights(layer)
    graph, outcome = gated(t5_graph(False), mode="soft", layer=layer, softmax1=softmax1, arrays=made)
    args = args_of()
    logits, gate = run(graph, args)
    wanted, gates = expected(args, made, hard=False, layer=layer, softmax1=softmax1)
    torch.testing.assert_close(gate, gates, **CLOSE)
    torch.testing.assert_close(logits, wanted, **CLOSE)
    assert (gates < -15).any() and (gates > -15).any()
    assert outcome.statistics["attention"] == 3 - layer + 2
    assert not torch.allclose(logits, run(t5(), args), atol=1e-2)


@pytest.mark.parametrize(
    ("layer", "capacity", "softmax1"),
    [(0, 0.9, False), (1, 0.5, True), pytest.param(2, 0.3, False, marks=pytest.mark.slow)],
)
def test_hard_gates_take_tokens_out(layer: int, capacity: float, softmax1: bool) -> None:
    made = weights(layer, 0.3)
    options = {"layer": layer, "capacity": capacity, "softmax1": softmax1}
    graph, _ = gated(t5_graph(False), arrays=made, **options)
    args = args_of()
    wanted, _ = expected(args, made, hard=True, **options)
    torch.testing.assert_close(run(graph, args), wanted, **CLOSE)
    keys = [op.inputs[1].shape[-2] for op in graph.ops if op.target.endswith("elision.attention")]
    left = 14 - int(14 * (1 - capacity)) + softmax1
    assert keys == [left] * (3 - layer + 2)


@LAWS
@given(
    st.lists(st.integers(2, 14), min_size=1, max_size=4), st.integers(0, 5), st.booleans(), st.integers(0, 99)
)
def test_law_samples_are_alone_whatever_the_padding(
    lengths: list[int], more: int, left: bool, seed: int
) -> None:
    """Any batch and any padding, on either side: each sample comes out as alone and without padding."""
    graph = kept(0.6)
    args = args_of(tuple(lengths), max(lengths) + more, left=left, seed=seed)
    wanted, _ = expected(args, weights(3), hard=True, layer=1, capacity=0.6)
    if left:  # the reference numbers a sample's positions from 0; T5's biases are of distances
        assert args[1][:, -1].all()
    torch.testing.assert_close(run(graph, args), wanted, **CLOSE)


def test_a_number_of_slots() -> None:
    made = weights(4, 5.0)  # nearly all stay, so that room is what decides
    graph, _ = gated(t5_graph(False), layer=1, capacity=7, arrays=made)
    args = args_of()
    one = reference.Gate(made["weight"], made["bias"], 1)
    with torch.no_grad():
        gates = [one.values(reference_stream(row[real > 0])) for row, real in zip(args[0], args[1])]
    assert min(int((gate > -15).sum()) for gate in gates) > 7
    logits = run(graph, args)
    for row in range(3):
        share = 7 / len(gates[row])
        with torch.no_grad():
            gate = reference.Gate(made["weight"], made["bias"], 1, capacity=share)
            alone = tuple(arg[row : row + 1] for arg in args)
            wanted, _ = reference.run(t5().inner, *alone, gate, hard=True)
        torch.testing.assert_close(logits[row : row + 1], wanted, **CLOSE)


def reference_stream(ids: Tensor) -> Tensor:
    """What the gate before block 1 reads."""
    seen: list[Tensor] = []

    class Watch(reference.Gate):
        def values(self, hidden: Tensor, ids: Tensor | None = None) -> Tensor:
            seen.append(hidden)
            return super().values(hidden, ids)

    made = weights()
    reference.encode(t5().inner, ids, Watch(made["weight"], made["bias"], 1), hard=False)
    return seen[0]


# ---- nothing to delete -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        {"capacity": 1},
        {"threshold": "-inf"},
        {"threshold": -np.inf},
        {"threshold": -31.0, "softmax1": True},
        {"capacity": 14},
    ],
)
def test_zero_budget_leaves_the_graph_alone(options: dict) -> None:
    before = t5_graph(False)
    graph, outcome = gated(before, layer=1, **options)
    assert not outcome.changed and "nothing to delete" in outcome.notes[0]
    assert graph.text() == before.text()


def test_zero_budget_gives_the_same_bits() -> None:
    args = args_of()
    result = elision.optimize(t5(), "token-gate{layer=1 capacity=1.0}", args)
    assert torch.equal(run(result.module, args), run(t5(), args))


# ---- training --------------------------------------------------------------------------------------------
def test_training_reaches_the_gate_and_the_model() -> None:
    args = args_of()
    module = t5().requires_grad_(True)
    result = elision.optimize(module, [TokenGate(mode="soft", layer=1, softmax1=True)], args, force=True)
    trained = result.module
    named = dict(trained.named_parameters())
    assert {"elision_gate_weight", "elision_gate_bias"} <= set(named)
    logits, gate = trained(*args)
    control = elision.GateController(0.5)
    (logits.logsumexp(-1).mean() + control(gate, args[1])).backward()
    assert named["elision_gate_weight"].grad.abs().sum() > 0
    assert module.inner.encoder.block[0].layer[1].DenseReluDense.wi.weight.grad.abs().sum() > 0
    module.requires_grad_(False).zero_grad()


def test_gradients_are_those_of_the_equations() -> None:
    made, args = weights(1), args_of()
    graph, _ = gated(t5_graph(False), mode="soft", layer=1, arrays=made)
    module = graph.to_module()
    logits, gate = module(*args)
    (logits.square().mean() + gate.mean()).backward()
    weight = made["weight"].clone().requires_grad_()
    bias = made["bias"].clone().requires_grad_()
    wanted, gates = reference.run(t5().inner, *args, reference.Gate(weight, bias, 1), hard=False)
    (wanted.square().mean() + gates.mean()).backward()
    found = dict(module.named_parameters())
    torch.testing.assert_close(found["elision_gate_weight"].grad, weight.grad, atol=1e-5, rtol=5e-3)
    torch.testing.assert_close(found["elision_gate_bias"].grad, bias.grad, atol=1e-5, rtol=5e-3)


def test_trained_gates_come_from_a_file(tmp_path) -> None:
    from safetensors.torch import save_file

    args, made = args_of(), weights(5)
    trained = gated(t5_graph(False), mode="soft", layer=1, arrays=made)[0].to_module()
    file = tmp_path / "gates.safetensors"
    save_file({n: p.detach() for n, p in trained.named_parameters() if "elision_gate" in n}, str(file))
    text = f'token-gate{{layer=1 capacity=0.7 gates="{file}"}}'
    result = elision.optimize(t5(), text, args, force=True)
    direct = gated(t5_graph(False), layer=1, capacity=0.7, arrays=made)[0]
    torch.testing.assert_close(run(result.module, args), run(direct, args))


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({}, "a gate is one weight and one bias, not nothing"),
        ({"weight": np.ones(32), "bias": np.ones(2)}, "the bias of a gate is one number, not 2"),
        ({"weight": np.full(32, np.nan), "bias": np.ones(1)}, "numbers that are not finite"),
        ({"w.weight": np.ones(3), "norm.weight": np.ones(2), "bias": np.ones(1)}, "the norm has 2 channels"),
    ],
)
def test_arrays_that_are_no_gate_are_refused(arrays: dict, sentence: str) -> None:
    with pytest.raises(PipelineError, match=sentence):
        TokenGate(arrays=arrays)


def test_the_weight_of_a_norm_is_multiplied_in() -> None:
    made = TokenGate(
        arrays={"norm.weight": np.full(4, 2.0), "linear.weight": np.ones((1, 4)), "linear.bias": np.ones(1)}
    )
    assert made.arrays[0].tolist() == [2, 2, 2, 2]
    assert made != TokenGate() and hash(made) != hash(TokenGate())
    other = TokenGate(arrays={"weight": np.ones(4), "bias": np.ones(1)})
    assert made.key() != other.key() and made == TokenGate(
        arrays={"weight": np.full(4, 2.0), "bias": np.ones(1)}
    )


# ---- the controller --------------------------------------------------------------------------------------
def test_the_controller_is_the_papers() -> None:
    control = elision.GateController(0.5, kp=0.4, ki=0.1)
    p = i = 0.0
    for rate in (0.0, 0.2, 0.9, 1.0, 0.5):
        p, i = 0.9 * p + 0.1 * 0.4 * (0.5 - rate), i + 0.1 * (0.5 - rate)
        assert control.step(rate) == pytest.approx(max(0.0, p + i))


def test_the_controller_counts_no_padding() -> None:
    gate = torch.tensor([[-20.0, -1.0, -30.0], [-16.0, -20.0, -30.0]], requires_grad=True)
    control = elision.GateController(1.0, kp=1.0, ki=0.0)
    loss = control(gate, torch.tensor([[1, 1, 0], [1, 1, 0]]))
    assert control.rate == 0.75 and control.alpha == pytest.approx(0.025)
    assert loss.item() == pytest.approx(0.025 * -57 / 4)
    with pytest.raises(elision.ElisionError, match="the mask leaves no token"):
        control(gate, torch.zeros(2, 3))
    with pytest.raises(elision.ElisionError, match="target is a share"):
        elision.GateController(1.5)


# ---- refusals --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"k": 1.0}, "k, the gate of a token to delete, is below 0"),
        ({"capacity": 2.5}, "capacity is a share of the tokens above 0 and up to 1, or a number"),
        ({"threshold": 1.0}, "threshold is below 0"),
        ({"last": -1}, "protect and last must not be negative"),
        ({"gates": "x.safetensors", "arrays": {}}, "as a file or as arrays, not both"),
    ],
)
def test_options_are_checked(options: dict, sentence: str) -> None:
    with pytest.raises(PipelineError, match=sentence):
        TokenGate(**options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"layer": 3}, "stands before block 0 to 2, not 3"),
        ({"layer": 1, "capacity": 0.05}, "there is room for 1 of 14 tokens, and 1 of them always stay"),
        ({"layer": 1, "arrays": weights(width=5)}, "the gates are for 5 channels, and %.* has 32"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        gated(t5_graph(False), **options)


def test_other_graphs_say_why_not() -> None:
    from elision.passes.ir.fx import FxGraph

    image = torch.ones(2, 3, 8, 8)
    with pytest.raises(Refused, match=r"is causal .* a deleted token has no next token to tell"):
        gated(FxGraph.trace(toys.Encoder(causal=True), (image,)), layer=1)
    with pytest.raises(NothingMatched, match="found no self-attention over tokens"):
        gated(FxGraph.trace(torch.nn.Linear(4, 4), (torch.ones(2, 4),)))
    with pytest.raises(Refused, match="%x is an input of the graph: there is no op behind which a gate"):
        gated(FxGraph.trace(toys.Windowed(), (torch.ones(2, 4, 4, 16),)), layer=0)
    with pytest.raises(Refused, match="needs all 16 tokens, of which some are gone"):
        gated(FxGraph.trace(toys.Encoder(head="grid"), (image,)), layer=1)
