"""Output shapes of ONNX operators over symbolic lengths, one row per operator or family.

Only the main domain, and the com.microsoft operators that survive normalising. An operator without a row is
asked of onnx's own single-node inference; what that does not know keeps the shape its file declares.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import sympy

from . import (
    onnx_dialect,
    onnx_window_rules,  # noqa: F401  (adds its rows to the table)
)
from .graph import Dim, Shape, product
from .onnx_names import UNARY_AND_BROADCAST
from .onnx_rule_table import RULES, Shapes, axes_operand, axis_of, rule
from .onnx_shapes import (
    ShapeEnv,
    broadcast,
    broadcast_dim,
    dim,
    floor_div,
    infer_with_onnx,
    quotient,
    tensor_shape,
)


def shapes_of(env: ShapeEnv, node: ir.Node) -> Shapes | None:
    """One shape per output; None when no rule knows the operator."""
    known = RULES.get((node.domain, node.op_type))
    if known is not None:
        return known(env, node)
    if node.domain == "elision":
        return onnx_dialect.shapes_of(env, node)
    return infer_with_onnx(env, node)


# ---- the table ---------------------------------------------------------------------------------------
ELEMENTWISE = [*UNARY_AND_BROADCAST, "Identity", "Hardmax"]


@rule(*ELEMENTWISE)
def _elementwise(env: ShapeEnv, node: ir.Node) -> Shapes:
    # Clip's bounds and CastLike's second operand are scalars or say a type only.
    values = node.inputs[:1] if node.op_type == "Clip" else [v for v in node.inputs if v is not None]
    return [broadcast(*[env.shape(v) for v in values])]


FIRST = [
    "CastLike",
    "CumSum",
    "Dropout",
    "EyeLike",
    "GroupNormalization",
    "InstanceNormalization",
    "LRN",
    "LogSoftmax",
    "LpNormalization",
    "MeanVarianceNormalization",
    "QuantizeLinear",
    "DequantizeLinear",
    "RandomNormalLike",
    "RandomUniformLike",
    "Bernoulli",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    "ReverseSequence",
    "RotaryEmbedding",
    "ScatterElements",
    "Scatter",
    "ScatterND",
    "Softmax",
    "TensorScatter",
    "Trilu",
    "BatchNormalization",
]


@rule(*FIRST)
def _first(env: ShapeEnv, node: ir.Node) -> Shapes:
    shape = env.need(node.inputs[0])
    if node.op_type == "BatchNormalization":
        return [shape] + [(shape[1],)] * (len(node.outputs) - 1)
    return [shape] * len(node.outputs)


@rule("RotaryEmbedding", "QuickGelu", "Gelu", "BiasGelu", "FastGelu", domain="com.microsoft")
def _first_contrib(env: ShapeEnv, node: ir.Node) -> Shapes:
    return [env.need(node.inputs[0])]


@rule("LayerNormalization")
def _layer_norm(env: ShapeEnv, node: ir.Node) -> Shapes:
    shape = env.need(node.inputs[0])
    axis = axis_of(node, len(shape), -1)
    rest: Shape = tuple(d if i < axis else 1 for i, d in enumerate(shape))
    return [shape, rest, rest][: len(node.outputs)]


@rule("Constant")
def _constant(env: ShapeEnv, node: ir.Node) -> Shapes:
    tensor = ir.convenience.get_const_tensor(node.outputs[0])
    return [None if tensor is None else tensor_shape(tensor)]


@rule("Shape")
def _shape(env: ShapeEnv, node: ir.Node) -> Shapes:
    rank = len(env.need(node.inputs[0]))
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", rank)
    return [(len(range(rank)[slice(start, end)]),)]


@rule("Size")
def _size(env: ShapeEnv, node: ir.Node) -> Shapes:
    return [()]


@rule("MatMul", "MatMulInteger")
def _matmul(env: ShapeEnv, node: ir.Node) -> Shapes:
    a, b = env.need(node.inputs[0]), env.need(node.inputs[1])
    if not a or not b:
        raise ValueError("a scalar operand")
    left = a if len(a) > 1 else (1, *a)
    right = b if len(b) > 1 else (*b, 1)
    batch = broadcast(left[:-2], right[:-2])
    out = [*(batch or ())]
    if len(a) > 1:
        out.append(left[-2])
    if len(b) > 1:
        out.append(right[-1])
    return [tuple(out)]


@rule("Gemm")
def _gemm(env: ShapeEnv, node: ir.Node) -> Shapes:
    a, b = env.need(node.inputs[0]), env.need(node.inputs[1])
    rows = a[1] if node.attributes.get_int("transA", 0) else a[0]
    columns = b[0] if node.attributes.get_int("transB", 0) else b[1]
    return [(rows, columns)]


@rule("Einsum")
def _einsum(env: ShapeEnv, node: ir.Node) -> Shapes:
    equation = node.attributes["equation"].as_string().replace(" ", "")
    left, _, right = equation.partition("->")
    terms = left.split(",")
    if "." in equation or len(terms) != len(node.inputs):
        return infer_with_onnx(env, node) or [None]
    lengths: dict[str, Dim] = {}
    for term, value in zip(terms, node.inputs):
        for letter, length in zip(term, env.need(value)):
            lengths[letter] = broadcast_dim(lengths.get(letter, 1), length)
    if "->" not in equation:
        right = "".join(sorted(c for c in lengths if left.count(c) == 1))
    return [tuple(lengths[c] for c in right)]


@rule("Attention")
def _attention(env: ShapeEnv, node: ir.Node) -> Shapes:
    q, k, v = (env.need(x) for x in node.inputs[:3])
    if len(q) == 4:
        return [(*q[:3], v[3]), *present(env, node, k, v)]
    heads = node.attributes.get_int("q_num_heads", 1)
    shared = node.attributes.get_int("kv_num_heads", heads)
    width = quotient(v[2], shared) * heads
    return [(q[0], q[1], dim(width))] + [None] * (len(node.outputs) - 1)


def present(env: ShapeEnv, node: ir.Node, k: Shape, v: Shape) -> Shapes:
    """The keys and values after the past ones, and the scores."""
    past = env.shape(node.inputs[4]) if len(node.inputs) > 4 else None
    total = k[2] if past is None else dim(k[2] + past[2])
    q = env.need(node.inputs[0])
    full: Shapes = [(*k[:2], total, k[3]), (*v[:2], total, v[3]), (*q[:3], total)]
    return full[: len(node.outputs) - 1]


@rule("MultiHeadAttention", domain="com.microsoft")
def _mha(env: ShapeEnv, node: ir.Node) -> Shapes:
    q = env.need(node.inputs[0])
    v = env.shape(node.inputs[2]) if len(node.inputs) > 2 else None
    if len(q) != 3 or v is None:
        return [None] * len(node.outputs)
    width = v[2] if len(v) == 3 else dim(v[1] * v[3])
    return [(q[0], q[1], width)] + [None] * (len(node.outputs) - 1)


@rule("MatMulNBits", domain="com.microsoft")
def _matmul_nbits(env: ShapeEnv, node: ir.Node) -> Shapes:
    return [(*env.need(node.inputs[0])[:-1], node.attributes["N"].as_int())]


@rule("Reshape")
def _reshape(env: ShapeEnv, node: ir.Node) -> Shapes:
    x = env.need(node.inputs[0])
    target = env.ints(node.inputs[1])
    out = node.outputs[0]
    if target is None:
        rank = env.need(node.inputs[1])[0]
        if not isinstance(rank, int):
            return [None]
        if rank == 1:
            return [(dim(product(x)),)]
        declared = env.declared(out)
        if declared is not None and len(declared) == rank:
            return [declared]
        return [tuple(env.fresh(out, i) for i in range(rank))]
    allow_zero = node.attributes.get_int("allowzero", 0)
    dims: list[Any] = [
        x[i] if d == 0 and not allow_zero else env.fresh(out, i) if d is None else d
        for i, d in enumerate(target)
    ]
    if -1 in dims:
        index = dims.index(-1)
        rest = product(d for i, d in enumerate(dims) if i != index)
        # Lengths that x and the target share cancel before dividing: (b*n*c) / (b*c) needs no algebra.
        dims[index] = quotient(product(x), rest)
    elif None in target and target.count(None) == 1:
        index = target.index(None)
        rest = product(d for i, d in enumerate(dims) if i != index)
        dims[index] = quotient(product(x), rest)
    return [tuple(dims)]


@rule("Flatten")
def _flatten(env: ShapeEnv, node: ir.Node) -> Shapes:
    x = env.need(node.inputs[0])
    axis = node.attributes.get_int("axis", 1)
    axis = axis + len(x) if axis < 0 else axis
    return [(dim(product(x[:axis])), dim(product(x[axis:])))]


@rule("Squeeze")
def _squeeze(env: ShapeEnv, node: ir.Node) -> Shapes:
    x = env.need(node.inputs[0])
    axes = axes_operand(env, node, 1)
    gone = {i for i, d in enumerate(x) if d == 1} if axes is None else {a % len(x) for a in axes}
    return [tuple(d for i, d in enumerate(x) if i not in gone)]


@rule("Unsqueeze")
def _unsqueeze(env: ShapeEnv, node: ir.Node) -> Shapes:
    x = env.need(node.inputs[0])
    axes = axes_operand(env, node, 1)
    if axes is None:
        raise ValueError("Unsqueeze without axes")
    rank = len(x) + len(axes)
    new = {a % rank for a in axes}
    rest = iter(x)
    return [tuple(1 if i in new else next(rest) for i in range(rank))]


@rule("Transpose")
def _transpose(env: ShapeEnv, node: ir.Node) -> Shapes:
    x = env.need(node.inputs[0])
    perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(x))[::-1]
    return [tuple(x[p] for p in perm)]


@rule("Expand")
def _expand(env: ShapeEnv, node: ir.Node) -> Shapes:
    x = env.need(node.inputs[0])
    target = env.ints(node.inputs[1])
    out = node.outputs[0]
    if target is None:
        rank = env.need(node.inputs[1])[0]
        if not isinstance(rank, int):
            return [None]
        target = [None] * rank
    rank = max(len(x), len(target))
    dims = []
    for i in range(rank):
        a: Dim = x[i - rank + len(x)] if i - rank + len(x) >= 0 else 1
        position = i - rank + len(target)
        b = target[position] if position >= 0 else 1
        if b is None:
            b = env.fresh(out, i) if a == 1 else a
        dims.append(broadcast_dim(a, b))
    return [tuple(dims)]


@rule("Tile")
def _tile(env: ShapeEnv, node: ir.Node) -> Shapes:
    x = env.need(node.inputs[0])
    times = env.ints(node.inputs[1]) or [None] * len(x)
    return [
        tuple(env.fresh(node.outputs[0], i) if t is None else d * t for i, (d, t) in enumerate(zip(x, times)))
    ]


@rule("Concat")
def _concat(env: ShapeEnv, node: ir.Node) -> Shapes:
    parts = [env.need(v) for v in node.inputs]
    axis = axis_of(node, len(parts[0]))
    out = list(parts[0])
    for i in range(len(out)):
        if i == axis:
            total: Dim = 0
            for part in parts:
                total = total + part[i]
            out[i] = total
        else:
            for part in parts[1:]:
                out[i] = broadcast_dim(out[i], part[i])
    return [tuple(out)]


@rule("Split")
def _split(env: ShapeEnv, node: ir.Node) -> Shapes:
    x = env.need(node.inputs[0])
    axis = axis_of(node, len(x))
    count = len(node.outputs)
    sizes: list[Any] | None = None
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        sizes = env.ints(node.inputs[1])
        if sizes is None:
            sizes = [None] * count
    elif "split" in node.attributes:
        sizes = list(node.attributes["split"].as_ints())
    if sizes is None:
        length = x[axis]
        if isinstance(length, int):
            chunk = -(-length // count)
            sizes = [min(chunk, length - chunk * i) for i in range(count)]
        else:
            sizes = [quotient(length, count)] * count
    return [
        (*x[:axis], env.fresh(out, axis) if s is None else s, *x[axis + 1 :])
        for out, s in zip(node.outputs, sizes)
    ]


def slice_length(length: Dim, start: Any, end: Any, step: int) -> Dim | None:
    """How many positions a slice keeps; None when that is not known before the run."""
    far = 2**31 - 2
    if isinstance(length, int):
        if isinstance(start, int) and isinstance(end, int):
            return len(range(length)[slice(start, end if end > -far else None, step)])
        if step != 1 or start is None or end is None:
            return None
    if step == -1 and isinstance(start, int) and isinstance(end, int) and start in (-1, far) and end < -far:
        return length
    if start is None or end is None or step < 1:
        return None
    # Bounds that are counted from the end, and bounds past it.
    first = start if not isinstance(start, int) or start >= 0 else length + start
    if isinstance(end, int) and end >= far:
        last: Any = length
    elif isinstance(end, int) and end < 0:
        last = length + end
    else:
        last = sympy.Min(length, end)
        if isinstance(end, int) and end == 0:
            last = 0
    if isinstance(start, int) and start >= 0 and isinstance(end, int) and 0 <= end < far:
        # x[2:10] of an axis of unknown length: full where the axis is long enough, which models rely on.
        last = sympy.Min(length, end)
        first = sympy.Min(length, start) if start else 0
    span = dim(sympy.sympify(last) - first)
    if not isinstance(span, int) and span.is_negative:
        return 0
    return dim(span if step == 1 else floor_div(span + step - 1, step))


@rule("Slice")
def _slice(env: ShapeEnv, node: ir.Node) -> Shapes:
    x = env.need(node.inputs[0])
    out = list(x)
    starts, ends = env.ints(node.inputs[1]), env.ints(node.inputs[2])
    third = node.inputs[3] if len(node.inputs) > 3 else None
    fourth = node.inputs[4] if len(node.inputs) > 4 else None
    count = env.need(node.inputs[1])[0]
    if not isinstance(count, int):
        return [None]
    axes = env.known_ints(third) if third is not None else list(range(count))
    steps = env.known_ints(fourth) if fourth is not None else [1] * count
    if axes is None:
        return [tuple(env.fresh(node.outputs[0], i) for i in range(len(x)))]
    for i, axis in enumerate(axes):
        axis = axis % len(x)
        start = None if starts is None else starts[i]
        end = None if ends is None else ends[i]
        length = None if steps is None else slice_length(x[axis], start, end, steps[i])
        out[axis] = env.fresh(node.outputs[0], axis) if length is None else length
    return [tuple(out)]


@rule("Gather")
def _gather(env: ShapeEnv, node: ir.Node) -> Shapes:
    x, index = env.need(node.inputs[0]), env.need(node.inputs[1])
    axis = axis_of(node, len(x))
    return [(*x[:axis], *index, *x[axis + 1 :])]


@rule("GatherElements")
def _gather_elements(env: ShapeEnv, node: ir.Node) -> Shapes:
    return [env.need(node.inputs[1])]


@rule("GatherND")
def _gather_nd(env: ShapeEnv, node: ir.Node) -> Shapes:
    x, index = env.need(node.inputs[0]), env.need(node.inputs[1])
    batch = node.attributes.get_int("batch_dims", 0)
    depth = index[-1]
    if not isinstance(depth, int):
        return [None]
    return [(*index[:-1], *x[batch + depth :])]


REDUCE = [
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
]


@rule(*REDUCE)
def _reduce(env: ShapeEnv, node: ir.Node) -> Shapes:
    x = env.need(node.inputs[0])
    axes = axes_operand(env, node, 1)
    keep = node.attributes.get_int("keepdims", 1)
    if not axes:
        if axes is not None or len(node.inputs) > 1:
            axes = None
        if node.attributes.get_int("noop_with_empty_axes", 0):
            return [x]
        gone = set(range(len(x)))
    else:
        gone = {a % len(x) for a in axes}
    return [tuple(1 if i in gone else d for i, d in enumerate(x) if keep or i not in gone)]


@rule("ArgMax", "ArgMin")
def _arg(env: ShapeEnv, node: ir.Node) -> Shapes:
    x = env.need(node.inputs[0])
    axis = axis_of(node, len(x))
    keep = node.attributes.get_int("keepdims", 1)
    return [tuple(1 if i == axis else d for i, d in enumerate(x) if keep or i != axis)]


@rule("TopK")
def _topk(env: ShapeEnv, node: ir.Node) -> Shapes:
    x = env.need(node.inputs[0])
    axis = axis_of(node, len(x), -1)
    k = env.ints(node.inputs[1])
    length = env.fresh(node.outputs[0], axis) if not k or k[0] is None else k[0]
    return [(*x[:axis], length, *x[axis + 1 :])] * len(node.outputs)


@rule("OneHot")
def _one_hot(env: ShapeEnv, node: ir.Node) -> Shapes:
    ids = env.need(node.inputs[0])
    depth = env.ints(node.inputs[1])
    axis = node.attributes.get_int("axis", -1) % (len(ids) + 1)
    length = env.fresh(node.outputs[0], axis) if not depth or depth[0] is None else depth[0]
    return [(*ids[:axis], length, *ids[axis:])]


@rule("ConstantOfShape")
def _constant_of_shape(env: ShapeEnv, node: ir.Node) -> Shapes:
    target = env.ints(node.inputs[0])
    out = node.outputs[0]
    if target is None:
        rank = env.need(node.inputs[0])[0]
        return [tuple(env.fresh(out, i) for i in range(rank)) if isinstance(rank, int) else None]
    return [tuple(env.fresh(out, i) if d is None else d for i, d in enumerate(target))]


@rule("Range")
def _range(env: ShapeEnv, node: ir.Node) -> Shapes:
    bounds = [env.ints(v) for v in node.inputs]
    if any(not b or b[0] is None for b in bounds):
        return [(env.fresh(node.outputs[0], 0),)]
    start, limit, delta = (b[0] for b in bounds if b)
    if all(isinstance(x, int) for x in (start, limit, delta)):
        return [(len(range(start, limit, delta)),)]
    return [(dim(sympy.ceiling((sympy.sympify(limit) - start) / delta)),)]


@rule("NonZero")
def _nonzero(env: ShapeEnv, node: ir.Node) -> Shapes:
    return [(len(env.need(node.inputs[0])), env.fresh(node.outputs[0], 1))]
