"""From a plain causal graph to one of new rows against a cache.

The plain graph recomputes a whole text for every token. Its function is kept, its arguments change: a call takes
M new rows, each with a position and a list of the earlier rows it sees, and writes what later rows need (the keys
and values of every self-attention) into caches. A chain, several texts and a tree of guesses are all such lists
(Miao et al., SpecInfer, ASPLOS 2024). Nothing is recognised by name: values are told apart by what they depend on
(`incremental_binding`), everything that depends on positions only is evaluated, and where tokens meet in any way
but a causal attention the graph is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import sympy

from .analysis.joins import written_join
from .analysis.spaces import analyse
from .base import NewSignature, Outcome, Pass, PassContext, as_array, numpy_dtype, register
from .errors import ElisionError, NothingMatched, PipelineError, Refused, VerificationError
from .extract import part_that_makes
from .incremental_binding import SEQUENCE, Bindings
from .incremental_build import ROWS_IN, Builder
from .incremental_pairs import read_rule
from .incremental_plan import LastRows, Plan, drop_last_rows
from .incremental_tables import Text, evaluate
from .ir.graph import Graph, Value, static


@dataclass(frozen=True)
class IncrementalOptions:
    """`capacity`: slots of every cache. `reach`: positions that the tables hold, as many as slots where it is 0; more
    where tokens are left out and the others keep the positions they had. `ids`, `mask`, `positions`: the names of
    the inputs with the decoder's token ids, their padding mask and their positions (by default decoder_input_ids,
    decoder_attention_mask and decoder_position_ids where there is a decoder_input_ids, else the same without
    decoder_). Every other input belongs to a source, an encoder for example."""

    capacity: int = 2048
    reach: int = 0
    ids: str = ""
    mask: str = ""
    positions: str = ""

    def __post_init__(self) -> None:
        if self.capacity < 2:
            raise PipelineError(f"capacity must be at least 2, not {self.capacity}")
        if self.reach and self.reach < self.capacity:
            raise PipelineError(f"reach must be at least the capacity, not {self.reach}")


@register
class Incremental(Pass):
    """Gives a causal graph a key/value cache.

    Inputs of the result: input_ids [1, M] int64, position_ids [1, M] int64, slots [M] int32, prefix [M, 2] int32,
    ancestors [M, A] int32 (see op cached_attention), key_cache.i [heads, capacity, width] and value_cache.i for
    every self-attention in order, and cross.j for what is computed from a source (a table of rows that ids beyond
    the vocabulary read stays an input as it is). Outputs: those of the plain graph with a row for each new row, then
    key_cache.i.out and value_cache.i.out. `Outcome.extra["prelude"]` is the graph from the source's inputs to the
    cross.j, where there is one."""

    name = "incremental"
    exact = True
    summary = "new tokens against a key/value cache, in chains or trees"
    Options = IncrementalOptions

    def run(self, graph: Graph, context: PassContext) -> Outcome:
        """Rewrite in place. Raises NothingMatched without token ids or without an attention among them, Refused
        where a row depends on later rows, or on others in another way than by attention."""
        options: IncrementalOptions = self.options
        pasts = _without_cache(graph)
        names = self._names(graph)
        self._one_sequence(graph, names)
        graph.remove_dead()
        try:
            plan, short = self._plan(graph, names)
        except Refused as refused:
            raise _with_pictures(graph, _text(graph, names).ids, refused) from refused
        if not plan.attentions:
            raise NothingMatched(
                f"{self.name} found no self-attention over the tokens of %{names[0]} "
                f"({len(graph.ops_of('attention'))} attentions among {len(graph.ops)} operations)"
            )
        text = _text(graph, names)
        tables = evaluate(graph, plan, text, self._positions_held(), self.read_rule)
        outcome = Outcome(changed=True)
        self._before(graph, plan, outcome)
        if pasts:
            outcome.notes.append(
                f"{pasts} inputs with keys and values of the past went: the file had a cache of its own"
            )
        examples = _Examples(graph, plan, text, options.capacity, self.example_rows)
        outcome.signature = signature = examples.signature(context, short)
        if plan.prelude:
            named = [(f"cross.{number}", value) for number, value in enumerate(plan.prelude)]
            outcome.extra["prelude"] = part_that_makes(graph, named)
        dropped = [v.name for v in graph.outputs if plan.bindings.of(v) == SEQUENCE]
        if dropped:
            outcome.notes.append(
                f"the outputs {', '.join(dropped)} are the source's: its graph has them as cross.j"
            )
        kept = signature.outputs = [i for i, v in enumerate(graph.outputs) if plan.bindings.of(v) != SEQUENCE]
        before = len(graph.ops)
        builder = Builder(graph, plan, tables, options.capacity)
        builder.build(text.ids, [(graph.output_names[i], i) for i in kept])
        if signature.after is not None:
            caches = [
                np.zeros(static(cache.shape) or (), numpy_dtype(cache.dtype)) for cache in builder.caches
            ]
            signature.after[len(ROWS_IN) : len(ROWS_IN)] = caches
        outcome.statistics |= builder.statistics
        outcome.statistics["removed ops"] = max(before - len(graph.ops), 0)
        outcome.notes.append(
            f"{builder.statistics['cached attentions']} attentions read a cache of {options.capacity} slots"
        )
        return outcome

    # ---- what another kind of rows says differently --------------------------------------------------
    read_rule = staticmethod(read_rule)
    """What the masks of an attention must say."""

    @staticmethod
    def example_rows(count: int) -> list[np.ndarray]:
        """slots, prefix and ancestors of `count` rows that are a whole text."""
        places = np.arange(count, dtype=np.int32)
        return [places, np.stack([np.zeros_like(places), places], 1), places[:, None].copy()]

    def _positions_held(self) -> int:
        """How many positions the tables have."""
        return self.options.reach or self.options.capacity

    def _before(self, graph: Graph, plan: Plan, outcome: Outcome) -> None:
        """Called before the graph is edited."""

    # ---- finding out ---------------------------------------------------------------------------------
    def _names(self, graph: Graph) -> tuple[str, str, str]:
        """Names of the inputs with ids, mask and positions; "" for one the graph does not have."""
        known = {value.name for value in graph.inputs}
        options: IncrementalOptions = self.options
        for given in (options.ids, options.mask, options.positions):
            if given and given not in known:
                raise Refused(f"the graph has no input {given!r}: it has {', '.join(sorted(known))}")
        prefix = "decoder_" if "decoder_input_ids" in known and not options.ids else ""
        ids = options.ids or f"{prefix}input_ids"
        if ids not in known:
            raise NothingMatched(
                f"{self.name} found no input {ids!r} with token ids among {', '.join(sorted(known))}; "
                "option ids names it"
            )
        mask = options.mask or f"{prefix}attention_mask"
        positions = options.positions or f"{prefix}position_ids"
        return ids, mask if mask in known else "", positions if positions in known else ""

    def _one_sequence(self, graph: Graph, names: tuple[str, str, str]) -> None:
        """Let the batch be one: rows of several texts are rows of one call."""
        for name in names:
            if not name:
                continue
            value = _input(graph, name)
            if value.rank != 2 or value.shape is None:
                raise Refused(f"the input {value!r} is not [batch, length]")
            if isinstance(value.shape[0], sympy.Expr):
                graph.fix_length(value, 0, 1)
            elif value.shape[0] != 1:
                raise Refused(f"the input %{name} has the static batch {value.shape[0]}, not 1")
        for name in filter(None, names[1:]):
            value, ids = _input(graph, name), _input(graph, names[0])
            if value.shape is not None and ids.shape is not None and value.shape[1] != ids.shape[1]:
                graph.same_length(value, 1, ids, 1)  # its length was that of the past, and the tokens

    def _plan(self, graph: Graph, names: tuple[str, str, str]) -> tuple[Plan, bool]:
        """The plan, and whether the graph gave its last rows only."""
        short = False
        while True:
            text = _text(graph, names)
            bindings = Bindings(graph, text.ids, text.mask, text.positions)
            try:
                return Plan(graph, bindings, text.ids), short
            except LastRows as found:
                short = True
                try:
                    drop_last_rows(graph, bindings, found.op)
                except VerificationError as error:
                    raise Refused(
                        f"{found.op.target} (%{found.op.name}) keeps the last rows: {error}"
                    ) from error


def _with_pictures(graph: Graph, ids: Value, refused: Refused) -> Refused:
    """The same, and what comes first where tokens of pictures are written among those of the text."""
    analysis = analyse(graph)
    join = written_join(analysis)
    if join is None or not analysis.flow.depends(
        join.op.output, ids
    ):  # an encoder's tokens that became fewer
        return refused
    return Refused(
        f"{refused}; {join.op.target} (%{join.op.name}) writes tokens of pictures among those of the text, whose rows "
        "then depend on each other: image-ids comes before, and token-drop goes on the vision part that it sets apart"
    )


def _without_cache(graph: Graph) -> int:
    """Let a file that was exported with a cache be the plain graph it continues; how many inputs went."""
    if graph.host != "onnx":
        return 0
    from .onnx.cache import without_cache

    return without_cache(graph)  # type: ignore[arg-type]


def _input(graph: Graph, name: str) -> Value:
    return next(value for value in graph.inputs if value.name == name)


def _text(graph: Graph, names: tuple[str, str, str]) -> Text:
    ids, mask, positions = (_input(graph, name) if name else None for name in names)
    assert ids is not None
    return Text(ids, mask, positions)


class _Examples:
    """Example inputs of the plain graph and those of the new one that mean the same: a chain from empty caches."""

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        text: Text,
        capacity: int,
        rows: Callable[[int], list[np.ndarray]],
    ) -> None:
        self.graph, self.plan, self.text, self.capacity, self.rows = graph, plan, text, capacity, rows

    def signature(self, context: PassContext, short: bool) -> NewSignature:
        given = context.example_inputs
        if given is None or len(given) != len(self.graph.inputs):
            return NewSignature()
        arrays = {v: as_array(item) for v, item in zip(self.graph.inputs, given)}
        if any(array is None for array in arrays.values()):
            return NewSignature()
        ids = arrays[self.text.ids][:1, : self.capacity]
        before = {v: a[:1] if v.shape and v.shape[0] == 1 else a for v, a in arrays.items()}
        before |= self.text.feeds(ids)
        try:
            crosses = self.graph.evaluate(self.plan.cuts, before) if self.plan.cuts else []
        except ElisionError:
            # The example is of another batch than one: there is nothing to compare with, and the manager says so.
            return NewSignature()
        count = ids.shape[1]
        chain = [ids.astype(np.int64), np.arange(count, dtype=np.int64)[None], *self.rows(count)]
        return NewSignature([before[v] for v in self.graph.inputs], [*chain, *crosses], last_rows=short)
