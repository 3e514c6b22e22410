"""Following ones along the way of an image's features, on a copy of the graph: how many tokens arrive, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy

from .analysis.joins import Join
from .analysis.spaces import Analysis, Ends, TokenSpace, analyse
from .base import PassContext, as_array
from .carry import OUTSIDE, Carrier
from .drop_policies import Tower, quotient
from .errors import Refused
from .ir.graph import Dim, Graph, Value, product, static
from .writer import Writer


@dataclass(frozen=True)
class Survey:
    """What the way from the tower to the text is like. `rows`: image tokens in each text, class tokens not counted;
    `images`: pictures in each; `each`: tokens of a picture when they are ranked; `shuffled`: several of the tower's
    become one."""

    rows: int
    images: int
    each: int
    shuffled: bool


def tower_of(analysis: Analysis, join: Join) -> Tower:
    """The space that the join reads, with the attentions that reach it."""
    space = join.source
    layers = [[b.attention] for b in space.blocks] if join.packed is None else join.packed.layers
    layers = [layer for layer in layers if analysis.flow.depends(join.value, layer[0].output)]
    q = layers[0][0].inputs[0]
    assert q is not None and q.shape is not None
    return Tower(analysis, space, q.shape[0], layers, q.shape[0] if join.packed is None else len(layers[0]))


def ones_at(write: Writer, analysis: Analysis, join: Join) -> Value:
    """1 for tokens of images and -1 for others, class tokens too, [B, N]."""
    return _ones(write, analysis, join).at(join.value)


def _ones(write: Writer, analysis: Analysis, join: Join) -> Carrier:
    tower = tower_of(analysis, join)

    def numbers(ends: Ends, write: Writer) -> Value:
        length = tower.space.length - ends[0] - ends[1]
        first, last = _protected(tower.space, ends)
        line = np.ones((1, length if isinstance(length, int) and first + last else 1), np.float32)
        line[0, :first] = line[0, line.shape[1] - last :] = OUTSIDE
        return write.filled(line, "ones", [tower.rows, length])

    return Carrier(write, analysis, join.source, numbers)


def _protected(space: TokenSpace, ends: Ends) -> tuple[int, int]:
    """How many class tokens and the like an interval of the tower's tokens begins and ends with."""
    return max(space.prefix - ends[0], 0), max(space.suffix - ends[1], 0)


def followed(graph: Graph, find: Callable[[Analysis], Join | None]) -> tuple[Graph, Join, Carrier]:
    """A copy of the graph, its join, and what carried ones there. Raises Refused where they cannot be followed."""
    trial = graph.copy()
    analysis = analyse(trial)
    join = find(analysis)
    assert join is not None
    carrier = _ones(Writer(trial, join.op), analysis, join)
    carrier.at(join.value)
    return trial, join, carrier


def look(graph: Graph, find: Callable[[Analysis], Join | None], context: PassContext) -> Survey:
    """Raises Refused where the number of tokens that arrive is no constant."""
    trial, join, carrier = followed(graph, find)
    tower = tower_of(carrier.analysis, join)
    if not carrier.placed:
        raise Refused(f"{join.op.target} (%{join.op.name}) does not say where the tokens of an image go")
    features, numbers, others = carrier.placed[0]
    assert features.shape is not None and join.value.shape is not None
    batch, width = join.value.shape[0], join.value.shape[-1]
    if others:
        if not isinstance(batch, int):
            raise Refused(f"%{features.name} has separators among its tokens, and the batch is symbolic")
        total: Dim = _counted(trial, numbers.value, context) // (int(width) if numbers.wide else 1)
    else:
        known = {
            s for v in trial.inputs for d in v.shape or () if not isinstance(d, int) for s in d.free_symbols
        }
        total = quotient(_at_most(product(features.shape), known), width)
        if not carrier.shuffled:
            total = total - max(sum(_protected(tower.space, ends)) for ends in carrier.begun) * tower.pictures
    images = _number(quotient(tower.pictures, batch), f"pictures in each of {batch} texts")
    rows = _number(quotient(total, batch), f"image tokens in each of {batch} texts")
    return Survey(rows, images, _ranked(tower, carrier, join), bool(carrier.shuffled))


def look_at_output(graph: Graph, find: Callable[[Analysis], Join | None], context: PassContext) -> Survey:
    """The same of a graph that puts the features out, with others among them: `rows` and `images` are those of the
    whole output. Raises Refused where their number is no constant."""
    trial, join, carrier = followed(graph, find)
    tower = tower_of(carrier.analysis, join)
    images = _number(tower.pictures, f"pictures in %{join.value.name}")
    if static(join.value.shape) is None:
        raise Refused(f"%{join.value.name} has separators among its tokens, and their number is symbolic")
    rows = _counted(trial, carrier.at(join.value), context)
    return Survey(rows, images, _ranked(tower, carrier, join), bool(carrier.shuffled))


def _ranked(tower: Tower, carrier: Carrier, join: Join) -> int:
    """How many tokens a picture has when they are ranked."""
    ranked = tower.candidates * tower.rows
    if carrier.shuffled:
        ranked = product(carrier.shuffled[0].shape or ())
    elif join.packed is not None:
        raise Refused(
            f"the {tower.candidates} tokens of several pictures in one row reach the text one by one"
        )
    return _number(quotient(ranked, tower.pictures), "tokens of an image")


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
    if isinstance(found, int):
        return found
    raise Refused(f"the number of {what} is symbolic, {found}: how many tokens go must be a number")


def _counted(trial: Graph, numbers: Value, context: PassContext) -> int:
    """How many of the numbers are those of tokens of the image, by running that part of the graph."""
    given = [as_array(item) for item in context.example_inputs or ()] or [None] * len(trial.inputs)
    feeds = {}
    for value, array in zip(trial.inputs, given, strict=True):
        shape = static(value.shape)
        if array is None and shape is not None:
            array = np.zeros(shape, value.dtype)
        if array is not None:
            feeds[value] = array
    return int((trial.evaluate([numbers], feeds)[0] >= 0).sum())
