"""Rows of the operator table: linear algebra, norms, attention, reductions, convolutions."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from .fx_call import Call, Row, Spec, as_plain, at, row, target_name


# ---- linear algebra ----------------------------------------------------------------------------------
@row("linear")
def _linear(c: Call) -> Spec:
    return Spec("linear", at("input", "weight", "bias"), {"transposed": True})


@row("matmul", "mm", "bmm", "__rmatmul__")
def _matmul(c: Call) -> Spec | None:
    right = "other" if c.has("other") else "mat2"
    if c.rank("self") < 2 or c.rank(right) < 2:
        return None
    if c.rank(right) == 2 and c.constant(right):
        return Spec("linear", [*at("self", right)], {"transposed": False})
    return Spec("matmul", at("self", right))


@row("addmm")
def _addmm(c: Call) -> Spec:
    plain = c.plain("beta") == 1 and c.plain("alpha") == 1
    if plain and c.rank("self") == 1 and c.constant("mat2"):
        return Spec("linear", at("mat1", "mat2", "self"), {"transposed": False})
    return Spec("matmul", at("mat1", "mat2", "self"), {"alpha": c.plain("alpha"), "beta": c.plain("beta")})


@row("baddbmm")
def _baddbmm(c: Call) -> Spec:
    attrs = {"alpha": c.plain("alpha"), "beta": c.plain("beta")}
    # beta 0 means that the first argument only lends its shape.
    added = [] if attrs["beta"] == 0 else at("self")
    return Spec("matmul", [*at("batch1", "batch2"), *added], attrs)


# ---- normalisation, softmax, attention -----------------------------------------------------------------
@row("layer_norm", "native_layer_norm")
def _layer_norm(c: Call) -> Spec:
    rank = c.rank("input")
    axes = tuple(range(rank - len(c["normalized_shape"]), rank))
    return Spec(
        "norm", at("input", "weight", "bias"), {"axes": axes, "fn": "layer_norm", "eps": c.plain("eps")}
    )


@row("rms_norm", "_fused_rms_norm")
def _rms_norm(c: Call) -> Spec:
    rank = c.rank("input")
    axes = tuple(range(rank - len(c["normalized_shape"]), rank))
    return Spec("norm", at("input", "weight"), {"axes": axes, "fn": "rms_norm", "eps": c.plain("eps")})


@row("group_norm")
def _group_norm(c: Call) -> Spec:
    axes = tuple(range(1, c.rank("input")))
    attrs = {"axes": axes, "fn": "group_norm", "groups": c.plain("num_groups"), "eps": c.plain("eps")}
    return Spec("norm", at("input", "weight", "bias"), attrs)


@row("native_group_norm")
def _native_group_norm(c: Call) -> Spec:
    axes = tuple(range(1, c.rank("input")))
    attrs = {"axes": axes, "fn": "group_norm", "groups": c.plain("group"), "eps": c.plain("eps")}
    return Spec("norm", at("input", "weight", "bias"), attrs)


@row("batch_norm", "native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit")
def _batch_norm(c: Call) -> Spec:
    # With running statistics nothing is averaged: a scale and a shift for each channel.
    axes = tuple(a for a in range(c.rank("input")) if a != 1) if c.plain("training") else ()
    return Spec(
        "norm",
        at("input", "weight", "bias", "running_mean", "running_var"),
        {"axes": axes, "fn": "batch_norm", "eps": c.plain("eps")},
    )


@row("_native_batch_norm_legit_no_training")
def _batch_norm_eval(c: Call) -> Spec:
    return Spec(
        "norm",
        at("input", "weight", "bias", "running_mean", "running_var"),
        {"axes": (), "fn": "batch_norm", "eps": c.plain("eps")},
    )


@row("instance_norm")
def _instance_norm(c: Call) -> Spec:
    axes = tuple(range(2, c.rank("input"))) if c.plain("use_input_stats") else ()
    return Spec(
        "norm",
        at("input", "weight", "bias", "running_mean", "running_var"),
        {"axes": axes, "fn": "instance_norm", "eps": c.plain("eps")},
    )


@row("_weight_norm")
def _weight_norm(c: Call) -> Spec:
    kept = c.axis(c["dim"], c.rank("v"))
    axes = tuple(a for a in range(c.rank("v")) if a != kept)
    return Spec("norm", at("v", "g"), {"axes": axes, "fn": "weight_norm"})


@row("softmax", "_softmax", "special_softmax", "_safe_softmax")
def _softmax(c: Call) -> Spec:
    return Spec("softmax", at("self"), {"axis": c.axis(c["dim"], c.rank("self")), "fn": "softmax"})


@row("log_softmax", "_log_softmax", "special_log_softmax")
def _log_softmax(c: Call) -> Spec:
    return Spec("softmax", at("self"), {"axis": c.axis(c["dim"], c.rank("self")), "fn": "log_softmax"})


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
    return Spec("attention", at("query", "key", "value", "attn_mask"), attrs)


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
    return Spec("reduce", at("self"), {"axes": axes, "keepdim": bool(c.plain("keepdim")), "fn": fn})


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
    return Spec("conv", at("input", "weight", "bias"), attrs)


def _last(count: int) -> Row:
    def read(c: Call) -> Spec:
        first = next(a.name for a in c.signature if a.tensor)
        rank = c.rank(first)
        name = target_name(c.node.target).removeprefix("aten::")
        return Spec("spatial", at(first), {"axes": tuple(range(rank - count, rank)), "fn": name})

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
row("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "upsample_trilinear3d", "im2col", "col2im")(
    _last(3)
)


def _along(*, all_axes_when_none: bool = True) -> Row:
    def read(c: Call) -> Spec:
        name = target_name(c.node.target).removeprefix("aten::")
        dims = c["dims"] if c.has("dims") else c["dim"] if c.has("dim") else c["dimension"]
        return Spec("spatial", at("self"), {"axes": c.axes(dims, c.rank("self")), "fn": name})

    return read


row(
    *("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort", "argsort", "topk", "roll", "flip"),
    *("glu", "kthvalue", "mode", "msort", "diff"),
)(_along())


@row("unfold")
def _unfold(c: Call) -> Spec:
    axis = c.axis(c["dimension"], c.rank("self"))
    return Spec("spatial", at("self"), {"axes": (axis,), "fn": "unfold"})


@row("constant_pad_nd", "pad")
def _pad(c: Call) -> Spec:
    rank = c.rank("self")
    axes = []
    widths = [as_plain(w) for w in c["pad"]]
    for k in range(len(widths) // 2):
        if widths[2 * k] != 0 or widths[2 * k + 1] != 0:
            axes.append(rank - 1 - k)
    return Spec("spatial", at("self"), {"axes": tuple(sorted(axes)), "fn": "pad"})
