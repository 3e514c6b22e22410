"""Dropping tokens of images at a later block of the language model, by the attention of its last token (FastV)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .analysis.joins import Join, first_over, written_join
from .analysis.masks import causal_because
from .analysis.residual import lookups
from .analysis.spaces import Analysis, Ends, TokenSpace
from .base import NewSignature
from .carry import Carrier
from .drop_job import Job
from .drop_policies import best_tokens, last_row_score
from .drop_survey import look, ones_at
from .errors import Refused
from .ir.graph import Dim, Value
from .writer import Writer

MASK_INPUT = "image_tokens"
"""The input that says which tokens are those of images, where nothing else in the graph does."""


@dataclass(frozen=True)
class Images:
    """Which tokens of a text are those of images: `rows` of them; `among` [B, N] is 1 there and -1 elsewhere.
    `pictures` in each text, where that is known."""

    among: Value
    rows: int
    pictures: int | None


def drop_in_language(job: Job, join: Join | None) -> None:
    """Drop before a block of the language model, by the attention of the last token in the block before."""
    options = job.options
    space = join.target if join is not None else _text(job.analysis)
    blocks = space.blocks
    layer = 2 if options.layer is None else options.layer
    layer += len(blocks) if layer < 0 else 0
    if not 1 <= layer < len(blocks):
        raise Refused(f"policy=fastv drops before block 1 to {len(blocks) - 1}, not {layer}")
    value, before = blocks[layer].skip, blocks[layer - 1].attention
    if value is None or value.producer is None:
        raise Refused(f"%{blocks[layer].attention.name}: {blocks[layer].problem}")
    write = Writer(job.graph, value.producer)
    images = _joined(job, join, write) if join is not None else _said(job, space, write)
    # Pictures of a text compete: a share is one of all of its image tokens.
    counted = options.budget > 1
    if counted and images.pictures is None:
        kept = min(int(options.budget), images.rows)
    elif counted:
        kept = min(int(options.budget) * (images.pictures or 1), images.rows)
    else:
        kept = options.kept(images.rows)
    gone = images.rows - kept
    if gone <= 0:
        job.nothing(f"{images.rows} tokens of images")
        return
    score = last_row_score(write, job.analysis, space, before)
    budget = {"count": kept} if counted else {"ratio": options.budget}
    flags = best_tokens(write, score, options, kept, images.among, **budget)
    job.cut(space, value, flags, write, gone)
    job.outcome.notes.append(
        f"scores are each sample's last token's attention in %{before.name}; from block {layer} on {gone} of "
        f"{space.length} tokens are gone"
    )
    if options.image_tokens == "mask":
        graph, names = job.graph, [*job.graph.input_names[:-1], MASK_INPUT]
        inputs, outputs = list(graph.inputs), list(zip(graph.output_names, graph.outputs, strict=True))
        graph.set_signature(list(zip(names, inputs, strict=True)), outputs)


def _text(analysis: Analysis) -> TokenSpace:
    """The last space of a language model alone. Raises Refused where nothing says that it is one."""
    spaces = [space for space in analysis.spaces if space.blocks]
    if not causal_because(analysis, spaces[-1].blocks[-1].attention):
        raise Refused("policy=fastv needs the features of an image among the tokens of a text")
    return spaces[-1]


def _joined(job: Job, join: Join, write: Writer) -> Images:
    survey = look(job.graph, written_join, job.context)
    return Images(ones_at(write, job.analysis, join), survey.rows, survey.images)


# ---- a language model alone ------------------------------------------------------------------------------
def _said(job: Job, space: TokenSpace, write: Writer) -> Images:
    """Image tokens by the features that an input holds, by their id, or by an input of their own."""
    options, features = job.options, _features(job.analysis, space)
    if options.image_tokens == "" and len(features) == 1:
        return _of_features(job, *features[0], write)
    if options.image_tokens == "":
        raise Refused(
            "policy=fastv needs the features of an image among the tokens of a text; for a language model alone, "
            "image_tokens says which tokens are those of images"
        )
    if options.image_count is None:
        raise Refused("image_tokens needs image_count, the number of image tokens in each text")
    count = options.image_count
    if isinstance(space.length, int) and not 0 < count <= space.length:
        raise Refused(f"a text of {space.length} tokens has no {count} image tokens")
    among = _by_mask(job, space, write) if options.image_tokens == "mask" else _by_id(job, space, write)
    return Images(among, count, None)


def _features(analysis: Analysis, space: TokenSpace) -> list[tuple[Value, Value]]:
    """Inputs of features that are no tokens of the text, each with the first value of the text that holds them."""
    found = []
    for value in analysis.graph.inputs:
        stream = space.stream
        if stream is None or value.rank < 2 or not analysis.flow.depends(stream, value):
            continue
        arrival = first_over(analysis, space, value)
        if arrival is None or analysis.token_axes(space, value) or value.dtype != arrival.dtype:
            continue
        if analysis.is_content(space, arrival):
            found.append((value, arrival))
    return found


def _of_features(job: Job, features: Value, arrival: Value, write: Writer) -> Images:
    assert features.shape is not None and arrival.shape is not None
    rows: Dim = 1
    for dim in features.shape[:-1]:
        rows = rows * dim
    batch = arrival.shape[0]

    def ones(_: Ends, write: Writer) -> Value:
        return write.filled(
            np.ones((1,) * features.rank, np.float32), "ones", [*(features.shape or ())[:-1], 1]
        )

    among = Carrier(write, job.analysis, features, ones).at(arrival)
    if not isinstance(rows, int) or not isinstance(batch, int) or rows % batch:
        raise Refused(
            f"%{features.name} holds {rows} image tokens for {batch} texts: how many tokens go must be a number"
        )
    return Images(among, rows // batch, None)


def _by_id(job: Job, space: TokenSpace, write: Writer) -> Value:
    """1 where the text's ids are the placeholder's."""
    number = int(job.options.image_tokens)
    ids = [v for v in job.graph.inputs if _is_line(job.analysis, space, v) and lookups(job.graph, v)]
    if len(ids) != 1:
        raise Refused(
            f"image_tokens={number}: {len(ids)} inputs hold the ids of the text; image_tokens=mask takes a mask"
        )
    table = lookups(job.graph, ids[0])[0].inputs[0]
    assert table is not None and table.shape is not None
    rows = table.shape[0]
    if not isinstance(rows, int) or not 0 <= number < rows:
        raise Refused(f"image_tokens={number}: the table of embeddings has {rows} rows")
    line = np.full((rows, 1), -1, np.float32)
    line[number] = 1
    return _looked_up(job, line, ids[0], write)


def _by_mask(job: Job, space: TokenSpace, write: Writer) -> Value:
    """1 where a new input int64 [B, N] is 1."""
    stream = space.stream
    assert stream is not None and stream.shape is not None
    mask = job.graph.add_input(MASK_INPUT, "int64", list(stream.shape[:2]))
    job.outcome.notes.append(
        f"the graph takes %{MASK_INPUT} int64 {list(stream.shape[:2])}, 1 for a token of an image"
    )
    job.outcome.signature = NewSignature()
    return _looked_up(job, np.array([[-1], [1]], np.float32), mask, write)


def _looked_up(job: Job, line: np.ndarray, ids: Value, write: Writer) -> Value:
    assert ids.shape is not None
    table = job.graph.insert_constant(line, "image_tokens_by_id")
    flat = write.shaped("reshape", ids, [ids.shape[0] * ids.shape[1]])
    if flat.dtype != "int64":
        flat = write.plain("cast", flat, dtype="int64")
    return write.shaped("reshape", write.plain("gather", table, flat, axis=0), list(ids.shape))


def _is_line(analysis: Analysis, space: TokenSpace, value: Value) -> bool:
    return value.rank == 2 and value.dtype in ("int64", "int32") and bool(analysis.token_axes(space, value))
