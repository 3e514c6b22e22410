"""Laws of merging, restoring, composing and pooling."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from . import published
from .cases import call
from .test_matching_laws import draw, shapes

LAWS = settings(max_examples=40, deadline=None)


def features(p: dict[str, Any], width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (p["batch"], p["count"])
    return torch.randn(*shape, width), torch.randint(1, 5, shape).float()


@LAWS
@given(shapes)
def test_merge_is_the_weighted_mean_and_conserves_it(p: dict[str, Any]) -> None:
    metric, attrs = draw(p)
    maps = call("match_tokens", [metric], attrs)
    x, size = features(p)
    y, new_size = call("merge_tokens", [x, size, *maps], {"axis": 1})
    slots = maps[1].shape[1]
    for sample in range(p["batch"]):
        expected, sizes = published.merge(
            x[sample].numpy(), size[sample].numpy(), maps[0][sample].tolist(), slots
        )
        np.testing.assert_allclose(y[sample].numpy(), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(new_size[sample].numpy(), sizes)
    assert torch.equal(new_size.sum(1), size.sum(1))
    before, after = ((a * b[..., None]).sum(1) for a, b in ((x, size), (y, new_size)))
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)
    for pool in ("mean", "sum"):
        one, other = (
            call("pool_tokens", [a, b], {"axis": 1, "mode": pool})[0] for a, b in ((x, size), (y, new_size))
        )
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@LAWS
@given(shapes, st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
def test_untouched_tokens_are_copied_bit_by_bit(p: dict[str, Any], dtype: torch.dtype) -> None:
    metric, attrs = draw(p)
    slot, keep, source = call("match_tokens", [metric], attrs)
    x, size = features(p)
    x, size = x.to(dtype), size * 3
    y, new_size = call("merge_tokens", [x, size, slot, keep, source], {"axis": 1})
    assert y.dtype == dtype and new_size.dtype == torch.float32
    for sample in range(p["batch"]):
        touched = {int(slot[sample, t]) for t in source[sample].tolist()}
        alone = [s for s in range(keep.shape[1]) if s not in touched]
        assert torch.equal(y[sample, alone], x[sample, keep[sample, alone].long()])
    if attrs["r"] == 0:
        assert torch.equal(x, y) and torch.equal(size, new_size)


@LAWS
@given(shapes)
def test_restoring_equal_tokens_gives_them_back(p: dict[str, Any]) -> None:
    metric, attrs = draw(p)
    slot, keep, source = call("match_tokens", [metric], attrs)
    groups = slot.long() % 3  # tokens of one slot are equal
    x = torch.tensor([0.5, -2.0, 4.0])[groups].unsqueeze(-1).expand(-1, -1, 6).contiguous()
    y, _ = call("merge_tokens", [x, None, slot, keep, source], {"axis": 1})
    back = call("restore_tokens", [y, slot], {"axis": 1})[0]
    assert torch.equal(back, x)
    again, _ = call("merge_tokens", [back, None, slot, keep, source], {"axis": 1})
    assert torch.equal(again, y)


@LAWS
@given(shapes)
def test_two_merges_are_the_merge_of_the_composed_map(p: dict[str, Any]) -> None:
    metric, attrs = draw(p)
    first = call("match_tokens", [metric], attrs)
    x, size = features(p)
    y, sizes = call("merge_tokens", [x, size, *first], {"axis": 1})
    second = call("match_tokens", [y], {"r": 2, "prefix": min(1, y.shape[1])})
    z, final = call("merge_tokens", [y, sizes, *second], {"axis": 1})
    slot = call("compose_slots", [first[0], second[0]], {})[0]
    for sample in range(p["batch"]):
        expected, total = published.merge(
            x[sample].numpy(), size[sample].numpy(), slot[sample].tolist(), z.shape[1]
        )
        np.testing.assert_allclose(z[sample].numpy(), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(final[sample].numpy(), total)
    inner = call("restore_tokens", [z, second[0]], {"axis": 1})[0]
    both = call("restore_tokens", [inner, first[0]], {"axis": 1})[0]
    assert torch.equal(both, call("restore_tokens", [z, slot], {"axis": 1})[0])


@LAWS
@given(shapes)
def test_padding_never_reaches_a_real_token(p: dict[str, Any]) -> None:
    metric, attrs = draw(p)
    size = torch.randint(0, 3, metric.shape[:2]).float()
    maps = call("match_padded_tokens", [metric, size], attrs)
    x, _ = features(p)
    y, new_size = call("merge_tokens", [x, size, *maps], {"axis": 1})
    dirty, _ = call(
        "merge_tokens", [torch.where(size[..., None] > 0, x, torch.nan), size, *maps], {"axis": 1}
    )
    real = new_size > 0
    assert torch.equal(y[real], dirty[real]) and bool(y.isfinite().all())
    assert torch.equal(new_size.sum(1), size.sum(1))
    pooled = call("pool_tokens", [dirty, new_size], {"axis": 1})[0]
    assert bool(pooled.isfinite().all())


@LAWS
@given(shapes)
def test_a_shifted_map_maps_the_middle(p: dict[str, Any]) -> None:
    metric, attrs = draw({**p, "count": p["count"] + 4})
    start, stop, count = attrs["prefix"], attrs["suffix"], metric.shape[1]
    maps = call("match_tokens", [metric], attrs)
    x, size = features({**p, "count": count})
    y, sizes = call("merge_tokens", [x, size, *maps], {"axis": 1})
    middle = call("shift_map", maps, {"start": start, "stop": stop})
    part = call("range_size", [size], {"start": start, "stop": stop})[0]
    inner, inner_size = call("merge_tokens", [x[:, start : count - stop], part, *middle], {"axis": 1})
    end = y.shape[1] - stop
    torch.testing.assert_close(inner, y[:, start:end])
    assert torch.equal(inner_size, sizes[:, start:end])
    assert torch.equal(
        call("slice_tokens", [y], {"axis": 1, "start": start, "end": -stop})[0], y[:, start:end]
    )


def test_bf16_is_accumulated_in_float32() -> None:
    x = torch.full((1, 257, 4), 1.0, dtype=torch.bfloat16)
    slot = torch.zeros(1, 257, dtype=torch.int32)
    keep, source = torch.zeros(1, 1, dtype=torch.int32), torch.arange(1, 257, dtype=torch.int32)[None]
    y, size = call("merge_tokens", [x, None, slot, keep, source], {"axis": 1})
    assert size.item() == 257 and torch.equal(y, x[:, :1])
    assert torch.equal(call("pool_tokens", [x, torch.ones(1, 257)], {"axis": 1})[0], x[:, 0])
