"""Runs the benchmarks and keeps their results: python benchmarks/run.py [NAME ...] [--quick].

Both sides of a comparison run in one process, in turn; figures are medians. Results go to
benchmarks/results/, the table in docs/benchmarks.md is made from them.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

from harness import RESULTS, keep, machine

BENCHMARKS = ("vit_cpu", "focus", "compile_share", "analysis_speed", "match_share")
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
START, END = "<!-- results: written by benchmarks/run.py -->", "<!-- end of results -->"


def table() -> str:
    """One row for every result there is."""
    rows = ["| benchmark | measured | aim | machine | date |", "| --- | --- | --- | --- | --- |"]
    for name in BENCHMARKS:
        path = RESULTS / f"{name}.json"
        if path.exists():
            data = json.loads(path.read_text(encoding="utf-8"))
            where = f"{data['machine']['processor']}, {data['machine']['torch_threads']} threads"
            rows.append(f"| {data['what']} | {data['figure']} | {data['aim']} | {where} | {data['date']} |")
    return "\n".join(rows)


def fill_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    head, rest = text.split(START)
    tail = rest.split(END)[1]
    PAGE.write_text(f"{head}{START}\n\n{table()}\n\n{END}{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="smaller models, few rounds; nothing is kept")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark is called {unknown[0]!r} (there are {', '.join(BENCHMARKS)})")
    for name in options.names or BENCHMARKS:
        where = machine()
        print(f"{name} ...", flush=True)
        data = importlib.import_module(name).run(options.quick)
        print(f"{data['what']}: {data['figure']} (aim: {data['aim']})", flush=True)
        if not options.quick:
            keep(name, {"machine": where, **data})
    if not options.quick:
        fill_page()


if __name__ == "__main__":
    main()
