"""Dropping tokens of images where they stand among the tokens of a text."""

from __future__ import annotations

from .analysis.joins import Join, written_join
from .drop_choice import carried_flags
from .drop_job import Job
from .drop_survey import look


def drop_at_join(job: Job, join: Join) -> None:
    """Drop where the image's features are written among the text's embeddings."""
    options = job.options
    survey = look(job.graph, written_join, job.context)
    gone = survey.rows - options.kept_in(survey.each, survey.images)
    if gone <= 0:
        job.nothing(f"{survey.each} tokens of an image")
        return
    chosen, flags, write = carried_flags(job, join, survey)
    job.cut(join.target, join.value, flags, write, gone)
    chosen.put_in(job.graph)
    job.outcome.notes.append(
        f"{options.kept(survey.each)} of {survey.each} tokens of each image are kept: {gone} of "
        f"{join.target.length} tokens of a text go"
    )
