"""Why a pass does not apply behind others, and in which order it would.

Passes do not know each other. What one of them leaves in a graph can be read off the graph (`FACTS`), from a file as
well; and whether another order works is found by trying, on copies, once a pass has refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .base import Pass, PassContext
from .errors import Refused
from .ir.graph import Graph, Op

PATIENCE = 20.0
"""Seconds after which no further order is tried."""

_REDUCED = (
    "merge_tokens merge_segments restore_tokens select_tokens drop_tokens pad_tokens guard_rows delete_gate "
    "match_tokens match_padded_tokens match_grid_tokens pool_tokens absorb_tokens"
)
_KERNELS = ("elision_cpu", "elision_triton")


def _named(names: str) -> Callable[[Op], bool]:
    known = frozenset(names.split())
    return lambda op: op.target.split(".")[0] in ("elision", *_KERNELS) and op.target.split(".")[-1] in known


_joined = _named("joined_attention joined_cached_attention")


def _is_lowered(op: Op) -> bool:
    """Kernels of ours, and attentions over joined heads: what no other pass reads."""
    domain = op.target.split(".")[0]
    return domain in _KERNELS or _joined(op) or op.target == "com.microsoft.MultiHeadAttention"


LOWERED, FIXED, REDUCED, ROUNDED = "lowered", "fixed", "reduced", "rounded"
CACHED, LARGEST, GIVEN = "cached", "largest", "given"

FACTS: dict[str, tuple[str, Callable[[Op], bool]]] = {
    LOWERED: ("ops in the form of what runs them", _is_lowered),
    FIXED: ("products whose rows are fixed", _named("linear_rows")),
    REDUCED: ("tokens that were merged or left out", _named(_REDUCED)),
    CACHED: ("attentions over a cache", _named("cached_attention joined_cached_attention")),
    ROUNDED: ("weights of few bits", _named("linear_nbits embedding_nbits linear_packed")),
    LARGEST: ("the largest scores in the place of all", _named("linear_topk linear_spread")),
    GIVEN: ("embeddings that are given with the ids", _named("overlay_rows")),
}
"""What earlier passes can leave in a graph: in words, and the ops by which it is seen."""


def facts(graph: Graph) -> dict[str, Op]:
    """The facts that hold for a graph, each with the first op that shows it."""
    found: dict[str, Op] = {}
    for op in graph.ops:
        for name, (_, shows) in FACTS.items():
            if name not in found and shows(op):
                found[name] = op
    return found


def check(single: Pass, graph: Graph) -> None:
    """Raises Refused where the graph that this pass has changed has what the pass must come before."""
    if not single.before:
        return
    found = facts(graph)
    for name in single.before:
        if name in found:
            op = found[name]
            raise Refused(f"{single.name}: the graph has {FACTS[name][0]} already: {op.target} (%{op.name})")


@dataclass(frozen=True)
class Step:
    """A pass of a pipeline that has run: what it was given, and whether it changed that."""

    single: Pass
    graph: Graph
    context: PassContext
    changed: bool


def advice(
    error: Exception, single: Pass, now: Step, done: Sequence[Step], later: Sequence[Pass]
) -> str | None:
    """One sentence on the pass that is in the way of `single`, which has raised `error`, or the one that it needs in
    front; None where it applies in no other place.

    now: what it was given. done: the steps before it. later: the passes behind it."""
    until = time.perf_counter() + PATIENCE
    changing = [step for step in done if step.changed]
    for place in reversed(range(len(changing))):
        blamed = changing[place]
        first = _after(blamed.graph, blamed.context, [single], until)
        if first is None:
            continue
        between = [step.single for step in changing[place:]]
        works = _after(*first, between, until) is not None
        after = changing[place + 1].graph if place + 1 < len(changing) else now.graph
        return _in_the_way(error, single, between, _left(blamed.graph, after), works)
    state: tuple[Graph, PassContext] | None = (now.graph, now.context)
    for missing in later:
        state = _after(*state, [missing], until)
        if state is None:
            break
        if _after(*state, [single], until) is not None:
            why = f"{single.name} before {missing.name}: {_own(error, single)}"
            return f"{why}; put {single.name} behind {missing.name}"
    return None


def _after(
    graph: Graph, context: PassContext, passes: Sequence[Pass], until: float
) -> tuple[Graph, PassContext] | None:
    """A copy of the graph after the passes; None where one of them does not apply, or time is up."""
    for single in passes:
        if time.perf_counter() > until:
            return None
        trial = graph.copy()
        try:
            outcome = single.run(trial, replace(context, samples=None))
            if not outcome.changed:
                continue
            check(single, graph)
        except Exception:  # whatever it is: this order does not work
            return None
        graph = trial
        if outcome.signature is not None:
            context = replace(context, example_inputs=outcome.signature.after)
    return graph, context


def _left(before: Graph, after: Graph) -> list[str]:
    """What came to hold, in words."""
    held = facts(before)
    return [FACTS[name][0] for name in facts(after) if name not in held]


def _in_the_way(
    error: Exception, single: Pass, between: Sequence[Pass], left: Sequence[str], works: bool
) -> str:
    blamed = between[0]
    why = f"the graph has {' and '.join(left)} by then" if left else _own(error, single)
    if works:
        what = f"put {single.name} before {blamed.name}"
    elif single.name == blamed.name:
        what = "a graph takes it once"
    elif len(between) == 1:
        what = "the other order does not work either, so choose one of them"
    else:
        what = f"{single.name} before {blamed.name} does not work with the passes between them either"
    return f"{single.name} after {blamed.name}: {why}; {what}"


def _own(error: Exception, single: Pass) -> str:
    return " ".join(str(error).split()).removeprefix(f"{single.name}: ")
