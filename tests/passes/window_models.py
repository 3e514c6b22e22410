"""Models, graphs and rows for the tests of the pass window."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from elision.passes import PassContext, run_pipeline
from elision.passes.ir.graph import Graph, static
from elision.passes.onnx.io import to_proto
from elision.passes.pipeline import parse
from elision.passes.window import Window
from elision.runtime.lm_compile import plain_graph
from elision.runtime.lm_onnx import start_session
from elision.runtime.lm_step import Rows
from torch.nn import functional as F

from ..runtime.canvas_models import IDS, SIZES, make
from .causal_toys import Toy

CAPACITY, V = 48, 40
TARGETS = {"fx": "torch", "onnx": "onnxruntime"}

MODELS: dict[str, Callable[[], Any]] = {
    "llada": lambda: make("llada", dtype=torch.float32),
    "llada-tied": lambda: make("llada", dtype=torch.float32, tie_word_embeddings=True),
    "dream": lambda: make("dream", dtype=torch.float32),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)),
    "modernbert": lambda: hf.ModernBertForMaskedLM(
        hf.ModernBertConfig(**SIZES, **IDS, global_attn_every_n_layers=1)
    ),
    "albert": lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(**SIZES, embedding_size=16)),
}
EXPORTED = ("dream", "bert")
"""Exported to ONNX in every run of the tests, which takes seconds each; the others in `make test-all`."""

BOTH = [
    *((name, "fx") for name in MODELS),
    *(pytest.param(name, "onnx", marks=[] if name in EXPORTED else [pytest.mark.slow]) for name in MODELS),
]


@functools.cache
def model_of(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]().eval().requires_grad_(False)
        if not hasattr(model, "stale"):  # else its weights are drawn already
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.25)
    return model


@functools.cache
def _exported(name: str, host: str) -> Graph:
    return plain_graph(model_of(name), TARGETS[host], lambda _step: None)[0]


def plain(name: str, host: str = "fx") -> Graph:
    return _exported(name, host).copy()


def eager(name: str, ids: np.ndarray) -> np.ndarray:
    return model_of(name)(torch.from_numpy(ids)[None]).logits[0].numpy()


def windowed(graph: Graph, before: str = "", **options: Any) -> Any:
    """What the manager says of the pass on a graph, which stays."""
    single = Window(**{"capacity": CAPACITY, **options})
    first = "normalise" if graph.host == "onnx" else ""
    passes = [*parse(",".join(filter(None, [first, before]))), single]
    context = PassContext(force=True, target=TARGETS[graph.host])
    return run_pipeline(graph, passes, context=context)


def runner(graph: Any) -> Callable[[list[np.ndarray]], list[np.ndarray]]:
    if graph.host == "onnx":
        session = start_session(to_proto(graph.model).SerializeToString(), 1)
        return lambda given: session.run(None, dict(zip(graph.input_names, given)))
    module = graph.to_module()

    def run(given: list[np.ndarray]) -> list[np.ndarray]:
        with torch.no_grad():
            return [item.numpy() for item in module(*map(torch.from_numpy, given))]

    return run


class Pair:
    """Both graphs, run in their host. Slots that were never written hold `empty`."""

    def __init__(self, step: Graph, refresh: Graph, empty: float = 7.0) -> None:
        self._step, self._refresh = runner(step), runner(refresh)
        self.extra = refresh.input_names[1:]
        shapes = [static(value.shape) or () for value in step.inputs[5:]]
        self.caches = [np.full(shape, empty, np.float32) for shape in shapes]

    def refresh(self, ids: np.ndarray, start: int = 0) -> np.ndarray:
        count = len(ids)
        known = {"attention_mask": np.ones((1, count), np.int64), "position_ids": np.arange(count)[None]}
        logits, *kept = self._refresh([ids[None], *(known[name] for name in self.extra)])
        for cache, new in zip(self.caches, kept, strict=True):
            cache[:, start : start + count] = new[0]
        return logits[0]

    def step(self, rows: Rows) -> np.ndarray:
        given = [rows.ids[None], rows.positions[None], rows.slots, rows.prefix, rows.ancestors]
        logits, *caches = self._step([*given, *(cache.copy() for cache in self.caches)])
        self.caches = [cache.copy() for cache in caches]
        return logits[0]


def pair_of(name: str, host: str = "fx", **options: Any) -> Pair:
    report = windowed(plain(name, host), **options)
    return Pair(report.graph, report.passes[-1].extra["refresh"])


kept_pair = functools.cache(pair_of)


def some(ids: np.ndarray, part: np.ndarray, start: int = 0, run: int | None = None, extras: Any = ()) -> Rows:
    """The positions `part` of a canvas, each of which sees the positions below `run`, and `extras`."""
    run = len(ids) if run is None else run
    ancestors = np.full((len(part), len(extras) + 1), -1, np.int32)
    ancestors[:, : len(extras)] = start + np.asarray(extras, np.int32)
    return Rows(
        ids[part],
        part.astype(np.int64),
        (start + part).astype(np.int32),
        np.tile(np.array([[start, run]], np.int32), (len(part), 1)),
        ancestors,
    )


def near(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * max(1.0, float(np.abs(wanted).max())))


class Open(Toy):
    """Attention of all to all."""

    def attend(self, input_ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
