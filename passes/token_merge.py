"""Token merging: in every block of a token space, the most similar tokens become one.

Bolya et al., "Token Merging: Your ViT But Faster" (ICLR 2023): bipartite matching on the mean of the keys, a
mean weighted by size, attention proportional to size. Bolya and Hoffman, "Token Merging for Fast Stable
Diffusion" (2023): merging around a sub-layer, with destinations spread over a grid. Both work here on any
graph in which a self-attention and its residual addition can be found; `merge_plan.py` finds the places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .analysis.masks import told_of_keys
from .analysis.spaces import Analysis, analyse, no_attention
from .base import Outcome, Pass, PassContext, register
from .cut import Cutter
from .cut_maps import WHOLE, Level
from .errors import NothingMatched, PipelineError, Refused
from .ir.graph import Graph, Op, Value
from .merge_plan import Cut, Plan, most_at_once, plan_space
from .tunable import Knob

Metric = Literal["keys", "hidden"]


@dataclass(frozen=True)
class MergeOptions:
    """`r`: tokens to remove in every block, or a list with one number a block (a short list is filled up with 0).
    `cell`: rows and columns of a cell of the token grid, one token of which is a destination (see `destinations`).
    `ratio`: instead of `r`, the share of the current tokens. `schedule`: r falls ("down") or rises ("up")
    linearly from block to block with the same total. `metric`: what tells similar tokens, the attention's
    keys or the hidden features, or a list with one word a block (a short list is filled up with the default).
    `where`: after the attention, before the block, or around the attention only (the tokens are restored right
    after it). `proportional`: attention adds log(size) to its logits; by default unless merging around. `protect`:
    so many first tokens keep their place (by default found in the graph). `order`: of the merged tokens, as published
    or original. `destinations`: pairs along the sequence ("bipartite"), or one per `cell` of the token grid ("grid"),
    the default around an attention whose tokens are a grid. `seed`: picks the grid's destinations at random, -1 the
    top left ones."""

    r: int | list[int] | None = None
    ratio: float | None = None
    schedule: Literal["constant", "up", "down"] = "constant"
    metric: Metric | list[Metric] | None = None
    where: Literal["after", "before", "around"] = "after"
    proportional: bool | None = None
    protect: int | None = None
    order: Literal["published", "original"] = "published"
    destinations: Literal["bipartite", "grid"] | None = None
    cell: tuple[int, int] = (2, 2)
    seed: int = -1

    def __post_init__(self) -> None:
        if (self.r is None) == (self.ratio is None):
            raise PipelineError("give either r (tokens a block) or ratio (share of the tokens)")
        counts = self.r if isinstance(self.r, list) else [self.r or 0]
        if any(count < 0 for count in counts):
            raise PipelineError(f"r must not be negative, not {min(counts)}")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise PipelineError(f"ratio must be at least 0 and below 1, not {self.ratio}")
        if self.schedule != "constant" and not isinstance(self.r, int):
            raise PipelineError(f"schedule {self.schedule} needs one number r")
        if "keys" in self.metrics and self.where != "after":
            raise PipelineError(f"metric keys is not known yet where={self.where} merges; use metric=hidden")
        if self.protect is not None and self.protect < 0:
            raise PipelineError(f"protect must not be negative, not {self.protect}")
        if min(self.cell) < 1:
            raise PipelineError(f"cell must be at least 1 by 1, not {list(self.cell)}")
        if self.destinations == "grid" and self.where != "around":
            raise PipelineError("destinations grid needs where=around: merged tokens are no grid any more")
        if self.seed < -1:
            raise PipelineError(f"seed must be -1 or more, not {self.seed}")

    @property
    def metrics(self) -> list[Metric]:
        """The words that `metric` says, one or one a block; none where it is left open."""
        if isinstance(self.metric, list):
            return self.metric
        return [] if self.metric is None else [self.metric]

    @property
    def nothing(self) -> bool:
        """True for a zero budget."""
        return not any(self.r) if isinstance(self.r, list) else not self.r and not self.ratio


@register
class TokenMerge(Pass):
    """Merges tokens in every token space that allows it. Refuses when none does."""

    name = "token-merge"
    exact = False
    reduces = True
    summary = "merge similar tokens in every block (ToMe, tomesd)"
    Options = MergeOptions

    def run(self, graph: Graph, context: PassContext) -> Outcome:
        """Merge in place. Raises NothingMatched without attention, Refused when no token space allows it."""
        options: MergeOptions = self.options
        if options.nothing:
            return Outcome(notes=["nothing to merge: r is 0"])
        chosen, reasons = self._choose(graph)
        if not chosen:
            raise Refused(reasons[0])
        outcome = Outcome(changed=True, notes=list(reasons))
        for name in chosen:
            analysis = analyse(graph)
            plan = next(p for p in self._plans(analysis)[0] if p.name == name)
            self._apply(graph, analysis, plan, context, outcome)
        outcome.statistics["removed dead ops"] = graph.remove_dead()
        return outcome

    @classmethod
    def tunable(cls, graph: Graph, given: Mapping[str, Any]) -> list[Knob]:
        """r and metric for every block, and the order of the merged tokens."""
        fixed = {name: value for name, value in given.items() if name not in ("r", "ratio", "metric")}
        options = cls(r=1, **fixed).options
        analysis = analyse(graph)
        blocks, most, reasons = [], [], []
        for space in analysis.spaces:
            if not space.blocks:
                continue
            try:
                plan = plan_space(analysis, space, options)
            except Refused as error:
                reasons.append(str(error))
            else:
                blocks.append(len(plan.cuts))
                most.append(most_at_once(space, plan.grid, options))
        if not blocks:
            raise Refused(reasons[0]) if reasons else no_attention(analysis, cls.name)
        # One list is for all spaces, and none may be asked for more than it has.
        places, least = min(blocks), min(most)
        knobs = []
        if "ratio" not in given and least > 0 and "schedule" not in given:
            knobs.append(Knob("r", tuple(range(least + 1)), places, neutral=True))
        if options.where == "after":
            knobs.append(Knob("metric", ("keys", "hidden"), places, ordered=False))
        if options.where != "around":
            knobs.append(Knob("order", ("published", "original"), ordered=False))
        return knobs

    @classmethod
    def applicability(cls, analysis: Analysis) -> list[str]:
        """One sentence for each token space: what merging would do there, or why it does not apply."""
        found = []
        for space in analysis.spaces:
            if not space.blocks:
                continue
            try:
                plan = plan_space(analysis, space, MergeOptions(r=1))
            except (Refused, NothingMatched) as error:
                found.append(f"does not apply: {error}")
            else:
                found.append(f"applies after {len(plan.cuts)} attentions over {space.length} tokens")
        return found or ["does not apply: the graph has no self-attention over tokens"]

    def _plans(self, analysis: Analysis) -> tuple[list[Plan], list[str]]:
        plans, reasons = [], []
        for space in analysis.spaces:
            if not space.blocks:
                continue
            try:
                plans.append(plan_space(analysis, space, self.options))
            except Refused as error:
                reasons.append(str(error))
        return plans, reasons

    def _choose(self, graph: Graph) -> tuple[list[str], list[str]]:
        """The names of the spaces that can be merged, and why others cannot.

        Where there are several, each is tried on a copy first, so that one that is found unsafe half way
        leaves no trace."""
        analysis = analyse(graph)
        plans, reasons = self._plans(analysis)
        if not plans and not reasons:
            raise no_attention(analysis, self.name)
        plans = [plan for plan in plans if plan.cuts]
        if not plans and not reasons:
            raise Refused("token-merge has nothing to merge: r leaves no block with a token to remove")
        if len(plans) + len(reasons) == 1:
            return [plan.name for plan in plans], reasons
        chosen = []
        for name in [plan.name for plan in plans]:
            trial = graph.copy()
            analysis = analyse(trial)
            plan = next(p for p in self._plans(analysis)[0] if p.name == name)
            try:
                self._apply(trial, analysis, plan, PassContext(), Outcome())
            except Refused as error:
                reasons.append(str(error))
            else:
                chosen.append(name)
        return chosen, reasons

    def _apply(
        self, graph: Graph, analysis: Analysis, plan: Plan, context: PassContext, outcome: Outcome
    ) -> None:
        options: MergeOptions = self.options
        around = options.where == "around"
        proportional = not around if options.proportional is None else options.proportional
        cutter = Cutter(
            graph, analysis, plan.space, mismatch="restore" if around else "lift", proportional=proportional
        )
        if plan.padding is not None:
            # It is read where the first tokens merge, which may be before it is made.
            first = min(graph.ops.index(cut.op) for cut in plan.cuts)
            graph.hoist(plan.padding, graph.ops[first - 1] if first else None)
        merger = _Merger(cutter, plan, options)
        cutter.walk({cut.op: merger.at for cut in plan.cuts})
        levels = cutter.crossing.levels
        if context.want_map and not around and "token_map" not in outcome.extra:
            slot = cutter.crossing.composed_slot(levels[-1], WHOLE)
            graph.add_output(slot, "elision_token_map")
            outcome.extra["token_map"] = {"prefix": plan.space.prefix, "suffix": plan.space.suffix}
        outcome.notes.append(
            f"{len(levels) - 1} merges in a space of {plan.space.length} tokens"
            + ("" if around else f", {levels[-1].length} are left")
            + (f"; {plan.space.prefix} first tokens keep their place" if plan.space.prefix else "")
        )
        for what, count in cutter.crossing.statistics.items():
            outcome.statistics[what] = int(outcome.statistics.get(what, 0)) + count


class _Merger:
    """Makes one cut after another, each on the level where the stream is by then."""

    def __init__(self, cutter: Cutter, plan: Plan, options: MergeOptions) -> None:
        self.cutter = cutter
        self.plan = plan
        self.options = options
        self.cuts = {cut.op: cut for cut in plan.cuts}
        self._asked = plan.padding is not None

    def at(self, op: Op) -> None:
        cut = self.cuts[op]
        crossing = self.cutter.crossing
        level = crossing.level(cut.value)
        if self._asked:
            self._asked = False
            crossing.ground.size = self._valid_size()
        attrs = self._budget(cut, level)
        if attrs is None:
            return
        metric = self._metric(cut, level)
        space = self.plan.space
        if self.plan.grid is not None:
            height, width = self.plan.grid
            sy, sx = self.options.cell
            attrs |= {"height": height, "width": width, "sy": sy, "sx": sx, "seed": self.options.seed}
            made = crossing.insert("match_grid_tokens", [metric], attrs)
        else:
            attrs |= {"prefix": space.prefix, "suffix": space.suffix, "order": self.options.order}
            if self.plan.padding is not None:
                made = crossing.insert("match_padded_tokens", [metric, level.size], attrs)
            else:
                made = crossing.insert("match_tokens", [metric], attrs)
        slot, keep, source = made
        self.cutter.add_level(cut.value, level, slot, keep, source)

    def _budget(self, cut: Cut, level: Level) -> dict[str, Any] | None:
        """The attributes that say how many tokens go; None when that is none."""
        space, length = self.plan.space, level.length
        if self.options.ratio is not None:
            if isinstance(length, int) and int(length * self.options.ratio) == 0:
                return None
            return {"ratio": self.options.ratio}
        r = cut.r
        if isinstance(length, int):
            r = min(r, (length - space.prefix - space.suffix) // 2) if self.plan.grid is None else r
        return {"r": r} if r > 0 else None

    def _metric(self, cut: Cut, level: Level) -> Value:
        """What similarity is measured on, [B, N, D]."""
        crossing = self.cutter.crossing
        if not cut.keys:
            value = cut.features
            if crossing.level(value) is not level:
                raise Refused(f"%{value.name} and %{cut.value.name} have different numbers of tokens by then")
            return crossing.current(value)
        keys = self.cutter.keys[cut.attention]
        have = None if keys.shape is None else keys.shape[-2]
        if have != level.length:
            raise Refused(
                f"{cut.attention.target} (%{cut.attention.name}) has {have} keys where %{cut.value.name} has "
                f"{level.length} tokens"
            )
        return keys if keys.rank == 3 else crossing.insert("mean_heads", [keys], {})[0]

    def _valid_size(self) -> Value:
        """Size 1 for a token, 0 for padding: [B, N] or [1, N] float32."""
        mask = self.plan.padding
        assert mask is not None
        crossing, analysis = self.cutter.crossing, self.cutter.analysis
        mask = told_of_keys(analysis, self.plan.space, mask)
        batch = analysis.batch_axis(self.plan.space, mask)
        attrs = {"axis": mask.rank - 1, "batch_axis": -1 if batch is None else batch}
        return crossing.insert("valid_size", [crossing.current(mask)], attrs)[0]
