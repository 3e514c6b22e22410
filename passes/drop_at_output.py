"""Dropping tokens of images where a graph puts them out: the vision part of a model that comes in parts."""

from __future__ import annotations

from .analysis.joins import Join
from .analysis.packed import packed_spaces
from .analysis.spaces import Analysis, TokenSpace
from .carry import Carrier
from .drop_choice import choose
from .drop_job import Job
from .drop_survey import followed, tower_of
from .errors import Refused
from .ir.graph import product
from .writer import Writer


def drop_at_output(job: Job) -> None:
    """Let the output that holds a row for every token hold the kept ones only, [images, kept, C], and put out their
    places among the tokens of an image, `elision_kept` int32 [images, kept]."""
    graph, options = job.graph, job.options
    join = output_join(job.analysis)
    value, tower = join.value, tower_of(job.analysis, join)
    assert value.shape is not None
    pictures, rows = tower.pictures, product(value.shape[:-1])
    if not isinstance(pictures, int) or not isinstance(rows, int) or rows % pictures:
        raise Refused(
            f"%{value.name} has {rows} tokens of {pictures} pictures: how many stay must be a number"
        )
    each = rows // pictures
    kept = options.kept(each)
    if kept >= each:
        job.nothing(f"{each} tokens of an image")
        return
    way = followed(graph, output_join)[2]
    if way.outside:
        raise Refused(f"%{value.name} holds more than the tokens of the pictures")
    chosen = choose(job, join, tower, kept, pictures, shuffled=bool(way.shuffled))
    write = Writer.behind(graph, [value], chosen.write.cursor)
    found = Carrier(write, job.analysis, join.source, chosen.part).at(value)
    if way.shuffled:
        found = write("top_tokens", [write.shaped("reshape", found, [pictures, each])], count=kept)[0]
    images, tokens = pictures // options.tiles, each * options.tiles
    flags = write.shaped("reshape", found, [images, tokens])
    keep = write("drop_tokens", [flags], count=tokens - options.kept_in(each, options.tiles))[1]
    features = write.shaped("reshape", value, [images, tokens, value.shape[-1]])
    fewer = write("select_tokens", [features, keep], axis=1, rank=3, batch_axis=0)[0]
    chosen.put_in(graph)
    graph.replace_output(_place(job.analysis, join.source), fewer)
    job.put_out(keep)
    job.outcome.notes.append(f"{kept} of {each} tokens of each of {pictures} pictures are put out")


def output_join(analysis: Analysis) -> Join:
    """The one output that holds the tokens of the graph's only space, as where those arrive. Raises Refused."""
    packed = packed_spaces(analysis)
    spaces = [p.space for p in packed] or [space for space in analysis.spaces if space.blocks]
    if len(spaces) != 1:
        raise Refused(
            f"the graph has {len(spaces)} token spaces and the tokens of none are written among another's"
        )
    value = analysis.graph.outputs[_place(analysis, spaces[0])]
    return Join(spaces[0], spaces[0], value, packed=packed[0] if packed else None)


def _place(analysis: Analysis, space: TokenSpace) -> int:
    last = space.blocks[-1].attention.output
    found = [
        index
        for index, value in enumerate(analysis.graph.outputs)
        if analysis.flow.depends(value, last) and value.rank in (2, 3)
    ]
    if len(found) != 1:
        raise Refused(f"{len(found)} outputs hold the {space.length} tokens, where one is to hold fewer")
    return found[0]
