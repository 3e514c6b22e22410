"""The report of one generation: an HTML file that needs nothing else. Its text coloured by the drafters that found the
tokens, the time of each round, and the draft tree of each."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..passes.errors import ElisionError
from .files import write_text
from .generation_pictures import Record, committed_nodes, depths, time_chart, tree_picture
from .lm_text import BROKEN, Stream, Text

if TYPE_CHECKING:
    from .generate import Generation, Generator

DRAFTERS = ("ngram", "recycling", "model", "self", "hierarchical", "heads")
"""These have the same colour in every report; others follow."""

COLOURS = 6
TREES = 512
"""Trees that a report draws."""

PROMPT = 600
"""Characters of the prompt that stand before the text; a longer one is there to unfold."""

LAST = 12
"""Depths and ranks with a bar of their own; those beyond share one."""

MARKS = {" ": "␣", "\n": "↵", "\t": "⇥"}
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


def write_generation_report(
    path: str | os.PathLike[str], generator: Generator, result: Generation, prompt_text: str
) -> Path:
    """Writes the report of `result`, which `generator.generate(prompt, trace=True)` gave, as one HTML file.

    Without a tokenizer it shows ids. Raises ElisionError where the result has no trace, or the file cannot be
    written; nothing is left behind then."""
    return write_text(path, render_generation(generator, result, prompt_text))


def render_generation(generator: Generator, result: Generation, prompt_text: str) -> str:
    """The same as HTML text. Raises ElisionError where the result has no trace."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    if result.trace is None:
        raise ElisionError("this generation has no trace to report: generate it with trace=True")
    trace, labels = result.trace, Labels(generator.text)
    origins = _origins(trace)
    classes = {origin: f"d{number % COLOURS}" for number, origin in enumerate(origins)}
    environment = Environment(
        loader=PackageLoader("elision.runtime", "."),
        autoescape=select_autoescape(default=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    tokens = _tokens(result, labels, classes)
    prompt = labels.plain(prompt_text)
    return environment.get_template("generation.html.j2").render(
        figures=_figures(result),
        finish=result.finish,
        prompt=prompt,
        prompt_end=prompt[-PROMPT:],
        tokens=tokens,
        ids=generator.text is None,
        legend=_legend(tokens, origins, classes),
        chart=time_chart(trace),
        acceptance=_acceptance(trace),
        rounds=_rounds(trace, tokens, labels, classes.__getitem__),
        trees=sum(len(record["tokens"]) > 1 for record in trace),
        most_trees=TREES,
    )


class Labels:
    """How tokens are shown: in trees each by itself with its spaces marked, in the text what it adds."""

    def __init__(self, text: Text | None) -> None:
        self.text = text
        tokenizer = None if text is None else text.tokenizer
        self._special = set(getattr(tokenizer, "all_special_ids", ()))
        self._known: dict[tuple[int | None, int], str] = {}

    def __call__(self, before: int | None, token: int) -> str:
        """A token in a tree. before: the one it follows, since a word may look different at the start of a text."""
        key = (before, token)
        if key not in self._known:
            shown = self._piece(before, token)
            self._known[key] = self.plain("".join(MARKS.get(c, c) for c in shown))
        return self._known[key]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each id adds to the text. Empty where a character is complete only with the next one."""
        if self.text is None:
            return [str(token) for token in ids]
        stream = Stream(self.text)
        found = [stream.push(token) for token in ids]
        rest = stream.finish()
        if found:
            found[-1] += rest
        return [self.plain(piece) for piece in found]

    def special(self, token: int) -> bool:
        """Whether it is none of the text: the end of it, or of somebody's turn."""
        return token in self._special

    def plain(self, text: str) -> str:
        """`text` without characters that a page cannot hold."""
        text = re.sub("[\x80-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]", BROKEN, text)
        return text.translate(CONTROLS)

    def _piece(self, before: int | None, token: int) -> str:
        if self.text is None:
            return str(token)
        if token not in self._special:
            start = [] if before is None or before in self._special else [before]
            head = self.text.decode(start)
            piece = self.text.decode([*start, token])[len(head) :]
            if piece and BROKEN not in piece + head:
                return piece
        name = getattr(self.text.tokenizer, "convert_ids_to_tokens", lambda _token: None)(token)
        return str(name) if name else f"#{token}"


# ---- numbers -------------------------------------------------------------------------------------------
def _figures(result: Generation) -> dict[str, Any]:
    told, trace = result.speculation or {}, result.trace or []
    draft = told.get("draft_seconds", sum(record["draft"] for record in trace))
    verify = told.get("verify_seconds", sum(record["verify"] for record in trace))
    rest = told.get("rest_seconds", max(0.0, result.decode_seconds - draft - verify))
    whole = (draft + verify + rest) or 1.0
    rows, given = sum(len(r["tokens"]) for r in trace), sum(len(r["new"]) for r in trace)
    return {
        "speed": result.tokens_per_second,
        "new": result.new_tokens,
        "prompt": result.prompt_tokens,
        "prefill": result.prefill_seconds,
        "rounds": len(trace),
        "rows": rows,
        "each": given / len(trace) if trace else None,
        "rows_each": rows / len(trace) if trace else None,
        "shares": [
            {"name": name, "share": 100 * seconds / whole, "seconds": seconds}
            for name, seconds in (("draft", draft), ("verify", verify), ("rest", rest))
        ],
        "drafter": told.get("drafter", "none"),
        "tree": told.get("tree", "none"),
        "mode": told.get("mode", "plain decoding"),
        "verdict": result.settings.get("exactness", "not tested"),
    }


def _acceptance(trace: Sequence[Record]) -> list[dict[str, Any]]:
    """Of the proposals whose parent was accepted, how many were too: by depth, and by place among their siblings."""
    tables: tuple[dict[int, list[int]], dict[int, list[int]]] = ({}, {})
    for record in trace:
        kept = {0, *(node for node in committed_nodes(record) if node is not None)}
        children: dict[int, int] = {}
        for node, (parent, depth) in enumerate(zip(record["parents"], depths(record["parents"]))):
            rank = children[parent] = children.get(parent, 0) + 1
            if parent not in kept:
                continue
            for table, entry in zip(tables, (depth, rank)):
                counts = table.setdefault(min(entry, LAST + 1), [0, 0])
                counts[0] += 1
                counts[1] += node in kept
    return [
        {
            "name": name,
            "bars": [
                {"at": entry if entry <= LAST else f"over {LAST}", "tried": tried, "hit": hit,
                 "share": 100 * hit / tried}
                for entry, (tried, hit) in sorted(table.items())
            ],
        }
        for name, table in zip(("depth", "rank"), tables)
    ]  # fmt: skip


# ---- text ----------------------------------------------------------------------------------------------
def _origins(trace: Sequence[Record]) -> list[str]:
    """All drafters of the trees. Those we know come first, each at its own place, whether they are there or not."""
    found = {origin for record in trace for origin in record["origins"][1:]}
    return [*DRAFTERS, *sorted(found - set(DRAFTERS))]


def _tokens(result: Generation, labels: Labels, classes: dict[str, str]) -> list[dict[str, Any]]:
    """The new tokens in order: the first one came with the prompt, the others in rounds."""
    trace = result.trace or []
    sources: list[tuple[int, Record | None, int | None]] = [(0, None, None)]
    for number, record in enumerate(trace, 1):
        sources += [(number, record, node) for node in committed_nodes(record)]
    shown = []
    for token, piece, (number, record, node) in zip(
        result.token_ids, labels.pieces(result.token_ids), sources
    ):
        origin = colour = None
        title = f"round {number}, id {token}" if number else f"with the prompt, id {token}"
        if record is not None and node is not None:
            origin = record["origins"][node]
            colour = classes[origin]
            title += f", {origin or 'draft'}, value {record['values'][node]:.3g}"
        elif number:
            title += ", from the model itself"
        special = not piece and labels.special(token)
        if special:
            piece = labels(None, token)
        kind = "special" if special else "part" if not piece else "line" if not piece.strip("\n") else ""
        linked = number if record is not None and len(record["tokens"]) > 1 else None
        shown.append(
            {"id": token, "piece": piece, "title": title, "colour": colour, "kind": kind,
             "origin": origin, "round": number, "linked": linked}
        )  # fmt: skip
    return shown


def _legend(
    tokens: Sequence[dict[str, Any]], origins: Sequence[str], classes: dict[str, str]
) -> list[dict[str, Any]]:
    """The drafters that are in the text, with how many tokens each found; and those that the model gave."""
    counts = {origin: sum(token["origin"] == origin for token in tokens) for origin in origins}
    lines = [
        {"name": origin or "draft", "colour": classes[origin], "count": count}
        for origin, count in counts.items()
        if count
    ]
    own = sum(token["origin"] is None for token in tokens)
    return [*lines, {"name": "the model itself", "colour": None, "count": own}]


# ---- rounds --------------------------------------------------------------------------------------------
def _rounds(
    trace: Sequence[Record], tokens: Sequence[dict[str, Any]], labels: Labels, colour: Callable[[str], str]
) -> list[dict[str, Any]]:
    """A tree for each round that had one; rounds without follow each other in one line. The round that gave most is
    unfolded."""
    shown: list[dict[str, Any]] = []
    by_round: dict[int, list[dict[str, Any]]] = {}
    for token in tokens:
        by_round.setdefault(token["round"], []).append(token)
    drawn, widest = 0, max((len(record["new"]) for record in trace if len(record["tokens"]) > 1), default=0)
    for number, record in enumerate(trace, 1):
        own = by_round.get(number, [])
        milliseconds = 1e3 * record["draft"], 1e3 * record["verify"]
        if len(record["tokens"]) == 1 or drawn == TREES:
            if not shown or shown[-1]["svg"]:
                shown.append({"svg": "", "first": number, "tokens": [], "draft": 0.0, "verify": 0.0})
            shown[-1]["last"] = number
            shown[-1]["tokens"] += own
            shown[-1]["draft"] += milliseconds[0]
            shown[-1]["verify"] += milliseconds[1]
            continue
        drawn += 1
        name = f"Draft tree of round {number}: {len(record['tokens'])} nodes, {len(record['new'])} tokens committed"
        best = len(record["new"]) == widest
        widest = 0 if best else widest
        shown.append(
            {"svg": tree_picture(record, labels, colour, name), "number": number, "tokens": own,
             "rows": len(record["tokens"]), "depth": max(depths(record["parents"])),
             "draft": milliseconds[0], "verify": milliseconds[1], "open": best}
        )  # fmt: skip
    return shown
