"""The page of passes for the documentation, from their declarations."""

from __future__ import annotations

import inspect
import typing
from dataclasses import fields

from .base import Pass, known_passes
from .options import default_text, describe, option_help

PAGES: dict[str, str] = {
    "dynamic-vocab": "dynamic_vocab.md",
    "extra-embeddings": "speculation.md",
    "fix-rows": "quantize.md",
    "head": "incremental.md",
    "image-ids": "generate.md",
    "incremental": "incremental.md",
    "keep-rows": "incremental.md",
    "key-scores": "incremental.md",
    "lower": "kernels.md",
    "normalise": "pipelines.md",
    "quantize": "quantize.md",
    "segment-merge": "segment_merge.md",
    "skip-layers": "speculation.md",
    "taps": "speculation.md",
    "token-drop": "token_drop.md",
    "token-gate": "token_gate.md",
    "token-merge": "token_merge.md",
    "window": "diffusion.md",
}
"""The page in docs/ that tells about each pass."""

_HEAD = """# The passes

Every pass by its name in [pipelines](pipelines.md), with its options as they are declared. *Exact* passes preserve the
function, and are checked for it; of *lossy* ones the drift is recorded. One that *saves work* is declined where the
estimated cost does not fall, unless it is forced. `elision passes NAME` says the same.

This page is written by `elision.passes.docs.page()`.
"""


def page() -> str:
    """docs/passes.md. Passes that others have registered are not in it."""
    own = {
        name: kind for name, kind in known_passes().items() if kind.__module__.startswith(__package__ or "")
    }
    lines = [_HEAD, "| pass | | what it does | told on |", "| --- | --- | --- | --- |"]
    for name, kind in own.items():
        where = PAGES.get(name, "pipelines.md")
        title = where.removesuffix(".md").replace("_", " ")
        lines.append(
            f"| [`{name}`](#{name}) | {_promise(kind)} | {_cell(kind.summary)} | [{title}]({where}) |"
        )
    for name, kind in own.items():
        lines += ["", f"## {name}", "", inspect.cleandoc(kind.__doc__ or ""), "", *_options(kind)]
    return "\n".join(lines) + "\n"


def _promise(kind: type[Pass]) -> str:
    return ("exact" if kind.exact else "lossy") + (", saves work" if kind.reduces else "")


def _options(kind: type[Pass]) -> list[str]:
    declared = fields(kind.Options)
    if not declared:
        return ["No options."]
    hints, told = typing.get_type_hints(kind.Options), option_help(kind.Options)
    lines = ["| option | values | default | meaning |", "| --- | --- | --- | --- |"]
    before = None
    for entry in declared:
        default, said = default_text(entry), told[entry.name]
        if before is not None and said and said == told[before]:
            said = f"with `{before}`"
        lines.append(
            f"| `{entry.name}` | {_cell(describe(hints[entry.name]))} | "
            f"{'must be given' if default is None else f'`{default}`'} | {_cell(said)} |"
        )
        before = entry.name
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
