"""`explain`: what the analyses found in a graph, for people and as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..ir.graph import Graph, Op, Value
from .flow import is_float
from .joins import find_joins
from .masks import causal_because, padding_mask
from .spaces import Analysis, TokenSpace


@dataclass
class SpaceFacts:
    """One token space in words and numbers; `length` is text where it is symbolic."""

    length: int | str
    born: str
    self_attentions: list[str]
    cross_attentions: list[str]
    blocks_with_residual: int
    problems: list[str]
    prefix: int
    suffix: int
    protected_because: list[str]
    padding_mask: str | None
    causal: str
    pairwise: list[str]
    positions: list[str]
    ends: list[str]


@dataclass
class Explanation:
    """What `explain` found. `passes`: for every known pass, sentences on what it would do here or why it would not."""

    host: str
    operations: int
    kinds: dict[str, int]
    unknown: list[str]
    inputs: list[str]
    outputs: list[str]
    spaces: list[SpaceFacts] = field(default_factory=list)
    joins: list[str] = field(default_factory=list)
    passes: dict[str, list[str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, numbers and texts."""
        plain = dict(vars(self))
        plain["spaces"] = [dict(vars(space)) for space in self.spaces]
        return plain

    def lines(self) -> list[str]:
        """The same as text, one fact a line, indented by what it belongs to."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        lines = [f"{self.operations} operations ({self.host}): {kinds}"]
        lines += [f"  unknown to the analyses: {', '.join(self.unknown)}"] if self.unknown else []
        lines += [f"input  {text}" for text in self.inputs] + [f"output {text}" for text in self.outputs]
        if not self.spaces:
            lines.append("no token space: no attention was found")
        for number, space in enumerate(self.spaces):
            lines += _space_lines(number, space)
        lines += [f"join: {sentence}" for sentence in self.joins]
        for name, sentences in self.passes.items():
            lines += [f"{name}: {sentence}" for sentence in sentences]
        return lines


def _space_lines(number: int, space: SpaceFacts) -> list[str]:
    lines = [f"token space {number}: {space.length} tokens, born at {space.born}"]
    count = len(space.self_attentions)
    if count:
        shown = ", ".join(space.self_attentions[:3]) + (", ..." if count > 3 else "")
        lines.append(
            f"  {count} self-attentions ({shown}), {space.blocks_with_residual} in a residual stream"
        )
    if space.cross_attentions:
        lines.append(
            f"  {len(space.cross_attentions)} cross-attentions ({', '.join(space.cross_attentions[:3])})"
        )
    lines += [f"  {problem}" for problem in space.problems]
    protected = [f"first {space.prefix}"] * bool(space.prefix) + [f"last {space.suffix}"] * bool(space.suffix)
    if protected:
        lines.append(f"  protected: the {' and the '.join(protected)}: {'; '.join(space.protected_because)}")
    lines += [f"  padding: mask {space.padding_mask}"] if space.padding_mask else []
    lines += [f"  causal: {space.causal}"] if space.causal else []
    lines += [f"  pairwise biases and masks: {_few(space.pairwise)}"] if space.pairwise else []
    lines += [f"  position-like values: {_few(space.positions)}"] if space.positions else []
    return lines + [f"  ends: {sentence}" for sentence in space.ends]


def _few(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def explain(graph: Graph) -> Explanation:
    """Token spaces, attentions, protected tokens, masks, positions, ends, and what each known pass makes of them."""
    from ..base import known_passes

    analysis = Analysis(graph)
    kinds = Counter(op.kind for op in graph.ops)
    found = Explanation(
        host=graph.host,
        operations=len(graph.ops),
        kinds=dict(kinds.most_common()),
        unknown=sorted({op.target for op in graph.ops_of("unknown")}),
        inputs=[repr(v) for v in graph.inputs],
        outputs=[repr(v) for v in graph.outputs],
        spaces=[_facts(analysis, space) for space in analysis.spaces],
        joins=[join.sentence(analysis) for join in find_joins(analysis)],
    )
    for name, kind in known_passes().items():
        applicability = getattr(kind, "applicability", None)
        if applicability is not None:
            found.passes[name] = applicability(analysis)
    return found


def _facts(analysis: Analysis, space: TokenSpace) -> SpaceFacts:
    mask = padding_mask(analysis, space) if space.blocks else None
    causal = next((c for c in (causal_because(analysis, b.attention) for b in space.blocks) if c), "")
    pairwise, positions = _side_values(analysis, space)
    return SpaceFacts(
        length=space.length if isinstance(space.length, int) else str(space.length),
        born="an input" if space.birth is None else f"{space.birth.target} (%{space.birth.name})",
        self_attentions=[_name(block.attention) for block in space.blocks],
        cross_attentions=[_name(op) for op in space.cross],
        blocks_with_residual=sum(block.add is not None for block in space.blocks),
        problems=[f"%{b.attention.name}: {b.problem}" for b in space.blocks if b.problem],
        prefix=space.prefix,
        suffix=space.suffix,
        protected_because=list(space.protected_because),
        padding_mask=None if mask is None else f"%{mask.name}",
        causal=causal,
        pairwise=pairwise,
        positions=positions,
        ends=list(space.ends),
    )


def _name(op: Op) -> str:
    return f"%{op.name}"


def _side_values(analysis: Analysis, space: TokenSpace) -> tuple[list[str], list[str]]:
    """Values that meet the tokens' features without being features: pairwise ones, and rows by position."""
    pairwise: dict[Value, None] = {}
    positions: dict[Value, None] = {}
    for op in analysis.graph.ops:
        operands = [v for v in op.inputs if v is not None]
        content = [v for v in operands if analysis.is_content(space, v) and analysis.token_axes(space, v)]
        if not content or op.kind not in ("attention", "elementwise", "elision"):
            continue
        for value in operands:
            if analysis.is_content(space, value):
                continue
            count = len(analysis.token_axes(space, value))
            if count == 2:
                pairwise[value] = None
            elif count == 1 and is_float(value):
                positions[value] = None
    return [f"%{v.name}" for v in pairwise], [f"%{v.name}" for v in positions]
