"""The command `elision bench-verify`: what verifying M rows costs here, and what size of draft that makes best."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .generate_command import Model, check_form, offline
from .shell import out, print_json, working

CHANCES = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Chances of a drafted token for which the best chain is shown."""


def bench_verify(
    model: Model,
    bits: Annotated[int | None, typer.Option(help="4, 8, 16 or 32; default: what the model has.")] = None,
    runtime: Annotated[str, typer.Option(help="onnxruntime or torch.")] = "onnxruntime",
    context: Annotated[int | None, typer.Option(metavar="N", min=2, max=1 << 24)] = None,
    threads: Annotated[int, typer.Option(min=0, max=4096, help="Threads; 0: the runtime chooses.")] = 0,
    anew: Annotated[bool, typer.Option("--anew", help="Measure again, even where a curve was kept.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Measure what verifying M rows costs on this machine, and say how much drafting that makes worth while."""
    check_form(bits, runtime)
    offline()
    from .lm_open import open_model
    from .verify_costs import costs_for

    with working("reading the model", silent=json) as tell:
        opened = open_model(model, bits=bits, runtime=runtime, context=context, threads=threads, notify=tell)
        costs = costs_for(opened.model, opened.key, threads, tell, anew=anew)
    found = describe(costs)
    if json:
        print_json({"model": model, "settings": opened.settings, **found})
        return
    console = out()
    pasts = found["pasts"]
    console.print(f"ms of a verification, after {', '.join(map(str, pasts))} tokens; T(M)/T(1)", markup=False)
    for row, times in zip(found["rows"], zip(*found["milliseconds"])):
        shown = "  ".join(
            f"{time:7.2f} {time / first[0]:5.2f}x" for time, first in zip(times, found["milliseconds"])
        )
        console.print(f"{row:4d} rows  {shown}", markup=False)
    for entry in found["best_chains"]:
        console.print(
            f"chance {entry['chance']:.1f} of a drafted token: {entry['rows']} rows, "
            f"{entry['tokens']:.2f} tokens a verification, {entry['speedup']:.2f}x of plain decoding",
            markup=False,
        )


def describe(costs: Any) -> dict[str, Any]:
    """The curve, and for each chance of a drafted token the chain of the most tokens a second, by the costs after
    `pasts[0]` tokens and a draft that costs nothing."""
    curve = costs.curve(costs.pasts[0], costs.rows[-1])
    best = []
    for chance in CHANCES:
        tokens = {m: (1 - chance**m) / (1 - chance) for m in range(1, len(curve))}
        rows = max(tokens, key=lambda m: tokens[m] / curve[m])
        best.append(
            {
                "chance": chance,
                "rows": rows,
                "tokens": round(tokens[rows], 3),
                "speedup": round(tokens[rows] * curve[1] / curve[rows], 3),
            }
        )
    milliseconds = [[round(second * 1e3, 3) for second in line] for line in costs.seconds]
    return {"rows": costs.rows, "pasts": costs.pasts, "milliseconds": milliseconds, "best_chains": best}
