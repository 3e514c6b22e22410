"""Dropping tokens of images that a text reads by attention (cross-attention): its keys and values become fewer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .analysis.joins import Join
from .analysis.spaces import Analysis, Ends
from .base import Outcome
from .carry import Carrier
from .drop_at_join import last_of, part, tower_of
from .drop_policies import Writer, attention_attrs, score_of
from .errors import Refused
from .ir.graph import Graph, Op, Value

if TYPE_CHECKING:
    from .token_drop import DropOptions


def drop_at_readers(
    graph: Graph, analysis: Analysis, join: Join, options: DropOptions, outcome: Outcome
) -> None:
    """Let every attention of the text that reads the source read the best of its tokens only."""
    if options.policy in ("visionzip", "prumerge") or options.tiles > 1:
        raise Refused(f"policy={options.policy} needs tokens that are written among those of a text")
    tower = tower_of(analysis, join)
    readers = [op for op in join.target.reads if analysis.flow.depends(op.output, tower.attentions[0].output)]
    keys = _keys(readers)
    assert keys.shape is not None
    count = keys.shape[-2]
    if not isinstance(count, int):
        raise Refused(f"%{keys.name} has {count} tokens to read: how many stay must be a number")
    kept = options.kept(count)
    if kept >= count:
        outcome.changed = False
        outcome.notes.append(f"nothing to drop: all {count} tokens are kept")
        return
    write = Writer(graph, last_of(graph, [a.output for a in tower.attentions]))
    score, how = score_of(write, tower, options, kept, layer=-1 if options.layer is None else options.layer)

    def numbers(ends: Ends, carrier: Carrier) -> Value:
        return part(carrier, score, ends)

    carrier = Carrier(graph, analysis, join.source, last_of(graph, [keys], write.cursor), numbers)
    found = carrier.at(keys)  # [B, heads, M], the same for all heads
    write.cursor = carrier.cursor
    each = write("slice_tokens", [found], axis=1, start=0, end=1, keepdim=False)[0]
    flags = write("top_tokens", [each], count=kept)[0]
    mask = readers[0].operand(3)
    valid = None
    if mask is not None and _over_keys(mask, count):
        write.cursor = graph.hoist(mask, write.cursor)
        batch = 0 if mask.shape is not None and mask.rank == 4 and mask.shape[0] != 1 else -1
        valid = write("valid_size", [mask], axis=mask.rank - 1, batch_axis=batch)[0]
    _, keep, _, size, _ = write("drop_tokens", [flags, valid], count=count - kept)
    for op in readers:
        _read(graph, op, count, keep, size, last_of(graph, [keep]))
    outcome.notes += [how, f"{len(readers)} attentions read {kept} of {count} tokens"]


def _keys(readers: list[Op]) -> Value:
    keys = [op.inputs[1] for op in readers]
    first = keys[0]
    if first is None or first.shape is None or first.rank != 4:
        raise Refused(f"{readers[0].target} (%{readers[0].name}) has no keys [batch, heads, tokens, width]")
    if any(k is None or k.shape is None or k.shape[-2] != first.shape[-2] for k in keys):
        raise Refused(f"the attentions that read with %{first.name} have different numbers of keys")
    return first


def _over_keys(mask: Value, count: int) -> bool:
    return mask.shape is not None and mask.shape[-1] == count


def _read(graph: Graph, op: Op, count: int, keep: Value, size: Value, behind: Op | None) -> None:
    """The same attention over the kept keys."""
    q, k, v = op.inputs[:3]
    mask = op.operand(3)
    assert q is not None and k is not None and v is not None
    write = Writer(graph, last_of(graph, [q, k, v, mask], behind))
    fewer: list[Value | None] = [
        write("select_tokens", [x, keep], axis=x.rank - 2, rank=x.rank, batch_axis=0)[0] for x in (k, v)
    ]
    if mask is not None and _over_keys(mask, count):
        axes = {"axis": mask.rank - 1, "rank": mask.rank, "batch_axis": 0}
        mask = write("select_tokens", [mask, keep], **axes)[0]
    made = write("attention", [q, *fewer, mask, size], **attention_attrs(op))[0]
    graph.replace_uses(op.output, made)
