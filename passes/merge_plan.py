"""Where token merging cuts a token space, and why it may not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .analysis.masks import causal_because, padding_mask
from .analysis.signatures import by_position
from .analysis.spaces import Analysis, Block, TokenSpace
from .cut_maps import WHOLE
from .errors import Refused
from .ir.graph import Op, Value

if TYPE_CHECKING:
    from .token_merge import MergeOptions, Metric


@dataclass(eq=False)
class Cut:
    """Merge `value` right after `op`, with similarity on the keys of `attention` (`keys`) or on `features`."""

    op: Op
    value: Value
    attention: Op
    features: Value
    r: int
    keys: bool


@dataclass(eq=False)
class Plan:
    """All cuts of one space. `grid`: (height, width) for destinations on a grid; `padding`: the mask that says
    which tokens are padding."""

    name: str
    space: TokenSpace
    cuts: list[Cut]
    grid: tuple[int, int] | None = None
    padding: Value | None = None


def schedule(r: int | list[int], shape: str, count: int) -> list[int]:
    """Tokens to remove in each of `count` blocks; "down" falls linearly from 2r to 0, "up" rises."""
    if isinstance(r, list):
        return (r + [0] * count)[:count]
    if shape == "constant" or count == 1:
        return [r] * count
    first, last = (2 * r, 0) if shape == "down" else (0, 2 * r)
    return [int(first + (last - first) * i / (count - 1)) for i in range(count)]


def plan_space(analysis: Analysis, space: TokenSpace, options: MergeOptions) -> Plan:
    """The cuts that `options` mean in `space`. Raises Refused with the reason when there can be none."""
    blocks = [block for block in space.blocks if block.add is not None]
    first = space.blocks[0]
    if first.attention.kind != "attention":
        raise Refused(f"{first.attention.target} (%{first.attention.name}) is merged already")
    if not blocks:
        raise Refused(f"{first.attention.target} (%{first.attention.name}): {first.problem}")
    for block in space.blocks:
        reason = causal_because(analysis, block.attention)
        if reason:
            raise Refused(
                f"{block.attention.target} (%{block.attention.name}) is causal ({reason}): a merged token would "
                "let earlier tokens see later ones"
            )
    for name, given in (("r", options.r), ("metric", options.metric)):
        if isinstance(given, list) and len(given) > len(blocks):
            what = "numbers" if name == "r" else "words"
            raise Refused(
                f"{name} has {len(given)} {what}, and the space of {space.length} tokens {len(blocks)} blocks"
            )
    if options.protect is not None:
        space.prefix = options.protect
    counts = schedule(options.r if options.r is not None else 0, options.schedule, len(blocks))
    keys = [metric == "keys" for metric in _metrics(options, len(blocks))]
    plan = Plan(first.attention.name, space, [], padding=padding_mask(analysis, space))
    if options.where == "around" and options.destinations != "bipartite":
        plan.grid = _grid(analysis, space, options)
    _in_range(space, counts, plan.grid, options)
    for block, r, by_keys in zip(blocks, counts, keys):
        if r == 0 and options.ratio is None:
            continue
        cut = _cut(analysis, space, block, options.where, r, by_keys)
        _check(analysis, space, cut)
        plan.cuts.append(cut)
    return plan


def _metrics(options: MergeOptions, count: int) -> list[Metric]:
    """What tells similar tokens in each of `count` blocks."""
    default: Metric = "keys" if options.where == "after" else "hidden"
    if options.metric is None or isinstance(options.metric, str):
        every: Metric = options.metric or default
        return [every for _ in range(count)]
    given = options.metric
    return [given[i] if i < len(given) else default for i in range(count)]


SYMBOLIC = 64
"""How many tokens a search tries to merge in a block at most, where it is not known how many there are."""


def most_at_once(space: TokenSpace, grid: tuple[int, int] | None, options: MergeOptions) -> int:
    """How many tokens the first block could merge."""
    if not isinstance(space.length, int):
        return SYMBOLIC
    if grid is not None:
        return space.length - (grid[0] // options.cell[0]) * (grid[1] // options.cell[1])
    return max(space.length - space.prefix - space.suffix, 0) // 2


def _in_range(
    space: TokenSpace, counts: list[int], grid: tuple[int, int] | None, options: MergeOptions
) -> None:
    """Later blocks may run out of tokens and merge fewer; more than the first block could ever merge is a mistake."""
    if not isinstance(space.length, int):
        return
    most = most_at_once(space, grid, options)
    if max(counts) > most:
        raise Refused(
            f"r={max(counts)} is out of range: one block can merge at most {most} of these {space.length} tokens"
        )


def _grid(analysis: Analysis, space: TokenSpace, options: MergeOptions) -> tuple[int, int] | None:
    grid = analysis.grid(space)
    if grid is None and options.destinations == "grid":
        raise Refused(
            f"destinations=grid: the {space.length} tokens are not known to be a grid of fixed size"
        )
    return grid


def _cut(analysis: Analysis, space: TokenSpace, block: Block, where: str, r: int, keys: bool) -> Cut:
    add, skip, attention = block.add, block.skip, block.attention
    assert add is not None and skip is not None
    if where == "after":
        return Cut(add, add.output, attention, add.output, r, keys)
    value = skip if where == "before" else entry(analysis, space, block)
    if value.producer is None:
        raise Refused(
            f"%{value.name} is an input of the graph: there is no op after which it could be merged"
        )
    return Cut(value.producer, value, attention, skip, r, keys)


def entry(analysis: Analysis, space: TokenSpace, block: Block) -> Value:
    """The last value before the projections to queries, keys and values that all three come from."""
    attention, skip, flow = block.attention, block.skip, analysis.flow
    operands = [v for v in attention.inputs[:3] if v is not None]
    assert skip is not None
    last = flow.position[attention]
    found = skip
    for op in reversed(analysis.graph.ops[:last]):
        if flow.depends(op.output, skip) and all(flow.depends(v, op.output) for v in operands):
            found = op.output
            break
    while found is not skip and found.producer is not None:
        op = found.producer
        data = [v for v in op.inputs if v is not None and flow.comes_from(v)]
        through = op.kind in (
            "linear",
            "matmul",
            "reshape",
            "transpose",
            "tie",
            "split",
            "unbind",
            "slice",
            "select",
        )
        if len(data) != 1 or not (
            through or by_position(op) or (op.kind == "elementwise" and not _whole(analysis, space, found))
        ):
            break
        found = data[0]
    return found


def _whole(analysis: Analysis, space: TokenSpace, value: Value) -> bool:
    return [ends for _, ends in analysis.token_axes(space, value)] == [WHOLE]


def _check(analysis: Analysis, space: TokenSpace, cut: Cut) -> None:
    """The value to merge and the value that is compared must have the tokens as one axis, and the batch."""
    attention = cut.attention
    if not _whole(analysis, space, cut.value):
        raise Refused(
            f"{attention.target} (%{attention.name}) attends within parts of the tokens (windows or rows of a grid): "
            f"its {space.length} tokens are not one axis of %{cut.value.name}"
        )
    if space.batch and analysis.batch_axis(space, cut.value) is None:
        raise Refused(
            f"{attention.target} (%{attention.name}) has a batch axis that %{cut.value.name} has not"
        )
    measured = attention.inputs[1] if cut.keys else cut.features
    assert measured is not None
    axes = analysis.token_axes(space, measured)
    if cut.keys:
        if measured.rank not in (3, 4) or axes != [(measured.rank - 2, WHOLE)]:
            raise Refused(
                f"%{measured.name}, the keys of %{attention.name}, are not [batch, heads, tokens, width]"
            )
    elif measured.rank != 3 or axes != [(1, WHOLE)]:
        raise Refused(
            f"%{measured.name} is not [batch, tokens, width]: metric=hidden cannot compare its tokens"
        )
