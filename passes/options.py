"""Options of a pass: checked against the annotations of a frozen dataclass, and their text form."""

from __future__ import annotations

import difflib
import math
import numbers
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, Union, get_args, get_origin

from .errors import PipelineError

IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
WORDS: dict[str, Any] = {"true": True, "false": False, "none": None}
ESCAPES = {"\\": "\\", '"': '"', "n": "\n", "t": "\t", "r": "\r"}


class _Mismatch(Exception):
    """A value does not fit an annotation."""


def nearest(word: str, known: Iterable[str]) -> str:
    """ " did you mean ...?" and the known names, as the tail of a message."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (known: {', '.join(known)})" if known else f"{hint} (none are known)"


def make_options(owner: str, cls: type, values: Mapping[str, Any]) -> Any:
    """`cls(**values)` with every value checked and converted to its annotation.

    Lists and tuples become what the annotation says; an int is accepted for a float. A ValueError or
    TypeError from `__post_init__` becomes a PipelineError; a PipelineError of its own gets the pass's name.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            if not known:
                raise PipelineError(f"{owner}: unknown option {name!r}; this pass has no options")
            raise PipelineError(f"{owner}: unknown option {name!r}{nearest(name, known)}")
        try:
            given[name] = convert(value, hints[name])
        except _Mismatch:
            raise PipelineError(
                f"{owner}: option {name} must be {describe(hints[name])}, not {_shown(value)}"
                f"{_near_choice(value, hints[name])}"
            ) from None
    for name, entry in known.items():
        if entry.init and entry.default is MISSING and entry.default_factory is MISSING and name not in given:
            raise PipelineError(f"{owner}: option {name} is required ({describe(hints[name])})")
    try:
        return cls(**given)
    except (PipelineError, ValueError, TypeError) as error:
        text = " ".join(str(error).split())
        raise PipelineError(text if text.startswith(f"{owner}:") else f"{owner}: {text}") from None


def convert(value: Any, hint: Any) -> Any:
    """`value` as the annotation `hint` wants it. Raises _Mismatch."""
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _first_fit(value, get_args(hint))
    if origin is Literal:
        for choice in get_args(hint):
            if type(choice) is type(value) and choice == value:
                return choice
        raise _Mismatch
    if hint is None or hint is type(None):
        if value is None:
            return None
        raise _Mismatch
    if (origin or hint) in (list, tuple):
        return _sequence(value, origin or hint, get_args(hint))
    is_bool = isinstance(value, bool) or type(value).__name__ == "bool_"
    if hint is bool and is_bool:
        return bool(value)
    if hint is int and isinstance(value, numbers.Integral) and not is_bool:
        return int(value)
    if hint is float and isinstance(value, numbers.Real) and not is_bool:
        return _finite(value)
    if hint is str and isinstance(value, str):
        return value
    raise _Mismatch


def _first_fit(value: Any, choices: tuple[Any, ...]) -> Any:
    # Exact types first, so that `int | float` keeps an int an int whatever their order.
    exact = [c for c in choices if isinstance(c, type) and type(value) is c]
    for choice in [*exact, *choices]:
        try:
            return convert(value, choice)
        except _Mismatch:
            continue
    raise _Mismatch


def _sequence(value: Any, kind: type, args: tuple[Any, ...]) -> Any:
    if not isinstance(value, list | tuple):
        raise _Mismatch
    if kind is tuple and args and args[-1] is not Ellipsis:
        if len(value) != len(args):
            raise _Mismatch
        return tuple(convert(v, a) for v, a in zip(value, args))
    item = args[0] if args else Any
    return kind(convert(v, item) for v in value)


def _finite(value: Any) -> float:
    try:
        number = float(value)
    except OverflowError:
        raise _Mismatch from None
    if not math.isfinite(number):
        raise _Mismatch
    return number


def describe(hint: Any) -> str:
    """An annotation in plain words, for messages and tables."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin is Literal:
        return "one of " + ", ".join(format_value(a) for a in args)
    if (origin or hint) in (list, tuple):
        if (origin or hint) is tuple and args and args[-1] is not Ellipsis:
            return f"a list of {len(args)} ({', '.join(describe(a) for a in args)})"
        return f"a list (each {describe(args[0])})" if args else "a list"
    plain = {int: "an integer", float: "a number", bool: "true or false", str: "a word", type(None): "none"}
    return plain.get(hint, str(hint))


def _shown(value: Any) -> str:
    try:
        text = format_value(value)
    except PipelineError:
        text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def _near_choice(value: Any, hint: Any) -> str:
    args = [hint] if get_origin(hint) is Literal else get_args(hint)
    words = [str(c) for a in args if get_origin(a) is Literal for c in get_args(a)]
    close = difflib.get_close_matches(str(value), words, n=1, cutoff=0.5) if words else []
    return f"; did you mean {close[0]}?" if close else ""


def format_value(value: Any) -> str:
    """The canonical text of an option's value. PipelineError for what the text form cannot say."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return repr(value)
    if isinstance(value, str):
        if IDENTIFIER.fullmatch(value) and value not in WORDS:
            return value
        back = {char: escape for escape, char in ESCAPES.items()}
        return '"' + "".join(f"\\{back[c]}" if c in back else c for c in value) + '"'
    if isinstance(value, list | tuple):
        return "[" + ",".join(format_value(v) for v in value) + "]"
    raise PipelineError(f"an option cannot hold {' '.join(repr(value).split())}")


def check_share(name: str, value: float) -> None:
    """Raises PipelineError for what is neither a share of the tokens (up to 1) nor a number of them (2 and more)."""
    if not (math.isfinite(value) and value > 0 and (value <= 1 or value == int(value))):
        raise PipelineError(
            f"{name} is a share of the tokens above 0 and up to 1, or a number of them, not {value}"
        )


def default_text(entry: Field[Any]) -> str | None:
    """The canonical text of a field's default; None where it must be given."""
    if entry.default is not MISSING:
        return format_value(entry.default)
    return format_value(entry.default_factory()) if entry.default_factory is not MISSING else None


def option_help(cls: type) -> dict[str, str]:
    """What the docstring of an options class says about each option, without the last full stop.

    An option is told about where a sentence begins with its name, between backticks or before a colon, as in "`r`:
    tokens to remove."; several names before one colon share what is said. An option of which nothing is said has "".
    """
    known = [f.name for f in fields(cls)]
    if not known:
        return {}
    text = " ".join((cls.__doc__ or "").split())
    word = f"(?:{'|'.join(map(re.escape, known))})"
    start = re.compile(rf"(?:^|(?<=[.;] ))(?:(`?{word}`?(?:(?:, | and )`?{word}`?)*): |(`{word}`),? )")
    found = list(start.finditer(text))
    told = dict.fromkeys(known, "")
    for here, after in zip(found, [*found[1:], None]):
        said = text[here.end() : after.start() if after else None].strip().rstrip(".;")
        for option in re.split(r", | and ", (here[1] or here[2]).replace("`", "")):
            told[option] = told[option] or said
    return told
