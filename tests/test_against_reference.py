"""The compiler's merging equals published token merging, in both hosts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import elision
from tests import reference_tome as tome
from tests.zoo import ZOO
from tests.zoo.export import exported, onnx_file, onnx_outputs, quiet

MODELS = [
    "timm_vit",
    "timm_vit_gap",
    "timm_vit_avg",
    "timm_vit_qk_norm",
    "timm_vit_registers",
    "timm_deit3",
    "timm_deit_distilled",
]
BUDGETS: list[int | list[int]] = [1, 3, 7, [4, 0, 2], [0, 3]]


def _text(r: int | list[int], more: str = "") -> str:
    listed = r if isinstance(r, int) else "[" + ",".join(map(str, r)) + "]"
    return f"token-merge{{r={listed}{more}}}"


@pytest.mark.parametrize("r", BUDGETS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_torch_graph_equals_the_reference(name: str, r: int | list[int]) -> None:
    entry = ZOO[name]
    call = entry.build(3)
    wanted, record = tome.merged_call(call.module, *call.args, r=r)
    with quiet():
        result = elision.optimize(exported(entry), _text(r), example_inputs=call.args, force=True)
    np.testing.assert_allclose(call.run(result.module)[0].numpy(), wanted.numpy(), rtol=1e-4, atol=1e-4)
    # A block's attention sees what the block before it left.
    assert list(result.report.cost_after.tokens_per_block) == [entry.tokens, *record.tokens[:-1]]


@pytest.mark.parametrize("r", [3, [4, 0, 2]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_onnx_file_equals_the_reference(name: str, r: int | list[int], zoo_folder: Path) -> None:
    entry = ZOO[name]
    call = entry.build(3)
    wanted, _ = tome.merged_call(call.module, *call.args, r=r)
    with quiet():
        result = elision.optimize(
            onnx_file(entry, zoo_folder), _text(r), example_inputs=call.args, force=True
        )
    got = onnx_outputs(result.model, call)[0]
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["timm_vit", "timm_vit_gap"])
def test_without_proportional_attention(name: str) -> None:
    entry = ZOO[name]
    call = entry.build(2)
    wanted, _ = tome.merged_call(call.module, *call.args, r=3, proportional=False)
    with quiet():
        result = elision.optimize(
            exported(entry), _text(3, " proportional=false"), example_inputs=call.args, force=True
        )
    np.testing.assert_allclose(call.run(result.module)[0].numpy(), wanted.numpy(), rtol=1e-4, atol=1e-4)
