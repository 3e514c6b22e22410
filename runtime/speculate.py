"""From what a user says about drafting to a `Speculation`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..passes.errors import ElisionError
from .draft_tree import Proposal
from .drafter_model import DraftModel, Hierarchical, ModelDrafter
from .drafter_ngram import Ngram
from .drafter_recycling import Recycling
from .drafters import Union
from .speculation import EXACT, SAMPLING, Speculation
from .tree_policy import Beam, DySpec, Fixed, Marginal
from .verify_costs import costs_for

DRAFTERS = ("none", "auto", "ngram", "recycling", "model", "self", "hierarchical")
TREES = {"marginal": Marginal, "fixed": Fixed, "beam": Beam, "dyspec": DySpec}
MODES = (EXACT, SAMPLING)
SELF_SHARE = 0.5
"""Of its layers, what a model leaves out when it drafts for itself."""

PROBE = "The draft's 3 tokens, naïve café: def f(x): return x + 1\n\t«ok» 東京"
"""Text on which tokenizers that differ are likely to differ."""


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


@dataclass(frozen=True)
class Asked:
    """What is asked for: fields as of `Generator`. reopen(model, **options): another model opened like the target, the
    target itself compiled in another way where `model` is None."""

    drafter: Any = "none"
    draft_model: Any = None
    tree: Any = "marginal"
    mode: str = EXACT
    guard: bool = True
    threads: int = 0
    notify: Callable[[str], None] = lambda _step: None
    reopen: Callable[..., Any] | None = None


def build(opened: Any, asked: Asked) -> Speculation | None:
    """None for the drafter "none". opened: the target, an `lm_open.Opened`. Raises ElisionError."""
    check_drafting(asked.drafter, asked.draft_model, asked.mode)
    if asked.drafter == "none" or asked.drafter is None:
        return None
    policy = _policy(asked.tree)
    drafter = _drafter(asked.drafter, opened, asked) if isinstance(asked.drafter, str) else asked.drafter
    check_kinds(drafter, policy)
    costs = costs_for(opened.model, opened.key, asked.threads, asked.notify)
    return Speculation(drafter, costs, policy, asked.mode, asked.guard)


def check_kinds(drafter: Any, policy: Any) -> None:
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


def check_tree(tree: Any) -> None:
    """Raises ElisionError for the name of no policy."""
    if isinstance(tree, str) and tree not in TREES:
        raise ElisionError(f"a tree is {', '.join(TREES)}, not {tree!r}")


def _policy(tree: Any) -> Any:
    check_tree(tree)
    return TREES[tree]() if isinstance(tree, str) else tree


def _drafter(name: str, opened: Any, asked: Asked) -> Any:
    if name == "ngram":
        return Ngram()
    if name == "recycling":
        return Recycling()
    if name == "auto":
        return Union([Ngram(), Recycling()])
    assert asked.reopen is not None
    if asked.draft_model is not None:
        asked.notify("opening the draft model")
        small = asked.reopen(asked.draft_model)
        check_tokenizers(opened, small)
    else:
        asked.notify("compiling the draft model")
        small = asked.reopen(None, **cheaper(opened.settings))
    shared = DraftModel(small.model, opened.facts.vocabulary)
    kind = Proposal.WITHOUT_REPLACEMENT if asked.mode == SAMPLING else Proposal.DETERMINISTIC
    if name != "hierarchical":
        return ModelDrafter(shared, kind, name=name)
    costs = costs_for(small.model, small.key, asked.threads, asked.notify)
    return Hierarchical(shared, Union([Ngram(), Recycling()]), costs)


def cheaper(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Options of compilation for a draft made of the target itself: 4 bits, or half its layers where it has no more."""
    return {"skip": SELF_SHARE} if settings["bits"] in (4, "source") else {"bits": 4}


def check_tokenizers(target: Any, small: Any) -> None:
    """Raises ElisionError where the two models read ids as different texts."""
    if target.tokenizer is None or small.tokenizer is None:
        return
    if target.tokenizer(PROBE)["input_ids"] != small.tokenizer(PROBE)["input_ids"]:
        raise ElisionError(
            "the draft model has another tokenizer than the model: its guesses would mean other words"
        )
