"""From ONNX operators to the canonical kinds: one row per operator or family.

A row turns a node into a `Facts`: the kind, its attributes, which of the node's inputs are the kind's operands
(in the kind's order), and which only say a shape. What a row cannot express as its kind becomes "unknown",
with the reason in `attrs["why"]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from .onnx_dialect import op_and_attributes
from .onnx_names import PLAIN_NAMES, UNARY_AND_BROADCAST
from .onnx_rule_table import axes_operand, axis_of
from .onnx_shapes import MALFORMED, ShapeEnv, constant_tensor, numpy_dtype

INT_MAX = 2**31 - 1


@dataclass
class Facts:
    kind: str
    attrs: dict[str, Any] = field(default_factory=dict)
    operands: list[int] = field(
        default_factory=list
    )  # positions among the node's inputs; may lie past the end
    shape_operands: list[int] = field(default_factory=list)


Row = Callable[[ShapeEnv, ir.Node], Facts]
ROWS: dict[tuple[str, str], Row] = {}


def row(*names: str, domain: str = "") -> Callable[[Row], Row]:
    def add(function: Row) -> Row:
        for name in names:
            ROWS[domain, name] = function
        return function

    return add


def everything(node: ir.Node) -> list[int]:
    return list(range(len(node.inputs)))


def unknown(node: ir.Node, why: str) -> Facts:
    return Facts("unknown", {"why": why}, everything(node))


def classify(env: ShapeEnv, node: ir.Node) -> Facts:
    """The canonical kind of a node."""
    if node.domain == "elision":
        name, attrs = op_and_attributes(node)
        return Facts("elision", {**attrs, "op": name}, everything(node))
    known = ROWS.get((node.domain if node.domain != "ai.onnx" else "", node.op_type))
    if known is None:
        return unknown(
            node, f"{node.domain or 'ai.onnx'} operator {node.op_type} has no row in the table of kinds"
        )
    try:
        return known(env, node)
    except MALFORMED as error:
        return unknown(node, f"{node.op_type}: {error}")


# ---- elementwise -------------------------------------------------------------------------------------
def plain(op_type: str) -> str:
    return PLAIN_NAMES.get(op_type, op_type.lower())


@row(*UNARY_AND_BROADCAST)
def _elementwise(env: ShapeEnv, node: ir.Node) -> Facts:
    attrs: dict[str, Any] = {"fn": plain(node.op_type)}
    if node.op_type == "Cast":
        attrs["dtype"] = numpy_dtype(node.outputs[0].dtype)
    if node.op_type == "Gelu":
        attrs["approximate"] = node.attributes.get_string("approximate", "none")
    return Facts("elementwise", attrs, [0] if node.op_type == "CastLike" else everything(node))


@row("Gelu", "FastGelu", "BiasGelu", "QuickGelu", domain="com.microsoft")
def _gelu_contrib(env: ShapeEnv, node: ir.Node) -> Facts:
    return Facts("elementwise", {"fn": plain(node.op_type)}, everything(node))


@row("Dropout")
def _dropout(env: ShapeEnv, node: ir.Node) -> Facts:
    return Facts("elementwise", {"fn": "dropout"}, [0])


@row("Identity")
def _identity(env: ShapeEnv, node: ir.Node) -> Facts:
    return Facts("tie", {}, [0])


@row("QuantizeLinear", "DequantizeLinear")
def _quantize(env: ShapeEnv, node: ir.Node) -> Facts:
    if any(env.need(v) not in ((), (1,)) for v in node.inputs[1:] if v is not None):
        # One scale per channel: only where x is a constant is that no matter for the tokens.
        return unknown(node, f"{node.op_type} with one scale per channel")
    return Facts("elementwise", {"fn": plain(node.op_type)}, everything(node))


# ---- products ----------------------------------------------------------------------------------------
@row("MatMul")
def _matmul(env: ShapeEnv, node: ir.Node) -> Facts:
    a, b = env.need(node.inputs[0]), env.need(node.inputs[1])
    if (
        len(b) == 2
        and constant_tensor(node.inputs[1]) is not None
        and constant_tensor(node.inputs[0]) is None
    ):
        return Facts("linear", {"transposed": False}, [0, 1])
    if len(a) < 2 or len(b) < 2:
        return unknown(node, "MatMul with a vector")
    return Facts("matmul", {}, [0, 1])


@row("Gemm")
def _gemm(env: ShapeEnv, node: ir.Node) -> Facts:
    if node.attributes.get_int("transA", 0):
        return unknown(node, "Gemm with its first operand transposed")
    attrs: dict[str, Any] = {"transposed": bool(node.attributes.get_int("transB", 0))}
    for name in ("alpha", "beta"):
        factor = node.attributes.get_float(name, 1.0)
        if factor != 1.0:
            attrs[name] = factor
    return Facts("linear", attrs, everything(node))


@row("Einsum")
def _einsum(env: ShapeEnv, node: ir.Node) -> Facts:
    equation = node.attributes["equation"].as_string().replace(" ", "")
    left, _, right = equation.partition("->")
    terms = left.split(",")
    if len(terms) == 2 and all(len(t) >= 2 for t in (*terms, right)):
        (*batch, m, k), (*batch2, k2, n) = terms
        if (
            batch == batch2
            and k == k2
            and right == "".join(batch) + m + n
            and len({m, k, n, *batch}) == len(batch) + 3
        ):
            return Facts("matmul", {}, [0, 1])
    return unknown(node, f"Einsum {equation} is not a plain matrix product")


@row("Attention")
def _attention(env: ShapeEnv, node: ir.Node) -> Facts:
    q = env.need(node.inputs[0])
    if len(q) != 4:
        return unknown(node, "Attention over packed heads (normalise splits them)")
    if (
        any(v is not None for v in node.inputs[4:])
        or sum(bool(o.uses()) or i == 0 for i, o in enumerate(node.outputs)) > 1
    ):
        return unknown(node, "Attention with a cache or with its scores as an output")
    scale = node.attributes.get_float("scale", None)
    if scale is None:
        if not isinstance(q[3], int):
            return unknown(node, "Attention whose head width is not static, without a scale")
        scale = q[3] ** -0.5
    causal = bool(node.attributes.get_int("is_causal", 0))
    attrs: dict[str, Any] = {"scale": float(scale), "causal": causal}
    if node.attributes.get_float("softcap", 0.0):
        attrs["softcap"] = node.attributes.get_float("softcap", 0.0)
    return Facts("attention", attrs, [0, 1, 2, 3])


# ---- norms, softmax, reductions ----------------------------------------------------------------------
@row("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
def _layer_norm(env: ShapeEnv, node: ir.Node) -> Facts:
    rank = len(env.need(node.inputs[0]))
    axis = axis_of(node, rank, -1)
    fn = "layer_norm" if node.op_type == "LayerNormalization" else "rms_norm"
    attrs = {
        "axes": tuple(range(axis, rank)),
        "fn": fn,
        "epsilon": node.attributes.get_float("epsilon", 1e-5),
    }
    return Facts("norm", attrs, everything(node))


@row(
    "GroupNormalization",
    "InstanceNormalization",
    "BatchNormalization",
    "MeanVarianceNormalization",
    "LpNormalization",
)
def _other_norms(env: ShapeEnv, node: ir.Node) -> Facts:
    rank = len(env.need(node.inputs[0]))
    axes = {
        "GroupNormalization": tuple(range(1, rank)),
        "InstanceNormalization": tuple(range(2, rank)),
        "BatchNormalization": (),  # its statistics are constants
        "MeanVarianceNormalization": tuple(a % rank for a in node.attributes.get_ints("axes", [0, 2, 3])),
        "LpNormalization": (node.attributes.get_int("axis", -1) % rank,),
    }[node.op_type]
    fn = {"GroupNormalization": "group_norm", "InstanceNormalization": "instance_norm"}.get(
        node.op_type,
        {"BatchNormalization": "batch_norm", "LpNormalization": "normalize"}.get(node.op_type, "mvn"),
    )
    return Facts("norm", {"axes": axes, "fn": fn}, everything(node))


@row("Softmax", "LogSoftmax", "Hardmax")
def _softmax(env: ShapeEnv, node: ir.Node) -> Facts:
    rank = len(env.need(node.inputs[0]))
    if env.model.opset_imports.get("", 0) < 13 and axis_of(node, rank, 1) != rank - 1:
        return unknown(node, "softmax over several flattened axes (opset before 13)")
    default = -1 if env.model.opset_imports.get("", 0) >= 13 else 1
    fn = {"Softmax": "softmax", "LogSoftmax": "log_softmax", "Hardmax": "hardmax"}[node.op_type]
    return Facts("softmax", {"axis": axis_of(node, rank, default), "fn": fn}, [0])


REDUCTIONS = {
    "ReduceL1": "l1", "ReduceL2": "norm", "ReduceLogSum": "logsum", "ReduceLogSumExp": "logsumexp",
    "ReduceMax": "max", "ReduceMean": "mean", "ReduceMin": "min", "ReduceProd": "prod", "ReduceSum": "sum",
    "ReduceSumSquare": "sum_square",
}  # fmt: skip


@row(*REDUCTIONS)
def _reduce(env: ShapeEnv, node: ir.Node) -> Facts:
    rank = len(env.need(node.inputs[0]))
    axes = axes_operand(env, node, 1)
    if not axes:
        if node.attributes.get_int("noop_with_empty_axes", 0):
            return Facts("tie", {}, [0])
        axes = list(range(rank))
    attrs = {
        "axes": tuple(sorted(a % rank for a in axes)),
        "keepdim": bool(node.attributes.get_int("keepdims", 1)),
        "fn": REDUCTIONS[node.op_type],
    }
    return Facts("reduce", attrs, [0], [1] if len(node.inputs) > 1 else [])


@row("ArgMax", "ArgMin")
def _arg(env: ShapeEnv, node: ir.Node) -> Facts:
    axis = axis_of(node, len(env.need(node.inputs[0])))
    keep = bool(node.attributes.get_int("keepdims", 1))
    return Facts("reduce", {"axes": (axis,), "keepdim": keep, "fn": node.op_type.lower()}, [0])


@row("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(env: ShapeEnv, node: ir.Node) -> Facts:
    rank = len(env.need(node.inputs[0]))
    fn = "mean" if node.op_type == "GlobalAveragePool" else "max"
    return Facts("reduce", {"axes": tuple(range(2, rank)), "keepdim": True, "fn": fn}, [0])


# ---- moving elements ---------------------------------------------------------------------------------
@row("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(env: ShapeEnv, node: ir.Node) -> Facts:
    return Facts("reshape", {}, [0], everything(node)[1:])


@row("Transpose")
def _transpose(env: ShapeEnv, node: ir.Node) -> Facts:
    rank = len(env.need(node.inputs[0]))
    perm = node.attributes.get_ints("perm", None)
    return Facts("transpose", {"perm": tuple(range(rank)[::-1] if perm is None else perm)}, [0])


@row("Expand")
def _expand(env: ShapeEnv, node: ir.Node) -> Facts:
    return Facts("expand", {}, [0], [1])


@row("Tile")
def _tile(env: ShapeEnv, node: ir.Node) -> Facts:
    x, out = env.need(node.inputs[0]), env.need(node.outputs[0])
    axes = tuple(i for i, (a, b) in enumerate(zip(x, out)) if a != b)
    if all(x[i] == 1 for i in axes):
        return Facts("expand", {}, [0], [1])
    return Facts("spatial", {"axes": axes, "fn": "tile"}, [0], [1])


@row("Concat")
def _concat(env: ShapeEnv, node: ir.Node) -> Facts:
    return Facts("concat", {"axis": axis_of(node, len(env.need(node.inputs[0])))}, everything(node))


@row("Split")
def _split(env: ShapeEnv, node: ir.Node) -> Facts:
    axis = axis_of(node, len(env.need(node.inputs[0])))
    sizes = tuple(env.need(out)[axis] for out in node.outputs)
    return Facts("split", {"axis": axis, "sizes": sizes}, [0], everything(node)[1:])


@row("Slice")
def _slice(env: ShapeEnv, node: ir.Node) -> Facts:
    x = env.need(node.inputs[0])
    starts, ends = env.ints(node.inputs[1]), env.ints(node.inputs[2])
    axes = env.known_ints(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    steps = env.known_ints(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else None
    if axes is None:
        axes = list(range(len(starts or [])))
    if not axes and len(node.inputs) > 3:
        return unknown(node, "Slice along axes known only at run time")
    if len(axes) != 1:
        moved = tuple(a % len(x) for a in axes)
        return Facts("spatial", {"axes": moved, "fn": "slice"}, [0], everything(node)[1:])
    axis = axes[0] % len(x)
    start, end, step = (starts or [None])[0], (ends or [None])[0], (steps or [1])[0]
    if step < 0:
        return Facts("spatial", {"axes": (axis,), "fn": "flip"}, [0], everything(node)[1:])
    length = x[axis]
    if isinstance(length, int):
        if isinstance(start, int):
            start = min(start + length if start < 0 else start, length)
        if isinstance(end, int):
            end = min(end + length if end < 0 else end, length)
    if end == length or (isinstance(end, int) and end >= INT_MAX - 1):
        end = None
    elif end is None:  # known only at run time; the output's own length still says it
        end = env.need(node.outputs[0])[axis] + (start or 0)
    if start is None:
        return Facts("spatial", {"axes": (axis,), "fn": "slice"}, [0], everything(node)[1:])
    return Facts("slice", {"axis": axis, "start": start, "end": end, "step": step}, [0], everything(node)[1:])


@row("Gather")
def _gather(env: ShapeEnv, node: ir.Node) -> Facts:
    x, index = env.need(node.inputs[0]), env.need(node.inputs[1])
    axis = axis_of(node, len(x))
    known = env.known_ints(node.inputs[1]) if index == () else None
    if known is not None:
        position = known[0]
        if position < 0 and isinstance(x[axis], int):
            position += int(x[axis])
        return Facts("select", {"axis": axis, "index": position}, [0], [1])
    if axis == 0 and len(x) == 2 and constant_tensor(node.inputs[0]) is not None and len(index) > 0:
        return Facts("embedding", {}, [0, 1])
    return Facts("gather", {"axis": axis}, [0, 1])


@row("GatherElements")
def _gather_elements(env: ShapeEnv, node: ir.Node) -> Facts:
    axis = axis_of(node, len(env.need(node.inputs[0])))
    return Facts("spatial", {"axes": (axis,), "fn": "gather_elements"}, [0, 1])


@row("ScatterElements", "Scatter")
def _scatter_elements(env: ShapeEnv, node: ir.Node) -> Facts:
    axis = axis_of(node, len(env.need(node.inputs[0])))
    return Facts("scatter", {"axes": (axis,)}, everything(node))


@row("ScatterND")
def _scatter_nd(env: ShapeEnv, node: ir.Node) -> Facts:
    depth = env.need(node.inputs[1])[-1]
    if not isinstance(depth, int):
        return unknown(node, "ScatterND with indices of unknown depth")
    return Facts("scatter", {"axes": tuple(range(depth))}, everything(node))


# ---- images and sequences ----------------------------------------------------------------------------
@row("Conv", "ConvTranspose")
def _conv(env: ShapeEnv, node: ir.Node) -> Facts:
    rank = len(env.need(node.inputs[0]))
    attrs: dict[str, Any] = {"spatial": tuple(range(2, rank)), "groups": node.attributes.get_int("group", 1)}
    attrs["fn"] = "conv" if node.op_type == "Conv" else "conv_transpose"
    for name in ("strides", "pads", "dilations", "kernel_shape"):
        if name in node.attributes:
            attrs[name] = tuple(node.attributes[name].as_ints())
    return Facts("conv", attrs, everything(node))


@row("AveragePool", "MaxPool", "LpPool", "LRN")
def _pool(env: ShapeEnv, node: ir.Node) -> Facts:
    rank = len(env.need(node.inputs[0]))
    axes = (1,) if node.op_type == "LRN" else tuple(range(2, rank))
    return Facts("spatial", {"axes": axes, "fn": node.op_type.lower()}, [0])


@row("Resize", "Upsample", "Pad")
def _resize(env: ShapeEnv, node: ir.Node) -> Facts:
    x, out = env.need(node.inputs[0]), env.need(node.outputs[0])
    axes = tuple(i for i, (a, b) in enumerate(zip(x, out)) if a != b) or tuple(range(min(2, len(x)), len(x)))
    return Facts("spatial", {"axes": axes, "fn": node.op_type.lower()}, [0], everything(node)[1:])


@row("DepthToSpace", "SpaceToDepth")
def _pixel_shuffle(env: ShapeEnv, node: ir.Node) -> Facts:
    return Facts("spatial", {"axes": (1, 2, 3), "fn": "pixel_shuffle"}, [0])


@row("CumSum")
def _cumsum(env: ShapeEnv, node: ir.Node) -> Facts:
    axis = env.known_ints(node.inputs[1])
    rank = len(env.need(node.inputs[0]))
    if axis is None:
        return unknown(node, "CumSum along an axis known only at run time")
    return Facts("spatial", {"axes": (axis[0] % rank,), "fn": "cumsum"}, [0], [1])


@row("TopK")
def _topk(env: ShapeEnv, node: ir.Node) -> Facts:
    axis = axis_of(node, len(env.need(node.inputs[0])), -1)
    return Facts("spatial", {"axes": (axis,), "fn": "topk"}, [0], [1])


@row("Trilu")
def _trilu(env: ShapeEnv, node: ir.Node) -> Facts:
    rank = len(env.need(node.inputs[0]))
    return Facts("spatial", {"axes": (rank - 2, rank - 1), "fn": "trilu"}, [0], everything(node)[1:])


# ---- shapes and new values ---------------------------------------------------------------------------
@row("Shape")
def _shape(env: ShapeEnv, node: ir.Node) -> Facts:
    rank = len(env.need(node.inputs[0]))
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", rank)
    axes = tuple(range(rank)[slice(start, end)])
    return Facts("size", {"axis": axes[0] if len(axes) == 1 else None, "axes": axes}, [0])


@row("Size")
def _size(env: ShapeEnv, node: ir.Node) -> Facts:
    return Facts("size", {"axis": None, "axes": tuple(range(len(env.need(node.inputs[0]))))}, [0])


@row(
    "Range",
    "ConstantOfShape",
    "EyeLike",
    "RandomNormal",
    "RandomUniform",
    "RandomNormalLike",
    "RandomUniformLike",
)
def _create(env: ShapeEnv, node: ir.Node) -> Facts:
    fn = {"Range": "arange", "ConstantOfShape": "full", "EyeLike": "eye"}.get(node.op_type, "random")
    return Facts("create", {"fn": fn}, [], everything(node))
