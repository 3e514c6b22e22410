"""The text form: round trips, typed options, and one clear line for every mistake."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
from elision.passes import base
from elision.passes.base import Outcome, Pass, PassContext, known_passes, register
from elision.passes.errors import ElisionError, PipelineError
from elision.passes.ir.graph import Graph
from elision.passes.options import describe, format_value
from elision.passes.pipeline import format, key, parse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


class Idle(Pass):
    def run(self, graph: Graph, context: PassContext) -> Outcome:
        return Outcome()


class Reduce(Idle):
    name = "reduce-tokens"
    summary = "for tests"

    @dataclass(frozen=True)
    class Options:
        r: int | tuple[int, ...] = 8
        ratio: float | None = None
        metric: Literal["keys", "hidden"] = "keys"
        proportional: bool = True
        label: str = ""
        grid: tuple[int, int] = (2, 2)
        names: list[str] | None = None
        level: Literal[1, 2] = 1

        def __post_init__(self) -> None:
            counts = self.r if isinstance(self.r, tuple) else (self.r,)
            if min(counts, default=0) < 0:
                raise PipelineError(f"option r must not be negative, not {self.r}")
            if self.ratio is not None and not 0 <= self.ratio < 1:
                raise ValueError(f"option ratio must be at least 0 and below 1, not {self.ratio}")


class Plain(Idle):
    name = "plain"


class Needy(Idle):
    name = "needy"

    @dataclass(frozen=True)
    class Options:
        size: int


@pytest.fixture(autouse=True)
def passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_REGISTRY", {c.name: c for c in (Reduce, Plain, Needy)})
    monkeypatch.setattr(base, "BUILTIN", ())


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("", ""),
        ("  ", ""),
        ("plain", "plain"),
        ("plain{}", "plain"),
        (" plain , plain ", "plain,plain"),
        ("reduce-tokens{r=16}", "reduce-tokens{r=16}"),
        ("reduce-tokens{r=8}", "reduce-tokens{r=8}"),  # a default that was written stays written
        ("reduce-tokens{r = [8, 8,4]}", "reduce-tokens{r=[8,8,4]}"),
        ("reduce-tokens{r=[]}", "reduce-tokens{r=[]}"),
        (
            "reduce-tokens{  metric=hidden ratio=.5\nproportional=false }",
            "reduce-tokens{metric=hidden ratio=0.5 proportional=false}",
        ),
        ("reduce-tokens{ratio=0}", "reduce-tokens{ratio=0.0}"),
        ("reduce-tokens{ratio=none names=none}", "reduce-tokens{ratio=none names=none}"),
        ('reduce-tokens{label="a b,}"}', 'reduce-tokens{label="a b,}"}'),
        ('reduce-tokens{label="word"}', "reduce-tokens{label=word}"),
        ('reduce-tokens{label="true"}', 'reduce-tokens{label="true"}'),
        ('reduce-tokens{label="\\"\\\\\\n"}', 'reduce-tokens{label="\\"\\\\\\n"}'),
        ("reduce-tokens{grid=[2,4] level=2}", "reduce-tokens{grid=[2,4] level=2}"),
        ('reduce-tokens{names=[a,"b c"]},plain', 'reduce-tokens{names=[a,"b c"]},plain'),
    ],
)
def test_canonical_text(text: str, canonical: str) -> None:
    assert format(parse(text)) == canonical
    assert format(parse(canonical)) == canonical


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "reduce-token",
            "position 1: unknown pass 'reduce-token'; did you mean 'reduce-tokens'? "
            "(known: needy, plain, reduce-tokens)",
        ),
        (
            "plain,reduce-tokens{ratoi=1}",
            "position 21: reduce-tokens: unknown option 'ratoi'; did you mean 'ratio'? "
            "(known: r, ratio, metric, proportional, label, grid, names, level)",
        ),
        ("plain{x=1}", "position 7: plain: unknown option 'x'; this pass has no options"),
        ("needy", "position 1: needy: option size is required (an integer)"),
        ("reduce-tokens{r=-1}", "position 15: reduce-tokens: option r must not be negative, not -1"),
        (
            "reduce-tokens{r=1 ratio=1.5}",
            "position 19: reduce-tokens: option ratio must be at least 0 and below 1, not 1.5",
        ),
        (
            "reduce-tokens{r=2.5}",
            "position 15: reduce-tokens: option r must be an integer or a list (each an integer), not 2.5",
        ),
        ("reduce-tokens{proportional=1}", "option proportional must be true or false, not 1"),
        ("reduce-tokens{r=true}", "option r must be an integer or a list (each an integer), not true"),
        (
            "reduce-tokens{metric=key}",
            "option metric must be one of keys, hidden, not key; did you mean keys?",
        ),
        ("reduce-tokens{level=3}", "option level must be one of 1, 2, not 3"),
        ("reduce-tokens{grid=[2]}", "option grid must be a list of 2 (an integer, an integer), not [2]"),
        ("reduce-tokens{ratio=1e999}", "option ratio must be a number or none, not inf"),
        ("reduce-tokens{r=1", "position 14: the '{' of reduce-tokens is never closed"),
        ("reduce-tokens{r=[1", "position 17: the '[' of option r is never closed"),
        ('reduce-tokens{label="a', "position 21: a string is never closed"),
        ("reduce-tokens{r=1,ratio=1}", "position 18: options are separated by spaces, not by ','"),
        ("reduce-tokens{r=1 r=2}", "position 19: reduce-tokens: option r is given twice"),
        ("reduce-tokens{r}", "position 16: expected '=' after option r of reduce-tokens, found '}'"),
        ("reduce-tokens{r=}", "position 17: expected a value for option r, found '}'"),
        ("reduce-tokens{r=1x}", "position 17: '1x' is neither a number nor a word"),
        ("reduce-tokens{r=" + "9" * 5000 + "}", "position 17: the number for option r is too long"),
        ("reduce-tokens{r=" + "[" * 5000 + "}", "lists of option r are nested too deeply"),
        ("plain,", "position 7: expected the name of a pass, found the end of the text"),
        ("plain plain", "position 7: expected ',' or the end after plain, found 'p'"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(PipelineError) as caught:
        parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_objects_texts_and_classes_mix() -> None:
    mixed = parse(["plain", Reduce(r=4), Plain, "plain,reduce-tokens{ratio=0.5}"])
    assert format(mixed) == "plain,reduce-tokens{r=4},plain,plain,reduce-tokens{ratio=0.5}"
    assert format(Plain()) == "plain"


@pytest.mark.parametrize("wrong", [3, None, b"plain", ["plain", 3], {"plain": 1}.values()])
def test_other_things_are_refused(wrong: Any) -> None:
    with pytest.raises(PipelineError):
        parse(wrong)


def test_python_values_are_checked_like_texts() -> None:
    assert Reduce(r=np.int64(4)).options.r == 4
    assert Reduce(r=[1, 2]).options.r == (1, 2)
    assert type(Reduce(ratio=0).options.ratio) is float
    with pytest.raises(PipelineError, match="reduce-tokens: option r must be an integer"):
        Reduce(r=object())


def test_equality_and_keys_cover_defaults() -> None:
    assert Reduce() == Reduce(r=8)
    assert hash(Reduce()) == hash(Reduce(r=8))
    assert key([Reduce()]) == key("reduce-tokens{r=8}")
    assert key([Reduce()]) != key([Reduce(proportional=False)])
    assert str(Reduce()) != str(Reduce(r=8))  # the text stays as the user wrote it


def test_registering() -> None:
    @register
    class New(Idle):
        name = "new"

    assert known_passes()["new"] is New

    class Other(Idle):
        name = "new"

    with pytest.raises(PipelineError, match="two passes are called 'new'"):
        register(Other)
    with pytest.raises(PipelineError, match="has no name"):
        register(Idle)


def test_describe() -> None:
    assert describe(int | None) == "an integer or none"


# The first text that hypothesis draws builds a table of all of Unicode, which counts as slow.
patient = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])


# ---- laws ---------------------------------------------------------------------------------------------
numbers = st.integers(0, 10**6)
reductions = st.fixed_dictionaries(
    {},
    optional={
        "r": numbers | st.lists(numbers, max_size=5),
        "ratio": st.none() | st.floats(0, 1, exclude_max=True),
        "metric": st.sampled_from(["keys", "hidden"]),
        "proportional": st.booleans(),
        "label": st.text(max_size=12),
        "grid": st.tuples(numbers, numbers),
        "names": st.none() | st.lists(st.text(max_size=6), max_size=3),
    },
)
pipelines = st.lists(
    reductions.map(lambda o: Reduce(**o)) | st.integers().map(lambda n: Needy(size=n)) | st.builds(Plain),
    max_size=4,
)


@patient
@given(pipelines)
def test_parse_inverts_format(passes: list[Pass]) -> None:
    text = format(passes)
    again = parse(text)
    assert again == passes
    assert format(again) == text
    assert [p.given for p in again] == [p.given for p in passes]


@patient
@given(st.data(), pipelines)
def test_mutated_texts_give_only_pipeline_errors(data: st.DataObject, passes: list[Pass]) -> None:
    text = format(passes)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 3))
        text = text[:at] + data.draw(st.text('{}[],="\\ -.e0aé', max_size=3)) + text[at + cut :]
    try:
        again = parse(text)
    except PipelineError as error:
        assert str(error).startswith("pipeline, position ")
        assert "\n" not in str(error)
    else:
        assert parse(format(again)) == again


@patient
@given(st.text(max_size=40))
def test_arbitrary_texts_give_only_elision_errors(text: str) -> None:
    try:
        parse(text)
    except ElisionError:
        return
    assert text.strip(" \t\r\n") == "" or "plain" in text or "tokens" in text


@patient
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_keep_every_bit(number: float) -> None:
    assert float(format_value(number)) == number
