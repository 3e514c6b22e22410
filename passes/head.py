"""head: the k largest logits of every row instead of all of them.

Greedy decoding and top-k sampling read no more than that, and the confidence of a choice only a sum more. A language
model's head has a row of logits as wide as its vocabulary, which need not be written when the product, with the norm
before it, keeps the largest as it goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import Arrays, Outcome, Pass, PassContext, register, same_examples
from .errors import PipelineError, Refused
from .ir.graph import Graph, Op, Value
from .keep_rows import is_product


@dataclass(frozen=True)
class HeadOptions:
    """k: how many of the largest logits. output: which graph output the logits are. beside: whether that output stays,
    for who wants all logits of some rows (with keep-rows: of those only). spread: whether what is known of the softmax
    over all of them comes as well."""

    k: int = 1
    output: int = 0
    beside: bool = False
    spread: bool = False

    def __post_init__(self) -> None:
        if self.k < 1:
            raise PipelineError(f"k must be at least 1, not {self.k}")
        if self.output < 0:
            raise PipelineError(f"output must be at least 0, not {self.output}")


@register
class Head(Pass):
    """Turns the logits [.., n] into their k largest: values float32 [.., k] in the place of that output, descending,
    and as the last output their indices int64 [.., k]. Among equal logits the lowest index comes first. With `beside`
    the logits stay, and `values` and `indices` are the last two outputs. With `spread` there is one more behind them,
    float32 [.., 2]: the log of the sum of exp of all logits, and the entropy of their softmax in nats."""

    name = "head"
    exact = False  # the output is another one, though its numbers are the same
    summary = "the k largest logits of a row instead of all of them"
    Options = HeadOptions

    def run(self, graph: Graph, context: PassContext) -> Outcome:
        """Raises Refused where the output is not directly what one product with constant weights gives."""
        logits, product = find_product(graph, self.options.output)
        inputs, attrs = operands(graph, product, logits)
        channels = logits.shape[-1] if logits.shape else None
        if isinstance(channels, int) and self.options.k > channels:
            raise Refused(f"%{logits.name} has {channels} logits a row, fewer than k={self.options.k}")
        outcome = Outcome(changed=True, statistics={"heads": 1})
        outcome.signature = same_examples(context, len(graph.outputs))
        outcome.signature.expected = self._largest
        if (norm := foldable_norm(graph, product)) is not None:
            inputs[0], weight = norm.inputs[0], norm.operand(1)
            inputs.append(weight)
            attrs["eps"] = epsilon(norm)
            outcome.statistics["norms folded in"] = 1
        op = "linear_spread" if self.options.spread else "linear_topk"
        values, indices, *spread = graph.insert(op, inputs, attrs | {"k": self.options.k}, after=product)
        if self.options.beside:
            graph.add_output(values, "values")
        else:
            graph.replace_output(self.options.output, values)
        graph.add_output(indices, "indices")
        for value in spread:
            graph.add_output(value, "spread")
        graph.remove_dead()
        return outcome

    def _largest(self, found: Arrays) -> Arrays:
        """What the outputs are then: indices are not compared, since equal logits may be taken in another order where
        the product rounds otherwise."""
        logits = found[self.options.output]
        values = None if logits is None else -np.sort(-logits.astype(np.float32), -1)[..., : self.options.k]
        if self.options.beside:
            return [*found, values]
        return [values if i == self.options.output else array for i, array in enumerate(found)]


def find_product(graph: Graph, output: int) -> tuple[Value, Op]:
    """The logits and the product that makes them."""
    if output >= len(graph.outputs):
        raise Refused(f"the graph has {len(graph.outputs)} outputs, and no output {output}")
    logits = graph.outputs[output]
    op = logits.producer
    while op is not None and op.kind == "tie" and op.inputs[0] is not None:
        op = op.inputs[0].producer
    if op is None:
        raise Refused(f"%{logits.name} is output {output} and no op computes it")
    if op.kind == "matmul" or not is_product(graph, op):
        raise Refused(
            f"{op.target} (%{op.name}) makes output {output}: it is no product with constant weights"
        )
    return logits, op


def operands(graph: Graph, product: Op, logits: Value) -> tuple[list[Value | None], dict[str, Any]]:
    """Operands and attributes of linear_topk, but for the norm and k."""
    x, weight = product.inputs[:2]
    assert weight is not None
    if product.target == "elision.linear_nbits":
        scales, zeros, bias = (product.operand(i) for i in (2, 3, 4))
        attrs = {name: product.attrs[name] for name in ("bits", "group")}
        return [x, weight, scales, zeros, bias], attrs
    if product.kind == "linear" and not product.attrs["transposed"]:
        raise Refused(
            f"{product.target} (%{product.name}) has its weight %{weight.name} as [in, out]; fix-rows turns it"
        )
    bits = 32 if weight.dtype == "float32" else 16
    return [x, weight, None, None, product.operand(2)], {"bits": bits, "group": 32}


def foldable_norm(graph: Graph, product: Op) -> Op | None:
    """The RMS norm over the channels that makes the product's operand and that nobody else reads."""
    x = product.inputs[0]
    norm = None if x is None else x.producer
    if x is None or norm is None or norm.kind != "norm" or norm.attrs.get("fn") != "rms_norm":
        return None
    if x in graph.outputs or len(x.users) > 1 or epsilon(norm) is None or norm.operand(2) is not None:
        return None
    return norm if tuple(norm.attrs["axes"]) == (x.rank - 1,) else None


def epsilon(norm: Op) -> float | None:
    return norm.attrs.get("eps", norm.attrs.get("epsilon"))
