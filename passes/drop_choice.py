"""Choosing among the tokens of a tower: a policy's scores, the budget, and what kept tokens take in of the others."""

from __future__ import annotations

from dataclasses import dataclass

from .analysis.joins import Join
from .analysis.spaces import Ends
from .carry import Carrier
from .cut_maps import WHOLE
from .drop_features import MERGING, dominant, last_stream, merged
from .drop_job import Job
from .drop_policies import Tower, best_tokens, rank_rows, score_of
from .drop_survey import Survey, tower_of
from .drop_tiles import tile_counts
from .errors import Refused
from .ir.graph import Dim, Graph, Op, Value
from .writer import Writer


@dataclass(frozen=True)
class Chosen:
    """`numbers` [T, N] of the tower's tokens: flags of the kept ones, or scores where several become one before
    they are ranked. `features`, where kept tokens took others in, stand for the tower's for all `readers`."""

    write: Writer
    numbers: Value
    features: Value | None = None
    readers: tuple[tuple[Op, int], ...] = ()

    def part(self, ends: Ends, write: Writer) -> Value:
        """The numbers of an interval of the tower's tokens."""
        if ends == WHOLE:
            return self.numbers
        return write("slice_tokens", [self.numbers], axis=1, start=ends[0], end=-ends[1])[0]

    def put_in(self, graph: Graph) -> None:
        """Let the readers have the merged features."""
        for op, index in self.readers:
            assert self.features is not None
            graph.set_operand(op, index, self.features)


def choose(job: Job, join: Join, tower: Tower, kept: int, pictures: Dim, *, shuffled: bool) -> Chosen:
    """Insert what says which `kept` tokens of each picture stay. `pictures`: in each text; `shuffled`: the tower's
    tokens are ranked later. Raises Refused where the policy does not go with that."""
    options = job.options
    merging = options.policy in MERGING
    if shuffled and (merging or options.tiles > 1):
        raise Refused(
            f"policy={options.policy} merges or shares out the {tower.candidates} tokens of the tower, several "
            "of which become one on their way"
        )
    stream = last_stream(tower, join) if merging else None
    write = Writer.behind(job.graph, [stream, *(a.output for a in tower.attentions)])
    layer = -1 if options.layer is None else options.layer
    score, how = score_of(write, tower, options, kept, layer=layer)
    job.outcome.notes.append(how)
    if shuffled:
        return Chosen(write, score)
    counts = tile_counts(write, tower, options, pictures)
    among = tower.among(write)
    if counts is None and options.adaptive != "no":
        flags = best_tokens(write, score, options, kept, among)
    else:
        budget = {"count": dominant(options, kept)} if counts is None else {}
        shared = options.compat == "reference" and options.tiles == 1
        flags = write("top_tokens", [score, counts, among], shared=shared, **budget)[0]
    if stream is None:
        return Chosen(write, flags)
    readers = tuple(stream.users)
    flags, features = merged(write, tower, options, kept, stream, score, flags, layer)
    return Chosen(write, flags, features, readers)


def carried_flags(job: Job, join: Join, survey: Survey) -> tuple[Chosen, Value, Writer]:
    """Choose as `survey` says, and carry the flags to where the tokens arrive: flags [..., N] of `join.value`
    [..., N, C], -1 for what is no token of a picture, and what inserts behind them."""
    options = job.options
    kept = options.kept(survey.each)
    chosen = choose(job, join, tower_of(job.analysis, join), kept, survey.images, shuffled=survey.shuffled)

    def ranked(numbers: Value, write: Writer) -> Value:
        return rank_rows(write, numbers, survey.each, kept, options)

    write = Writer.behind(job.graph, [join.value], chosen.write.cursor)
    carrier = Carrier(write, job.analysis, join.source, chosen.part, ranked if survey.shuffled else None)
    return chosen, carrier.at(join.value), write
