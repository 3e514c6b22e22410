"""The search itself: constants first, then schedules proposed by a model of loss and time, raced on measured time.

1. Constants: for every choice of the other options the largest constant that keeps the bound, by bisection. The fastest
   of these that keeps it on the held-out calls too is the first champion. What constants lose there relative to here
   says how much less than the bound allows may be lost here; nothing else of those calls is used before 4.
2. Screening: points around it in which every value is moved up or down at random, each with its mirror image, so that
   every pair tells something about all coordinates at once.
3. Proposals: see `search_model`. The square root of the loss is taken as the sum, since errors of merged tokens point
   the same way more often than not; averaged over the calls, so that the hardest ones do not outweigh all others. A
   proposal that keeps the bound and may be faster races the champion.
4. Judging, on the held-out calls: of those that keep the bound on the search's calls the fastest that keeps it there
   too is chosen; so is the best constant. Both race, and the front is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..passes.errors import ElisionError
from .search_bench import Built, Race, Stopwatch, Workbench
from .search_data import Call, Goal, Outputs
from .search_model import Belief, Features, gentlest
from .search_space import Line, Point, Space

CONSTANTS, SEARCH, JUDGED = 0.35, 0.75, 0.9
"""Until when, as shares of the time, constants are scanned, proposals made, and held-out calls asked. What is left is
for the races at the end."""

LEAST = 12
"""So many pipelines are tried even where time is short: fewer tell nothing."""

ASKED = 5
"""So many constants, at most, are asked what they lose on held-out calls where none keeps the bound there."""

SCREENED = 8
STEPS = 0.004, 0.04
"""How much less time than the champion's a proposal aims at, least and most."""

ASIDE = 6
"""One proposal in so many aims at quite another time, for the front."""

SPREADS = 0.0, 0.5, 1.0
"""How widely weights are drawn, in turn; 0: the likeliest."""

FRONT = 6
"""So many points of the front, at most, are measured that the search itself did not measure."""

Tell = Callable[[str], None]


@dataclass(eq=False)
class Trial:
    """A pipeline that was tried. quality: on the search's calls; `held_out`: on the others, None where it was not run.

    ratio: its time over the original's, with a 90 % interval, None where it was not measured. root: of the loss of a
    call, averaged; a few hard calls weigh less in it than in the quality."""

    text: str
    point: Point
    kind: str  # "original", "constant" or "schedule"
    quality: float
    cost: float
    flops: float
    tokens: list[int]
    kept: bool
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    held_out: float | None = None
    root: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "pipeline": self.text,
            "kind": self.kind,
            "quality": self.quality,
            "kept": self.kept,
            "held_out": self.held_out,
            "time": self.ratio,
            "time_low": self.low,
            "time_high": self.high,
            "flops": self.flops,
            "tokens_per_block": self.tokens,
        }


@dataclass
class Judged:
    """What judging said: the chosen trial, the best constant (None where none keeps the bound) and their race."""

    chosen: Trial
    constant: Trial | None
    race: Race | None
    judged: int = 0


@dataclass
class Search:
    """One search. `seconds` are its whole time by `watch`; `tries`, if given, is the most pipelines that it tries."""

    space: Space
    bench: Workbench
    goal: Goal
    calls: Sequence[Call]
    held_out: Sequence[Call]
    watch: Stopwatch
    seconds: float
    tries: int | None
    seed: int
    tell: Tell
    trials: dict[str, Trial] = field(default_factory=dict)
    refusals: dict[Point, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.started = self.watch.now()
        self.generator = np.random.default_rng(self.seed)
        built = self.bench.original()
        self.reference = [built.run(call) for call in self.calls]
        self.perfect = float(np.mean(self.goal(self.reference, self.reference)))
        self._held_reference: list[Outputs] | None = None
        # The most loss that a schedule may have on the search's calls.
        self.allowed = max(self.goal.loss(self.goal.bound, self.perfect), 1e-12)
        self.original = Trial(
            "", self.space.start, "original", self.perfect, built.cost, built.flops, built.tokens, True, 1.0
        )
        self.trials[""] = self.original
        if not self.goal.kept(self.perfect):
            raise ElisionError(f"no pipeline can reach {self.goal}: the model itself has {self.perfect:.4g}")

    # ---- trying ----------------------------------------------------------------------------------------
    def until(self, share: float) -> float:
        return self.started + share * self.seconds

    def over(self, share: float) -> bool:
        used = self.watch.now() > self.until(share) and len(self.trials) > LEAST
        return used or (self.tries is not None and len(self.trials) - 1 >= self.tries * share / SEARCH)

    def try_point(self, point: Point) -> Trial | None:
        """Build a point and measure its quality, or remember that. None where a pass refuses it."""
        point = self.space.settled(point)
        if point in self.refusals:
            return None
        try:
            text = self.space.text(point)
            if text in self.trials:
                return self.trials[text]
            passes = self.space.passes(point)
            built = self.bench.build(text, passes)
            values = self._values(built, self.calls, self.reference)
        except ElisionError as error:
            self.refusals[point] = str(error)
            return None
        kind = "constant" if self.space.is_constant(point) else "schedule"
        quality = float(np.mean(values))
        trial = Trial(
            text, point, kind, quality, built.cost, built.flops, built.tokens, self.goal.kept(quality)
        )
        trial.root = float(np.mean([math.sqrt(min(self.loss(value), 1e6)) for value in values]))
        self.trials[text] = trial
        return trial

    def _values(self, built: Built, calls: Sequence[Call], reference: list[Outputs]) -> list[float]:
        return self.goal(reference, [built.run(call) for call in calls])

    def built(self, trial: Trial) -> Built:
        if trial is self.original:
            return self.bench.original()
        return self.bench.build(trial.text, self.space.passes(trial.point))

    def race(self, trial: Trial, other: Trial, most: int = 12, least: int = 4, share: float = 1.0) -> Race:
        """Race a trial against a measured one; the trial is measured then."""
        a, b = self.built(trial), self.built(other)
        race = self.watch.race(a, b, self.calls[0], most=most, least=least, until=self.until(share))
        base = other.ratio or 1.0
        trial.ratio, trial.low, trial.high = race.ratio * base, race.low * base, race.high * base
        return race

    # ---- 1. constants ----------------------------------------------------------------------------------
    def constants(self) -> Trial:
        """The first champion: the fastest constant that keeps the bound on the held-out calls too, else the gentlest.

        What constants lose on the held-out calls relative to the search's says how much schedules may lose here."""
        self.tell("scanning constants")
        self._scan_all(lambda t: t.kept, 0.6 * CONSTANTS)
        champion = self._confirmed_constant(list(self.trials.values()))
        ratios = [
            self.loss(t.held_out) / self.loss(t.quality)
            for t in self.trials.values()
            if t.held_out is not None and self.loss(t.quality) > 0
        ]
        if ratios:
            self.allowed /= min(max(float(np.median(ratios)), 1.0), 4.0)
        # Once more, for those that the first scan stepped over.
        self._scan_all(self.good, CONSTANTS)
        champion = self._confirmed_constant([t for t in self.trials.values() if self.good(t)]) or champion
        if champion is None:
            kept = [t for t in self.trials.values() if t.kept]
            champion = min(kept, key=lambda t: (t is self.original, self.loss(t.quality)))
            self.race(champion, self.original)
        return champion

    def _scan_all(self, keeps: Callable[[Trial], bool], share: float) -> None:
        guess = None
        for line in self.space.lines():
            guess = self.scan(line, guess, keeps, share)
            if self.over(share):
                break

    def _confirmed_constant(self, among: Sequence[Trial]) -> Trial | None:
        """The fastest constant that keeps the bound on the held-out calls too; of those about as dear a race tells."""
        champion, asked = None, 0
        for trial in sorted((t for t in among if t.kind == "constant" and t.kept), key=lambda t: t.cost):
            if (champion is not None and trial.cost > 1.02 * champion.cost) or asked == ASKED:
                break
            if not self.goal.kept(self.held_quality(trial)):
                asked += champion is None
                continue
            race = self.race(trial, champion or self.original)
            champion = trial if champion is None or race.ratio < 1 else champion
        return champion

    def loss(self, quality: float) -> float:
        return self.goal.loss(quality, self.perfect)

    def good(self, trial: Trial) -> bool:
        """Whether a trial keeps the bound with what it may lose on other calls."""
        return trial.kept and self.loss(trial.quality) <= self.allowed * (1 + 1e-9)

    def scan(self, line: Line, guess: int | None, keeps: Callable[[Trial], bool], share: float) -> int | None:
        """Bisect one line; the largest value that `keeps`, None where none does."""
        low, high = -1, line.last + 1
        middle = min(max(1, line.last // 8) if guess is None else guess, line.last)
        while high - low > 1 and not self.over(share):
            trial = self.try_point(line.at(middle))
            if trial is not None and keeps(trial):
                low = middle
            else:
                high = middle
            # Near the guess first: a line is much like the one before.
            near = middle + (2 if low == middle else -2) if guess is not None and high - low > 8 else None
            middle = near if near is not None and low < near < high else (low + high) // 2
        # Quality does not fall evenly: what is just beyond may keep the bound all the same.
        for value in (low + 2, low + 3):
            if low >= 0 and value <= line.last and not self.over(share):
                trial = self.try_point(line.at(value))
                low = value if trial is not None and keeps(trial) else low
        return low if low >= 0 else guess

    # ---- 2 and 3. schedules ----------------------------------------------------------------------------
    def schedules(self, champion: Trial) -> Trial:
        """The champion after screening and proposals."""
        centre = champion.point if any(champion.point) else self._middle()
        beliefs = Beliefs(self, centre, champion.root)
        for trial in list(self.trials.values()):
            beliefs.observe(trial, champion)
        count = misses = 0
        step = 0.02
        signs, tastes = np.ones(len(centre)), np.ones(len(centre))
        while not self.over(SEARCH):
            aside = False
            if count < SCREENED:
                self.tell(f"screening {count + 1} of {SCREENED}")
                if count % 2 == 0:
                    signs = self.generator.choice([-1.0, 1.0], len(centre))
                    tastes = self.generator.random(len(centre))
                point = self._moved(centre, signs if count % 2 == 0 else -signs, tastes)
            else:
                self.tell(f"proposal {count + 1 - SCREENED}: {len(self.trials)} tried")
                aside = count % ASIDE == ASIDE - 1
                less = float(self.generator.uniform(-0.3, 0.1)) if aside else step
                point = beliefs.propose(champion.point, less, SPREADS[count % len(SPREADS)])
            count += 1
            before = len(self.trials)
            trial = self.try_point(point)
            if trial is None or len(self.trials) == before:
                misses += 1
                if misses > 50:
                    break  # the space is used up, or all that is left is refused
                trial = self.try_point(self._moved(champion.point, None, self.generator.random(len(centre))))
                if trial is None:
                    continue
            if count > SCREENED and not aside:
                step = min(max(step * (1.3 if self.good(trial) else 0.85), STEPS[0]), STEPS[1])
            champion = self._challenge(trial, champion)
            beliefs.observe(trial, champion)
        return champion

    def _challenge(self, trial: Trial, champion: Trial) -> Trial:
        """The faster of the two, if the trial keeps the bound and could be it at all."""
        if not self.good(trial) or trial is champion or trial.ratio is not None:
            return champion
        if trial.cost > 1.01 * champion.cost:
            return champion
        race = self.race(trial, champion, share=SEARCH)
        return trial if race.ratio < 1 and race.high < 1.02 else champion

    def _middle(self) -> Point:
        """Where no constant keeps the bound: values that do little."""
        return tuple(max(1, c.last // 16) if c.knob.ordered else 0 for c in self.space.coordinates)

    def _moved(self, centre: Point, signs: np.ndarray | None, tastes: np.ndarray) -> Point:
        """A point around another one: ordered values 40 % up or down (a few of them, a little, without `signs`)."""
        found = list(centre)
        for i, c in enumerate(self.space.coordinates):
            if not c.knob.ordered:
                if tastes[i] < (0.3 if signs is not None else 0.05):
                    found[i] = int(self.generator.integers(c.last + 1))
                continue
            if signs is not None:
                step = signs[i] * max(1, round(0.4 * centre[i]))
            else:
                step = int(self.generator.integers(-2, 3)) if self.generator.random() < 0.3 else 0
            found[i] = int(min(max(centre[i] + step, 0), c.last))
        return tuple(found)

    # ---- 4. judging ------------------------------------------------------------------------------------
    def judge(self, champion: Trial) -> Judged:
        """Choose on the calls that the search did not see. Raises ElisionError where no pipeline keeps the bound."""
        self.tell("judging on held-out calls")
        kept = [t for t in self.trials.values() if t.kept and t is not self.original]
        if not kept:
            raise ElisionError(self._nothing("on the data"))
        # Those that lose more than is allowed here are asked last: they would keep the bound there by luck.
        order = sorted(kept, key=lambda t: (not self.good(t), self._expected(t, champion)))
        chosen, count = self._confirmed(order)
        # What a schedule has to beat is the fastest constant that keeps both bounds, by luck or not.
        constants = [t for t in kept if t.kind == "constant"]
        constant, _ = self._confirmed(sorted(constants, key=lambda t: self._expected(t, champion)))
        if chosen is None:
            raise ElisionError(self._nothing("on the data that was held out"))
        for trial in (chosen, constant):
            if trial is not None and trial.ratio is None:
                self.race(trial, self.original)
        race = None
        if constant is not None and constant is not chosen:
            self.tell("racing the schedule against the best constant")
            race = self.watch.race(
                self.built(chosen),
                self.built(constant),
                self.calls[0],
                least=8,
                most=24,
                until=self.until(1.0),
            )
            if race.ratio >= 1:
                chosen, race = constant, None
        self.tell("measuring the front")
        self._measure([t for t in (chosen, constant) if t is not None])
        return Judged(chosen, constant, race, count)

    def _expected(self, trial: Trial, champion: Trial) -> float:
        """Measured time, else the champion's by the ratio of the estimated costs."""
        return trial.ratio or (champion.ratio or 1.0) * trial.cost / champion.cost

    def _confirmed(self, order: Sequence[Trial]) -> tuple[Trial | None, int]:
        """The first that keeps the bound on the held-out calls, and how many were asked for that. When time is over
        only those are taken of which it is known, and a few others."""
        asked = 0
        for trial in order:
            if trial.held_out is None and asked >= ASKED and self.watch.now() > self.until(JUDGED):
                continue
            asked += 1
            if self.goal.kept(self.held_quality(trial)):
                return trial, asked
        return None, asked

    def held_quality(self, trial: Trial) -> float:
        if trial.held_out is None:
            if self._held_reference is None:
                original = self.bench.original()
                self._held_reference = [original.run(call) for call in self.held_out]
            values = self._values(self.built(trial), self.held_out, self._held_reference)
            trial.held_out = float(np.mean(values))
        return trial.held_out

    def _measure(self, first: Sequence[Trial]) -> None:
        """Times against the original: of `first`, and of what else would stand on the front."""
        for trial in first:
            self.race(trial, self.original, least=6, most=10)
        timed = [t for t in self.trials.values() if t.ratio is not None]
        best = min(timed, key=lambda t: t.ratio or 1.0)
        rows = [(self._expected(t, best), self.goal.sign * t.quality, t) for t in self.trials.values()]
        likely = [t for time, quality, t in rows if not any(a < time and b >= quality for a, b, _ in rows)]
        todo = [t for t in likely if t.ratio is None]
        for trial in todo[:: max(1, math.ceil(len(todo) / FRONT))]:
            if self.watch.now() > self.until(1.0):
                break
            self.race(trial, self.original, most=6)

    def _nothing(self, where: str) -> str:
        tried = [t for t in self.trials.values() if t is not self.original]
        if not tried:
            reasons = list(dict.fromkeys(self.refusals.values()))
            return (
                f"no pipeline could be built: {reasons[0]}"
                if reasons
                else "there was no time to try anything"
            )
        judged = [t for t in tried if t.held_out is not None] if "held" in where else tried
        value = lambda t: t.quality if t.held_out is None or "held" not in where else t.held_out  # noqa: E731
        best = max(judged, key=lambda t: self.goal.sign * value(t))
        return f"no pipeline keeps {self.goal} {where}: the best of {len(judged)} has {value(best):.4g} ({best.text})"


class Beliefs:
    """What loss and time are believed to be, for one search."""

    def __init__(self, search: Search, centre: Point, centre_root: float) -> None:
        self.search, space = search, search.space
        self.space = space
        self.features = Features(space, centre)
        self.limit = centre_root or math.sqrt(search.allowed)
        n = len(self.features.ordered)
        taste = len(self.features.tastes)
        share = self.limit / n
        wide = [space.coordinates[i].place is None for i, _, _ in self.features.tastes]
        tastes = np.where(wide, 0.15 * self.limit, 0.3 * share)
        zero = np.zeros(1)
        self.loss = Belief(
            np.concatenate([np.full(n, 0.8 * share), np.full(n, 0.2 * share), np.zeros(taste), zero]),
            np.concatenate([np.full(n, 0.8 * share), np.full(n, 0.3 * share), tastes, zero + 0.01 * share]),
            0.06 * self.limit,
        )
        # The last is what bringing the model to one form does to its time, which all pipelines have in common.
        saved, floor = self._savings(centre), 1e-4
        self.time = Belief(
            np.concatenate([-saved, np.zeros(n + taste), zero]),
            np.concatenate([0.3 * saved + floor, 0.1 * saved + floor, np.full(taste, 3e-3), zero + 0.2]),
            0.01,
        )

    def _savings(self, centre: Point) -> np.ndarray:
        """Time that each ordered coordinate is estimated to save at the centre, as shares of the original's."""
        search = self.search
        whole = search.bench.estimate(self.space.passes(centre)).seconds
        found = []
        for i in self.features.ordered:
            less = list(centre)
            less[i] = 0
            try:
                cost = search.bench.estimate(self.space.passes(tuple(less))).seconds
            except ElisionError:
                cost = whole
            along = centre[i] / self.features.scale[i] or 1.0
            found.append(max(cost - whole, 0.0) / search.original.cost / along)
        saved = np.array(found)
        # A coordinate whose saving cannot be estimated is taken to be like the least of the others.
        known = saved[saved > 0]
        return np.where(saved > 0, saved, known.min() if len(known) else 0.01)

    def observe(self, trial: Trial, champion: Trial) -> None:
        """Learn from a trial. The original says nothing: zero is zero."""
        search = self.search
        if trial is search.original:
            return
        features = self.features(trial.point)
        root = trial.root
        # Far from the bound a sum of roots is no longer what happens.
        distance = abs(root / self.limit - 1.0)
        self.loss.observe(features, root, 1.0 / (1.0 + 4.0 * distance**2))
        expected = search._expected(trial, champion)
        self.time.observe(features, expected - 1.0, 1.0 if trial.ratio is not None else 0.25)

    def propose(self, around: Point, less: float, spread: float) -> Point:
        """The point of the least loss by one draw from the beliefs, within reach of `around` and over all tastes of the
        whole, in a time that is less than that of `around` by the share `less`."""
        generator = self.search.generator
        loss, time = self.loss.draw(generator, spread), self.time.draw(generator, spread / 2)
        limit = (1 - less) * (1 + float(self.features(around) @ time)) - 1  # beliefs are about time less 1
        allowed: list[Sequence[int]] = []
        for i, c in enumerate(self.space.coordinates):
            if c.knob.ordered and c.last > 8:
                reach = max(2, math.ceil((0.3 + 2 * abs(less)) * self.features.scale[i]))
                allowed.append(range(max(0, around[i] - reach), min(c.last, around[i] + reach) + 1))
            else:
                allowed.append(range(c.last + 1))
        best: tuple[float, Point] | None = None
        for base in self._tastes(around):
            point = gentlest(self.space, self.features, loss, time, limit, allowed, base)
            lost = float(self.features(point) @ loss)
            if best is None or lost < best[0]:
                best = lost, point
        assert best is not None
        return best[1]

    def _tastes(self, around: Point) -> list[Point]:
        """`around` with every value of the coordinates that touch everything, one at a time."""
        found = [around]
        for i in self.space.tastes():
            for value in range(self.space.coordinates[i].last + 1):
                if value != around[i]:
                    other = list(around)
                    other[i] = value
                    found.append(tuple(other))
        return found
