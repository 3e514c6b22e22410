"""Every architecture, compiled for both runtimes: transformers' own greedy tokens, and rows that are the same bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from elision.kernels import cpu
from elision.runtime.lm_verdict import EXACT, examine

import elision

from ..zoo.causal import ENCODER_DECODERS, VOCABULARY
from .lm_zoo import DECODERS, LIMIT, make, theirs

RUNTIMES = ("torch", "onnxruntime")
QUICK = {"llama", "gemma2", "mpt", "gpt2", "t5"}
"""Exported to ONNX in every run of the tests, which takes seconds each; the others in `make test-all`."""


def everywhere(names: Iterable[str]) -> list[Any]:
    """(name, runtime) for every model and both runtimes."""
    return [
        pytest.param(
            *(name, runtime),
            marks=[pytest.mark.slow] if runtime == "onnxruntime" and name not in QUICK else [],
        )
        for name in names
        for runtime in RUNTIMES
    ]


def prompts(count: int, longest: int) -> list[list[int]]:
    random = np.random.default_rng(7)
    return [random.integers(3, VOCABULARY, random.integers(1, longest + 1)).tolist() for _ in range(count)]


@pytest.mark.parametrize(("name", "runtime"), everywhere(DECODERS))
def test_greedy_tokens_are_transformers(name, runtime):
    model = make(name)
    generator = elision.Generator(model, runtime=runtime, context=LIMIT, batch=4)
    asked = prompts(30, 20)
    for ids, result in zip(asked, generator.generate(asked, 12)):
        assert result.token_ids == theirs(model, ids, 12), (ids, result)
    if cpu.available():
        assert generator.settings["exactness"] == EXACT


def encoder_inputs(model: Any, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(1, 16, 40, generator=generator)}
    return {"input_ids": torch.randint(3, VOCABULARY, (1, 6 + seed), generator=generator)}


@pytest.mark.parametrize(("name", "runtime"), everywhere(ENCODER_DECODERS))
def test_encoder_decoders(name, runtime):
    model = make(name)
    generator = elision.Generator(model, runtime=runtime, context=LIMIT if name != "whisper" else None)
    for seed in range(5):
        inputs = encoder_inputs(model, seed)
        expected = theirs(model, [3], 12, **inputs)
        assert generator.generate(None, 12, encoder_inputs=inputs).token_ids == expected
    with pytest.raises(elision.ElisionError, match="encoder_inputs"):
        generator.generate([3], 4)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.skipif(
    not cpu.available(), reason="without the C++ kernels sums depend on who else is in a call"
)
def test_rows_are_the_same_bits(runtime, bits):
    """The verdict over every number of rows from 1 to 64, chains and trees."""
    generator = elision.Generator(make("llama", positions=160), runtime=runtime, bits=bits)
    verdict = examine(generator.model, range(1, 65))
    assert verdict.name == EXACT and verdict.rows == tuple(range(1, 65)), verdict
    assert generator.settings["exactness"] == EXACT
