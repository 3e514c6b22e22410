"""Dropping tokens between two blocks of a graph without a text: a vision or audio encoder, or a one-dimensional
tokenizer's decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .analysis.masks import causal_because
from .analysis.spaces import Analysis, TokenSpace
from .base import Outcome, PassContext
from .drop_at_join import cut, last_of
from .drop_policies import FROM_ATTENTION, Tower, Writer, score_of
from .errors import Refused
from .ir.graph import Graph

if TYPE_CHECKING:
    from .token_drop import DropOptions


def drop_within(
    graph: Graph,
    analysis: Analysis,
    space: TokenSpace,
    options: DropOptions,
    context: PassContext,
    outcome: Outcome,
) -> None:
    """Drop before block `layer`, by what the block before it says."""
    if options.policy in ("visionzip", "prumerge") or options.tiles > 1:
        raise Refused(f"policy={options.policy} needs an image that joins a text, and the graph has none")
    blocks = space.blocks
    by_place = options.policy in ("uniform", "random", "tail")
    first = 0 if by_place else 1
    layer = options.layer
    if layer is None:
        layer = 0 if by_place else max(len(blocks) // 2, 1)
    layer += len(blocks) if layer < 0 else 0
    if not first <= layer < len(blocks):
        raise Refused(f"policy={options.policy} drops before block {first} to {len(blocks) - 1}, not {layer}")
    block = blocks[layer]
    value = block.skip
    if value is None or value.producer is None:
        raise Refused(
            f"{block.attention.target} (%{block.attention.name}): {block.problem or 'reads an input'}"
        )
    q = block.attention.inputs[0]
    assert q is not None and q.shape is not None
    tower = Tower(analysis, space, q.shape[0], [[b.attention] for b in blocks], q.shape[0])
    kept = options.kept(tower.candidates)
    gone = tower.candidates - kept
    if options.policy in FROM_ATTENTION and causal_because(analysis, blocks[layer - 1].attention):
        raise Refused(
            f"{blocks[layer - 1].attention.target} (%{blocks[layer - 1].attention.name}) is causal: its rows do not "
            "say which tokens later ones need"
        )
    if gone <= 0:
        outcome.changed = False
        outcome.notes.append(f"nothing to drop: all {tower.candidates} tokens are kept")
        return
    write = Writer(graph, last_of(graph, [value, *(b.attention.output for b in blocks[:layer])]))
    score, how = score_of(write, tower, options, kept, layer=layer - 1)
    flags = write("top_tokens", [score, None, tower.among(write)], count=kept)[0]
    cut(graph, analysis, space, value, flags, write.cursor, gone, options, context, outcome)
    outcome.notes += [how, f"from block {layer} on {kept} of {tower.candidates} tokens are left"]
