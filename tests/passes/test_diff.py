"""Diffs of graph texts: only real changes show, whatever the values are called."""

from __future__ import annotations

import re

import pytest
from elision.passes.diff import counts, diff_graphs, diff_texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

BEFORE = """\
%x: float32[2, 17, 8] = input
%norm: float32[2, 17, 8] = aten.layer_norm(%x, %w1, %b1) {axes=[2]}
%linear: float32[2, 17, 8] = aten.linear(%norm, %w2) {transposed=True}
%add: float32[2, 17, 8] = aten.add(%x, %linear) {fn=add}
%norm_1: float32[2, 17, 8] = aten.layer_norm(%add, %w3, %b3) {axes=[2]}
%linear_1: float32[2, 17, 8] = aten.linear(%norm_1, %w4) {transposed=True}
%add_1: float32[2, 17, 8] = aten.add(%add, %linear_1) {fn=add}
return %add_1""".splitlines()

ONNX = """\
input %src: float32[2, 5, 8]
%/enc/Transpose_output_0: float32[5, 2, 8] = Transpose(%src) {perm=[1, 0, 2]}
%/enc/Reshape:0: float32[10, 8] = Reshape(%/enc/Transpose_output_0, [10, -1]) {z=1}
%y: float32[10, 8] = Relu(%/enc/Reshape:0)
output %y: float32[10, 8]""".splitlines()


def renamed(lines: list[str], suffix: str) -> list[str]:
    """The same graph with every computed value under another name; weights keep theirs."""
    return [re.sub(r"%(x|norm|linear|add)(_\d)?\b", rf"%\1\2{suffix}", line) for line in lines]


@pytest.mark.parametrize("lines", [BEFORE, ONNX])
def test_no_change_is_no_text(lines: list[str]) -> None:
    assert diff_graphs(lines, list(lines)) == ""
    assert all(c.mark == " " for c in diff_texts(lines, lines))


def test_renumbering_is_no_change() -> None:
    assert diff_graphs(BEFORE, renamed(BEFORE, "_7")) == ""


def test_renamed_weights_are_no_change_but_exchanged_ones_are() -> None:
    after = [re.sub(r"%([wb])(\d)", r"%val_\1\2", line) for line in renamed(BEFORE, "_7")]
    assert diff_graphs(BEFORE, after) == ""
    after[5] = after[5].replace("%val_w4", "%val_w2")
    assert [c.mark for c in diff_texts(BEFORE, after)] == list("     -+  ")


def test_an_insertion_that_renumbers_what_follows() -> None:
    # As a new trace would call them: the inserted op takes norm_1, the old norm_1 is norm_2 now.
    after = [line.replace("norm_1", "norm_2") for line in BEFORE]
    after[3] = after[3].replace("%linear)", "%norm_1)")
    after.insert(3, "%norm_1: float32[2, 17, 8] = aten.rms_norm(%linear, %w9) {axes=[2]}")
    assert diff_graphs(BEFORE, after, context=0).splitlines() == [
        "...",
        "+ %norm_1': float32[2, 17, 8] = aten.rms_norm(%linear, %w9) {axes=[2]}",
        "- %add: float32[2, 17, 8] = aten.add(%x, %linear) {fn=add}",
        "+ %add: float32[2, 17, 8] = aten.add(%x, %norm_1') {fn=add}",
        "...",
    ]


def test_other_lengths_are_one_line_each_or_counted() -> None:
    after = BEFORE[:4] + ["%merged: float32[2, 13, 8] = elision.merge_tokens(%add)"]
    after += [line.replace("17", "13").replace("%add,", "%merged,") for line in BEFORE[4:]]
    assert diff_graphs(BEFORE, after, context=0).splitlines() == [
        "...",
        "+ %merged: float32[2, 13, 8] = elision.merge_tokens(%add)",
        "- %norm_1: float32[2, 17, 8] = aten.layer_norm(%add, %w3, %b3) {axes=[2]}",
        "+ %norm_1: float32[2, 13, 8] = aten.layer_norm(%merged, %w3, %b3) {axes=[2]}",
        "~ %linear_1: float32[2, 17 -> 13, 8] = aten.linear(%norm_1, %w4) {transposed=True}",
        "- %add_1: float32[2, 17, 8] = aten.add(%add, %linear_1) {fn=add}",
        "+ %add_1: float32[2, 13, 8] = aten.add(%merged, %linear_1) {fn=add}",
        "...",
    ]
    shorter = [line.replace("17", "13") for line in BEFORE]
    assert diff_graphs(BEFORE, shorter, lengths=False) == "~ 7 ops: 17 -> 13\n  return %add_1"
    assert counts(diff_texts(BEFORE, shorter)) == {"removed": 0, "added": 0, "resized": 7}


def test_onnx_names_and_literal_shapes() -> None:
    after = [line.replace("[10", "[8").replace("[2, 5,", "[2, 4,").replace("[5, 2", "[4, 2") for line in ONNX]
    assert diff_graphs(ONNX, after).splitlines() == [
        "~ input %src: float32[2, 5 -> 4, 8]",
        "~ %/enc/Transpose_output_0: float32[5 -> 4, 2, 8] = Transpose(%src) {perm=[1, 0, 2]}",
        "~ %/enc/Reshape:0: float32[10 -> 8, 8] = Reshape(%/enc/Transpose_output_0, [10 -> 8, -1]) {z=1}",
        "~ %y: float32[10 -> 8, 8] = Relu(%/enc/Reshape:0)",
        "~ output %y: float32[10 -> 8, 8]",
    ]


def test_attributes_are_not_lengths() -> None:
    after = [line.replace("perm=[1, 0, 2]", "perm=[2, 0, 1]") for line in ONNX]
    assert [c.mark for c in diff_texts(ONNX, after)] == [" ", "-", "+", " ", " ", " "]


def test_context_and_gaps() -> None:
    after = [line.replace("%w4", "%w5") for line in BEFORE]
    assert [line[:1] for line in diff_graphs(BEFORE, after, context=2).splitlines()] == list(".  -+  ")
    assert [line[:1] for line in diff_graphs(BEFORE, after, context=0).splitlines()] == list(".-+.")


def test_rank_changes_stand_in_one_bracket() -> None:
    before, after = ["%a: float32[2, 3] = f(%b)"], ["%a: float32[6] = f(%b)"]
    assert diff_graphs(before, after) == "~ %a: float32[2, 3 -> 6] = f(%b)"


# ---- laws ---------------------------------------------------------------------------------------------
patient = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
lines = st.builds(
    lambda n, fn, a, b, length: f"%v{n}: float32[2, {length}] = {fn}(%v{a}, %w{b})",
    st.integers(0, 9),
    st.sampled_from(["add", "mul", "linear"]),
    st.integers(0, 9),
    st.integers(0, 3),
    st.integers(3, 5),
)
texts = st.lists(lines, max_size=12)


@patient
@given(texts, texts)
def test_both_texts_can_be_told_apart_and_rebuilt(before: list[str], after: list[str]) -> None:
    changes = diff_texts(before, after)
    assert len([c for c in changes if c.mark in " -~"]) == len(before)
    assert len([c for c in changes if c.mark in " +~"]) == len(after)
    assert [c.text for c in changes if c.mark in " -"] == [
        line for line, c in zip(before, [c for c in changes if c.mark in " -~"]) if c.mark != "~"
    ]


@patient
@given(texts)
def test_a_text_does_not_differ_from_itself(before: list[str]) -> None:
    assert diff_graphs(before, before) == ""


@patient
@given(texts, st.integers(0, 3))
def test_short_form_is_never_longer(before: list[str], context: int) -> None:
    after = [line.replace("[2, 3]", "[2, 1]") for line in before]
    short = diff_graphs(before, after, context, lengths=False).splitlines()
    assert len(short) <= len(diff_graphs(before, after, context).splitlines()) or not short
