"""Units of a text by the offsets of its tokens."""

from __future__ import annotations

import numpy as np
import pytest
from elision.passes.errors import ElisionError
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing

import elision

CODE = "def read_file(path):\n    return path.read_text()  # path\n"


def tokenizer(pattern: str = r"[a-z]{1,4}|\s+|.") -> Tokenizer:
    """Letters in pieces of four, everything else a token each; [CLS] in front, [SEP] behind."""
    made = Tokenizer(WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[PAD]": 3}, unk_token="[UNK]"))
    made.pre_tokenizer = Split(Regex(pattern), "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    made.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    made.enable_padding(pad_id=3, pad_token="[PAD]")
    return made


def grouped(encoding, text: str, row: np.ndarray) -> list[str]:
    """The text of each unit in order; special tokens are empty."""
    spans: dict[int, list[tuple[int, int]]] = {}
    for number, span in zip(row.tolist(), encoding.offsets):
        if number >= 0:
            spans.setdefault(number, []).append(span)
    return [text[found[0][0] : found[-1][1]] for found in spans.values()]


def test_words_of_a_text() -> None:
    texts = ["tokenizers split unfamiliar words.", "one"]
    encodings = tokenizer().encode_batch(texts)
    found = elision.segments_of(encodings, texts, "words")
    assert found.dtype == np.int64 and found.shape == (2, len(encodings[0].ids))
    assert grouped(encodings[0], texts[0], found[0]) == [
        *("", "tokenizers", " ", "split", " ", "unfamiliar", " ", "words", ".", "")
    ]
    assert found[1].tolist() == [0, 1, 2] + [-1] * (found.shape[1] - 3)
    assert elision.count_units(found).tolist() == [10, 3]
    assert len(elision.slots_of(found, bucket=8)) == 16


def test_names_of_source_text() -> None:
    encoding = tokenizer().encode(CODE)
    found = elision.segments_of(encoding, CODE, "identifiers")[0]
    units = [unit.strip() for unit in grouped(encoding, CODE, found)]
    assert units.count("read_file") == 1 and "path" in units and "read_text" in units
    assert "return" not in units and units[-4:-1] != ["path"]  # a keyword in two pieces stays two
    java = elision.segments_of(encoding, CODE, elision.identifiers("java"))
    assert java.shape == (1, len(encoding.ids))


def test_own_units_and_pieces_across_their_ends() -> None:
    encoding = tokenizer(r".{3}").encode("abcdefghi")
    found = elision.segments_of(encoding, "abcdefghi", lambda text: [(0, 6), (6, 8)])[0]
    assert found.tolist() == [0, 1, 1, 2, 3]  # ghi is no part of gh


def test_of_a_pair_the_first_text_has_units() -> None:
    encoding = tokenizer().encode("tokenizer", "tokenizer")
    found = elision.segments_of(encoding, "tokenizer")[0]
    assert found.tolist() == [0, 1, 1, 1, 2, 3, 4, 5, 6]


def test_scripts_without_spaces_have_no_words() -> None:
    assert elision.words("merge 日本語の文章 now") == [(0, 5), (13, 16)]


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="ab_ .\n(中", max_size=40), st.sampled_from(["words", "identifiers"]))
def test_numbers_rise_and_units_stay_inside_their_spans(text: str, units: str) -> None:
    encoding = tokenizer().encode(text)
    row = elision.segments_of(encoding, text, units)[0]
    steps = np.diff(row)
    assert ((steps == 0) | (steps == 1)).all() and row[0] == 0
    for place in np.flatnonzero(steps == 0):
        (start, _), (_, end) = encoding.offsets[place], encoding.offsets[place + 1]
        assert "\n" not in text[start:end].strip() and " " not in text[start:end].strip()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: elision.segments_of({"input_ids": []}, "a"), "the encoding has no offsets"),
        (
            lambda: elision.segments_of(tokenizer().encode("a"), ["a", "b"]),
            "has 1 rows, and there are 2 texts",
        ),
        (lambda: elision.segments_of(tokenizer().encode("a"), "a", "names"), "units are words, identifiers"),
        (
            lambda: elision.segments_of([tokenizer().encode(t) for t in ("a", "a b")], ["a", "a b"]),
            "pad them",
        ),
        (lambda: elision.identifiers("klingon"), "pygments knows no language 'klingon'"),
        (lambda: elision.identifiers("python", "yacc"), "lexer is pygments or tree-sitter"),
    ],
)
def test_bad_input_is_one_clear_error(call, sentence: str) -> None:
    with pytest.raises(ElisionError, match=sentence):
        call()
