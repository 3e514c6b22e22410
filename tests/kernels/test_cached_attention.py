"""cached_attention: every row as if its keys were all there is."""

from __future__ import annotations

import pytest
import torch
from elision.kernels import OPS

from . import steps
from .step_cases import CAPACITY, STEPS, Step


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.label)
def test_rows_see_their_keys_in_order_and_no_others(step: Step) -> None:
    given, attrs = step.make(), step.attrs or {}
    found = torch.ops.elision.cached_attention(*given, **attrs)
    for one, other in zip(found, steps.one_by_one(step.rows, given, attrs), strict=True):
        loose = 2e-3 if one.dtype == torch.float16 or step.cache == torch.float16 else 1e-5
        real = [m for m, slot in enumerate(step.rows.slots.tolist()) if slot != CAPACITY - 1]
        if one.dim() == 4:  # rows of padding share a slot: any of them stays there
            one, other = one[:, :, real], other[:, :, real]
        else:
            one, other = one[:, :-1], other[:, :-1]
        torch.testing.assert_close(one.double(), other, rtol=loose, atol=loose)


def test_a_chunk_is_the_chain() -> None:
    chain, chunk = steps.chain(6, 9), steps.chunk(6, 9)
    assert chain.seen == chunk.seen
    given = steps.operands(chain, 4, 2, CAPACITY)
    one = torch.ops.elision.cached_attention(*given)
    other = torch.ops.elision.cached_attention(*given[:5], *chunk.tensors)
    assert all(torch.equal(a, b) for a, b in zip(one, other))


def test_a_row_that_sees_nothing_is_zero() -> None:
    rows = steps.chain(3, 2)
    given = steps.operands(rows, 2, 2, CAPACITY)
    given[6], given[7] = torch.zeros(2, 2, dtype=torch.int32), torch.full((2, 2), -1, dtype=torch.int32)
    assert not torch.ops.elision.cached_attention(*given)[0].any()


def test_gradients_reach_the_new_rows_and_the_cache() -> None:
    given = [x.double().requires_grad_() for x in steps.operands(steps.chain(3, 2), 2, 1, 8, 4)[:5]]  # type: ignore[union-attr]
    out, keys, _ = OPS["cached_attention"].reference(
        *given, *steps.chain(3, 2).tensors, scale=0.5, softcap=0.0, window=0, key_bias=False
    )
    (out.sum() + keys.sum()).backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in given)
