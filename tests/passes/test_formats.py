"""Laws of the layouts of few bits, and what other programs store, brought to ours."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from elision.passes.errors import ModelFileError
from elision.passes.formats import Quantized, SourceFormats, dequantize, pack, quantize, unpack
from elision.passes.formats.calibrated import quantize_calibrated
from elision.passes.formats.gguf import FLOATS, import_blocks
from elision.passes.formats.layout import stacked
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

BITS = st.sampled_from((4, 8))
GROUPS = st.sampled_from((16, 32, 64))
WEIGHTS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 80)),
    elements=st.floats(-8, 8, width=32, allow_subnormal=False),
)


def spread(q: Quantized) -> np.ndarray:
    """The scale of every weight, [N, K]."""
    return np.repeat(np.abs(q.scales.astype(np.float32)), q.group, 1)[:, : q.width]


@given(st.data(), BITS)
def test_pack_and_unpack_are_inverse(data: st.DataObject, bits: int) -> None:
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), 16)
    codes = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1)))
    packed = pack(codes, bits)
    assert packed.shape == (*shape[:2], 16 * bits // 8)
    np.testing.assert_array_equal(unpack(packed, bits), codes)


@settings(deadline=None)
@given(WEIGHTS, BITS, GROUPS, st.booleans())
def test_the_error_is_half_a_scale(w: np.ndarray, bits: int, group: int, symmetric: bool) -> None:
    """A whole one beyond the edge of the range, where the other sign or the zero point has no code any more."""
    q = quantize(w, bits=bits, group=group, symmetric=symmetric, scales="float32")
    error, scale = np.abs(dequantize(q) - w), spread(q)
    codes = unpack(q.weight, bits).reshape(len(w), -1)[:, : q.width]
    inside = (codes > 0) & (codes < 2**bits - 1)
    slack = 1e-5 * np.abs(w) + 1e-30
    assert (error <= np.where(inside, scale / 2, scale) * 1.0001 + slack).all()


@settings(deadline=None)
@given(WEIGHTS, BITS, GROUPS, st.sampled_from(("float16", "float32")))
def test_quantizing_again_changes_nothing(w: np.ndarray, bits: int, group: int, scales: str) -> None:
    w = np.where(np.abs(w) < 2**-6, 0, w)  # no scales that float16 keeps with few digits
    once = quantize(w, bits=bits, group=group, scales=scales)
    again = quantize(dequantize(once), bits=bits, group=group, scales=scales)
    np.testing.assert_array_equal(once.weight, again.weight)
    np.testing.assert_array_equal(once.scales, again.scales)


def test_searching_errs_less() -> None:
    w = np.random.default_rng(0).normal(size=(24, 100)).astype(np.float32)
    for symmetric in (True, False):
        plain = np.square(dequantize(quantize(w, symmetric=symmetric)) - w).sum()
        searched = np.square(dequantize(quantize(w, symmetric=symmetric, search=True)) - w).sum()
        assert searched < 0.95 * plain


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("by_activity", [True, False])
@pytest.mark.parametrize("group", [32, 256])
def test_calibration_moves_outputs_less(symmetric: bool, by_activity: bool, group: int) -> None:
    rng = np.random.default_rng(1)
    w = rng.normal(size=(40, 300)).astype(np.float32)
    x = (rng.normal(size=(2000, 20)) @ rng.normal(size=(20, 300)) + rng.normal(size=(2000, 300))).astype(
        np.float32
    )
    x[:, 7] = 0  # a silent input
    moments = x[:1000].T @ x[:1000] / 1000
    plain = quantize(w, group=group, symmetric=symmetric, search=True)
    made = quantize_calibrated(
        w, moments, group=group, symmetric=symmetric, by_activity=by_activity, inputs=1000
    )
    assert (made.weight.shape, made.group, made.zeros is None) == (plain.weight.shape, group, symmetric)
    errors = [np.linalg.norm(x[1000:] @ (dequantize(q) - w).T) for q in (made, plain)]
    assert errors[0] < 0.7 * errors[1]


def test_offsets_fit_what_has_them() -> None:
    """What is codes with a scale and an offset is found exactly; zero points cannot say it."""
    made = import_blocks("Q4_1", blocks("Q4_1", 8, 4))
    assert made is not None
    codes = unpack(made.weight, 4)
    codes[..., 0], codes[..., 1] = 0, 15  # the whole range is in use
    w = dequantize(Quantized(pack(codes, 4), np.abs(made.scales), made.zeros, 4, 32, made.width))
    moments = np.eye(made.width)
    common = {"symmetric": False, "offsets": True}
    for found in (
        quantize(w, **common),
        quantize(w, search=True, **common),
        quantize_calibrated(w, moments, **common),
    ):
        assert found.zeros is not None and found.zeros.dtype == np.float16
        np.testing.assert_allclose(dequantize(found), w, atol=2e-3 * np.abs(w).max())
    assert np.abs(dequantize(quantize(w, symmetric=False)) - w).max() > 2e-2 * np.abs(w).max()


def test_calibration_without_correlation_is_rounding() -> None:
    """Where no input tells of another, nothing can be made good."""
    w = np.random.default_rng(2).normal(size=(8, 64)).astype(np.float32)
    made = quantize_calibrated(w, np.eye(64))
    plain = quantize(w, search=True, importance=np.ones(64))
    np.testing.assert_array_equal(made.weight, plain.weight)
    np.testing.assert_array_equal(made.scales, plain.scales)


def test_bad_layouts_are_refused() -> None:
    w = np.ones((2, 32), np.float32)
    with pytest.raises(ValueError, match="4 or 8 bits, not 5"):
        quantize(w, bits=5)
    with pytest.raises(ValueError, match="multiple of 16"):
        quantize(w, group=24)
    with pytest.raises(ValueError, match="4 or 8 bits, not 2"):
        pack(np.zeros((1, 1, 16), np.uint8), 2)


# ---- GGUF --------------------------------------------------------------------------------------------
SIZES = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}


def blocks(kind: str, rows: int = 6, count: int = 3, seed: int = 0) -> np.ndarray:
    """Random bytes with ordinary numbers where the format has float16."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows, count, SIZES[kind]), dtype=np.uint8)
    halves = rng.normal(size=(rows, count, 2)).astype(np.float16).view(np.uint8)
    if kind == "Q6_K":
        data[..., 208:] = halves[..., :2]
    elif kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K"):
        data[..., :4] = halves
    else:
        data[..., :2] = halves[..., :2]
    return data.reshape(rows, -1)


@pytest.mark.parametrize("kind", SIZES)
def test_gguf_blocks_stand_for_the_same_numbers(kind: str) -> None:
    data = blocks(kind)
    wanted = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    made = import_blocks(kind, data)
    assert made is not None
    assert made.bits == (4 if kind.startswith("Q4") else 8)
    np.testing.assert_array_equal(dequantize(made).view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("kind", FLOATS)
def test_plain_numbers_pass(kind: str) -> None:
    assert import_blocks(kind, np.zeros((1, 8), np.uint8)) is None


def test_unknown_gguf_types_are_named() -> None:
    with pytest.raises(
        ModelFileError, match=r"blk\.0\.x is stored as IQ2_XS, which cannot be read \(known: Q4_0, "
    ):
        import_blocks("IQ2_XS", np.zeros((1, 8), np.uint8), "blk.0.x")
    with pytest.raises(ModelFileError, match="no Q4_0 blocks of 18 bytes"):
        import_blocks("Q4_0", np.zeros((1, 20), np.uint8))


# ---- finding rows again ------------------------------------------------------------------------------
def imported(kind: str, rows: int, seed: int) -> Quantized:
    made = import_blocks(kind, blocks(kind, rows, 8 if SIZES[kind] < 100 else 1, seed))
    assert made is not None
    return made


def test_rows_are_found_permuted_stacked_and_split() -> None:
    a, b = imported("Q4_1", 7, 1), imported("Q4_1", 5, 2)
    formats = SourceFormats([a, b])
    whole = np.concatenate([dequantize(a), dequantize(b)])
    order = np.random.default_rng(3).permutation(12)
    for wanted in (whole, whole[order], whole[3:9], whole[order][:4]):
        found = formats.lookup(np.ascontiguousarray(wanted))
        assert found is not None
        assert (found.bits, found.group) == (4, 32)
        np.testing.assert_array_equal(dequantize(found), wanted)


def test_what_differs_is_not_found() -> None:
    a = imported("Q8_0", 7, 1)
    formats = SourceFormats([a])
    w = dequantize(a).copy()
    assert formats.lookup(w[:, :-32].copy()) is None
    for column in (0, -1):
        changed = w.copy()
        changed[2, column] += 1
        assert formats.lookup(changed) is None
    assert formats.lookup(w.astype(np.float16)) is None
    assert SourceFormats().lookup(w) is None


def test_rows_of_two_types_become_one_matrix() -> None:
    parts = [imported(kind, 4, seed) for seed, kind in enumerate(("Q4_0", "Q8_0", "Q6_K"))]
    whole = np.concatenate([dequantize(p) for p in parts])
    found = SourceFormats(parts).lookup(whole)
    assert found is not None
    assert (found.bits, found.group, len(found.weight)) == (8, 16, 12)
    np.testing.assert_array_equal(dequantize(found), whole)


def test_offsets_and_zero_points_stack_within_an_ulp() -> None:
    parts = [imported("Q4_1", 4, 1), imported("Q4_0", 4, 2)]
    made = stacked(parts)
    assert made is not None
    whole = np.concatenate([dequantize(p) for p in parts])
    np.testing.assert_allclose(dequantize(made), whole, rtol=1e-6, atol=1e-6)
    assert stacked([parts[0], imported("Q4_K", 4, 3).take(np.arange(2))]) is not None
    narrow = import_blocks("Q4_0", blocks("Q4_0", 4, 2))
    assert narrow is not None
    assert stacked([parts[0], narrow]) is None
