"""Heads as drafter: what they guess, that text stays plain decoding's, and their files."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from elision.passes import testing
from elision.passes.errors import ElisionError, ModelFileError
from elision.passes.ir.fx import FxGraph
from elision.runtime.draft_tree import Tree, from_paths
from elision.runtime.drafter_heads import Head, Heads, load_heads, save_heads
from elision.runtime.drafter_recycling import Recycling
from elision.runtime.drafters import Union, Verified
from elision.runtime.generate import Generator
from elision.runtime.lm_export import plain_causal_graph
from elision.runtime.lm_facts import facts_of_module
from elision.runtime.prompt_embeddings import set_prompt_embeddings
from elision.runtime.tree_policy import Fixed, Marginal
from safetensors.torch import save_file

from .draft_double import drafting
from .lm_double import Recompute, tiny_llama

V, H = 120, 32
RANDOM = np.random.default_rng(0)


def head(blocks=1, biased=True, seed=0, rows=V, width=H):
    random = np.random.default_rng(seed)

    def made(*shape):
        return (random.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)

    inner = tuple((made(width, width), made(width) if biased else None) for _ in range(blocks))
    return Head(made(rows, width), made(rows) if biased else None, inner)


def theirs(one: Head) -> torch.nn.Module:
    """The head in PyTorch, as its training would write it."""

    class Block(torch.nn.Module):
        def __init__(self, matrix, bias):
            super().__init__()
            self.linear = torch.nn.Linear(*matrix.shape[::-1], bias=bias is not None)
            self.linear.weight.data = torch.from_numpy(matrix)
            if bias is not None:
                self.linear.bias.data = torch.from_numpy(bias)

        def forward(self, x):
            return x + torch.nn.functional.silu(self.linear(x))

    last = torch.nn.Linear(*one.weight.shape[::-1], bias=one.bias is not None)
    last.weight.data = torch.from_numpy(one.weight)
    if one.bias is not None:
        last.bias.data = torch.from_numpy(one.bias)
    return torch.nn.Sequential(*(Block(*block) for block in one.blocks), last)


class Tapped(Recompute):
    """Remembers the hidden states of the rows of its last call."""

    def __init__(self, model, capacity=96):
        super().__init__(copy.deepcopy(model), capacity)
        self.hidden = np.empty((0, H), np.float32)
        self.model.lm_head.register_forward_pre_hook(
            lambda _, given: self.rows.append(given[0][0, -1].numpy())
        )
        self.rows = []

    def step(self, rows, keep=None):
        self.rows.clear()
        scores = super().step(rows, keep)
        self.hidden = np.stack(self.rows)
        return scores


class Told:
    """Heads, and the hidden states of a `Tapped` model, for one sequence at a time."""

    def __init__(self, drafter, model):
        self.drafter, self.model, self.seen = drafter, model, []
        self.name, self.kind, self.costly, self.seconds = (
            drafter.name,
            drafter.kind,
            drafter.costly,
            drafter.seconds,
        )

    def begin(self, ids, room):
        draft, told = self.drafter.begin(ids, room), self

        class Draft:
            root, step, expand, close = draft.root, draft.step, draft.expand, draft.close

            def observe(self, seen):
                told.seen.append(seen)
                draft.observe(replace(seen, hidden=told.model.hidden))

        return Draft()


@pytest.fixture(scope="module")
def llama():
    return tiny_llama(positions=96)


PROMPT = [1, 5, 9, 40, 7]


def plain_text(model, count):
    return (
        Generator.around(Recompute(model, 96), facts_of_module(model))
        .generate(PROMPT, count, eos=[])
        .token_ids
    )


# ---- guesses -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("biased", [True, False])
def test_scores_are_those_of_pytorch(blocks, biased):
    one = head(blocks, biased)
    hidden = RANDOM.standard_normal(H).astype(np.float32) * 5
    with torch.no_grad():
        np.testing.assert_allclose(one(hidden), theirs(one)(torch.from_numpy(hidden)).numpy(), atol=1e-4)


def test_a_large_negative_number_is_no_overflow():
    one = Head(np.eye(2, dtype=np.float32), None, ((np.eye(2, dtype=np.float32), None),))
    with np.errstate(all="raise"):
        found = one(np.array([-1e4, 3.0], np.float32))
    assert found[0] == -1e4


def test_each_depth_has_its_head():
    heads = [head(seed=seed) for seed in range(3)]
    drafter = Heads(heads, width=4)
    draft = drafter.begin([1, 2], 10)
    assert draft.expand([draft.root()]) == [[]]  # nothing is known before the first verification
    tree = from_paths(2, [[3, 4], [5]])
    hidden = RANDOM.standard_normal((len(tree), H)).astype(np.float32)
    draft.observe(Verified(tree, np.zeros((4, 4), np.int64), [0, 1], [3, 8], hidden))
    hidden_of_last = hidden[1].copy()
    hidden[:] = np.nan  # the model's next call writes there
    state = draft.root()
    for depth, one in enumerate(heads):
        (guesses,) = draft.expand([state])
        scores = one(hidden_of_last)
        assert [g.token for g in guesses] == np.argsort(-scores)[:4].tolist()
        exact = np.exp(scores - scores.max())
        np.testing.assert_allclose(
            [g.prior for g in guesses], np.sort(exact / exact.sum())[::-1][:4], atol=1e-5
        )
        assert len({g.key for g in guesses}) == 4 and all(g.key[1] == depth for g in guesses)
        assert draft.expand([state, state]) == [guesses, guesses]
        state = draft.step(state, guesses[0].token)
    assert draft.expand([state]) == [[]]
    assert drafter.seconds() > 0
    draft.observe(Verified(Tree.of(8), np.zeros((1, 4), np.int64), [0], [9]))
    assert draft.expand([draft.root()]) == [[]]  # no hidden state was given
    draft.close()


def test_a_text_that_ends_within_the_path():
    """Fewer tokens than nodes: the hidden state is that of the last token that was committed."""
    drafter = Heads([lambda hidden: hidden])
    draft = drafter.begin([1], 5)
    hidden = np.eye(3, 8, dtype=np.float32)
    draft.observe(Verified(from_paths(1, [[2, 3]]), np.zeros((3, 1), np.int64), [0, 1, 2], [2, 3], hidden))
    assert draft.expand([0])[0][0].token == 1


def test_padding_of_the_vocabulary_is_never_guessed():
    scores = np.array([0, 1, 2, 3, 9, 9], np.float32)
    drafter = Heads([lambda hidden: scores], vocabulary=4, width=10)
    assert [g.token for g in drafter.guesses(0, np.zeros(1, np.float32))] == [3, 2, 1, 0]


def test_scores_that_are_no_numbers_are_guesses_all_the_same():
    drafter = Heads([lambda hidden: np.array([0.0, np.nan, np.inf], np.float32)])
    guesses = drafter.guesses(0, np.zeros(1, np.float32))
    assert len({g.token for g in guesses}) == 3 and all(0 < g.prior < 1 for g in guesses)


# ---- text ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("policy", [Fixed((3, 2, 1)), Marginal()], ids=lambda policy: policy.name)
def test_untrained_heads_leave_the_text_alone(llama, policy):
    model = Tapped(llama)
    drafter = Told(Heads([head(seed=seed) for seed in range(3)], V), model)
    generator = Generator.around(model, facts_of_module(llama), speculation=drafting(drafter, policy))
    for count in (1, 2, 20):
        assert generator.generate(PROMPT, count, eos=[]).token_ids == plain_text(llama, count)
    assert any(len(seen.tree) > 1 for seen in drafter.seen) or policy.name == "marginal"
    both = Told(Union([Recycling(), Heads([head()], V)]), model)
    generator = Generator.around(model, facts_of_module(llama), speculation=drafting(both, policy))
    assert generator.generate(PROMPT, 20, eos=[]).token_ids == plain_text(llama, 20)


def test_sampled_text_is_left_alone_too(llama):
    how = {"temperature": 0.8, "seed": 3, "eos": []}
    plain = Generator.around(Recompute(llama, 96), facts_of_module(llama)).generate(PROMPT, 16, **how)
    model = Tapped(llama)
    drafter = Told(Heads([head(seed=seed) for seed in range(2)], V), model)
    generator = Generator.around(model, facts_of_module(llama), speculation=drafting(drafter, Fixed((3, 2))))
    assert generator.generate(PROMPT, 16, **how).token_ids == plain.token_ids


def test_heads_that_know_the_text_are_accepted(llama):
    """Which hidden state head d reads, and which place it guesses, are right: all of three heads' guesses come true."""
    text = [*PROMPT, *plain_text(llama, 30)]
    with torch.no_grad():
        states = llama.model(torch.tensor([text])).last_hidden_state[0].numpy()

    def knowing(depth):
        def scores(hidden):
            place = int(np.abs(states - hidden).sum(1).argmin())
            return np.eye(V, dtype=np.float32)[text[min(place + 2 + depth, len(text) - 1)]] * 9

        return scores

    model = Tapped(llama)
    drafter = Told(Heads([knowing(depth) for depth in range(3)], V), model)
    generator = Generator.around(
        model, facts_of_module(llama), speculation=drafting(drafter, Fixed((1, 1, 1)))
    )
    result = generator.generate(PROMPT, 30, eos=[])
    assert result.token_ids == text[len(PROMPT) :]
    assert [len(seen.path) for seen in drafter.seen[1:7]] == [4] * 6


# ---- files ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["", "medusa_head."])
def test_files_of_training_scripts(tmp_path, prefix, dtype):
    made = [head(2, seed=0), head(0, biased=False, seed=1), head(1, seed=2)]
    file = tmp_path / "heads.safetensors"
    whole = torch.nn.ModuleList([theirs(one) for one in made]).to(dtype).state_dict()
    save_file({f"{prefix}{name}": tensor for name, tensor in whole.items()}, str(file))
    found = load_heads(file, width=H, vocabulary=V - 3)
    assert [len(one.blocks) for one in found] == [2, 0, 1]
    hidden = RANDOM.standard_normal(H).astype(np.float32)
    for one, other in zip(made, found):
        assert other.weight.dtype == np.float32
        np.testing.assert_allclose(other(hidden), one(hidden), atol=0 if dtype == torch.float32 else 0.1)


def test_what_is_saved_is_read(tmp_path):
    made = [head(1), head(0, biased=False)]
    save_heads(made, tmp_path / "a.safetensors")
    for one, other in zip(made, load_heads(tmp_path / "a.safetensors"), strict=True):
        np.testing.assert_array_equal(one.weight, other.weight)
        assert (one.bias is None) == (other.bias is None) and len(one.blocks) == len(other.blocks)


GOOD = {"0.0.linear.weight": (H, H), "0.0.linear.bias": (H,), "0.1.weight": (V, H)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"0.1.weight": None}, r"head 0: 0.1.weight \[V, H\] is missing"),
        ({"0.0.linear.weight": None}, r"head 0: 0.0.linear.weight is missing"),
        ({"1.1.weight": (V, H)}, r"head 1: 1.0.linear.weight is missing"),
        ({"2.0.weight": (V, H)}, r"has heads \[0, 2\], not 0, 1"),
        ({"lm_head": (V, H)}, r"'lm_head' is no tensor of a head"),
        ({"0.0.linear.weight": (H, 2 * H)}, rf"block 0 of a head \[{V}, {H}\] is \[{H}, {2 * H}\], not"),
        ({"0.0.linear.bias": (1,)}, r"block 0's bias of a head"),
        ({"0.1.bias": (H,)}, r"bias of a head"),
        ({"0.1.weight": (V,)}, r"a head's weight is \[V, H\], not \[120\]"),
        ({"0.1.weight": (V - 1, H)}, r"it scores 119 ids, the model has 120"),
        ({"0.1.weight": (V + 8, H)}, None),
        ({"0.0.linear.weight": (8, 8), "0.0.linear.bias": (8,), "0.1.weight": (V, 8)}, r"it reads 8 numbers"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, change, message):
    shapes = {name: shape for name, shape in (GOOD | change).items() if shape is not None}
    file = tmp_path / "heads.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, str(file))
    if message is None:
        assert len(load_heads(file, width=H, vocabulary=V)) == 1
        return
    with pytest.raises(ModelFileError, match=message):
        load_heads(file, width=H, vocabulary=V)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ModelFileError, match="there is no such file"):
        load_heads(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelFileError, match="is no safetensors file"):
        load_heads(tmp_path / "bad.safetensors")
    (tmp_path / "medusa.pt").write_bytes(b"")
    with pytest.raises(
        ModelFileError, match=r"only \.safetensors files are read; pickled weights can run any code"
    ):
        load_heads(tmp_path / "medusa.pt")
    save_file({}, str(tmp_path / "empty.safetensors"))
    with pytest.raises(ModelFileError, match=r"has heads \[\], not 0, 1"):
        load_heads(tmp_path / "empty.safetensors")


def test_misuse():
    with pytest.raises(ElisionError, match="needs one at least"):
        Heads([])
    with pytest.raises(ElisionError, match="head 0 reads 32 numbers, the model's hidden state has 7"):
        Heads([head()]).guesses(0, np.zeros(7, np.float32))
    assert isinstance(Heads([(head().weight, None)]).heads[0], Head)


def test_prompt_embeddings_from_a_file(tmp_path, llama):
    graph = testing.apply(FxGraph.from_export(plain_causal_graph(llama)), "extra-embeddings{count=2}")
    rows = llama.get_input_embeddings().weight.detach()[[7, 11]].clone()
    save_file({"prompt_embeddings": rows.half()}, str(tmp_path / "p.safetensors"))
    save_file({"other": rows}, str(tmp_path / "o.safetensors"))
    assert set_prompt_embeddings(graph, tmp_path / "p.safetensors") == 2
    with torch.no_grad():
        wanted = llama(torch.tensor([[4, 7, 11]])).logits.numpy()
    found = testing.run(graph, [torch.tensor([[4, V, V + 1]])])[0]
    np.testing.assert_allclose(found, wanted, atol=2e-2 * np.abs(wanted).max())
    with pytest.raises(ModelFileError, match="has no tensor 'prompt_embeddings', but other"):
        set_prompt_embeddings(graph, tmp_path / "o.safetensors")
