"""`elision generate` for a masked diffusion model: canvases in, text, JSON lines or a page out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..passes.errors import ElisionError, ModelFileError
from .canvas_facts import config_of, is_diffusion
from .diffusion import DiffusionGenerator, How
from .generate_command import in_order
from .lm_source import find
from .shell import working

OPTIONS = {
    "window": "--window",
    "active": "--active",
    "refresh": "--refresh",
    "block": "--block",
    "form": "--form",
    "steps": "--steps",
    "policy": "--policy",
    "rule": "--rule",
    "threshold": "--threshold",
    "guidance": "--guidance",
    "early_stop": "--early-stop",
    "buckets": "--buckets",
}
"""Fields of `How`, and of the class, that are options of their own."""


def wants_canvas(model: str, given: Mapping[str, Any]) -> bool:
    """Whether a command is about a diffusion model: the model's configuration says it is one. given: options that only
    such a model takes, by field. Raises ElisionError for them where the configuration says that it is none."""
    try:
        source = find(model)
    except ModelFileError:
        if given:
            raise
        return False  # who opens the model says what is wrong with it
    config = config_of(source)
    if is_diffusion(config):
        return True
    names = config.get("architectures") or []
    if given and (source.kind == "gguf" or names):
        what = names[0] if names else "a GGUF file"
        option = OPTIONS[next(iter(given))]
        raise ElisionError(
            f"{model}: an autoregressive model ({what}): {option} takes a masked diffusion model"
        )
    return bool(given)


def generate_canvases(model: str, asked: Any, how: dict[str, Any], form: dict[str, Any]) -> None:
    """asked: a `generate_command.Asked`. how: options of `DiffusionGenerator.generate`, form: of the class."""
    How.of(how).parts()  # nobody waits for a model to hear that an option means nothing
    with working("reading the model", silent=asked.json) as tell:
        generator = DiffusionGenerator(model, notify=tell, **form)
    if asked.json:
        for result in in_order(generator.events(asked.prompts, asked.max_new_tokens, **how)):
            print(json.dumps(result.to_json(), ensure_ascii=False), flush=True)
            _page(generator, asked, result)
        return
    for number, result in enumerate(_shown(generator, asked, how), 1):
        if not asked.single:
            print(f"--- {number}")
        print(result.text if generator.text is not None else " ".join(map(str, result.token_ids)), flush=True)
        _page(generator, asked, result)


def _shown(generator: Any, asked: Any, how: dict[str, Any]) -> list[Any]:
    """The results; on a terminal the canvases are seen while they are decided."""
    from .canvas_display import CanvasDisplay

    canvases, sampler, settings = generator.prepare(asked.prompts, asked.max_new_tokens, how)
    with CanvasDisplay(canvases, generator.facts.mask, generator.words) as display:

        def watched() -> Iterator[Any]:
            for number, event, result in generator.run(canvases, sampler, settings, bool(how.get("trace"))):
                display.show(event)
                yield number, event, result

        return list(in_order(watched()))


def _page(generator: Any, asked: Any, result: Any) -> None:
    report: Path | None = asked.report
    if report is None:
        return
    from .canvas_report import write_canvas_report

    write_canvas_report(
        report,
        result=result.result,
        prompt_text=asked.prompts[0],
        tokens=generator.words(result.result.token_ids),
        settings=result.settings,
    )
