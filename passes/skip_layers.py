"""skip-layers: a language model without some of its layers, which is a cheap guess of what the whole one says.

Layers of a residual stream add to it and leave it what it is, so that the model works, if worse, with some of them
left out. As a drafter it needs no training and no weights of its own (Draft & Verify, Zhang et al., ACL 2024;
LayerSkip, Elhoushi et al., ACL 2024).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .analysis.residual import Layer, residual_layers, token_ids
from .base import NewSignature, Outcome, Pass, PassContext, register, same_examples
from .errors import NothingMatched, PipelineError, Refused
from .ir.graph import Graph, Op, Value

_RANGE = re.compile(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?")


@dataclass(frozen=True)
class SkipLayersOptions:
    """layers: numbers from 0 on that are left out, one, a list, or a text as "2,10-19"; then share says nothing.
    share: the part of all layers that is left out, spread evenly, the first and the last layer kept. output: which
    graph output the scores are. ids: the name of the input with the token ids (by default decoder_input_ids, else
    input_ids)."""

    layers: int | str | list[int | str] = ""
    share: float = 0.5
    output: int = 0
    ids: str = ""

    def __post_init__(self) -> None:
        numbers(self.layers)
        if not 0 <= self.share < 1:
            raise PipelineError(f"share is at least 0 and less than 1, not {self.share}")
        if self.output < 0:
            raise PipelineError(f"output must be at least 0, not {self.output}")


@register
class SkipLayers(Pass):
    """Leaves layers out. A layer is an attention among the tokens that is added to the residual stream, and what is
    added behind it up to the next one; its result is read nowhere any more, what it was made of is in its place.

    In a graph with caches, inputs that only such layers read, and outputs that are made of them, go; the others keep
    their names. Before `incremental` there are none yet."""

    name = "skip-layers"
    exact = False
    reduces = True
    summary = "a language model without some of its layers, for drafts"
    Options = SkipLayersOptions

    def run(self, graph: Graph, context: PassContext) -> Outcome:
        """Raises NothingMatched where the graph has no such layers, Refused where they cannot be told apart, a layer
        is no x + f(x), or something behind it reads more of it than its result."""
        options: SkipLayersOptions = self.options
        layers = residual_layers(graph, token_ids(graph, options.ids), options.output)
        skipped = _chosen(options, len(layers))
        statistics: dict[str, Any] = {"layers": len(layers), "layers left out": len(skipped)}
        if not skipped:
            return Outcome(statistics=statistics, notes=["no layer is to be left out"])
        runs = _runs(layers, skipped)
        inside = _inside(runs)
        inputs, outputs = self._lost(graph, inside, {op for run in runs for layer in run for op in layer.ops})
        kept_inputs = [(n, v) for n, v in zip(graph.input_names, graph.inputs) if v not in inputs]
        names = graph.output_names
        for run in reversed(runs):  # the later first: an end may be the next one's start
            graph.replace_uses(run[-1].end, run[0].start)
        outcome = Outcome(changed=True, statistics=statistics)
        outcome.notes.append(
            f"left out: layer{'s' if len(skipped) > 1 else ''} {', '.join(map(str, skipped))}"
        )
        if not outputs:
            graph.remove_dead()
            return outcome
        kept = [i for i in range(len(graph.outputs)) if i not in outputs]
        outcome.signature = _without(graph, inputs, kept, context)
        gone = ", ".join([*(v.name for v in inputs), *(names[i] for i in outputs)])
        outcome.notes.append(f"went with them: {gone}")
        graph.set_signature(kept_inputs, [(names[i], graph.outputs[i]) for i in kept])
        return outcome

    def _lost(self, graph: Graph, inside: set[Op], own: set[Op]) -> tuple[list[Value], list[int]]:
        """Inputs that nothing else reads, and outputs that depend on what goes. The latter must be a cache's."""
        outputs = [i for i, v in enumerate(graph.outputs) if v.producer in inside]
        inputs = [v for v in graph.inputs if v.users and all(user in inside for user, _ in v.users)]
        for index in outputs:
            value = graph.outputs[index]
            if index == self.options.output:
                op = next(op for op in graph.ops if op in inside and op not in own)
                raise Refused(f"{op.target} (%{op.name}) reads more of a layer than its result")
            if not _depends(value, inputs):
                raise Refused(
                    f"the output %{value.name} is made inside a layer that is left out, and is no cache of it"
                )
        return (inputs if outputs else []), outputs


def numbers(layers: int | str | list[int | str]) -> list[int]:
    """The numbers that an option says, rising. Raises PipelineError for a text that is no list of them."""
    if isinstance(layers, list):
        return sorted({number for item in layers for number in numbers(item)})
    found: set[int] = set()
    for part in str(layers).split(",") if str(layers).strip() else []:
        match = _RANGE.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last > 9999:
            raise PipelineError(f"{part.strip()!r} is no number of a layer, and no range as 10-19")
        found.update(range(first, last + 1))
    return sorted(found)


def spread(count: int, layers: int) -> list[int]:
    """`count` numbers among 1 .. layers - 2, evenly spread."""
    room = layers - 2
    return [1 + int((i + 0.5) * room / count) for i in range(count)]


def _without(graph: Graph, gone: list[Value], kept: list[int], context: PassContext) -> NewSignature:
    """The examples without the inputs that go, and the outputs that stay."""
    signature = same_examples(context, len(graph.outputs))
    if signature.before is None or signature.after is None:
        return signature
    after = [array for value, array in zip(graph.inputs, signature.after) if value not in gone]
    return NewSignature(signature.before, after, kept)


def _chosen(options: SkipLayersOptions, count: int) -> list[int]:
    given = numbers(options.layers)
    if given:
        if given[-1] >= count:
            raise Refused(f"the graph has {count} layers, 0 to {count - 1}: there is no layer {given[-1]}")
        if len(given) == count:
            raise Refused(f"layers {options.layers} are all that the graph has")
        return given
    wanted = int(options.share * count + 0.5)
    if wanted and count < 3:
        raise NothingMatched(f"skip-layers keeps the first and the last layer, and the graph has {count}")
    return spread(min(wanted, count - 2), count) if wanted else []


def _runs(layers: list[Layer], skipped: list[int]) -> list[list[Layer]]:
    """The skipped layers, those that follow each other together."""
    runs: list[list[Layer]] = []
    for number in skipped:
        if runs and runs[-1][-1].index == number - 1:
            runs[-1].append(layers[number])
        else:
            runs.append([layers[number]])
    return runs


def _inside(runs: list[list[Layer]]) -> set[Op]:
    """The ops of the layers, and all that depends on them in another way than by the runs' results."""
    inside: set[Op] = set()
    ends = {run[-1].end for run in runs}
    queue = [op for run in runs for layer in run for op in layer.ops]
    while queue:
        op = queue.pop()
        if op in inside:
            continue
        inside.add(op)
        queue += [user for out in op.outputs if out not in ends for user, _ in out.users]
    return inside


def _depends(value: Value, inputs: list[Value]) -> bool:
    seen: set[Value] = set()
    queue = [value]
    while queue:
        value = queue.pop()
        if value in inputs:
            return True
        if value not in seen and value.producer is not None:
            seen.add(value)
            queue += [v for v in value.producer.inputs if v is not None]
    return False
