"""keep-rows: an output's last layers for the rows that are asked for only.

While a prompt is read, hundreds of rows are computed and the scores of one are wanted. The product that makes them
is as wide as the vocabulary: a sixth of the work of a small model, and its largest tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .base import Arrays, NewSignature, Outcome, Pass, PassContext, register, same_examples
from .errors import PipelineError, Refused
from .ir.graph import Dim, Graph, Op, Value

PRODUCTS = ("elision.linear_nbits", "elision.linear_rows")


@dataclass(frozen=True)
class KeepRowsOptions:
    """output: which graph output. axis: the one its rows lie along. name: what the new input is called."""

    output: int = 0
    axis: int = 1
    name: str = "keep"

    def __post_init__(self) -> None:
        if self.output < 0 or self.axis < 0:
            raise PipelineError("the output and the axis are at least 0")


@register
class KeepRows(Pass):
    """Adds an input `keep` int64 [R], and puts out the rows with these numbers, in this order, of output [.., M, ..].

    Each number is at least 0 and less than M; one may come twice. The product with constant weights that makes the
    output, and all behind it, see these rows only. Their bits are those of a product of R rows."""

    name = "keep-rows"
    exact = True
    summary = "an output's last product for the rows that are asked for only"
    Options = KeepRowsOptions

    def run(self, graph: Graph, context: PassContext) -> Outcome:
        """Raises Refused where the output is made by something other than a product with constant weights, and ops
        behind it that work on each row by itself."""
        index, axis = self.options.output, self.options.axis
        if index >= len(graph.outputs):
            raise Refused(f"the graph has {len(graph.outputs)} outputs, and no output {index}")
        if self.options.name in graph.input_names:
            raise Refused(f"the graph has an input called {self.options.name!r} already")
        rows = (graph.outputs[index].shape or ())[axis : axis + 1]
        chain = rows_behind(graph, graph.outputs[index], axis)
        product = chain[-1]
        x = product.inputs[0]
        assert x is not None
        inputs = list(zip(graph.input_names, graph.inputs))
        keep = graph.add_input(self.options.name, "int64", ["kept_rows"])
        kept = graph.insert_plain("gather", [x, keep], {"axis": axis}, after=x.producer)
        graph.set_operand(product, 0, kept)
        for op in reversed(chain):
            graph.refresh(op)
        outputs = list(zip(graph.output_names, graph.outputs))
        graph.set_signature([*inputs, (self.options.name, keep)], outputs)
        outcome = Outcome(changed=True, statistics={"outputs": 1, "ops behind the product": len(chain) - 1})
        outcome.signature = self._all_rows(graph, next(iter(rows), None), context)
        return outcome

    def _all_rows(self, graph: Graph, rows: Dim | None, context: PassContext) -> NewSignature:
        """The examples, and as many rows as can be told from their lengths: all, or the first."""
        examples = zip(graph.inputs, context.example_inputs or ())
        lengths = {d: n for v, item in examples for d, n in zip(v.shape or (), item.shape)}
        count = rows if isinstance(rows, int) else 1 if rows is None else lengths.get(rows, 1)
        index, axis = self.options.output, self.options.axis
        keep = np.arange(count, dtype=np.int64)
        signature = same_examples(context, len(graph.outputs), {self.options.name: keep})

        def expected(found: Arrays) -> Arrays:
            whole = found[index]
            return [*found[:index], None if whole is None else whole.take(keep, axis), *found[index + 1 :]]

        signature.expected = expected
        return signature


def rows_behind(graph: Graph, output: Value, axis: int) -> list[Op]:
    """The ops from the one that makes `output` back to its product, all of them used for nothing else."""
    chain: list[Op] = []
    value = output
    while True:
        op = value.producer
        others = len(value.users) + sum(out is value for out in graph.outputs)
        if op is None or (others > 1):
            raise Refused(f"%{value.name} is an input, or used in {others} places: its rows cannot be chosen")
        chain.append(op)
        if is_product(graph, op):
            if axis >= value.rank - 1:
                raise Refused(f"%{value.name} has no rows along axis {axis}, which its product makes")
            return chain
        constants = [v for v in op.inputs if v is not None and is_fixed(graph, v)]
        computed = [v for v in op.inputs if v is not None and v not in constants]
        by_row = op.kind in ("elementwise", "tie") and len(computed) == 1 and computed[0].rank == value.rank
        if not by_row or any(_along(v, value, axis) for v in constants):
            raise Refused(
                f"{op.target} (%{op.name}) stands between the output and its product, and is not known to work on "
                "each row by itself"
            )
        value = computed[0]


def is_product(graph: Graph, op: Op) -> bool:
    """A product with constant weights, of the host's or of the dialect's."""
    weight = op.operand(1)
    known = op.kind in ("linear", "matmul") or op.target in PRODUCTS
    return known and weight is not None and graph.is_constant(weight)


def is_fixed(graph: Graph, value: Value) -> bool:
    """Whether `value` is a constant, or a cast or copy of one."""
    while value.producer is not None and value.producer.kind in ("tie", "elementwise"):
        operands = [v for v in value.producer.inputs if v is not None]
        if len(operands) != 1:
            return False
        value = operands[0]
    return graph.is_constant(value)


def _along(constant: Value, value: Value, axis: int) -> bool:
    """Whether a constant has an entry of its own for every row."""
    place = axis - (value.rank - constant.rank)
    return place >= 0 and constant.shape is not None and constant.shape[place] != 1
