"""From what `--model` says to something that takes rows: taken from the cache, or compiled and kept there."""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..passes.errors import ElisionError, ModelFileError
from . import lm_artefact
from .lm_artefact import Artefact
from .lm_compile import Compiled, Formats, Wanted, formats_of, plain_graph, samples_for, step_graph
from .lm_facts import Facts, facts_beside, facts_of_module
from .lm_source import Source, find
from .lm_step import StepModel
from .lm_text import Text

STEP, PRELUDE, TOKENIZER = "step.onnx", "prelude.onnx", "tokenizer"

Tell = Callable[[str], None]


@dataclass
class Opened:
    """tokenizer: of transformers, None where the model came without one. settings: what was compiled, the verdict. key:
    of the kept artefact, None where it was not kept."""

    model: StepModel
    facts: Facts
    tokenizer: Any
    settings: dict[str, Any]
    key: str | None = None


def open_model(
    model: Any,
    *,
    tokenizer: Any = None,
    bits: int | None = None,
    runtime: str = "onnxruntime",
    context: int | None = None,
    cache: bool = True,
    threads: int = 0,
    notify: Tell = lambda _step: None,
    **options: Any,
) -> Opened:
    """Arguments as of `Generator`; options: fields of `Wanted`. Raises ElisionError."""
    try:
        wanted = Wanted(bits, runtime, context, **options)
    except TypeError as error:
        raise ElisionError(f"Generator: {str(error).removeprefix('Wanted.__init__() ')}") from None
    if threads < 0:
        raise ElisionError(f"threads is 0 or more, not {threads}")
    if not isinstance(model, str | os.PathLike):
        return _open_module(model, tokenizer, wanted, threads, notify)
    source = find(model)
    check(source)
    name = lm_artefact.key(source.digest(), wanted.to_json()) if cache else None
    kept = lm_artefact.find(name) if name is not None else None
    if kept is not None:
        try:
            return replace(_opened(kept, str(model), tokenizer, threads, notify), key=name)
        except ModelFileError:
            shutil.rmtree(kept.folder, ignore_errors=True)  # damaged: compiled anew
    compiler = Compiler(source, wanted, threads, notify)
    if tokenizer is None:
        notify("reading the tokenizer")
        tokenizer = read_tokenizer(source)
    artefact = lm_artefact.write(name, lambda folder: compiler.fill(folder, tokenizer))
    opened = _opened(artefact, str(model), tokenizer, threads, notify)
    if name is None:
        weakref.finalize(opened.model, shutil.rmtree, artefact.folder, True)
    return replace(opened, key=name)


def check(source: Source) -> None:
    """What can be seen before anything is loaded: files that end too early. Raises ModelFileError."""
    if source.kind == "gguf":
        from .lm_gguf import read

        read(source.path)


def read_tokenizer(source: Source) -> Any:
    from .lm_load import load_tokenizer

    return load_tokenizer(source)


def _open_module(module: Any, tokenizer: Any, wanted: Wanted, threads: int, notify: Tell) -> Opened:
    import torch

    if not isinstance(module, torch.nn.Module):
        kind = type(module).__name__
        raise ElisionError(f"a model is a path, the name of a package or a transformers model, not a {kind}")
    facts = facts_of_module(module)
    compiler = Compiler(None, wanted, threads, notify, module=module, facts=facts)
    artefact = lm_artefact.write(None, lambda folder: compiler.fill(folder, tokenizer))
    opened = _opened(artefact, type(module).__name__, tokenizer, threads, notify)
    weakref.finalize(opened.model, shutil.rmtree, artefact.folder, True)
    return opened


# ---- taking --------------------------------------------------------------------------------------------
def _opened(artefact: Artefact, name: str, tokenizer: Any, threads: int, notify: Tell) -> Opened:
    try:
        facts, settings = Facts.from_json(artefact.about["facts"]), dict(artefact.about["settings"])
    except (KeyError, TypeError) as error:
        raise ModelFileError(f"{artefact.folder}: a damaged artefact ({error})") from error
    notify("starting the runtime")
    scored = bool(settings.get("key_scores"))
    model = start(artefact.folder, settings["runtime"], facts.vocabulary, threads, scored)
    if tokenizer is None and (artefact.folder / TOKENIZER).is_dir():
        from .lm_load import tokenizer_in

        tokenizer = tokenizer_in(artefact.folder / TOKENIZER)
    return Opened(model, facts, tokenizer, {"model": name, **settings})


def start(folder: Path, runtime: str, vocabulary: int, threads: int, scored: bool = False) -> StepModel:
    """The runner of a compiled folder; scored: an `h2o_model.ScoredSteps`. Raises ModelFileError for a damaged one."""
    if runtime == "onnxruntime":
        from .h2o_onnx import ScoredOnnxSteps
        from .lm_onnx import OnnxSteps

        prelude = folder / PRELUDE
        steps = ScoredOnnxSteps if scored else OnnxSteps
        return steps(folder / STEP, vocabulary, prelude if prelude.is_file() else None, threads)
    from .h2o_torch import ScoredTorchSteps
    from .lm_torch import TorchSteps
    from .lm_torch_file import load

    module, names = load(folder)
    inner, its = (None, {}) if not (folder / "prelude").is_dir() else load(folder / "prelude")
    return (ScoredTorchSteps if scored else TorchSteps)(
        module,
        names["inputs"],
        names["outputs"],
        names["caches"],
        vocabulary,
        inner,
        its.get("inputs", ()),
        its.get("outputs", ()),
        threads,
    )


# ---- making --------------------------------------------------------------------------------------------
class Compiler:
    """Fills a folder with a compiled model."""

    def __init__(
        self,
        source: Source | None,
        wanted: Wanted,
        threads: int,
        notify: Tell,
        module: Any = None,
        facts: Facts | None = None,
    ) -> None:
        self.source, self.wanted, self.threads, self.tell = source, wanted, threads, notify
        self.module, self.facts = module, facts
        self.kept: list[Any] = []  # matrices that a checkpoint has in few bits

    def fill(self, folder: Path, tokenizer: Any) -> dict[str, Any]:
        """Returns what artefact.json says."""
        wanted = self.wanted
        graph, example = self.plain()
        facts = self.facts
        assert facts is not None
        if tokenizer is not None:
            Text(tokenizer, facts.vocabulary, "the tokenizer")  # a wrong one is told before the long work
        capacity = wanted.capacity(facts)
        formats = Formats() if self.source is None else formats_of(self.source, wanted, self.kept, self.tell)
        samples = samples_for(wanted, tokenizer, facts.vocabulary, capacity)
        compiled = step_graph(graph, wanted, capacity, formats, samples, self.tell, example)
        del graph
        self.module = None  # its weights are in the graph, or no longer needed
        self.tell("writing the compiled model")
        save(compiled, folder)
        if tokenizer is not None:
            from .lm_load import save_tokenizer

            save_tokenizer(tokenizer, folder / TOKENIZER)
        self.tell("comparing rows bit by bit")
        verdict = self._verdict(folder, facts, compiled.example)
        bits: Any = wanted.bits or ("source" if formats.counts else 32)
        settings: dict[str, Any] = {
            "architecture": facts.architecture,
            "bits": bits,
            "runtime": wanted.runtime,
            "exactness": verdict["verdict"],
        }
        if bits in (4, 8):
            settings |= {"group": wanted.group, "method": wanted.method, "samples": len(samples)}
        if formats.counts:
            settings["formats"] = formats.counts
        if wanted.key_scores:
            settings["key_scores"] = True
        write_properties(folder, settings)
        return {
            "facts": facts.to_json(),
            "settings": settings,
            "exactness": verdict,
            "capacity": capacity,
            "notes": compiled.notes,
        }

    def plain(self) -> tuple[Any, dict[str, np.ndarray]]:
        if self.source is not None and self.source.kind == "onnx":
            if self.wanted.runtime == "torch":
                raise ElisionError("an ONNX file runs with --runtime onnxruntime")
            return self._from_onnx(self.source.path), {}
        if self.module is None:
            from .lm_load import load_module

            assert self.source is not None
            self.tell("loading the weights")
            self.module, self.kept = load_module(self.source)
            self.facts = facts_of_module(self.module)
        return plain_graph(self.module, self.wanted.runtime, self.tell)

    def _from_onnx(self, file: Path) -> Any:
        from .api import open_onnx

        graph = open_onnx(file)
        last = graph.outputs[0].shape[-1] if graph.outputs and graph.outputs[0].shape else None
        self.facts = facts_beside(file, int(last) if isinstance(last, int) else None)
        return graph

    def _verdict(self, folder: Path, facts: Facts, example: dict[str, np.ndarray]) -> dict[str, Any]:
        from .lm_verdict import examine

        wanted = self.wanted
        model = start(folder, wanted.runtime, facts.vocabulary, self.threads, wanted.key_scores)
        if example:
            model.begin(dict(example))
        return examine(model).to_json()


def save(compiled: Compiled, folder: Path) -> None:
    """The graphs as files that `start` takes."""
    graph: Any = compiled.graph
    if graph.host == "onnx":
        from ..passes.onnx import io

        io.save_model(graph.model, folder / STEP, external=True)
        if compiled.prelude is not None:
            io.save_model(compiled.prelude.model, folder / PRELUDE, external=True)  # type: ignore[attr-defined]
        return
    from .lm_torch_file import save as save_torch

    names = {"inputs": graph.input_names, "outputs": graph.output_names}
    caches = {
        name: [int(dim) for dim in value.shape]
        for name, value in zip(graph.input_names, graph.inputs)
        if f"{name}.out" in graph.output_names
    }
    save_torch(graph.to_module(), folder, {**names, "caches": caches})
    if compiled.prelude is not None:
        inner: Any = compiled.prelude
        (folder / "prelude").mkdir()
        kept = {"inputs": inner.input_names, "outputs": inner.output_names}
        save_torch(inner.to_module(), folder / "prelude", kept)


def write_properties(folder: Path, settings: dict[str, Any]) -> None:
    """The settings and the verdict into the ONNX file itself too, for who takes it elsewhere."""
    file = folder / STEP
    if not file.is_file():
        return
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    onnx.helper.set_model_props(model, {f"elision.{key}": str(value) for key, value in settings.items()})
    file.write_bytes(model.SerializeToString())
