"""The ops of step graphs in C++: every variant, torch's view of an op that writes into its operands, ONNX Runtime."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from elision.kernels import OPS, cpu
from torch import Tensor

from .. import onnx_call, steps
from ..step_cases import CAPACITY
from . import sessions
from .steps_worker import CHECKS, run

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("variant", cpu.variants() if cpu.available() else ["portable"])
def test_variant_agrees_with_the_reference_and_keeps_its_bits(variant: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.cpu.steps_worker"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, cpu.ISA: variant},
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == len(CHECKS) + 1


# ---- torch ---------------------------------------------------------------------------------------------
def test_schema_says_what_is_written() -> None:
    cpu.kernels()
    for name in ("cached_attention", "joined_cached_attention"):
        schema = getattr(torch.ops.elision_cpu, f"{name}_").default._schema
        assert [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write] == [
            "key_cache",
            "value_cache",
        ]
        assert len(schema.returns) == 1


def test_operands_that_do_not_fit_are_refused_with_a_sentence() -> None:
    given = steps.operands(steps.chain(3, 2), 4, 2, CAPACITY)
    wrong: list[tuple[int, Tensor, str]] = [
        (5, torch.tensor([3, CAPACITY], dtype=torch.int32), "writes to slot 40 of 40"),
        (5, torch.tensor([-1, 3], dtype=torch.int32), "writes to slot -1 of 40"),
        (6, torch.tensor([[0, 3], [38, 3]], dtype=torch.int32), "sees 3 slots from 38 of 40"),
        (7, torch.tensor([[3, 99], [3, 4]], dtype=torch.int32), "ancestor 99 of 40"),
        (0, torch.randn(1, 3, 2, 8), "3 heads"),
        (2, torch.randn(1, 2, 3, 8), r"\[1, 2, 3, 8\], not \[1, 2, 2, 8\]"),
        (0, given[0].half(), "not float16"),  # type: ignore[union-attr]
    ]
    for index, tensor, sentence in wrong:
        operands = [*given]
        operands[index] = tensor
        before = [x.clone() for x in given[3:5] if x is not None]
        with pytest.raises(ValueError, match=sentence):
            torch.ops.elision_cpu.cached_attention_(*operands)
        assert all(torch.equal(one, other) for one, other in zip(before, given[3:5]))


def test_compiled_code_writes_into_the_caches() -> None:
    cpu.kernels()
    rows = steps.chain(3, 2)
    given = steps.operands(rows, 4, 2, CAPACITY)
    expected, keys, values = run("cached_attention", given, {})

    def step(*operands: Tensor) -> Tensor:
        return torch.ops.elision_cpu.cached_attention_(*operands) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), expected * 2)
    assert torch.equal(given[3], keys) and torch.equal(given[4], values)  # type: ignore[arg-type]


# ---- ONNX Runtime ----------------------------------------------------------------------------------------
def bound(
    rows: steps.Rows, given: list[Tensor | None], threads: int, apart: bool = False
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """A call whose caches are bound as operand and result both: out, the buffers, and what went in."""
    model = onnx_call.model("cached_attention", given, {})
    session = sessions.open_session(model, threads=threads)
    binding = session.io_binding()
    names = [n.removesuffix("?") for n in OPS["cached_attention"].inputs]
    before, kept = [], []
    for name, tensor in zip(names, given):
        assert tensor is not None
        array = tensor.numpy().copy()
        value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        binding.bind_ortvalue_input(name, value)
        if name.endswith("_cache"):
            before.append(array.copy())
            target = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros_like(array)) if apart else value
            binding.bind_ortvalue_output(f"new_{name}", target)
            kept.append((value, target))
    binding.bind_output("out")
    session.run_with_iobinding(binding)
    out = binding.get_outputs()
    result = next(o.numpy() for o in out if tuple(o.shape()) == tuple(given[0].shape))  # type: ignore[union-attr]
    if apart:
        assert all(np.array_equal(value.numpy(), array) for (value, _), array in zip(kept, before))
    return result.copy(), [target.numpy().copy() for _, target in kept], before


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("apart", [False, True], ids=["in place", "apart"])
def test_onnxruntime_writes_into_bound_caches(threads: int, apart: bool) -> None:
    rows = steps.trees(CAPACITY, [(12, 9)])
    given = steps.operands(rows, 6, 2, CAPACITY)
    expected, keys, values = run("cached_attention", given, {})
    out, caches, _ = bound(rows, given, threads, apart)
    assert np.array_equal(out, expected.numpy())
    assert np.array_equal(caches[0], keys.numpy()) and np.array_equal(caches[1], values.numpy())


def test_onnxruntime_fails_with_the_kernels_sentence() -> None:
    given = steps.operands(steps.chain(3, 2), 4, 2, CAPACITY)
    session = sessions.open_session(onnx_call.model("cached_attention", given, {}))
    given[5] = torch.tensor([3, 77], dtype=torch.int32)
    with pytest.raises(Exception, match="writes to slot 77 of 40"):
        session.run(None, sessions.feeds_of("cached_attention", given))
