"""ONNX files of small causal language models as others would export them, each made once in a test session."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import transformers as hf
from elision.passes import PassContext
from elision.passes.incremental import Incremental
from elision.passes.ir.onnx import OnnxGraph
from elision.passes.onnx.io import load_model, to_proto
from elision.passes.onnx.normalise import normalise

from ..passes.step_runs import Ids, Steps
from ..zoo.causal import VOCABULARY, causal_model, source_of

CAPACITY = 48
DYNAMIC = torch.export.Dim.DYNAMIC
MASKED = ("input_ids", "attention_mask", "position_ids")


class Call(torch.nn.Module):
    """The model with its inputs by position, its logits as the one result."""

    def __init__(self, model: torch.nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, a: Any, b: Any = None, c: Any = None) -> torch.Tensor:
        return self.model(**dict(zip(self.names, (a, b, c))), use_cache=False).logits


class CallWithPast(torch.nn.Module):
    """Ids, mask, positions and past keys and values in; logits and the present ones out."""

    def __init__(self, model: torch.nn.Module, positions: bool) -> None:
        super().__init__()
        self.model, self.positions = model, positions

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, at: torch.Tensor, *past: torch.Tensor) -> Any:
        cache = hf.DynamicCache()
        for layer, (key, value) in enumerate(zip(past[::2], past[1::2])):
            cache.update(key, value, layer)
        more = {"position_ids": at} if self.positions else {}
        out = self.model(ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more)
        return out.logits, *(x for layer in out.past_key_values.layers for x in (layer.keys, layer.values))


class CallWithSourcesPast(torch.nn.Module):
    """Decoder ids, the encoder's result, and per layer the past and the encoder's keys and values in."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, source: torch.Tensor, *past: torch.Tensor) -> Any:
        cache = hf.EncoderDecoderCache(hf.DynamicCache(), hf.DynamicCache())
        for layer in range(len(past) // 4):
            own, crossed = past[4 * layer : 4 * layer + 2], past[4 * layer + 2 : 4 * layer + 4]
            cache.self_attention_cache.update(*own, layer)
            cache.cross_attention_cache.update(*crossed, layer)
            cache.is_updated[layer] = True
        given = hf.modeling_outputs.BaseModelOutput(last_hidden_state=source)
        out = self.model(decoder_input_ids=ids, encoder_outputs=given, past_key_values=cache, use_cache=True)
        layers = out.past_key_values.self_attention_cache.layers
        return out.logits, *(x for layer in layers for x in (layer.keys, layer.values))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters talk on every channel."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def export(
    file: Path, module: torch.nn.Module, args: tuple, names: list[str], lengths: Any, **more: Any
) -> Path:
    """The file; `lengths`: dynamic shapes of the newer exporter, or dynamic axes of the older one."""
    if not file.exists():
        given = {"dynamic_shapes": lengths} if more.get("dynamo") else {"dynamic_axes": lengths}
        with quiet():
            torch.onnx.export(
                module.eval(), args, str(file), input_names=names, verbose=False, external_data=False, **given, **more
            )  # fmt: skip
    return file


def plain_file(folder: Path, name: str, masked: bool = False, opset: int | None = None) -> Path:
    """Exported with no cache: token ids, with `masked` a mask and positions too; an encoder's input comes first.

    opset: with the older exporter, in this operator set."""
    model = causal_model(name)
    source, ids = source_of(model), torch.ones(1, 7, dtype=torch.long)
    if source is not None:
        names, args = [model.main_input_name, "decoder_input_ids"], (source, ids)  # type: ignore[list-item]
        free: list[dict[int, str]] = [{1: "source"} if source.dtype == torch.long else {}, {1: "tokens"}]
    else:
        names = list(MASKED[: 3 if masked else 1])
        args = (ids, torch.ones_like(ids), torch.arange(7)[None])[: len(names)]
        free = [{1: "tokens"}] * len(names)
    file = folder / f"{name}-{len(names)}-{opset}.onnx"
    if opset is not None:
        lengths: Any = dict(zip(names, free))
        return export(file, Call(model, names), args, names, lengths, opset_version=opset, dynamo=False)
    lengths = tuple(dict.fromkeys(axes, DYNAMIC) for axes in free)
    return export(file, Call(model, names), args, names, lengths, dynamo=True)


def past_file(folder: Path, name: str, dynamo: bool) -> Path:
    """Exported with a cache, with optimum's names and layout: past [batch, heads, past, width], a mask of both."""
    model: Any = causal_model(name)
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers, new, old = config.num_hidden_layers, 3, 5
    past = [torch.randn(2, heads, old, width) for _ in range(2 * layers)]
    ids = torch.randint(3, VOCABULARY, (2, new))
    args = (ids, torch.ones(2, old + new).long(), torch.arange(old, old + new).repeat(2, 1), *past)
    each = [f"{i}.{what}" for i in range(layers) for what in ("key", "value")]
    names = [*MASKED, *(f"past_key_values.{x}" for x in each)]
    outputs = ["logits", *(f"present.{x}" for x in each)]
    module = CallWithPast(model, positions=name not in ("opt", "bloom"))
    file = folder / f"{name}-past-{dynamo}.onnx"
    if dynamo:
        lengths: Any = (*[{0: DYNAMIC, 1: DYNAMIC}] * 3, tuple({0: DYNAMIC, 2: DYNAMIC} for _ in past))
        return export(file, module, args, names, lengths, output_names=outputs, dynamo=True)
    both = "past_sequence_length + sequence_length"
    lengths = {n: {0: "batch", 2: "past_sequence_length"} for n in names[3:]}
    lengths |= {n: {0: "batch", 1: both if n == "attention_mask" else "sequence_length"} for n in MASKED}
    return export(file, module, args, names, lengths, output_names=outputs, dynamo=False, opset_version=17)


def decoder_past_file(folder: Path, name: str) -> Path:
    """A decoder with its own past and the encoder's keys and values as inputs, as optimum has it."""
    each = [
        f"{i}.{side}.{what}" for i in range(2) for side in ("decoder", "encoder") for what in ("key", "value")
    ]
    names = ["input_ids", "encoder_hidden_states", *(f"past_key_values.{x}" for x in each)]
    outputs = ["logits", *(f"present.{x}" for x in each if "decoder" in x)]
    past = [torch.randn(1, 4, 5 if "decoder" in x else 6, 8) for x in each]
    lengths = {n: {2: "past_sequence_length" if "decoder" in n else "source"} for n in names[2:]}
    lengths |= {"input_ids": {1: "tokens"}, "encoder_hidden_states": {1: "source"}}
    args = (torch.randint(3, VOCABULARY, (1, 3)), torch.randn(1, 6, 32), *past)
    module = CallWithSourcesPast(causal_model(name))
    more: Any = {"output_names": outputs, "dynamo": False, "opset_version": 17}
    return export(folder / f"{name}-decoder-past.onnx", module, args, names, lengths, **more)


# ---- running -----------------------------------------------------------------------------------------
def session(model: onnx.ModelProto | Path) -> onnxruntime.InferenceSession:
    """Plain onnxruntime on one thread, without our library."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


class OrtSteps(Steps):
    """`Steps` whose rows onnxruntime computes, from a lowered file."""

    def __init__(
        self, graph: OnnxGraph, crosses: Sequence[np.ndarray] = (), file: Path | None = None
    ) -> None:
        super().__init__(graph, crosses)
        self.session = session(to_proto(graph.model) if file is None else file)
        self.names = [item.name for item in self.session.get_inputs()]

    def feed(self, ids: Ids, slots: Ids, positions: Ids, prefixes: Any, ancestors: Any) -> np.ndarray:
        given = dict(zip(self.graph.input_names, [None] * 5 + [*self.caches, *self.crosses]))
        given |= {
            "input_ids": np.array([ids], np.int64),
            "position_ids": np.array([positions], np.int64),
            "slots": np.array(slots, np.int32),
            "prefix": np.array(prefixes, np.int32),
            "ancestors": np.array(ancestors, np.int32),
        }
        found = self.session.run(self.graph.output_names, {name: given[name] for name in self.names})
        self.caches = [np.asarray(x) for x in found[len(found) - len(self.caches) :]]
        return np.asarray(found[0])[0]


def opened(file: Path) -> OnnxGraph:
    """A file, normalised."""
    model = load_model(file)
    normalise(model)
    return OnnxGraph(model)


def stepped(
    graph: OnnxGraph,
    source: torch.Tensor | None = None,
    capacity: int = CAPACITY,
    more: Mapping[str, np.ndarray] | None = None,
) -> tuple[OrtSteps, Any]:
    """The state of the step graph that `graph` becomes, and what the pass said. more: inputs of the prelude besides
    the source."""
    outcome = Incremental(capacity=capacity).run(graph, PassContext(target="onnxruntime"))
    graph.verify()
    crosses: list[np.ndarray] = []
    prelude = outcome.extra.get("prelude")
    if prelude is not None and source is not None:
        prelude.verify()
        feeds = {v.name: (more or {}).get(v.name, source.numpy()) for v in prelude.inputs}
        crosses = session(to_proto(prelude.model)).run(None, feeds)
    return OrtSteps(graph, crosses), outcome
