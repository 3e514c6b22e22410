"""The pass incremental on graphs of a few lines: what it refuses and by which name, and what it makes of masks."""

import re

import numpy as np
import pytest
import torch
from elision.passes import NothingMatched, PassContext, PipelineError, Refused, diff_graphs
from elision.passes.incremental import Incremental
from elision.passes.incremental_pairs import PairTable, Unfit, read_rule
from elision.passes.ir.fx import FxGraph
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from .causal_toys import VOCABULARY, Convolved, Padded, Toy, Typed, dynamic_rotary, traced
from .step_runs import Steps, check_steps

CAPACITY = 48


def rewritten(module, *more, **options):
    graph = FxGraph.from_export(traced(module, *more))
    Incremental(**{"capacity": CAPACITY, **options}).run(graph, PassContext())
    graph.verify()
    return graph


def refusal(module, *more, **options):
    with pytest.raises(Refused) as error:
        rewritten(module, *more, **options)
    text = str(error.value)
    assert "\n" not in text
    return text


# ---- refused ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("module", "said"),
    [
        (Toy(mask=lambda i, j: j >= 0 * i), r"the mask %\w+ of .*: lets a token see later ones"),
        (Toy(mask=lambda i, j: j <= i + 1), "lets a token see later ones"),
        (Toy(mask=lambda i, j: (j <= i) & (i // 4 == j // 4)), "hides keys in another way than by a window"),
        (Toy(mask=lambda i, j: (j <= i) & (j > i - i // 2 - 1)), "hides keys in another way"),
        (
            Toy(mask=lambda i, j: torch.where(j <= i, 0.1 * i * j, -1e38)),
            "neither a function of the distance nor",
        ),
        (Padded(), r"reads %\w+, which has a number for every two positions, outside an attention"),
        (Convolved(), r"aten.pad \(%pad\).* mixes the tokens"),
        (
            Toy(mix=lambda x: x.cumsum(1)),
            r"aten.cumsum \(%cumsum\) \(cumsum\) mixes the tokens: a new row of %add",
        ),
        (Toy(mix=lambda x: x.flip(1)), "aten.flip .* mixes the tokens"),
        (Toy(mix=lambda x: x.roll(1, 1)), "aten.roll .* mixes the tokens"),
        (Toy(mix=lambda x: x - x.mean(1, keepdim=True)), "aten.mean .* takes the mean over the tokens"),
        (Toy(mix=lambda x: x.softmax(1)), "aten.softmax .* normalises over the tokens"),
        (Toy(mix=lambda x: x + x[:, :1]), r"aten.slice \(%slice_1\) takes some of the tokens"),
        (
            Toy(mix=lambda x: x + x[:, -1:]),
            r"aten.add \(%\w+\) reads %\w+ together with rows that aten.slice",
        ),
        (Toy(mix=lambda x: x[:, -1]), "aten.select .* picks tokens out"),
        (Toy(mix=lambda x: torch.cat((x[:, :1] * 0, x), 1)), "aten.slice .* takes some of the tokens"),
        (
            Toy(mix=lambda x: x.transpose(1, 2) @ x @ torch.ones(16, 16)),
            "aten.matmul .* sums over the tokens",
        ),
        (
            Toy(mix=lambda x: x @ x.transpose(1, 2) @ x),
            "aten.matmul .* combines every token with every token",
        ),
        (Toy(mix=lambda x: x * x.shape[1]), r"%sym_size_int\w* depends on the number of tokens: aten.mul"),
        (Toy(mix=lambda x: x / torch.arange(x.shape[1]).add(1).sum()), "depends on the number of tokens"),
        (
            Toy(before=dynamic_rotary),
            r"%\w+ is not the same at the first \d+ positions when more follow: aten.mul",
        ),
        (Toy(before=lambda x: x + torch.arange(x.shape[1]).flip(0)[:, None]), "is not the same at the first"),
        (
            Toy(
                mix=lambda x: (
                    x + (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).sum(1)[:, None]
                )
            ),
            "is not the same",
        ),
    ],
)
def test_what_a_cache_cannot_keep_is_refused_by_name(module, said):
    text = refusal(module)
    assert re.search(said, text), text


class Across(Toy):
    """Attends from the tokens to a source."""

    def __init__(self, causal=False, mask=None):
        super().__init__()
        self.causal, self.across = causal, mask

    def forward(self, input_ids, memory):
        x = self.embed(input_ids)
        x = x + self.attend(input_ids, x)
        mask = None if self.across is None else self.across(torch.arange(x.shape[1])[:, None], memory)
        return self.head(x + F.scaled_dot_product_attention(x, memory, memory, mask, is_causal=self.causal))


def across(module):
    axes = ({1: torch.export.Dim.AUTO}, {1: torch.export.Dim.AUTO})
    args = (torch.ones(1, 7).long(), torch.ones(1, 5, 16))
    program = torch.export.export(
        module.eval().requires_grad_(False), args, dynamic_shapes=axes, strict=False
    )
    graph = FxGraph.from_export(program)
    outcome = Incremental(capacity=CAPACITY).run(graph, PassContext())
    graph.verify()
    return graph, outcome


@pytest.mark.parametrize(
    "mask",
    [
        None,
        lambda i, m: m[0, :, 0] > 0,
        lambda i, m: (m[0, :, 0] > 0) | (i % 3 == 0),
        lambda i, m: m.sum(-1) * i + torch.zeros(i.shape[0], m.shape[1]),
    ],
)
def test_attention_to_a_source_is_computed_row_by_row(mask):
    torch.manual_seed(0)
    module = Across(mask=mask)
    memory = torch.randn(1, 6, 16)
    memory[0, 0, 0] = 1.0  # some key is seen
    graph, outcome = across(module)
    prelude = outcome.extra["prelude"]
    crosses = prelude.evaluate(prelude.outputs, {prelude.inputs[0]: memory.numpy()})

    def plain(ids):
        with torch.no_grad():
            return module(torch.tensor([list(ids)]), memory)[0].numpy()

    check_steps(Steps(graph, crosses), plain, np.random.default_rng(0), VOCABULARY)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (Across(causal=True), "counts its queries, so that a row's place matters"),
        (
            Across(mask=lambda i, m: torch.arange(i.shape[0] * m.shape[1]).reshape(-1, m.shape[1]) > 3),
            "a source",
        ),
    ],
)
def test_attention_to_a_source_that_counts_rows_is_refused(module, said):
    with pytest.raises(Refused, match=said):
        across(module)


def test_inputs_that_run_along_the_tokens_are_refused():
    text = refusal(Typed(), torch.ones(1, 7).long())
    assert text == (
        "the input %token_type_ids runs along the tokens of %input_ids and is neither their mask nor their positions"
    )


def test_a_static_length_or_batch_is_refused():
    toy = Toy().eval()
    fixed = torch.export.export(toy, (torch.ones(1, 7).long(),), strict=False)
    with pytest.raises(Refused, match="%input_ids have the static length 7"):
        Incremental().run(FxGraph.from_export(fixed), PassContext())
    shapes = ({1: torch.export.Dim.AUTO},)
    two = torch.export.export(toy, (torch.ones(2, 7).long(),), dynamic_shapes=shapes, strict=False)
    with pytest.raises(Refused, match="%input_ids has the static batch 2"):
        Incremental().run(FxGraph.from_export(two), PassContext())


def test_names_and_sizes_of_options_are_checked():
    with pytest.raises(PipelineError, match="capacity must be at least 2"):
        Incremental(capacity=1)
    assert refusal(Toy(), ids="tokens") == "the graph has no input 'tokens': it has input_ids"
    graph = FxGraph.from_export(traced(torch.nn.Sequential(torch.nn.Embedding(9, 4))))
    with pytest.raises(
        NothingMatched, match="found no input 'input_ids' with token ids among input_1; option ids"
    ):
        Incremental().run(graph, PassContext())
    with pytest.raises(
        NothingMatched, match=r"no self-attention over the tokens of %input_1 \(0 attentions among"
    ):
        Incremental(ids="input_1").run(graph, PassContext())


def test_a_mask_too_large_to_evaluate_names_the_capacity():
    text = refusal(Toy(mask=lambda i, j: j <= i), capacity=100_000)
    assert text.startswith("at a capacity of 100000 the mask %")
    assert text.endswith("would take 10.0 GB to evaluate; choose a smaller capacity")


def test_a_refused_graph_is_as_it_was():
    graph = FxGraph.from_export(traced(Toy(mix=lambda x: x.flip(1))))
    before = graph.text()
    with pytest.raises(Refused):
        Incremental().run(graph, PassContext())
    assert graph.text() == before


# ---- kept ---------------------------------------------------------------------------------------------
def slopes(x):
    return torch.tensor([0.5, 0.25]).reshape(2, 1, 1) * x


def only(allowed, bias):
    return torch.where(allowed, bias, torch.finfo(torch.float32).min)


@pytest.mark.parametrize(
    "module",
    [
        Toy(),
        Toy(mask=lambda i, j: j <= i),
        Toy(mask=lambda i, j: (j <= i) & (i - j < 5)),
        Toy(mask=lambda i, j: only(j <= i, 0.3 * (i - j))),
        Toy(mask=lambda i, j: only(j <= i, slopes(j - i))[None]),
        Toy(mask=lambda i, j: only((j <= i) & (i - j < 6), slopes(j))[None]),
        Toy(mask=lambda i, j: only(j <= i, slopes((j * 0.7).sin() + 0 * i))[None]),
        Toy(mask=lambda i, j: only(j <= i, (i - j + 1.0).log() + i * 0.1)),
        Toy(mix=lambda x: x.reshape(-1, 16).relu()[None]),
        Toy(mix=lambda x: x.unflatten(-1, (4, 4)).softmax(-1).flatten(2)),
        Toy(mix=lambda x: x.reshape(x.shape[1], 4, 4).transpose(0, 1).sum(0).repeat(1, 4)[None]),
        Toy(mix=lambda x: x + torch.arange(x.shape[1]).sin()[:, None]),
        Toy(mix=lambda x: x.cumsum(-1)),
        Toy(before=lambda x: x + torch.linspace(0, 1, 64)[: x.shape[1], None]),
        Toy(heads=1),
    ],
)
def test_new_rows_equal_the_recomputed_text(module):
    torch.manual_seed(0)
    module.embed.reset_parameters()
    graph = rewritten(module)

    def plain(ids):
        with torch.no_grad():
            return module(torch.tensor([list(ids)]))[0].numpy()

    check_steps(Steps(graph), plain, np.random.default_rng(0), VOCABULARY)


def named_lengths(graph):
    """The text without what versions of torch number differently."""
    lines = "\n".join(graph.text())
    ids = str(graph.inputs[0].shape[1])
    lines = re.sub(r"sym_size_int(_\d+)?", "length", lines.replace(ids, "M"))
    return re.sub(r"\bs\d+\b", "A", lines).split("\n")


def test_diff_of_a_tiny_graph():
    before = FxGraph.from_export(traced(Toy(mask=lambda i, j: only((j <= i) & (i - j < 5), 0.3 * (i - j)))))
    after = before.copy()
    Incremental(capacity=8).run(after, PassContext())
    found = diff_graphs(named_lengths(before), named_lengths(after), context=0, lengths=False)
    assert found == TINY_DIFF.strip()


TINY_DIFF = """
...
- %length: int64[] = aten.sym_size(%input_ids) {axis=1}
+ %position_ids: int64[1, M] = input
+ %slots: int32[M] = input
+ %prefix: int32[M, 2] = input
+ %ancestors: int32[M, A] = input
+ %key_cache_0: float32[2, 8, 8] = input
+ %value_cache_0: float32[2, 8, 8] = input
...
- %arange: int64[M] = aten.arange(by %length) {fn=arange, end=M}
- %slice_1: int64[M] = aten.slice(%arange)
- %unsqueeze: int64[M, 1] = aten.unsqueeze(%slice_1)
- %unsqueeze_1: int64[1, M] = aten.unsqueeze(%arange)
- %le_1: bool[M, M] = aten.le(%unsqueeze_1, %unsqueeze) {fn=le}
- %sub: int64[M, M] = aten.sub(%unsqueeze, %unsqueeze_1) {fn=sub}
- %lt: bool[M, M] = aten.lt(%sub) {fn=lt, other=5}
- %and_1: bool[M, M] = aten.__and__(%le_1, %lt) {fn=bitwise_and}
- %sub_1: int64[M, M] = aten.sub(%unsqueeze, %unsqueeze_1) {fn=sub}
- %mul: float32[M, M] = aten.mul(%sub_1) {fn=mul, other=0.3}
- %where: float32[M, M] = aten.where(%and_1, %mul) {fn=where, other=-3.40282e+38}
- %scaled_dot_product_attention: float32[1, 2, M, 8] = aten.scaled_dot_product_attention(%transpose, %transpose_1, %transpose_2, %where) {scale=0.353553, causal=False}
+ %cached_attention_default_out: float32[1, 2, M, 8], %cached_attention_default_new_key_cache: float32[2, 8, 8], %cached_attention_default_new_value_cache: float32[2, 8, 8] = elision.cached_attention(%transpose, %transpose_1, %transpose_2, %key_cache_0, %value_cache_0, %slots, %prefix, %ancestors, %scaled_dot_product_attention_bias) {scale=0.353553, softcap=0, window=5, key_bias=False}
- %transpose_3: float32[1, M, 2, 8] = aten.transpose(%scaled_dot_product_attention) {perm=[0, 2, 1, 3]}
+ %transpose_3: float32[1, M, 2, 8] = aten.transpose(%cached_attention_default_out) {perm=[0, 2, 1, 3]}
...
- return %linear_1
+ return %linear_1, %cached_attention_default_new_key_cache, %cached_attention_default_new_value_cache
"""  # noqa: E501


# ---- tables of masks ----------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(
    window=st.integers(1, 60),
    heads=st.sampled_from([1, 3]),
    form=st.sampled_from(["none", "distance", "key"]),
    seed=st.integers(0, 10**6),
    bools=st.booleans(),
)
def test_law_a_rule_gives_its_table_back(window, heads, form, seed, bools):
    """Whatever a row adds to all its logits, softmax of the rule's table is softmax of the table."""
    rng = np.random.default_rng(seed)
    numbers, shifts = rng.normal(size=(heads, 40)), rng.normal(size=(heads, 40)).astype(np.float32)
    if form == "key":
        window = 60  # a window and a bias of keys at once is no form that models have

    def table(length):
        i, j = np.arange(length)[:, None], np.arange(length)[None]
        distance = np.clip(i - j, 0, None)
        bias = {"none": 0 * distance, "distance": numbers[:, distance], "key": numbers[:, j + 0 * i]}[form]
        bias = np.broadcast_to(bias, (heads, length, length)) + shifts[:, :length, None]
        return ((j <= i) & (i - j < window))[None], bias.astype(np.float32)

    tables = []
    for length in (1, 7, 40):
        allowed, bias = table(length)
        masks = [allowed, bias] if bools else [np.where(allowed, bias, np.float32(-3.4e38))[None]]
        tables.append(PairTable(masks, length, causal=False))
    rule = read_rule(tables)
    assert rule.window == (0 if window >= 40 else window)
    allowed, bias = table(40)
    i, j = np.arange(40)[:, None], np.arange(40)[None]
    mine = np.zeros((1, 40, 40))
    if rule.bias is not None:
        mine = rule.bias[:, j + 0 * i] if rule.by_key else rule.bias[:, np.clip(i - j, 0, None)]
    difference = np.where(allowed, mine - bias, np.nan)
    spread = np.nanmax(difference, axis=2) - np.nanmin(difference, axis=2)
    assert spread.max() < 1e-5


def test_one_head_that_hides_more_is_told():
    both = np.tril(np.ones((2, 6, 6), bool))
    both[1, 4, 0] = False
    with pytest.raises(Unfit, match="hides other keys from one head"):
        read_rule([PairTable([both], 6, causal=False)])


def test_a_rule_of_the_capacity_must_hold_at_every_length():
    i, j = np.arange(9)[:, None], np.arange(9)[None]
    long = PairTable([(0.5 * (i - j)).astype(np.float32)], 9, causal=True)
    short = PairTable([(0.25 * (i - j)).astype(np.float32)[:4, :4]], 4, causal=True)
    with pytest.raises(Unfit, match="neither a function"):
        read_rule([short, long])
