"""What the two compiled graphs of a model say of rows, in both runtimes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from elision.kernels import cpu
from elision.runtime.canvas_facts import CanvasFacts
from elision.runtime.canvas_open import compare, open_canvas
from elision.runtime.canvas_step import Scored
from elision.runtime.lm_step import Rows, joined
from torch import nn

from .canvas_pairs import (
    CONTEXT,
    EVERYWHERE,
    MASK,
    RUNTIMES,
    TORCH_FIRST,
    V,
    agrees,
    eager,
    model_of,
    opened,
    rows_of,
)


# ---- what the graphs say -------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "runtime"), EVERYWHERE)
def test_scores_are_those_of_the_model(name, runtime):
    one, rng = opened(name, runtime), np.random.default_rng(0)
    model: Any = one.model
    assert (model.capacity, model.vocabulary, model.largest_k) == (CONTEXT, V, 8)
    for count, start in ((1, 0), (12, 5), (30, 18)):
        ids = rng.integers(0, V, count)
        logits = eager(model_of(name), ids)
        for keep in (np.arange(count), rng.permutation(count)[: (count + 1) // 2]):
            scored = model.refresh(start, ids, keep)
            assert scored.logits is None
            agrees(scored, logits[keep], 8)
            scored = model.refresh(start, ids, keep, whole=True)
            assert scored.logits is not None
            agrees(scored, logits[keep], 8)
        part = rng.permutation(count)
        run = int(rng.integers(0, count + 1))
        for rows in (
            rows_of(ids, part, start),
            rows_of(ids, part, start, run, run + rng.permutation(count - run)),
        ):
            for keep in (np.arange(count), np.array([count - 1])):
                for whole in (False, True):
                    scored = model.step(rows, keep, whole)
                    assert (scored.logits is not None) == whole
                    agrees(scored, logits[part[keep]], 8)


@pytest.mark.parametrize(("name", "runtime"), EVERYWHERE)
def test_facts_and_settings(name, runtime):
    one = opened(name, runtime)
    ends = {"llada": (38,), "dream": (38,), "modernbert": (2,)}.get(name, ())
    positions = 128 if name in ("llada", "dream") else 64
    assert one.facts == CanvasFacts(V, MASK, positions, ends, name == "dream", name)
    assert one.tokenizer is None
    apart = one.settings["step_against_refresh"]
    assert one.settings == {
        "architecture": name, "bits": 32, "runtime": runtime, "step_against_refresh": apart
    }  # fmt: skip
    assert 0 <= apart <= 1e-5 and compare(one.model, one.facts) == apart


@pytest.mark.skipif(
    not cpu.available(), reason="without the C++ kernels sums depend on who else is in a call"
)
@pytest.mark.parametrize(("name", "runtime"), [(n, r) for n in ("llada", "dream", "bert") for r in RUNTIMES])
def test_a_row_has_the_same_bits_alone_and_among_others(name, runtime):
    model, rng = opened(name, runtime).model, np.random.default_rng(1)
    ids, other = rng.integers(0, V, 20), rng.integers(0, V, 17)

    def fresh() -> None:
        model.refresh(0, ids, np.arange(1))
        model.refresh(22, other, np.arange(1))

    def rows(part: np.ndarray, more: np.ndarray) -> Rows:
        given = [rows_of(ids, part, 0, 12, [19, 14])]
        return joined([*given, rows_of(other, more, 22)] if len(more) else given)

    part = np.array([0, 3, 11, 14, 19])
    # A step writes what it computes, so its rows are among what is seen in every one of these calls.
    fresh()
    first = bits(model.step(rows(part, np.arange(0)), np.arange(5), True))
    for more in (np.arange(1), np.arange(6), rng.permutation(17)):
        fresh()
        among = bits(model.step(rows(part, more), np.arange(5), True))
        assert same(first, among)
        fresh()
        reverse = joined([rows_of(other, more, 22), rows_of(ids, part, 0, 12, [19, 14])])
        assert same(first, bits(model.step(reverse, len(more) + np.arange(5), True)))
    for place in range(5):
        fresh()
        kept = bits(model.step(rows(part, np.arange(0)), np.array([place]), True))
        assert same([array[[place]] for array in first], kept)
    fresh()
    few = model.step(rows(part, np.arange(0)), np.arange(5))
    assert same(first[:4], bits(few))


def bits(scored: Scored) -> list[np.ndarray]:
    arrays = [scored.ids, scored.values, scored.log_sum, scored.entropy, scored.logits]
    return [array.copy() for array in arrays if array is not None]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(a.tobytes() == b.tobytes() for a, b in zip(one, other))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_refresh_leaves_other_canvases_alone(runtime):
    model, rng = opened("dream", runtime).model, np.random.default_rng(2)
    ids, other = rng.integers(0, V, 12), rng.integers(0, V, 9)
    logits = eager(model_of("dream"), ids)
    model.refresh(20, ids, np.arange(1))
    model.refresh(11, other, np.arange(9))
    model.refresh(32, other, np.arange(9))
    model.step(rows_of(other[::-1].copy(), np.arange(9), 11), np.arange(1))
    agrees(model.step(rows_of(ids, np.arange(12)[::2], 20), np.arange(6), True), logits[::2], 8)


@pytest.mark.parametrize(("bits", "runtime"), [(8, "torch"), (4, "onnxruntime")])
def test_few_bits(bits, runtime):
    one = open_canvas(
        model_of("llada"), bits=bits, group=16, method="rtn", runtime=runtime, context=32, threads=1
    )
    told = one.settings
    assert (told["bits"], told["group"], told["method"], told["samples"]) == (bits, 16, "rtn", 0)
    assert told["step_against_refresh"] <= 1e-5
    ids = np.random.default_rng(3).integers(0, V, 20)
    scored = one.model.refresh(0, ids, np.arange(20), True)
    apart = np.abs(scored.logits - eager(model_of("llada"), ids)).max() / np.abs(scored.logits).max()
    assert 1e-4 < apart < (0.1 if bits == 8 else 1.0)


class Capped(nn.Module):
    """Something stands behind the head's product: scores are read whole."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model_of("llada")
        self.config = self.inner.config

    def forward(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=4 * torch.tanh(self.inner(input_ids).logits / 4))


@pytest.mark.parametrize("runtime", TORCH_FIRST)
def test_a_head_that_cannot_rank(runtime):
    one = open_canvas(Capped().eval(), runtime=runtime, context=24, threads=1)
    ids = np.random.default_rng(4).integers(0, V, 13)
    logits = eager(Capped().eval(), ids)
    keep = np.array([12, 0, 5])
    agrees(one.model.refresh(2, ids, keep), logits[keep], one.model.largest_k)
    part = np.array([1, 4, 12])
    scored = one.model.step(rows_of(ids, part, 2), np.array([2, 0]), True)
    agrees(scored, logits[part[[2, 0]]], one.model.largest_k)
