"""Random pipelines over small models: each works as a whole, or says in one sentence which pass does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from elision.passes import known_passes
from elision.passes.errors import NothingMatched, PipelineError, Refused
from elision.passes.pipeline import parse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .zoo.composition_models import HOSTS, SUBJECTS, attempt, made

SMALL = ("bert", "llama", "internvl")
"""Models of the fast run."""


def some(name: str, **options: Any) -> st.SearchStrategy[str]:
    """A pass with some of its options, each from a strategy of texts."""

    @st.composite
    def text(draw: Any) -> str:
        chosen = [(key, draw(values)) for key, values in options.items() if draw(st.booleans())]
        inner = " ".join(f"{key}={value}" for key, value in chosen)
        return f"{name}{{{inner}}}" if inner else name

    return text()


def of(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


PASSES: dict[str, st.SearchStrategy[str]] = {
    "token-merge": st.builds(
        "token-merge{{r={} where={} order={}}}".format,
        of(1, 2, 4, 30),
        of("after", "before", "around"),
        of("published", "original"),
    ),
    "token-drop": some(
        "token-drop",
        policy=of("uniform", "tail", "random", "cls-topk", "similarity", "hired", "visionzip", "fastv"),
        budget=of(0.3, 0.5, 6),
        positions=of("keep", "compact"),
        outputs=of("restore", "kept"),
    ),
    "segment-merge": some(
        "segment-merge",
        layer=of(0, 1, 2, -1),
        strategy=of("average", "learned"),
        capacity=of(0.6, 8, "dynamic"),
        overflow=of("share", "nan"),
    ),
    "token-gate": some(
        "token-gate",
        layer=of(0, 1, 2),
        capacity=of(0.4, 0.7, 9),
        mode=of("hard", "soft"),
        softmax1=of("true"),
    ),
    "dynamic-vocab": some("dynamic-vocab", rows=of(0, 5), per_text=of("true")),
    "image-ids": some("image-ids"),
    "extra-embeddings": some("extra-embeddings", count=of(1, 4)),
    "skip-layers": some("skip-layers", share=of(0.0, 0.34, 0.5), layers=of("1", '"1-2"')),
    "quantize": some(
        "quantize",
        bits=of(4, 8, 16),
        group=of(16, 32),
        method=of("rtn", "mse"),
        symmetric=of("true", "false"),
        head_bits=of(4, 8, 16, 32),
    ),
    "incremental": some("incremental", capacity=of(96, 128)),
    "window": some("window", capacity=of(48, 64)),
    "key-scores": some("key-scores"),
    "taps": some("taps", where=of("last", "0", '"last,1"')),
    "head": some("head", k=of(1, 4), beside=of("true"), spread=of("true")),
    "keep-rows": some("keep-rows"),
    "fix-rows": some("fix-rows", dtype=of("float32", "bfloat16")),
    "lower": some("lower"),
}

ZERO = ("token-merge{r=0}", "token-merge{ratio=0.0}", "token-drop{budget=1.0}", "token-gate{capacity=1.0}",
        "skip-layers{share=0.0}", "quantize{bits=32}")  # fmt: skip
"""Lossy passes with nothing to lose."""


@st.composite
def pipelines(draw: Any, name: str, most: int) -> str:
    """Up to `most` passes, most of which apply to the model `name` by themselves."""
    fitting = st.sampled_from(sorted(SUBJECTS[name].passes))
    names = draw(st.lists(fitting | fitting | st.sampled_from(sorted(PASSES)), min_size=1, max_size=most))
    return ",".join(draw(PASSES[single]) for single in names)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("random")


def holds(name: str, host: str, folder: Path, passes: str) -> bool:
    """Whether a pipeline works on a model; checks what must be so either way."""
    found = made(SUBJECTS[name], host, folder)
    before = found.graph.text()
    try:
        report = attempt(SUBJECTS[name], host, folder, passes)
    except (Refused, NothingMatched, PipelineError) as error:
        said = str(error)
        assert "\n" not in said and len(said) < 600
        if error.failed is not None:
            assert said.startswith(error.failed.name), said
            assert error.reproducer is not None
        return False
    finally:
        assert found.graph.text() == before
    for single in report.passes:
        # Whatever was made of it: an output that has no counterpart, as kept tokens have none, is not compared.
        if single.changed and not single.exact and "kept" not in single.text:
            assert single.drift, f"{single.text}: {single.notes}"
        for drift in single.drift or []:
            assert drift.finite
    old, new = ([(v.name, v.dtype) for v in g.outputs] for g in (found.graph, report.graph))
    if (
        "skip-layers" in passes
    ):  # the caches of a layer go with it: what is left is known by its name, or comes first
        old = [old[0], *(one for one in old[1:] if one in new)]
        new = [new[0], *(one for one in new[1:] if one in old)]
    for (_, before_dtype), (_, after_dtype) in zip(old, new):
        assert before_dtype == after_dtype
    return True


def check_zero(name: str, host: str, folder: Path, passes: list[str]) -> None:
    """Budgets of zero are the identity, bit for bit: the very graph comes back."""
    found = made(SUBJECTS[name], host, folder)
    report = attempt(SUBJECTS[name], host, folder, ",".join(passes))
    assert not report.changed and report.graph is found.graph


def check_zero_beside(name: str, host: str, folder: Path, exact: str, zero: str) -> None:
    """... and next to an exact pass they move no bit of what that makes."""
    found = made(SUBJECTS[name], host, folder)
    alone, beside = (attempt(SUBJECTS[name], host, folder, p) for p in (exact, f"{zero},{exact},{zero}"))
    for one, other in zip(found.runner(alone.graph), found.runner(beside.graph), strict=True):
        np.testing.assert_array_equal(one, other)


FAST = settings(
    max_examples=4, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
MANY = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


def test_every_pass_is_drawn() -> None:
    own = {name for name, kind in known_passes().items() if kind.__module__.startswith("elision.passes")}
    assert set(PASSES) | {"normalise"} == own
    assert {parse(text)[0].name for text in ZERO} == {
        name for name, kind in known_passes().items() if name in PASSES and not kind.exact
    } - {"segment-merge", "head"}


@pytest.mark.parametrize("name", SMALL)
def test_a_pipeline_works_or_says_why_not(name: str, folder: Path) -> None:
    @FAST
    @given(pipelines(name, 3))
    def check(passes: str) -> None:
        holds(name, "torch", folder, passes)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", SUBJECTS)
def test_pipelines_work_or_say_why_not(name: str, host: str, folder: Path) -> None:
    @MANY
    @given(pipelines(name, 4))
    def check(passes: str) -> None:
        holds(name, host, folder, passes)

    check()


@pytest.mark.parametrize("name", SMALL)
def test_zero_budgets_are_the_identity(name: str, folder: Path) -> None:
    @FAST
    @given(st.permutations([zero for zero in ZERO if parse(zero)[0].name in SUBJECTS[name].passes]))
    def check(passes: list[str]) -> None:
        check_zero(name, "torch", folder, passes)

    check()
    check_zero_beside(name, "torch", folder, "fix-rows", "quantize{bits=32}")


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", SUBJECTS)
def test_zero_budgets_are_the_identity_everywhere(name: str, host: str, folder: Path) -> None:
    fitting = [zero for zero in ZERO if parse(zero)[0].name in SUBJECTS[name].passes]
    check_zero(name, host, folder, fitting)
    for zero in fitting:
        check_zero_beside(name, host, folder, "fix-rows", zero)
