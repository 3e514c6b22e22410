"""The text form of pipelines: `name{key=value key=value},name2{...}`, read and printed.

Values: integers, numbers, `true`, `false`, `none`, words (`keys`), strings in double quotes, lists
(`[8,8,4]`). Options are separated by spaces, passes by commas. `format(parse(text))` is the canonical text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from .base import Pass, known_passes
from .errors import PipelineError
from .options import ESCAPES, IDENTIFIER, WORDS, nearest

Passes = str | Pass | type[Pass] | Sequence["str | Pass | type[Pass]"]
"""What users may write: a text, a pass, a pass class (its defaults), or a list of these."""

Made = TypeVar("Made")

_SPACE = re.compile(r"[ \t\r\n]*")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_INTEGER = re.compile(r"[+-]?[0-9]+")
_DEPTH = 16  # of lists; deeper is certainly a mistake, and recursion stays bounded
_DIGITS = 300  # of a number, below Python's own limit on integer texts


def parse(passes: Passes) -> list[Pass]:
    """The passes that a text, a pass object or a list of both describes, in order.

    Raises PipelineError with the position and the nearest known name for anything it does not understand.
    """
    if isinstance(passes, str):
        return read(passes, lambda kind, given: kind(**given))
    if isinstance(passes, Pass):
        return [passes]
    if isinstance(passes, type) and issubclass(passes, Pass):
        return [passes()]
    if isinstance(passes, Sequence) and not isinstance(passes, bytes | bytearray):
        return [single for entry in passes for single in parse(entry)]
    raise PipelineError(f"passes must be a text or a list of passes, not {type(passes).__name__}")


def read(text: str, make: Callable[[type[Pass], dict[str, Any]], Made]) -> list[Made]:
    """What `make` makes of each pass of a text, its class and the options that it is given. Raises PipelineError."""
    return _Reader(text, make).pipeline()


def format(passes: Passes) -> str:
    """The canonical text of a pipeline: the options that were given, in the order in which they were."""
    return ",".join(str(single) for single in parse(passes))


def key(passes: Passes) -> str:
    """A text that differs whenever the passes or any of their options differ, defaults too (cache keys)."""
    return ",".join(single.key() for single in parse(passes))


class _Reader(Generic[Made]):
    """A recursive-descent reader over one text; every complaint carries its position (from 1)."""

    def __init__(self, text: str, make: Callable[[type[Pass], dict[str, Any]], Made]) -> None:
        self.text = text
        self.make = make
        self.last = ""
        self.at = 0

    def fail(self, message: str, at: int | None = None) -> PipelineError:
        place = (self.at if at is None else at) + 1
        return PipelineError(f"pipeline, position {place}: {message}")

    def skip(self) -> str:
        """Step over white space; the next character, "" at the end."""
        match = _SPACE.match(self.text, self.at)
        assert match is not None
        self.at = match.end()
        return self.text[self.at : self.at + 1]

    def take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.at)
        if match is None:
            return ""
        self.at = match.end()
        return match.group()

    def found(self) -> str:
        return repr(self.text[self.at]) if self.at < len(self.text) else "the end of the text"

    def pipeline(self) -> list[Made]:
        passes: list[Made] = []
        if not self.skip():
            return passes
        while True:
            passes.append(self.single())
            char = self.skip()
            if not char:
                return passes
            if char != ",":
                raise self.fail(f"expected ',' or the end after {self.last}, found {self.found()}")
            self.at += 1

    def single(self) -> Made:
        self.skip()
        start = self.at
        name = self.take(_NAME)
        if not name:
            raise self.fail(f"expected the name of a pass, found {self.found()}")
        known = known_passes()
        if name not in known:
            raise self.fail(f"unknown pass {name!r}{nearest(name, known)}", start)
        self.last = name
        given, places = self.options(name) if self.skip() == "{" else ({}, {})
        try:
            return self.make(known[name], given)
        except PipelineError as error:
            # The message names the option (or several) at fault; point at the first of them in the text.
            said = set(_WORD.findall(str(error).removeprefix(f"{name}: ")))
            named = [place for option, place in places.items() if option in said]
            raise self.fail(str(error), (named or [start])[0]) from None

    def options(self, owner: str) -> tuple[dict[str, Any], dict[str, int]]:
        opened = self.at
        self.at += 1
        values: dict[str, Any] = {}
        places: dict[str, int] = {}
        while True:
            before = self.at
            char = self.skip()
            if char == "}":
                self.at += 1
                return values, places
            if not char:
                raise self.fail(f"the '{{' of {owner} is never closed", opened)
            if char == ",":
                raise self.fail("options are separated by spaces, not by ','")
            if values and before == self.at:
                raise self.fail(f"expected a space or '}}' after an option of {owner}, found {self.found()}")
            start = self.at
            option = self.take(_NAME)
            if not option:
                raise self.fail(f"expected an option of {owner} or '}}', found {self.found()}")
            if option in values:
                raise self.fail(f"{owner}: option {option} is given twice", start)
            if self.skip() != "=":
                raise self.fail(f"expected '=' after option {option} of {owner}, found {self.found()}")
            self.at += 1
            places[option] = start
            values[option] = self.value(option)

    def value(self, option: str, depth: int = 0) -> Any:
        char = self.skip()
        start = self.at
        if char == "[":
            return self.list(option, depth)
        if char == '"':
            return self.string()
        word = self.take(IDENTIFIER)
        if word:
            return WORDS.get(word, word)
        number = self.take(_NUMBER)
        if not number:
            raise self.fail(f"expected a value for option {option}, found {self.found()}")
        if self.take(IDENTIFIER):
            raise self.fail(f"{self.text[start : self.at]!r} is neither a number nor a word", start)
        if len(number) > _DIGITS:
            raise self.fail(f"the number for option {option} is too long", start)
        return int(number) if _INTEGER.fullmatch(number) else float(number)

    def list(self, option: str, depth: int) -> list[Any]:
        if depth >= _DEPTH:
            raise self.fail(f"lists of option {option} are nested too deeply")
        opened = self.at
        self.at += 1
        items: list[Any] = []
        if self.skip() == "]":
            self.at += 1
            return items
        while True:
            items.append(self.value(option, depth + 1))
            char = self.skip()
            self.at += 1
            if char == "]":
                return items
            if not char:
                raise self.fail(f"the '[' of option {option} is never closed", opened)
            if char != ",":
                raise self.fail(
                    f"expected ',' or ']' in the list of option {option}, found {char!r}", self.at - 1
                )

    def string(self) -> str:
        opened = self.at
        self.at += 1
        chars: list[str] = []
        while self.at < len(self.text):
            char = self.text[self.at]
            self.at += 1
            if char == '"':
                return "".join(chars)
            if char == "\\":
                escape = self.text[self.at : self.at + 1]
                if escape not in ESCAPES or not escape:
                    raise self.fail(f"unknown escape '\\{escape}' in a string", self.at - 1)
                char = ESCAPES[escape]
                self.at += 1
            chars.append(char)
        raise self.fail("a string is never closed", opened)
