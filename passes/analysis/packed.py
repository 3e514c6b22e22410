"""Packed towers: pictures of several sizes in one sequence, each attended to for itself.

Where the tokens of all pictures stand along one axis and every attention takes a part of it, the parts are the token
spaces and none of them is the axis of the stream. Here they are put together again: one space along the whole axis,
and for every layer the attentions that share it out. Layers that attend within windows have more parts than others."""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.graph import Op
from .axes import AxisType
from .spaces import Analysis, Block, TokenSpace


@dataclass(frozen=True, eq=False)
class Packed:
    """`space` is the whole axis, `parts` the spaces it is made of; `layers` are the attentions of each layer that has
    the fewest parts, in the order of the axis."""

    space: TokenSpace
    parts: list[TokenSpace]
    layers: list[list[Op]]


def packed_spaces(analysis: Analysis) -> list[Packed]:
    """The axes that attentions share out among them."""
    members: dict[AxisType, dict[TokenSpace, int]] = {}
    for space in analysis.spaces:
        if not space.blocks:
            continue
        for whole, (start, _) in analysis.axes.wholes_of(space.key).items():
            if start[0] == start[1]:
                members.setdefault(whole, {})[space] = start[0]
    found = []
    for whole, parts in members.items():
        length = analysis.axes.lengths_of(whole)
        total = 1
        for size in length:
            total *= size[0]
        layers = _layers(analysis, parts, total)
        if layers and len(parts) > 1 and all(size[0] == size[1] for size in length):
            found.append(_together(analysis, whole, total, list(parts), layers))
    return found


def _layers(analysis: Analysis, parts: dict[TokenSpace, int], total: int) -> list[list[Op]]:
    """Attentions that cover the axis one after the other; only the layers with the fewest."""
    starts = {block.attention: parts[space] for space in parts for block in space.blocks}
    layers: list[list[Op]] = []
    now: list[Op] = []
    covered = 0
    for op in sorted(starts, key=analysis.flow.position.__getitem__):
        q = op.inputs[0]
        assert q is not None and q.shape is not None
        if starts[op] != covered or not isinstance(q.shape[-2], int):
            return []
        now.append(op)
        covered += q.shape[-2]
        if covered == total:
            layers.append(now)
            now, covered = [], 0
    fewest = min((len(layer) for layer in layers), default=0)
    return [] if now else [layer for layer in layers if len(layer) == fewest]


def _together(
    analysis: Analysis, whole: AxisType, total: int, parts: list[TokenSpace], layers: list[list[Op]]
) -> Packed:
    space = TokenSpace(whole, total, ())
    space.blocks = [Block(op) for layer in layers for op in layer]
    streams = [part.stream for part in parts if part.stream is not None]
    space.stream = min(
        streams, key=lambda v: analysis.flow.position[v.producer] if v.producer else -1, default=None
    )
    return Packed(space, parts, layers)
