"""From what a user says about drafting to a `Speculation`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..passes.errors import ElisionError
from .draft_tree import Proposal
from .drafter_ngram import Ngram
from .drafter_recycling import Recycling
from .drafters import Union
from .speculation import EXACT, SAMPLING, Speculation
from .tree_policy import Beam, DySpec, Fixed, Marginal
from .verify_costs import costs_for

DRAFTERS = ("none", "auto", "ngram", "recycling", "model", "self", "hierarchical")
TREES = {"marginal": Marginal, "fixed": Fixed, "beam": Beam, "dyspec": DySpec}
MODES = (EXACT, SAMPLING)


def check_drafting(drafter: Any, draft_model: Any, mode: str) -> None:
    """What can be seen before a model is loaded. Raises ElisionError."""
    if isinstance(drafter, str) and drafter not in DRAFTERS:
        raise ElisionError(f"a drafter is {', '.join(DRAFTERS[:-1])} or {DRAFTERS[-1]}, not {drafter!r}")
    if drafter == "model" and draft_model is None:
        raise ElisionError("the drafter 'model' needs a draft model")
    if draft_model is not None and drafter not in ("model", "hierarchical"):
        raise ElisionError(
            f"a draft model is for the drafters 'model' and 'hierarchical', not for {drafter!r}"
        )
    if mode not in MODES:
        raise ElisionError(f"the mode is {EXACT} or {SAMPLING}, not {mode!r}")


def build(
    opened: Any,
    drafter: Any,
    *,
    draft_model: Any = None,
    tree: Any = "marginal",
    mode: str = EXACT,
    guard: bool = True,
    threads: int = 0,
    cache: bool = True,
    notify: Callable[[str], None] = lambda _step: None,
) -> Speculation | None:
    """None for the drafter "none". opened: the target, an `lm_open.Opened`. Raises ElisionError."""
    check_drafting(drafter, draft_model, mode)
    if drafter == "none" or drafter is None:
        return None
    made = (
        _drafter(drafter, opened, draft_model, threads, cache, notify)
        if isinstance(drafter, str)
        else drafter
    )
    policy = _policy(tree)
    check_kinds(made, policy, mode)
    costs = costs_for(opened.model, opened.key if cache else None, threads, notify)
    return Speculation(made, costs, policy, mode, guard)


def check_kinds(drafter: Any, policy: Any, mode: str) -> None:
    """Guesses drawn at random must not be chosen by what was drawn. Raises ElisionError."""
    if drafter.kind is Proposal.DETERMINISTIC:
        return
    if isinstance(policy, Fixed) or (
        isinstance(policy, DySpec) and drafter.kind is Proposal.WITHOUT_REPLACEMENT
    ):
        return
    raise ElisionError(
        f"the tree {policy.name!r} chooses among guesses, which the drafter {drafter.name!r} draws at random: "
        "that would change the distribution; 'fixed' and, without replacement, 'dyspec' do not"
    )


def _policy(tree: Any) -> Any:
    if not isinstance(tree, str):
        return tree
    if tree not in TREES:
        raise ElisionError(f"a tree is {', '.join(TREES)}, not {tree!r}")
    return TREES[tree]()


def _drafter(
    name: str, opened: Any, draft_model: Any, threads: int, cache: bool, notify: Callable[[str], None]
) -> Any:
    if name == "ngram":
        return Ngram()
    if name == "recycling":
        return Recycling()
    if name == "auto":
        return Union([Ngram(), Recycling()])
    raise ElisionError(f"the drafter {name!r} is not there yet")
