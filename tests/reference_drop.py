"""Rules that choose which image tokens a language model gets, in eager PyTorch, to check the compiler against.

Written from descriptions of Arif et al., "HiRED" (arXiv 2408.10945), Yang et al., "VisionZip" (arXiv
2412.04467), Shang et al., "LLaVA-PruMerge" (arXiv 2403.15388) and Chen et al., "FastV" (arXiv 2403.06764): our
design notes on token reduction, whose sections are named below. Where the published code and the rule we want
differ, `published` stands in the name, or an option asks for the other form.

Common to all: scores are larger for tokens to keep; of equal scores the lower index is kept; a count of 0 keeps
nothing; kept tokens stay in order of position. Shares are cleaned of rounding before they are cut down, so 70 %
of 10 is 7. P is the number of patches of one picture, without the class token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Zipped(NamedTuple):
    """What VisionZip does with T pictures of P patches: kept bool [T, P], the dominant tokens; targets int64
    [T, contextual], positions; assigned int64 [T, P], the contextual slot of every other token (a target has
    its own), -1 for dominant tokens and, where there are no slots, for all."""

    kept: Tensor
    targets: Tensor
    assigned: Tensor


def class_row(
    q: Tensor, k: Tensor, scale: float | None = None, heads: Literal["sum", "mean"] = "sum"
) -> Tensor:
    """Attention of the class token (position 0) to all tokens: q, k float [T, H, N, d] -> [T, N], same dtype.

    Column 0 is the class token's own; callers drop it. scale is 1/sqrt(d) unless given. HiRED (notes 6.1) and
    VisionZip (7) sum over heads; PruMerge (8) does not split them: H = 1, d the full width."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    row = (q[:, :, :1] @ k.transpose(-1, -2) * factor).softmax(-1)[:, :, 0]
    return row.sum(1) if heads == "sum" else row.mean(1)


def largest_remainder(total: int, shares: Sequence[float], cap: int) -> list[int]:
    """Whole numbers that add up to total, in proportion to shares, none above cap (notes 16).

    What the cap cuts off goes to the others in proportion to their shares, in equal parts if all of those are 0.
    Equal remainders: the lower index gets the token. Exact: shares are taken as the fractions they are."""
    if not 0 <= total <= cap * len(shares):
        raise ValueError(f"{total} tokens do not fit into {len(shares)} parts of at most {cap}")
    if any(not math.isfinite(share) or share < 0 for share in shares):
        raise ValueError(f"shares must be finite and not negative: {list(shares)}")
    result, open_parts, left = [0] * len(shares), list(range(len(shares))), total
    quota: dict[int, Fraction] = {}
    while open_parts:
        weight = {i: Fraction(shares[i]) for i in open_parts}
        if not sum(weight.values()):
            weight = dict.fromkeys(open_parts, Fraction(1))
        whole = sum(weight.values())
        quota = {i: left * weight[i] / whole for i in open_parts}
        full = [i for i in open_parts if quota[i] >= cap]
        if not full:
            break
        for i in full:
            result[i] = cap
        left -= cap * len(full)
        open_parts = [i for i in open_parts if i not in full]
    for i in open_parts:
        result[i] = math.floor(quota[i])
    by_remainder = sorted(open_parts, key=lambda i: (result[i] - quota[i], i))
    for i in by_remainder[: total - sum(result)]:
        result[i] += 1
    return result


def hired_published_15(row_final: Tensor, budget_rate: float) -> Tensor:
    """HiRED for LLaVA-1.5 as published (notes 6.3): row_final float [B, P] -> bool [B, P].

    The floor(budget_rate * P) best patches of batch element 0 are kept in every row."""
    _check_rate(budget_rate)
    first = _largest(row_final[:1], _floor(budget_rate * row_final.shape[1]))
    return first.expand_as(row_final).clone()


def hired_published_next(
    row_initial_full: Tensor, rows_final: Tensor, rate: float, alpha: float, grid: tuple[int, int]
) -> Tensor:
    """HiRED for LLaVA-NeXT as published (notes 6.3): row_initial_full float [P], rows_final float [T, P] -> bool
    [T, P].

    T = 1 + rows * cols pictures of one image: the full image, then its tiles in raster order. Differs from the
    paper (notes 6.1) as the published code does: a tile's score is how many of the floor((1 - alpha) * P) best
    patches of row_initial_full lie in its region; regions are runs of P / (rows * cols) consecutive patches,
    so horizontal strips; floors, and the clamp of a picture to P, leave part of the budget unused. Without a vote
    the tiles get nothing. At rate 1 the published code selects nothing and all is kept."""
    patches, tiles = _check_pictures(row_initial_full, rows_final, rate, alpha, grid)
    if rate == 1:
        return torch.ones_like(rows_final, dtype=torch.bool)
    if patches % tiles:
        raise ValueError(f"{patches} patches cannot be reshaped to {grid[0]} x {grid[1]} strips")
    budget = _floor(rate * patches * (tiles + 1))
    for_full = _floor(alpha * budget)
    votes = _largest(row_initial_full, _floor((1 - alpha) * patches))
    score: list[int] = votes.reshape(tiles, -1).sum(-1).tolist()
    counts = [for_full, *((budget - for_full) * votes_here // max(1, sum(score)) for votes_here in score)]
    return _largest(rows_final, torch.tensor([min(patches, count) for count in counts]))


def hired(
    row_initial_full: Tensor,
    rows_final: Tensor,
    rate: float,
    alpha: float,
    grid: tuple[int, int],
    patch_grid: tuple[int, int] | None = None,
) -> Tensor:
    """HiRED as in the paper (notes 6.1), but spending its budget (16): row_initial_full float [P], rows_final
    float [T, P] -> bool [T, P] with exactly floor(rate * P * T) kept.

    T = 1 + rows * cols pictures of one image: the full image, then its tiles in raster order. patch_grid is the
    height and width of the full image in patches, a square unless given. The full image is to get floor(alpha *
    budget); tiles share the rest by the sum of row_initial_full over their regions, by largest remainder. What
    does not fit into P patches of one picture goes to the tiles, or from them to the full image."""
    patches, tiles = _check_pictures(row_initial_full, rows_final, rate, alpha, grid)
    if patch_grid is None:
        patch_grid = (math.isqrt(patches), math.isqrt(patches))
    if patch_grid[0] * patch_grid[1] != patches:
        raise ValueError(f"{patches} patches are not a grid of {patch_grid[0]} x {patch_grid[1]}")
    budget = _floor(rate * patches * (tiles + 1))
    for_tiles = min(budget - min(patches, _floor(alpha * budget)), tiles * patches)
    region = tile_of_patch(patch_grid, grid)
    values = row_initial_full.cpu()
    score = [math.fsum(values[region == tile].tolist()) for tile in range(tiles)]  # in any order the same
    counts = [budget - for_tiles, *largest_remainder(for_tiles, score, patches)]
    return _largest(rows_final, torch.tensor(counts))


def tile_of_patch(patch_grid: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Which tile of grid (rows, cols) holds the centre of each patch of the full image: int64 [P], raster order.

    A centre on the border of two tiles belongs to the later one. A tile may hold no centre."""
    row, col = ((2 * torch.arange(n) + 1) * parts // (2 * n) for n, parts in zip(patch_grid, grid))
    return (row[:, None] * grid[1] + col).flatten()


def visionzip(row: Tensor, keys: Tensor, dominant: int, contextual: int) -> Zipped:
    """VisionZip (notes 7): row float [T, P], keys float [T, P, d] (mean over heads, patches only) -> Zipped.

    The `dominant` best patches are kept. Of the R others every floor(R / contextual)-th, from the first, is a
    target, and each other one goes to the target with the most similar key (cosine), the lower slot if equal.
    `dominant` counts patches; the class token, which the published count includes, is the caller's."""
    pictures, patches = row.shape
    rest = patches - dominant
    if dominant < 0 or not 0 <= contextual <= rest:
        raise ValueError(f"{dominant} dominant and {contextual} contextual tokens of {patches} patches")
    kept = _largest(row, dominant)
    others = _places(~kept, rest)
    targets = others[:, :: rest // contextual][:, :contextual] if contextual else others[:, :0]
    assigned = torch.full_like(kept, -1, dtype=torch.int64)
    if contextual:
        slots = torch.arange(contextual, device=row.device).expand(pictures, -1)
        similarity = _cosine(keys, _gather(keys, targets))  # [T, P, contextual]
        nearest = similarity.argsort(dim=-1, descending=True, stable=True)[..., 0]
        assigned = nearest.scatter(1, targets, slots).masked_fill(kept, -1)
    return Zipped(kept, targets, assigned)


def visionzip_features(
    x: Tensor, kept: Tensor, targets: Tensor, assigned: Tensor, *, mean: bool = False
) -> Tensor:
    """Tokens that VisionZip passes on (notes 7): x float [T, P, C] and a Zipped -> [T, dominant + contextual, C].

    Dominant tokens by position, then contextual ones by slot. As published a contextual token is its target plus
    the mean of the others assigned to it (0 if there are none), so about twice as large; with `mean` it is the
    mean of the target and all of them."""
    contextual = targets.shape[1]
    first = _gather(x, _places(kept, int(kept[0].sum()) if len(kept) else 0))
    belongs = assigned[:, None, :] == torch.arange(contextual, device=x.device)[:, None]  # [T, contextual, P]
    if not mean:
        belongs = belongs.scatter(2, targets[..., None], False)
    weight = belongs.to(x.dtype)
    merged = (weight @ x) / weight.sum(-1, keepdim=True).clamp(min=1)
    return torch.cat([first, merged if mean else _gather(x, targets) + merged], 1)


def prumerge(
    row: Tensor, keys: Tensor, x: Tensor, keep: int, neighbours: int = 32, *, mean: bool = False
) -> tuple[Tensor, Tensor]:
    """PruMerge (notes 8), top-K form: row float [T, P], keys float [T, P, d], x float [T, P, C] -> kept bool
    [T, P] and merged [T, keep, C] by position.

    Each kept token i takes in the `neighbours` tokens with the most similar keys (cosine) among all others, kept
    ones too (at most P - 1): x_i + sum a_j x_j with the scores a, as published. With `mean`: a_i x_i + sum a_j x_j
    over the sum of these weights, or x_i if that is 0. The published extra token of all pruned is not made."""
    patches = row.shape[1]
    if not 0 <= keep <= patches or neighbours < 0:
        raise ValueError(f"keep {keep} of {patches} patches with {neighbours} neighbours")
    kept = _largest(row, keep)
    places = _places(kept, keep)
    own = F.one_hot(places, patches).bool()  # [T, keep, P]
    similarity = _cosine(_gather(keys, places), keys).masked_fill(own, -torch.inf)
    near = _largest(similarity, max(0, min(neighbours, patches - 1)))
    scores = row[:, None, :].to(x.dtype)
    if not mean:
        return kept, _gather(x, places) + (near * scores) @ x
    weight = (near | own) * scores
    total = weight.sum(-1, keepdim=True)
    return kept, torch.where(total > 0, weight @ x / total, _gather(x, places))


def prumerge_count(row: Tensor) -> Tensor:
    """PruMerge (notes 8), how many tokens to keep: row float [T, P] -> int64 [T].

    The scores above Q3 + 1.5 IQR, with quartiles of each picture (published: of the whole batch), interpolated
    linearly. 0 where there are no outliers."""
    q1, q3 = row.double().quantile(torch.tensor([0.25, 0.75]).to(row.device, torch.float64), dim=-1)
    return (row.double() > (q3 + 1.5 * (q3 - q1))[:, None]).sum(-1)


def fastv(row_last: Tensor, ratio: float) -> Tensor:
    """FastV (notes 9): row_last float [B, P], the last query's attention to the image, mean over heads -> bool
    [B, P] of those kept.

    round(P * (1 - ratio)) of every sample (an exact half goes to the even number), by its own scores (published:
    by those of batch element 0)."""
    _check_rate(ratio)
    return _largest(row_last, round(_clean(row_last.shape[1] * (1 - ratio))))


def _largest(score: Tensor, count: int | Tensor) -> Tensor:
    """Mask of the count (one number, or one per row) largest of score [..., P]; of equals the first."""
    rank = score.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return rank < torch.as_tensor(count, device=score.device)[..., None]


def _places(kept: Tensor, count: int) -> Tensor:
    """Positions [T, count] of the True entries of kept [T, P], count in each row."""
    return kept.nonzero()[:, 1].reshape(len(kept), count)


def _gather(x: Tensor, places: Tensor) -> Tensor:
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """[T, M, d], [T, N, d] -> float32 [T, M, N]. Rounded from float64, so that equal keys are equally near."""
    unit_a, unit_b = (v.double() / v.double().norm(dim=-1, keepdim=True).clamp(min=1e-12) for v in (a, b))
    return (unit_a @ unit_b.transpose(1, 2)).float()


def _clean(value: float) -> float:
    return round(value, 9)


def _floor(value: float) -> int:
    return math.floor(_clean(value))


def _check_rate(rate: float) -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f"a share of the tokens is between 0 and 1, not {rate}")


def _check_pictures(
    row_initial_full: Tensor, rows_final: Tensor, rate: float, alpha: float, grid: tuple[int, int]
) -> tuple[int, int]:
    """Patches of a picture and number of tiles."""
    _check_rate(rate)
    _check_rate(alpha)
    tiles = grid[0] * grid[1]
    if tiles < 1 or rows_final.shape != (tiles + 1, len(row_initial_full)):
        raise ValueError(
            f"{grid[0]} x {grid[1]} tiles of {len(row_initial_full)} patches and the full image need rows_final "
            f"[{tiles + 1}, {len(row_initial_full)}], not {list(rows_final.shape)}"
        )
    return len(row_initial_full), tiles
