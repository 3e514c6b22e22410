"""Dropping tokens of images where they stand among the tokens of a text."""

from __future__ import annotations

from .analysis.joins import Join, written_join
from .carry import Carrier
from .drop_choice import choose
from .drop_job import Job
from .drop_policies import rank_rows
from .drop_survey import look, tower_of
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
        return rank_rows(write, numbers, survey.each, kept, options)

    write = Writer.behind(job.graph, [join.value], chosen.write.cursor)
    carrier = Carrier(write, job.analysis, join.source, chosen.part, ranked if survey.shuffled else None)
    job.cut(join.target, join.value, carrier.at(join.value), write, gone)
    chosen.put_in(job.graph)
    job.outcome.notes.append(
        f"{kept} of {survey.each} tokens of each image are kept: {gone} of {join.target.length} tokens of a text go"
    )
