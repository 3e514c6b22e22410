"""The roofline model: the figures of a launch that one can count by hand, and what must hold of any."""

from __future__ import annotations

import pytest
from elision.kernels.gpu.roofline import _MODELS, GPUS, work

SIZES = {
    "batch": 2, "item": 2, "a": 128, "b": 128, "count": 256, "gone": 32, "left": 224, "slots": 224, "width": 64,
    "heads": 4, "key_heads": 2, "n": 256, "m": 256, "out_width": 64, "causal": 0, "mask": 0,
    "rows": 40, "columns": 1024, "channels": 512, "bits": 4, "group": 32, "splits": 8, "keys": 640,
}  # fmt: skip
BLOCKS = {
    "BLOCK_A": 64, "BLOCK_B": 64, "BLOCK_D": 64, "BLOCK_I": 32, "BLOCK_J": 64, "BLOCK_E": 32, "BLOCK_S": 4,
    "BLOCK_F": 32, "BLOCK_N": 32, "BLOCK_M": 64, "BLOCK_K": 128, "BLOCK_C": 64, "BLOCK_R": 4, "BLOCK": 256,
}  # fmt: skip


def test_figures_counted_by_hand() -> None:
    copied = work("gather_rows", SIZES, BLOCKS)
    assert copied.least == 2 * ((224 + 256) * 64 * 2 + 256 * 4)
    assert copied.programs == 2 * 8 * 2 and copied.flops == 0
    matched = work("best_partner", SIZES, BLOCKS)
    assert matched.least == 2 * (256 * 64 * 2 + 128 * 8) and matched.programs == 4
    assert matched.flops == 2 * (128 * 128 * (2 * 64 + 3) + 2 * 64 * 4 * 128)
    attended = work("attend", SIZES, BLOCKS)
    assert attended.flops == 8 * 256 * 256 * (2 * 128 + 6)
    assert attended.least == (8 * 256 + 4 * 256) * 128 * 2 + 2 * 256 * 4


def test_figures_of_step_graphs_counted_by_hand() -> None:
    product = work("multiply_groups", SIZES, BLOCKS)
    assert product.least == 2 * (512 * (1024 // 2 + 32 * 4) + 40 * 1024 * 2 + 40 * 512 * 4 * 8)
    assert product.programs == 2 * 16 * 8  # 40 rows are one block of 4 tiles
    assert product.flops == 2 * 512 * 1024 * (2 * 64 + 3)
    one = work("multiply_groups", {**SIZES, "rows": 1, "splits": 1}, BLOCKS)
    assert one.flops == 2 * 512 * 1024 * (2 * 16 + 3)
    assert one.least == 2 * (512 * (1024 // 2 + 32 * 4) + 1024 * 2 + 512 * 2)
    attended = work("attend_cache", SIZES, BLOCKS)
    assert attended.programs == 2 * 5 * 2 * 8  # 8 rows x 2 heads in a program
    assert attended.flops == 20 * 20 * 16 * 32 * (2 * 128 + 32 + 6)
    assert attended.least == 2 * (2 * 640 * 128 * 2 + 40 * 4 * (64 * 2 + 8 * (64 * 4 + 8)))


def test_causal_attention_skips_blocks_and_padding_costs() -> None:
    causal = work("attend", {**SIZES, "causal": 1}, BLOCKS)
    assert causal.flops == work("attend", SIZES, BLOCKS).flops * (2 + 4 + 6 + 8) // 32
    assert work("attend", {**SIZES, "width": 40}, BLOCKS).flops == work("attend", SIZES, BLOCKS).flops


@pytest.mark.parametrize("kernel", list(_MODELS))
def test_limits(kernel: str) -> None:
    found = work(kernel, SIZES, BLOCKS)
    assert 0 < found.least <= found.read and found.programs > 0
    for gpu in GPUS.values():
        assert found.seconds(gpu, 2) >= found.least / gpu.bandwidth
        assert found.bound(gpu, 2) in ("memory", "arithmetic")
        larger = work(kernel, {**SIZES, "batch": 4}, BLOCKS)
        assert larger.seconds(gpu, 2) == pytest.approx(2 * found.seconds(gpu, 2))
