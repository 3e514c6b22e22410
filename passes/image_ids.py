"""image-ids: every token of an image gets an id of its own, and the picture is no input of the text any more.

A vision-language model finds its image tokens by one id, the placeholder, and writes the n-th row of the features over
the n-th of them: a row depends on how many there were before it. With ids V, V + 1, ... for rows 0, 1, ... of a table
that is given at run time, rows are independent of each other, so that a prompt can be read in pieces, beside others,
with the tokens of pictures that were left out left out, and the text has a key/value cache (pass `incremental`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .analysis.flow import reads_shapes
from .analysis.joins import Join, written_join
from .analysis.residual import token_ids
from .analysis.spaces import Analysis, analyse
from .base import NewSignature, Outcome, Pass, PassContext, as_array, numpy_dtype, register
from .errors import ElisionError, NothingMatched, Refused
from .extract import behind, part_that_makes
from .ir.graph import Dim, Graph, Value, static
from .overlay import find_lookups, look_up_own
from .writer import Writer

ROWS = "image_rows"
FEATURES = "features"


@dataclass(frozen=True)
class ImageIdsOptions:
    """ids: the name of the input with the token ids (by default decoder_input_ids, else input_ids)."""

    ids: str = ""


@dataclass(frozen=True, eq=False)
class _Written:
    """The rows of `features` [..., C] are written, in order, over those of `embeddings` [B, N, C] whose token is the
    placeholder, which makes `join.value`."""

    join: Join
    embeddings: Value
    features: Value
    placeholder: int

    @property
    def rows(self) -> tuple[int, int]:
        shape = static(self.features.shape)
        assert shape is not None
        return int(np.prod(shape[:-1])), shape[-1]


@register
class ImageIds(Pass):
    """Reads id V + n as row n of a new input `image_rows` [R, C], in the place of writing features over placeholders.

    `Outcome.extra["vision"]` is the graph that computes those rows, as its output `features`, from the inputs that
    only they need; `extra["images"]` says what ids mean: `placeholder`, `first` (V, the rows of the model's own table)
    and `rows` (how many the example's pictures have)."""

    name = "image-ids"
    exact = True
    summary = "an id for every image token, whose row is given at run time"
    Options = ImageIdsOptions

    def run(self, graph: Graph, context: PassContext) -> Outcome:
        """Raises NothingMatched where no features of images are written among the tokens of a text, Refused where
        that is not by a placeholder."""
        ids = token_ids(graph, self.options.ids)
        analysis = analyse(graph)
        join = written_join(analysis)
        if join is None:
            raise NothingMatched(
                f"image-ids found no place where tokens of an image are written among those of %{ids.name}"
            )
        found = find_lookups(graph, ids)
        first = min(lookup.count for lookup in found)
        written = _written(graph, analysis, ids, join, first)
        _check_readers(graph, ids, join)
        count, width = written.rows
        outcome = Outcome(changed=True)
        outcome.extra["images"] = {"placeholder": written.placeholder, "first": first, "rows": count}
        outcome.extra["vision"] = part_that_makes(graph, [(FEATURES, written.features)])
        outcome.signature = self._signature(graph, written, ids, first, context)
        rows = graph.add_input(ROWS, written.features.dtype, [ROWS, width])
        for lookup in found:
            look_up_own(graph, lookup, first)
        write = Writer.behind(graph, [written.embeddings])
        graph.replace_uses(join.value, write("overlay_rows", [written.embeddings, ids, rows], first=first)[0])
        graph.remove_dead()
        needed = behind(graph.outputs)
        inputs = [
            (name, v) for name, v in zip(graph.input_names, graph.inputs) if v in needed and v is not rows
        ]
        graph.set_signature([*inputs, (ROWS, rows)], list(zip(graph.output_names, graph.outputs)))
        outcome.notes.append(
            f"ids from {first} on are rows of {ROWS}; {count} of them were written over the id {written.placeholder}"
        )
        return outcome

    def _signature(
        self, graph: Graph, written: _Written, ids: Value, first: int, context: PassContext
    ) -> NewSignature:
        """The example, and what it is in ids of rows; nothing where it does not run as it is."""
        arrays = {v: as_array(item) for v, item in zip(graph.inputs, context.example_inputs or ())}
        whole = len(arrays) == len(graph.inputs) and all(array is not None for array in arrays.values())
        try:
            features = graph.evaluate([written.features], arrays)[0] if whole else None
        except ElisionError:
            features = None
        if features is None:
            return NewSignature()
        own = arrays[ids].copy()
        places = own == written.placeholder
        own[places] = first + np.arange(places.sum())
        gone = behind([written.features])
        after = [own if v is ids else arrays[v] for v in graph.inputs if v is ids or v not in gone]
        rows = features.reshape(-1, features.shape[-1])
        return NewSignature(list(arrays.values()), [*after, rows], list(range(len(graph.outputs))))


def _check_readers(graph: Graph, ids: Value, join: Join) -> None:
    """Whatever else reads the ids would see other numbers. Raises Refused where it reaches an output by another way
    than the join."""
    for op, _ in ids.users:
        if reads_shapes(op):
            continue
        reached = set(op.outputs) - {join.value}
        for later in graph.ops[graph.ops.index(op) + 1 :]:
            if not reads_shapes(later) and any(v in reached for v in later.inputs):
                reached |= set(later.outputs) - {join.value}
        for value in graph.outputs:
            if value in reached:
                raise Refused(
                    f"{op.target} (%{op.name}) reads %{ids.name} for more than where the features of images go: "
                    f"%{value.name} depends on it"
                )


# ---- what is written where ------------------------------------------------------------------------------
def _written(graph: Graph, analysis: Analysis, ids: Value, join: Join, first: int) -> _Written:
    """Raises Refused where the join is not a writing over placeholders: the part of the graph that makes it is run."""
    features, embeddings = _operands(graph, analysis, ids, join)
    width = embeddings.shape[-1] if embeddings.shape else None
    while features.producer is not None and features.producer.kind == "reshape" and features.shape:
        source = features.producer.inputs[0]
        if features.shape[-1] == width or source is None:
            break
        features = source  # written number by number
    shape = static(features.shape)
    if shape is None or len(shape) < 2 or shape[-1] != width:
        raise Refused(f"%{features.name} {features!r} are not a known number of rows")
    tried = _compared_with(graph, analysis, ids, join)
    for placeholder in tried:
        found = _Written(join, embeddings, features, placeholder)
        if _holds(graph, ids, found, first):
            return found
    what = f"one of the ids {', '.join(map(str, tried))}" if tried else "an id that marks them"
    raise Refused(
        f"{join.op.target} (%{join.op.name}) does not write the rows of %{features.name} over {what}, in their order"
    )


def _operands(graph: Graph, analysis: Analysis, ids: Value, join: Join) -> tuple[Value, Value]:
    """The features, which know nothing of the token ids, and the embeddings, which know nothing of the pictures."""
    told, source = _told_by(graph, ids), join.source.blocks[0].attention.output
    pictured = {v for v in graph.values() if analysis.flow.depends(v, source)}
    features: dict[Value, None] = {}
    embeddings: dict[Value, None] = {}
    for op in graph.ops:
        made = [out for out in op.outputs if analysis.flow.depends(join.value, out)]
        if not made or op.kind == "size":
            continue
        mixed = any(out in told and out in pictured for out in made)
        for value in op.inputs:
            if value is None or not mixed:
                continue
            if value in pictured and value not in told:
                features[value] = None
            elif value in told and value not in pictured and _alike(value, join.value):
                embeddings[value] = None
    for found, what in ((features, "features of images"), (embeddings, "embeddings of a text")):
        if len(found) != 1:
            names = ", ".join(f"%{value.name}" for value in found) or "nothing"
            raise Refused(
                f"{join.op.target} (%{join.op.name}) is made of {names}, where one value with the {what} is wanted"
            )
    return next(iter(features)), next(iter(embeddings))


def _alike(a: Value, b: Value) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def _told_by(graph: Graph, ids: Value) -> set[Value]:
    """What the ids themselves, not only their number, decide; lengths that they decide too."""
    found, lengths = {ids}, {s for v in graph.inputs for d in v.shape or () for s in _symbols(d)}
    for op in graph.ops:
        measured = op.kind == "size" and any(
            v in found and not {s for d in v.shape or () for s in _symbols(d)} <= lengths
            for v in op.inputs
            if v
        )
        read = () if reads_shapes(op) else (*op.inputs, *op.shape_inputs)
        if measured or any(v in found for v in read):
            found |= set(op.outputs)
    return found


def _symbols(dim: Dim) -> set[Any]:
    return set() if isinstance(dim, int) else dim.free_symbols


def _compared_with(graph: Graph, analysis: Analysis, ids: Value, join: Join) -> list[int]:
    """Numbers that ids are compared with on the way to the join."""
    found: dict[int, None] = {}
    told = _told_by(graph, ids)
    for op in graph.ops:
        fn = str(op.attrs.get("fn") or op.target).lower()
        if not fn.endswith(("eq", "equal", "ne")) or not analysis.flow.depends(join.value, op.output):
            continue
        if not any(v in told and not v.dtype.startswith("float") for v in op.inputs if v is not None):
            continue
        numbers = [op.attrs.get("other")]
        for value in op.inputs:
            data = None if value is None else graph.constant_value(value)
            numbers.append(data.item() if data is not None and data.size == 1 else None)
        found |= {int(n): None for n in numbers if isinstance(n, int | float) and n == int(n)}
    return list(found)


def _holds(graph: Graph, ids: Value, written: _Written, first: int) -> bool:
    """Whether the join is what `_Written` says, by running the part of the graph between its operands and its value
    over random numbers, with the placeholders in several places."""
    count, width = written.rows
    dtype = numpy_dtype(written.features.dtype)
    random = np.random.default_rng(0)
    others = np.setdiff1d(np.arange(first), [written.placeholder])
    for more in (0, 5, count + 3):
        length = count + more
        text = random.choice(others, length)
        places = np.sort(random.choice(length, count, replace=False))
        text[places] = written.placeholder
        embeddings = random.standard_normal((1, length, width)).astype(dtype)
        features = random.standard_normal((count, width)).astype(dtype)
        expected = embeddings.copy()
        expected[0, places] = features
        feeds = {
            ids: text[None].astype(ids.dtype),
            written.embeddings: embeddings,
            written.features: features.reshape(static(written.features.shape) or ()),
        }
        try:
            (found,) = graph.evaluate([written.join.value], feeds)
        except ElisionError:
            return False
        if found.shape != expected.shape or not np.array_equal(found, expected):
            return False
    return True
