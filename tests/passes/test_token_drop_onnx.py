"""Token dropping on ONNX files, run by plain onnxruntime: the same as on torch graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

import elision
from tests.zoo.export import onnx_outputs, quiet
from tests.zoo.model import Built
from tests.zoo.vlm import VLMS, onnx_file

from .drop_models import call_of, dropped, gone_in, hidden, run, sliced

FAST = ("llava_batch", "internvl", "llava_next")
SLOW = (
    "llava",
    "llava_onevision",
    "smolvlm",
    "paligemma",
    "gemma3",
    "qwen2_5_vl",
    "qwen3_vl",
    "mllama",
    "blip2",
)
EVERY = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
QUICK = {"llava_batch": ("hired", "fastv", "visionzip"), "internvl": ("cls-topk",)}
POLICIES = ("cls-topk", "hired", "similarity", "uniform", "random", "tail", "fastv")
CASES = [
    pytest.param(name, policy, marks=[] if policy in QUICK.get(name, ()) else pytest.mark.slow)
    for name in (*FAST, *SLOW)
    for policy in (*POLICIES, *(("visionzip", "prumerge") if name in ("llava_batch", "llava_next") else ()))
    if not (name == "mllama" and policy == "fastv")
]


def optimized(name: str, folder: Path, passes: str, **options: Any) -> Any:
    inputs = VLMS[name].inputs(2)
    with quiet():
        return elision.optimize(
            str(onnx_file(VLMS[name], folder)), passes, example_inputs=inputs, force=True, **options
        )


def outputs(model: onnx.ModelProto, call: Built) -> list[Tensor]:
    return [torch.from_numpy(array) for array in onnx_outputs(model, call)]


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_both_hosts_drop_the_same(name: str, policy: str, zoo_folder: Path) -> None:
    result = optimized(name, zoo_folder, f"token-drop{{policy={policy} budget=0.25}}")
    call = call_of(name)
    expected = run(dropped(name, policy=policy, budget=0.25)[0], call.args)
    found = outputs(result.model, call)[0]
    assert torch.equal(gone_in(found), gone_in(expected))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_the_file_needs_no_library_of_ours(zoo_folder: Path) -> None:
    model = optimized("llava_batch", zoo_folder, "token-drop{policy=hired budget=0.25}").model
    onnx.checker.check_model(model)
    local = {(f.domain, f.name) for f in model.functions}
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    named = {(n.domain, n.op_type) for n in nodes if n.domain not in ("", "com.microsoft")}
    assert named and named <= local


@pytest.mark.slow
def test_tiles_share_the_budget_in_both_hosts(zoo_folder: Path) -> None:
    options: dict[str, Any] = {"budget": 0.25, "tiles": 5, "grid": (2, 2)}
    for more in ({}, {"compat": "reference"}):
        words = "".join(f" {key}={value}" for key, value in more.items())
        text = f"token-drop{{budget=0.25 tiles=5 grid=[2,2]{words}}}"
        call = call_of("llava_next")
        found = outputs(optimized("llava_next", zoo_folder, text).model, call)[0]
        expected = run(dropped("llava_next", **options, **more)[0], call.args)
        assert torch.equal(gone_in(found), gone_in(expected))
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_dropping_equals_hiding_and_rows_do_not_see_each_other(zoo_folder: Path) -> None:
    name = "llava_batch"
    model = optimized(name, zoo_folder, "token-drop{policy=similarity budget=7}").model
    call = call_of(name, 3)
    found = outputs(model, call)[0]
    gone = gone_in(found)
    assert gone.sum(1).tolist() == [57] * 3
    torch.testing.assert_close(found[~gone], hidden(call, gone)[~gone], atol=1e-3, rtol=1e-3)
    for row in range(3):
        alone = outputs(model, Built(call.module, sliced(call.args, row)))[0]
        torch.testing.assert_close(alone[0], found[row], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("budget", ["1.0", pytest.param("1", marks=pytest.mark.slow)])
def test_a_budget_of_one_is_the_file_itself(name: str, budget: str, zoo_folder: Path) -> None:
    result = optimized(name, zoo_folder, f"token-drop{{budget={budget}}}")
    file = onnx_file(VLMS[name], zoo_folder)
    assert result.untouched
    call = call_of(name)
    for before, after in zip(onnx_outputs(file, call), onnx_outputs(result.model, call), strict=True):
        np.testing.assert_array_equal(after, before)


@pytest.mark.slow
def test_the_map_and_the_kept_rows_as_outputs(zoo_folder: Path) -> None:
    name: str = "llava_batch"
    options: dict[str, Any] = {"policy": "cls-topk", "budget": 0.25}
    call = call_of(name)
    text = "token-drop{policy=cls-topk budget=0.25 outputs=kept}"
    found = outputs(optimized(name, zoo_folder, text).model, call)
    expected = run(dropped(name, outputs="kept", **options)[0], call.args)
    torch.testing.assert_close(found[0], expected[0], atol=1e-3, rtol=1e-3)
    assert torch.equal(found[1], expected[1])
    result = optimized(name, zoo_folder, "token-drop{policy=cls-topk budget=0.25}", token_map=True)
    slots = outputs(result.model, call)[1]
    assert torch.equal(slots, run(dropped(name, want_map=True, **options)[0], call.args)[1])


def test_a_text_without_its_image_does_not_fit(zoo_folder: Path) -> None:
    name = "llava_batch"
    call = call_of(name)
    ids = call.args[0].clone()
    ids[1] = torch.where(ids[1] == VLMS[name].placeholder, 7, ids[1])
    args = (ids, *call.args[1:])
    result = optimized(name, zoo_folder, "token-drop{policy=cls-topk budget=0.25}")
    found = outputs(result.model, Built(call.module, args))[0]
    expected = run(dropped(name, policy="cls-topk", budget=0.25)[0], args)
    assert found[1].isnan().all() and found[0].isfinite().all()
    torch.testing.assert_close(found[0], expected[0], atol=1e-3, rtol=1e-3)
    assert torch.equal(found.isnan(), expected.isnan())
