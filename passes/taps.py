"""taps: hidden states as outputs of a language model, for heads that guess several tokens ahead.

Such heads read what the model's own head reads (Medusa, Cai et al., ICML 2024), or the residual stream after some of
its layers (EAGLE-3, Li et al., 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

from .analysis.flow import is_float
from .analysis.residual import residual_layers, token_ids, without_idle
from .base import Outcome, Pass, PassContext, register
from .errors import PipelineError, Refused
from .ir.graph import Graph, Value
from .keep_rows import rows_behind
from .skip_layers import numbers

LAST = "last"


@dataclass(frozen=True)
class TapsOptions:
    """where: "last" for what the product of the scores reads, numbers of layers from 0 on for the residual stream after
    them, or a list of both. output: which graph output the scores are. ids: the name of the input with the token ids
    (by default decoder_input_ids, else input_ids)."""

    where: int | str | list[int | str] = LAST
    output: int = 0
    ids: str = ""

    def __post_init__(self) -> None:
        if not places(self.where):
            raise PipelineError("where names no place")
        if self.output < 0:
            raise PipelineError(f"output must be at least 0, not {self.output}")


@register
class Taps(Pass):
    """Adds outputs float32 [1, M, H]: `hidden` for "last", `hidden.k` for layer k, in the order of `where`.

    It comes before `keep-rows`, after which the product reads some rows only, and before `head`."""

    name = "taps"
    exact = True
    summary = "hidden states as outputs, for heads that guess several tokens"
    Options = TapsOptions

    def run(self, graph: Graph, context: PassContext) -> Outcome:
        """Raises Refused where the scores are not directly what a product with constant weights gives, where layers
        cannot be told apart, or where a name is taken; NothingMatched for a graph without layers."""
        options: TapsOptions = self.options
        found: list[tuple[str, Value]] = []
        asked, ids = places(options.where), token_ids(graph, options.ids)
        layers = []
        if any(place != LAST for place in asked):
            layers = residual_layers(graph, ids, options.output)
        for place in asked:
            if place == LAST:
                found.append(("hidden", self._last(graph)))
            elif int(place) >= len(layers):
                raise Refused(
                    f"the graph has {len(layers)} layers, 0 to {len(layers) - 1}: there is no layer {place}"
                )
            else:
                found.append((f"hidden.{place}", layers[int(place)].end))
        for name, value in found:
            if name in graph.output_names:
                raise Refused(f"the graph has an output called {name!r} already")
            if value.rank != 3 or not is_float(value):
                raise Refused(f"{value!r} is no hidden state [1, M, H]")
            if value.shape is None or ids.shape is None or value.shape[1] != ids.shape[-1]:
                raise Refused(f"{value!r} has no row for every token of {ids!r}")
        for name, value in found:
            if value.dtype != "float32":
                value = graph.insert_plain("cast", [value], {"dtype": "float32"}, after=value.producer)
            graph.add_output(value, name)
        return Outcome(changed=True, statistics={"taps": len(found)})

    def _last(self, graph: Graph) -> Value:
        output = self.options.output
        if output >= len(graph.outputs):
            raise Refused(f"the graph has {len(graph.outputs)} outputs, and no output {output}")
        x = rows_behind(graph, graph.outputs[output], 1)[-1].inputs[0]
        assert x is not None
        return without_idle(x)


def places(where: int | str | list[int | str]) -> list[int | str]:
    """What `where` says, each place once. Raises PipelineError for what is no place."""
    items = where if isinstance(where, list) else [where]
    parts = [part.strip() for item in items for part in str(item).split(",") if part.strip()]
    found: dict[int | str, None] = {}
    for part in parts:
        found |= {LAST: None} if part == LAST else dict.fromkeys(numbers(part))
    return list(found)
