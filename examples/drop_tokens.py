"""What a vision-language model still answers when it sees a fifth of the picture.

python examples/drop_tokens.py --out DIR

The small trained model of examples/models/shapes-vlm answers questions about held-out pictures, as it is and with the
pass `token-drop` at several budgets, for every policy. DIR/accuracy.png has the curves, DIR/kept.png a picture with the
scores as a heat map and the patches that each policy keeps, DIR/budgets.png what is kept of several pictures at each
budget, DIR/accuracy.json the numbers. `--only-pictures` leaves the questions out.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from vlm_data import FIRST_IMAGE, PATCH, PATCHES, SIZE, decode, pictures, questions
from vlm_model import HELD_OUT, load

import elision

POLICIES = {
    "hired": "",
    "visionzip": "",
    "prumerge": " neighbours=8",
    "fastv": " layer=1",
    "similarity": "",
    "uniform": "",
    "random": "",
    "tail": "",
}
BUDGETS = (0.5, 0.2, 0.1, 0.05)
STEPS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75)
"""Budgets whose kept patches, counted, say how early a patch stays."""
ROWS = 50
"""Questions of one call; the graph is made for so many."""


def passes(policy: str, budget: float) -> str:
    return f"token-drop{{policy={policy} budget={budget}{POLICIES[policy]}}}"


class Asked:
    """Held-out questions in calls of ROWS: input_ids, attention_mask and pixels, with the right answers."""

    def __init__(self, count: int, asked: int = 5) -> None:
        self.pixels, scenes = pictures(HELD_OUT + 77, count)
        found = questions(scenes, [HELD_OUT + 77, 1], asked)
        whole = len(found.answers) // ROWS * ROWS
        self.answers = found.answers[:whole]
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = [
            (
                torch.from_numpy(found.input_ids[rows]),
                torch.from_numpy(found.attention_mask[rows]),
                torch.from_numpy(self.pixels[found.picture[rows]]),
            )
            for rows in np.split(np.arange(whole), whole // ROWS)
        ]

    @torch.no_grad()
    def accuracy(self, module: Any) -> float:
        """The share of questions that `module` answers as it should."""
        found = [module(*call)[:, -1].argmax(-1).numpy() for call in self.calls]
        return float((np.concatenate(found) == self.answers).mean())


def curves(program: Any, asked: Asked) -> dict[str, Any]:
    """Accuracy without the pass, and by policy and budget."""
    whole = asked.accuracy(program.module())
    print(f"all {PATCHES} tokens: {whole:.1%} of {len(asked.answers)} answers are right")
    found: dict[str, dict[str, float]] = {}
    for policy in POLICIES:
        found[policy] = {}
        for budget in BUDGETS:
            made = elision.optimize(program, passes(policy, budget), asked.calls[0], force=True, verify=False)
            found[policy][str(budget)] = asked.accuracy(made.module)
        shown = "  ".join(f"{float(b):.0%}: {share / whole:.3f}" for b, share in found[policy].items())
        print(f"{policy:>10}  share of that accuracy at {shown}", flush=True)
    return {"all": whole, "questions": len(asked.answers), "tokens": PATCHES, "policies": found}


def draw_curves(told: dict[str, Any], file: Path) -> None:
    """Accuracy against the share of tokens that is kept, a line for each policy."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for policy, by_budget in told["policies"].items():
        shares = [1.0, *map(float, by_budget)]
        axes.plot(shares, [told["all"], *by_budget.values()], marker="o", label=policy)
    axes.axhline(0.97 * told["all"], color="grey", linestyle=":", label="97 % of the full accuracy")
    axes.set_xscale("log")
    axes.set_xticks([1, *BUDGETS], [f"{share:.0%}" for share in (1, *BUDGETS)])
    axes.minorticks_off()
    axes.set_xlabel(f"share of the {PATCHES} image tokens that is kept")
    axes.set_ylabel("right answers")
    axes.legend()
    _save(figure, file, 120)


@torch.no_grad()
def draw_kept(program: Any, asked: Asked, file: Path, budget: float = 0.2, row: int = 0) -> None:
    """One picture, the class token's attention over it, and what each policy keeps of it."""
    call = asked.calls[0]
    panels = ["hired", "visionzip", "fastv", "similarity", "uniform", "random"]
    figure, axes = plt.subplots(2, 4, figsize=(12, 6.4), layout="constrained")
    cells = list(axes.ravel())
    picture = np.clip(call[2][row].numpy().transpose(1, 2, 0) / 2 + 0.5, 0, 1)
    _show(cells[0], picture, "the picture")
    _show(cells[1], picture, "how early patches stay (hired)")
    order = sum(_kept(program, "hired", share, call)[row] for share in STEPS)
    cells[1].imshow(_over(order), cmap="inferno", alpha=0.6)
    for cell, policy in zip(cells[2:], panels):
        kept = _over(_kept(program, policy, budget, call)[row])[..., None]
        _show(cell, picture * (0.2 + 0.8 * kept), f"{policy}, {budget:.0%}")
    figure.suptitle(decode(call[0][row].numpy()))
    _save(figure, file, 110)


@torch.no_grad()
def draw_budgets(program: Any, asked: Asked, file: Path, policy: str = "hired") -> None:
    """Pictures in rows: how early the patches of each stay, as a heat map, then what each budget keeps of it."""
    call = asked.calls[0]
    rows = [row for row in range(ROWS) if row == 0 or (call[2][row] != call[2][row - 1]).any()][:4]
    order = sum(_kept(program, policy, share, call) for share in STEPS)
    kept = {budget: _kept(program, policy, budget, call) for budget in BUDGETS}
    figure, axes = plt.subplots(len(rows), 1 + len(kept), figsize=(10, 8.6), layout="constrained")
    for line, row in zip(axes, rows):
        picture = np.clip(call[2][row].numpy().transpose(1, 2, 0) / 2 + 0.5, 0, 1)
        _show(line[0], picture, "how early patches stay" if row == rows[0] else "")
        line[0].imshow(_over(order[row]), cmap="inferno", alpha=0.6)
        for cell, (budget, flags) in zip(line[1:], kept.items()):
            title = f"{budget:.0%} of {PATCHES} tokens" if row == rows[0] else ""
            _show(cell, picture * (0.2 + 0.8 * _over(flags[row])[..., None]), title)
    _save(figure, file, 80)


def _save(figure: Figure, file: Path, dpi: int) -> None:
    """With 255 colours, which these pictures do with."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi)
    plt.close(figure)
    picture = Image.open(buffer).convert("RGB")
    picture.quantize(255, method=Image.Quantize.MAXCOVERAGE).save(file, optimize=True)


def _over(patches: Any) -> np.ndarray:
    """A number for each patch as one for each pixel."""
    side = SIZE // PATCH
    return np.kron(np.asarray(patches).reshape(side, side), np.ones((PATCH, PATCH)))


def _show(axes: Axes, picture: np.ndarray, title: str) -> None:
    axes.imshow(picture)
    axes.set_title(title, fontsize=9)
    axes.axis("off")


def _kept(program: Any, policy: str, budget: float, call: tuple[Tensor, ...]) -> np.ndarray:
    """1 for each patch of each row's picture that is kept, else 0 [ROWS, PATCHES]: from the pass's token map."""
    made = elision.optimize(program, passes(policy, budget), call, force=True, verify=False, token_map=True)
    slots = made.module(*call)[-1].numpy()
    return (slots[:, FIRST_IMAGE : FIRST_IMAGE + PATCHES] >= 0).astype(float)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("drop"), help="where pictures and numbers go")
    parser.add_argument("--pictures", type=int, default=200, help="held-out pictures, five questions each")
    parser.add_argument("--only-pictures", action="store_true", help="do not ask the questions")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    asked = Asked(given.pictures)
    model = load().requires_grad_(False)
    program = torch.export.export(model, asked.calls[0], strict=False)
    draw_kept(program, asked, given.out / "kept.png")
    draw_budgets(program, asked, given.out / "budgets.png")
    print(f"written: {given.out / 'kept.png'}, {given.out / 'budgets.png'}")
    if given.only_pictures:
        return
    told = curves(program, asked)
    (given.out / "accuracy.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    draw_curves(told, given.out / "accuracy.png")
    print(f"written: {given.out / 'accuracy.png'}, {given.out / 'accuracy.json'}")


if __name__ == "__main__":
    main()
