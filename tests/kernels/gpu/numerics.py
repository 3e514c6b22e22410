"""Where the kernels run in these tests: in Triton's interpreter on the CPU, or on a GPU.

The interpreter must be asked for before Triton is imported, so test_interpreter.py runs the numerics tests in
processes of their own. Elsewhere they ask for a GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from elision.kernels import OPS
from hypothesis import HealthCheck, Phase, settings
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
WHERE = (
    []
    if INTERPRETED
    else [
        pytest.mark.gpu,
        pytest.mark.skipif(
            not torch.cuda.is_available(),
            reason="no GPU here; test_interpreter.py runs this in Triton's interpreter",
        ),
    ]
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def examples(count: int) -> Any:
    """hypothesis settings for kernels: few and small examples, the same ones in every run."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],  # shrinking would take minutes in the interpreter
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


def kernel(op: str, *operands: Tensor | None, **attrs: Any) -> list[Tensor]:
    """The op's Triton kernel on tensors of the CPU; the results come back there."""
    from elision.kernels.gpu import load

    load()
    given = [None if x is None else x.to(DEVICE) for x in operands]
    found = getattr(torch.ops.elision_triton, op)(*given, **attrs)
    assert all(x.is_contiguous() for x in (found if isinstance(found, tuple) else (found,)))
    return [x.cpu() for x in (found if isinstance(found, tuple) else (found,))]


def reference(op: str, *operands: Tensor | None, **attrs: Any) -> list[Tensor]:
    """The op's reference, in the operands' own types."""
    found = OPS[op].reference(*operands, **OPS[op].complete(attrs))
    return list(found) if isinstance(found, tuple) else [found]


def close(found: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Equal shapes, values within the tolerance of the type."""
    limit = TOLERANCE.get(dtype or found.dtype, 0.0)
    torch.testing.assert_close(found.float(), expected.float(), rtol=limit, atol=limit)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
