"""Where words begin in token ids: nothing is merged across such a boundary, and no special token at all."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..passes.errors import ElisionError

Boundary = Literal["pretoken", "word"]
"""Tokens are merged within what the tokenizer splits a text into first, or within what is between two spaces."""

SPECIAL = -1
"""The word of a special token."""

_MOST_KEPT = 1 << 16


class Words:
    """The words of token ids, by a tokenizer of the package tokenizers, transformers' wrapper of one, or its file."""

    def __init__(self, tokenizer: Any, boundary: Boundary = "pretoken") -> None:
        if boundary not in ("pretoken", "word"):
            raise ElisionError(f"boundary is pretoken or word, not {boundary!r}")
        self.tokenizer = _plain(tokenizer)
        self.boundary = boundary
        state = json.loads(self.tokenizer.to_str())
        model = state["model"]
        prefix = model.get("continuing_subword_prefix") if model.get("type") == "WordPiece" else None
        self.prefix: str | None = prefix or None
        self.special = {item["id"] for item in state.get("added_tokens", ()) if item.get("special")}
        self._joined: dict[tuple[int, ...], bool] = {}

    def text(self, ids: Sequence[int]) -> str:
        """What these tokens say."""
        strings = [self.tokenizer.id_to_token(i) or "" for i in ids]
        if self.tokenizer.decoder is None:
            return "".join(strings)
        return self.tokenizer.decoder.decode(strings)

    def encode(self, texts: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of each text, with special tokens, and the number of each one's word."""
        found = self.tokenizer.encode_batch(list(texts))
        ids, words = [], []
        for text, one in zip(texts, found):
            real = [i for i, m in enumerate(one.attention_mask) if m]
            mine = [one.word_ids[i] for i in real]
            if self.boundary == "word":
                mine = _between_spaces(text, [one.offsets[i] for i in real], mine)
            ids.append([one.ids[i] for i in real])
            words.append([SPECIAL if w is None or i in self.special else w for i, w in zip(ids[-1], mine)])
        return ids, words

    def of(self, ids: Sequence[int]) -> list[int]:
        """The number of each token's word, from the ids alone. Exact where the tokenizer marks tokens that go on; else
        tokens belong together as long as what they say is one word when split by itself."""
        found, word, current = [], -1, ()
        for token in ids:
            if token in self.special:
                found.append(SPECIAL)
                current = ()
                continue
            current = (*current, token)
            if len(current) == 1 or not self._goes_on(current):
                word, current = word + 1, (token,)
            found.append(word)
        return found

    def _goes_on(self, tokens: tuple[int, ...]) -> bool:
        """Whether the last of these tokens belongs to the word of the others."""
        if self.prefix is not None and self.boundary == "pretoken":
            return str(self.tokenizer.id_to_token(tokens[-1])).startswith(self.prefix)
        if tokens not in self._joined:
            if len(self._joined) >= _MOST_KEPT:
                self._joined.clear()
            self._joined[tokens] = self._one_word(tokens)
        return self._joined[tokens]

    def _one_word(self, tokens: tuple[int, ...]) -> bool:
        last = str(self.tokenizer.id_to_token(tokens[-1]))
        if last.startswith(("\u2581", "\u0120")):  # what stands for a space
            return False
        text = self.text(tokens)
        if text.endswith("\ufffd"):  # the first bytes of a letter
            return True
        if self.boundary == "word" or self.tokenizer.pre_tokenizer is None:
            return len(text.split()) <= 1 and bool(text.strip())
        return len(self.tokenizer.pre_tokenizer.pre_tokenize_str(text)) == 1


def _between_spaces(text: str, offsets: list[tuple[int, int]], words: list[int | None]) -> list[int | None]:
    """Words that no space separates, as one."""
    found: list[int | None] = []
    word, end = -1, 0
    for (start, stop), old in zip(offsets, words):
        if old is None:
            found.append(None)
            continue
        between = text[end : max(start, end)]
        if word < 0 or between.strip() != between or (stop > start and text[start].isspace()):
            word += 1
        found.append(word)
        end = stop
    return found


def _plain(tokenizer: Any) -> Any:
    """A tokenizers.Tokenizer of its own: padding and truncation are left to whoever asks for a batch."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ElisionError(
            "boundaries of words come from the package tokenizers: pip install tokenizers"
        ) from None

    if isinstance(tokenizer, str | os.PathLike):
        file = Path(tokenizer)
        file = file / "tokenizer.json" if file.is_dir() else file
        try:
            found = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises plain Exception
            raise ElisionError(f"{file}: no tokenizer ({error})") from None
    else:
        inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not isinstance(inner, Tokenizer):
            raise ElisionError(f"a {type(tokenizer).__name__} is no tokenizer that says where words begin")
        found = Tokenizer.from_str(inner.to_str())
    found.no_padding()
    found.no_truncation()
    return found
