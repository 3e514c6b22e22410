"""docs/ir.md against the source: the tables of kinds and of editing primitives are derived, not typed.

`EXPECTTEST_ACCEPT=1 pytest tests/test_docs_ir.py` writes them anew.
"""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path

from elision.passes.ir.graph import KINDS, Graph

PAGE = Path(__file__).parents[1] / "docs" / "ir.md"
EDITING = (
    "insert",
    "insert_constant",
    "set_operand",
    "replace_output",
    "set_length",
    "refresh",
    "add_output",
    "remove_dead",
)
WHOLE = (
    "evaluate",
    "add_input",
    "insert_parameter",
    "insert_plain",
    "set_signature",
    "fix_length",
    "replace_uses",
)
"""What a host adds for passes that turn a graph into another; not every test double has them."""


def kinds() -> str:
    rows = ["| kind | operands and attributes |", "| --- | --- |"]
    rows += [f"| `{kind}` | {text} |" for kind, text in KINDS.items()]
    return "\n".join(rows)


def primitives() -> str:
    rows = ["| call | effect |", "| --- | --- |"]
    for name in (*EDITING, *WHOLE):
        method = getattr(Graph, name)
        signature = inspect.signature(method)
        arguments = [p.name for p in signature.parameters.values() if p.name != "self"]
        text = " ".join((inspect.getdoc(method) or "").split())
        rows.append(f"| `{name}({', '.join(arguments)})` | {text} |")
    return "\n".join(rows)


def generated(page: str) -> str:
    for name, table in (("kinds", kinds()), ("primitives", primitives())):
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        assert pattern.search(page), f"docs/ir.md has no place for the table of {name}"
        page = pattern.sub(lambda m, t=table: f"{m.group(1)}{t}\n{m.group(2)}", page)
    return page


def test_tables_are_up_to_date() -> None:
    page = PAGE.read_text()
    if os.environ.get("EXPECTTEST_ACCEPT"):
        PAGE.write_text(generated(page))
    assert PAGE.read_text() == generated(page)


def test_every_primitive_is_in_the_table() -> None:
    abstract = set(Graph.__abstractmethods__)
    assert abstract == {*EDITING, "constant_value", "text", "copy", "verify"}
