"""Which costs of a report to set against each other."""

from __future__ import annotations

from typing import Any


def cost_ends(report: Any) -> tuple[Any, Any]:
    """(before, after) in one and the same form of the graph: after `normalise`, before `lower`. What those
    two do to a graph changes the estimate of a cost more than the cost."""
    passes = list(report.passes)
    before, after = report.cost_before, report.cost_after
    if passes and passes[0].name == "normalise":
        before = passes[0].cost_after
    if passes and passes[-1].name == "lower":
        after = passes[-1].cost_before
    return before, after
