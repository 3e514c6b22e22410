"""Runs the benchmarks and keeps their results: python benchmarks/run.py [NAME ...] [--quick | --pages].

Both sides of a comparison run in one process, in turn; figures are medians. Results go to
benchmarks/results/; tables and charts in docs/ are made from them.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import families
import pictures
from harness import RESULTS, keep, machine

MODELS = (
    "vit_cpu",
    "focus",
    "tune_focus",
    "schedule_gain",
    "match_share",
    "compile_share",
    "analysis_speed",
    "linear_nbits",
    "eight_bits",
)
LANGUAGE = (
    "decode",
    "verify_cost",
    "speculation",
    "speculation_exact",
    "perplexity",
    "h2o",
    "windowed",
    "token_drop",
    "dynamic_vocab",
    "segment_words",
    "cached_attention",
)
OPS = ("mean_heads", "match_tokens", "merge_tokens", "restore_tokens", "attention", "joined_attention")
BENCHMARKS = (*MODELS, *LANGUAGE, *OPS, "triton_kernels")
DOCS = Path(__file__).parent.parent / "docs"
START, END = "<!-- results: written by benchmarks/run.py -->", "<!-- end of results -->"
OPS_START, OPS_END = "<!-- ops: written by benchmarks/run.py -->", "<!-- end of ops -->"
WAYS = ("ATen", "Inductor", "C++ in torch", "ONNX Runtime", "C++ in ONNX Runtime")


def kept(name: str) -> Any:
    """The last result of a benchmark, None where there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def op_table() -> str:
    """One row for every case of every op: milliseconds of every way to run it, and the floor."""
    rows = [f"| op | case | {' | '.join(WAYS)} | floor | bound |", "| --- " * (len(WAYS) + 4) + "|"]
    for name in OPS:
        data = kept(name)
        for row in data["rows"] if data is not None else ():
            times = " | ".join(f"{row['ms'][way]:.3g}" if way in row["ms"] else "" for way in WAYS)
            rows.append(f"| `{name}` | {row['case']} | {times} | {row['floor_ms']:.3g} | {row['bound']} |")
    return "\n".join(rows)


def table() -> str:
    """One row for every result there is."""
    rows = ["| benchmark | measured | aim | machine | date |", "| --- | --- | --- | --- | --- |"]
    for name in (*MODELS, *LANGUAGE):
        data = kept(name)
        if data is not None:
            where = f"{data['machine']['processor']}, {data['machine']['torch_threads']} threads"
            rows.append(f"| {data['what']} | {data['figure']} | {data['aim']} | {where} | {data['date']} |")
    return "\n".join(rows)


def fill_pages() -> None:
    """Tables and charts in docs/, from the results there are."""
    todo = [("benchmarks.md", (START, END), table()), ("benchmarks.md", (OPS_START, OPS_END), op_table())]
    todo += [(page, families.marks(name), make()) for (page, name), make in families.TABLES.items()]
    for name, (start, end), content in todo:
        page = DOCS / name
        head, rest = page.read_text(encoding="utf-8").split(start)
        page.write_text(f"{head}{start}\n\n{content}\n\n{end}{rest.split(end)[1]}", encoding="utf-8")
    for name in pictures.CHARTS:
        pictures.draw(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="smaller models, few rounds; nothing is kept")
    parser.add_argument(
        "--pages", action="store_true", help="write tables and charts of docs/ anew, run nothing"
    )
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark is called {unknown[0]!r} (there are {', '.join(BENCHMARKS)})")
    if options.pages:
        fill_pages()
        return
    for name in options.names or BENCHMARKS:
        where = machine()
        print(f"{name} ...", flush=True)
        data = importlib.import_module(name).run(options.quick)
        print(f"{data['what']}: {data['figure']} (aim: {data['aim']})", flush=True)
        if not options.quick:
            keep(name, {"machine": where, **data})
    if not options.quick:
        fill_pages()


if __name__ == "__main__":
    main()
