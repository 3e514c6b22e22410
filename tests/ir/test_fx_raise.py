"""Decomposed attention is raised to one op, with the same numbers; what is not provable is left alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from elision.passes.ir.fx import FxGraph
from torch import nn
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).parent))
import attention_models
import small_models

torch.set_num_threads(1)


def raised(graph: FxGraph) -> Any:
    """The prepared graph, which `to_module` gives only after an edit."""
    return torch.fx.GraphModule(graph.module, graph.module.graph)


def check(module: nn.Module, args: Any, kwargs: Any, attentions: int, tolerance: float = 1e-5) -> FxGraph:
    module = module.eval()
    graph = FxGraph.trace(module, args, kwargs)
    with torch.no_grad():
        expected = pytree.tree_leaves(module(*args, **kwargs))
        found = pytree.tree_leaves(raised(graph)(*args, **kwargs))
        untouched = pytree.tree_leaves(graph.to_module()(*args, **kwargs))
    assert graph.near_misses == []
    assert len(graph.ops_of("attention")) == attentions
    for a, b, c in zip(expected, found, untouched):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
            assert torch.equal(a, c)
    for op in graph.ops_of("attention"):
        assert op.inputs[0] is not None and op.inputs[0].rank == 4
    graph.verify()
    return graph


@pytest.mark.parametrize("name", attention_models.FORMS)
def test_every_form_is_raised(name: str) -> None:
    graph = check(attention_models.Attention(name), attention_models.operands(), {}, 1)
    assert graph.ops_of("softmax", "matmul") == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["scale_on_scores", "bias_and_padding", "masked_fill"])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-6
    check(attention_models.Attention(name), attention_models.operands(dtype), {}, 1, tolerance)


def test_heads_are_unfolded_when_the_batch_is_dynamic() -> None:
    module, args = attention_models.Attention("folded_bmm").eval(), attention_models.operands()
    batch = torch.export.Dim("batch", min=2, max=64)
    graph = FxGraph.trace(module, args, dynamic_shapes=({0: batch},) * 3)
    (op,) = graph.ops_of("attention")
    assert [str(d) for d in op.output.shape[1:]] == ["3", "5", "8"]  # type: ignore[index]
    graph.verify()
    wide = tuple(torch.cat([x, x, x]) for x in args)
    torch.testing.assert_close(raised(graph)(*wide), module(*wide), rtol=1e-5, atol=1e-5)


# ---- other people's models -----------------------------------------------------------------------------
def hf_eager(name: str) -> Callable[[], small_models.Case]:
    def make() -> small_models.Case:
        module, args, kwargs = small_models.MODELS[name]()
        for part in module.modules():
            config = getattr(part, "config", None)
            if config is not None:
                config._attn_implementation = "eager"
        return module, args, kwargs

    return make


def timm_unfused(name: str) -> Callable[[], small_models.Case]:
    def make() -> small_models.Case:
        module, args, kwargs = small_models.MODELS[name]()
        for part in module.modules():
            if hasattr(part, "fused_attn"):
                part.fused_attn = False
        return module, args, kwargs

    return make


class SelfAttention(nn.Module):
    """torch's own multi-head attention, with the weights it returns thrown away."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=batch_first)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, key_padding_mask=padding, need_weights=True)[0]


def multihead(batch_first: bool) -> Callable[[], small_models.Case]:
    def make() -> small_models.Case:
        padding = torch.zeros(2, 6, dtype=torch.bool)
        padding[1, 4:] = True
        x = torch.randn(2, 6, 16) if batch_first else torch.randn(6, 2, 16)
        return SelfAttention(batch_first), (x, padding), {}

    return make


def encoder_layer() -> small_models.Case:
    return nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), (torch.randn(2, 6, 16),), {}


EAGER = {
    **{name: hf_eager(name) for name in small_models.MODELS if name in (
        "hf_vit", "hf_dinov2_registers", "hf_dinov3", "clip_vision", "clip_text", "bert", "modernbert",
        "t5_encoder", "whisper_encoder", "wav2vec2", "siglip", "hf_beit")},
    **{f"{name}_unfused": timm_unfused(name) for name in small_models.MODELS if name.startswith("timm")},
    "multihead": multihead(False),
    "multihead_batch_first": multihead(True),
    "encoder_layer": encoder_layer,
}  # fmt: skip


@pytest.mark.parametrize("name", EAGER)
def test_eager_attention_of_models_is_raised(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
    module, args, kwargs = EAGER[name]()
    attentions = {"siglip": 3, "timm_swin_unfused": 4}.get(name, 1 if name.startswith(("mul", "enc")) else 2)
    graph = check(module, args, kwargs, attentions)
    assert graph.ops_of("softmax") == []


# ---- what is not provable --------------------------------------------------------------------------------
class Form(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(*args)


def weights_too(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights


def clamped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return (q @ k.mT).clamp(-1, 1).softmax(-1) @ v


def small_fill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return (q @ k.mT).masked_fill(~attention_models.keep, -100.0).softmax(-1) @ v


def over_queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return (q @ k.mT).softmax(-2) @ v


def dropout_on(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return torch.dropout((q @ k.mT).softmax(-1), 0.5, True) @ v


REFUSED = {
    weights_too: "the probabilities are",
    clamped: "aten.clamp",
    small_fill: "fills in -100",
    over_queries: "not over the last axis",
    dropout_on: "aten.dropout",
}


@pytest.mark.parametrize("function", REFUSED, ids=lambda f: f.__name__)
def test_near_misses_are_left_alone_with_a_reason(function: Callable[..., Any]) -> None:
    args = attention_models.operands()
    graph = FxGraph.trace(Form(function), args)
    assert graph.ops_of("attention") == []
    assert len(graph.near_misses) == 1 and REFUSED[function] in graph.near_misses[0]
    if function is not dropout_on:
        for a, b in zip(pytree.tree_leaves(raised(graph)(*args)), pytree.tree_leaves(function(*args))):
            assert torch.equal(a, b)


def test_a_softmax_that_is_no_attention_is_no_near_miss() -> None:
    graph = FxGraph.trace(Form(lambda x: x.softmax(-1) * 2), (torch.randn(2, 3),))
    assert graph.near_misses == []
