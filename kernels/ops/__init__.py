"""The ops of the dialect, one file for each or for a close group. Importing registers them with torch."""

from __future__ import annotations

from ..definition import OpDef
from . import (
    adaptive_counts,
    attention,
    attention_rows,
    cached_attention,
    delete_gate,
    embedding_nbits,
    gated,
    gathers,
    joined_attention,
    joined_cached_attention,
    key_scores,
    linear_nbits,
    linear_rows,
    linear_topk,
    longest_row,
    match_grid_tokens,
    match_padded_tokens,
    match_tokens,
    mean_heads,
    merge_segments,
    merge_tokens,
    overlay_rows,
    place_rows,
    pool_tokens,
    ranges,
    rms_norm,
    segment_tokens,
    tile_budgets,
    token_budget,
    token_similarity,
    valid_size,
)

_ALL = (
    mean_heads.OP,
    valid_size.OP,
    match_tokens.OP,
    match_padded_tokens.OP,
    match_grid_tokens.OP,
    merge_tokens.OP,
    gathers.RESTORE,
    gathers.BLEND,
    gathers.SELECT,
    gathers.PAD,
    gathers.COMPOSE,
    ranges.MAP,
    ranges.SIZE,
    ranges.SLICE,
    pool_tokens.OP,
    segment_tokens.OP,
    merge_segments.MERGE,
    merge_segments.WEIGHTS,
    merge_segments.ANY,
    attention_rows.OP,
    tile_budgets.OP,
    adaptive_counts.OP,
    place_rows.OP,
    delete_gate.GATE,
    delete_gate.BUDGET,
    token_budget.TOP,
    longest_row.OP,
    token_budget.DROP,
    token_budget.GUARD,
    token_similarity.DISTINCT,
    token_similarity.CONTEXTUAL,
    token_similarity.ABSORB,
    token_similarity.CHANNELS,
    attention.OP,
    joined_attention.OP,
    cached_attention.OP,
    joined_cached_attention.OP,
    key_scores.OP,
    gated.OP,
    rms_norm.NORM,
    rms_norm.ADD_NORM,
    linear_nbits.OP,
    linear_rows.OP,
    linear_topk.OP,
    linear_topk.SPREAD,
    embedding_nbits.OP,
    overlay_rows.OWN,
    overlay_rows.OVERLAY,
)

OPS: dict[str, OpDef] = {op.name: op for op in _ALL}
"""Every op of the dialect by name."""

for _op in _ALL:
    _op.register()


def definition_of(target: str) -> OpDef | None:
    """The op that a graph's target names (`elision.attention`, `elision:attention`), or of which it names a variant by
    a suffix; None for others."""
    name = target.split(":")[-1].split(".", 1)[-1]
    while name and name not in OPS:
        name = name.rpartition("_")[0]
    return OPS.get(name)
