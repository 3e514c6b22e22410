"""What a search believes: how much loss and how much time every value of every coordinate brings.

Both are sums over coordinates, known by a prior and by every pipeline that was measured (linear regression with a
Gaussian prior: Bishop, "Pattern Recognition and Machine Learning", 2006, section 3.3). A proposal is the point of
the least loss in a given time by one draw from that belief (Thompson, Biometrika 1933), found by Lagrange's multiplier:
every group of coordinates takes the value of least loss + multiplier x time.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from .search_space import Point, Space


class Belief:
    """y = weights . features, with normal weights; `noise` is the standard deviation of one observation."""

    def __init__(self, mean: np.ndarray, deviation: np.ndarray, noise: float) -> None:
        self.prior = mean.astype(np.float64)
        self.mean = self.prior.copy()
        self.noise = noise
        self.precision = np.diag(1.0 / np.maximum(deviation, 1e-12) ** 2)
        self._sum = self.precision @ self.mean

    def observe(self, features: np.ndarray, y: float, weight: float = 1.0) -> None:
        scale = weight / self.noise**2
        self.precision = self.precision + scale * np.outer(features, features)
        self._sum = self._sum + scale * y * features
        self.mean = np.linalg.solve(self.precision, self._sum)

    def draw(self, generator: np.random.Generator, spread: float) -> np.ndarray:
        """Weights as likely as they are believed; `spread` 0: the likeliest."""
        if not spread:
            return self.mean
        upper = np.linalg.cholesky(self.precision).T
        return self.mean + spread * np.linalg.solve(upper, generator.standard_normal(len(self.mean)))


class Features:
    """Numbers of a point that loss and time are linear in.

    For every ordered coordinate how far along it is (1 at `centre`'s typical value) and the square of that; for every
    value but the first of an unordered one the same of the ordered coordinates that it belongs to; last a 1."""

    def __init__(self, space: Space, centre: Point) -> None:
        self.space = space
        self.scale = np.ones(len(space.coordinates))
        for owner, knob in space.knobs:
            indices = space.of(owner, knob.option)
            typical = max((centre[i] for i in indices), default=0)
            self.scale[indices] = max(typical, 1) if len(knob.values) > 4 else len(knob.values) - 1 or 1
        self.ordered = [i for i, c in enumerate(space.coordinates) if c.knob.ordered]
        self.tastes = [
            (i, value, [j for j in self.ordered if self._belongs(i, j)])
            for i, c in enumerate(space.coordinates)
            if not c.knob.ordered
            for value in range(1, c.last + 1)
        ]

    def _belongs(self, taste: int, ordered: int) -> bool:
        a, b = self.space.coordinates[taste], self.space.coordinates[ordered]
        return a.owner == b.owner and (a.place is None or b.place in (None, a.place))

    def __call__(self, point: Sequence[int]) -> np.ndarray:
        along = np.asarray(point, float) / self.scale
        first = along[self.ordered]
        tastes = [
            (along[own].mean() if own else 1.0) if point[i] == value else 0.0 for i, value, own in self.tastes
        ]
        return np.concatenate([first, first**2, tastes, [1.0]])


def gentlest(
    space: Space,
    features: Features,
    loss: np.ndarray,
    time: np.ndarray,
    limit: float,
    allowed: Sequence[Sequence[int]],
    base: Point,
) -> Point:
    """The point with the least loss, by weights `loss`, whose time by weights `time` is at most `limit`; where there is
    none, that of the least time. `allowed`: the values that each coordinate may take; coordinates without a group
    stay as in `base`.

    Sums are separable by groups, so that one multiplier solves them all up to rounding."""
    tables = []
    for group in space.groups():
        combinations = list(itertools.product(*(allowed[i] for i in group)))
        bare = [0 if i in group else value for i, value in enumerate(base)]
        rows = []
        for combination in combinations:
            point = list(bare)
            for i, value in zip(group, combination):
                point[i] = value
            rows.append(features(point))
        # What other coordinates add is the same in all rows.
        matrix = np.stack(rows) - features(bare)
        tables.append((group, combinations, matrix @ loss, matrix @ time))
    still = features([0 if c.knob.ordered else v for c, v in zip(space.coordinates, base)])
    room = limit - float(still @ time)

    def solve(multiplier: float) -> tuple[Point, float]:
        point, total = list(base), 0.0
        for group, combinations, losses, times in tables:
            best = int(np.argmin(losses + multiplier * times))
            total += float(times[best])
            for i, value in zip(group, combinations[best]):
                point[i] = value
        return tuple(point), total

    low, high = 0.0, 1e9
    point, total = solve(low)
    if total <= room:
        return point
    best = solve(high)[0]
    for _ in range(80):
        middle = float(np.sqrt(max(low, 1e-9) * high))
        point, total = solve(middle)
        if total <= room:
            best, high = point, middle
        else:
            low = middle
    return best
