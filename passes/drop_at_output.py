"""Dropping tokens of images where a graph puts them out: the vision part of a model that comes in parts."""

from __future__ import annotations

from .analysis.joins import Join
from .analysis.packed import packed_spaces
from .analysis.spaces import Analysis, TokenSpace
from .carry import Carrier
from .drop_choice import Chosen, carried_flags, choose
from .drop_job import Job
from .drop_policies import best_tokens, quotient
from .drop_survey import Survey, followed, look_at_output, tower_of
from .errors import Refused
from .ir.graph import Dim, Value, product
from .writer import Writer


def drop_at_output(job: Job) -> None:
    """Let the output that holds a row for every token hold the kept ones only, [images, kept, C], and put out their
    places among the tokens of an image, `elision_kept` int32 [images, kept]. Class tokens that it holds stay, and so do
    separators among the tokens (newlines of rows of tiles): with them all pictures are one image. Where slots can be
    empty (an adaptive budget, tokens chosen that do not come out) also `elision_size` float32 [images, kept], 0 for
    slots that hold nobody."""
    join = output_join(job.analysis, job.options.output)

    def found(analysis: Analysis) -> Join:
        return output_join(analysis, job.options.output)

    way = followed(job.graph, found)[2]
    if way.outside:
        _among_others(job, join, look_at_output(job.graph, found, job.context))
    else:
        _alone(job, join, shuffled=bool(way.shuffled))


def _alone(job: Job, join: Join, *, shuffled: bool) -> None:
    """Where nothing but tokens of pictures comes out."""
    graph, options = job.graph, job.options
    value, tower = join.value, tower_of(job.analysis, join)
    assert value.shape is not None
    pictures, rows = tower.pictures, quotient(product(value.shape[:-1]), tower.pictures)
    if not isinstance(rows, int) or (options.tiles > 1 and not isinstance(pictures, int)):
        raise Refused(
            f"%{value.name} has {rows} tokens of each of {pictures} pictures: how many stay must be a number"
        )
    each = rows if shuffled else rows - _protected(job.analysis, join.source, value)
    kept = options.kept(each)
    if kept >= each:
        job.nothing(f"{each} tokens of an image")
        return
    chosen = choose(job, join, tower, kept, pictures, shuffled=shuffled)
    write = Writer.behind(graph, [value], chosen.write.cursor)
    found = Carrier(write, job.analysis, join.source, chosen.part).at(value)
    if shuffled:
        found = best_tokens(write, write.shaped("reshape", found, [pictures, rows]), options, kept)
    images, tokens = quotient(pictures, options.tiles), rows * options.tiles
    gone = each * options.tiles - options.kept_in(each, options.tiles)
    _put_out(job, join, write, chosen, found, [images, tokens], gone, empty=options.adaptive != "no")
    job.outcome.notes.append(f"{kept} of {each} tokens of each of {pictures} pictures are put out")


def _among_others(job: Job, join: Join, survey: Survey) -> None:
    """Where separators come out among them, which stay."""
    options, value = job.options, join.value
    assert value.shape is not None
    wanted = options.kept_in(survey.each, survey.images)
    gone = survey.rows - wanted
    if gone <= 0:
        job.nothing(f"{survey.rows} tokens of pictures")
        return
    chosen, found, write = carried_flags(job, join, survey)
    tokens = product(value.shape[:-1])
    empty = options.adaptive != "no" or survey.rows < survey.each * survey.images
    _put_out(job, join, write, chosen, found, [1, tokens], gone, empty=empty)
    job.outcome.notes.append(
        f"{'at most ' if empty else ''}{wanted} of {survey.rows} tokens of {survey.images} pictures are put out, "
        f"and all of the {int(tokens) - survey.rows} separators among them"
    )


def _put_out(
    job: Job,
    join: Join,
    write: Writer,
    chosen: Chosen,
    found: Value,
    rows: list[Dim],
    gone: int,
    *,
    empty: bool,
) -> None:
    """Leave `gone` tokens of each image out by the flags `found`. rows: images, tokens. empty: whether a slot may hold
    nobody."""
    value = join.value
    assert value.shape is not None
    _, keep, _, size, _ = write("drop_tokens", [write.shaped("reshape", found, rows)], count=gone)
    features = write.shaped("reshape", value, [*rows, value.shape[-1]])
    fewer = write("select_tokens", [features, keep], axis=1, rank=3, batch_axis=0)[0]
    chosen.put_in(job.graph)
    job.graph.replace_output(_place(job.analysis, join.source, job.options.output), fewer)
    job.put_out(keep)
    if empty:
        job.graph.add_output(size, "elision_size")
        job.outcome.notes.append(
            "elision_size is 0 for slots that hold nobody: the text's mask must hide them"
        )


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
