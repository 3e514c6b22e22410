"""Policies of token dropping: what each says about the tokens of a space, as scores or as flags.

Every policy inserts a few ops beside the fused attentions and returns scores float32 [T, N]. Sources: HiRED (Arif et
al., AAAI 2025), VisionZip (Yang et al., CVPR 2025), LLaVA-PruMerge (Shang et al., ICCV 2025), FastV (Chen et al., ECCV
2024), One-D-Piece (Miwa et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import sympy

from .analysis.masks import padding_mask, told_of_keys
from .analysis.spaces import Analysis, TokenSpace
from .errors import Refused
from .ir.graph import Dim, Op, Value, product
from .writer import Writer

if TYPE_CHECKING:
    from .token_drop import DropOptions

FROM_ATTENTION = frozenset({"cls-topk", "hired", "visionzip", "prumerge", "fastv"})
BY_PLACE = frozenset({"uniform", "random", "tail"})
SAMPLED_ROWS = 16
"""Query rows whose mean stands in for a class token's."""


@dataclass
class Tower:
    """The space whose tokens are dropped, as a policy sees it: T rows of N tokens, `candidates` of them to choose
    among. `layers` has the attentions of each layer: one, or where pictures are packed into one row one for each
    picture, which `pictures` counts then (else T)."""

    analysis: Analysis
    space: TokenSpace
    rows: Dim
    layers: list[list[Op]]
    pictures: Dim

    @property
    def attentions(self) -> list[Op]:
        return [op for layer in self.layers for op in layer]

    @property
    def candidates(self) -> int:
        length = self.space.length
        if not isinstance(length, int):
            raise Refused(f"the number of tokens is symbolic, {length}: how many stay must be a number")
        return length - self.space.prefix - self.space.suffix

    def layer(self, layer: int) -> list[Op]:
        """The attentions of layer `layer`, counted from the end where negative."""
        count = len(self.layers)
        if not -count <= layer < count:
            raise Refused(
                f"there is no attention {layer} in a space of {self.space.length} tokens with {count} of them"
            )
        return self.layers[layer]

    def keys(self, write: Writer, layer: int) -> list[Value]:
        """The keys of layer `layer`, mean over the heads: [T, N, D], or [1, n, D] of each picture in turn."""
        found = []
        for attention in self.layer(layer):
            keys = attention.inputs[1]
            assert keys is not None
            found.append(keys if keys.rank == 3 else write("mean_heads", [keys])[0])
        return found

    def among(self, write: Writer) -> Value | None:
        """-1 for tokens that are not asked about, [T, N]; None where all are."""
        space = self.space
        if not space.prefix and not space.suffix:
            return None
        line = np.zeros((1, int(self.candidates) + space.prefix + space.suffix), np.float32)
        line[0, : space.prefix] = -1
        line[0, line.shape[1] - space.suffix :] = -1
        return write.filled(line, "candidates", [self.rows, line.shape[1]])


def joined(write: Writer, parts: list[Value]) -> Value:
    """[1, n] of each picture in turn as [1, N]; a single value is itself."""
    return parts[0] if len(parts) == 1 else write.plain("concat", *parts, axis=1)


def quotient(a: Dim, b: Dim) -> Dim:
    """a / b. Raises Refused where both are numbers and it is none."""
    if isinstance(a, int) and isinstance(b, int):
        if b and a % b == 0:
            return a // b
        raise Refused(f"{a} tokens do not spread evenly over {b} texts")
    found: Any = sympy.simplify(sympy.sympify(a) / sympy.sympify(b))
    return int(found) if found.is_Integer else found


def rank_rows(write: Writer, numbers: Value, each: int, kept: int, options: DropOptions) -> Value:
    """Flags of the best `kept` of every `each` rows, in the shape of `numbers` [..., 1]."""
    assert numbers.shape is not None
    flat = write.shaped("reshape", numbers, [quotient(product(numbers.shape), each), each])
    return write.shaped("reshape", best_tokens(write, flat, options, kept), list(numbers.shape))


def best_tokens(
    write: Writer, score: Value, options: DropOptions, kept: int, among: Value | None = None, **budget: Any
) -> Value:
    """Flags of the best `kept` tokens of every row of `score` [G, P], or of fewer where an adaptive budget says so.
    `budget`: another way to say how many, for one that is none."""
    if options.adaptive == "no":
        return write("top_tokens", [score, None, among], **(budget or {"count": kept}))[0]
    mass = {"mass": options.mass} if options.adaptive == "mass" else {}
    counts = write("adaptive_counts", [score, among], capacity=kept, **mass)[0]
    return write("top_tokens", [score, counts, among])[0]


def attention_score(write: Writer, tower: Tower, layer: int, heads: str) -> tuple[Value, str]:
    """The attention that each token gets from the class token in block `layer`, [T, N], and how it was read.

    Without a class token the mean over some query rows stands in."""
    parts = tower.layer(layer)
    if tower.space.prefix:
        how = f"scores are the class token's attention in %{parts[0].name}"
    else:
        how = (
            f"there is no class token: scores are the mean attention of every few tokens in %{parts[0].name}"
        )
    scores = []
    for attention in parts:
        attrs = attention_attrs(attention)
        length = None if attention.output.shape is None else attention.output.shape[-2]
        if not tower.space.prefix:
            step = max((length if isinstance(length, int) else tower.candidates) // SAMPLED_ROWS, 1)
            attrs |= {"first": step // 2, "step": step}
        inputs = [*attention.inputs[:2], attention.operand(3)]
        scores.append(write("attention_rows", inputs, heads=heads, **attrs)[0])
    return joined(write, scores), how + (f", for {len(parts)} pictures" if len(parts) > 1 else "")


def attention_attrs(attention: Op) -> dict[str, Any]:
    """Scale and order of an attention, for `attention_rows`. Raises Refused where one row cannot be computed."""
    q, k = attention.inputs[:2]
    if attention.kind != "attention" or q is None or k is None or q.rank != 4 or k.rank != 4:
        raise Refused(f"{attention.target} (%{attention.name}) has no [batch, heads, tokens, width] to read")
    if attention.attrs.get("softcap"):
        raise Refused(f"{attention.target} (%{attention.name}) caps its scores, which one row does not")
    scale = attention.attrs.get("scale")
    return {"scale": float(scale) if scale else 0.0, "causal": bool(attention.attrs.get("causal", False))}


def last_row_score(write: Writer, analysis: Analysis, space: TokenSpace, attention: Op) -> Value:
    """The attention that each token gets from its sample's last token that is no padding, [B, N] (FastV)."""
    valid = valid_tokens(write, analysis, space)
    inputs = [*attention.inputs[:2], attention.operand(3), valid]
    return write("attention_rows", inputs, last=True, heads="mean", **attention_attrs(attention))[0]


def valid_tokens(write: Writer, analysis: Analysis, space: TokenSpace) -> Value | None:
    """1 for a token, 0 for padding, [B or 1, N], wherever the mask is made; None where no mask says so."""
    mask = padding_mask(analysis, space)
    if mask is None:
        return None
    mask = told_of_keys(analysis, space, mask)
    batch = analysis.batch_axis(space, mask)
    write.cursor = write.graph.hoist(mask, write.cursor)
    return write("valid_size", [mask], axis=mask.rank - 1, batch_axis=-1 if batch is None else batch)[0]


def fixed_score(policy: str, count: int, kept: int, seed: int) -> np.ndarray:
    """Scores float32 [count] that depend on the place only: `tail` keeps the first tokens, `uniform` evenly spread
    ones, `random` those that the seed draws (the same in every sample)."""
    if policy == "tail":
        return np.arange(count, 0, -1, dtype=np.float32)
    if policy == "random":
        return np.random.default_rng(seed).permutation(count).astype(np.float32)
    score = np.zeros(count, np.float32)
    if kept:
        score[(np.arange(kept) * count + count // 2) // kept] = 1
    return score


def score_of(
    write: Writer, tower: Tower, options: DropOptions, kept: int, *, layer: int
) -> tuple[Value, str]:
    """Scores >= 0 of all tokens of the tower, [T, N], by block `layer`, and a sentence on them."""
    policy = options.policy
    if policy in FROM_ATTENTION:
        return attention_score(write, tower, layer, options.heads)
    if policy == "similarity":
        scores = [write("distinct_tokens", [keys])[0] for keys in tower.keys(write, layer)]
        return joined(write, scores), "scores are how unlike the other keys a key is"
    space = tower.space
    line = np.zeros((1, tower.candidates + space.prefix + space.suffix), np.float32)
    end = line.shape[1] - space.suffix
    line[0, space.prefix : end] = fixed_score(policy, tower.candidates, kept, options.seed)
    return write.filled(line, "scores", [tower.rows, line.shape[1]]), f"tokens are chosen by place ({policy})"
