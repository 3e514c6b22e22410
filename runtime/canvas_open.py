"""From a path or module to a `CanvasModel`: taken from the cache, or compiled and kept there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..passes.errors import ElisionError, ModelFileError
from . import lm_artefact
from .canvas_compile import Pair, pair
from .canvas_facts import CanvasFacts, canvas_facts, check_mask, config_of
from .canvas_run import REFRESH, STEP, Canvases, start_canvas
from .lm_artefact import Artefact
from .lm_compile import Formats, Tell, Wanted, formats_of, samples_for
from .lm_facts import Facts
from .lm_open import (
    Compiler,
    checked_module,
    kept_tokenizer,
    save_module,
    taken,
    wanted_by,
    write_properties,
)
from .lm_source import find
from .lm_step import Rows

TRIED = 33
"""Positions that a compiled pair is tried on, at most."""

ALLOWED = 1e-5
"""How far a step may be from the refresh that it follows, relative to the largest logit."""


@dataclass
class Opened:
    """tokenizer: of transformers, None where the model came without one. settings: what was compiled."""

    model: Canvases
    facts: CanvasFacts
    tokenizer: Any
    settings: dict[str, Any]


def open_canvas(
    model: Any,
    *,
    tokenizer: Any = None,
    bits: int | None = None,
    runtime: str = "onnxruntime",
    context: int | None = None,
    mask: int | None = None,
    shift: bool | None = None,
    cache: bool = True,
    threads: int = 0,
    notify: Tell = lambda _step: None,
    **options: Any,
) -> Opened:
    """Arguments as of `DiffusionGenerator`; options: fields of `Wanted`. Raises ElisionError."""
    wanted = wanted_by("DiffusionGenerator", bits, runtime, context, threads, options)
    for name in ("key_scores", "skip", "taps"):
        if options.get(name):
            raise ElisionError(f"DiffusionGenerator: {name} is for autoregressive models")
    said = {"mask": mask, "shift": shift}
    name = None
    if not isinstance(model, str | os.PathLike):
        compiler = _CanvasCompiler(None, wanted, threads, notify, checked_module(model, "a module"), said)
    else:
        source = find(model)
        compiler = _CanvasCompiler(source, wanted, threads, notify, None, said)
        if cache:
            asked = {**wanted.to_json(), **said, "graphs": "window", "ids": _ids_of(tokenizer)}
            name = lm_artefact.key(source.digest(), asked)
    return taken(name, compiler, tokenizer, lambda artefact, its: _opened(artefact, its, threads))


def _ids_of(tokenizer: Any) -> list[Any] | None:
    """What facts take from a tokenizer that did not come with the model."""
    if tokenizer is None:
        return None
    return [getattr(tokenizer, name, None) for name in ("mask_token_id", "eos_token_id")]


def _opened(artefact: Artefact, tokenizer: Any, threads: int) -> Opened:
    try:
        facts = CanvasFacts.from_json(artefact.about["facts"])
        settings = dict(artefact.about["settings"])
        runtime = settings["runtime"]
    except (KeyError, TypeError) as error:
        raise ModelFileError(f"{artefact.folder}: a damaged artefact ({error})") from error
    model = start_canvas(artefact.folder, runtime, facts.vocabulary, threads)
    return Opened(model, facts, kept_tokenizer(artefact, tokenizer), settings)


class _CanvasCompiler(Compiler):
    """Fills a folder with the two graphs of a model."""

    def __init__(
        self, source: Any, wanted: Wanted, threads: int, notify: Tell, module: Any, said: Mapping[str, Any]
    ) -> None:
        super().__init__(source, wanted, threads, notify, module=module)
        self.said = said
        if module is not None:
            self.facts = _facts_of(module)

    def fill(self, folder: Path, tokenizer: Any) -> dict[str, Any]:
        wanted, subject = self.wanted, self.source if self.source is not None else self.module
        config = config_of(subject)
        check_mask(config, tokenizer, self.said["mask"])  # before the long work
        graph, _example = self.plain()
        assert self.facts is not None
        facts = canvas_facts(config, self.facts, tokenizer, **self.said)
        capacity = wanted.capacity(self.facts)
        formats = Formats() if self.source is None else formats_of(self.source, wanted, self.kept, self.tell)
        samples = samples_for(wanted, tokenizer, facts.vocabulary, capacity)
        made = pair(graph, wanted, capacity, formats, samples, self.tell)
        del graph
        self.module = None
        self.tell("writing the compiled model")
        save(made, folder)
        self._keep(folder, tokenizer)
        self.tell("comparing step and refresh")
        apart = compare(start_canvas(folder, wanted.runtime, facts.vocabulary, self.threads), facts)
        if not apart <= ALLOWED:
            raise ElisionError(
                f"the step graph and the refresh graph differ by {apart:.1e} of the largest logit"
            )
        settings = self._told(facts.architecture, formats, samples) | {"step_against_refresh": apart}
        write_properties(folder, settings)
        about = {"facts": facts.to_json(), "settings": settings, "capacity": capacity, "notes": made.notes}
        return about


def _facts_of(module: Any) -> Facts:
    """Facts of any module with a configuration that says them."""
    from .lm_facts import facts_from, facts_of_module

    if hasattr(module, "get_output_embeddings"):
        return facts_of_module(module)
    return facts_from(config_of(module), {})


def compare(model: Canvases, facts: CanvasFacts) -> float:
    """The largest difference between logits of a refresh and of the same positions computed again by a step, relative
    to the largest logit."""
    count = max(1, min(TRIED, model.capacity))
    ids = np.random.default_rng(0).integers(0, facts.vocabulary, count)
    every = np.arange(count)
    first = model.refresh(0, ids, every, whole=True).logits
    assert first is not None
    first = first.copy()
    prefix = np.tile(np.array([[0, count]], np.int32), (count, 1))
    none = np.full((count, 1), -1, np.int32)
    apart, size = [], max(float(np.abs(first).max()), 1e-6)
    for part in (every, every[::2], every[-1:]):
        rows = Rows(ids[part], part.astype(np.int64), part.astype(np.int32), prefix[part], none[part])
        again = model.step(rows, np.arange(len(part)), whole=True).logits
        assert again is not None
        apart.append(np.abs(again - first[part]).max())
    return float(np.max(apart)) / size  # NaN, where there is any


def save(made: Pair, folder: Path) -> None:
    """The graphs as files that `start_canvas` takes."""
    step: Any = made.step
    refresh: Any = made.refresh
    if step.host == "onnx":
        from ..passes.onnx import io

        io.save_model(step.model, folder / STEP, external=True)
        io.save_model(refresh.model, folder / REFRESH, external=True)
        return
    for name, graph in (("step", step), ("refresh", refresh)):
        (folder / name).mkdir()
        save_module(graph, folder / name)
