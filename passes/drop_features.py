"""Policies that also put what is dropped into what is kept: VisionZip's contextual tokens, PruMerge's means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .analysis.joins import Join
from .cut_maps import WHOLE
from .drop_policies import Tower
from .errors import Refused
from .ir.graph import Value
from .writer import Writer

if TYPE_CHECKING:
    from .token_drop import DropOptions

MERGING = frozenset({"visionzip", "prumerge"})


def merged(
    write: Writer,
    tower: Tower,
    options: DropOptions,
    kept: int,
    stream: Value,
    score: Value,
    flags: Value,
    layer: int,
) -> tuple[Value, Value]:
    """Flags, and the features `stream` [T, N, C] in which the kept tokens have taken others in. Flags that are given to
    visionzip keep the dominant tokens only, those that come back its contextual ones too."""
    (keys,) = tower.keys(write, layer)
    if options.policy == "prumerge":
        attrs = {"kept": kept, "neighbours": options.neighbours}
        return flags, write("absorb_tokens", [stream, keys, score, flags], **attrs)[0]
    held = dominant(options, kept)
    asked = {"count": kept - held, "kept": held + tower.space.prefix + tower.space.suffix}
    slot, keep, source, flags = write("contextual_tokens", [keys, flags], **asked)
    means = write("merge_tokens", [stream, None, slot, keep, source], axis=1, batch_axis=0)[0]
    return flags, write("restore_tokens", [means, slot], axis=1, batch_axis=0)[0]


def dominant(options: DropOptions, kept: int) -> int:
    """How many of the kept tokens are dominant; visionzip's others are contextual."""
    if options.policy != "visionzip":
        return kept
    return kept - max(round(kept * options.contextual), 1) if kept > 1 else kept


def last_stream(tower: Tower, join: Join) -> Value:
    """The tower's last value [T, N, C], which all of its features pass through. Raises Refused where they do not."""
    analysis, space = tower.analysis, tower.space
    last = tower.attentions[-1].output
    found: Value | None = None
    for op in analysis.graph.ops:
        out = op.output
        adds = op.kind == "elementwise" and op.attrs.get("fn") == "add" and len(op.inputs) == 2
        if not (adds and analysis.flow.depends(out, last) and analysis.flow.depends(join.value, out)):
            continue
        if out.rank == 3 and analysis.token_axes(space, out) == [(1, WHOLE)]:
            found = out
    if found is None:
        raise Refused(f"%{last.name}: no addition behind it holds the features of all {space.length} tokens")
    around = _around(tower, join, found)
    if around is not None:
        raise Refused(
            f"%{around.name} reaches the text beside %{found.name}, into which tokens would be merged"
        )
    return found


def _around(tower: Tower, join: Join, stream: Value) -> Value | None:
    """A result of the tower's attentions that reaches the join by another way than through `stream`."""
    results = {op.output for op in tower.attentions}
    waiting, seen = [join.value], {join.value, stream}
    while waiting:
        value = waiting.pop()
        if value in results:
            return value
        for operand in value.producer.inputs if value.producer is not None else ():
            if operand is not None and operand not in seen:
                seen.add(operand)
                waiting.append(operand)
    return None
