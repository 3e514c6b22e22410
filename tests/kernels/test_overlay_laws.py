"""What must hold of a table laid over another: its rows where ids go beyond, the other's bits everywhere else."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from .cases import call


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 5), st.booleans(), st.sampled_from([2, 3]))
def test_is_a_lookup_in_both_tables_joined(seed: int, own: int, more: int, half: bool, rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(own, 4, generator=generator).to(torch.float16 if half else torch.float32)
    rows = torch.randn(*([3] if rank == 3 else []), more, 4, generator=generator).to(table.dtype)
    ids = torch.randint(0, own + more, (3, 6), generator=generator)
    inside = call("own_ids", [ids], {"first": own})[0]
    found = call("overlay_rows", [table[inside], ids, rows], {"first": own})[0]
    for sequence in range(3):
        joined = torch.cat([table, rows if rank == 2 else rows[sequence]])
        assert torch.equal(found[sequence], joined[ids[sequence]])


def test_rows_of_another_width_of_numbers_are_cast() -> None:
    own, rows = torch.zeros(1, 2, 3, dtype=torch.bfloat16), torch.full((1, 3), 1 / 3)
    found = call("overlay_rows", [own, torch.tensor([[5, 4]]), rows], {"first": 5})[0]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[0, 0], rows[0].bfloat16()) and not found[0, 1].any()


def test_batches_and_lengths_may_be_dynamic() -> None:
    class Lookup(torch.nn.Module):
        def forward(self, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            table = torch.arange(20.0).reshape(5, 4)
            own = table[torch.ops.elision.own_ids(ids, first=5)]
            return torch.ops.elision.overlay_rows(own, ids, rows, first=5)

    auto, batch = torch.export.Dim.AUTO, torch.export.Dim("batch", min=1)
    exported = torch.export.export(
        Lookup(),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 7, 4)),
        dynamic_shapes=({0: batch, 1: auto}, {0: batch, 1: auto}),
    )
    ids, rows = torch.tensor([[6, 1, 0, 5]]), torch.randn(1, 2, 4)
    found = exported.module()(ids, rows)
    assert torch.equal(found[0, [0, 3]], rows[0, [1, 0]])
