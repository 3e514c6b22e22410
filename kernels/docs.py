"""The table of ops for the documentation, from the definitions."""

from __future__ import annotations

import inspect

from .ops import OPS

_HEAD = """# The ops of the dialect

What a pass inserts is one of these. In torch an op is `torch.ops.elision.<name>`; in an ONNX file it is a node of
the domain `elision` together with a function of standard operators, so that the file runs anywhere. `?` marks an
operand that may be absent. Attributes go by name; one without a value must be given.

`slot[B,N]`: the output slot of every token, -1 where it is dropped. `keep[B,N']`: the token that stands for each
slot. `source[B,N-N']`: the tokens merged into another. All int32. `size`: how many original tokens a token stands
for, float32, 0 for padding.

This page is written by `elision.kernels.docs.page()`.
"""


def page() -> str:
    """docs/ops.md."""
    lines = [_HEAD, "| op | operands → results | what it does |", "| --- | --- | --- |"]
    for op in OPS.values():
        call = f"{', '.join(op.inputs)} → {', '.join(op.outputs)}"
        lines.append(f"| [`{op.name}`](#{op.name}) | {call} | {op.summary} |")
    for op in OPS.values():
        lines += ["", f"## {op.name}", "", f"    {op.name}({', '.join(op.inputs)})", ""]
        lines += [inspect.cleandoc(op.reference.__doc__ or ""), ""]
        given = [a.name if a.default is None else f"{a.name}={a.default!r}" for a in op.attrs]
        lines += [f"Attributes: {', '.join(f'`{g}`' for g in given)}." if given else "No attributes."]
        if op.source:
            lines += ["", f"Source: {op.source}."]
    return "\n".join(lines) + "\n"
