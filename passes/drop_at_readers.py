"""Dropping tokens of images that a text reads by attention (cross-attention): its keys and values become fewer."""

from __future__ import annotations

from .analysis.joins import Join
from .carry import Carrier
from .drop_choice import Chosen
from .drop_features import MERGING
from .drop_job import Job
from .drop_policies import attention_attrs, best_tokens, score_of
from .drop_survey import tower_of
from .errors import Refused
from .ir.graph import Graph, Op, Value
from .writer import Writer


def drop_at_readers(job: Job, join: Join) -> None:
    """Let every attention of the text that reads the source read the best of its tokens only."""
    options, depends = job.options, job.analysis.flow.depends
    if options.policy in MERGING or options.tiles > 1:
        raise Refused(f"policy={options.policy} needs tokens that are written among those of a text")
    tower = tower_of(job.analysis, join)
    first = tower.attentions[0].output
    readers = [op for op in join.target.reads if op.inputs[1] is not None and depends(op.inputs[1], first)]
    keys = _keys(readers)
    assert keys.shape is not None
    count = keys.shape[-2]
    if not isinstance(count, int):
        raise Refused(f"%{keys.name} has {count} tokens to read: how many stay must be a number")
    kept = options.kept(count)
    if kept >= count:
        job.nothing(f"{count} tokens")
        return
    write = Writer.behind(job.graph, [keys, *(a.output for a in tower.attentions)])
    layer = -1 if options.layer is None else options.layer
    score, how = score_of(write, tower, options, kept, layer=layer)
    carrier = Carrier(write, job.analysis, join.source, Chosen(write, score).part)
    found = carrier.at(keys)  # [B, heads, M], the same for all heads
    each = write("slice_tokens", [found], axis=1, start=0, end=1, keepdim=False)[0]
    flags = best_tokens(write, each, options, kept)
    mask, valid = readers[0].operand(3), None
    if mask is not None and _over_keys(mask, count):
        write.cursor = job.graph.hoist(mask, write.cursor)
        batch = 0 if mask.rank == 4 else -1
        valid = write("valid_size", [mask], axis=mask.rank - 1, batch_axis=batch)[0]
    _, keep, _, size, _ = write("drop_tokens", [flags, valid], count=count - kept)
    for op in readers:
        _read(job.graph, op, count, keep, size)
    job.outcome.notes += [how, f"{len(readers)} attentions read {kept} of {count} tokens"]


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


def _read(graph: Graph, op: Op, count: int, keep: Value, size: Value) -> None:
    """The same attention over the kept keys."""
    q, k, v = op.inputs[:3]
    mask = op.operand(3)
    assert q is not None and k is not None and v is not None
    write = Writer.behind(graph, [q, k, v, mask, keep])
    axes = {"axis": 2, "rank": 4, "batch_axis": 0}
    fewer = [write("select_tokens", [x, keep], **axes)[0] for x in (k, v)]
    if mask is not None and _over_keys(mask, count):
        mask = write("select_tokens", [mask, keep], **{**axes, "axis": 3})[0]
    graph.replace_uses(op.output, write("attention", [q, *fewer, mask, size], **attention_attrs(op))[0])
