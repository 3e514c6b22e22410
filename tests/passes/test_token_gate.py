"""The delete gate against the paper's equations, and its laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import reference_gate as reference

from .gate_models import CLOSE, args_of, gated, run, t5, t5_graph, weights

LAWS = settings(max_examples=12, deadline=None)


def expected(args: tuple[Tensor, ...], made: dict[str, Tensor], *, hard: bool, **more: object):
    gate = reference.Gate(made["weight"], made["bias"], **more)  # type: ignore[arg-type]
    with torch.no_grad():
        return reference.run(t5().inner, *args, gate, hard=hard)


@pytest.mark.parametrize("softmax1", [False, True])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_soft_gates_are_the_papers(layer: int, softmax1: bool) -> None:
    made = weights(layer)
    graph, outcome = gated(t5_graph(), mode="soft", layer=layer, softmax1=softmax1, arrays=made)
    args = args_of()
    logits, gate = run(graph, args)
    wanted, gates = expected(args, made, hard=False, layer=layer, softmax1=softmax1)
    torch.testing.assert_close(gate, gates, **CLOSE)
    torch.testing.assert_close(logits, wanted, **CLOSE)
    assert (gates < -15).any() and (gates > -15).any()
    assert outcome.statistics["attention"] == 3 - layer + 2
    assert not torch.allclose(logits, run(t5(), args), atol=1e-2)


@pytest.mark.parametrize("softmax1", [False, True])
@pytest.mark.parametrize(("layer", "capacity"), [(0, 0.9), (1, 0.9), (1, 0.5), (2, 0.3)])
def test_hard_gates_take_tokens_out(layer: int, capacity: float, softmax1: bool) -> None:
    made = weights(layer, 0.3)
    options = {"layer": layer, "capacity": capacity, "softmax1": softmax1}
    graph, _ = gated(t5_graph(), arrays=made, **options)
    args = args_of()
    wanted, _ = expected(args, made, hard=True, **options)
    torch.testing.assert_close(run(graph, args), wanted, **CLOSE)


@pytest.mark.parametrize("lengths", [(13,), (5, 13, 2), (4, 4)])
def test_other_batches_and_lengths(lengths: tuple[int, ...]) -> None:
    made = weights(3)
    graph, _ = gated(t5_graph(), layer=1, capacity=0.6, arrays=made)
    args = args_of(lengths, max(lengths) + 3)
    wanted, _ = expected(args, made, hard=True, layer=1, capacity=0.6)
    torch.testing.assert_close(run(graph, args), wanted, **CLOSE)
