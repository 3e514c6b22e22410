"""Token dropping: of the tokens of an image, those that matter go on, the others are left out.

Vision-language models write the features of a picture among the embeddings of a text; most of those tokens change
nothing. A *policy* says which are kept (`drop_policies.py`); what it says is carried to where the features stand in the
text (`carry.py`), and the text's token space is cut there (`cut.py`), so that the language model sees fewer tokens, at
the positions they had. Input ids, masks and pictures are fed as before. `fastv` cuts inside the language model; in a
graph without a text, tokens are dropped between two blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..kernels.lengths import floor_of
from .analysis.joins import Join, find_joins, written_join
from .analysis.spaces import Analysis, TokenSpace, analyse, no_attention
from .base import Outcome, Pass, PassContext, register
from .drop_at_join import drop_at_join
from .drop_at_output import drop_at_output
from .drop_at_readers import drop_at_readers
from .drop_in_language import drop_in_language
from .drop_job import Job
from .drop_parts import plan_drop
from .drop_policies import BY_PLACE
from .drop_within import drop_within
from .errors import PipelineError, Refused
from .ir.graph import Graph
from .options import check_share
from .parts import Parts, PartsPlan
from .scattered_add import additions, spell_out
from .tunable import SHARES, Knob
from .unfold import folds, unfold

Policy = Literal[
    "hired", "fastv", "visionzip", "prumerge", "cls-topk", "similarity", "uniform", "random", "tail"
]


@dataclass(frozen=True)
class DropOptions:
    """`policy`: what says which tokens are kept. `budget`: the share of an image's tokens that is kept (up to 1), or
    how many of each image (2 and more). `layer`: the attention that is asked, from the end where negative (-1); for
    fastv the language block before which tokens are dropped (2); in a graph without a text the block before which they
    are dropped (the middle one). `heads`: sum or mean over the heads. `positions`: kept tokens have the positions they
    had ("keep") or count from 0 ("compact"). `outputs`: per-token outputs have a row for every token, zeros where it
    was dropped ("restore"), or for the kept ones only ("kept"); in a graph without a text that is where tokens are
    dropped then, if no layer is given, or an output. `tiles` and `grid`: so many pictures are one image, the
    first the whole of it and the others its tiles in (rows, columns). `alpha`: the share of the image's budget that
    hired then gives to the first. `budget_layer`: the block by whose attention it shares the rest. `compat`: hired
    in our way, or as its published code does it ("reference"). `contextual`: share of the budget that visionzip
    merges the rest into. `neighbours`: how many tokens prumerge takes into each kept one. `seed`: of the policy
    random. `adaptive`: an image keeps up to the budget the fewest tokens that hold a share of its scores ("mass"),
    or as many as are outliers among them (PruMerge's rule); slots that it does not need hold nobody. `mass`: the
    share that "mass" means. `output`: the name of the output that outputs=kept makes shorter, where several hold
    tokens. `image_tokens`: for fastv in a language model alone, the id of an image's placeholder, or "mask" for a
    new input that is 1 at image tokens. `image_count`: how many of them are in each text."""

    policy: Policy = "hired"
    budget: float = 0.2
    layer: int | None = None
    heads: Literal["sum", "mean"] = "sum"
    positions: Literal["keep", "compact"] = "keep"
    outputs: Literal["restore", "kept"] = "restore"
    tiles: int = 1
    grid: tuple[int, int] = (1, 1)
    alpha: float = 0.5
    budget_layer: int = 0
    compat: Literal["ours", "reference"] = "ours"
    contextual: float = 0.15
    neighbours: int = 32
    seed: int = 0
    adaptive: Literal["no", "mass", "outliers"] = "no"
    mass: float = 0.9
    output: str = ""
    image_tokens: str = ""
    image_count: int | None = None

    def __post_init__(self) -> None:
        check_share("budget", self.budget)
        if not 0 <= self.alpha <= 1:
            raise PipelineError(f"alpha must be from 0 to 1, not {self.alpha}")
        if not 0 < self.contextual < 1:
            raise PipelineError(f"contextual must be above 0 and below 1, not {self.contextual}")
        if self.tiles < 1 or min(self.grid) < 1:
            raise PipelineError("tiles and grid must be at least 1")
        if self.tiles > 1 and self.tiles != self.grid[0] * self.grid[1] + 1:
            raise PipelineError(
                f"an image of {self.tiles} pictures is the whole and a grid of {self.tiles - 1}, which "
                f"{self.grid[0]} by {self.grid[1]} is not"
            )
        if self.neighbours < 1:
            raise PipelineError(f"neighbours must be at least 1, not {self.neighbours}")
        if self.compat == "reference" and self.policy != "hired":
            raise PipelineError(f"compat=reference is known for hired, not for {self.policy}")
        if not 0 < self.mass <= 1:
            raise PipelineError(f"mass must be above 0 and up to 1, not {self.mass}")
        if self.adaptive != "no" and (self.policy in (*BY_PLACE, "visionzip") or self.tiles > 1):
            what = "tiles, which share a budget out" if self.tiles > 1 else self.policy
            raise PipelineError(
                f"adaptive={self.adaptive} needs scores that say how many tokens matter, not {what}"
            )
        if self.adaptive != "no" and self.positions == "compact":
            raise PipelineError(
                f"adaptive={self.adaptive} leaves empty slots, so positions=compact would count them"
            )
        if self.adaptive != "no" and self.compat == "reference":
            raise PipelineError(f"adaptive={self.adaptive} is none of the published rules of hired")
        if self.image_tokens not in ("", "mask") and not self.image_tokens.isdecimal():
            raise PipelineError(f"image_tokens is an id or mask, not {self.image_tokens}")
        if self.image_tokens and self.policy != "fastv":
            raise PipelineError(f"image_tokens is for fastv in a language model alone, not for {self.policy}")
        if self.image_count is not None and self.image_count < 1:
            raise PipelineError(f"image_count must be at least 1, not {self.image_count}")
        if self.tiles > 1 and self.policy != "hired":
            raise PipelineError(
                f"tiles share the budget of an image out under hired, not under {self.policy}"
            )

    @property
    def nothing(self) -> bool:
        """True when every token is kept."""
        return self.budget == 1

    def kept(self, count: int) -> int:
        """How many of a picture's `count` tokens are kept."""
        return min(int(self.budget), count) if self.budget > 1 else floor_of(count, self.budget)

    def kept_in(self, count: int, pictures: int) -> int:
        """How many are kept of `pictures` pictures of `count` tokens each; those of one image share its budget."""
        if self.tiles > 1 and self.budget <= 1:
            return floor_of(count * self.tiles, self.budget) * (pictures // self.tiles)
        return self.kept(count) * pictures


@register
class TokenDrop(Pass):
    """Drops tokens of images where they join a text, inside the language model (fastv), or between two blocks of a
    graph without a text."""

    name = "token-drop"
    exact = False
    reduces = True
    summary = "leave out the visual tokens that matter least (HiRED, FastV, VisionZip, PruMerge, ...)"
    Options = DropOptions

    def run(self, graph: Graph, context: PassContext) -> Outcome:
        """Drop in place. Raises NothingMatched without attention over tokens, Refused where it is not safe."""
        if self.options.nothing:
            return Outcome(notes=["nothing to drop: the budget is 1"])
        analysis = analyse(graph)
        if folds(graph, analysis) or additions(graph):
            # Those are rewritten before it is known whether anything goes; if not, the graph stays as it is.
            tried = self._drop(graph.copy(), context)
            if not tried.changed:
                return tried
        return self._drop(graph, context)

    def _drop(self, graph: Graph, context: PassContext) -> Outcome:
        options: DropOptions = self.options
        analysis = analyse(graph)
        unfolded, added = unfold(graph, analysis), spell_out(graph)
        if unfolded or added:
            analysis = analyse(graph)
        spaces = [space for space in analysis.spaces if space.blocks]
        if not spaces:
            raise no_attention(analysis, self.name)
        outcome = Outcome(changed=True)
        if unfolded:
            outcome.statistics["unfolded"] = unfolded
        if added:
            outcome.statistics["additions spelled out"] = added
        job, join = Job(graph, analysis, options, context, outcome), the_join(analysis)
        if options.policy == "fastv":
            if join is not None and join.crossing is not None:
                raise Refused("policy=fastv needs the features of an image among the tokens of a text")
            drop_in_language(job, join)
        elif join is not None and join.crossing is not None:
            drop_at_readers(job, join)
        elif join is not None:
            drop_at_join(job, join)
        elif options.outputs == "kept" and (options.layer is None or options.output):
            drop_at_output(job)
        else:
            drop_within(job, _only(spaces))
        outcome.statistics["removed dead ops"] = graph.remove_dead()
        return outcome

    def for_parts(self, parts: Parts) -> PartsPlan:
        return plan_drop(self, parts)

    @classmethod
    def tunable(cls, graph: Graph, given: Mapping[str, Any]) -> list[Knob]:
        """The budget, and the block before which tokens go where there is a choice of it."""
        analysis = analyse(graph)
        spaces = [space for space in analysis.spaces if space.blocks]
        if not spaces:
            raise no_attention(analysis, cls.name)
        knobs = [Knob("budget", SHARES, neutral=True)]
        policy, join = given.get("policy", "hired"), the_join(analysis)
        if policy == "fastv" or (join is None and given.get("outputs") != "kept"):
            space = _only(spaces) if join is None else join.target
            first = 0 if policy in BY_PLACE else 1
            knobs.append(Knob("layer", tuple(range(len(space.blocks) - 1, first - 1, -1))))
        return knobs

    @classmethod
    def applicability(cls, analysis: Analysis) -> list[str]:
        """One sentence: where tokens would be dropped."""
        spaces = [space for space in analysis.spaces if space.blocks]
        if not spaces:
            return ["does not apply: the graph has no self-attention over tokens"]
        join = the_join(analysis)
        if join is None and len(spaces) > 1:
            return ["does not apply: the graph has several token spaces and none flows into another"]
        if join is None:
            return [f"applies between two blocks, to {spaces[0].length} tokens"]
        return [f"applies: {join.sentence(analysis)}, whose {join.target.length} tokens become fewer"]


def the_join(analysis: Analysis) -> Join | None:
    """Where the tokens of an image are written among those of a text, the last such place of the graph; else where
    they are read by it."""
    return written_join(analysis) or next(reversed(find_joins(analysis)), None)


def _only(spaces: list[TokenSpace]) -> TokenSpace:
    if len(spaces) > 1:
        raise Refused(
            f"the graph has {len(spaces)} token spaces and the tokens of none are written among another's"
        )
    return spaces[0]
