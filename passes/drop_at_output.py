"""Dropping tokens of images where a graph puts them out: the vision part of a model that comes in parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .analysis.joins import Join
from .analysis.packed import packed_spaces
from .analysis.spaces import Analysis, Ends, TokenSpace
from .base import NewSignature, Outcome, PassContext
from .carry import Carrier
from .drop_at_join import last_of, part, tower_of
from .drop_features import dominant, last_stream, merge_features
from .drop_policies import Writer, score_of
from .drop_tiles import tile_counts
from .errors import Refused
from .ir.graph import Graph, Value, product

if TYPE_CHECKING:
    from .token_drop import DropOptions


def drop_at_output(
    graph: Graph,
    analysis: Analysis,
    space: TokenSpace,
    options: DropOptions,
    context: PassContext,
    outcome: Outcome,
) -> None:
    """Let the output that holds a row for every token hold the kept ones only, [images, kept, C], and put out their
    places among the tokens of an image, `elision_kept` int32 [images, kept]."""
    packed = next((p for p in packed_spaces(analysis) if space in p.parts), None)
    source = space if packed is None else packed.space
    index, value = _output(graph, analysis, source)
    join = Join(source, source, value, packed=packed)
    tower = tower_of(analysis, join)
    pictures = tower.pictures
    assert value.shape is not None
    rows = product(value.shape[:-1])
    if not isinstance(pictures, int) or not isinstance(rows, int) or rows % pictures:
        raise Refused(
            f"%{value.name} has {rows} tokens of {pictures} pictures: how many stay must be a number"
        )
    each = rows // pictures
    kept = options.kept(each)
    if kept >= each:
        outcome.changed = False
        outcome.notes.append(f"nothing to drop: all {each} tokens of an image are kept")
        return
    behind = [a.output for a in tower.attentions]
    merges = options.policy in ("visionzip", "prumerge")
    if merges:
        behind.append(last_stream(tower, join))
    write = Writer(graph, last_of(graph, [*behind]))
    score, how = score_of(write, tower, options, kept, layer=-1 if options.layer is None else options.layer)
    outcome.notes.append(how)
    counts = tile_counts(write, tower, options, pictures)
    merged = None
    if merges:
        flags = write("top_tokens", [score, None, tower.among(write)], count=dominant(options, kept))[0]
        merged = merge_features(write, tower, join, options, kept, score, flags)

    def numbers(ends: Ends, carrier: Carrier) -> Value:
        return part(carrier, score if merged is None else merged.flags, ends)

    carrier = Carrier(graph, analysis, source, last_of(graph, [value], write.cursor), numbers)
    found = carrier.at(value)
    if carrier.outside or (carrier.shuffled and (merges or counts is not None)):
        raise Refused(f"%{value.name} holds more than the tokens of the pictures, or several of them in one")
    write.cursor = carrier.cursor
    found = write.plain("reshape", found, [pictures, each])
    if merged is None:
        budget = {"count": kept} if counts is None else {}
        found = write("top_tokens", [found, counts], **budget)[0]
    images, tokens = pictures // options.tiles, each * options.tiles
    found = write.plain("reshape", found, [images, tokens])
    gone = tokens - options.kept_in(each, options.tiles)
    _, keep, _, _, _ = write("drop_tokens", [found], count=gone)
    features = write.plain("reshape", value, [images, tokens, value.shape[-1]])
    fewer = write("select_tokens", [features, keep], axis=1, rank=3, batch_axis=0)[0]
    if merged is not None:
        merged.put_in(graph)
    graph.replace_output(index, fewer)
    graph.add_output(keep, "elision_kept")
    examples = context.example_inputs
    outcome.signature = NewSignature(after=None if examples is None else list(examples))
    outcome.notes.append(f"{kept} of {each} tokens of each of {pictures} pictures are put out")


def _output(graph: Graph, analysis: Analysis, space: TokenSpace) -> tuple[int, Value]:
    """The one output that holds the tokens."""
    last = space.blocks[-1].attention.output
    found = [
        (i, v) for i, v in enumerate(graph.outputs) if analysis.flow.depends(v, last) and v.rank in (2, 3)
    ]
    if len(found) != 1:
        raise Refused(f"{len(found)} outputs hold the {space.length} tokens, where one is to hold fewer")
    return found[0]
