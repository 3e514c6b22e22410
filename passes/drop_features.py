"""Policies that also put what is dropped into what is kept: VisionZip's contextual tokens, PruMerge's means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .analysis.joins import Join
from .cut_maps import WHOLE
from .drop_policies import Tower, Writer
from .errors import Refused
from .ir.graph import Graph, Op, Value

if TYPE_CHECKING:
    from .token_drop import DropOptions


@dataclass(frozen=True)
class Merged:
    """`flags` of the kept tokens, and that `new` is to stand for `old` for all that read it before (`readers`)."""

    flags: Value
    old: Value | None = None
    new: Value | None = None
    readers: tuple[tuple[Op, int], ...] = ()

    def put_in(self, graph: Graph) -> None:
        """Let the readers have the merged features."""
        for op, index in self.readers:
            assert self.new is not None
            graph.set_operand(op, index, self.new)


def merge_features(
    write: Writer, tower: Tower, join: Join, options: DropOptions, kept: int, score: Value, flags: Value
) -> Merged:
    """For visionzip and prumerge the features of kept tokens take others in. visionzip's flags are new ones: those
    given keep the dominant tokens only."""
    if options.policy not in ("visionzip", "prumerge"):
        return Merged(flags)
    value = last_stream(tower, join)
    readers = tuple(value.users)
    keys = tower.keys(write, -1 if options.layer is None else options.layer)[0]
    if options.policy == "prumerge":
        attrs = {"kept": kept, "neighbours": options.neighbours}
        made = write("absorb_tokens", [value, keys, score, flags], **attrs)[0]
        return Merged(flags, value, made, readers)
    held = dominant(options, kept)
    asked = {"count": kept - held, "kept": held + tower.space.prefix + tower.space.suffix}
    slot, keep, source, flags = write("contextual_tokens", [keys, flags], **asked)
    merged = write("merge_tokens", [value, None, slot, keep, source], axis=1, batch_axis=0)[0]
    made = write("restore_tokens", [merged, slot], axis=1, batch_axis=0)[0]
    return Merged(flags, value, made, readers)


def dominant(options: DropOptions, kept: int) -> int:
    """How many of the kept tokens are dominant; visionzip's others are contextual."""
    if options.policy != "visionzip":
        return kept
    return kept - max(round(kept * options.contextual), 1) if kept > 1 else kept


def last_stream(tower: Tower, join: Join) -> Value:
    """The tower's last value [T, N, C] that all of its features pass through."""
    analysis, space = tower.analysis, tower.space
    found: Value | None = None
    last = tower.attentions[-1].output
    for op in analysis.graph.ops:
        out = op.output
        if op not in analysis.flow.position or op.kind != "elementwise" or op.attrs.get("fn") != "add":
            continue
        if not analysis.flow.depends(out, last) or not analysis.flow.depends(join.value, out):
            continue
        if out.rank == 3 and analysis.token_axes(space, out) == [(1, WHOLE)] and len(op.inputs) == 2:
            found = out
    if found is None:
        raise Refused(f"%{last.name}: no addition behind it holds the features of all {space.length} tokens")
    return found
