"""What a hard gate leaves to outputs: rows of deleted tokens, means, and files that plain onnxruntime runs."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from elision.passes.ir.fx import FxGraph
from elision.passes.token_gate import TokenGate
from torch import Tensor, nn

import elision
from tests.reference_gate import Gate
from tests.zoo.export import export, onnx_outputs, quiet, saved
from tests.zoo.model import Built, ZooModel
from tests.zoo.text import MODELS

from .gate_models import CLOSE, args_of, gated, run, t5, weights

ZOO = {entry.name: entry for entry in MODELS}
LAYER = 1
OTHERS = ("distilbert", "modernbert", "siglip_text", "electra", "roberta")


@cache
def graph_of(name: str) -> FxGraph:
    entry = ZOO[name]
    with quiet():
        return FxGraph.from_export(export(entry.build(2), entry.dynamic_shapes()))


def hidden_at(bert: nn.Module, ids: Tensor, layer: int) -> Tensor:
    """What BERT's block `layer` reads of one sample without padding, [1, n, C]."""
    hidden = bert.embeddings(ids[None])
    for block in bert.encoder.layer[:layer]:
        hidden = first(block(hidden))
    return hidden


def first(found: Tensor | tuple) -> Tensor:
    return found[0] if isinstance(found, tuple) else found


def reference(bert: nn.Module, ids: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
    """The last hidden states [n, C] of one sample, deleted tokens as they were at the gate; and who is left."""
    hidden = hidden_at(bert, ids, gate.layer)
    values = gate.values(hidden[0])
    values[0] = 0  # the class token
    keep = gate.kept(values)
    left = hidden[:, keep]
    for block in bert.encoder.layer[gate.layer :]:
        left = first(block(left))
    return hidden[0].index_copy(0, keep, left[0]), keep


def bert_of(module: nn.Module) -> nn.Module:
    inner = module.inner
    return getattr(inner, "bert", inner)


@torch.no_grad()
def test_deleted_tokens_read_what_they_had_at_the_gate() -> None:
    entry, made = ZOO["bert_tokens"], weights(4)
    call = entry.build(2)
    graph, outcome = gated(graph_of("bert_tokens"), layer=LAYER, capacity=0.9, protect=1, arrays=made)
    logits = run(graph, call.args)
    gate = Gate(made["weight"], made["bias"], LAYER)
    for row, ids, mask in zip(logits, *call.args):
        real = mask > 0
        hidden, keep = reference(bert_of(call.module), ids[real], gate)
        assert 2 < len(keep) < int(real.sum()) * 0.9
        torch.testing.assert_close(row[real], call.module.inner.classifier(hidden), **CLOSE)
    assert outcome.statistics["blend_tokens"] == 1 and "restore_tokens" not in outcome.statistics


@torch.no_grad()
def test_a_mean_over_the_mask_is_one_over_the_tokens_that_are_left() -> None:
    entry, made = ZOO["bert_mean"], weights(6)
    call = entry.build(2)
    graph, _ = gated(graph_of("bert_mean"), layer=LAYER, capacity=0.9, protect=1, arrays=made)
    found = run(graph, call.args)
    gate = Gate(made["weight"], made["bias"], LAYER)
    for row, ids, mask in zip(found, *call.args):
        hidden, keep = reference(bert_of(call.module), ids[mask > 0], gate)
        torch.testing.assert_close(row, hidden[keep].mean(0), **CLOSE)


@torch.no_grad()
def test_soft_means_weigh_tokens_by_their_gates() -> None:
    """With gates that are all nearly 0 or nearly k, soft is hard for what reads a mean."""
    entry = ZOO["bert_mean"]
    made = {"weight": weights(2)["weight"] * 200, "bias": torch.zeros(1)}
    call = entry.build(2)
    options = {
        "layer": 2,
        "protect": 1,
        "arrays": made,
    }  # nothing but keys and the mean is behind the last block
    soft = run(gated(graph_of("bert_mean"), mode="soft", **options)[0], call.args)[0]
    hard = run(gated(graph_of("bert_mean"), capacity=0.95, **options)[0], call.args)
    torch.testing.assert_close(soft, hard, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "name",
    ["t5_mean", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)],
)
def test_encoders_of_the_zoo(name: str) -> None:
    entry: ZooModel = ZOO[name]
    call = entry.build(2)
    norm = "layer"
    graph, outcome = gated(graph_of(name), layer=1, capacity=0.6, norm=norm, arrays=weights(1))
    assert "15 of 24 tokens at most are left" in outcome.notes[0]
    batch = run(graph, call.args)
    assert batch.shape == call.run()[0].shape and batch.isfinite().all()
    assert not torch.allclose(batch, call.run()[0], atol=1e-3)
    for row in range(2):
        alone = run(graph, tuple(arg[row : row + 1] for arg in call.args))
        torch.testing.assert_close(alone[0], batch[row], **CLOSE)


def test_the_map_of_what_was_deleted_is_put_out() -> None:
    call = ZOO["bert"].build(2)
    one = TokenGate(layer=1, capacity=0.5, arrays=weights(2))
    result = elision.optimize(
        call.module, [one], call.args, dynamic_shapes=ZOO["bert"].dynamic_shapes(), token_map=True, force=True
    )
    _, slot = run(result.module, call.args)
    assert slot.shape == (2, 24) and slot.max() < 12 and slot.min() == -1
    assert (slot[:, 0] == 0).all()  # the class token
    ends = call.args[1].sum(1) - 1
    assert (slot[torch.arange(2), ends] > 0).all()  # the last token of each sample


# ---- ONNX ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def t5_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    batch = torch.export.Dim("batch", min=1, max=64)
    program = export(Built(t5(), args_of()), ({0: batch},) * 3)
    names = ["input_ids", "attention_mask", "decoder_input_ids"]
    return saved(program, names, tmp_path_factory.mktemp("gate") / "t5.onnx")


@pytest.mark.parametrize(
    ("mode", "softmax1"),
    [pytest.param("hard", False, marks=pytest.mark.slow), ("hard", True), ("soft", True)],
)
def test_files_run_anywhere_and_say_the_same(t5_file: Path, mode: str, softmax1: bool) -> None:
    options = {"mode": mode, "layer": 1, "capacity": 0.6, "softmax1": softmax1, "arrays": weights(3)}
    args = args_of((14, 9), 14)
    file = elision.optimize(str(t5_file), [TokenGate(**options)], args, force=True)
    names = [tensor.name for tensor in file.model.graph.initializer]
    assert sum("elision_gate" in name for name in names) == 2
    found = onnx_outputs(file.model, Built(t5(), args))
    graph, _ = gated(t5_static(), **options)
    wanted = run(graph, args)
    for one, other in zip(found, wanted if isinstance(wanted, tuple) else [wanted], strict=True):
        np.testing.assert_allclose(one, other.numpy(), atol=5e-4, rtol=1e-3)


@cache
def t5_static() -> FxGraph:
    batch = torch.export.Dim("batch", min=1, max=64)
    with quiet():
        return FxGraph.from_export(export(Built(t5(), args_of()), ({0: batch},) * 3))


@pytest.mark.slow
def test_token_outputs_of_a_file(tmp_path: Path) -> None:
    entry, made = ZOO["bert_tokens"], weights(4)
    call = entry.build(2)
    program = export(call, entry.dynamic_shapes())
    file = saved(program, list(entry.inputs(2)), tmp_path / "bert.onnx")
    options = {"layer": LAYER, "capacity": 0.9, "protect": 1, "arrays": made}
    result = elision.optimize(str(file), [TokenGate(**options)], call.args, force=True)
    wanted = run(gated(graph_of("bert_tokens"), **options)[0], call.args)
    real = call.args[1] > 0
    found = torch.from_numpy(onnx_outputs(result.model, call)[0])
    torch.testing.assert_close(found[real], wanted[real], atol=5e-4, rtol=1e-3)
