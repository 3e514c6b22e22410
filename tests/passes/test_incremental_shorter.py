"""incremental behind passes that make an encoder's tokens fewer: the decoder reads what is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from elision.passes import PassContext, Refused, run_pipeline
from elision.passes.incremental import Incremental
from elision.passes.ir.fx import FxGraph
from elision.runtime.lm_export import plain_causal_graph

from ..onnx.causal_files import opened, plain_file
from ..onnx.causal_files import stepped as step_file
from ..zoo.causal import VOCABULARY, causal_model, source_of
from .step_runs import Ids, check_steps
from .test_incremental import stepped, traced

SHORTER = (
    "token-merge{r=1}",
    "segment-merge{layer=1 capacity=0.6}",
    "segment-merge{layer=1 capacity=dynamic}",
    "token-gate{layer=1 capacity=0.6}",
    "token-gate{layer=1 capacity=dynamic}",
)
HOSTS = ("torch", "onnx")
FAST = {("t5", "torch", text) for text in SHORTER} | {
    ("t5", "onnx", SHORTER[1]),
    ("whisper", "torch", SHORTER[0]),
}


def cases() -> list:
    found = [(name, host, text) for name in ("t5", "bart") for host in HOSTS for text in SHORTER]
    found += [("whisper", host, SHORTER[0]) for host in HOSTS]
    return [
        pytest.param(*one, marks=() if one in FAST else pytest.mark.slow, id="-".join(one)) for one in found
    ]


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shorter")


def long_source(model: torch.nn.Module) -> torch.Tensor:
    source = source_of(model)
    assert source is not None
    if source.dtype == torch.long:
        source = torch.randint(3, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(4))
    return source


def test_what_is_no_picture_is_not_called_one() -> None:
    """A decoder of fixed length is refused for that, whatever its encoder has."""
    shapes = {"input_ids": {1: torch.export.Dim.AUTO}, "decoder_input_ids": {}}
    inputs = {
        name: torch.ones(1, n, dtype=torch.long) for name, n in (("input_ids", 12), ("decoder_input_ids", 6))
    }
    graph = run_pipeline(
        traced(causal_model("t5"), shapes, **inputs), SHORTER[0], context=PassContext(force=True)
    ).graph
    with pytest.raises(
        Refused,
        match=r"the token ids %\w+ have the static length 6: a graph of new rows needs a dynamic one$",
    ):
        Incremental(capacity=48).run(graph, PassContext())


@pytest.mark.parametrize("name, host, passes", cases())
def test_rows_equal_the_recomputed_text(name: str, host: str, passes: str, files: Path) -> None:
    model = causal_model(name)
    graph: Any = (
        opened(plain_file(files, name)) if host == "onnx" else FxGraph.from_export(plain_causal_graph(model))
    )
    source = long_source(model)
    context = PassContext(target="onnxruntime" if host == "onnx" else "torch", force=True)
    shorter = run_pipeline(graph, passes, context=context).graph
    added = {"segments": np.arange(source.shape[1])[None] // 2, "slots": np.arange(source.shape[1] // 2)}

    def plain(ids: Ids) -> np.ndarray:
        feeds = {"decoder_input_ids": np.array([ids]), **added}
        return shorter.evaluate(
            shorter.outputs[:1], {v: feeds.get(v.name, source.numpy()) for v in shorter.inputs}
        )[0][0]

    make = step_file if host == "onnx" else stepped
    steps, outcome = make(shorter.copy(), source, more=added)
    assert outcome.statistics["cached attentions"] == 2
    length = source.shape[-1] // (2 if name == "whisper" else 1)  # its encoder begins with a stride of 2
    may_keep_all = passes == "token-gate{layer=1 capacity=dynamic}"  # it is not trained
    keys = [c for c in steps.crosses if c.ndim == 4]
    assert keys and all(c.shape[2] < length + may_keep_all for c in keys)  # the decoder reads fewer
    check_steps(steps, plain, np.random.default_rng(0), VOCABULARY)
