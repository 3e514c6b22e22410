"""Layers of GPTQ and AWQ checkpoints, packed here as their own programs pack them."""

from __future__ import annotations

import numpy as np
import pytest
from elision.passes.errors import ModelFileError
from elision.passes.formats import SourceFormats, dequantize
from elision.passes.formats.checkpoints import dequantized, layers, read_layer, scheme_of

K, N, GROUP = 64, 24, 32
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [a, b * 32 / bits] -> int32 [a, b], the lowest bits first."""
    per = 32 // bits
    parts = codes.reshape(len(codes), -1, per).astype(np.uint32) << np.arange(0, 32, bits, dtype=np.uint32)
    return np.bitwise_or.reduce(parts, -1).view(np.int32)


def random_layer(bits: int, order: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """codes [K, N], zeros [G, N], scales [G, N], group of every column [K], the matrix [N, K]."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (K, N), dtype=np.uint8)
    zeros = rng.integers(0, 2**bits, (K // GROUP, N), dtype=np.uint8)
    scales = rng.uniform(0.01, 0.02, (K // GROUP, N)).astype(np.float16)
    index = np.arange(K) // GROUP if order is None else (np.arange(K) // GROUP)[order]
    w = (codes.astype(np.float32) - zeros[index]) * scales[index].astype(np.float32)
    return codes, zeros, scales, index.astype(np.int32), np.ascontiguousarray(w.T)


def gptq(
    bits: int, version: int, order: np.ndarray | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    codes, zeros, scales, index, w = random_layer(bits, order)
    stored = zeros - (version == 1) & 2**bits - 1
    tensors = {
        "a.qweight": np.ascontiguousarray(words(np.ascontiguousarray(codes.T), bits).T),
        "a.qzeros": words(stored, bits),
        "a.scales": scales,
        "a.g_idx": index,
    }
    return tensors, w


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq(bits: int, version: int) -> None:
    tensors, w = gptq(bits, version)
    config = {"quant_method": "gptq", "bits": bits, "group_size": GROUP}
    scheme = scheme_of({**config, "checkpoint_format": "gptq_v2"} if version == 2 else config)
    made = read_layer(tensors, "a", scheme)
    assert (made.bits, made.group, made.order) == (bits, GROUP, None)
    np.testing.assert_array_equal(dequantize(made), w)
    del tensors["a.g_idx"]
    np.testing.assert_array_equal(dequantize(read_layer(tensors, "a", scheme)), w)


def test_gptq_with_columns_in_order_of_activity() -> None:
    order = np.random.default_rng(0).permutation(K)
    tensors, w = gptq(4, 1, order)
    made = read_layer(tensors, "a", scheme_of({"quant_method": "gptq", "bits": 4, "group_size": GROUP}))
    assert made.order is not None
    np.testing.assert_array_equal(dequantize(made), w)
    found = SourceFormats([made]).lookup(w[::-1].copy())
    assert found is not None and found.order is not None
    np.testing.assert_array_equal(dequantize(found), w[::-1])
    tensors["a.g_idx"][:] = 0
    with pytest.raises(ModelFileError, match="a: g_idx has groups that are not of 32 columns each"):
        read_layer(tensors, "a", scheme_of({"quant_method": "gptq", "bits": 4, "group_size": GROUP}))


def test_one_group_for_a_whole_row() -> None:
    codes, zeros, scales, _, _ = random_layer(4)
    tensors = {
        "a.qweight": np.ascontiguousarray(words(np.ascontiguousarray(codes.T), 4).T),
        "a.qzeros": words(zeros[:1] - 1 & 15, 4),
        "a.scales": scales[:1],
    }
    made = read_layer(tensors, "a", scheme_of({"quant_method": "gptq", "bits": 4, "group_size": -1}))
    assert made.group == K
    np.testing.assert_array_equal(
        dequantize(made).T, (codes.astype(np.float32) - zeros[:1]) * scales[:1].astype(np.float32)
    )


def awq() -> tuple[dict[str, np.ndarray], np.ndarray]:
    codes, zeros, scales, _, w = random_layer(4)
    mixed = [a.reshape(len(a), -1, 8)[:, :, AWQ].reshape(len(a), -1) for a in (codes, zeros)]
    return {"a.qweight": words(mixed[0], 4), "a.qzeros": words(mixed[1], 4), "a.scales": scales}, w


def test_awq_as_a_plain_state_dict() -> None:
    tensors, w = awq()
    tensors |= {"a.bias": np.ones(N, np.float32), "b.weight": np.ones((2, 2), np.float32)}
    assert layers(tensors) == ["a"]
    scheme = scheme_of({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"})
    found = {name: (array, made) for name, array, made in dequantized(tensors, scheme)}
    assert set(found) == {"a.weight", "a.bias", "b.weight"}
    np.testing.assert_array_equal(found["a.weight"][0], w)
    made = found["a.weight"][1]
    assert made is not None and (made.bits, made.group) == (4, GROUP)


@pytest.mark.parametrize(
    "config, said",
    [
        ({"quant_method": "bitsandbytes"}, "weights quantized by bitsandbytes cannot be read"),
        ({"quant_method": "gptq", "bits": 3}, "gptq weights of 3 bits cannot be read"),
        ({"quant_method": "awq", "bits": 8}, "awq weights of 8 bits cannot be read"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq weights in the layout gemv"),
    ],
)
def test_unknown_schemes_are_named(config: dict[str, object], said: str) -> None:
    with pytest.raises(ModelFileError, match=said):
        scheme_of(config)


def test_broken_layers_are_named() -> None:
    tensors, _ = awq()
    scheme = scheme_of({"quant_method": "awq", "bits": 4, "group_size": GROUP})
    with pytest.raises(ModelFileError, match="do not fit together"):
        read_layer({**tensors, "a.scales": tensors["a.scales"][:1]}, "a", scheme)
    del tensors["a.qzeros"]
    with pytest.raises(ModelFileError, match="a: the tensor qzeros is missing"):
        read_layer(tensors, "a", scheme)
