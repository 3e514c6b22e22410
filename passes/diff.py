"""A readable difference of two graph texts, for people and for inline expectations in tests.

Works on the lines that `Graph.text()` gives in either host. Values may have been renumbered between the two
texts; an operation counts as unchanged when it is the same up to such names. An operation that is the same
but for axis lengths is one `~` line (`197 -> 181`), so that a pass that removes tokens does not hide what it
did behind every shape after it.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .ir.graph import Graph

_NAME = re.compile(r"%[^\s,(){}]+")
_DEFINED = re.compile(r"(%[^\s,(){}]+): [\w?]+(?=\[|,| |$)")
# Where lengths stand: in types, and in literal operands such as the target of an ONNX Reshape.
_SHAPE = re.compile(r"(: \w+|\(|, )\[((?<=\w\[)[^\]]*|-?\d+(?:, -?\d+)*)\]")
_LARGEST = 5_000_000  # pairs of lines that look alike; beyond, only values of the same name are matched


@dataclass(frozen=True)
class Change:
    """One line of a difference. `mark`: "-" removed, "+" added, "~" other lengths, " " the same."""

    mark: str
    text: str
    lengths: str = ""  # for "~": "197 -> 181" and so on

    def __str__(self) -> str:
        return f"{self.mark} {self.text}"


def diff_texts(before: Sequence[str], after: Sequence[str]) -> list[Change]:
    """All lines of both texts, each marked. Only real changes are marked, see the module."""
    by_name = _compare(before, after, [_named_key(x) for x in before], [_named_key(x) for x in after])
    if _weight(by_name) == 0:
        return by_name
    anchors = _weights(before) & _weights(after)
    first, second = [_nameless_key(x, anchors) for x in before], [_nameless_key(x, anchors) for x in after]
    repeats = Counter(second)
    if sum(repeats[key] for key in first) > _LARGEST:
        return by_name
    renamed = _compare(before, after, first, second)
    return renamed if _weight(renamed) < _weight(by_name) else by_name


def diff_graphs(
    before: Graph | Sequence[str], after: Graph | Sequence[str], context: int = 1, lengths: bool = True
) -> str:
    """The difference of two graphs (or their texts) as text; "" when there is none.

    `context` unchanged lines surround each change, "..." stands for the rest. With `lengths=False` runs of
    operations that only changed lengths are one line each (`~ 14 ops: 197 -> 181`): the short form for tests.
    """
    first = before.text() if isinstance(before, Graph) else before
    second = after.text() if isinstance(after, Graph) else after
    changes = diff_texts(first, second)
    return "\n".join(_windowed(changes if lengths else _counted(changes), context))


def counts(changes: Sequence[Change]) -> dict[str, int]:
    """How many operations were removed, added and given other lengths."""
    marks = [c.mark for c in changes if " = " in c.text]
    return {"removed": marks.count("-"), "added": marks.count("+"), "resized": marks.count("~")}


# ---- matching -----------------------------------------------------------------------------------------
def _defined(lines: Sequence[str]) -> set[str]:
    return {name for line in lines for name in _DEFINED.findall(line)}


def _target(line: str) -> str:
    return line.partition(" = ")[2].partition("(")[0] or line.partition(" ")[0]


def _named_key(line: str) -> str:
    return " ".join([*_DEFINED.findall(line), _target(line)])


def _weights(lines: Sequence[str]) -> set[str]:
    """Names that no line defines: parameters and constants."""
    return {n.removesuffix(":") for line in lines for n in _NAME.findall(line)} - _defined(lines)


def _nameless_key(line: str, anchors: set[str]) -> str:
    """The line without lengths and without names, but for the weights that both texts call the same: they are
    what tells the blocks of a model apart."""
    line = _SHAPE.sub(r"\1", line)
    return _NAME.sub(lambda m: m.group() if m.group().removesuffix(":") in anchors else "%", line)


def _compare(
    before: Sequence[str], after: Sequence[str], first: Sequence[str], second: Sequence[str]
) -> list[Change]:
    """Align both texts by their keys, carry names over from one to the other, mark what still differs."""
    opcodes = difflib.SequenceMatcher(None, first, second, autojunk=False).get_opcodes()
    pairs = [p for tag, i, j, k, m in opcodes if tag == "equal" for p in zip(before[i:j], after[k:m])]
    names = _new_names(before, after, pairs)
    changes: list[Change] = []
    for tag, i, j, k, m in opcodes:
        if tag != "equal":
            changes += [Change("-", line) for line in before[i:j]]
            changes += [Change("+", _renamed(line, names)) for line in after[k:m]]
            continue
        for old, new in zip(before[i:j], after[k:m]):
            changes += _pair(old, _renamed(new, names))
    return changes


def _new_names(
    before: Sequence[str], after: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> dict[str, str]:
    """What to call the values of `after` so that aligned lines define the same names; {} if they do."""
    names: dict[str, str] = {}
    for old, new in pairs:
        names.update(zip(_DEFINED.findall(new), _DEFINED.findall(old)))
    # Another weight is a change, unless most of them have new names: then the first place that reads it decides.
    weights = _weights(after)
    strange = weights - _weights(before)
    if 2 * len(strange) > len(weights):
        for old, new in pairs:
            for was, now in zip(_NAME.findall(old), _NAME.findall(new)):
                if now in strange:
                    names.setdefault(now, was)
    if all(now == was for now, was in names.items()):
        return {}
    taken = _defined(before)  # a new value must not look like an old one that is called the same
    return names | {n: f"{n}'" for n in _defined(after) - names.keys() if n in taken}


def _renamed(line: str, names: dict[str, str]) -> str:
    if not names:
        return line

    def carry(match: re.Match[str]) -> str:
        word = match.group()
        bare = word.removesuffix(":")
        return names.get(bare, bare) + word[len(bare) :]

    return _NAME.sub(carry, line)


def _pair(old: str, new: str) -> list[Change]:
    if old == new:
        return [Change(" ", old)]
    if _SHAPE.sub(r"\1", old) != _SHAPE.sub(r"\1", new):
        return [Change("-", old), Change("+", new)]
    shapes = iter(_SHAPE.findall(old))
    seen: list[str] = []

    def arrow(match: re.Match[str]) -> str:
        dims, others = next(shapes)[1].split(", "), match.group(2).split(", ")
        if len(dims) != len(others):
            seen.append(f"[{', '.join(dims)}] -> [{', '.join(others)}]")
            return f"{match.group(1)}[{', '.join(dims)} -> {', '.join(others)}]"
        parts = [a if a == b else f"{a} -> {b}" for a, b in zip(dims, others)]
        seen.extend(p for p in parts if " -> " in p)
        return f"{match.group(1)}[{', '.join(parts)}]"

    return [Change("~", _SHAPE.sub(arrow, new), ", ".join(dict.fromkeys(seen)))]


def _weight(changes: Sequence[Change]) -> int:
    return sum(c.mark in "-+" for c in changes)


# ---- showing ------------------------------------------------------------------------------------------
def _counted(changes: Sequence[Change]) -> list[Change]:
    """Runs of `~` lines with the same lengths as one line each; unchanged lines inside a run vanish."""
    result: list[Change] = []
    run: list[Change] = []
    held: list[Change] = []  # unchanged lines since the run's last member

    def close() -> None:
        if len(run) == 1:
            result.append(run[0])
        elif run:
            result.append(Change("~", f"{len(run)} ops: {run[0].lengths}", run[0].lengths))
        result.extend(held)
        run.clear()
        held.clear()

    for change in changes:
        if change.mark == "~" and (not run or run[0].lengths == change.lengths):
            if not run:
                close()
            held.clear()
            run.append(change)
        elif change.mark == " ":
            held.append(change)
        else:
            close()
            (run if change.mark == "~" else result).append(change)
    close()
    return result


def _windowed(changes: Sequence[Change], context: int) -> list[str]:
    shown = [False] * len(changes)
    for index, change in enumerate(changes):
        if change.mark != " ":
            for near in range(max(0, index - context), min(len(changes), index + context + 1)):
                shown[near] = True
    if not any(shown):
        return []
    lines: list[str] = []
    for index, change in enumerate(changes):
        if shown[index]:
            lines.append(str(change))
        elif not lines or lines[-1] != "...":
            lines.append("...")
    return lines
