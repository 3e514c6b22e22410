"""Causal models whose lists of layers were really shortened, and graphs of the whole ones."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import torch
from elision.passes import testing
from elision.passes.ir.fx import FxGraph
from elision.passes.ir.graph import Graph
from elision.runtime.lm_compile import plain_graph
from elision.runtime.lm_export import plain_causal_graph
from torch import Tensor, nn

from ..runtime.lm_double import tiny_llama
from ..zoo.causal import VOCABULARY, causal_model, source_of

IDS = torch.randint(3, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(0))


@cache
def _exported(name: str, host: str) -> Graph:
    if host == "torch":
        return FxGraph.from_export(plain_causal_graph(causal_model(name)))
    graph, _ = plain_graph(copy.deepcopy(causal_model(name)), host, lambda step: None)
    return testing.apply(graph, "normalise")


def whole(name: str, host: str = "torch") -> Graph:
    return _exported(name, host).copy()


@cache
def deep_llama(layers: int = 6) -> Any:
    """Six layers; `whole` has no more than two."""
    model = tiny_llama(VOCABULARY)
    template = model.model.layers[0]
    torch.manual_seed(1)
    for number in range(2, layers):
        layer = copy.deepcopy(template)
        layer.self_attn.layer_idx = number
        model.model.layers.append(layer)
    for parameter in model.model.layers.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    model.config.num_hidden_layers = layers
    return model.requires_grad_(False)


def shortened(model: Any, gone: list[int]) -> Any:
    """The model with these numbers taken out of its (decoder's) list of layers."""
    model = copy.deepcopy(model)
    lists = [
        child
        for module in model.modules()
        for child in module.children()
        if isinstance(child, nn.ModuleList) and len(child) == model.config.num_hidden_layers
    ]
    layers, count = lists[-1], len(lists[-1])
    for number in reversed(gone):
        del layers[number]
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    for config in configs.values():
        for name in ("num_hidden_layers", "decoder_layers", "num_decoder_layers"):
            if getattr(config, name, None) == count:
                setattr(config, name, len(layers))
        types = getattr(config, "layer_types", None)
        if types and len(types) == count:
            config.layer_types = [kind for number, kind in enumerate(types) if number not in gone]
    return model


def inputs_of(name: str) -> list[Tensor]:
    source = source_of(causal_model(name))
    return [IDS] if source is None else [source, IDS]


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * max(1.0, float(np.abs(wanted).max())))


class Odd(nn.Module):
    """Two layers over ids, and something about them that a cut cannot do with.

    how: "" for none; "gate" multiplies where others add; "bypass" adds something made of the embeddings at the end;
    "wide" makes the stream wider; "inside" puts out what the second layer adds."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        wide = 32 if how == "wide" else 16
        self.embed = nn.Embedding(31, 16)
        self.first, self.second = nn.Linear(16, 48), nn.Linear(16, 48)
        self.out, self.grow = nn.Linear(16, 16), nn.Linear(16, wide)
        self.head = nn.Linear(wide, 31)

    def attend(self, x: Tensor, product: nn.Linear) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in product(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))

    def forward(self, input_ids: Tensor) -> Any:
        x = first = self.embed(input_ids)
        x = x + self.attend(x, self.first)
        y = self.attend(x, self.second)
        if self.how == "gate":
            return self.head(x * y)
        if self.how == "bypass":
            return self.head(x + y + first.tanh())
        if self.how == "wide":
            z = self.grow(x)
            return self.head(z + self.grow(y))
        if self.how == "inside":
            return self.head(x + y), y
        return self.head(x + y)


def odd(how: str = "") -> Graph:
    ids = torch.ones(1, 7).long()
    program = torch.export.export(
        Odd(how).eval().requires_grad_(False),
        (ids,),
        dynamic_shapes=({1: torch.export.Dim.AUTO},),
        strict=False,
    )
    return FxGraph.from_export(program)
