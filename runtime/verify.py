"""Verification: which token is committed after each accepted node.

A walk goes down the tree from the root: a chooser says the next token; where a child of the node holds it, the walk
goes on there. So whatever a chooser says is committed, the tree only decides how much of it comes in one call. With the
choosers of plain decoding (greedy, or a draw from the stream that plain decoding draws from) text is plain decoding's
own. `Rejection` tests the draft's children against its distribution instead: other text, of the same distribution, and
more of a random draft's children are accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .draft_tree import Proposal, Tree

Choose = Callable[[int, Sequence[int]], int]
"""(node, tokens committed in this walk so far) -> the next token."""

Commit = Callable[[int], bool]
"""Takes a token; False ends the walk: the text is at its end."""


def walk(tree: Tree, choose: Choose, commit: Commit) -> tuple[list[int], list[int]]:
    """(accepted nodes from the root on, committed tokens). There is one token for each accepted node: an accepted child
    is the token committed after its parent, and the last is what the tree did not have."""
    node, path, tokens = 0, [0], []
    while True:
        token = choose(node, tokens)
        tokens.append(token)
        if not commit(token):
            return path, tokens
        child = tree.child(node, token)
        if child is None:
            return path, tokens
        node = child
        path.append(node)


def accepted_token(p: np.ndarray, tree: Tree, node: int, random: np.random.Generator) -> int:
    """One token of distribution p float64 [V], where the children of `node` are tried first, as their kind of proposal
    asks for.

    DETERMINISTIC: a child is accepted with p of its token, which is then struck out (EAGLE-2's rule). INDEPENDENT:
    with min(1, p / q), after which p becomes the positive part of p - q (SpecInfer, Miao et al. 2024).
    WITHOUT_REPLACEMENT: the same, and the token is struck out of q as well (Sequoia, Chen et al. 2024). Each is
    distributed as p. Sums that rounding has made 0 or less fall back to p: the chance of getting there is 0."""
    whole, left = p, p
    if tree.kind is Proposal.DETERMINISTIC:
        for child in tree.children(node):
            token = tree.tokens[child]
            if random.random() < left[token]:
                return token
            left = left.copy()
            left[token] = 0.0
            left = _normal(left, whole)
        return _sample(left, random)
    q, order = tree.draws.get(node, (p, []))
    if not order:
        return _sample(p, random)
    q = q / q.sum()
    for token in order:
        if q[token] > 0 and random.random() * q[token] < left[token]:
            return token
        left = _normal(np.maximum(left - q, 0.0), whole)
        if tree.kind is Proposal.WITHOUT_REPLACEMENT:
            q = q.copy()
            q[token] = 0.0
            total = q.sum()
            if total > 0:
                q /= total
            else:  # all that the draft thinks possible has been tried
                break
    return _sample(left, random)


def _normal(p: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    total = p.sum()
    return p / total if np.isfinite(total) and total > 0 else otherwise


def _sample(p: np.ndarray, random: np.random.Generator) -> int:
    bounds = np.cumsum(p)
    place = min(int(np.searchsorted(bounds, random.random() * bounds[-1], side="right")), len(p) - 1)
    return place if p[place] > 0 else int(np.argmax(p))
