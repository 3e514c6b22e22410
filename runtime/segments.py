"""Units of a text for the pass `segment-merge`: which tokens are one identifier, or one word.

A tokenizer says where in the text each token stands; a lexer or a pattern says where units stand. Both together give
one number for each token, in the order of the text, which is what the graph's input `segments` wants.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np

from ..passes.errors import ElisionError

Span = tuple[int, int]
"""(start, end) of a unit in a text, in characters."""

Units = Callable[[str], Iterable[Span]]
"""The units of a text; what lies in none stays as it is."""

# Scripts that write no space between words: there a run of letters is no word, but a whole sentence.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[^\W{_UNSPACED}]+")
_IDENTIFIER = re.compile(r"[^\W\d]\w*")


def words(text: str) -> list[Span]:
    """Runs of letters, digits and underscores; nothing in scripts that do not write spaces between words."""
    return [match.span() for match in _WORD.finditer(text)]


def identifiers(language: str = "python", lexer: str = "pygments") -> Units:
    """The names in source text of `language`: of variables, functions, classes, modules, builtins. Strings, comments,
    keywords and numbers are no units.

    lexer: "pygments", or "tree-sitter" with the package tree-sitter-language-pack. Raises ElisionError where that is
    missing or does not know the language."""
    if lexer == "pygments":
        return _pygments(language)
    if lexer == "tree-sitter":
        return _tree_sitter(language)
    raise ElisionError(f"lexer is pygments or tree-sitter, not {lexer!r}")


@cache
def _pygments(language: str) -> Units:
    try:
        from pygments.lexers import get_lexer_by_name
        from pygments.token import Name
        from pygments.util import ClassNotFound
    except ImportError as error:
        raise ElisionError("identifiers are found by the package pygments, which is not installed") from error
    try:
        lexer = get_lexer_by_name(language)
    except ClassNotFound as error:
        raise ElisionError(f"pygments knows no language {language!r}") from error

    def found(text: str) -> list[Span]:
        spans = []
        for start, kind, value in lexer.get_tokens_unprocessed(text):
            if kind in Name:  # a dotted name is several
                spans += [(start + m.start(), start + m.end()) for m in _IDENTIFIER.finditer(value)]
        return spans

    return found


@cache
def _tree_sitter(language: str) -> Units:
    try:
        from tree_sitter_language_pack import get_parser  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ElisionError(
            "lexer tree-sitter takes the package tree-sitter-language-pack, which is not installed"
        ) from error
    try:
        parser: Any = get_parser(language)
    except Exception as error:
        raise ElisionError(f"tree-sitter knows no language {language!r}") from error

    def found(text: str) -> list[Span]:
        data = text.encode()
        spans, waiting = [], [parser.parse(data).root_node]
        while waiting:
            node = waiting.pop()
            waiting += node.children
            if not node.children and node.type.endswith("identifier"):
                start = len(data[: node.start_byte].decode(errors="replace"))
                spans.append(
                    (start, start + len(data[node.start_byte : node.end_byte].decode(errors="replace")))
                )
        return sorted(spans)

    return found


def segments_of(encoding: Any, texts: str | Sequence[str], units: Units | str = "words") -> np.ndarray:
    """int64 [B, N] for the input `segments`: tokens of one unit have one number, every other token one of its own, in
    the order of the text; padding has -1.

    encoding: what a fast tokenizer of transformers or of tokenizers gave for `texts` (a BatchEncoding, an Encoding or
    a list of them), padded to one length N. units: "words", "identifiers" (of Python), or a function from a text to
    the (start, end) of its units in characters, `identifiers("java")` for one. A token belongs to a unit when it lies
    inside it, spaces at its ends aside; special tokens belong to none. Of pairs of texts only the first has units.

    Raises ElisionError for an encoding without offsets, of several lengths, or of another number of texts."""
    given = [texts] if isinstance(texts, str) else list(texts)
    found = _encodings(encoding)
    if len(found) != len(given):
        raise ElisionError(f"the encoding has {len(found)} rows, and there are {len(given)} texts")
    lengths = {len(single.ids) for single in found}
    if len(lengths) > 1:
        raise ElisionError(
            f"the rows of the encoding have from {min(lengths)} to {max(lengths)} tokens: pad them to one length"
        )
    spans = _spans_by(units)
    rows = [_row(single, text, sorted(spans(text))) for single, text in zip(found, given)]
    return np.array(rows, np.int64).reshape(len(rows), max(lengths, default=0))


def _spans_by(units: Units | str) -> Units:
    if callable(units):
        return units
    if units == "words":
        return words
    if units == "identifiers":
        return identifiers()
    raise ElisionError(f"units are words, identifiers or a function, not {units!r}")


def _encodings(encoding: Any) -> list[Any]:
    several = getattr(encoding, "encodings", None)
    if several is None and hasattr(encoding, "offsets"):
        several = [encoding]
    elif several is None and isinstance(encoding, list | tuple):
        several = list(encoding)
    if not several or not all(hasattr(single, "offsets") for single in several):
        raise ElisionError("the encoding has no offsets: it takes a fast tokenizer")
    return list(several)


def _row(encoding: Any, text: str, spans: list[Span]) -> list[int]:
    row: list[int] = []
    place, last, number = 0, -1, -1  # `last`: the unit that the token before belongs to
    facts = zip(
        encoding.offsets, encoding.attention_mask, encoding.special_tokens_mask, encoding.sequence_ids
    )
    for (start, end), real, special, sequence in facts:
        if not real:
            row.append(-1)
            last = -1
            continue
        unit = -1
        while start < end and text[start].isspace() and sequence == 0:
            start += 1
        while start < end and text[end - 1].isspace() and sequence == 0:
            end -= 1
        if not special and sequence == 0 and start < end:
            while place < len(spans) and spans[place][1] <= start:
                place += 1
            if place < len(spans) and spans[place][0] <= start and end <= spans[place][1]:
                unit = place
        if unit < 0 or unit != last:
            number += 1
        row.append(number)
        last = unit
    return row


def count_units(segments: np.ndarray) -> np.ndarray:
    """int64 [B]: how many slots each row of `segments` [B, N] needs, padding aside."""
    segments = np.asarray(segments)
    before = np.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return ((segments >= 0) & (segments != before)).sum(1)


def slots_of(segments: np.ndarray, bucket: int = 1) -> np.ndarray:
    """int64 [S], 0 to S - 1: for the input `slots` of a graph with capacity=dynamic, as many as the longest row of
    `segments` [B, N] has units, rounded up to a multiple of `bucket`, at most N and at least 3.

    A model whose graph protects first or last tokens (a class token) may need up to that many more than the units."""
    segments = np.asarray(segments)
    most = int(count_units(segments).max(initial=3))
    return np.arange(max(3, min(-(-most // bucket) * bucket, segments.shape[1])))
