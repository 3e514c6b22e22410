"""Inline SVG of a generation: draft trees, and the time of each round."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

ROW, BOX, PAD, GAP = 24, 18, 7, 26
"""Of a tree, in pixels: from row to row, height of a node, from its edge to its text, from column to column."""

CHARACTER = 7.3
"""Pixels of one character of a node; wide ones have twice that."""

LONGEST = 14
"""Characters of a node's text."""

BARS = 256
"""Bars of the chart; of more rounds, neighbours share one."""

Record = dict[str, Any]


def committed_nodes(record: Record) -> list[int | None]:
    """For each new token of a round the node that held it; None for one that the target itself gave.

    The token that ends a text may be in the tree without having been walked to."""
    nodes: list[int | None] = list(record["accepted"][1 : len(record["new"]) + 1])
    parent = record["accepted"][len(nodes)]
    for token in record["new"][len(nodes) :]:
        found = [n for n, p in enumerate(record["parents"]) if p == parent and record["tokens"][n] == token]
        nodes.append(found[0] if found else None)
    return nodes


def depths(parents: Sequence[int]) -> list[int]:
    """By node; the root, whose parent is -1, has 0."""
    found: list[int] = []
    for parent in parents:
        found.append(0 if parent < 0 else found[parent] + 1)
    return found


def tree_picture(
    record: Record, label: Callable[[int | None, int], str], colour: Callable[[str], str], name: str
) -> str:
    """The tree of one round, root at the left, the path that was taken in the uppermost row.

    label: (token before, token) -> text; colour: origin -> class; name: what the picture is called. The token that the
    target gave hangs at the end of the path as a node of its own."""
    tokens, parents = list(record["tokens"]), list(record["parents"])
    count = len(tokens)
    nodes = committed_nodes(record)
    taken = [0, *(node for node in nodes if node is not None)]
    kept, tested = set(taken), set(taken)
    if nodes and nodes[-1] is None:
        tokens.append(record["new"][-1])
        parents.append(taken[-1])
        kept.add(count)
    level = depths(parents)
    rows = _rows(parents, kept)
    names = [label(tokens[parent] if parent >= 0 else None, t) for t, parent in zip(tokens, parents)]
    shown = [_short(text) for text in names]
    widths = [round(_width(text) * CHARACTER) + 2 * PAD for text in shown]
    columns = [0] * (max(level) + 1)
    for node, depth in enumerate(level):
        columns[depth] = max(columns[depth], widths[node])
    left = [2 + sum(columns[:depth]) + GAP * depth for depth in range(len(columns))]
    wide, high = left[-1] + columns[-1] + 2, (max(rows) + 1) * ROW
    edges: dict[bool, list[str]] = {False: [], True: []}
    drawn = []
    for node, parent in enumerate(parents):
        x, y = left[level[node]], rows[node] * ROW + ROW // 2
        if parent >= 0:
            start, above = left[level[parent]] + widths[parent], rows[parent] * ROW + ROW // 2
            bend = x - GAP // 2
            straight = f"M{start} {y}H{x}"
            curve = f"M{start} {above}H{bend - 8}C{bend} {above} {bend} {y} {x} {y}"
            edges[node in kept].append(straight if y == above else curve)
        if node == 0:
            kind, told = "root", "the last token before this round"
        elif node == count:
            kind, told = "given", "from the model itself"
        else:
            state, word = "untested", "not reached"
            if node in kept:
                state, word = "kept", "accepted"
            elif parent in tested:
                state, word = "refused", "refused"
            kind = f"{state} {colour(record['origins'][node])}"
            told = f"{record['origins'][node] or 'draft'}, value {record['values'][node]:.3g}, {word}"
        title = escape(f"{names[node]}: id {tokens[node]}, {told}")
        drawn.append(
            f'<g class="{kind}"><title>{title}</title>'
            f'<rect x="{x}" y="{y - BOX // 2}" width="{widths[node]}" height="{BOX}" rx="5"></rect>'
            f'<text x="{x + PAD}" y="{y + 4}">{escape(shown[node])}</text></g>'
        )
    lines = [
        f'<path class="{kind}" d="{"".join(edges[key])}"></path>'
        for key, kind in ((False, "edge"), (True, "edge taken"))
        if edges[key]
    ]
    opening = (
        f'<svg class="tree" width="{wide}" height="{high}" viewBox="0 0 {wide} {high}" role="img" '
        f'aria-label="{escape(name)}">'
    )
    return "".join([opening, *lines, *drawn, "</svg>"])


def _rows(parents: Sequence[int], kept: set[int]) -> list[int]:
    """The first child stands in its parent's row, each other one in a new row below; those kept come first."""
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents):
        if parent >= 0:
            children[parent].append(node)
    rows, last, stack = [0] * len(parents), 0, [(0, True)]
    while stack:
        node, first = stack.pop()
        if not first:
            last += 1
        rows[node] = last
        ordered = sorted(children[node], key=lambda child: (child not in kept, child))
        stack += [(child, child == ordered[0]) for child in reversed(ordered)]
    return rows


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _short(text: str) -> str:
    if _width(text) <= LONGEST:
        return text
    while _width(text) >= LONGEST:
        text = text[:-1]
    return text + "…"


# ---- time ----------------------------------------------------------------------------------------------
def time_chart(trace: Sequence[Record]) -> str:
    """Tokens of each round above, its time below: draft and verification, one on the other. A round that took far
    longer than the others is cut off, and marked. Empty without rounds."""
    if not trace:
        return ""
    each = -(-len(trace) // BARS)
    groups = [trace[i : i + each] for i in range(0, len(trace), each)]
    draft = [1e3 * sum(r["draft"] for r in group) / len(group) for group in groups]
    verify = [1e3 * sum(r["verify"] for r in group) / len(group) for group in groups]
    new = [sum(len(r["new"]) for r in group) / len(group) for group in groups]
    both = [a + b for a, b in zip(draft, verify)]
    top = min(max(both), 2.5 * sorted(both)[int(0.9 * (len(both) - 1))]) or max(both) or 1.0
    most = max(max(new), 1.0)
    width, left, above, upper, lower = 960, 62, 26, 72, 150  # upper: of the tokens, lower: of the time
    middle = above + upper + 40
    bottom, step = middle + lower, min((width - left - 6) / len(groups), 34.0)
    thick = step * (0.8 if step > 4 else 0.95)
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {bottom + 36}" role="img" aria-label="Tokens and time of each round">'
    ]
    for low, high, peak, unit in ((above + upper, upper, most, "tokens"), (bottom, lower, top, "ms")):
        parts.append(f'<text x="{left - 8}" y="{low - high - 13}" text-anchor="end">{unit}</text>')
        for part in (0.0, 0.5, 1.0):
            y = low - part * high
            parts.append(f'<line x1="{left}" x2="{width - 6}" y1="{y:.1f}" y2="{y:.1f}"></line>')
            text = f"{peak * part:.3g}"
            parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')

    def bar(kind: str, x: float, base: float, tall: float) -> str:
        return (
            f'<rect class="{kind}" x="{x:.1f}" y="{base - tall:.1f}" width="{thick:.1f}" '
            f'height="{max(tall, 0.0):.1f}"></rect>'
        )

    for index, group in enumerate(groups):
        x = left + index * step + (step - thick) / 2
        first = index * each + 1
        name = f"round {first}" if len(group) == 1 else f"rounds {first} to {first + len(group) - 1}, mean"
        rows = sum(len(r["tokens"]) for r in group) / len(group)
        title = (
            f"{name}: {_counted(new[index], 'token')} from {_counted(rows, 'row')}; "
            f"draft {draft[index]:.3g} ms, verify {verify[index]:.3g} ms"
        )
        under = min(draft[index], top) / top * lower
        over = min(both[index], top) / top * lower - under
        parts.append(f"<g><title>{title}</title>")
        parts.append(bar("hover", x, bottom, bottom - above))
        parts.append(bar("new", x, above + upper, new[index] / most * upper))
        parts.append(bar("draft", x, bottom, under) + bar("verify", x, bottom - under, over))
        if both[index] > top * 1.001:
            at = x + thick / 2
            parts.append(f'<path class="cut" d="M{at - 4:.1f} {middle - 2}h8l-4 -7z"></path>')
        parts.append("</g>")
    every = max(1, -(-len(groups) // 12))
    for index in range(0, len(groups), every):
        x = left + (index + 0.5) * step
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{index * each + 1}</text>')
    parts.append(f'<text x="{left}" y="{bottom + 32}">round</text>')
    return "".join([*parts, "</svg>"])


def _counted(count: float, what: str) -> str:
    return f"{count:.3g} {what}" + ("" if count == 1 else "s")
