"""Laws of a gate's budget: what stays, on random gates."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from .cases import call

LAWS = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**31)


def gates(seed: int, lengths: list[int], count: int) -> tuple[Tensor, Tensor]:
    """Gates and which tokens are no padding, [B, count]."""
    generator = torch.Generator().manual_seed(seed)
    gate = -30 * torch.rand(len(lengths), count, generator=generator)
    valid = (torch.arange(count) < torch.tensor(lengths)[:, None]).float()
    return gate, valid


@LAWS
@given(seeds, st.lists(st.integers(1, 12), min_size=1, max_size=3), st.integers(0, 4), st.integers(0, 9))
def test_who_stays_is_the_best_above_the_threshold_that_there_is_room_for(
    seed: int, lengths: list[int], more: int, tenths: int
) -> None:
    gate, valid = gates(seed, lengths, max(lengths) + more)
    budget = {"ratio": tenths / 10}
    score, counts = call("gate_budget", [gate, valid], {"last": 1, **budget})
    (flags,) = call("top_tokens", [score, counts], {})
    slot, keep, _, size, fits = call("drop_tokens", [flags, valid], budget)
    for row, length in enumerate(lengths):
        room = length - length * tenths // 10 - 1
        above = [i for i in range(length - 1) if gate[row, i] > -15]
        best = sorted(above, key=lambda i: -float(gate[row, i]))[: max(room, 0)]
        wanted = sorted([*best, length - 1])
        assert fits[row] == 1
        assert keep[row][size[row] > 0].tolist() == wanted
        assert (slot[row] >= 0).nonzero()[:, 0].tolist() == wanted


@LAWS
@given(seeds, st.integers(2, 12), st.integers(1, 12))
def test_a_number_of_slots_is_never_exceeded(seed: int, length: int, slots: int) -> None:
    slots = min(slots, length)
    gate, valid = gates(seed, [length, length // 2 + 1], length)
    budget = {"count": length - slots}
    score, counts = call("gate_budget", [gate, valid], {"last": 1, "threshold": -29.0, **budget})
    (flags,) = call("top_tokens", [score, counts], {})
    _, keep, _, size, fits = call("drop_tokens", [flags, valid], budget)
    assert keep.shape == (2, slots) and fits.all()
    for row, own in enumerate((length, length // 2 + 1)):
        above = int((gate[row, : own - 1] > -29).sum())
        assert int(size[row].sum()) == min(above + 1, slots)


@LAWS
@given(seeds, st.integers(1, 9), st.sampled_from(["rms", "layer", "none"]))
def test_a_gate_is_the_equation(seed: int, length: int, norm: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(2, length, 6, generator=generator), torch.randn(6, generator=generator)
    gate, size = call("delete_gate", [x, weight, torch.tensor([0.5])], {"norm": norm, "k": -7.0})
    for row in range(2):
        for place in range(length):
            h = x[row, place].tolist()
            if norm == "layer":
                mean = sum(h) / 6
                h = [v - mean for v in h]
            scale = math.sqrt(sum(v * v for v in h) / 6 + 1e-6) if norm != "none" else 1.0
            z = sum(v / scale * float(w) for v, w in zip(h, weight)) + 0.5
            assert gate[row, place].item() == pytest.approx(-7 / (1 + math.exp(z)), abs=1e-4)
    torch.testing.assert_close(size.log(), gate, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_one_more_key_of_zeros_is_softmax1(causal: bool) -> None:
    q, k, v = (torch.randn(2, 3, 5, 4) for _ in range(3))
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None] if causal else torch.randn(2, 1, 5, 5)
    size = torch.rand(2, 5)
    padded = [*(call("pad_tokens", [x], {"axis": 2})[0] for x in (k, v))]
    padded += [call("pad_tokens", [mask], {"axis": 3, "value": float(causal)})[0]]
    padded += [call("pad_tokens", [size], {"axis": 1, "value": 1.0})[0]]
    (found,) = call("attention", [q, *padded], {})
    scores = q @ k.transpose(2, 3) / 2 + size.log()[:, None, None]
    scores = scores.masked_fill(~mask, -torch.inf) if causal else scores + mask
    wanted = scores.exp() / (1 + scores.exp().sum(-1, keepdim=True)) @ v
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_a_norm_that_is_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match="norm is one of"):
        call("delete_gate", [torch.ones(1, 2, 3), torch.ones(3), torch.ones(1)], {"norm": "batch"})
