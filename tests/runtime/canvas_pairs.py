"""Small models compiled to pairs, and what their scores must be."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from elision.runtime.canvas_open import Opened, _CanvasCompiler, open_canvas
from elision.runtime.canvas_step import Scored
from elision.runtime.lm_step import Rows

from .canvas_models import IDS, SIZES, make

V, MASK, CONTEXT = 40, 39, 48
RUNTIMES = ("torch", "onnxruntime")


def modern(**more: Any) -> Any:
    return hf.ModernBertForMaskedLM(hf.ModernBertConfig(**SIZES, **IDS, global_attn_every_n_layers=1, **more))


MODELS: dict[str, Callable[[], Any]] = {
    "llada": lambda: make("llada", dtype=torch.float32),
    "dream": lambda: make("dream", dtype=torch.float32),
    "modernbert": modern,
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)),
    "distilbert": lambda: hf.DistilBertForMaskedLM(
        hf.DistilBertConfig(
            vocab_size=V, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64
        )
    ),
}
SLOW = [pytest.mark.slow]
EVERYWHERE = [
    pytest.param(name, runtime, marks=SLOW if (name, runtime) == ("distilbert", "onnxruntime") else [])
    for name in MODELS
    for runtime in RUNTIMES
]
TORCH_FIRST = ["torch", pytest.param("onnxruntime", marks=SLOW)]


def drawn(model: Any) -> Any:
    """Weights that make scores lie far apart."""
    for parameter in model.eval().requires_grad_(False).parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.25)
    return model


@functools.cache
def model_of(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]()
        return model if hasattr(model, "stale") else drawn(model)


MADE: dict[tuple[str, str], Path] = {}
"""The folders that `opened` has compiled; each is there as long as its model."""


@functools.cache
def opened(name: str, runtime: str) -> Opened:
    fill = _CanvasCompiler.fill

    def noted(self: _CanvasCompiler, folder: Path, tokenizer: Any) -> dict[str, Any]:
        MADE[name, runtime] = folder
        return fill(self, folder, tokenizer)

    mask = None if name in ("llada", "dream") else MASK  # the others' configurations name none
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_CanvasCompiler, "fill", noted)
        return open_canvas(model_of(name), runtime=runtime, context=CONTEXT, mask=mask, threads=1)


def artefact(runtime: str) -> Path:
    opened("llada", runtime)
    return MADE["llada", runtime]


def eager(model: Any, ids: np.ndarray) -> np.ndarray:
    return model(torch.from_numpy(ids)[None]).logits[0].numpy()


def rows_of(
    ids: np.ndarray, part: np.ndarray, start: int = 0, run: int | None = None, extras: Any = ()
) -> Rows:
    """The positions `part`, each of which sees the positions below `run`, and `extras`."""
    ancestors = np.full((len(part), len(extras) + 1), -1, np.int32)
    ancestors[:, : len(extras)] = start + np.asarray(extras, np.int32)
    prefix = np.tile(np.array([[start, len(ids) if run is None else run]], np.int32), (len(part), 1))
    return Rows(ids[part], part.astype(np.int64), (start + part).astype(np.int32), prefix, ancestors)


def agrees(scored: Scored, logits: np.ndarray, k: int) -> None:
    """With what the rows' logits say, by other means than ours."""
    scale = float(np.abs(logits).max())
    wanted = torch.from_numpy(logits).double()
    values, ids = wanted.topk(k)
    assert scored.ids.dtype == np.int64 and scored.values.dtype == np.float32
    assert scored.log_sum.dtype == scored.entropy.dtype == np.float32
    np.testing.assert_array_equal(scored.ids, ids.numpy())
    np.testing.assert_allclose(scored.values, values.numpy(), rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(scored.log_sum, wanted.logsumexp(-1).numpy(), rtol=0, atol=1e-5 * scale)
    p = wanted.log_softmax(-1)
    np.testing.assert_allclose(scored.entropy, -(p.exp() * p).sum(-1).numpy(), rtol=0, atol=1e-4)
    if scored.logits is not None:
        np.testing.assert_allclose(scored.logits, logits, rtol=0, atol=1e-5 * scale)
