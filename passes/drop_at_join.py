"""Dropping tokens of images where they stand among the tokens of a text, or at a later block of the language model."""

from __future__ import annotations

from .analysis.joins import Join, written_join
from .carry import Carrier
from .drop_choice import choose
from .drop_job import Job
from .drop_policies import last_row_score, rank_rows
from .drop_survey import look, ones_at, tower_of
from .errors import Refused
from .ir.graph import Value
from .writer import Writer


def drop_at_join(job: Job, join: Join) -> None:
    """Drop where the image's features are written among the text's embeddings."""
    options = job.options
    survey = look(job.graph, written_join, job.context)
    kept = options.kept(survey.each)
    gone = survey.rows - options.kept_in(survey.each, survey.images)
    if gone <= 0:
        job.nothing(f"{survey.each} tokens of an image")
        return
    tower = tower_of(job.analysis, join)
    chosen = choose(job, join, tower, kept, survey.images, shuffled=survey.shuffled)

    def ranked(numbers: Value, write: Writer) -> Value:
        return rank_rows(write, numbers, survey.each, kept)

    write = Writer.behind(job.graph, [join.value], chosen.write.cursor)
    carrier = Carrier(write, job.analysis, join.source, chosen.part, ranked if survey.shuffled else None)
    job.cut(join.target, join.value, carrier.at(join.value), write, gone)
    chosen.put_in(job.graph)
    job.outcome.notes.append(
        f"{kept} of {survey.each} tokens of each image are kept: {gone} of {join.target.length} tokens of a text go"
    )


def drop_in_language(job: Job, join: Join) -> None:
    """Drop before a block of the language model, by the attention of the last token in the block before (FastV)."""
    options, blocks = job.options, join.target.blocks
    layer = 2 if options.layer is None else options.layer
    layer += len(blocks) if layer < 0 else 0
    if not 1 <= layer < len(blocks):
        raise Refused(f"policy=fastv drops before block 1 to {len(blocks) - 1}, not {layer}")
    value, before = blocks[layer].skip, blocks[layer - 1].attention
    if value is None or value.producer is None:
        raise Refused(f"%{blocks[layer].attention.name}: {blocks[layer].problem}")
    survey = look(job.graph, written_join, job.context)
    # Pictures of a text compete: a share is one of all of its image tokens.
    counted = options.budget > 1
    kept = min(int(options.budget) * survey.images, survey.rows) if counted else options.kept(survey.rows)
    gone = survey.rows - kept
    if gone <= 0:
        job.nothing(f"{survey.rows} tokens of images")
        return
    write = Writer(job.graph, value.producer)
    among = ones_at(write, job.analysis, join)
    score = last_row_score(write, job.analysis, join.target, before)
    budget = {"count": kept} if counted else {"ratio": options.budget}
    flags = write("top_tokens", [score, None, among], **budget)[0]
    job.cut(join.target, value, flags, write, gone)
    job.outcome.notes.append(
        f"scores are each sample's last token's attention in %{before.name}; from block {layer} on {gone} of "
        f"{join.target.length} tokens are gone"
    )
