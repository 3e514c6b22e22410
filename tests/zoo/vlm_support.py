"""The table of docs/support.md on vision-language models: what token dropping does to each, in both hosts."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import elision

from .export import quiet
from .outcome import HOSTS
from .vlm import VlmModel, export, onnx_file

PASSES = "token-drop{policy=cls-topk budget=0.25}"

HEADING = "## Vision-language models"

HEAD = f"""
{HEADING}

`{PASSES}` on small random configurations, two texts with a picture each. Where it drops, the logits of the tokens that
are left are those of the unchanged model to which the dropped tokens are hidden (within 1e-4). Tests hold that for all
but BLIP-2, whose positions follow the mask, so that hiding tokens moves the others; for Llama 3.2 Vision it is tested
by hiding a tile.

| name | architecture | library | torch graph | ONNX file |
| --- | --- | --- | --- | --- |
"""


@cache
def dropped(entry: VlmModel, host: str, folder: Path) -> Any:
    """The result of PASSES on `entry`, or the sentence with which it refuses."""
    call = entry.build(2)
    try:
        with quiet():
            target: Any = export(entry) if host == "torch" else onnx_file(entry, folder)
            return elision.optimize(target, PASSES, example_inputs=call.args, force=True)
    except (elision.Refused, elision.NothingMatched) as error:
        return str(error)


def vlm_row(entry: VlmModel, folder: Path) -> str:
    """One line of the table."""
    cells = [f"`{entry.name}`", entry.architecture, "transformers"]
    return "| " + " | ".join([*cells, *(_cell(dropped(entry, host, folder)) for host in HOSTS)]) + " |"


def _cell(found: Any) -> str:
    if isinstance(found, str):
        return f"refuses: {found}".replace("|", "\\|").strip()
    (report,) = [single for single in found.report.passes if single.name == "token-drop"]
    return f"drops: {report.notes[-1]}"
