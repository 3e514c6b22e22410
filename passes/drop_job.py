"""What every way of dropping tokens works with, and the cut that all of them end in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .analysis.spaces import Analysis, TokenSpace
from .base import Outcome, PassContext, same_examples
from .cut import Cutter
from .cut_maps import WHOLE
from .drop_policies import valid_tokens
from .ir.graph import Graph, Op, Value, static
from .writer import Writer

if TYPE_CHECKING:
    from .token_drop import DropOptions


@dataclass(frozen=True)
class Job:
    """A graph in which tokens are to be dropped, and where to say what was done."""

    graph: Graph
    analysis: Analysis
    options: DropOptions
    context: PassContext
    outcome: Outcome

    def nothing(self, tokens: str) -> None:
        """All `tokens` are kept: the graph is as it was."""
        self.outcome.changed = False
        self.outcome.notes.append(f"nothing to drop: all {tokens} are kept")

    def put_out(self, keep: Value) -> None:
        """Outputs have the kept tokens only: put out which they are, too."""
        self.graph.add_output(keep, "elision_kept")
        graph = self.graph
        if self.outcome.signature is not None:
            return
        signature = same_examples(self.context, len(graph.outputs))
        # Rows that were left out have no counterpart; an output without any is compared as ever.
        signature.expected = lambda found: [a if _fits(a, v) else None for a, v in zip(found, graph.outputs)]
        self.outcome.signature = signature

    def cut(self, space: TokenSpace, value: Value, flags: Value, write: Writer, gone: int) -> None:
        """Leave `gone` tokens of `space` out from `value` on, by `flags` [B, N]; `write` has made them."""
        graph, options, outcome = self.graph, self.options, self.outcome
        write = Writer.behind(graph, [flags, value], write.cursor)
        valid = valid_tokens(write, self.analysis, space)
        ends = {"prefix": space.prefix, "suffix": space.suffix}
        made = write("drop_tokens", [flags, valid], count=gone, **ends)
        cutter = Cutter(
            graph,
            self.analysis,
            space,
            mismatch="lift",
            proportional=True,
            renumber=options.positions == "compact",
            short_outputs=options.outputs == "kept",
        )
        crossing = cutter.crossing

        def at(_: Op) -> None:
            cutter.drop_level(value, crossing.level(value), made)

        assert write.cursor is not None
        cutter.walk({write.cursor: at})
        level = crossing.levels[-1]
        if self.context.want_map and "token_map" not in outcome.extra:
            graph.add_output(crossing.composed_slot(level, WHOLE), "elision_token_map")
            outcome.extra["token_map"] = ends
        if options.outputs == "kept":
            assert level.keep is not None
            self.put_out(level.keep)
        outcome.statistics.update(crossing.statistics)


def _fits(array: np.ndarray | None, value: Value) -> bool:
    """Whether an output of other tokens still has the shape it had; where its lengths are symbolic nobody knows."""
    return array is not None and static(value.shape) == array.shape
