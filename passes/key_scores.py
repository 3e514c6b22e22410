"""key-scores: how much attention each cached key gets, as further outputs of a step graph.

A cache that keeps the keys which matter has to know which do (Zhang et al., H2O: Heavy-Hitter Oracle, NeurIPS 2023).
Attention kernels throw their probabilities away, so they are computed a second time, next to each attention.
"""

from __future__ import annotations

from .base import Outcome, Pass, PassContext, register
from .errors import NothingMatched, Refused
from .ir.graph import Graph, Op

ATTENTION = "elision.cached_attention"
BIAS = 8


@register
class KeyScores(Pass):
    """Adds an output `key_scores.i`, float32 [M, key heads, capacity], for the i-th attention over a cache: the
    probability that row m gives each slot, summed over the query heads that share a key head; 0 where it does not look.

    Keys can then be moved to other slots and left out: a step graph whose attentions go by a key's place among the
    others (a bias, a window) is refused, because these places change."""

    name = "key-scores"
    exact = True
    summary = "how much attention every cached key gets, for caches that forget"

    def run(self, graph: Graph, context: PassContext) -> Outcome:
        """Raises NothingMatched without an attention over a cache (before `lower`), Refused for one that counts."""
        attentions = [op for op in graph.ops_of("elision") if op.target == ATTENTION]
        if not attentions:
            raise NothingMatched(
                "key-scores found no attention over a cache; it comes after incremental and before lower"
            )
        for op in attentions:
            _check(op)
        for number, op in enumerate(attentions):
            attrs = {name: op.attrs[name] for name in ("scale", "softcap") if name in op.attrs}
            given = [op.operand(0), op.outputs[1], op.operand(6), op.operand(7)]
            (scores,) = graph.insert("key_scores", given, attrs, after=op)
            graph.add_output(scores, f"key_scores.{number}")
        return Outcome(changed=True, statistics={"key scores": len(attentions)})


def _check(op: Op) -> None:
    counted = "a window of keys" if op.attrs.get("window") else "a bias that goes by the places of keys"
    if op.attrs.get("window") or op.operand(BIAS) is not None:
        raise Refused(
            f"{op.target} (%{op.name}) has {counted}: a cache that forgets keys would give the others wrong places"
        )
