"""Running a graph of new rows: chains and trees against a cache, and what they must equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from elision.passes.ir.graph import Graph, static

Ids = Sequence[int]


class Steps:
    """A step graph with its caches. `feed` runs rows and returns their logits [rows, V]."""

    def __init__(self, graph: Graph, crosses: Sequence[np.ndarray] = ()) -> None:
        self.graph = graph
        self.crosses = [np.asarray(c) for c in crosses]
        self.count = 0  # rows of the text in the cache
        self.caches = [
            np.zeros(static(value.shape) or (), value.dtype)
            for value, name in zip(graph.inputs, graph.input_names)
            if name.startswith(("key_cache.", "value_cache."))
        ]

    def feed(self, ids: Ids, slots: Ids, positions: Ids, prefixes: Any, ancestors: Any) -> np.ndarray:
        given = [
            np.array([ids], np.int64),
            np.array([positions], np.int64),
            np.array(slots, np.int32),
            np.array(prefixes, np.int32),
            np.array(ancestors, np.int32),
            *self.caches,
            *self.crosses,
        ]
        found = self.graph.evaluate(self.graph.outputs, dict(zip(self.graph.inputs, given)))
        self.caches = found[len(found) - len(self.caches) :]
        return found[0][0]

    def text(self, ids: Ids, chunks: Sequence[int] = ()) -> np.ndarray:
        """Append a text, in chunks of so many rows (the rest in one)."""
        rows, done = [], 0
        for size in [*chunks, len(ids) - sum(chunks)]:
            at = list(range(self.count, self.count + size))
            rows.append(self.feed(ids[done : done + size], at, at, [[0, s] for s in at], [[s] for s in at]))
            self.count, done = self.count + size, done + size
        return np.concatenate(rows)

    def tree(self, ids: Ids, parents: Sequence[int], slots: Sequence[int] | None = None) -> np.ndarray:
        """Logits of the nodes of a tree behind the text; the text stays as it was."""
        slots = list(range(self.count, self.count + len(ids))) if slots is None else slots
        paths = [path_to(parents, node) for node in range(len(ids))]
        width = max(map(len, paths)) + 1
        listed = [[slots[n] for n in path] + [-1] * (width - len(path)) for path in paths]
        positions = [self.count + len(path) - 1 for path in paths]
        return self.feed(ids, slots, positions, [[0, self.count]] * len(ids), listed)


def path_to(parents: Sequence[int], node: int) -> list[int]:
    """The nodes from the root to `node`."""
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def random_tree(rng: np.random.Generator, nodes: int) -> list[int]:
    """Parents in topological order; the first node is the root, some others are roots too."""
    return [-1, *(int(rng.integers(max(-1, i - 5), i)) for i in range(1, nodes))]


def check_steps(
    steps: Steps, plain: Callable[[Ids], np.ndarray], rng: np.random.Generator, vocabulary: int
) -> None:
    """A text in chunks, then trees behind it, then one row more: all rows equal the recomputed text within 1e-5
    of the largest logit."""
    text = rng.integers(3, vocabulary, 11).tolist()
    wanted = plain(text)
    close(steps.text(text, chunks=(1, 4)), wanted)
    for nodes in (1, 9, 14):
        parents, ids = random_tree(rng, nodes), rng.integers(3, vocabulary, nodes).tolist()
        # Slots in any order: a row says which it sees.
        slots = (steps.count + rng.permutation(20)[:nodes]).tolist()
        found = steps.tree(ids, parents, slots)
        for node in range(nodes):
            path = [ids[n] for n in path_to(parents, node)]
            close(found[node], plain([*text, *path])[-1], scale=float(np.abs(wanted).max()))
    more = rng.integers(3, vocabulary, 2).tolist()
    close(steps.text(more, chunks=(1,)), plain([*text, *more])[-2:])


def close(found: np.ndarray, wanted: np.ndarray, scale: float | None = None) -> None:
    scale = max(float(np.abs(wanted).max()) if scale is None else scale, 1.0)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * scale)


def logits_of(model: Any, source: torch.Tensor | None = None) -> Callable[[Ids], np.ndarray]:
    """What transformers says: ids -> logits [n, V]."""

    def run(ids: Ids) -> np.ndarray:
        tensor = torch.tensor([list(ids)])
        with torch.no_grad():
            if source is None:
                return model(input_ids=tensor, use_cache=False).logits[0].numpy()
            return model(source, decoder_input_ids=tensor, use_cache=False).logits[0].numpy()

    return run
