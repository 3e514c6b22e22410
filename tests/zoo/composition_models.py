"""Small models on which several families of passes apply, in both hosts, for pipelines that join them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from elision.passes.base import PassContext
from elision.passes.ir.fx import FxGraph
from elision.passes.ir.graph import Graph
from elision.passes.ir.onnx import OnnxGraph
from elision.passes.manager import PipelineReport, run_pipeline
from elision.passes.onnx.io import load_model
from elision.passes.pipeline import Passes, parse
from elision.runtime.lm_compile import plain_graph
from elision.runtime.runners import FxRunner, OnnxRunner, Runner

from ..passes.layer_models import deep_llama
from .causal import causal_model
from .export import export, onnx_file, quiet, saved
from .model import ZooModel, text
from .text import BERT_SIZES, LENGTH
from .vlm import VLMS
from .vlm import export as vlm_program
from .vlm import onnx_file as vlm_file

HOSTS = ("torch", "onnx")
TARGETS = {"torch": "torch", "onnx": "onnxruntime"}
STEP = "incremental{capacity=96}"


@dataclass(frozen=True)
class Made:
    """A graph, and example inputs in its order."""

    graph: Graph
    args: tuple[np.ndarray, ...]

    @property
    def runner(self) -> Runner:
        names = [value.name for value in self.graph.inputs]
        if self.graph.host == "onnx":
            return OnnxRunner(dict(zip(names, self.args, strict=True)))
        return FxRunner([torch.from_numpy(array) for array in self.args], {})


@dataclass(frozen=True)
class Subject:
    """A model that pipelines are tried on. make: (host, folder for files) -> its graph and inputs. passes: the names of
    those that apply to it by themselves."""

    name: str
    what: str
    make: Callable[[str, Path], Made]
    passes: frozenset[str]

    def __hash__(self) -> int:
        return hash(self.name)


@cache
def made(subject: Subject, host: str, folder: Path) -> Made:
    """The subject in a host, once in a process; a file is brought to one form already."""
    with quiet(), torch.random.fork_rng():
        return subject.make(host, folder)


def attempt(subject: Subject, host: str, folder: Path, passes: Passes, **context: Any) -> PipelineReport:
    """What the manager says of `passes` on a subject, every check made. Raises ElisionError."""
    found = made(subject, host, folder)
    given = PassContext(force=True, target=TARGETS[host], example_inputs=found.args, **context)
    with quiet():
        return run_pipeline(found.graph, parse(passes), context=given, runner=found.runner)


# ---- what there is -------------------------------------------------------------------------------------
SAME = "quantize fix-rows lower"
TEXT = f"{SAME} dynamic-vocab extra-embeddings skip-layers head keep-rows taps"
REDUCE = "token-merge segment-merge token-gate"


def _normalised(graph: Graph, args: Sequence[torch.Tensor]) -> Made:
    if graph.host == "onnx":
        graph = run_pipeline(graph, "normalise", verify=False).graph
    return Made(graph, tuple(item.detach().numpy() for item in args))


def _zoo(entry: ZooModel, host: str, folder: Path, lengths: bool = False) -> Made:
    call = entry.build(2)
    if host == "onnx" and not lengths:
        return _normalised(OnnxGraph(load_model(onnx_file(entry, folder))), call.args)
    program = export(call, entry.dynamic_shapes(lengths=lengths))
    if host == "torch":
        return _normalised(FxGraph.from_export(program), call.args)
    file = saved(program, list(entry.inputs(2)), folder / f"{entry.name}_lengths.onnx")
    return _normalised(OnnxGraph(load_model(file)), call.args)


def _any_length(entry: ZooModel, host: str, folder: Path) -> Made:
    return _zoo(entry, host, folder, True)


def _pictures(name: str, host: str, folder: Path) -> Made:
    entry = VLMS[name]
    if host == "onnx":
        graph: Graph = OnnxGraph(load_model(vlm_file(entry, folder)))
    else:
        graph = FxGraph.from_export(vlm_program(entry))
    return _normalised(graph, entry.build(2).args)


def _text(module: Callable[[], Any], host: str, folder: Path) -> Made:
    graph, example = plain_graph(module(), TARGETS[host], lambda _step: None)
    return _normalised(graph, [torch.from_numpy(array) for array in example.values()])


def _with_pictures(host: str, folder: Path) -> Made:
    """A plain graph of ids and a picture, as the Generator traces it; the ids name a place for every feature."""
    entry = VLMS["llava"]
    given = entry.inputs(1)
    pictures = {"pixel_values": given["pixel_values"]}
    graph, example = plain_graph(entry.module().inner, TARGETS[host], lambda _step: None, pictures)
    example["input_ids"] = given["input_ids"].numpy()
    return _normalised(graph, [torch.from_numpy(array) for array in example.values()])


def _step(name: str, passes: str, host: str, folder: Path) -> Made:
    """A step graph, on the rows of a whole text."""
    plain = made(SUBJECTS[name], host, folder)
    (single,) = parse(passes)
    graph = plain.graph.copy()
    outcome = single.run(graph, PassContext(True, TARGETS[host], plain.args))
    assert outcome.signature is not None and outcome.signature.after is not None
    return Made(graph, tuple(outcome.signature.after))


class Masked(torch.nn.Module):
    """BERT's scores for every token, with inputs under their own names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = hf.BertForMaskedLM(hf.BertConfig(**BERT_SIZES))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask).logits


MASKED = ZooModel(
    "bert_mlm",
    "transformers",
    Masked,
    text(100, LENGTH),
    LENGTH,
    3,
    dynamic={"input_ids": (0, 1), "attention_mask": (0, 1)},
    mask="attention_mask",
)


def _subject(name: str, what: str, passes: str, make: Callable[..., Made], *given: Any) -> Subject:
    return Subject(name, what, partial(make, *given), frozenset(passes.split()))


SUBJECTS: dict[str, Subject] = {
    subject.name: subject
    for subject in (
        _subject(
            "bert", "BERT's masked language model, 24 tokens", f"{TEXT} {REDUCE} token-drop", _zoo, MASKED
        ),
        _subject(
            "llama", "Llama, 4 layers", f"{TEXT} segment-merge incremental", _text, partial(deep_llama, 4)
        ),
        _subject("step", "the same behind incremental", f"{TEXT} key-scores", _step, "llama", STEP),
        _subject("lengths", "BERT of any length", f"{TEXT} {REDUCE} window", _any_length, MASKED),
        _subject(
            "t5",
            "T5, encoder and decoder",
            f"{SAME} {REDUCE} incremental",
            _text,
            partial(causal_model, "t5"),
        ),
        _subject("internvl", "InternVL", f"{SAME} token-merge token-drop", _pictures, "internvl"),
        _subject("llava", "LLaVA", f"{SAME} image-ids keep-rows head", _with_pictures),
    )
}
