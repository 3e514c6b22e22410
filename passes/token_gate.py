"""Token gate: a small learned gate before one block of an encoder says which tokens the rest of the model needs.

Kallini et al., "MrT5: Dynamic Token Merging for Efficient Byte-level Language Models" (ICLR 2025): a linear function of
the normed hidden state, through a sigmoid scaled to [k, 0]. In training (`mode=soft`) it is added to the logits of the
token's key in every later attention over these tokens, the decoder's cross-attention too; at inference (`mode=hard`)
tokens whose gate is not above a threshold are gone. The number of slots for those that are left is static, so that the
graph has static shapes, or (`capacity=dynamic`) that of the sample with most of them. Slots that hold nobody have size
0, which later attentions mask out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..kernels.lengths import wanted
from .analysis.masks import causal_because
from .analysis.residual import DEFAULT_IDS, token_ids
from .analysis.spaces import Analysis, Block, TokenSpace, analyse, no_attention
from .base import Outcome, Pass, PassContext, register
from .cut import Cutter
from .cut_maps import WHOLE
from .drop_policies import valid_tokens
from .errors import NothingMatched, PipelineError, Refused, VerificationError
from .gate_weights import fresh_gate, read_gate
from .ir.graph import Graph, Op, Value
from .options import check_share
from .tunable import SHARES, Knob
from .writer import Writer

GATE_OUTPUT = "elision_gate"
"""The extra output of `mode=soft`: the gate [B, N] float32 of every token."""


@dataclass(frozen=True)
class GateOptions:
    """`layer`: the gate stands before this block (from the end where negative). `mode`: for training ("soft") or for
    inference ("hard"). `capacity`, of hard gates: the share of the tokens that there is room for (up to 1), or how
    many (2 and more); of a sample with more, those of the lowest gate go. Or dynamic: room for all that the sample of a
    batch with most of them keeps, a length that only the data say. `k`: the gate's lower end. `threshold`:
    tokens with a gate above it stay (k / 2); "-inf" keeps all. `softmax1`: later attentions over these tokens may
    attend to nothing, exp(a) / (1 + sum exp(a)). `norm` of the hidden states that the gate reads. `protect`: so many
    first tokens always stay (by default found in the graph). `last`: so many tokens at the end of each sample, its
    padding not counted, always stay (the end-of-sequence token). `protect_ids`: tokens of these ids always stay,
    wherever they stand. `ids`: the name of the input that has them. `gates`: the safetensors file of trained gates.
    `seed`: of fresh ones."""

    layer: int = 3
    mode: Literal["hard", "soft"] = "hard"
    capacity: float | Literal["dynamic"] = 0.5
    k: float = -30.0
    threshold: float | Literal["-inf"] | None = None
    softmax1: bool = False
    norm: Literal["rms", "layer", "none"] = "rms"
    protect: int | None = None
    last: int = 1
    protect_ids: tuple[int, ...] = ()
    ids: str = DEFAULT_IDS
    gates: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.k >= 0:
            raise PipelineError(f"k, the gate of a token to delete, is below 0, not {self.k}")
        if isinstance(self.capacity, float):
            check_share("capacity", self.capacity)
        if isinstance(self.threshold, float) and self.threshold >= 0:
            raise PipelineError(f"threshold is below 0, the gate of a token to keep, not {self.threshold}")
        if min(self.protect or 0, self.last) < 0:
            raise PipelineError("protect and last must not be negative")
        if self.seed < 0:
            raise PipelineError(f"seed must not be negative, not {self.seed}")

    @property
    def dynamic(self) -> bool:
        return self.capacity == "dynamic"

    @property
    def least(self) -> float:
        """Tokens with a gate above this stay."""
        return self.k / 2 if self.threshold is None else float(self.threshold)

    @property
    def nothing(self) -> bool:
        """True when no token can be deleted."""
        return self.mode == "hard" and (self.capacity == 1 or self.least < self.k)


@register
class TokenGate(Pass):
    """A delete gate in one encoder of the graph, soft for training or hard for inference.

    `arrays`: trained gates, weight [C] and bias [1], in place of a file."""

    name = "token-gate"
    exact = False
    summary = "a learned gate deletes tokens before a block of an encoder (MrT5)"
    Options = GateOptions

    def __init__(self, *, arrays: Mapping[str, Any] | None = None, **options: Any) -> None:
        if options.get("threshold") == -math.inf:
            options["threshold"] = "-inf"
        super().__init__(**options)
        if arrays is not None and self.options.gates is not None:
            raise PipelineError("token-gate: give gates as a file or as arrays, not both")
        self.arrays = None if arrays is None else read_gate(arrays, "the arrays")

    def key(self) -> str:
        if self.arrays is None:
            return super().key()
        digest = hashlib.sha256(b"".join(array.tobytes() for array in self.arrays)).hexdigest()[:16]
        return f"{super().key()}:{digest}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenGate) and other.key() == self.key()

    __hash__ = Pass.__hash__

    @classmethod
    def tunable(cls, graph: Graph, given: Mapping[str, Any]) -> list[Knob]:
        """The capacity of a hard gate: its layer is the one that it was trained for."""
        gated_space(analyse(graph))
        return [Knob("capacity", SHARES, neutral=True)] if given.get("mode", "hard") == "hard" else []

    def run(self, graph: Graph, context: PassContext) -> Outcome:
        """Put the gate in. Raises NothingMatched without attention over tokens, Refused where it is not safe."""
        options: GateOptions = self.options
        if options.nothing:
            return Outcome(notes=["nothing to delete: every token stays"])
        analysis = analyse(graph)
        space, notes = gated_space(analysis)
        if options.protect is not None:
            space.prefix = options.protect
        block, layer = _block(space, options.layer)
        value = _gated_value(analysis, space, block)
        budget = {} if options.mode == "soft" else _budget(space, options)
        if budget.get("count") == 0:
            return Outcome(notes=[f"nothing to delete: there is room for all {space.length} tokens"])
        outcome = Outcome(changed=True, notes=notes)
        special = self._special(graph, analysis, space)
        (gate, size), valid, write = self._gate(graph, analysis, space, value, special, context, outcome)
        cutter = Cutter(graph, analysis, space, mismatch="lift", proportional=True, null_key=options.softmax1)
        where = f"before block {layer} of {len(space.blocks)}"
        if options.mode == "soft":
            _soften(cutter, value, size, write)
            graph.add_output(gate, GATE_OUTPUT)
            outcome.notes.append(f"a soft gate stands {where}, over {space.length} tokens")
        else:
            _harden(cutter, value, gate, valid, special, write, options, budget)
            slot = cutter.crossing.levels[-1].slot
            assert slot is not None
            if context.want_map:
                graph.add_output(slot, "elision_token_map")
                outcome.extra["token_map"] = {"prefix": space.prefix, "suffix": space.suffix}
            left = "the longest sample's" if options.dynamic else cutter.crossing.levels[-1].length
            outcome.notes.append(f"{where} {left} of {space.length} tokens at most are left")
        outcome.statistics.update(cutter.crossing.statistics)
        outcome.statistics["removed dead ops"] = graph.remove_dead()
        return outcome

    def _gate(
        self,
        graph: Graph,
        analysis: Analysis,
        space: TokenSpace,
        value: Value,
        special: list[Value | None],
        context: PassContext,
        outcome: Outcome,
    ) -> tuple[list[Value], Value | None, Writer]:
        """The gate and its exponential [B, N] right behind `value`, and which tokens are no padding."""
        options: GateOptions = self.options
        assert value.shape is not None
        width = value.shape[-1]
        if not isinstance(width, int):
            raise Refused(f"%{value.name} has {width} channels: the gate's weight needs their number")
        made = self.arrays
        if options.gates is not None:
            if context.read_arrays is None:
                raise PipelineError(f"{options.gates} cannot be read here: give the gates as arrays")
            made = read_gate(context.read_arrays(options.gates), options.gates)
        if made is None:
            made = fresh_gate(width, options.seed)
            outcome.notes.append("its weights are fresh: they know nothing before they are trained")
        if made[0].shape != (width,):
            raise Refused(f"the gates are for {len(made[0])} channels, and %{value.name} has {width}")
        weight = graph.insert_parameter(made[0], "elision_gate_weight")
        bias = graph.insert_parameter(made[1], "elision_gate_bias")
        write = Writer(graph, value.producer)
        valid = valid_tokens(write, analysis, space)
        attrs = {"k": options.k, "norm": options.norm, **_ends(space, options)}
        return write("delete_gate", [value, weight, bias, valid, *special], **attrs), valid, write

    def _special(self, graph: Graph, analysis: Analysis, space: TokenSpace) -> list[Value | None]:
        """The ids [B, N] and those [S] that always stay; absent where none does. Raises Refused, NothingMatched."""
        options: GateOptions = self.options
        if not options.protect_ids:
            return []
        ids = token_ids(graph, options.ids)
        if (
            not ids.dtype.startswith("int")
            or analysis.token_axes(space, ids) != [(1, WHOLE)]
            or ids.rank != 2
        ):
            raise Refused(f"%{ids.name} does not have one id for each of the {space.length} tokens")
        return [ids, graph.insert_constant(np.asarray(options.protect_ids, np.int64), "elision_gate_ids")]

    @classmethod
    def applicability(cls, analysis: Analysis) -> list[str]:
        """One sentence: where a gate could stand."""
        try:
            space, _ = gated_space(analysis)
            _gated_value(analysis, space, space.blocks[-1])
        except (Refused, NothingMatched) as error:
            return [f"does not apply: {error}"]
        return [f"applies before any of {len(space.blocks)} blocks over {space.length} tokens"]


def gated_space(analysis: Analysis) -> tuple[TokenSpace, list[str]]:
    """The one space of an encoder, and why others are none. Raises Refused where there is not just one."""
    spaces = [space for space in analysis.spaces if space.blocks]
    if not spaces:
        raise no_attention(analysis, TokenGate.name)
    found: list[TokenSpace] = []
    notes: list[str] = []
    for space in spaces:
        reason = next(filter(None, (_causal(analysis, block) for block in space.blocks)), "")
        if reason:
            notes.append(reason)
        else:
            found.append(space)
    if not found:
        raise Refused(notes[0])
    reading = [space for space in found if space.reads]
    if len(found) > len(reading) > 0:
        notes += [f"the {space.length} tokens that read others' are no encoder's" for space in reading]
        found = [space for space in found if not space.reads]
    if len(found) > 1:
        lengths = ", ".join(str(space.length) for space in found)
        raise Refused(f"the graph has {len(found)} encoders, of {lengths} tokens: a gate is for one")
    return found[0], notes


def _causal(analysis: Analysis, block: Block) -> str:
    reason = causal_because(analysis, block.attention)
    if not reason:
        return ""
    name = f"{block.attention.target} (%{block.attention.name})"
    return (
        f"{name} is causal ({reason}): which tokens there is room for would depend on later ones, and a deleted token "
        "has no next token to tell"
    )


def _block(space: TokenSpace, layer: int) -> tuple[Block, int]:
    count = len(space.blocks)
    if not -count <= layer < count:
        raise Refused(f"token-gate stands before block 0 to {count - 1}, not {layer}")
    return space.blocks[layer], layer % count


def _gated_value(analysis: Analysis, space: TokenSpace, block: Block) -> Value:
    """The stream [B, N, C] before the block. Raises Refused."""
    value, name = block.skip, f"{block.attention.target} (%{block.attention.name})"
    if block.attention.kind != "attention":
        raise Refused(f"{name} is over tokens that were merged or deleted already")
    if value is None:
        raise Refused(f"{name}: {block.problem}")
    if value.producer is None:
        raise Refused(
            f"%{value.name} is an input of the graph: there is no op behind which a gate could stand"
        )
    if value.rank != 3 or analysis.token_axes(space, value) != [(1, WHOLE)]:
        raise Refused(f"%{value.name} is not [batch, tokens, width]: a gate cannot read its tokens")
    if space.batch and analysis.batch_axis(space, value) != 0:
        raise Refused(f"{name} has a batch axis that %{value.name} has not")
    return value


def _ends(space: TokenSpace, options: GateOptions) -> dict[str, int]:
    return {"prefix": space.prefix, "suffix": space.suffix, "last": options.last}


def _budget(space: TokenSpace, options: GateOptions) -> dict[str, Any]:
    """How many tokens go, as attributes. Raises Refused where there is no room for the protected ones."""
    length = space.length
    if isinstance(options.capacity, str):
        return {}
    if options.capacity <= 1:
        budget: dict[str, Any] = {"ratio": 1 - options.capacity}
    elif isinstance(length, int):
        budget = {"count": max(length - int(options.capacity), 0)}
    else:
        raise Refused(
            f"capacity={options.capacity:g} is a number, and the number of tokens is symbolic, {length}"
        )
    if isinstance(length, int):
        left = length - wanted(length, budget.get("count", -1), budget.get("ratio", -1.0))
        always = space.prefix + space.suffix + options.last
        if left <= always:
            raise Refused(f"there is room for {left} of {length} tokens, and {always} of them always stay")
    return budget


def _soften(cutter: Cutter, value: Value, size: Value, write: Writer) -> None:
    """Let each token count exp(gate) times from `value` on: its logarithm is what later attentions add."""
    last = write.cursor
    assert last is not None

    def at(_: Op) -> None:
        cutter.weigh_level(value, cutter.crossing.level(value), size)

    cutter.walk({last: at})


def _harden(
    cutter: Cutter,
    value: Value,
    gate: Value,
    valid: Value | None,
    special: list[Value | None],
    write: Writer,
    options: GateOptions,
    budget: dict[str, Any],
) -> None:
    """Delete the tokens whose gate is not above the threshold."""
    space = cutter.space
    limits = {"threshold": options.least, "k": options.k}
    inputs = [gate, valid, *special]
    score, counts = write("gate_budget", inputs, **limits, **budget, **_ends(space, options))
    flags = write("top_tokens", [score, counts])[0]
    ends = {"prefix": space.prefix, "suffix": space.suffix}
    slots = _longest(write, flags, valid, ends) if options.dynamic else None
    made = write("drop_tokens", [flags, valid, slots], **budget, **ends)
    last = write.cursor
    assert last is not None

    def at(_: Op) -> None:
        cutter.rest_at(value)
        cutter.drop_level(value, cutter.crossing.level(value), made, guard=not options.dynamic)

    cutter.walk({last: at})


def _longest(write: Writer, flags: Value, valid: Value | None, ends: dict[str, int]) -> Value:
    """As many slots as the sample with most tokens needs. Raises Refused where the host cannot have such a length."""
    try:
        return write("longest_row", [flags, valid], **ends)[0]
    except VerificationError as error:
        raise Refused(
            "capacity=dynamic makes a length of data, and this graph was traced without such lengths: give a capacity, "
            "or with torch.compile set torch._dynamo.config.capture_scalar_outputs = True"
        ) from error
