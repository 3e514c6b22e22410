"""elision tune over the other passes: the layer where segments become one, a budget and its layer, a gate's capacity,
bits beside r. What the search reports is what the chosen pipeline does to the data when it is applied by hand."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from elision.passes.errors import ElisionError
from elision.runtime.search_data import correlation

import elision

from ..analysis import toys
from .test_search import ByOperations, exported, wide

__all__ = ["exported"]  # a fixture

CALLS, BATCH = 4, 2


def tuned(
    target: Any, data: dict[str, np.ndarray], passes: str, at_least: float, **more: Any
) -> elision.TuneResult:
    common = {"batch": BATCH, "seconds": 1e9, "watch": ByOperations(), "tries": 10}
    return elision.tune(target, data, passes=passes, at_least=at_least, **{**common, **more})


def deep(width: int = 64) -> torch.nn.Module:
    """A text model that is wide enough for fewer tokens to pay on paper."""

    class Deep(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(50, width)
            self.blocks = torch.nn.ModuleList(toys.Block(width) for _ in range(4))

        def forward(self, ids: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
            x = self.table(ids)
            mask = (1 - valid.to(x.dtype))[:, None, None, :] * -1e9
            for block in self.blocks:
                x = block(x, mask=mask)
            weight = valid[..., None].to(x.dtype)
            return (x * weight).sum(1) / weight.sum(1)

    torch.manual_seed(5)
    return Deep().eval()


def texts(length: int = 24) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    samples = CALLS * BATCH
    valid = np.ones((samples, length), np.int64)
    valid[1::2, length - 6 :] = 0
    return {"ids": generator.integers(0, 50, (samples, length)), "valid": valid}


def applied(target: torch.nn.Module, passes: str, data: dict[str, np.ndarray]) -> list[float]:
    """Correlation of every call, by `optimize` alone."""
    calls = [
        {name: torch.as_tensor(array[i : i + BATCH]) for name, array in data.items()}
        for i in range(0, CALLS * BATCH, BATCH)
    ]
    own = [name for name in ("ids", "valid") if name in data]
    result = elision.optimize(target, passes, tuple(calls[0][name] for name in own), force=True)
    found = []
    with torch.no_grad():
        for call in calls:
            before = target(*(call[name] for name in own))
            after = result.module(
                *(call[name] for name in own), *(v for k, v in call.items() if k not in own)
            )
            found.append(correlation([before.numpy()], [after.numpy()]))
    return found


@pytest.mark.parametrize("passes, at_least", [("segment-merge", 0.9), ("token-gate{layer=2}", 0.3)])
def test_text(passes, at_least):
    data = texts()
    if passes == "segment-merge":
        data["segments"] = np.broadcast_to(np.arange(24) // 2, data["ids"].shape).copy()
    result = tuned(deep(), data, passes, at_least)
    assert result.chosen.ratio is not None and result.chosen.ratio < 1
    each = applied(deep(), result.pipeline, data)
    assert float(np.mean(each[:3])) == pytest.approx(result.chosen.quality, abs=1e-4)
    assert each[3] == pytest.approx(result.chosen.held_out, abs=1e-4) and each[3] >= at_least
    # Nothing that was tried and keeps the bound on all calls is faster.
    faster = [t for t in result.trials if t.flops < 0.99 * result.chosen.flops]
    assert all(t.quality < at_least or (t.held_out or 0.0) < at_least for t in faster)


def test_segments_need_their_input():
    with pytest.raises(ElisionError, match="takes an input 'segments', which the data does not have"):
        tuned(deep(), texts(), "segment-merge", 0.9)


def test_the_layer_of_a_cut():
    """A later cut keeps more of the outputs: with the budget said, the search has the layer alone."""
    images = np.random.default_rng(0).random((CALLS * BATCH, 3, 32, 32), np.float32)
    found = []
    for at_least in (0.9, 0.999):
        result = tuned(wide(), {"x": images}, "token-drop{policy=cls-topk budget=0.5}", at_least)
        assert min(result.chosen.quality, result.chosen.held_out) >= at_least
        found.append((result.chosen, int(re.findall(r"layer=(\d+)", result.pipeline)[0])))
    (cheap, early), (dear, late) = found
    assert early <= late and cheap.flops <= dear.flops
    # A budget beside it.
    both = tuned(wide(), {"x": images}, "token-drop{policy=cls-topk}", 0.9).chosen
    assert both.quality >= 0.9 and both.flops < dear.flops


def test_bits_beside_r(exported):
    """An ONNX file with r and bits for every place: the text builds the same file by hand."""
    name = onnxruntime.InferenceSession(str(exported)).get_inputs()[0].name
    images = np.random.default_rng(0).random((CALLS * BATCH, 3, 32, 32), np.float32)
    result = tuned(exported, {name: images}, "token-merge,quantize{activations=true}", 0.95, tries=8)
    kinds = {re.sub(r"\{.*?\}", "", t.text) for t in result.trials if t.text}
    assert "token-merge,quantize" in kinds  # both were tried together
    assert result.chosen.quality >= 0.95 and result.chosen.held_out >= 0.95
    model = elision.optimize(exported, result.pipeline, (images[:BATCH],)).model
    assert model.SerializeToString() == result.result.model.SerializeToString()
