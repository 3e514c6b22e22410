"""Joins: where the tokens of one space flow into another, as image features go among the tokens of a text.

A join is found by data flow alone: the first value over the tokens of the one space that depends on the stream of the
other. How the graph writes it there (masked_scatter, index_put, where, ScatterND, a concatenation) does not matter.
Attention from the one space to the other is a join too, and is told apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.graph import Op, Value
from .packed import Packed, packed_spaces
from .spaces import Analysis, TokenSpace


@dataclass(frozen=True, eq=False)
class Join:
    """Tokens of `source` flow into `target`: `value` is the first value over the target's tokens that holds them.

    `crossing` is set when they do so by attention (then `value` is its result); `packed` when the source is an axis of
    several pictures that attentions share out."""

    source: TokenSpace
    target: TokenSpace
    value: Value
    crossing: Op | None = None
    packed: Packed | None = None

    @property
    def op(self) -> Op:
        assert self.value.producer is not None
        return self.value.producer

    def sentence(self, analysis: Analysis) -> str:
        """What flows where, in words."""
        how = "are read by" if self.crossing is not None else "are written among the tokens by"
        return (
            f"the {self.source.length} tokens of {self._name(analysis, self.source)} {how} {self.op.target} "
            f"(%{self.op.name}) of {self._name(analysis, self.target)}"
        )

    def _name(self, analysis: Analysis, space: TokenSpace) -> str:
        if self.packed is not None and space is self.packed.space:
            return f"{len(self.packed.layers[0])} pictures in a row"
        return f"space {analysis.spaces.index(space)}"


def find_joins(analysis: Analysis) -> list[Join]:
    """All joins between spaces that have self-attentions, in the order of the graph.

    A space that reaches another only by way of a third is not joined to it."""
    found = []
    packed = {one.space: one for one in packed_spaces(analysis)}
    parts = {part for one in packed.values() for part in one.parts}
    spaces = [*packed, *(space for space in analysis.spaces if space.blocks and space not in parts)]
    for target in spaces:
        feeding = [s for s in spaces if s is not target and _reaches(analysis, s, target)]
        direct = [s for s in feeding if not any(o is not s and _reaches(analysis, s, o) for o in feeding)]
        for source in direct:
            value = _arrival(analysis, source, target)
            if value is not None and value.producer is not None:
                crossing = value.producer if value.producer in target.reads else None
                found.append(Join(source, target, value, crossing, packed.get(source)))
    position = analysis.flow.position
    return sorted(found, key=lambda join: position[join.op])


def written_join(analysis: Analysis) -> Join | None:
    """The last place where tokens are written among others', not read by attention."""
    written = [join for join in find_joins(analysis) if join.crossing is None]
    return written[-1] if written else None


def _last(analysis: Analysis, space: TokenSpace) -> Value:
    """The result of the last attention that these tokens ask."""
    asked = [*(block.attention for block in space.blocks), *space.reads]
    return max(asked, key=analysis.flow.position.__getitem__).output


def _reaches(analysis: Analysis, source: TokenSpace, target: TokenSpace) -> bool:
    """Does the target's last attention depend on any of the source's?"""
    last = _last(analysis, target)
    return any(analysis.flow.depends(last, block.attention.output) for block in source.blocks)


def _arrival(analysis: Analysis, source: TokenSpace, target: TokenSpace) -> Value | None:
    """The first value over the target's tokens that holds the source's."""
    return first_over(analysis, target, source.blocks[0].attention.output, source)


def first_over(
    analysis: Analysis, target: TokenSpace, first: Value, source: TokenSpace | None = None
) -> Value | None:
    """The first value over the target's tokens, and not over the source's, that `first` flows into."""
    last = _last(analysis, target)
    for op in analysis.graph.ops:
        for out in op.outputs:
            if not analysis.flow.depends(out, first) or not analysis.flow.depends(last, out):
                continue
            if analysis.token_axes(target, out) and not (source and analysis.token_axes(source, out)):
                return out
    return None
