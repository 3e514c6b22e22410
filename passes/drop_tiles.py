"""Sharing the budget of an image out among the whole picture and its tiles (HiRED)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .drop_policies import Tower, attention_score
from .errors import Refused
from .ir.graph import Dim, Value
from .writer import Writer

if TYPE_CHECKING:
    from .token_drop import DropOptions


def tile_counts(write: Writer, tower: Tower, options: DropOptions, pictures: Dim) -> Value | None:
    """How many tokens each picture keeps, [T] int32; None where pictures are images of their own. `pictures`: in each
    text."""
    if options.tiles == 1:
        return None
    if not isinstance(pictures, int) or pictures % options.tiles:
        raise Refused(
            f"each text has {pictures} pictures, which are no images of {options.tiles} pictures each"
        )
    grid = tower.analysis.grid(tower.space) or _square(tower.candidates)
    score, _ = attention_score(write, tower, options.budget_layer, options.heads)
    rows, columns = options.grid
    return write(
        "tile_budgets",
        [score],
        rows=rows,
        columns=columns,
        height=grid[0],
        width=grid[1],
        prefix=tower.space.prefix,
        budget=options.kept_in(tower.candidates, options.tiles),
        alpha=options.alpha,
        published=options.compat == "reference",
    )[0]


def _square(count: int) -> tuple[int, int]:
    side = round(count**0.5)
    if side * side != count:
        raise Refused(
            f"the {count} tokens of a picture are no square, and the graph does not show their grid"
        )
    return side, side
