"""dynamic-vocab: ids beyond the vocabulary whose embeddings come with every batch.

Several tokens of a text become one before the model, with an embedding that is predicted from theirs (Feher et al.,
Retrofitting large language models with dynamic tokenization, ACL 2025). The texts get shorter; nothing in the network
changes but where a token's embedding is read. `elision.DynamicVocabulary` makes the inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .analysis.residual import DEFAULT_IDS, token_ids
from .base import NewSignature, Outcome, Pass, PassContext, numpy_dtype, register, same_examples
from .errors import PipelineError, Refused
from .ir.graph import Graph
from .overlay import find_lookups, overlay


@dataclass(frozen=True)
class DynamicVocabOptions:
    """ids: the name of the input with the token ids. name: what the new input with the rows of the new ids is
    called. rows: how many it has; 0: any number. per_text: every text of a batch has rows of its own, [B, M, C]."""

    ids: str = DEFAULT_IDS
    name: str = "table"
    rows: int = 0
    per_text: bool = False

    def __post_init__(self) -> None:
        if self.rows < 0:
            raise PipelineError(f"rows must be at least 0, not {self.rows}")
        if not self.name.isidentifier():
            raise PipelineError(f"name must be an identifier, not {self.name!r}")


@register
class DynamicVocab(Pass):
    """Adds an input [M, C], of the embeddings' dtype: id V + j, where V is the size of the vocabulary, is embedded as
    its row j, every id below V as before, bit for bit. A head keeps its V scores."""

    name = "dynamic-vocab"
    exact = True
    summary = "embeddings given with the batch, for tokens that were merged before the model"
    Options = DynamicVocabOptions

    def new_inputs(self) -> tuple[str, ...]:
        return (self.options.name,)

    def run(self, graph: Graph, context: PassContext) -> Outcome:
        """Raises NothingMatched without ids; Refused where they are not looked up in one constant table, or where an op
        reads them for something other than their embeddings."""
        options: DynamicVocabOptions = self.options
        ids = token_ids(graph, options.ids)
        found = find_lookups(graph, ids)
        if options.name in graph.input_names:
            raise Refused(f"the graph has an input called {options.name!r} already")
        kinds = {(lookup.count, lookup.width, lookup.op.output.dtype) for lookup in found}
        if len({lookup.table for lookup in found}) > 1:
            names = ", ".join(dict.fromkeys(f"%{lookup.table.name}" for lookup in found))
            raise Refused(f"%{ids.name} is looked up in several tables ({names}), and a new id has one row")
        count, width, dtype = next(iter(kinds))
        batch = ids.shape[:1] if options.per_text and ids.shape else ()
        rows = graph.add_input(options.name, dtype, [*batch, options.rows or f"{options.name}_rows", width])
        for lookup in found:
            overlay(graph, lookup, rows, count)
        outcome = Outcome(changed=True, statistics={"lookups": len(found)})
        outcome.notes.append(f"the ids from {count} on are rows of the input {options.name} [.., {width}]")
        outcome.signature = _signature(context, options, (width, dtype), len(graph.outputs))
        return outcome


def _signature(
    context: PassContext, options: DynamicVocabOptions, row: tuple[int, str], outputs: int
) -> NewSignature:
    """The examples as they are, and rows: those that were given, or some that none of the ids reads."""
    width, dtype = row
    texts = [len(context.example_inputs[0])] if options.per_text and context.example_inputs else []
    rows = context.example_of(options.name, dtype, [*texts, options.rows or None, width])
    if rows is None:
        rows = np.zeros([*texts, options.rows or 1, width], numpy_dtype(dtype))
    return same_examples(context, outputs, {options.name: rows})
