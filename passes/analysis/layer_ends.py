"""The values between the layers of a token space: what layer i leaves, and what the next one starts from."""

from __future__ import annotations

from ..errors import Refused
from ..ir.graph import Op, Value
from .flow import Flow
from .spaces import Analysis, TokenSpace

ADDITIONS = ("add", "residual_add")


def layer_value(analysis: Analysis, space: TokenSpace, layer: int) -> tuple[Value, int]:
    """The features of the tokens behind `layer` layers (0: the embeddings), and that number; -1 is the last, -2 the one
    before. Raises Refused where there are not so many, or where they cannot be told apart."""
    blocks = space.blocks
    wanted = layer + len(blocks) + 1 if layer < 0 else layer
    if not 0 <= wanted <= len(blocks):
        raise Refused(f"there is no layer {layer}: the {space.length} tokens pass {len(blocks)} layers")
    if wanted == len(blocks):
        return _end(analysis, space), wanted
    block = blocks[wanted]
    if block.skip is None:
        raise Refused(f"{block.attention.target} (%{block.attention.name}): {block.problem}")
    if block.skip.producer is None:
        raise Refused(f"%{block.skip.name} is an input of the graph: there is no op behind which to merge it")
    return block.skip, wanted


def _end(analysis: Analysis, space: TokenSpace) -> Value:
    """What the last layer leaves: behind its attention, everything that the tokens' data passes through is a value of
    the residual stream. The last of them that is an addition is the end, with the norm behind it where the stream
    itself is normalised (the addition before has one, which the last addition adds to)."""
    block = space.blocks[-1]
    if block.add is None:
        raise Refused(f"{block.attention.target} (%{block.attention.name}): {block.problem}")
    start = block.add.output
    stream = _stream(analysis, space, start)
    additions = [value for value in stream[1:] if _adds(analysis.flow, value, stream)]
    if not additions:
        return start
    end = additions[-1]
    after = stream[stream.index(end) + 1 :]
    normalised = any(
        v.producer is not None and v.producer.kind == "norm" for v in _operands(end) if v in stream
    )
    if normalised and after and after[0].producer is not None and after[0].producer.kind == "norm":
        return after[0]
    return end


def _stream(analysis: Analysis, space: TokenSpace, start: Value) -> list[Value]:
    """`start` and the values of all tokens behind it that everything made of it passes through, in order."""
    flow = analysis.flow
    assert start.producer is not None
    made = [op for op in analysis.graph.ops[flow.position[start.producer] + 1 :] if _reads(flow, op, start)]
    place = {op: index for index, op in enumerate(made)}
    outputs = set(analysis.graph.outputs)
    found, furthest = [start], _last(start, place, outputs)
    for index, op in enumerate(made):
        if furthest <= index and len(op.outputs) == 1:  # nothing that was made before is read behind it
            if not analysis.token_axes(space, op.output) or op.output.rank != start.rank:
                break
            found.append(op.output)
        furthest = max([furthest, *(_last(value, place, outputs) for value in op.outputs)])
    return found


def _reads(flow: Flow, op: Op, start: Value) -> bool:
    return op.kind != "size" and flow.depends(op.output, start)


def _last(value: Value, place: dict[Op, int], outputs: set[Value]) -> int:
    """The last op of `place` that reads `value`, behind all where it is an output of the graph."""
    if value in outputs:
        return len(place)
    return max((place[op] for op, _ in value.users if op in place), default=-1)


def _adds(flow: Flow, value: Value, stream: list[Value]) -> bool:
    op = value.producer
    assert op is not None
    is_sum = op.kind == "elementwise" and op.attrs.get("fn") in ADDITIONS
    operands = _operands(value)
    made = all(flow.depends(v, stream[0]) for v in operands)
    return is_sum and made and len(operands) == 2 and any(v in stream for v in operands)


def _operands(value: Value) -> list[Value]:
    assert value.producer is not None
    return [v for v in value.producer.inputs if v is not None]
