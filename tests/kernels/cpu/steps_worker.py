"""`python -m tests.kernels.cpu.steps_worker`: the ops of step graphs on the variant that ELISION_ISA asks for.

Against their references, and the bits: a row alone and among others, in other slots, on other threads, in a chain and
in a tree. Says what was checked; a failure is an AssertionError."""

from __future__ import annotations

from typing import Any

import torch
from elision.kernels import OPS, cpu
from elision.kernels.ops.gated import FUNCTIONS
from torch import Tensor

from .. import steps
from ..step_cases import CAPACITY, JOINED, STEPS

LONG = 700


def run(name: str, given: list[Tensor | None], attrs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The mutating op on copies of the caches: out and both caches."""
    from elision.kernels.cpu.step_ops import MUTATING

    given = [*given]
    keys, values = (x.clone() for x in given[3:5] if x is not None)
    given[3:5] = keys, values
    given += [None] * (len(OPS[name].inputs) - len(given))
    return MUTATING[name](*given, **attrs), keys, values


def close(one: Tensor, other: Tensor, loose: float, label: str) -> None:
    worst = (one.double() - other.double()).abs().max().item() if one.numel() else 0.0
    assert one.shape == other.shape and worst <= loose, f"{label}: {worst} off"


def against_the_reference() -> None:
    calls = [("cached_attention", c.label, c.make(), c.attrs or {}, c.rows) for c in STEPS]
    calls += [
        ("joined_cached_attention", c.label, c.make(), c.all_attrs, c.step.rows)
        for c in JOINED
        if c.dtype == torch.float32
    ]
    for name, label, given, attrs, rows in calls:
        real = [m for m, slot in enumerate(rows.slots.tolist()) if slot != CAPACITY - 1]
        full = [*given, *[None] * (len(OPS[name].inputs) - len(given))]
        expected = getattr(torch.ops.elision, name)(*full, **attrs)
        found = run(name, given, attrs)
        axis = 2 if name == "cached_attention" else 1
        loose = 2e-3 if given[3].dtype == torch.float16 else 2e-5  # type: ignore[union-attr]
        at = torch.tensor(real)
        close(found[0].index_select(axis, at), expected[0].index_select(axis, at), loose, f"{name} {label}")
        for one, other in zip(found[1:], expected[1:]):
            close(one[:, :-1], other[:, :-1], loose, f"{name} {label}, cache")


def alone(
    given: list[Tensor | None], row: int, bias: Tensor | None, caches: tuple[Tensor, Tensor]
) -> list[Tensor | None]:
    """Row `row` by itself, when the others' keys and values have been written."""
    q, k, v, _, _, slots, prefix, ancestors = given[:8]
    pick = [x[:, :, row : row + 1].contiguous() for x in (q, k, v) if x is not None]
    rest = [x[row : row + 1] for x in (slots, prefix, ancestors) if x is not None]
    return [*pick, *caches, *rest, bias]


def rows_like(kind: str, count: int) -> steps.Rows:
    if kind == "chain":
        return steps.chain(411, count)
    if kind == "chunk":
        return steps.chunk(130, count)
    sequences = [(300, count)] if kind == "tree" else [(200, count), (0, 3), (129, 7)]
    return steps.trees(LONG, sequences, padding=kind == "forest", seed=count)


def rows_do_not_see_each_other() -> None:
    """Long prefixes, so that blocks are dealt out to tasks in one case and not in the other."""
    shapes = [(9, 3, 64, 64), (4, 4, 40, 24), (8, 1, 128, 128), (6, 2, 80, 80)]
    for number, (heads, shared, width, value_width) in enumerate(shapes):
        for kind in ("tree", "chain", "chunk", "forest"):
            for count in (1, 2, 5, 16, 64):
                rows = rows_like(kind, count)
                for attrs in ({}, {"window": 140, "softcap": 3.0}):
                    given = steps.operands(rows, heads, shared, LONG, width, value_width)
                    bias = torch.randn(heads, 90) if attrs else None
                    out, *caches = run("cached_attention", [*given, bias], attrs)
                    close(out, steps_reference(given, bias, attrs), 3e-5, f"{shapes[number]} {kind} {count}")
                    for m in {0, count // 2, count - 1}:
                        single = run("cached_attention", alone(given, m, bias, (caches[0], caches[1])), attrs)
                        assert torch.equal(single[0][:, :, 0], out[:, :, m]), f"{kind}: row {m} of {count}"


def steps_reference(given: list[Tensor | None], bias: Tensor | None, attrs: dict[str, Any]) -> Tensor:
    return torch.ops.elision.cached_attention(*given, bias, **attrs)[0]


def slots_do_not_matter() -> None:
    """The same keys in other slots, in another order, as a list of ancestors and as a prefix."""
    heads, shared, width, run_length = 6, 2, 64, 290
    given = steps.operands(steps.chain(run_length, 5), heads, shared, LONG, width)
    out, keys, values = run("cached_attention", given, {})
    order = torch.randperm(LONG)  # slot s of the first call is slot order[s] of the second
    moved = [torch.empty_like(keys), torch.empty_like(values)]
    moved[0][:, order], moved[1][:, order] = keys, values
    listed = torch.full((5, run_length + 5), -1, dtype=torch.int32)
    for m in range(5):
        listed[m, : run_length + m + 1] = order[: run_length + m + 1]
    slots = order[run_length : run_length + 5].int()
    other = [*given[:3], *moved, slots, torch.zeros(5, 2, dtype=torch.int32), listed]
    assert torch.equal(run("cached_attention", other, {})[0], out)


def packed_is_apart_and_rows_are_joined_alike() -> None:
    for case in JOINED:
        if not case.packed or case.dtype != torch.float32:
            continue
        given, attrs = case.make(), case.all_attrs
        heads, shared = attrs["heads"], attrs["kv_heads"]
        widths = [heads * case.step.width, shared * case.step.width, shared * case.step.value_width]
        assert given[0] is not None
        apart = [*given[0].split(widths, -1), *given[3:]]
        for one, other in zip(
            run("joined_cached_attention", given, attrs), run("joined_cached_attention", apart, attrs)
        ):
            assert torch.equal(one, other), case.label


def elements_do_not_see_each_other() -> None:
    """gated: the value of an element wherever it stands, and near its reference far out too."""
    x, y = torch.linspace(-100, 100, 5001), torch.randn(5001)
    for fn in FUNCTIONS:
        found = torch.ops.elision_cpu.gated(x, y, fn=fn)
        close(found, torch.ops.elision.gated(x, y, fn=fn), 5e-6 * 100, fn)
        near = (x.abs() < 6).nonzero().flatten()
        close(found[near], torch.ops.elision.gated(x[near], y[near], fn=fn), 4e-6, fn)
        for start, end in ((1, 5000), (17, 18), (300, 333)):
            assert torch.equal(
                torch.ops.elision_cpu.gated(x[start:end], y[start:end], fn=fn), found[start:end]
            ), fn
        wide = torch.ops.elision_cpu.gated(torch.cat([x, y]).expand(9, -1), fn=fn)
        assert torch.equal(wide, found.expand(9, -1)), fn
        assert (
            torch.ops.elision_cpu.gated(torch.tensor([float("nan")]), torch.ones(1), fn=fn).isnan().all()
        ), fn


CHECKS = [
    against_the_reference,
    rows_do_not_see_each_other,
    slots_do_not_matter,
    packed_is_apart_and_rows_are_joined_alike,
    elements_do_not_see_each_other,
]


def on_any_number_of_threads() -> None:
    rows = steps.trees(LONG, [(333, 13), (20, 9)], seed=1)
    given = steps.operands(rows, 9, 3, LONG, 64)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run("cached_attention", given, {}))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def main() -> None:
    cpu.kernels()
    for check in [*CHECKS, on_any_number_of_threads]:
        torch.manual_seed(5)
        check()
        print(check.__name__)


if __name__ == "__main__":
    main()
