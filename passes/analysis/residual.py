"""The layers of a causal language model, found by the shape of its graph.

Between a model's tokens and its scores there are values that everything passes through: nothing of the tokens reaches
the scores but by them. They are the residual stream, and what lies between two of them is one step of it. A step with
an attention among the tokens begins a layer; the steps behind it, up to the next attention, belong to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..errors import NothingMatched, Refused
from ..ir.graph import Graph, Op, Value
from .flow import is_float, reads_shapes

DEFAULT_IDS = "input_ids"
"""The usual name of the input with the ids of an encoder's or a decoder's tokens."""
_LOOKUPS = ("embedding", "gather")
_ADDITIONS = ("add", "residual_add")


@dataclass(frozen=True)
class Layer:
    """Leaving the layer out is reading `start` in the place of `end`, which has the same shape and dtype. ops: those
    from after `start` up to the one that makes `end`, as far as they lead to the scores."""

    index: int
    start: Value
    end: Value
    attention: Op
    ops: tuple[Op, ...]


@dataclass
class _Step:
    """What lies between two values of the stream. residual: `end` is `start` plus something that was made of it."""

    start: Value
    end: Value
    ops: list[Op]
    attentions: list[Op]
    residual: bool = False

    def form(self) -> list[tuple[str, object]]:
        return [(op.kind, op.attrs.get("fn")) for op in self.ops if not is_idle(op)]


@dataclass
class _Content:
    """values: floats that depend on the tokens' embeddings. lookups: the ops that make those."""

    values: set[Value] = field(default_factory=set)
    lookups: list[Op] = field(default_factory=list)


def residual_layers(graph: Graph, ids: Value, output: int = 0) -> list[Layer]:
    """The layers between the token ids and an output, in order.

    Raises NothingMatched where no attention lies between them; Refused where the stream cannot be followed, because
    something bypasses it or because a layer with an attention is no x + f(x)."""
    if output >= len(graph.outputs):
        raise Refused(f"the graph has {len(graph.outputs)} outputs, and no output {output}")
    sink = graph.outputs[output]
    content = _content(graph, ids)
    if sink not in content.values:
        raise NothingMatched(f"the output %{sink.name} does not come from an embedding of %{ids.name}")
    steps = list(_steps(graph, sink, content, ids))
    starts = [i for i, step in enumerate(steps) if step.attentions]
    if not starts:
        raise NothingMatched(f"no attention among the tokens of %{ids.name} leads to %{sink.name}")
    for i in starts:
        _check(steps[i])
    stops = [*starts[1:], _last_stop(steps, starts)]
    layers = []
    for number, (first, stop) in enumerate(zip(starts, stops)):
        inner = steps[first:stop]
        start, end = inner[0].start, inner[-1].end
        if start.dtype != end.dtype or not _same_shape(start, end):
            raise Refused(f"layer {number} makes {end!r} of {start!r}: it cannot be left out")
        layers.append(
            Layer(number, start, end, inner[0].attentions[0], tuple(op for s in inner for op in s.ops))
        )
    return layers


def token_ids(graph: Graph, name: str = "") -> Value:
    """The input with the tokens' ids: the one called `name`, else decoder_input_ids, else input_ids.

    Raises NothingMatched where there is none."""
    known = dict(zip(graph.input_names, graph.inputs))
    for wanted in [name] if name else ["decoder_input_ids", "input_ids"]:
        if wanted in known:
            return known[wanted]
    raise NothingMatched(
        f"no input {name or 'input_ids'!r} with token ids among {', '.join(sorted(known))}; option ids names it"
    )


def lookups(graph: Graph, ids: Value) -> list[Op]:
    """The ops that look the tokens up in a table of floats."""
    return _content(graph, ids).lookups


def is_idle(op: Op) -> bool:
    """Whether an op gives its first operand as it is."""
    x = op.inputs[0] if op.inputs else None
    if x is None or len(op.outputs) != 1:
        return False
    if op.kind == "tie":
        return True
    if op.kind != "elementwise" or x.dtype != op.output.dtype:
        return False
    if op.attrs.get("fn") == "dropout":
        return op.attrs.get("train") is False or not op.attrs.get("p", 0.5)
    return op.attrs.get("fn") == "cast"


def without_idle(value: Value) -> Value:
    """The value that `value` is a copy of."""
    while value.producer is not None and is_idle(value.producer):
        source = value.producer.inputs[0]
        assert source is not None
        value = source
    return value


# ---- the stream ------------------------------------------------------------------------------------------
def _content(graph: Graph, ids: Value) -> _Content:
    found, plain = _Content(), {ids}
    for op in graph.ops:
        if reads_shapes(op):
            continue
        operands = [v for v in op.inputs if v is not None]
        if any(v in found.values for v in operands):
            found.values.update(out for out in op.outputs if is_float(out))
        elif any(v in plain for v in operands):
            table = op.kind in _LOOKUPS or (op.kind == "elision" and "embedding" in op.target)
            if table and is_float(op.output):
                found.lookups.append(op)
                found.values.add(op.output)
            else:
                plain.update(op.outputs)
    return found


def _steps(graph: Graph, sink: Value, content: _Content, ids: Value) -> Iterator[_Step]:
    needed = _needed(sink, content)
    ops = [op for op in graph.ops if op in needed]
    place = {op: number for number, op in enumerate(ops)}
    furthest = max(place[op] for op in content.lookups if op in place)
    start: Value | None = None
    inner: list[Op] = []
    length = ids.shape[-1] if ids.shape else None
    for number, op in enumerate(ops):
        inner.append(op)
        used = [v for v in op.outputs if v is sink or any(user in place for user, _ in v.users)]
        # Everything passes through a value that no path leads around.
        if furthest <= number and len(used) == 1 and not is_idle(op):
            mixing = [one for one in inner if _mixes(one, content, length)]
            if start is not None:
                step = _Step(start, used[0], inner, mixing)
                step.residual = _adds_to(step, content)
                yield step
            elif mixing:
                raise Refused(
                    f"{mixing[0].target} (%{mixing[0].name}) comes before any value of the residual stream"
                )
            start, inner = used[0], []
        furthest = max([furthest, *(place[user] for v in used for user, _ in v.users if user in place)])


def _needed(sink: Value, content: _Content) -> set[Op]:
    needed: set[Op] = set()
    queue = [sink]
    while queue:
        op = queue.pop().producer
        if op is None or op in needed:
            continue
        needed.add(op)
        if op not in content.lookups:
            queue += [v for v in op.inputs if v is not None and v in content.values]
    return needed


def _mixes(op: Op, content: _Content, length: object) -> bool:
    """Whether tokens meet in `op`: an attention to keys that come from tokens, or a softmax over them."""
    if op.kind == "attention" or (op.kind == "elision" and "attention" in op.target):
        return any(v in content.values for v in op.inputs[1:])
    if op.kind == "softmax":
        x = op.inputs[0]
        return x is not None and x.shape is not None and x.shape[op.attrs["axis"]] == length
    return False


def _adds_to(step: _Step, content: _Content) -> bool:
    """Whether `end` is `start`, and something else that depends on the tokens, added up."""
    found, other, queue = False, False, [step.end]
    while queue:
        value = without_idle(queue.pop())
        op = value.producer
        if value is step.start:
            found = True
        elif op is not None and op in step.ops and _is_addition(op):
            queue += [v for v in op.inputs if v is not None]
        else:
            other = other or value in content.values
    return found and other


def _is_addition(op: Op) -> bool:
    return (
        op.kind == "elementwise"
        and op.attrs.get("fn") in _ADDITIONS
        and op.attrs.get("alpha", 1) == 1
        and sum(v is not None for v in op.inputs) > 1
    )


def _check(step: _Step) -> None:
    first, *more = step.attentions
    if more:
        raise Refused(
            f"{first.target} (%{first.name}) and {more[0].target} (%{more[0].name}) have no value between them that "
            "all of the tokens' data passes through: the layers cannot be told apart"
        )
    if not step.residual:
        op = step.end.producer
        assert op is not None
        raise Refused(
            f"{op.target} (%{op.name}) makes %{step.end.name}, which is not %{step.start.name} with the result of "
            f"{first.target} (%{first.name}) added to it"
        )


def _last_stop(steps: list[_Step], starts: list[int]) -> int:
    """Where the last layer ends: behind its last addition, and behind what the other layers have there too (a norm,
    where the stream itself is normalised)."""
    last = max(i for i, step in enumerate(steps) if step.residual) + 1
    if len(starts) > 1:
        inner = range(starts[-2], starts[-1])
        tail = steps[max(i for i in inner if steps[i].residual) + 1 : starts[-1]]
    else:
        after = next((i for i in range(starts[0] + 1, len(steps)) if steps[i].residual), starts[0] + 1)
        tail = steps[starts[0] + 1 : after]
    stop = last + len(tail)
    if [step.form() for step in steps[last:stop]] != [step.form() for step in tail]:
        raise Refused(
            f"the last layer, which adds up to %{steps[last - 1].end.name}, does not end as the one before it, with "
            f"{', '.join(op.target for step in tail for op in step.ops)}"
        )
    return stop


def _same_shape(a: Value, b: Value) -> bool:
    if a.shape is None or b.shape is None or a.rank != b.rank:
        return False
    return all(m == n or bool(getattr(m - n, "is_zero", False)) for m, n in zip(a.shape, b.shape))
