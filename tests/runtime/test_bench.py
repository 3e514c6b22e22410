"""Interleaved timing."""

from __future__ import annotations

import time

import numpy as np
import pytest
from elision.runtime import bench

import elision

from . import toys


def test_every_round_runs_every_side_in_turn():
    calls = []
    sides = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = bench.interleave(sides, rounds=4, warm_up=1)
    assert calls == [*"ab"] * 5  # no side twice in a row: the second time its weights are in the cache
    assert {name: len(found) for name, found in times.items()} == {"a": 4, "b": 4}


def test_time_limit_keeps_three_rounds():
    times = bench.interleave({"a": lambda: time.sleep(0.01)}, rounds=50, warm_up=0, seconds=0.0)
    assert len(times["a"]) == 3


def test_ratio_is_paired():
    result = bench.compare({"slow": [2.0, 4.0, 6.0], "fast": [1.0, 2.0, 3.0]})
    assert result.ratio == result.ratio_low == result.ratio_high == 2.0
    assert result.first.median_ms == 4000.0
    assert result.second.best_ms == 1000.0
    assert result.first.spread == pytest.approx(0.5)


def test_two_models(onnx_file):
    changed = elision.optimize(onnx_file, "toy-drop-relu{times=2}").model.SerializeToString()
    feeds = {"x": np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)}
    result = bench.compare_models(("before", str(onnx_file)), ("after", changed), feeds, rounds=3)
    assert result.ratio > 0
    assert result.drift is not None and result.drift[0]["output"] == "y"
    assert result.drift[0]["max_abs"] > 0
    same = bench.compare_models(("one", str(onnx_file)), ("one", str(onnx_file)), feeds, rounds=3)
    assert same.first.name != same.second.name
    assert same.drift is not None and same.drift[0]["max_abs"] == 0


def test_inputs_are_made_up_only_where_they_can_be():
    from elision.runtime.api import open_onnx

    proto = toys.onnx_model()
    feeds = bench.feeds_or_error(open_onnx(proto), None, batch=5)
    assert feeds["x"].shape == (5, 8)
    proto.graph.input[0].type.tensor_type.shape.dim[1].Clear()
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "n"
    with pytest.raises(elision.ElisionError, match="--inputs"):
        bench.feeds_or_error(open_onnx(proto), None)
