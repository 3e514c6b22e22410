"""What is said of a pass that does not apply behind others: which is in the way, and where it would apply."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from elision.passes import order, testing
from elision.passes.base import Outcome, Pass, PassContext
from elision.passes.errors import ElisionError, NothingMatched, Refused
from elision.passes.ir.fx import FxGraph
from elision.passes.ir.graph import Graph
from elision.passes.manager import run_pipeline
from elision.passes.pipeline import parse

from .causal_toys import Toy, traced
from .memory_graph import MemoryGraph
from .test_manager import small

IDS = torch.randint(0, 31, (1, 9), generator=torch.Generator().manual_seed(0))


class Needs(Pass):
    """Adds `adds`; refuses a graph that has `without`, or has not `behind`."""

    def __init__(self, name: str, adds: str = "", without: str = "", behind: str = "") -> None:
        super().__init__()
        self.name = name  # type: ignore[misc]
        self.adds, self.without, self.behind = adds, without, behind
        self.runs = 0

    def run(self, graph: Graph, context: PassContext) -> Outcome:
        assert isinstance(graph, MemoryGraph)
        self.runs += 1
        there = [op.target for op in graph.ops]
        if self.without in there:
            raise Refused(f"there is a {self.without}")
        if self.behind and self.behind not in there:
            raise NothingMatched(f"there is no {self.behind}")
        if self.adds:
            one = graph.insert_constant(np.array(1.0), "one")
            inputs = [graph.outputs[0]] if self.adds == "relu" else [graph.outputs[0], one]
            graph.replace_output(0, graph.insert(self.adds, inputs, after=graph.ops[-1])[0])
        return Outcome(changed=bool(self.adds))


def said(*passes: Pass, kind: type[Exception] = Refused) -> str:
    graph, args = small()
    before = graph.text()
    with pytest.raises(kind) as caught:
        run_pipeline(graph, list(passes), runner=lambda g: g.calculate(args))  # type: ignore[attr-defined]
    assert graph.text() == before
    assert caught.value.failed is passes[-1]
    return str(caught.value)


def test_the_pass_that_is_in_the_way_is_named_with_the_order_that_works() -> None:
    picky, times = Needs("picky", "add", without="mul"), Needs("times", "mul")
    assert said(times, picky) == "picky after times: there is a mul; put picky before times"
    both = said(Needs("idle"), times, Needs("more", "relu"), picky)
    assert both == "picky after times: there is a mul; put picky before times"


def test_where_no_order_works_that_is_said() -> None:
    picky, times = Needs("picky", "add", without="mul"), Needs("times", "mul", without="add")
    end = "the other order does not work either, so choose one of them"
    assert said(times, picky) == f"picky after times: there is a mul; {end}"
    once = Needs("once", "add", without="add")
    assert (
        said(once, Needs("once", "add", without="add"))
        == "once after once: there is a add; a graph takes it once"
    )
    between = said(times, Needs("more", "relu"), picky)
    assert between.endswith("picky before times does not work with the passes between them either")


def test_a_pass_that_needs_another_one_in_front() -> None:
    late, times = Needs("late", "add", behind="mul"), Needs("times", "mul")
    graph, args = small()
    with pytest.raises(NothingMatched) as caught:
        run_pipeline(graph, [late, Needs("more", "relu"), times], runner=lambda g: g.calculate(args))  # type: ignore[attr-defined]
    assert str(caught.value) == "late before times: there is no mul; put late behind times"


def test_a_pass_that_applies_nowhere_speaks_for_itself() -> None:
    never = Needs("never", "add", without="linear")
    assert said(Needs("times", "mul"), never) == "never: there is a linear"


def test_nothing_is_tried_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "PATIENCE", -1.0)
    picky = Needs("picky", "add", without="mul")
    assert said(Needs("times", "mul"), picky) == "picky: there is a mul"
    assert picky.runs == 1


# ---- facts, and examples across passes that change inputs and outputs -----------------------------------
def toy() -> FxGraph:
    torch.manual_seed(0)
    return FxGraph.from_export(traced(Toy()))


def report(passes: str, **more: Any) -> Any:
    return testing.report(toy(), passes, [IDS], **more)


def test_facts_are_read_off_the_graph() -> None:
    plain = toy()
    assert order.facts(plain) == {}
    few = testing.apply(plain, "quantize{bits=8 method=rtn},incremental{capacity=16},head{k=2}", [IDS])
    assert set(order.facts(few)) == {order.ROUNDED, order.CACHED, order.LARGEST}
    lowered = testing.apply(few, "lower")
    assert order.LOWERED in order.facts(lowered)
    with pytest.raises(
        Refused, match=r"^quantize: the graph has ops in the form of what runs them already: "
    ):
        order.check(*parse("quantize"), lowered)


def test_weights_are_not_rounded_in_part_behind_lowering() -> None:
    with pytest.raises(ElisionError) as caught:
        report("incremental{capacity=16},head{k=3},lower,quantize{bits=8 method=rtn}")
    why = "the graph has ops in the form of what runs them by then"
    assert str(caught.value) == f"quantize after lower: {why}; put quantize before lower"
    with pytest.raises(ElisionError, match=r"rows are fixed by then; put quantize before fix-rows$"):
        report("fix-rows,quantize{bits=8 method=rtn}")


@pytest.mark.parametrize(
    "passes",
    [
        "keep-rows",
        "incremental{capacity=16},keep-rows",
        "incremental{capacity=16},keep-rows,head{k=3}",
        "incremental{capacity=16},dynamic-vocab,keep-rows",
        "dynamic-vocab,incremental{capacity=16},head{k=3 beside=true}",
        "head{k=3},incremental{capacity=16}",
    ],
)
def test_outputs_are_compared_across_every_change_of_inputs_and_outputs(passes: str) -> None:
    found = report(passes)
    assert all(single.changed and single.drift for single in found.passes)
    assert found.drift and all(drift.max_abs < 1e-4 for drift in found.drift)


def test_what_a_lossy_pass_did_is_seen_behind_them() -> None:
    """The drift of the whole pipeline is that of its one lossy pass, whatever stands around it."""
    alone = report("quantize{bits=4 method=rtn group=16}").drift[0].max_abs
    assert alone > 0.01
    for passes in (
        "dynamic-vocab,{},keep-rows",
        "{},incremental{{capacity=16}},dynamic-vocab",
        "keep-rows,{}",
    ):
        found = report(passes.format("quantize{bits=4 method=rtn group=16}"))
        assert found.drift[0].max_abs == pytest.approx(alone, rel=0.2)


def test_a_head_that_keeps_the_wrong_numbers_would_be_found() -> None:
    found = report("head{k=3},quantize{bits=4 method=rtn group=16}")
    assert found.passes[0].drift[0].max_abs < 1e-5 and found.passes[1].drift[0].max_abs > 1e-3
