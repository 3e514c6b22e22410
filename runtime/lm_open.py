"""From what `--model` says to something that takes rows: taken from the cache, or compiled and kept there."""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..passes.errors import ElisionError, ModelFileError
from ..passes.image_ids import ROWS
from . import lm_artefact
from .lm_artefact import Artefact
from .lm_compile import Compiled, Formats, Wanted, formats_of, plain_graph, samples_for, step_graph
from .lm_facts import Facts, facts_beside, facts_of_module
from .lm_images import VISION, ImageFacts, Pictures, load_pictures
from .lm_source import Source, find
from .lm_step import StepModel
from .lm_text import Text

STEP, PRELUDE, TOKENIZER = "step.onnx", "prelude", "tokenizer"

Tell = Callable[[str], None]


@dataclass
class Opened:
    """tokenizer: of transformers, None where the model came without one. settings: what was compiled, the verdict. key:
    of the kept artefact, None where it was not kept. pictures: the vision part of a model that reads pictures."""

    model: StepModel
    facts: Facts
    tokenizer: Any
    settings: dict[str, Any]
    key: str | None = None
    pictures: Pictures | None = None


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
    images: Mapping[str, Any] | None = None,
    **options: Any,
) -> Opened:
    """Arguments as of `Generator`; options: fields of `Wanted`. Raises ElisionError."""
    wanted = wanted_by("Generator", bits, runtime, context, threads, options)
    if wanted.drop and images is None:
        raise ElisionError("drop is for models that read pictures: give an example of them as images")
    if images is not None:
        from .lm_export import pictures_of

        images = pictures_of(images)
    if not isinstance(model, str | os.PathLike):
        facts = facts_of_module(checked_module(model, "a transformers model"))
        compiler = Compiler(None, wanted, threads, notify, module=model, facts=facts, images=images)
        name, called = None, type(model).__name__
    else:
        source = find(model)
        check(source)
        if images is not None and source.kind != "folder":
            raise ElisionError(
                f"{source.path}: pictures are read by a transformers model, in memory or in a folder, not by a "
                f"{source.kind.upper()} file"
            )
        told = wanted.to_json() | ({} if images is None else {"images": described(images)})
        name, called = lm_artefact.key(source.digest(), told) if cache else None, str(model)
        compiler = Compiler(source, wanted, threads, notify, images=images)

    def take(artefact: Artefact, tokenizer: Any) -> Opened:
        return _opened(artefact, called, tokenizer, threads, notify)

    return replace(taken(name, compiler, tokenizer, take), key=name)


def wanted_by(
    who: str, bits: int | None, runtime: str, context: int | None, threads: int, options: dict[str, Any]
) -> Wanted:
    """What the arguments of a class called `who` ask for. Raises ElisionError."""
    if threads < 0:
        raise ElisionError(f"threads is 0 or more, not {threads}")
    try:
        return Wanted(bits, runtime, context, **options)
    except TypeError as error:
        raise ElisionError(f"{who}: {str(error).removeprefix('Wanted.__init__() ')}") from None


def described(images: Mapping[str, Any]) -> dict[str, str]:
    """What an example of pictures decides of a compiled model."""
    from .lm_export import is_picture

    return {name: str(list(item.shape) if is_picture(item) else item) for name, item in images.items()}


def checked_module(model: Any, wanted: str) -> Any:
    """Raises ElisionError for what is neither a path nor a module."""
    import torch

    if not isinstance(model, torch.nn.Module):
        kind = type(model).__name__
        raise ElisionError(f"a model is a path, the name of a package or {wanted}, not a {kind}")
    return model


def taken(name: str | None, compiler: Compiler, tokenizer: Any, take: Callable[[Artefact, Any], Any]) -> Any:
    """What `take` makes of the artefact kept under `name` and a tokenizer; where there is none, or a damaged one, of
    one that `compiler` fills. name None: it is kept nowhere, and goes with what was made (its `model`)."""
    kept = lm_artefact.find(name) if name is not None else None
    if kept is not None:
        try:
            return take(kept, tokenizer)
        except ModelFileError:
            shutil.rmtree(kept.folder, ignore_errors=True)  # damaged: compiled anew
    if tokenizer is None and compiler.source is not None:
        compiler.tell("reading the tokenizer")
        tokenizer = _read_tokenizer(compiler.source)
    artefact = lm_artefact.write(name, lambda folder: compiler.fill(folder, tokenizer))
    if name is not None:
        return take(artefact, tokenizer)
    try:
        opened = take(artefact, tokenizer)
    except BaseException:
        shutil.rmtree(artefact.folder, ignore_errors=True)
        raise
    weakref.finalize(opened.model, shutil.rmtree, artefact.folder, True)
    return opened


def check(source: Source) -> None:
    """What can be seen before anything is loaded: files that end too early. Raises ModelFileError."""
    if source.kind == "gguf":
        from .lm_gguf import read

        read(source.path)


def _read_tokenizer(source: Source) -> Any:
    from .lm_load import load_tokenizer

    return load_tokenizer(source)


# ---- taking --------------------------------------------------------------------------------------------
def _opened(artefact: Artefact, name: str, tokenizer: Any, threads: int, notify: Tell) -> Opened:
    try:
        facts, settings = Facts.from_json(artefact.about["facts"]), dict(artefact.about["settings"])
    except (KeyError, TypeError) as error:
        raise ModelFileError(f"{artefact.folder}: a damaged artefact ({error})") from error
    notify("starting the runtime")
    scored = bool(settings.get("key_scores"))
    model = start(artefact.folder, settings["runtime"], facts.vocabulary, threads, scored)
    told, pictures = {"model": name, **settings}, None
    if "images" in artefact.about:
        known = ImageFacts.from_json(artefact.about["images"])
        pictures = load_pictures(artefact.folder, settings["runtime"], known, threads)
    return Opened(model, facts, kept_tokenizer(artefact, tokenizer), told, pictures=pictures)


def kept_tokenizer(artefact: Artefact, given: Any) -> Any:
    """`given`, or what came with the model."""
    if given is not None or not (artefact.folder / TOKENIZER).is_dir():
        return given
    from .lm_load import tokenizer_in

    return tokenizer_in(artefact.folder / TOKENIZER)


def start(folder: Path, runtime: str, vocabulary: int, threads: int, scored: bool = False) -> StepModel:
    """The runner of a compiled folder; scored: an `h2o_model.ScoredSteps`. Raises ModelFileError for a damaged one."""
    if runtime == "onnxruntime":
        from .h2o_onnx import ScoredOnnxSteps
        from .lm_onnx import OnnxSteps

        prelude = folder / f"{PRELUDE}.onnx"
        steps = ScoredOnnxSteps if scored else OnnxSteps
        return steps(folder / STEP, vocabulary, prelude if prelude.is_file() else None, threads)
    from .h2o_torch import ScoredTorchSteps
    from .lm_torch import TorchSteps
    from .lm_torch_file import load

    module, names = load(folder)
    inner, its = (None, {}) if not (folder / PRELUDE).is_dir() else load(folder / PRELUDE)
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
        names.get("rows", 0),
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
        images: Mapping[str, Any] | None = None,
    ) -> None:
        self.source, self.wanted, self.threads, self.tell = source, wanted, threads, notify
        self.module, self.facts, self.images = module, facts, images
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
        parts = None
        if self.images is not None:
            from .lm_vision import parted

            parts = parted(graph, self.module, self.images, wanted.drop, capacity, facts.positions, self.tell)
            graph, example = parts.text, {}
        known = None if parts is None else parts.facts
        compiled = step_graph(graph, wanted, capacity, formats, samples, self.tell, example, known)
        del graph
        self.module = None  # its weights are in the graph, or no longer needed
        self.tell("writing the compiled model")
        save(compiled, folder)
        if parts is not None:
            save_part(parts.vision, folder, VISION)
            compiled.notes[:0] = parts.notes
        self._keep(folder, tokenizer)
        self.tell("comparing rows bit by bit")
        verdict = self._verdict(folder, facts, compiled.example)
        settings = self._told(facts.architecture, formats, samples) | {"exactness": verdict["verdict"]}
        if wanted.key_scores:
            settings["key_scores"] = True
        if wanted.drop:
            settings["drop"] = wanted.drop
        write_properties(folder, settings)
        return {
            **({} if parts is None else {"images": parts.facts.to_json()}),
            "facts": facts.to_json(),
            "settings": settings,
            "exactness": verdict,
            "capacity": capacity,
            "notes": compiled.notes,
        }

    def _keep(self, folder: Path, tokenizer: Any) -> None:
        """So that it need not be made from the source again."""
        if tokenizer is not None:
            from .lm_load import save_tokenizer

            save_tokenizer(tokenizer, folder / TOKENIZER)

    def _told(self, architecture: str, formats: Formats, samples: list[Any]) -> dict[str, Any]:
        """What settings say of a compiled model."""
        wanted = self.wanted
        bits: Any = wanted.bits or ("source" if formats.counts else 32)
        told: dict[str, Any] = {"architecture": architecture, "bits": bits, "runtime": wanted.runtime}
        if bits in (4, 8):
            told |= {"group": wanted.group, "method": wanted.method, "samples": len(samples)}
        return told | ({"formats": formats.counts} if formats.counts else {})

    def plain(self) -> tuple[Any, dict[str, np.ndarray]]:
        if self.source is not None and self.source.kind == "onnx":
            if self.wanted.runtime == "torch":
                raise ElisionError("an ONNX file runs with --runtime onnxruntime")
            return self._from_onnx(self.source.path), {}
        if self.module is None:
            from .lm_load import load_module

            assert self.source is not None
            self.tell("loading the weights")
            self.module, self.kept = load_module(self.source, self.images is not None)
            self.facts = facts_of_module(self.module)
        return plain_graph(self.module, self.wanted.runtime, self.tell, self.images)

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
    else:
        save_module(graph, folder)
    if compiled.prelude is not None:
        save_part(compiled.prelude, folder, PRELUDE)


def save_part(graph: Any, folder: Path, name: str) -> None:
    """A graph besides the step graph, as a file (in ONNX) or a folder of this name."""
    if graph.host == "onnx":
        from ..passes.onnx import io

        io.save_model(graph.model, folder / f"{name}.onnx", external=True)
        return
    (folder / name).mkdir()
    save_module(graph, folder / name)


def save_module(graph: Any, folder: Path) -> None:
    """A torch graph with the names of its inputs and outputs, and the shapes of its caches."""
    from .lm_torch_file import save as save_torch

    caches = {
        name: [int(dim) for dim in value.shape]
        for name, value in zip(graph.input_names, graph.inputs)
        if f"{name}.out" in graph.output_names
    }
    names = {"inputs": graph.input_names, "outputs": graph.output_names, "caches": caches}
    widths = [int(value.shape[-1]) for name, value in zip(graph.input_names, graph.inputs) if name == ROWS]
    names |= {"rows": widths[0]} if widths else {}
    save_torch(graph.to_module(), folder, names)


def write_properties(folder: Path, settings: dict[str, Any]) -> None:
    """The settings and the verdict into the ONNX file itself too, for who takes it elsewhere."""
    file = folder / STEP
    if not file.is_file():
        return
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    onnx.helper.set_model_props(model, {f"elision.{key}": str(value) for key, value in settings.items()})
    file.write_bytes(model.SerializeToString())
