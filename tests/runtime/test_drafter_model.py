"""Drafting with a model and with a whole engine: the target's text stays its own, and caches follow it."""

from __future__ import annotations

import numpy as np
import pytest
from elision.passes.errors import ElisionError
from elision.runtime.draft_tree import Proposal
from elision.runtime.drafter_model import DraftModel, Hierarchical, ModelDrafter
from elision.runtime.drafter_ngram import Ngram
from elision.runtime.drafter_recycling import Recycling
from elision.runtime.drafters import Union
from elision.runtime.generate import Generator
from elision.runtime.lm_facts import facts_of_module
from elision.runtime.speculate import Asked, build, cheaper, check_drafting, check_tokenizers
from elision.runtime.speculation import Speculation
from elision.runtime.tree_policy import Beam, DySpec, Fixed, Marginal
from elision.runtime.verify_costs import flat

from .lm_double import Recompute, tiny_llama

PROMPTS = [[5, 9, 33], [7, 7, 8, 7, 7, 8, 7], [4, 4, 4, 4, 8, 9, 10, 90, 3]]


@pytest.fixture(scope="module")
def target():
    return tiny_llama()


@pytest.fixture(scope="module")
def other():
    """A model that is right now and then: the target's weights, disturbed."""
    import torch

    model = tiny_llama()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.15 * parameter.std() * torch.randn_like(parameter)
            ) if parameter.dim() > 1 else None
    return model


def around(target, drafter, policy, mode="exact", **options):
    speculation = Speculation(drafter, flat(1.0), policy, mode, guard=False)
    return Generator.around(
        Recompute(target, capacity=200), facts_of_module(target), batch=2, speculation=speculation, **options
    )


def plain(target, **options):
    generator = Generator.around(Recompute(target, capacity=200), facts_of_module(target))
    return [result.token_ids for result in generator.generate(PROMPTS, 20, eos=[], **options)]


def engine(model, vocabulary, kind):
    shared = DraftModel(Recompute(model, capacity=200), vocabulary)
    if kind == "model":
        return ModelDrafter(shared)
    return Hierarchical(shared, Union([Ngram(), Recycling()]), flat(1.0))


@pytest.mark.parametrize(
    "policy", [Marginal(), Beam(8, 2, 3), DySpec(6), Fixed((2, 1, 1))], ids=lambda p: p.name
)
@pytest.mark.parametrize("kind", ["model", "hierarchical"])
@pytest.mark.parametrize("right", [True, False])
def test_the_text_is_the_targets(target, other, policy, kind, right):
    drafter = engine(target if right else other, 120, kind)
    generator = around(target, drafter, policy)
    results = generator.generate(PROMPTS, 20, eos=[])
    assert [result.token_ids for result in results] == plain(target)
    told = [result.speculation for result in results]
    accepted = sum(sum(entry["accepted_from"].values()) for entry in told)
    assert accepted > 0, "this drafter is right now and then"
    if right and kind == "model":
        # A draft that is the target is always right, in its first choice.
        shares = told[0]["acceptance"]["by_rank"]
        assert shares["0"] == 1.0
        assert all(entry["tokens_per_verification"] > 1.8 for entry in told)


def test_a_draft_with_fewer_slots_or_words_than_the_target(target, other):
    small = DraftModel(Recompute(other, capacity=80), 120)
    small.model.vocabulary = 90  # ids from 90 on are unknown to it
    generator = around(target, ModelDrafter(small), Fixed((2, 1)))
    assert [r.token_ids for r in generator.generate(PROMPTS, 20, eos=[])] == plain(target)
    tiny = ModelDrafter(DraftModel(Recompute(other, capacity=8), 120))
    generator = around(target, tiny, Fixed((2, 1)))
    results = generator.generate(PROMPTS, 20, eos=[])
    assert [r.token_ids for r in results] == plain(target)
    assert all(not r.speculation["accepted_from"] for r in results)


def test_drafts_give_their_slots_back(target, other):
    shared = DraftModel(Recompute(other, capacity=200), 120)
    generator = around(target, ModelDrafter(shared), Fixed((1, 1)))
    for _ in range(3):
        generator.generate(PROMPTS, 20, eos=[])
    assert shared.slots.take(200) == 0


def test_the_draft_of_a_draw_is_its_distribution(target):
    """What `distribution` says at a node is the softmax of the model's scores after that text."""
    import torch

    shared = DraftModel(Recompute(target, capacity=100), 120)
    draft = ModelDrafter(shared, Proposal.WITHOUT_REPLACEMENT, temperature=0.7).begin([5, 9, 33], 10)
    root = draft.root()
    (first,) = draft.distribution([root])
    nodes = [draft.step(root, 8), draft.step(root, 11)]
    found = draft.distribution(nodes)
    (deeper,) = draft.distribution([draft.step(nodes[1], 4)])
    for p, text in [(first, []), (found[0], [8]), (found[1], [11]), (deeper, [11, 4])]:
        with torch.no_grad():
            scores = target(torch.tensor([[5, 9, 33, *text]])).logits[0, -1].double()
        np.testing.assert_allclose(p, torch.softmax(scores / 0.7, -1).numpy(), atol=1e-6)


@pytest.mark.parametrize("policy", [Fixed((2, 1)), DySpec(5)], ids=lambda p: p.name)
def test_sampling_with_a_model_that_draws(target, other, policy):
    """The seed decides, and ids stay possible ones; the distribution itself is tested in test_verify.py."""
    shared = DraftModel(Recompute(other, capacity=200), 120)
    drafter = ModelDrafter(shared, Proposal.WITHOUT_REPLACEMENT)
    how = {"temperature": 1.0, "top_k": 5, "eos": []}
    runs = [
        [
            r.token_ids
            for r in around(target, drafter, policy, "sampling").generate(PROMPTS, 15, seed=s, **how)
        ]
        for s in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert [len(ids) for ids in runs[0]] == [15] * 3


def test_what_is_asked_for_is_checked():
    with pytest.raises(ElisionError, match=r"a drafter is none, auto, .* or hierarchical, not 'fast'"):
        check_drafting("fast", None, "exact")
    with pytest.raises(ElisionError, match="the drafter 'model' needs a draft model"):
        check_drafting("model", None, "exact")
    with pytest.raises(
        ElisionError, match="a draft model is for the drafters 'model' and 'hierarchical', not"
    ):
        check_drafting("ngram", "x", "exact")
    with pytest.raises(ElisionError, match="the mode is exact or sampling, not 'fast'"):
        check_drafting("ngram", None, "fast")
    with pytest.raises(ElisionError, match="a tree is marginal, fixed, beam, dyspec, not 'oak'"):
        build(None, Asked("ngram", tree="oak"))
    drawing = ModelDrafter(DraftModel(Recompute(tiny_llama()), 120), Proposal.INDEPENDENT)
    for tree in ("marginal", "beam", "dyspec"):
        with pytest.raises(ElisionError, match="would change the distribution"):
            build(None, Asked(drawing, tree=tree))
    assert cheaper({"bits": 8}) == cheaper({"bits": 32}) == {"bits": 4}
    assert set(cheaper({"bits": 4})) == {"skip"}


def test_a_draft_model_with_another_tokenizer():
    from types import SimpleNamespace

    def side(ids):
        return SimpleNamespace(tokenizer=lambda text: {"input_ids": ids})

    check_tokenizers(side([1, 2]), side([1, 2]))
    with pytest.raises(ElisionError, match="another tokenizer than the model"):
        check_tokenizers(side([1, 2]), side([1, 3]))
