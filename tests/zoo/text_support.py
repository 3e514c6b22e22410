"""The table of docs/support.md on texts: what segments, delete gates and dynamic vocabularies do to each model."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from .code import CODE
from .export import exported
from .model import ZooModel
from .outcome import HOSTS, Outcome, attempt
from .text import MODELS

TEXTS: dict[str, ZooModel] = {
    entry.name: entry
    for entry in [*(e for e in MODELS if e.name in ("bert", "roberta", "modernbert")), *CODE]
}
PASSES = ("segment-merge{layer=1 capacity=16}", "token-gate{layer=1}", "dynamic-vocab")
HEADING = "## Text: segments, delete gates, dynamic vocabularies"

HEAD = f"""
{HEADING}

`{PASSES[0]}`, `{PASSES[1]}` and `{PASSES[2]}` on small random configurations, both hosts. The chain is the number
of tokens in each attention over them, before and after; of a model with a decoder its own follow. A dynamic vocabulary
leaves the lengths of the graph alone: its texts come in shorter. Tests run all that works: what changes nothing is the
identity, results depend on no neighbour in the batch, and an id with the row of another token is that token.

| name | architecture | segment-merge | token-gate | dynamic-vocab |
| --- | --- | --- | --- | --- |
"""


@cache
def outcome(entry: ZooModel, host: str, passes: str, folder: Path) -> Outcome:
    """What `passes` does, the ids found under the name that they have in the host."""
    if passes == "dynamic-vocab" and host == "torch":
        names = exported(entry).graph_signature.user_inputs
        passes = f"dynamic-vocab{{ids={names[0]}}}"
    return attempt(entry, host, passes, folder)


def text_row(entry: ZooModel, folder: Path) -> str:
    """One line of the table."""
    what = entry.architecture + (f", {entry.note}" if entry.note else "")
    cells = [f"`{entry.name}`", what, *(_cell(entry, passes, folder) for passes in PASSES)]
    return "| " + " | ".join(cells) + " |"


def _cell(entry: ZooModel, passes: str, folder: Path) -> str:
    """What both hosts do, told once where they do the same."""
    told = [_told(outcome(entry, host, passes, folder)) for host in HOSTS]
    if told[0] == told[1]:
        return told[0]
    torch, onnx = told
    return f"torch graph {torch}; ONNX file {onnx}"


def _told(found: Outcome) -> str:
    if found.result is None:
        return f"refuses: {found.sentence}".replace("|", "\\|").strip()
    name = found.passes.partition("{")[0]
    (report,) = [p for p in found.result.report.passes if p.name == name]
    if name == "dynamic-vocab":
        return "works"
    return f"works, {_chain(report.cost_before)} → {_chain(report.cost_after)}"


def _chain(cost: Any) -> str:
    return " ".join(str(int(length)) for length in cost.tokens_per_block)
