"""elision tune: the search on problems whose answer is known, on a toy model, and what the command says."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from elision.passes.base import Outcome, Pass, register
from elision.passes.errors import ElisionError, PipelineError, Refused
from elision.passes.tunable import Knob, sketches
from elision.runtime import search_data
from elision.runtime.search_bench import Built, Stopwatch, summary
from elision.runtime.search_data import Goal, calls_of, split
from elision.runtime.search_run import Search
from elision.runtime.search_space import Space
from hypothesis import given, settings
from hypothesis import strategies as st

import elision

from ..analysis import toys
from .test_cli import run, said

PLACES = 5


@register
class Merge(Pass):
    """Declares what a search may set; what it would do is told by `Problem`."""

    name = "toy-tunable"
    summary = "Can be tuned, for tests."

    @dataclass(frozen=True)
    class Options:
        r: int | list[int]
        taste: str | list[str] = "a"
        whole: str = "x"

    @classmethod
    def tunable(cls, graph, given):
        return [
            Knob("r", tuple(range(21)), PLACES, neutral=True),
            Knob("taste", ("a", "b"), PLACES, ordered=False),
            Knob("whole", ("x", "y"), ordered=False),
        ]

    def run(self, graph, context):
        return Outcome()


class Watch(Stopwatch):
    """Time that stands still but for what is run, and runs take what they are estimated to take."""

    time = 0.0

    def now(self) -> float:
        return self.time

    def seconds(self, built: Built, call: Any) -> float:
        self.time += built.cost
        return built.cost


class Problem:
    """In place of a workbench: the root of the loss is a sum over places, of which each also saves time."""

    def __init__(self, dear: np.ndarray, saves: np.ndarray, rough: float = 0.0) -> None:
        self.dear, self.saves, self.rough, self.built = dear, saves, rough, 0

    def numbers(self, passes: list[Pass]) -> tuple[float, float]:
        root = time = 0.0
        for single in passes:
            options: Any = single.options
            r = options.r if isinstance(options.r, list) else [options.r] * PLACES
            taste = options.taste if isinstance(options.taste, list) else [options.taste] * PLACES
            factor = np.array([0.8 if t == "b" and i % 2 else 1.0 for i, t in enumerate(taste)])
            root += float(self.dear @ (np.array(r) * factor))
            root *= 1 + self.rough * math.sin(7 * sum(r) + r[0])
            time += float(self.saves @ np.array(r))
        return 1 - root**2, 1 - time

    def original(self) -> Built:
        return Built(lambda call: [np.array([1.0])], 1.0, 1.0)

    def estimate(self, passes: list[Pass]) -> Any:
        return SimpleNamespace(seconds=self.numbers(passes)[1])

    def build(self, text: str, passes: list[Pass]) -> Built:
        self.built += 1
        quality, time = self.numbers(passes)
        return Built(lambda call: [np.array([quality - call["shift"]])], time, time)


def searched(problem: Problem, bound: float, tries: int = 40, seed: int = 0, shift: float = 0.0):
    goal = Goal.of(lambda reference, found: float(found[0][0]), bound, None)
    calls = [{"shift": np.array(0.0)}]
    held = [{"shift": np.array(shift)}]
    space = Space("toy-tunable", None)  # type: ignore[arg-type]
    search = Search(space, problem, goal, calls, held, Watch(), 1e9, tries, seed, lambda _: None)  # type: ignore[arg-type]
    judged = search.judge(search.schedules(search.constants()))
    return search, judged


numbers = st.lists(st.floats(0.2, 3.0), min_size=PLACES, max_size=PLACES).map(np.array)


@settings(max_examples=15, deadline=None)
@given(numbers, numbers, st.floats(0.9, 0.995), st.integers(0, 3))
def test_law_the_bound_is_kept_and_the_front_is_not_dominated(dear, saves, bound, seed):
    problem = Problem(dear * 3e-3, saves * 2e-3, rough=0.05)
    search, judged = searched(problem, bound, tries=25, seed=seed)
    for trial in (judged.chosen, judged.constant):
        assert trial is not None and trial.quality >= bound and (trial.held_out or 0) >= bound
        assert trial.quality == pytest.approx(problem.numbers(search.space.passes(trial.point))[0])
    assert judged.chosen.ratio <= judged.constant.ratio + 1e-12
    result = elision.TuneResult(
        search.goal,
        judged.chosen,
        judged.constant,
        judged.race,
        list(search.trials.values()),
        1.0,
        1.0,
        1,
        1,
        1,
        1.0,
    )
    front = result.front
    assert front and all(t.ratio is not None for t in front)
    for a, b in pairwise(front):
        assert a.ratio < b.ratio and a.quality < b.quality  # slower is better, else it would not be there
    again, other = searched(Problem(dear * 3e-3, saves * 2e-3, rough=0.05), bound, tries=25, seed=seed)
    assert list(again.trials) == list(search.trials) and other.chosen.text == judged.chosen.text


def test_a_schedule_beats_the_best_constant():
    # Place 1 is dear and saves nothing; taste b helps at odd places.
    dear = np.array([1.0, 6.0, 1.0, 1.0, 1.0]) * 2e-3
    saves = np.array([5.0, 0.1, 3.0, 2.0, 1.0]) * 2e-3
    search, judged = searched(Problem(dear, saves), 0.985, tries=60)
    assert judged.constant is not None and judged.constant.kind == "constant"
    assert judged.race is not None and judged.race.ratio < 0.93
    r = search.space.passes(judged.chosen.point)[0].options.r
    assert r[1] <= 1 and r[0] >= max(r[2:])


def test_what_does_not_hold_on_held_out_calls_is_not_chosen():
    problem = Problem(np.full(PLACES, 2e-3), np.full(PLACES, 1e-2))
    _, free = searched(problem, 0.98)
    _, judged = searched(problem, 0.98, shift=0.01)
    assert judged.chosen.held_out >= 0.98 and judged.chosen.quality >= 0.99
    assert judged.chosen.cost > free.chosen.cost
    with pytest.raises(ElisionError, match=r"no pipeline keeps .* on the data that was held out: the best"):
        searched(problem, 0.98, shift=0.5)


def test_the_constant_to_beat_is_the_fastest_that_keeps_both_bounds():
    """Also where the search allows itself less than the bound does."""
    search, free = searched(Problem(np.full(PLACES, 2e-3), np.full(PLACES, 1e-2)), 0.98)
    slower = [
        t for t in search.trials.values() if t.kind == "constant" and t.cost > free.constant.cost and t.kept
    ]
    search.allowed = min(search.loss(t.quality) for t in slower)
    judged = search.judge(free.chosen)
    assert judged.constant is free.constant and judged.chosen.ratio <= free.constant.ratio + 1e-12


def test_a_bound_that_nothing_reaches():
    with pytest.raises(ElisionError, match=r"no pipeline can reach .* at least 1.5: the model itself has 1"):
        searched(Problem(np.ones(PLACES), np.ones(PLACES)), 1.5)
    with pytest.raises(
        ElisionError, match=r"no pipeline keeps .* at least 0.99 on the data: the best of \d+ has"
    ):
        searched(Problem(np.ones(PLACES), np.full(PLACES, 1e-3)), 0.99, tries=12)


# ---- the space ----------------------------------------------------------------------------------------
def test_points_and_texts():
    space = Space("toy-tunable", None)  # type: ignore[arg-type]
    assert space.text(space.start) == ""
    point = (3,) * PLACES + (0,) * PLACES + (0,)
    assert space.text(point) == "toy-tunable{r=3}" and space.is_constant(point)
    point = (3, 0, 1, 2, 3, 0, 1, 1, 0, 0, 1)
    assert space.text(point) == "toy-tunable{r=[3,0,1,2,3] taste=[a,b,b,a,a] whole=y}"
    settled = space.settled(point)
    assert settled == (3, 0, 1, 2, 3, 0, 0, 1, 0, 0, 1)  # a taste of where nothing is done is none
    assert space.settled((0,) * PLACES + (1,) * PLACES + (1,)) == space.start
    assert len(list(space.lines())) == 4


def test_what_is_said_is_not_searched():
    space = Space("toy-tunable{taste=b}", None)  # type: ignore[arg-type]
    assert [knob.option for _, knob in space.knobs] == ["r", "whole"]
    with pytest.raises(Refused, match="nothing to tune: toy-tunable has no open option"):
        Space("toy-tunable{r=3}", None)  # type: ignore[arg-type]
    with pytest.raises(Refused, match="nothing to tune: no pass was named"):
        Space("", None)  # type: ignore[arg-type]


def test_open_pipelines_are_read_like_others():
    merge, other = sketches("token-merge{metric=hidden},lower")
    assert str(merge.build({"r": [1, 2]})) == "token-merge{metric=hidden r=[1,2]}" and str(other) == "lower"
    with pytest.raises(
        PipelineError, match="position 1: unknown pass 'token-marge'; did you mean 'token-merge'"
    ):
        sketches("token-marge")
    with pytest.raises(PipelineError, match="position 12"):
        sketches("token-merge{")
    assert str(sketches([elision.parse("token-merge{r=3}")[0]])[0].build({"metric": "hidden"})) == (
        "token-merge{r=3 metric=hidden}"
    )


def test_passes_say_what_can_be_tuned():
    graph = elision.testing.capture(toys.Encoder(prefix=1, depth=3).eval(), (torch.randn(2, 3, 8, 8),))

    def knobs(text: str) -> dict[str, tuple[int, int | None]]:
        return {k.option: (len(k.values), k.places) for k in sketches(text)[0].knobs(graph)}

    assert knobs("token-merge") == {"r": (9, 3), "metric": (2, 3), "order": (2, None)}
    assert knobs("token-merge{ratio=0.1 metric=hidden}") == {"order": (2, None)}
    assert knobs("quantize") == {"bits": (3, 12)} and knobs("quantize{activations=true}") == {"bits": (2, 12)}
    assert knobs("segment-merge") == {"layer": (4, None)}
    assert set(knobs("token-drop{policy=cls-topk}")) == {"budget", "layer"}
    assert set(knobs("token-gate")) == {"capacity"}
    causal = elision.testing.capture(toys.Encoder(causal=True).eval(), (torch.randn(2, 3, 8, 8),))
    with pytest.raises(Refused, match=r"nothing to tune: token-merge: .* is causal"):
        Space("token-merge", causal)


# ---- racing -------------------------------------------------------------------------------------------
def test_a_race_ends_when_it_is_sure():
    class Steps(Watch):
        def seconds(self, built, call):
            self.time += 1
            return built.cost * (1 + 0.01 * math.sin(self.time))

    fast, slow, same = (Built(lambda call: [], cost, cost) for cost in (1.0, 1.2, 1.0))
    race = Steps().race(slow, fast, {}, until=1e9)
    assert race.surely and race.low > 1 and race.rounds < 8 and race.ratio == pytest.approx(1.2, rel=0.03)
    assert Steps().race(same, fast, {}, until=1e9, most=10).ratio == pytest.approx(1, abs=0.02)
    assert Steps().race(same, fast, {}, until=0.0).rounds == 4  # no longer than asked


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30))
def test_law_the_interval_holds_the_median(logs):
    race = summary(logs)
    assert race.low <= race.ratio * (1 + 1e-9) and race.ratio <= race.high * (1 + 1e-9)
    assert min(logs) - 1e-9 <= math.log(race.low) and math.log(race.high) <= max(logs) + 1e-9


# ---- quality and data ---------------------------------------------------------------------------------
def test_measures():
    generator = np.random.default_rng(0)
    a = [generator.standard_normal((3, 4, 5)).astype(np.float32), np.arange(3)]
    for name, measure in search_data.METRICS.items():
        assert measure(a, a) == pytest.approx(0.0 if name == "error" else 1.0)
    shifted = [2 * a[0] + 3, a[1]]
    assert search_data.correlation(a, shifted) == pytest.approx(1) and search_data.cosine(a, shifted) < 0.9
    assert search_data.agreement(a, shifted) == 1 and search_data.agreement(a, [-a[0], a[1]]) < 0.5
    assert search_data.error(a, [1.1 * a[0], a[1]]) == pytest.approx(0.1, rel=1e-4)
    flat = [np.ones((2, 3), np.float32)]
    assert search_data.correlation(flat, flat) == 1
    each = [np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(a[0], np.sin(a[0]))]
    assert search_data.correlation(a, [np.sin(a[0]), a[1]]) == pytest.approx(np.mean(each), rel=1e-5)
    with pytest.raises(ElisionError, match="no output of floats"):
        search_data.cosine([np.arange(3)], [np.arange(3)])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("corelation", 0.9, None), "no quality is called 'corelation'; did you mean 'correlation'"),
        (("correlation", None, None), "give one bound"),
        (("correlation", 0.9, 0.1), "give one bound"),
        (("error", 0.9, None), "an error has a bound at_most"),
        (("cosine", None, 0.9), "cosine has a bound at_least"),
        (("cosine", math.nan, None), "is a number, not nan"),
    ],
)
def test_goals_that_are_none(arguments, sentence):
    with pytest.raises(ElisionError, match=sentence):
        Goal.of(*arguments)


def test_a_metric_that_gives_no_number():
    goal = Goal.of(lambda a, b: "good", 1.0, None)
    with pytest.raises(ElisionError, match="gave a str, not a number"):
        goal([[np.ones(1)]], [[np.ones(1)]])


def test_data_is_cut_into_calls():
    graph = elision.testing.capture(toys.Encoder().eval(), (torch.randn(2, 3, 8, 8),))
    name = graph.input_names[0]
    images = np.random.default_rng(0).standard_normal((7, 3, 8, 8)).astype(np.float32)
    calls = calls_of(graph, {name: images}, None)  # two at once: the traced length
    assert [len(call[name]) for call in calls] == [2, 2, 2]
    np.testing.assert_array_equal(calls[2][name], images[4:6])
    first, last = split(calls, None)
    assert len(first) == 2 and len(last) == 1
    assert len(calls_of(graph, [images[:2], (images[2:4],)], None)) == 2
    for data, sentence in (
        ({name: images[:1]}, "data has 1 samples, and the model takes 2 at once"),
        ({"other": images}, f"data has no array '{name}'"),
        ({name: images, "more": images[:3]}, "alike in all arrays"),
        ({name: images[:, :2]}, "is 2 long on axis 1, the model wants 3"),
        ({name: images.astype(np.float64)}, "is float64, the model wants float32"),
        ("text", "not a str"),
    ):
        with pytest.raises(ElisionError, match=sentence):
            calls_of(graph, data, None)
    with pytest.raises(ElisionError, match="data makes 1 call: at least 2 are needed"):
        split(calls[:1], None)


# ---- a real model -------------------------------------------------------------------------------------
def wide() -> torch.nn.Module:
    """An encoder for which merging pays even on paper."""
    from .test_token_merge import Vision

    torch.manual_seed(3)
    return Vision().eval()


def test_a_torch_module(tmp_path):
    images = torch.rand(6, 3, 32, 32)
    common: dict[str, Any] = {"at_least": 0.98, "batch": 2, "seconds": 1e9, "watch": ByOperations()}
    result = elision.tune(wide(), images, tries=8, **common)
    assert result.chosen.quality >= 0.98 and result.chosen.held_out >= 0.98
    assert result.result is not None and result.chosen.ratio < 1
    with torch.no_grad():
        expected = elision.optimize(wide(), result.pipeline, (images[:2],)).module(images[:2])
        torch.testing.assert_close(result.result.module(images[:2]), expected)
    for suffix in ("png", "svg"):
        assert result.plot(tmp_path / f"front.{suffix}").stat().st_size > 1000
    with pytest.raises(ElisionError, match="a picture is"):
        result.plot(tmp_path / "front.txt")


class ByOperations(Watch):
    """The machine of the tests is busy: a run takes what its operations say."""

    def seconds(self, built: Built, call: Any) -> float:
        self.time += built.flops
        return built.flops


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("tune") / "vision.onnx"
    batch = torch.export.Dim("batch", min=1, max=64)
    elision.export_onnx(wide(), (torch.rand(2, 3, 32, 32),), path, dynamic_shapes=({0: batch},), verify=False)
    return path


def test_the_command(exported, tmp_path):
    name = onnxruntime.InferenceSession(str(exported)).get_inputs()[0].name
    np.savez(tmp_path / "data.npz", **{name: np.random.default_rng(0).random((6, 3, 32, 32), np.float32)})
    common = [
        "tune",
        exported,
        "--data",
        tmp_path / "data.npz",
        "--at-least",
        0.9,
        "--batch",
        2,
        "--tries",
        6,
    ]
    files = [tmp_path / each for each in ("out.onnx", "pipeline.txt", "front.svg")]
    options = ["-o", files[0], "--pipeline", files[1], "--plot", files[2], "--threads", 1]
    result = run(*common, *options)
    assert result.exit_code == 0, result.output
    assert "chosen" in result.stdout and "constant" in result.stdout
    assert all(f"wrote {file}" in result.stdout for file in files)
    text = files[1].read_text().strip()
    passes = ["optimize", exported, "-o", tmp_path / "again.onnx", "-p", text]
    assert run(*passes).exit_code == 0
    assert (tmp_path / "again.onnx").read_bytes() == files[0].read_bytes()
    data = json.loads(run(*common, "--json").stdout)
    assert data["goal"] == {"quality": "correlation", "bound": 0.9, "more_is_better": True}
    assert data["chosen"]["quality"] >= 0.9 and data["calls"] == {"searched": 2, "held_out": 1}
    assert "no pipeline can reach correlation at least 1.5" in said(run(*common[:5], 1.5, "--batch", 2))
    assert list(tmp_path.glob(".elision-*")) == []


def test_what_the_command_complains_about(onnx_file, tmp_path):
    name = onnxruntime.InferenceSession(str(onnx_file)).get_inputs()[0].name
    good, bad = tmp_path / "good.npz", tmp_path / "bad.npz"
    np.savez(good, **{name: np.zeros((8, 8), np.float32)})
    bad.write_bytes(b"no archive")
    empty = tmp_path / "empty"
    empty.mkdir()
    at = ["--at-least", 0.9]
    assert "no such file" in said(run("tune", onnx_file, "--data", tmp_path / "none.npz", *at))
    assert "not an .npz file" in said(run("tune", onnx_file, "--data", bad, *at))
    assert "no .npz file in this folder" in said(run("tune", onnx_file, "--data", empty, *at))
    assert "give one bound" in said(run("tune", onnx_file, "--data", good))
    assert "nothing to tune: token-merge" in said(run("tune", onnx_file, "--data", good, *at))
    assert "unknown pass 'merge'" in said(run("tune", onnx_file, "--data", good, *at, "-p", "merge"))
    assert "no such folder" in said(
        run("tune", onnx_file, "--data", good, *at, "-o", tmp_path / "no" / "o.onnx")
    )
    assert "a picture is" in said(
        run("tune", onnx_file, "--data", good, *at, "--plot", tmp_path / "front.txt")
    )
    assert "data makes 1 call" in said(run("tune", onnx_file, "--data", good, *at, "--batch", 8))
