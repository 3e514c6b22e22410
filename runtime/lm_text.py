"""Text and ids: encoding prompts, and turning ids into text while they come, complete characters only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..passes.errors import ElisionError, ModelFileError

BROKEN = "\ufffd"
"""What decoders put where bytes are no UTF-8 (yet)."""


class Text:
    """A tokenizer of transformers, as much of it as decoding needs.

    vocabulary: how many ids the model knows; ids from there on are an error. Raises ModelFileError where the tokenizer
    has more words than the model: it belongs to another one."""

    def __init__(self, tokenizer: Any, vocabulary: int, where: str = "the tokenizer") -> None:
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
        known = int(tokenizer.vocab_size)
        if known > vocabulary:
            raise ModelFileError(
                f"{where} has {known} words, the model knows {vocabulary} ids: a tokenizer of another model"
            )

    def encode(self, prompt: str, *, chat: bool = False, system: str | None = None) -> list[int]:
        """The ids of a prompt, special ones as the tokenizer adds them; `chat`: as what a user says, in the model's
        own chat template. Raises ElisionError where there is no template, or ids lie outside the vocabulary."""
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ElisionError("the prompt has half a surrogate pair in it, which is no text") from None
        if chat:
            return self.checked(self._chat(prompt, system))
        return self.checked(list(self.tokenizer(prompt)["input_ids"]))

    def _chat(self, prompt: str, system: str | None) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ElisionError("the model has no chat template: leave --chat away")
        said = [] if system is None else [{"role": "system", "content": system}]
        said.append({"role": "user", "content": prompt})
        try:
            text = self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise errors of jinja2, and whatever they say themselves
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise ElisionError(f"the chat template does not take this prompt ({line})") from error
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def checked(self, ids: Sequence[int]) -> list[int]:
        return check_ids(ids, self.vocabulary)

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special ids."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def stream(self, stops: Sequence[str] = ()) -> Stream:
        return Stream(self, stops)


def encoded(
    text: Text | None, vocabulary: int, prompt: Any, *, chat: bool = False, system: str | None = None
) -> list[int]:
    """The ids of a prompt, a text or ids already. text: None where there is no tokenizer. Raises ElisionError."""
    if not isinstance(prompt, str):
        return check_ids(prompt, vocabulary)
    if text is None:
        raise ElisionError("the model came without a tokenizer: give token ids, or a tokenizer")
    return text.encode(prompt, chat=chat, system=system)


def check_ids(ids: Sequence[int], vocabulary: int) -> list[int]:
    """The ids as integers. Raises ElisionError for one that the model does not know."""
    plain = [int(item) for item in ids]
    for item in plain:
        if not 0 <= item < vocabulary:
            raise ElisionError(f"token id {item} is out of range: the model knows 0 to {vocabulary - 1}")
    return plain


class Stream:
    """Text of one sequence while its ids come. What was given out once stays: pieces hold whole characters, and no
    part of a stop string. `text` is all of it, `stopped` whether a stop string came."""

    def __init__(self, text: Text | None, stops: Sequence[str] = ()) -> None:
        self._text = text
        self._stops = [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._start = self._read = (
            0  # ids[start:read] were given out; they are decoded again with what follows
        )
        self._held = ""  # characters that may be the beginning of a stop string
        self.text = ""
        self.stopped = False

    @property
    def watching(self) -> bool:
        """Whether there are stop strings: then each id must be pushed by itself, to know which one was the last."""
        return bool(self._stops)

    def push(self, *tokens: int) -> str:
        """The text that is certain now that these ids came too; mostly a word for each, sometimes nothing."""
        self._ids += tokens
        return self._release(self._characters(last=False), last=False)

    def finish(self) -> str:
        """What was held back, at the end of the sequence."""
        return self._release(self._characters(last=True), last=True)

    def _characters(self, *, last: bool) -> str:
        """What the ids not given out yet add. The ones before are decoded too, because a word can look different at
        the beginning of a text (after Hugging Face's text-generation-inference, decode_token)."""
        if self._text is None or self._read == len(self._ids):
            return ""
        before = self._text.decode(self._ids[self._start : self._read])
        whole = self._text.decode(self._ids[self._start :])
        if not last and (len(whole) <= len(before) or whole.endswith(BROKEN)):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return whole[len(before) :]

    def _release(self, new: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        pending = self._held + new
        places = [place for place in (pending.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self.stopped, self._held = True, ""
            return self._give(pending[: min(places)])
        keep = 0 if last else max((_overlap(pending, stop) for stop in self._stops), default=0)
        self._held = pending[len(pending) - keep :]
        return self._give(pending[: len(pending) - keep])

    def _give(self, piece: str) -> str:
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
