"""Dropping tokens of images where a graph puts them out: the vision part of a model that comes in parts."""

from __future__ import annotations

from .analysis.joins import Join
from .analysis.packed import packed_spaces
from .analysis.spaces import Analysis, TokenSpace
from .carry import Carrier
from .drop_choice import choose
from .drop_job import Job
from .drop_policies import best_tokens, quotient
from .drop_survey import followed, tower_of
from .errors import Refused
from .ir.graph import Value, product
from .writer import Writer


def drop_at_output(job: Job) -> None:
    """Let the output that holds a row for every token hold the kept ones only, [images, kept, C], and put out their
    places among the tokens of an image, `elision_kept` int32 [images, kept]. Class tokens that it holds stay. With an
    adaptive budget also `elision_size` float32 [images, kept], 0 for slots that hold nobody."""
    graph, options = job.graph, job.options
    join = output_join(job.analysis, options.output)
    value, tower = join.value, tower_of(job.analysis, join)
    assert value.shape is not None
    pictures, rows = tower.pictures, quotient(product(value.shape[:-1]), tower.pictures)
    if not isinstance(rows, int) or (options.tiles > 1 and not isinstance(pictures, int)):
        raise Refused(
            f"%{value.name} has {rows} tokens of each of {pictures} pictures: how many stay must be a number"
        )
    way = followed(graph, lambda analysis: output_join(analysis, options.output))[2]
    if way.outside:
        raise Refused(f"%{value.name} holds more than the tokens of the pictures")
    each = rows if way.shuffled else rows - _protected(job.analysis, join.source, value)
    kept = options.kept(each)
    if kept >= each:
        job.nothing(f"{each} tokens of an image")
        return
    chosen = choose(job, join, tower, kept, pictures, shuffled=bool(way.shuffled))
    write = Writer.behind(graph, [value], chosen.write.cursor)
    found = Carrier(write, job.analysis, join.source, chosen.part).at(value)
    if way.shuffled:
        found = best_tokens(write, write.shaped("reshape", found, [pictures, rows]), options, kept)
    images, tokens = quotient(pictures, options.tiles), rows * options.tiles
    flags = write.shaped("reshape", found, [images, tokens])
    gone = each * options.tiles - options.kept_in(each, options.tiles)
    _, keep, _, size, _ = write("drop_tokens", [flags], count=gone)
    features = write.shaped("reshape", value, [images, tokens, value.shape[-1]])
    fewer = write("select_tokens", [features, keep], axis=1, rank=3, batch_axis=0)[0]
    chosen.put_in(graph)
    graph.replace_output(_place(job.analysis, join.source, options.output), fewer)
    job.put_out(keep)
    if options.adaptive != "no":
        graph.add_output(size, "elision_size")
        job.outcome.notes.append(
            "elision_size is 0 for slots that hold nobody: the text's mask must hide them"
        )
    job.outcome.notes.append(f"{kept} of {each} tokens of each of {pictures} pictures are put out")


def output_join(analysis: Analysis, output: str = "") -> Join:
    """The one output that holds the tokens of the graph's only space, or the one of this name, as where those
    arrive. Raises Refused."""
    packed = packed_spaces(analysis)
    spaces = [p.space for p in packed] or [space for space in analysis.spaces if space.blocks]
    if len(spaces) != 1:
        raise Refused(
            f"the graph has {len(spaces)} token spaces and the tokens of none are written among another's"
        )
    value = analysis.graph.outputs[_place(analysis, spaces[0], output)]
    return Join(spaces[0], spaces[0], value, packed=packed[0] if packed else None)


def output_name(analysis: Analysis) -> str:
    """The name of the one output that holds the tokens. Raises Refused."""
    value = output_join(analysis).value
    return analysis.graph.output_names[analysis.graph.outputs.index(value)]


def _place(analysis: Analysis, space: TokenSpace, output: str) -> int:
    first = space.blocks[0].attention.output
    names = analysis.graph.output_names
    held = [
        index
        for index, value in enumerate(analysis.graph.outputs)
        if analysis.flow.depends(value, first) and value.rank in (2, 3)
    ]
    if output and (output not in names or names.index(output) not in held):
        raise Refused(f"no output {output} holds tokens; those that do: {_listed(names, held)}")
    if output:
        return names.index(output)
    # A pooled output [T, C] holds no tokens; nor does one of a layer that others come behind, if one of the last does.
    last = space.blocks[-1].attention.output
    found = [index for index in held if not _pooled(analysis.graph.outputs[index], space)]
    late = [index for index in found if analysis.flow.depends(analysis.graph.outputs[index], last)] or found
    if len(late) != 1:
        raise Refused(
            f"{len(late)} outputs hold the {space.length} tokens, where one is to hold fewer: option output names it"
        )
    return late[0]


def _listed(names: list[str], places: list[int]) -> str:
    return ", ".join(names[index] for index in places) or "none"


def _pooled(value: Value, space: TokenSpace) -> bool:
    """True where a value has a row for each of the space's rows of tokens, not for each token."""
    q = space.blocks[0].attention.inputs[0]
    assert q is not None and q.shape is not None and value.shape is not None
    return value.rank == 2 and value.shape[0] == q.shape[0]


def _protected(analysis: Analysis, space: TokenSpace, value: Value) -> int:
    """How many class tokens and the like are among the rows of a picture in `value`."""
    places = analysis.token_axes(space, value)
    if len(places) != 1:
        return 0
    start, stop = places[0][1]
    return space.prefix - start + space.suffix - stop
