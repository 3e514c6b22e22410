"""The pass key-scores: what attention computes and throws away, in both hosts; other outputs keep their bits."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from elision.passes.base import PassContext
from elision.passes.errors import NothingMatched, Refused
from elision.passes.incremental import Incremental
from elision.passes.key_scores import KeyScores
from elision.passes.manager import run_pipeline

from ..onnx.causal_files import opened, plain_file
from ..zoo.causal import VOCABULARY, causal_model
from .step_runs import path_to, random_tree
from .test_incremental import plain_graph

CAPACITY, PAST, NODES = 48, 9, 7
PLAIN = ("llama", "qwen3", "gpt2", "falcon-grouped", "granite")
COUNTING = {"bloom": "a bias that goes by", "mpt": "a bias that goes by", "mistral": "a window of keys"}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scored")


def made(graph: Any, text: str = "") -> Any:
    return run_pipeline(
        graph, f"incremental{{capacity={CAPACITY}}}{text}", context=PassContext(force=True)
    ).graph


def feeds(graph: Any, rng: np.random.Generator) -> tuple[dict[Any, np.ndarray], list[list[int]], list[int]]:
    """A prompt of PAST ids and a tree behind it in one call, its slots anywhere; what each row sees; the ids."""
    parents = random_tree(rng, NODES)
    ids = rng.integers(3, VOCABULARY, PAST + NODES)
    free = (PAST + rng.permutation(CAPACITY - PAST)[:NODES]).tolist()
    paths = [[free[n] for n in path_to(parents, node)] for node in range(NODES)]
    seen = [list(range(m + 1)) for m in range(PAST)] + [[*range(PAST), *path] for path in paths]
    width = max(map(len, paths))
    listed = [[m] + [-1] * (width - 1) for m in range(PAST)] + [p + [-1] * (width - len(p)) for p in paths]
    given = {
        "input_ids": ids[None],
        "position_ids": np.array([[len(one) - 1 for one in seen]]),
        "slots": np.array([*range(PAST), *free], np.int32),
        "prefix": np.array([*([0, m] for m in range(PAST)), *[[0, PAST]] * NODES], np.int32),
        "ancestors": np.array(listed, np.int32),
    }
    found = {}
    for value, name in zip(graph.inputs, graph.input_names):
        shape = [int(d) for d in value.shape] if name not in given else []
        found[value] = given.get(name, rng.standard_normal(shape).astype(np.float32))
    return found, seen, ids.tolist()


def run(graph: Any, given: dict[Any, np.ndarray]) -> dict[str, np.ndarray]:
    return dict(zip(graph.output_names, graph.evaluate(graph.outputs, given)))


@cache
def attentions(name: str, ids: tuple[int, ...]) -> list[np.ndarray]:
    """transformers' own probabilities [heads, n, n] of every layer."""
    model: Any = causal_model(name)
    before, model.config._attn_implementation = model.config._attn_implementation, "eager"
    try:
        with torch.no_grad():
            found = model(torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
    finally:
        model.config._attn_implementation = before
    return [layer[0].numpy() for layer in found]


def check(graph: Any, name: str, rng: np.random.Generator) -> None:
    """Scores of a chain are transformers' attention probabilities, those of a tree's node of the text that it ends."""
    scored = run_pipeline(graph, "key-scores", context=PassContext(force=True)).graph
    given, seen, ids = feeds(scored, rng)
    results = run(scored, given)
    slot_of = given[scored.inputs[2]].tolist()
    token = {slot: ids[row] for row, slot in enumerate(slot_of)}
    for layer in range(2):
        scores = results[f"key_scores.{layer}"]
        shared = results[f"key_cache.{layer}.out"].shape[0]
        assert scores.shape == (PAST + NODES, shared, CAPACITY) and scores.dtype == np.float32
        for row, slots in enumerate(seen):
            weights = attentions(name, tuple(token[slot] for slot in slots))[layer][:, -1]
            wanted = np.zeros((shared, CAPACITY), np.float32)
            wanted[:, slots] = weights.reshape(shared, -1, len(slots)).sum(1)
            np.testing.assert_allclose(scores[row], wanted, atol=2e-5)
    plain = run(graph, {value: given[other] for value, other in zip(graph.inputs, scored.inputs)})
    assert list(results) == [*plain, "key_scores.0", "key_scores.1"]
    for output, array in plain.items():
        np.testing.assert_array_equal(results[output], array)


@pytest.mark.parametrize("name", PLAIN)
def test_torch(name: str) -> None:
    check(made(plain_graph(name)), name, np.random.default_rng(0))


@pytest.mark.parametrize("name", ["llama", "cohere"])
def test_onnx(name: str, folder: Path) -> None:
    check(made(opened(plain_file(folder, name))), name, np.random.default_rng(1))


@pytest.mark.parametrize("name", COUNTING)
def test_places_that_count_are_refused(name: str) -> None:
    with pytest.raises(Refused, match=f"cached_attention.*has {COUNTING[name]}.*wrong places$"):
        made(plain_graph(name), ",key-scores")


def test_a_graph_without_a_cache() -> None:
    with pytest.raises(NothingMatched, match="after incremental and before lower"):
        KeyScores().run(plain_graph("llama"), PassContext())


def test_soft_caps_are_in_the_scores() -> None:
    """gemma2's attentions without their windows, against the reference of the op."""
    graph = plain_graph("gemma2")
    Incremental(capacity=CAPACITY).run(graph, PassContext())
    attention = next(op for op in graph.ops_of("elision") if not op.attrs.get("window"))
    assert attention.attrs["softcap"] == 2.0
    given = [attention.operand(0), attention.outputs[1], attention.operand(6), attention.operand(7)]
    attrs = {name: attention.attrs[name] for name in ("scale", "softcap")}
    (scores,) = graph.insert("key_scores", given, attrs, after=attention)
    fed, _, _ = feeds(graph, np.random.default_rng(2))
    operands = [torch.from_numpy(a) for a in graph.evaluate(given, fed)]
    wanted = torch.ops.elision.key_scores(*operands, **attrs)
    np.testing.assert_allclose(graph.evaluate([scores], fed)[0], wanted.numpy(), atol=1e-6)
    assert np.allclose(wanted.sum(-1), 2.0, atol=1e-5)
