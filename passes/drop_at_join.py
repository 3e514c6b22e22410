"""Dropping tokens of images where they stand among the tokens of a text, or at a later block of the language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import sympy

from .analysis.joins import Join, find_joins
from .analysis.masks import padding_mask
from .analysis.spaces import Analysis, Ends, TokenSpace, analyse
from .base import NewSignature, Outcome, PassContext
from .carry import Carried, Carrier
from .cut import Cutter
from .cut_maps import WHOLE
from .drop_features import Merged, dominant, last_stream, merge_features
from .drop_policies import Tower, Writer, last_row_score, score_of, valid_tokens
from .drop_tiles import tile_counts
from .errors import Refused
from .ir.graph import Dim, Graph, Op, Value, product

if TYPE_CHECKING:
    from .token_drop import DropOptions


@dataclass
class Survey:
    """What the way from the tower to the text is like. `rows`: image tokens in each text; `images`: pictures in each;
    `each`: tokens of a picture when they are ranked; `shuffled`: several of the tower's become one."""

    rows: int
    images: int
    each: int
    shuffled: bool
    notes: list[str] = field(default_factory=list)


def drop_at_join(
    graph: Graph, analysis: Analysis, join: Join, options: DropOptions, context: PassContext, outcome: Outcome
) -> None:
    """Drop where the image's features are written among the text's embeddings."""
    tower = tower_of(analysis, join)
    survey = look(graph, join, context)
    kept = options.kept(survey.each)
    gone = survey.rows - options.kept_in(survey.each, survey.images)
    if gone <= 0:
        outcome.changed = False
        outcome.notes.append(f"nothing to drop: all {survey.each} tokens of an image are kept")
        return
    if survey.shuffled and (options.policy in ("visionzip", "prumerge") or options.tiles > 1):
        raise Refused(
            f"policy={options.policy} merges or shares out the {tower.candidates} tokens of the tower, several "
            "of which become one on their way to the text"
        )
    behind = [a.output for a in tower.attentions]
    if options.policy in ("visionzip", "prumerge"):
        behind.append(last_stream(tower, join))
    write = Writer(graph, last_of(graph, [*behind]))
    score, how = score_of(write, tower, options, kept, layer=-1 if options.layer is None else options.layer)
    outcome.notes.append(how)
    merged: Merged | None = None
    if not survey.shuffled:
        counts = tile_counts(write, tower, options, survey.images)
        among = tower.among(write)
        budget = {"count": dominant(options, kept)} if counts is None else {}
        shared = options.compat == "reference" and options.tiles == 1
        flags = write("top_tokens", [score, counts, among], shared=shared, **budget)[0]
        merged = merge_features(write, tower, join, options, kept, score, flags)

    def numbers(ends: Ends, carrier: Carrier) -> Value:
        return part(carrier, score if merged is None else merged.flags, ends)

    def ranked(found: Value, carrier: Carrier) -> Value:
        return rank_rows(carrier, found, survey.each, kept)

    carrier = Carrier(graph, analysis, join.source, join.op, numbers, ranked if survey.shuffled else None)
    language = carrier.at(join.value)
    cut(graph, analysis, join.target, join.value, language, carrier.cursor, gone, options, context, outcome)
    if merged is not None:
        merged.put_in(graph)
    outcome.notes.append(
        f"{kept} of {survey.each} tokens of each image are kept: {gone} of {join.target.length} tokens of a text go"
    )


def drop_in_language(
    graph: Graph, analysis: Analysis, join: Join, options: DropOptions, context: PassContext, outcome: Outcome
) -> None:
    """Drop before a block of the language model, by the attention of the last token in the block before (FastV)."""
    blocks = join.target.blocks
    layer = 2 if options.layer is None else options.layer
    layer += len(blocks) if layer < 0 else 0
    if not 1 <= layer < len(blocks):
        raise Refused(f"policy=fastv drops before block 1 to {len(blocks) - 1}, not {layer}")
    value = blocks[layer].skip
    if value is None or value.producer is None:
        raise Refused(f"%{blocks[layer].attention.name}: {blocks[layer].problem}")
    survey = look(graph, join, context)
    if options.budget > 1:
        kept = min(int(options.budget) * survey.images, survey.rows)
    else:
        kept = options.kept(survey.rows)
    budget = {"count": kept} if options.budget > 1 else {"ratio": options.budget}
    gone = survey.rows - kept
    if gone <= 0:
        outcome.changed = False
        outcome.notes.append(f"nothing to drop: all {survey.rows} tokens of images are kept")
        return
    carrier = ones_at(graph, analysis, join, value.producer)
    write = Writer(graph, carrier[1])
    score = last_row_score(write, analysis, join.target, blocks[layer - 1].attention)
    flags = write("top_tokens", [score, None, carrier[0]], **budget)[0]
    cut(graph, analysis, join.target, value, flags, write.cursor, gone, options, context, outcome)
    outcome.notes.append(
        f"scores are each sample's last token's attention in %{blocks[layer - 1].attention.name}; from block {layer} "
        f"on {gone} of {join.target.length} tokens are gone"
    )


def ones_at(graph: Graph, analysis: Analysis, join: Join, cursor: Op) -> tuple[Value, Op | None]:
    """1 for tokens of images and -1 for others, [B, N], behind `cursor`."""
    carrier = Carrier(graph, analysis, join.source, cursor, _ones(tower_of(analysis, join)))
    found = carrier.at(join.value)
    return found, carrier.cursor


def _ones(tower: Tower) -> Callable[[Ends, Carrier], Value]:
    def numbers(ends: Ends, carrier: Carrier) -> Value:
        length = tower.space.length - ends[0] - ends[1]
        write = Writer(carrier.graph, carrier.cursor)
        found = write.expand(np.ones((1, 1), np.float32), "ones", [tower.rows, length])
        carrier.cursor = write.cursor
        return found

    return numbers


def tower_of(analysis: Analysis, join: Join) -> Tower:
    """The space that the join reads, with the attentions that reach it."""
    space = join.source
    layers = [[b.attention] for b in space.blocks] if join.packed is None else join.packed.layers
    layers = [layer for layer in layers if analysis.flow.depends(join.value, layer[0].output)]
    q = layers[0][0].inputs[0]
    assert q is not None and q.shape is not None
    return Tower(analysis, space, q.shape[0], layers, q.shape[0] if join.packed is None else len(layers[0]))


def look(graph: Graph, join: Join, context: PassContext) -> Survey:
    """Carry ones along the way on a copy, to see how many tokens arrive. Raises Refused where that is no number."""
    trial = graph.copy()
    analysis = analyse(trial)
    again = next(j for j in find_joins(analysis) if j.value.name == join.value.name and j.crossing is None)
    tower = tower_of(analysis, again)
    carrier = Carrier(trial, analysis, again.source, again.op, _ones(tower))
    carrier.at(again.value)
    if not carrier.placed:
        raise Refused(f"{join.op.target} (%{join.op.name}) does not say where the tokens of an image go")
    features, numbers, others = carrier.placed[0]
    width = again.value.shape[-1] if again.value.shape is not None else 0
    assert features.shape is not None and again.value.shape is not None
    known = {s for v in trial.inputs for d in v.shape or () if not isinstance(d, int) for s in d.free_symbols}
    elements = _at_most(product(features.shape), known)
    batch: Dim = again.value.shape[0]
    total = _quotient(elements, width)
    if others:
        total = _counted(trial, numbers, context, width)
        if not isinstance(batch, int):
            raise Refused(f"%{features.name} has separators among its tokens, and the batch is symbolic")
    images = _number(_quotient(tower.pictures, batch), f"pictures in each of {batch} texts")
    rows = _number(_quotient(total, batch), f"image tokens in each of {batch} texts")
    if carrier.shuffled:
        shape = carrier.shuffled[0].shape
        assert shape is not None
        each = _number(_quotient(product(shape), tower.pictures), "tokens of an image")
    else:
        each = _number(_quotient(tower.candidates * tower.rows, tower.pictures), "tokens of an image")
        if join.packed is not None:
            raise Refused(
                f"the {tower.candidates} tokens of several pictures in one row reach the text one by one"
            )
    return Survey(rows, images, each, bool(carrier.shuffled))


def _quotient(a: Dim, b: Dim) -> Dim:
    if isinstance(a, int) and isinstance(b, int):
        if b and a % b == 0:
            return a // b
        raise Refused(f"{a} tokens do not spread evenly over {b} texts")
    found: Any = sympy.simplify(sympy.sympify(a) / sympy.sympify(b))
    return int(found) if found.is_Integer else found


def _at_most(length: Dim, known: set[sympy.Basic]) -> Dim:
    """A length of which a slice took what an input says: what it can take at most."""
    if isinstance(length, int):
        return length
    found: Any = length
    for least in length.atoms(sympy.Min):
        sure = [arg for arg in least.args if arg.free_symbols <= known]
        if len(sure) == 1:
            found = found.subs(least, sure[0])
    return int(found) if found.is_Integer else found


def _number(found: Dim, what: str) -> int:
    if isinstance(found, int) or getattr(found, "is_Integer", False):
        return int(found)
    raise Refused(f"the number of {what} is symbolic, {found}: how many tokens go must be a number")


def _counted(trial: Graph, numbers: Carried, context: PassContext, width: Dim) -> int:
    """How many rows are tokens of the image, by running that part of the graph."""
    feeds: dict[Value, np.ndarray] = {}
    examples = context.example_inputs
    for index, value in enumerate(trial.inputs):
        if examples is not None:
            given = examples[index]
            feeds[value] = given.detach().cpu().numpy() if hasattr(given, "detach") else np.asarray(given)
        elif value.shape is not None and all(isinstance(d, int) for d in value.shape):
            feeds[value] = np.zeros([int(d) for d in value.shape], value.dtype)
    found = trial.evaluate([numbers.value], feeds)[0]
    return int((found >= 0).sum()) // (int(width) if numbers.wide else 1)


def part(carrier: Carrier, numbers: Value, ends: Ends) -> Value:
    """The numbers of an interval of the tower's tokens."""
    if ends == WHOLE:
        return numbers
    write = Writer(carrier.graph, carrier.cursor)
    found = write("slice_tokens", [numbers], axis=1, start=ends[0], end=-ends[1])[0]
    carrier.cursor = write.cursor
    return found


def rank_rows(carrier: Carrier, numbers: Value, each: int, kept: int) -> Value:
    """Flags of the best `kept` of every `each` rows, in the shape of `numbers`."""
    assert numbers.shape is not None
    graph = carrier.graph
    flat = graph.insert_plain(
        "reshape", [numbers], {"shape": [_quotient(product(numbers.shape), each), each]}, after=carrier.cursor
    )
    flags = graph.insert("top_tokens", [flat], {"count": kept}, after=flat.producer)[0]
    found = graph.insert_plain("reshape", [flags], {"shape": list(numbers.shape)}, after=flags.producer)
    carrier.cursor = found.producer
    return found


def cut(
    graph: Graph,
    analysis: Analysis,
    space: TokenSpace,
    value: Value,
    flags: Value,
    cursor: Op | None,
    gone: int,
    options: DropOptions,
    context: PassContext,
    outcome: Outcome,
) -> None:
    """Leave `gone` tokens of `space` out from `value` on, by `flags` [B, N]."""
    mask = padding_mask(analysis, space)
    cutter = Cutter(
        graph,
        analysis,
        space,
        mismatch="lift",
        proportional=True,
        renumber=options.positions == "compact",
        short_outputs=options.outputs == "kept",
    )
    crossing = cutter.crossing

    write = Writer(graph, last_of(graph, [flags, value], cursor))
    valid = None if mask is None else valid_tokens(write, analysis, space, mask)
    made = write("drop_tokens", [flags, valid], count=gone, prefix=space.prefix, suffix=space.suffix)
    assert write.cursor is not None

    def at(_: Op) -> None:
        cutter.drop_level(value, crossing.level(value), made)

    cutter.walk({write.cursor: at})
    level, examples = crossing.levels[-1], context.example_inputs
    if context.want_map and "token_map" not in outcome.extra:
        graph.add_output(crossing.composed_slot(level, WHOLE), "elision_token_map")
        outcome.extra["token_map"] = {"prefix": space.prefix, "suffix": space.suffix}
    if options.outputs == "kept" and level.keep is not None:
        graph.add_output(level.keep, "elision_kept")
        outcome.signature = NewSignature(after=None if examples is None else list(examples))
    for what, count in crossing.statistics.items():
        outcome.statistics[what] = count


def last_of(graph: Graph, values: list[Value | None], *ops: Op | None) -> Op | None:
    """The last op among the producers of `values` and `ops`."""
    found = [v.producer for v in values if v is not None and v.producer is not None] + [o for o in ops if o]
    places = {op: index for index, op in enumerate(graph.ops)}
    return max(found, key=places.__getitem__, default=None)
