"""Dropping tokens between two blocks of a graph without a text: a vision or audio encoder, or a one-dimensional
tokenizer's decoder."""

from __future__ import annotations

from .analysis.masks import causal_because
from .analysis.spaces import TokenSpace
from .drop_features import MERGING
from .drop_job import Job
from .drop_policies import BY_PLACE, FROM_ATTENTION, Tower, best_tokens, score_of
from .errors import Refused
from .writer import Writer


def drop_within(job: Job, space: TokenSpace) -> None:
    """Drop before block `layer`, by what the block before it says."""
    options, blocks = job.options, space.blocks
    if options.policy in MERGING or options.tiles > 1:
        raise Refused(f"policy={options.policy} needs an image that joins a text, and the graph has none")
    by_place = options.policy in BY_PLACE
    first = 0 if by_place else 1
    layer = options.layer
    if layer is None:
        layer = 0 if by_place else max(len(blocks) // 2, 1)
    layer += len(blocks) if layer < 0 else 0
    if not first <= layer < len(blocks):
        raise Refused(f"policy={options.policy} drops before block {first} to {len(blocks) - 1}, not {layer}")
    block, before = blocks[layer], blocks[layer - 1].attention
    value, q = block.skip, block.attention.inputs[0]
    if value is None or value.producer is None or q is None or q.shape is None:
        raise Refused(
            f"{block.attention.target} (%{block.attention.name}): {block.problem or 'reads an input'}"
        )
    if options.policy in FROM_ATTENTION and causal_because(job.analysis, before):
        raise Refused(
            f"{before.target} (%{before.name}) is causal: its rows do not say which tokens later ones need"
        )
    tower = Tower(job.analysis, space, q.shape[0], [[b.attention] for b in blocks], q.shape[0])
    kept = options.kept(tower.candidates)
    if kept >= tower.candidates:
        job.nothing(f"{tower.candidates} tokens")
        return
    write = Writer(job.graph, value.producer)
    score, how = score_of(write, tower, options, kept, layer=layer - 1)
    flags = best_tokens(write, score, options, kept, tower.among(write))
    job.cut(space, value, flags, write, tower.candidates - kept)
    job.outcome.notes += [how, f"from block {layer} on {kept} of {tower.candidates} tokens are left"]
