"""cached_attention in Triton: against the reference, and bit for bit whatever else is in the call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from elision.kernels.gpu import cached_attention as module
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from .. import steps
from ..step_cases import STEPS, Step
from ..steps import Rows
from .numerics import DEVICE, DTYPES, INTERPRETED, WHERE, close, examples, kernel, reference, seeded

pytestmark = WHERE

CAPACITY = 420  # several blocks of keys, so that several splits have work


@pytest.fixture(autouse=True)
def fewer_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes milliseconds for a program, also for one without keys."""
    if INTERPRETED:
        monkeypatch.setattr(module, "SPLITS", 3)


def operands(
    rows: Rows,
    heads: int,
    shared: int,
    widths: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
    cache: torch.dtype | None = None,
    seed: int = 0,
) -> list[Tensor]:
    torch.manual_seed(seed)
    found = steps.operands(rows, heads, shared, CAPACITY, *widths)
    given = [x for x in found if x is not None]
    return [*(x.to(dtype) for x in given[:3]), *(x.to(cache or dtype) for x in given[3:5]), *given[5:]]


def wide(given: list[Tensor | None]) -> list[Tensor | None]:
    """The same values in float32; the new rows as the cache will hold them."""
    cache = given[3].dtype  # type: ignore[union-attr]
    rounded = [x if i not in (1, 2) or x is None else x.to(cache) for i, x in enumerate(given)]
    return [x.float() if x is not None and x.is_floating_point() else x for x in rounded]


def compare(given: list[Tensor | None], **attrs: Any) -> list[Tensor]:
    """The kernel against the reference, which gets the same values in float32."""
    found = kernel("cached_attention", *given, **attrs)
    expected = reference("cached_attention", *wide(given), **attrs)
    assert [x.dtype for x in found] == [x.dtype for x in (given[0], given[3], given[4]) if x is not None]
    close(found[0], expected[0])
    assert torch.equal(found[1].float(), expected[1]) and torch.equal(found[2].float(), expected[2])
    return found


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.label)
def test_steps(step: Step) -> None:
    given = step.make()
    found = compare(given, **(step.attrs or {}))
    if step.cache == torch.float32:
        expected = steps.one_by_one(step.rows, given, step.attrs or {})
        for one, other in zip(found, expected, strict=True):
            close(one, other)


@examples(10)
@given(
    st.sampled_from(["chain", "tree", "chunk", "forest"]),
    st.integers(0, 150),
    st.integers(1, 6),
    st.sampled_from([(1, 1), (4, 2), (3, 1), (20, 1)]),
    st.sampled_from([(8, 8), (40, 24), (64, 64), (80, 128)]),
    st.sampled_from(DTYPES),
    st.sampled_from([torch.float32, torch.float16, None]),
    st.sampled_from([(0.0, 0), (0.0, 70), (3.0, 0), (30.0, 5)]),
    st.sampled_from(["none", "distance", "key", "shared"]),
    st.integers(0, 2**20),
)
def test_cached_attention(
    kind: str,
    run: int,
    count: int,
    heads: tuple[int, int],
    widths: tuple[int, int],
    dtype: torch.dtype,
    cache: torch.dtype | None,
    limits: tuple[float, int],
    biases: str,
    seed: int,
) -> None:
    rows = {
        "chain": lambda: steps.chain(run, count, 7),
        "chunk": lambda: steps.chunk(run, count, 7),
        "tree": lambda: steps.trees(CAPACITY, [(run, count)], seed=seed),
        "forest": lambda: steps.trees(CAPACITY, [(run // 2, count), (run // 3, 3)], 2, seed),
    }[kind]()
    bias = None
    if biases != "none":
        bias = torch.randn(1 if biases == "shared" else heads[0], 90, generator=seeded(seed))
    given = operands(rows, *heads, widths, dtype, cache, seed)
    softcap, window = limits
    compare([*given, bias], softcap=softcap, window=window, key_bias=biases == "key")


def row(given: list[Tensor], caches: list[Tensor], rows: slice) -> list[Tensor]:
    """A call of some of the rows alone, when all have been written."""
    q, k, v, _, _, slots, prefix, ancestors, *rest = given
    some = [x[:, :, rows] for x in (q, k, v)]
    return [*some, *caches, slots[rows], prefix[rows], ancestors[rows], *rest]


@pytest.mark.parametrize(("kind", "dtype"), [("chain", torch.float16), ("tree", torch.float32)], ids=str)
def test_a_row_has_the_same_bits_in_any_company(kind: str, dtype: torch.dtype) -> None:
    rows = steps.chain(70, 64) if kind == "chain" else steps.trees(CAPACITY, [(70, 64)])
    given = operands(rows, 4, 1, dtype=dtype)
    whole, *caches = kernel("cached_attention", *given)
    close(whole, reference("cached_attention", *wide(given))[0])  # type: ignore[arg-type]
    for count in (33, 16, 7, 2):  # whose ancestors are among them
        found = kernel("cached_attention", *row(given, given[3:5], slice(0, count)))[0]
        assert torch.equal(found, whole[:, :, :count])
    for m in (0, 5, 14, 40, 63):
        found = kernel("cached_attention", *row(given, caches, slice(m, m + 1)))[0]
        assert torch.equal(found[:, :, 0], whole[:, :, m])


@pytest.mark.parametrize("attrs", [{}, {"window": 50, "softcap": 5.0}], ids=["plain", "window and cap"])
def test_bits_do_not_hang_on_where_keys_are(attrs: dict[str, Any]) -> None:
    """The same logical keys as a prefix, as ancestors in shuffled slots, and as something of both."""
    run, count = 100, 9
    rows = steps.trees(CAPACITY, [(run, count)], seed=3)
    given = operands(rows, 4, 2, dtype=torch.float16)
    bias = torch.randn(4, 200, generator=seeded(1))
    expected = kernel("cached_attention", *given, bias, **attrs)[0]
    moved = torch.randperm(CAPACITY, generator=seeded(2))
    for kept in (0, 37, run - 1):
        places = torch.cat([torch.arange(kept), moved[moved >= kept]])  # the slots below stay where they are
        placed = [
            (int(places[slot]), (0, kept), [int(places[s]) for s in seen[kept:]])
            for slot, seen in zip(rows.slots.tolist(), rows.seen)
        ]
        other = steps.rows_of(placed, columns=run + count + 3)
        caches = [torch.empty_like(x).index_copy_(1, places, x) for x in given[3:5]]
        assert not torch.equal(caches[0], given[3])
        found = kernel("cached_attention", *given[:3], *caches, *other.tensors, bias, **attrs)[0]
        assert torch.equal(found, expected)


def test_a_chunk_of_a_prompt_gives_what_a_chain_does() -> None:
    found = []
    for rows in (steps.chain(90, 20), steps.chunk(90, 20)):
        found.append(kernel("cached_attention", *operands(rows, 2, 2)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_other_sequences_do_not_matter() -> None:
    """A tree alone, and in one call with rows of other sequences and padding."""
    alone = steps.trees(CAPACITY, [(120, 7)])
    paths = [seen[120:] for seen in alone.seen]
    mine = [(slot, (0, 120), path) for slot, path in zip(alone.slots.tolist(), paths)]
    free = [slot for slot in range(380, 400) if slot not in alone.slots.tolist()]
    others = [(free[0], (120, 30), free[:1]), (free[1], (120, 2), free[:2]), (free[2], (0, 0), free[2:3])]
    mixed = steps.rows_of([others[0], *mine[:3], others[1], *mine[3:], others[2]])
    given = operands(mixed, 4, 2, dtype=torch.bfloat16)
    own = [1, 2, 3, 5, 6, 7, 8]
    whole = kernel("cached_attention", *given)[0]
    some = [x[:, :, own] for x in given[:3]]
    found = kernel("cached_attention", *some, *given[3:5], *alone.tensors)[0]
    assert torch.equal(found, whole[:, :, own])


def test_the_kernel_that_writes_into_the_caches() -> None:
    """The same results in place, also in caches that are views; the other form leaves its operands alone."""
    given = operands(steps.trees(CAPACITY, [(30, 5)]), 4, 2)
    before = [x.clone() for x in given]
    out, *caches = kernel("cached_attention", *given)
    assert all(torch.equal(one, other) for one, other in zip(before, given, strict=True))
    both = torch.cat([given[3], given[4]], 2).to(DEVICE)
    views = [both[..., :16], both[..., 16:]]
    rest = [x.to(DEVICE) for x in given]
    found = torch.ops.elision_triton.cached_attention_(*rest[:3], *views, *rest[5:])
    assert torch.equal(found.cpu(), out)
    assert all(torch.equal(one.cpu(), other) for one, other in zip(views, caches, strict=True))


def test_slots_out_of_range_are_neither_written_nor_read() -> None:
    rows = steps.chain(20, 3)
    given = operands(rows, 2, 1)
    slots, prefix, ancestors = (x.clone() for x in given[5:8])
    slots[0], slots[1] = CAPACITY, -3
    prefix[1] = torch.tensor([CAPACITY - 4, 9], dtype=torch.int32)
    ancestors[1, 1] = 2**30
    out, keys, values = kernel("cached_attention", *given[:5], slots, prefix, ancestors)
    expected = [x.clone() for x in given[3:5]]
    for cache, new in zip(expected, given[1:3]):
        cache[:, slots[2]] = new[0, :, 2]
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])
    seen = [CAPACITY - 4, CAPACITY - 3, CAPACITY - 2, CAPACITY - 1, int(ancestors[1, 0])]
    logits = given[0][0, :, 1] @ keys[0, seen].T / 4
    close(out[0, :, 1], torch.softmax(logits, -1) @ values[0, seen])


def test_of_equal_slots_the_last_row_stays_and_rows_may_see_nothing() -> None:
    rows = steps.rows_of([(5, (0, 0), []), (CAPACITY - 1, (0, 0), [5])] + [(5, (0, 3), [5])] * 70)
    given = operands(rows, 1, 1)
    out, keys, values = kernel("cached_attention", *given)
    assert torch.equal(keys[:, 5], given[1][0, :, -1]) and torch.equal(values[:, 5], given[2][0, :, -1])
    assert not out[:, :, 0].any()
    close(out[:, :, 1], values[:, 5][None])


def test_runs_repeat_bit_for_bit() -> None:
    given = operands(steps.trees(CAPACITY, [(200, 9), (40, 3)], padding=4), 4, 2, dtype=torch.float16)
    first = kernel("cached_attention", *given)
    for _ in range(2):
        again = kernel("cached_attention", *given)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_gradients_are_those_of_the_reference() -> None:
    from elision.kernels.gpu import load

    load()
    given = operands(steps.chain(9, 4), 2, 1)
    found = []
    for namespace, device in ((torch.ops.elision_triton, DEVICE), (torch.ops.elision, "cpu")):
        leaves = [x.to(device).detach().clone() for x in given]
        for leaf in leaves[:5]:
            leaf.requires_grad_()
        out, keys, values = namespace.cached_attention(*leaves)
        (out.square().sum() + keys.sum() + values.square().sum()).backward()
        found.append([leaf.grad for leaf in leaves[:5]])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-4)
