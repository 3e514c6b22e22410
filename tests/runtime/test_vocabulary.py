"""DynamicVocabulary: ids, masks and tables of merged texts, and what must not change them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from elision.passes.errors import ElisionError
from elision.runtime.vocabulary_predictors import EmbeddingCache, Pieces, average, first_and_average
from elision.runtime.vocabulary_words import Words
from hypothesis import given
from hypothesis import strategies as st

import elision
from tests.passes.vocabulary_models import VOCABULARY, module, table_of

TABLE = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
LIST = elision.MergeList((((5,), (6,)), ((7,), (8,)), ((5, 6), (7, 8)), ((9,), (9,))))


def vocabulary(merges: Any = LIST, **options: Any) -> elision.DynamicVocabulary:
    return elision.DynamicVocabulary(TABLE, None, merges, **options)


def words_of(*lengths: int) -> list[int]:
    return [word for word, length in enumerate(lengths) for _ in range(length)]


# ---- one batch -------------------------------------------------------------------------------------------
def test_a_batch() -> None:
    ids = np.array([[1, 5, 6, 7, 8, 5, 2], [1, 9, 9, 9, 2, 0, 0]])
    mask = (ids > 0).astype(np.int64)
    words = np.array([[-1, 0, 0, 0, 0, 1, -1], [-1, 0, 0, 0, -1, -1, -1]])
    batch = vocabulary()(ids, mask, words)
    assert batch.ids.tolist() == [[1, 30, 5, 2], [1, 31, 9, 2]]
    assert batch.mask.tolist() == [[1] * 4, [1] * 4]
    assert batch.slot.tolist() == [[0, 1, 1, 1, 1, 2, 3], [0, 1, 1, 2, 3, -1, -1]]
    assert batch.size.tolist() == [[1, 4, 1, 1], [1, 2, 1, 1]]
    np.testing.assert_allclose(batch.table, [TABLE[5:9].mean(0), TABLE[9]], rtol=1e-6)
    assert (batch.tokens_before, batch.tokens_after) == (12, 8)
    assert list(batch.inputs) == ["input_ids", "attention_mask", "table"]
    assert batch.select(ids).tolist() == [[1, 5, 5, 2], [1, 9, 9, 2]]
    restored = batch.restore(batch.ids[..., None] * 1.0)[..., 0]
    assert restored.tolist() == [[1, 30, 30, 30, 30, 5, 2], [1, 31, 31, 9, 2, 0, 0]]


def test_tensors_and_sides() -> None:
    ids, words = torch.tensor([[0, 5, 6], [5, 5, 6]]), torch.tensor([[0, 1, 1], [0, 1, 1]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    batch = vocabulary(left=True, pad=3)(ids, mask, words)
    assert batch.ids.tolist() == [[3, 30], [5, 30]] and batch.mask.tolist() == [[0, 1], [1, 1]]
    assert batch.slot.tolist() == [[-1, 1, 1], [0, 1, 1]]
    assert isinstance(batch.table, torch.Tensor) and batch.table.dtype == torch.float32
    half = elision.DynamicVocabulary(torch.from_numpy(TABLE).half(), None, LIST)(ids, mask, words)
    assert half.table.dtype == torch.float16


@given(
    st.lists(st.lists(st.integers(3, 12), min_size=1, max_size=8), min_size=1, max_size=4),
    st.integers(0, 3),
    st.sampled_from([LIST, "words", "tails", elision.CutWords(2, 2)]),
    st.booleans(),
)
def test_a_text_depends_on_nothing_else(texts: list[list[int]], more: int, merges: Any, left: bool) -> None:
    """Not on the others of its batch, nor on padding."""
    length = max(map(len, texts)) + more
    ids, words = np.zeros((2, len(texts), length), np.int64)
    mask = np.zeros(ids.shape, np.int64)
    for index, text in enumerate(texts):
        at = slice(length - len(text), None) if left else slice(len(text))
        ids[index, at], mask[index, at], words[index, at] = text, 1, np.cumsum(np.array(text) % 3 == 0)
    made = vocabulary(merges, left=left)
    whole = made(ids, mask, words)
    joined = np.concatenate([TABLE, whole.table])
    for index, text in enumerate(texts):
        own = mask[index] > 0
        alone = vocabulary(merges)(ids[index : index + 1, own], None, words[index : index + 1, own])
        rows = joined[whole.ids[index][whole.mask[index] > 0]]
        np.testing.assert_array_equal(rows, np.concatenate([TABLE, alone.table])[alone.ids[0]])
        assert whole.size[index].sum() == len(text)


@given(st.lists(st.integers(3, 12), min_size=1, max_size=9))
def test_no_merges_are_the_identity(text: list[int]) -> None:
    for merges in (elision.MergeList(()), elision.BatchMerges(0), elision.CutWords(100)):
        batch = vocabulary(merges)(np.array([text]), None, np.zeros((1, len(text)), int))
        assert batch.ids.tolist() == [text] and batch.mask.tolist() == [[1] * len(text)]
        assert batch.slot.tolist() == [list(range(len(text)))]


def test_buckets() -> None:
    made = vocabulary(lengths=(4, 8), rows=(2,))
    ids = np.array([[5, 6, 9]])
    batch = made(ids, None, np.array([[0, 0, 1]]))
    assert batch.ids.shape == (1, 4) and batch.table.shape == (2, 4)
    assert batch.mask.tolist() == [[1, 1, 0, 0]]
    with pytest.raises(ElisionError, match="9 tokens do not fit the largest bucket of 8"):
        made(np.full((1, 9), 5), None, np.arange(9)[None])
    with pytest.raises(ElisionError, match="3 new tokens do not fit the largest bucket of 2"):
        made(np.array([[5, 6, 7, 8, 9, 9]]), None, np.array([[0, 0, 1, 1, 2, 2]]))
    with pytest.raises(ElisionError, match="a text has 3 tokens after merging, more than max_length 2"):
        vocabulary(max_length=2)(np.array([[5, 6, 7, 9]]), None, np.array([[0, 0, 1, 1]]))


def test_special_tokens_are_left_alone() -> None:
    batch = vocabulary("words", special=[6])(np.array([[5, 6, 7, 8]]), None, np.zeros((1, 4), int))
    assert batch.ids.tolist() == [[5, 6, 30]]


def test_errors() -> None:
    with pytest.raises(ElisionError, match="an id is none of the vocabulary's 30: 5 to 30 are given"):
        vocabulary()(np.array([[5, 30]]), None, np.array([[0, 1]]))
    with pytest.raises(ElisionError, match="where words begin is not known"):
        vocabulary()(np.array([[5]]))
    with pytest.raises(ElisionError, match=r"ids and mask are \[batch, length\]"):
        vocabulary()(np.array([5]))
    with pytest.raises(
        ElisionError, match=r"cut the word \[5, 6\] into \[\(5,\)\], which are no pieces of it"
    ):
        vocabulary(lambda word: [word[:1]])(np.array([[5, 6]]), None, np.array([[0, 0]]))
    with pytest.raises(ElisionError, match="texts need a tokenizer"):
        vocabulary().encode(["a"])
    with pytest.raises(ElisionError, match="no list of merges"):
        vocabulary("nothing.json")
    with pytest.raises(ElisionError, match="no predictor of embeddings"):
        vocabulary(predictor="nothing.safetensors")
    with pytest.raises(ElisionError, match=r"a int is no result of elision\.optimize, no file and no table"):
        elision.DynamicVocabulary(3)
    with pytest.raises(ElisionError, match=r"elision\.optimize it with dynamic-vocab"):
        result = elision.optimize(torch.nn.Linear(2, 2), "", (torch.zeros(1, 2),))
        elision.DynamicVocabulary(result)


# ---- merges ----------------------------------------------------------------------------------------------
def test_learning(tmp_path: Path) -> None:
    corpus = [[1, 2, 3]] * 3 + [[2, 3]] * 2 + [[4, 5]]
    found = elision.MergeList.learn(corpus, 10)
    assert found.pairs == (((2,), (3,)), ((1,), (2, 3)))  # the pair of 4 and 5 occurs once
    assert elision.MergeList.learn(corpus, 10, longest=2).pairs == (((2,), (3,)),)
    assert elision.MergeList.load(found.save(tmp_path / "merges.json")) == found
    assert found((1, 2, 3, 2, 3)) == [(1, 2, 3), (2, 3)]


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=12), st.integers(0, 6)
)
def test_learning_counts_as_counting_anew_does(corpus: list[list[int]], count: int) -> None:
    """Against the plain algorithm: count all pairs, join the most frequent everywhere, again."""
    found = elision.MergeList.learn(corpus, count)
    words = [[(t,) for t in word] for word in corpus]
    for first, second in found.pairs:
        counts: dict[Any, int] = {}
        for pieces in words:
            for pair in itertools.pairwise(pieces):
                counts[pair] = counts.get(pair, 0) + 1
        assert counts[first, second] == max(counts.values()) >= 2
        for pieces in words:
            at = 0
            while at + 1 < len(pieces):
                if (pieces[at], pieces[at + 1]) == (first, second):
                    pieces[at : at + 2] = [first + second]
                at += 1
    assert words == [found(tuple(word)) for word in corpus]


def test_merges_of_a_batch_depend_on_it() -> None:
    made = vocabulary(elision.BatchMerges(1))
    ids, words = np.array([[5, 6], [5, 6], [7, 8]]), np.zeros((3, 2), int)
    assert made(ids, None, words).ids.tolist() == [[30, 0], [30, 0], [7, 8]]
    assert made(ids[[0, 2, 2]], None, words).ids.tolist() == [[5, 6], [30, 0], [30, 0]]


# ---- embeddings ------------------------------------------------------------------------------------------
def pieces(*ids: tuple[int, ...]) -> Pieces:
    seen: list[Pieces] = []

    def see(given: Pieces) -> np.ndarray:
        seen.append(given)
        return average(given)

    EmbeddingCache(see, lambda i: TABLE[i], str, 9).rows(ids)
    return seen[0]


def test_predictors(tmp_path: Path) -> None:
    given = pieces((5, 6, 7), (8, 9))
    np.testing.assert_allclose(average(given), [TABLE[5:8].mean(0), TABLE[8:10].mean(0)], rtol=1e-6)
    np.testing.assert_allclose(first_and_average(given)[1], TABLE[8] * 0.75 + TABLE[9] * 0.25, rtol=1e-5)
    assert np.array_equal(given.last, TABLE[[7, 9]])
    draw = np.random.default_rng(1).normal
    trained = elision.TrainedPredictor(draw(size=(3, 13)), draw(size=3), np.zeros((4, 3)))
    np.testing.assert_array_equal(trained(given), average(given))
    trained = elision.TrainedPredictor(trained.up, trained.bias, draw(size=(4, 3)))
    again = elision.TrainedPredictor.load(trained.save(tmp_path / "p.safetensors"))
    np.testing.assert_array_equal(again(given), trained(given))
    both = np.concatenate([trained(pieces((5, 6, 7))), trained(pieces((8, 9)))])
    np.testing.assert_allclose(trained(given), both, rtol=1e-5)
    with pytest.raises(ElisionError, match="for embeddings of 4, not 5 numbers"):
        trained(Pieces(given.ids, given.texts, np.zeros((2, 3, 5), np.float32), given.mask))


def test_the_cache_keeps_what_was_used_last() -> None:
    asked: list[Sequence[Any]] = []

    def hypernetwork(given: Pieces) -> np.ndarray:
        asked.append(list(zip(given.ids, given.texts)))
        return given.mean

    cache = EmbeddingCache(hypernetwork, lambda i: TABLE[i], str, 2)
    cache.rows([(5, 6), (7, 8)])
    cache.rows([(5, 6), (8, 9)])  # (7, 8) goes
    cache.rows([(5, 6), (7, 8)])
    assert asked == [[((5, 6), "(5, 6)"), ((7, 8), "(7, 8)")], [((8, 9), "(8, 9)")], [((7, 8), "(7, 8)")]]
    assert len(cache) == 2 and cache.predicted == 4
    cache.clear()
    assert not len(cache)
    with pytest.raises(ElisionError, match="or what is no number"):
        EmbeddingCache(lambda given: given.mean * np.nan, lambda i: TABLE[i], str, 2).rows([(5, 6)])


# ---- words -----------------------------------------------------------------------------------------------
def word_piece() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    entries = [
        "[PAD]",
        "[CLS]",
        "[SEP]",
        "[UNK]",
        "tri",
        "##nit",
        "##ro",
        "ben",
        "##zene",
        "-",
        "2",
        ",",
        "4",
    ]
    made = Tokenizer(models.WordPiece({token: i for i, token in enumerate(entries)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(entries[:4])
    made.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return made


def byte_pairs() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = ["a", "b", "\u0120", "'", "s", "ab", "\u0120a", "\u00c3", "\u00a9"]
    merges = [("a", "b"), ("\u0120", "a")]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return made


def test_words_of_texts_and_of_ids() -> None:
    words = Words(word_piece())
    ids, numbers = words.encode(["2,4-trinitro benzene"])
    assert ids == [[1, 10, 11, 12, 9, 4, 5, 6, 7, 8, 2]]
    assert numbers == [[-1, 0, 1, 2, 3, 4, 4, 4, 5, 5, -1]] == [words.of(ids[0])]
    assert Words(word_piece(), "word").encode(["2,4-trinitro benzene"])[1] == [[-1, *[0] * 7, 1, 1, -1]]
    bytes_ = Words(byte_pairs())
    ids, numbers = bytes_.encode(["ab'sb ab\u00e9"])
    assert numbers[0] == bytes_.of(ids[0])
    assert len(set(numbers[0])) == 4  # ab, 's, b, and the last one, whose letter of two bytes is no boundary


def test_a_tokenizer_makes_batches() -> None:
    made = elision.DynamicVocabulary(TABLE, word_piece(), "words")
    batch = made.encode(["trinitro", "benzene benzene"])
    assert batch.ids.tolist() == [[1, 30, 2, 0], [1, 31, 31, 2]]
    ids = np.array([[1, 4, 5, 6, 2, 0], [1, 7, 8, 7, 8, 2]])
    again = made(ids, ids > 0)
    assert again.ids.tolist() == batch.ids.tolist()
    learned = elision.DynamicVocabulary(TABLE, word_piece(), elision.MergeList(())).learn(
        ["benzene trinitro"] * 2, 9
    )
    assert ((7,), (8,)) in learned.pairs and len(learned.pairs) == 3


# ---- with a model ----------------------------------------------------------------------------------------
def test_a_model_reads_its_batches() -> None:
    model = module("minilm")
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    auto = torch.export.Dim.AUTO
    shapes = ({0: auto, 1: auto}, {0: auto, 1: auto})
    result = elision.optimize(model, "dynamic-vocab", (ids, torch.ones_like(ids)), dynamic_shapes=shapes)
    made = elision.DynamicVocabulary(result, None, "tails")
    assert made.source.count == VOCABULARY and not made.lengths and not made.rows
    batch = made(ids, None, torch.tensor([words_of(4, 2, 3), words_of(3, 3, 3)]))
    assert batch.ids.shape == (2, 6)
    with torch.no_grad():
        found = result.module(**batch.inputs)
        rows = torch.cat([table_of(model), batch.table])[batch.ids]
        hidden = model.inner(inputs_embeds=rows, attention_mask=batch.mask).last_hidden_state  # type: ignore[operator]
    weight = batch.mask[..., None].float()
    torch.testing.assert_close(found, (hidden * weight).sum(1) / weight.sum(1), atol=1e-5, rtol=1e-4)


def test_static_graphs_say_their_sizes() -> None:
    model = module("minilm")
    ids = torch.randint(3, VOCABULARY, (2, 9))
    result = elision.optimize(model, "dynamic-vocab{rows=4}", (ids, torch.ones_like(ids)))
    made = elision.DynamicVocabulary(result, None, "tails")
    batch = made(ids, None, torch.tensor([words_of(4, 2, 3)] * 2))
    assert batch.ids.shape == (2, 9) and batch.table.shape == (4, 32)
    assert result.module(**batch.inputs).shape == (2, 32)
