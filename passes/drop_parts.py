"""Dropping tokens in a model that comes in parts: which part drops, and what that asks of the others.

The part whose tower scores the tokens puts fewer of them out; parts behind it that compute each token alone do so for
fewer, and the language model's part reads fewer. No part is told by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .analysis.joins import find_joins
from .analysis.masks import causal_because
from .analysis.spaces import Analysis, analyse
from .carry import Carrier
from .drop_at_output import output_name
from .errors import Refused
from .ir.graph import Value
from .parts import Link, Parts, PartsPlan
from .writer import Writer

if TYPE_CHECKING:
    from .token_drop import TokenDrop


def plan_drop(single: TokenDrop, parts: Parts) -> PartsPlan:
    """Which part gets which form of the pass. Raises Refused where that cannot be told, or where a part's tokens
    are of a fixed number."""
    found = {name: analyse(graph) for name, graph in parts.graphs.items()}
    whole = [name for name, analysis in found.items() if find_joins(analysis)]
    if whole:
        return PartsPlan({whole[-1]: single}, [f"part {whole[-1]} holds both the tower and the text"])
    texts = [name for name, analysis in found.items() if _is_text(analysis)]
    if single.options.policy == "fastv":
        return PartsPlan({_only(texts, "causal attention, as a language model has"): single})
    blocks = [name for name, analysis in found.items() if any(space.blocks for space in analysis.spaces)]
    towers = [name for name in blocks if name not in texts]
    tower = _only(towers, "a tower whose attention scores the tokens")
    way = _way(parts, tower, texts)
    notes = [parts.sentence(link) for link in way]
    for link in way:
        if link.target in texts:
            _takes_fewer(parts, link)
            _has_room(found[link.target], link.target)
            notes.append(_asked(tower, link.target))
        else:
            _takes_fewer(parts, link)
            _one_by_one(parts, found[link.target], link)
    if not way or way[-1].target not in texts:
        last = way[-1].target if way else tower
        reader = f"whoever writes what {last} puts out among the embeddings of a text"
        for name in texts:
            reader = name
            _has_room(found[name], name)
        notes.append(_asked(tower, reader))
    output = parts.output_name(way[0]) if way else output_name(found[tower])
    form = single.with_options(outputs="kept", output=output)
    return PartsPlan({tower: form}, notes)


def _asked(tower: str, reader: str) -> str:
    return (
        f"{reader} must have a placeholder for each token that is left: give elision_kept of {tower} to "
        "elision.drop_placeholders, which shortens input ids, and says which positions of masks and position ids stay"
    )


def _is_text(analysis: Analysis) -> bool:
    """True when a part's attention is causal, as a language model's is and a tower's is not."""
    return any(causal_because(analysis, op) for op in analysis.graph.ops_of("attention"))


def _only(names: list[str], what: str) -> str:
    if not names:
        raise Refused(f"no part has {what}")
    if len(names) > 1:
        raise Refused(
            f"the parts {' and '.join(names)} all have {what}: which of them is meant cannot be told"
        )
    return names[0]


def _way(parts: Parts, tower: str, texts: list[str]) -> list[Link]:
    """The links from the tower on, up to a text or to where nothing follows. Raises Refused where they branch."""
    way: list[Link] = []
    at = tower
    while at not in texts:
        links = parts.next(at)
        if len(links) > 1:
            ends = ", ".join(f"%{parts.input_name(link)} of {link.target}" for link in links)
            raise Refused(f"what part {at} puts out goes to {len(links)} places: {ends}")
        if not links or links[0].target in {link.source for link in way}:
            break
        way.append(links[0])
        at = links[0].target
    return way


def _takes_fewer(parts: Parts, link: Link) -> None:
    value = parts.graphs[link.target].inputs[link.input]
    assert value.shape is not None
    tokens = value.shape[-2]
    if isinstance(tokens, int):
        raise Refused(
            f"part {link.target} takes exactly {tokens} tokens in %{parts.input_name(link)}: export it with a "
            "symbolic number of them"
        )


def _has_room(analysis: Analysis, name: str) -> None:
    """Raises Refused where a text's length is a number, so that it cannot be shorter."""
    for space in analysis.spaces:
        if isinstance(space.length, int) and (space.blocks or space.reads):
            raise Refused(
                f"part {name} takes texts of exactly {space.length} tokens: export it with a symbolic number of them"
            )


def _one_by_one(parts: Parts, analysis: Analysis, link: Link) -> None:
    """Raises Refused where a part between the tower and the text makes one token of several."""
    trial = analysis.graph.copy()
    value = trial.inputs[link.input]
    among = analyse(trial)

    def ones(_: object, write: Writer) -> Value:
        assert value.shape is not None
        return write.filled(np.ones((1,) * value.rank, np.float32), "ones", [*value.shape[:-1], 1])

    carrier = Carrier(Writer(trial, trial.ops[-1]), among, value, ones)
    for out in trial.outputs:
        if among.flow.depends(out, value):
            carrier.at(out)
    if carrier.shuffled:
        raise Refused(
            f"part {link.target} makes one token of several of %{parts.input_name(link)}: which are kept must be "
            f"decided behind it, so export it together with {link.source}"
        )
