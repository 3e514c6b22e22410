"""torch.ops.elision_cpu inside torch's machinery: opcheck, gradients, Inductor, threads, forks, wrong operands."""

from __future__ import annotations

import multiprocessing
import os
import threading
from typing import Any

import pytest
import torch
from elision.kernels import cpu
from torch import Tensor, nn

from ..cases import call, token_map
from .draws import KERNELS, kernel

if cpu.available():
    cpu.kernels()


def samples() -> list[tuple[str, list[Any], dict[str, Any]]]:
    """A call of each kernel, all that can carry gradients asked for them."""
    torch.manual_seed(0)
    size = torch.randint(1, 4, (2, 14)).float()
    q = torch.randn(2, 4, 14, 8)
    mask = torch.rand(2, 1, 14, 14) > 0.2
    mask[..., 0] = True
    maps = token_map(2, 14, 4)
    return [
        ("match_tokens", [torch.randn(2, 14, 8)], {"r": 4, "prefix": 1}),
        ("match_padded_tokens", [torch.randn(2, 14, 8), (size > 1).float()], {"ratio": 0.3}),
        ("mean_heads", [q], {}),
        ("merge_tokens", [torch.randn(2, 14, 5), size, *maps], {"axis": 1}),
        ("merge_tokens", [torch.randn(14, 2, 5), None, *maps], {"axis": 0, "batch_axis": 1}),
        ("restore_tokens", [torch.randn(2, 10, 5), maps[0]], {"axis": 1}),
        ("attention", [q, q[:, :2].clone(), torch.randn(2, 2, 14, 6), None, size], {"causal": True}),
        ("attention", [q, torch.randn(2, 4, 14, 8), torch.randn(2, 4, 14, 6), mask], {"scale": 0.2}),
    ]


SAMPLES = [pytest.param(*sample, id=f"{i}-{sample[0]}") for i, sample in enumerate(samples())]
assert {sample[0] for sample in samples()} == set(KERNELS)


def with_gradients(operands: list[Any]) -> list[Any]:
    return [t.clone().requires_grad_() if t is not None and t.is_floating_point() else t for t in operands]


@pytest.mark.parametrize(("op", "operands", "attrs"), SAMPLES)
def test_opcheck(op: str, operands: list[Any], attrs: dict[str, Any]) -> None:
    overload = getattr(torch.ops.elision_cpu, op).default
    # Fewer heads of keys are known to the reference, and so to its gradient, as numbers only.
    carries = not op.startswith("match") and "causal" not in attrs
    torch.library.opcheck(overload, with_gradients(operands) if carries else operands, attrs)


@pytest.mark.parametrize(("op", "operands", "attrs"), SAMPLES)
def test_gradients_are_those_of_the_reference(op: str, operands: list[Any], attrs: dict[str, Any]) -> None:
    if op.startswith("match"):
        out = kernel(op, with_gradients(operands), attrs)
        assert not any(t.requires_grad for t in out)
        return
    pulled = []
    for function in (kernel, call):
        leaves = with_gradients(operands)
        outputs = function(op, leaves, attrs)
        torch.manual_seed(1)
        sum((t * torch.randn(t.shape)).sum() for t in outputs).backward()  # type: ignore[union-attr]
        pulled.append([t.grad for t in leaves if t is not None and t.requires_grad])
    assert pulled[0]
    for one, other in zip(*pulled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class Chain(nn.Module):
    """All kernels in a row."""

    def forward(self, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        kernels = torch.ops.elision_cpu
        heads = x.unflatten(2, (2, 8)).transpose(1, 2)
        maps = kernels.match_padded_tokens(kernels.mean_heads(heads), size, ratio=0.25, prefix=1)
        y, sizes = kernels.merge_tokens(x, size, *maps, axis=1)
        q = y.unflatten(2, (2, 8)).transpose(1, 2)
        out = kernels.attention(q, q, q, None, sizes).transpose(1, 2).flatten(2)
        return kernels.restore_tokens(out, maps[0], axis=1), sizes


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_runs_the_kernels(dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Chain(), dynamic=dynamic, fullgraph=True)
    for batch, count in ((2, 21), (3, 40)) if dynamic else ((2, 21),):
        x, size = torch.randn(batch, count, 16), torch.randint(0, 3, (batch, count)).float()
        for one, other in zip(compiled(x, size), Chain()(x, size)):
            torch.testing.assert_close(one, other)


def test_python_threads_at_once_give_the_serial_results() -> None:
    """Callers do not wait for each other's pool, nor do they see each other's memory."""
    inputs = [(torch.randn(2, n, 16), torch.randint(0, 3, (2, n)).float()) for n in (50, 211, 128, 300)]
    serial = [Chain()(*pair) for pair in inputs]
    wrong = []

    def repeat(start: int) -> None:
        torch.set_num_threads(1 + start % 3)
        for i in range(40):
            which = (start + i) % len(inputs)
            if not all(torch.equal(a, b) for a, b in zip(Chain()(*inputs[which]), serial[which])):
                wrong.append((start, i))

    threads = [threading.Thread(target=repeat, args=(start,)) for start in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def chain_on_three_threads(pair: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    torch.set_num_threads(3)
    same = all(torch.equal(a, b) for a, b in zip(Chain()(*pair), expected))
    os._exit(0 if same else 1)


def test_a_forked_process_has_threads_of_its_own() -> None:
    pair = (torch.randn(2, 211, 16), torch.ones(2, 211))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        expected = Chain()(*pair)  # the parent's pool has begun
        for _ in range(3):
            child = multiprocessing.get_context("fork").Process(
                target=chain_on_three_threads, args=(pair, expected)
            )
            child.start()
            child.join(60)
            assert child.exitcode == 0, "None: it waits for threads that it does not have"
    finally:
        torch.set_num_threads(before)


# ---- what does not fit ---------------------------------------------------------------------------------
x, q = torch.randn(2, 13, 4), torch.randn(2, 4, 9, 8)
slot, keep, source = token_map(2, 13, 4)
size = torch.ones(2, 13)
WRONG: list[tuple[str, list[Any], dict[str, Any], str]] = [
    ("match_tokens", [x.double()], {"r": 1}, "not torch.float64"),
    ("match_tokens", [x], {}, "give r >= 0 or a ratio"),
    ("match_tokens", [x], {"ratio": 2.0}, "give r >= 0 or a ratio"),
    ("match_tokens", [x], {"r": 1, "order": "random"}, "order is one of"),
    ("match_tokens", [x], {"r": 1, "prefix": -1}, "prefix and suffix must not be negative"),
    ("match_padded_tokens", [x, size[:, 1:]], {"r": 1}, r"size is \[2, 12\]"),
    ("match_padded_tokens", [x, size[0]], {"r": 1}, r"size is \[13\]"),
    ("match_padded_tokens", [x, size[[0, 0, 1]]], {"r": 1}, "do not fit together"),
    ("merge_tokens", [x, size[:, 1:], slot, keep, source], {"axis": 1}, r"size is \[2, 12\]"),
    ("merge_tokens", [x[:, 1:], None, slot, keep, source], {"axis": 1}, "the map is for 13 tokens"),
    ("merge_tokens", [x, None, slot, keep[:1], source], {"axis": 1}, "differ in their batch"),
    ("merge_tokens", [x[[0, 0, 1]], None, slot, keep, source], {"axis": 1}, "do not fit together"),
    ("merge_tokens", [x[0], None, slot, keep, source], {"axis": 0, "batch_axis": -1}, "without a batch axis"),
    ("merge_tokens", [x, None, slot, keep + 9, source], {"axis": 1}, "a kept token is out of range"),
    ("merge_tokens", [x, None, slot, keep, source - 13], {"axis": 1}, "a source is out of range"),
    ("merge_tokens", [x, None, slot + 9, keep, source], {"axis": 1}, "a slot is out of range"),
    ("merge_tokens", [x, None, slot, keep, source], {"axis": 3}, "do not fit rank 3"),
    ("restore_tokens", [x, slot + 13], {"axis": 1}, "a slot is out of range"),
    ("restore_tokens", [x, slot - 2], {"axis": 1}, "a slot is out of range"),
    ("restore_tokens", [x[0], slot], {"axis": 0, "batch_axis": -1}, "without a batch axis"),
    ("restore_tokens", [x.to(torch.complex128), slot], {"axis": 1}, "elements of 16 bytes"),
    ("mean_heads", [q.double()], {}, "not torch.float64"),
    ("attention", [q, q, q.half()], {}, "differ in type"),
    ("attention", [q[0], q[0], q[0]], {}, "takes \\[b, h, n, d\\] only"),
    ("attention", [q, q, q, torch.ones(9, 9).long()], {}, "no mask of int64"),
    ("attention", [q, q, q, None, size], {}, r"size is \[2, 13\]"),
    ("attention", [q, q, q, None, size[[0, 0, 1], :9]], {}, "do not fit together"),
    ("attention", [q, q[:, :3], q[:, :3]], {}, "3 heads of keys do not divide 4 heads"),
]  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=lambda c: f"{c[0]}-{c[3]}")
def test_operands_that_do_not_fit_are_refused(case: tuple[str, list[Any], dict[str, Any], str]) -> None:
    op, operands, attrs, message = case
    with pytest.raises(ValueError, match=message):
        kernel(op, operands, attrs)


@pytest.mark.parametrize("wrong", ["keys' batch", "values' tokens", "values' heads", "keys' width", "mask"])
def test_attention_reads_no_further_than_its_operands(wrong: str) -> None:
    """Lengths of the operands that torch's own broadcasting refuses."""
    k, v, mask = q, q, None
    if wrong == "keys' batch":
        k = q[[0, 0, 1]]
    elif wrong == "values' tokens":
        v = q[:, :, 1:]
    elif wrong == "values' heads":
        v = q[:, :2]
    elif wrong == "keys' width":
        k = q[..., 1:]
    else:
        mask = torch.zeros(2, 1, 9, 8)
    with pytest.raises(RuntimeError):
        kernel("attention", [q, k, v, mask], {})


def test_keys_of_one_sample_serve_the_batch() -> None:
    found = kernel("attention", [q, q[:1], q[:1]], {})[0]
    assert torch.equal(found, kernel("attention", [q, q[[0, 0]], q[[0, 0]]], {})[0])
