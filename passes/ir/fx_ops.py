"""From ATen operators to canonical kinds: one row for each family of operators.

A row reads a call (`Call`: an fx node whose arguments can be asked for by their schema names) and answers with
a `Spec`: the kind, which arguments are data operands, and the canonical attributes. `describe` looks the row
up. Operators without a row fall back to their schema: pointwise operators are `elementwise`, those of our own
dialect `elision`, everything else `unknown`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import fx

from .graph import Dim, Shape

Path = tuple[str | int, int | None]
"""Where an operand stands in a call: the argument's schema name (its position for plain Python functions),
and the index inside it when the argument is a list of tensors."""

# Checks and switches that have no place in a data-flow view. They stay in the host's graph.
CHECKS = frozenset(
    {
        "aten::_assert_scalar",
        "aten::_assert_async",
        "aten::sym_constrain_range",
        "aten::sym_constrain_range_for_size",
        "aten::_assert_tensor_metadata",
        "torch._check",
        "torch._check_is_size",
    }
)
SWITCHES = frozenset(
    {
        "torch.amp.autocast_mode._enter_autocast",
        "torch.amp.autocast_mode._exit_autocast",
        "torch._C._set_grad_enabled",
    }
)
# Composite operators that are clearer taken apart: torch's own decomposition is what runs anyway, so the
# numbers stay the same to the bit.
TAKEN_APART = frozenset({"aten::einsum", "aten::tensordot", "aten::cosine_similarity", "aten::inner"})

_CONSTANT_CHAIN = frozenset(
    {"aten::t", "aten::transpose", "aten::permute", "aten::to", "aten::_to_copy", "aten::detach", "aten::alias"}
)


@dataclass
class Spec:
    """What a row says about a call."""

    kind: str
    operands: list[Path]
    attrs: dict[str, Any] = field(default_factory=dict)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def as_dim(size: Any) -> Dim:
    """An axis length as an int or a sympy expression."""
    if isinstance(size, torch.SymInt):
        expr = size.node.expr
        return int(expr) if expr.is_Integer else expr
    return int(size)


def as_shape(value: torch.Tensor) -> Shape:
    return tuple(as_dim(s) for s in value.shape)


def as_plain(arg: Any) -> Any:
    """A non-tensor argument for `attrs`: symbolic numbers become sympy expressions, dtypes numpy's names."""
    if isinstance(arg, fx.Node):
        value = arg.meta.get("val")
        if isinstance(value, torch.SymInt | torch.SymFloat):
            return value.node.expr
        return value if isinstance(value, int | float | bool) else None
    if isinstance(arg, torch.dtype):
        return dtype_name(arg)
    if isinstance(arg, list | tuple):
        return tuple(as_plain(a) for a in arg)
    if isinstance(arg, torch.device | torch.layout | torch.memory_format):
        return str(arg)
    return arg


def target_name(target: Any) -> str:
    """`aten::linear` for an ATen overload, `torch.sym_max` or `operator.mul` for a Python function."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order::{target.name()}"
    module = {"_operator": "operator", "builtins": "builtins"}.get(
        getattr(target, "__module__", "") or "", getattr(target, "__module__", "") or ""
    )
    return f"{module}.{getattr(target, '__name__', str(target))}"


def target_text(target: Any) -> str:
    """The short name for texts and messages: `aten.linear`, `elision.merge_tokens`, `operator.mul`."""
    return target_name(target).replace("::", ".")


@dataclass(frozen=True)
class Argument:
    name: str
    position: int
    default: Any
    kwarg_only: bool
    tensor: str  # "": not a tensor; "one": Tensor or Tensor?; "list": Tensor[] or Tensor?[]


@lru_cache(maxsize=None)
def signature(target: Any) -> tuple[Argument, ...]:
    """The schema's arguments; empty for plain Python functions."""
    if not isinstance(target, torch._ops.OpOverload):
        return ()
    found = []
    for position, arg in enumerate(target._schema.arguments):
        kind = str(arg.type)
        tensor = "list" if kind in ("List[Tensor]", "List[Optional[Tensor]]", "Optional[List[Tensor]]") else ""
        if kind in ("Tensor", "Optional[Tensor]"):
            tensor = "one"
        default = arg.default_value if arg.has_default_value() else None
        found.append(Argument(arg.name, position, default, arg.kwarg_only, tensor))
    return tuple(found)


class Call:
    """An fx node, its arguments by schema name."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        self.signature = signature(node.target)
        self.named: dict[str | int, Any] = {}
        self.given: set[str | int] = set()
        if not self.signature:
            self.named = {**dict(enumerate(node.args)), **node.kwargs}
            self.given = set(self.named)
        for arg in self.signature:
            if arg.position < len(node.args):
                self.named[arg.name] = node.args[arg.position]
            elif arg.name in node.kwargs:
                self.named[arg.name] = node.kwargs[arg.name]
            else:
                self.named[arg.name] = arg.default
                continue
            self.given.add(arg.name)

    def __getitem__(self, name: str | int) -> Any:
        return self.named.get(name)

    def has(self, name: str) -> bool:
        return name in self.named

    def plain(self, name: str | int) -> Any:
        return as_plain(self.named.get(name))

    def shape(self, name: str | int) -> Shape:
        node = self.named[name]
        return as_shape(node.meta["val"])

    def rank(self, name: str | int) -> int:
        return len(self.named[name].meta["val"].shape)

    def axis(self, dim: Any, rank: int) -> int:
        axis = int(as_plain(dim))
        return axis + rank if axis < 0 else axis

    def axes(self, dims: Any, rank: int) -> tuple[int, ...]:
        """Non-negative axes; all of them for None and for an empty list."""
        if dims is None or (isinstance(dims, list | tuple) and not dims):
            return tuple(range(rank))
        if not isinstance(dims, list | tuple):
            dims = [dims]
        return tuple(sorted(self.axis(d, rank) for d in dims))

    @property
    def out_shape(self) -> Shape:
        value = self.node.meta["val"]
        return as_shape(value[0] if isinstance(value, list | tuple) else value)

    @property
    def out_shapes(self) -> list[Shape]:
        return [as_shape(v) for v in self.node.meta["val"]]

    def tensors(self) -> list[Path]:
        """Every tensor argument of the schema, the absent optional ones too."""
        found: list[Path] = []
        for arg in self.signature:
            value = self.named[arg.name]
            if arg.tensor == "list" and value is not None:
                found += [(arg.name, i) for i in range(len(value))]
            elif arg.tensor:
                found.append((arg.name, None))
        return found

    def numbers(self, skip: Sequence[str] = ()) -> dict[str, Any]:
        """The non-tensor arguments that were given, by schema name."""
        found = {}
        for arg in self.signature:
            value = self.named[arg.name]
            if arg.name in skip or arg.name not in self.given or value is None or arg.tensor == "list":
                continue
            if arg.tensor and isinstance(value, fx.Node):
                continue
            found[arg.name] = as_plain(value)
        return found

    def constant(self, name: str) -> bool:
        """Whether the argument is a parameter or constant, perhaps transposed or cast."""
        node = self.named[name]
        while isinstance(node, fx.Node) and node.op == "call_function":
            if target_name(node.target) not in _CONSTANT_CHAIN:
                return False
            node = node.args[0]
        return isinstance(node, fx.Node) and (
            node.op == "get_attr" or node.meta.get("elision_origin") in ("parameter", "constant")
        )


Row = Callable[[Call], Spec | None]
ROWS: dict[str, Row] = {}


def row(*names: str) -> Callable[[Row], Row]:
    def register(function: Row) -> Row:
        for name in names:
            ROWS[name if "::" in name or "." in name else f"aten::{name}"] = function
        return function

    return register


def _one(*names: str | int) -> list[Path]:
    return [(name, None) for name in names]


# ---- linear algebra ----------------------------------------------------------------------------------
@row("linear")
def _linear(c: Call) -> Spec:
    return Spec("linear", _one("input", "weight", "bias"), {"transposed": True})


@row("matmul", "mm", "bmm", "__rmatmul__")
def _matmul(c: Call) -> Spec | None:
    right = "other" if c.has("other") else "mat2"
    if c.rank("self") < 2 or c.rank(right) < 2:
        return None
    if c.rank(right) == 2 and c.constant(right):
        return Spec("linear", [*_one("self", right)], {"transposed": False})
    return Spec("matmul", _one("self", right))


@row("addmm")
def _addmm(c: Call) -> Spec:
    plain = c.plain("beta") == 1 and c.plain("alpha") == 1
    if plain and c.rank("self") == 1 and c.constant("mat2"):
        return Spec("linear", _one("mat1", "mat2", "self"), {"transposed": False})
    return Spec(
        "matmul", _one("mat1", "mat2", "self"), {"alpha": c.plain("alpha"), "beta": c.plain("beta")}
    )


@row("baddbmm")
def _baddbmm(c: Call) -> Spec:
    attrs = {"alpha": c.plain("alpha"), "beta": c.plain("beta")}
    # beta 0 means that the first argument only lends its shape.
    added = [] if attrs["beta"] == 0 else _one("self")
    return Spec("matmul", [*_one("batch1", "batch2"), *added], attrs)


# ---- normalisation, softmax, attention -----------------------------------------------------------------
@row("layer_norm", "native_layer_norm")
def _layer_norm(c: Call) -> Spec:
    rank = c.rank("input")
    axes = tuple(range(rank - len(c["normalized_shape"]), rank))
    return Spec(
        "norm", _one("input", "weight", "bias"), {"axes": axes, "fn": "layer_norm", "eps": c.plain("eps")}
    )


@row("rms_norm", "_fused_rms_norm")
def _rms_norm(c: Call) -> Spec:
    rank = c.rank("input")
    axes = tuple(range(rank - len(c["normalized_shape"]), rank))
    return Spec("norm", _one("input", "weight"), {"axes": axes, "fn": "rms_norm", "eps": c.plain("eps")})


@row("group_norm")
def _group_norm(c: Call) -> Spec:
    axes = tuple(range(1, c.rank("input")))
    attrs = {"axes": axes, "fn": "group_norm", "groups": c.plain("num_groups"), "eps": c.plain("eps")}
    return Spec("norm", _one("input", "weight", "bias"), attrs)


@row("native_group_norm")
def _native_group_norm(c: Call) -> Spec:
    axes = tuple(range(1, c.rank("input")))
    attrs = {"axes": axes, "fn": "group_norm", "groups": c.plain("group"), "eps": c.plain("eps")}
    return Spec("norm", _one("input", "weight", "bias"), attrs)


@row("batch_norm", "native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit")
def _batch_norm(c: Call) -> Spec:
    # With running statistics nothing is averaged: a scale and a shift for each channel.
    axes = tuple(a for a in range(c.rank("input")) if a != 1) if c.plain("training") else ()
    return Spec(
        "norm",
        _one("input", "weight", "bias", "running_mean", "running_var"),
        {"axes": axes, "fn": "batch_norm", "eps": c.plain("eps")},
    )


@row("_native_batch_norm_legit_no_training")
def _batch_norm_eval(c: Call) -> Spec:
    return Spec(
        "norm",
        _one("input", "weight", "bias", "running_mean", "running_var"),
        {"axes": (), "fn": "batch_norm", "eps": c.plain("eps")},
    )


@row("instance_norm")
def _instance_norm(c: Call) -> Spec:
    axes = tuple(range(2, c.rank("input"))) if c.plain("use_input_stats") else ()
    return Spec(
        "norm",
        _one("input", "weight", "bias", "running_mean", "running_var"),
        {"axes": axes, "fn": "instance_norm", "eps": c.plain("eps")},
    )


@row("softmax", "_softmax", "special_softmax", "_safe_softmax")
def _softmax(c: Call) -> Spec:
    return Spec("softmax", _one("self"), {"axis": c.axis(c["dim"], c.rank("self")), "fn": "softmax"})


@row("log_softmax", "_log_softmax", "special_log_softmax")
def _log_softmax(c: Call) -> Spec:
    return Spec("softmax", _one("self"), {"axis": c.axis(c["dim"], c.rank("self")), "fn": "log_softmax"})


@row("scaled_dot_product_attention")
def _attention(c: Call) -> Spec:
    scale = c["scale"]
    width = c.shape("query")[-1]
    attrs: dict[str, Any] = {"scale": 0.0, "causal": bool(c.plain("is_causal"))}
    if isinstance(scale, fx.Node):
        attrs["scale"] = scale  # the view swaps the node for its value
    elif scale is not None:
        attrs["scale"] = float(scale)
    elif isinstance(width, int) and width > 0:
        attrs["scale"] = 1.0 / math.sqrt(width)
    if c.plain("dropout_p"):
        attrs["dropout"] = c.plain("dropout_p")
    return Spec("attention", _one("query", "key", "value", "attn_mask"), attrs)


# ---- reductions --------------------------------------------------------------------------------------
_REDUCTIONS = {
    "mean": "mean",
    "sum": "sum",
    "nansum": "sum",
    "amax": "max",
    "amin": "min",
    "max": "max",
    "min": "min",
    "prod": "prod",
    "any": "any",
    "all": "all",
    "argmax": "argmax",
    "argmin": "argmin",
    "norm": "norm",
    "linalg_vector_norm": "norm",
    "frobenius_norm": "norm",
    "var": "var",
    "std": "std",
    "var_mean": "var_mean",
    "std_mean": "std_mean",
    "logsumexp": "logsumexp",
    "count_nonzero": "count_nonzero",
    "median": "median",
}


@row(*_REDUCTIONS)
def _reduce(c: Call) -> Spec | None:
    if c.has("other"):  # max.other and min.other are pointwise
        return None
    rank = c.rank("self")
    axes = c.axes(c["dim"] if c.has("dim") else None, rank)
    fn = _REDUCTIONS[c.node.target._schema.name.split("::")[1]]  # type: ignore[union-attr]
    return Spec("reduce", _one("self"), {"axes": axes, "keepdim": bool(c.plain("keepdim")), "fn": fn})


# ---- same elements, other shape ----------------------------------------------------------------------
@row(
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as"),
    *("reshape_as", "ravel", "_reshape_alias", "view_copy", "squeeze_copy", "unsqueeze_copy", "atleast_1d"),
)
def _reshape(c: Call) -> Spec | None:
    if c.has("dtype"):  # view.dtype reads the bytes anew
        return None
    return Spec("reshape", _one("self"))


def _perm(c: Call, perm: Sequence[int]) -> Spec:
    return Spec("transpose", _one("self"), {"perm": tuple(perm)})


@row("permute", "permute_copy")
def _permute(c: Call) -> Spec:
    rank = c.rank("self")
    return _perm(c, [c.axis(d, rank) for d in c["dims"]])


@row("transpose", "swapaxes", "swapdims", "transpose_copy")
def _transpose(c: Call) -> Spec:
    rank = c.rank("self")
    perm = list(range(rank))
    if rank:
        first = "dim0" if c.has("dim0") else "axis0"
        a, b = c.axis(c[first], rank), c.axis(c["dim1" if c.has("dim1") else "axis1"], rank)
        perm[a], perm[b] = perm[b], perm[a]
    return _perm(c, perm)


@row("t", "numpy_T", "mT", "matrix_H", "adjoint", "t_copy")
def _t(c: Call) -> Spec:
    rank = c.rank("self")
    name = target_name(c.node.target)
    perm = list(range(rank))
    if name == "aten::numpy_T":
        perm.reverse()
    elif rank >= 2:
        perm[-1], perm[-2] = perm[-2], perm[-1]
    return _perm(c, perm)


@row("movedim", "moveaxis")
def _movedim(c: Call) -> Spec:
    rank = c.rank("self")
    source, target = c["source"], c["destination"]
    source = [source] if not isinstance(source, list | tuple) else source
    target = [target] if not isinstance(target, list | tuple) else target
    moved = {c.axis(t, rank): c.axis(s, rank) for s, t in zip(source, target)}
    rest = iter(a for a in range(rank) if a not in moved.values())
    return _perm(c, [moved[a] if a in moved else next(rest) for a in range(rank)])


@row("expand", "expand_as", "broadcast_to", "expand_copy")
def _expand(c: Call) -> Spec:
    return Spec("expand", _one("self"))


@row("repeat", "tile")
def _repeat(c: Call) -> Spec | None:
    before, after = c.shape("self"), c.out_shape
    lead = len(after) - len(before)
    repeated = [a for a in range(len(after)) if a < lead or after[a] != before[a - lead]]
    if all(a < lead or before[a - lead] == 1 for a in repeated):
        return Spec("expand", _one("self"))
    return Spec("spatial", _one("self"), {"axes": tuple(repeated), "fn": "repeat"}) if not lead else None


@row("repeat_interleave")
def _repeat_interleave(c: Call) -> Spec | None:
    if not c.has("dim") or c["dim"] is None or not c.has("self") or isinstance(c["repeats"], fx.Node):
        return None
    axis = c.axis(c["dim"], c.rank("self"))
    if c.shape("self")[axis] == 1:
        return Spec("expand", _one("self"))
    return Spec("spatial", _one("self"), {"axes": (axis,), "fn": "repeat_interleave"})


# ---- joining and parting -----------------------------------------------------------------------------
@row("cat", "concat", "concatenate")
def _cat(c: Call) -> Spec:
    dim = c["dim"] if c.has("dim") else c["axis"]
    return Spec("concat", c.tensors(), {"axis": c.axis(dim, len(c.out_shape))})


@row("stack")
def _stack(c: Call) -> Spec:
    return Spec("stack", c.tensors(), {"axis": c.axis(c["dim"], len(c.out_shape))})


@row("split", "chunk", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split", "split_copy")
def _split(c: Call) -> Spec:
    axis = c.axis(c["dim"], c.rank("self"))
    return Spec("split", _one("self"), {"axis": axis, "sizes": tuple(s[axis] for s in c.out_shapes)})


@row("unbind", "unbind_copy")
def _unbind(c: Call) -> Spec:
    return Spec("unbind", _one("self"), {"axis": c.axis(c["dim"], c.rank("self"))})


def _position(value: Any, length: Dim) -> Any:
    """A slice's bound or a selected index: non-negative where the length is static."""
    if isinstance(value, int) and value < 0 and isinstance(length, int):
        return max(value + length, 0)
    return value


@row("slice", "slice_copy")
def _slice(c: Call) -> Spec:
    axis = c.axis(c["dim"], c.rank("self"))
    length = c.shape("self")[axis]
    start = _position(c.plain("start") or 0, length)
    end = _position(c.plain("end"), length)
    if end is not None and (end == length or (isinstance(end, int) and end >= 2**62)):
        end = None
    if isinstance(end, int) and isinstance(length, int) and end >= length:
        end = None
    step = c.plain("step")
    if start == 0 and end is None and step == 1:  # x[:]
        return Spec("tie", _one("self"))
    return Spec("slice", _one("self"), {"axis": axis, "start": start, "end": end, "step": step})


@row("narrow", "narrow_copy")
def _narrow(c: Call) -> Spec | None:
    if isinstance(c["start"], fx.Node) and isinstance(c["start"].meta.get("val"), torch.Tensor):
        return None
    axis = c.axis(c["dim"], c.rank("self"))
    length = c.shape("self")[axis]
    start = _position(c.plain("start"), length)
    end = start + c.plain("length")
    attrs = {"axis": axis, "start": start, "end": None if end == length else end, "step": 1}
    return Spec("slice", _one("self"), attrs)


@row("select", "select_copy")
def _select(c: Call) -> Spec:
    axis = c.axis(c["dim"], c.rank("self"))
    return Spec(
        "select", _one("self"), {"axis": axis, "index": _position(c.plain("index"), c.shape("self")[axis])}
    )


@row("index_select")
def _index_select(c: Call) -> Spec:
    return Spec("gather", _one("self", "index"), {"axis": c.axis(c["dim"], c.rank("self"))})


def integer_index(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32, torch.int16)


@row("index", "_unsafe_index")
def _index(c: Call) -> Spec | None:
    found = [i for i, index in enumerate(c["indices"]) if index is not None]
    if len(found) == 1 and integer_index(c["indices"][found[0]]):
        return Spec("gather", [("self", None), ("indices", found[0])], {"axis": found[0]})
    return None


@row("take")
def _take(c: Call) -> None:
    return None


@row("embedding")
def _embedding(c: Call) -> Spec:
    return Spec("embedding", _one("weight", "indices"))


# ---- writing into a copy -----------------------------------------------------------------------------
@row("index_put", "_unsafe_index_put")
def _index_put(c: Call) -> Spec:
    axes = tuple(i for i, index in enumerate(c["indices"]) if index is not None)
    indices: list[Path] = [("indices", i) for i in axes]
    return Spec("scatter", [*_one("self", "values"), *indices], {"axes": axes})


@row("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill", "index_reduce")
def _scatter(c: Call) -> Spec:
    return Spec("scatter", c.tensors(), {"axes": (c.axis(c["dim"], c.rank("self")),)})


@row("slice_scatter", "select_scatter")
def _slice_scatter(c: Call) -> Spec:
    return Spec("scatter", _one("self", "src"), {"axes": (c.axis(c["dim"], c.rank("self")),)})


@row("masked_scatter", "diagonal_scatter")
def _masked_scatter(c: Call) -> Spec:
    return Spec("scatter", c.tensors(), {"axes": tuple(range(c.rank("self")))})


# ---- convolutions and everything that mixes positions ------------------------------------------------
_CONVS = (
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("convolution", "_convolution"),
)


@row(*_CONVS)
def _conv(c: Call) -> Spec:
    count = c.rank("weight") - 2
    rank = c.rank("input")
    name = target_name(c.node.target).removeprefix("aten::")
    attrs: dict[str, Any] = {"spatial": tuple(range(rank - count, rank)), "fn": name}
    attrs |= c.numbers()
    return Spec("conv", _one("input", "weight", "bias"), attrs)


def _last(count: int) -> Row:
    def read(c: Call) -> Spec:
        first = next(a.name for a in c.signature if a.tensor)
        rank = c.rank(first)
        name = target_name(c.node.target).removeprefix("aten::")
        return Spec("spatial", _one(first), {"axes": tuple(range(rank - count, rank)), "fn": name})

    return read


for _dims in (1, 2, 3):
    row(
        *(f"avg_pool{_dims}d", f"max_pool{_dims}d", f"max_pool{_dims}d_with_indices"),
        *(f"adaptive_avg_pool{_dims}d", f"adaptive_max_pool{_dims}d", f"_adaptive_avg_pool{_dims}d"),
        *(f"upsample_nearest{_dims}d", f"_upsample_nearest_exact{_dims}d", f"lp_pool{_dims}d"),
        *(f"reflection_pad{_dims}d", f"replication_pad{_dims}d"),
    )(_last(_dims))
row("upsample_linear1d")(_last(1))
row(
    *("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
    *("tril", "triu"),
)(_last(2))
row("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "upsample_trilinear3d", "im2col", "col2im")(_last(3))


def _along(*, all_axes_when_none: bool = True) -> Row:
    def read(c: Call) -> Spec:
        name = target_name(c.node.target).removeprefix("aten::")
        dims = c["dims"] if c.has("dims") else c["dim"] if c.has("dim") else c["dimension"]
        return Spec("spatial", _one("self"), {"axes": c.axes(dims, c.rank("self")), "fn": name})

    return read


row(
    *("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort", "argsort", "topk", "roll", "flip"),
    *("glu", "kthvalue", "mode", "msort", "diff"),
)(_along())


@row("unfold")
def _unfold(c: Call) -> Spec:
    axis = c.axis(c["dimension"], c.rank("self"))
    return Spec("spatial", _one("self"), {"axes": (axis,), "fn": "unfold"})


@row("constant_pad_nd", "pad")
def _pad(c: Call) -> Spec:
    rank = c.rank("self")
    axes = []
    widths = [as_plain(w) for w in c["pad"]]
    for k in range(len(widths) // 2):
        if widths[2 * k] != 0 or widths[2 * k + 1] != 0:
            axes.append(rank - 1 - k)
    return Spec("spatial", _one("self"), {"axes": tuple(sorted(axes)), "fn": "pad"})


# ---- creating, sizes, ties ---------------------------------------------------------------------------
@row(
    *("arange", "zeros", "ones", "full", "empty", "eye", "linspace", "logspace", "scalar_tensor", "rand"),
    *("randn", "randint", "randperm", "tril_indices", "triu_indices", "new_zeros", "new_ones", "new_full"),
    *("new_empty", "empty_strided", "new_empty_strided", "hann_window", "empty_permuted"),
)
def _create(c: Call) -> Spec:
    name = target_name(c.node.target).removeprefix("aten::")
    skip = ("device", "layout", "pin_memory", "self")
    return Spec("create", [], {"fn": name, **c.numbers(skip)})


@row("sym_size")
def _sym_size(c: Call) -> Spec | None:
    return Spec("size", _one("self"), {"axis": c.axis(c["dim"], c.rank("self"))}) if c.has("dim") else None


@row("clone", "contiguous", "detach", "alias", "lift_fresh_copy", "lift_fresh", "detach_copy", "alias_copy")
def _tie(c: Call) -> Spec:
    return Spec("tie", _one("self"))


@row("to", "_to_copy", "type_as", "float", "half", "bfloat16")
def _cast(c: Call) -> Spec:
    value = c.node.meta["val"]
    return Spec("elementwise", _one("self"), {"fn": "cast", "dtype": dtype_name(value.dtype)})


# ---- pointwise ---------------------------------------------------------------------------------------
# Pointwise operators that torch does not tag as such.
_POINTWISE = (
    *("dropout", "native_dropout", "feature_dropout", "alpha_dropout", "where", "masked_fill", "prelu", "item"),
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "bernoulli", "isin"),
    *("rrelu", "_local_scalar_dense", "bucketize", "nan_to_num", "square", "clip", "clamp", "hardtanh", "fill"),
    *("quantize_per_tensor", "fake_quantize_per_tensor_affine", "selu", "relu6", "logical_not", "isfinite"),
)
_RENAMED = {"native_dropout": "dropout", "_local_scalar_dense": "item", "divide": "div", "multiply": "mul"}


def _pointwise(c: Call) -> Spec:
    name = target_name(c.node.target).split("::")[1]
    name = _RENAMED.get(name, name.rstrip("_") if not name.startswith("__") else name.strip("_"))
    operands = [path for path in c.tensors() if isinstance(c[path[0]], fx.Node | list | tuple)]
    # A symbolic number may stand where a tensor could: it is data all the same.
    for arg in c.signature:
        value = c[arg.name]
        if not arg.tensor and isinstance(value, fx.Node) and arg.name in ("self", "other", "exponent"):
            operands.append((arg.name, None))
    return Spec("elementwise", operands, {"fn": name, **c.numbers(("device", "layout", "pin_memory"))})


row(*_POINTWISE)(_pointwise)


def is_symbolic_number(value: Any) -> bool:
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool)


def describe(node: fx.Node) -> Spec:
    """The kind, operands and attributes of a call. Never raises: what no row understands is `unknown`."""
    call = Call(node)
    target: Any = node.target
    name = target_name(target)
    if not isinstance(target, torch._ops.OpOverload):
        operands: list[Path] = [(k, None) for k, v in call.named.items() if isinstance(v, fx.Node)]
        if is_symbolic_number(node.meta.get("val")):
            numbers = {f"arg{k}": as_plain(v) for k, v in call.named.items() if not isinstance(v, fx.Node)}
            return Spec("elementwise", operands, {"fn": name.split(".")[-1].strip("_"), **numbers})
        return Spec("unknown", operands)
    if target.namespace == "elision":
        return Spec("elision", call.tensors(), call.numbers())
    if name not in ROWS and target._schema.is_mutable:
        name = functional_name(name)
    reader = ROWS.get(name)
    spec = reader(call) if reader is not None else None
    if spec is None and (torch.Tag.pointwise in target.tags or _is_inplace_pointwise(target)):
        spec = _pointwise(call)
    return spec or Spec("unknown", call.tensors(), call.numbers())


def functional_name(name: str) -> str:
    """`aten::add` for `aten::add_`; the name itself where it ends in no underscore."""
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def functional_twin(target: Any) -> Any | None:
    """The overload that computes the same as the in-place `target` and writes nothing, if there is one."""
    namespace, name = target._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), functional_name(name), None)
    if packet is None or functional_name(name) == name:
        return None
    return getattr(packet, target._overloadname, None)


def _is_inplace_pointwise(target: Any) -> bool:
    if not target._schema.is_mutable:
        return False
    twin = functional_twin(target)
    return twin is not None and torch.Tag.pointwise in twin.tags


def simplify(expr: Dim) -> Dim:
    if isinstance(expr, int):
        return expr
    expr = sympy.sympify(expr)
    return int(expr) if expr.is_Integer else expr
