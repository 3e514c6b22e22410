"""Output shapes of convolutions, pooling, resizing and padding."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import sympy

from .graph import Dim
from .onnx_rule_table import Shapes, rule
from .onnx_shapes import ShapeEnv, dim, floor_div, quotient


def conv_length(length: Dim, kernel: int, stride: int, pads: int, dilation: int, ceil: bool = False) -> Dim:
    span = length + pads - dilation * (kernel - 1) - 1
    if ceil:
        return dim(floor_div(span + stride - 1, stride) + 1)
    return dim(floor_div(span, stride) + 1)


@rule("Conv", "AveragePool", "MaxPool", "LpPool", "ConvInteger")
def _conv(env: ShapeEnv, node: ir.Node) -> Shapes:
    x = env.need(node.inputs[0])
    spatial = len(x) - 2
    attrs = node.attributes
    conv = node.op_type.startswith("Conv")
    if "kernel_shape" in attrs:
        kernel: list[Any] = list(attrs["kernel_shape"].as_ints())
    else:
        kernel = list(env.need(node.inputs[1])[2:])
    stride = list(attrs["strides"].as_ints()) if "strides" in attrs else [1] * spatial
    dilation = list(attrs["dilations"].as_ints()) if "dilations" in attrs else [1] * spatial
    pads = list(attrs["pads"].as_ints()) if "pads" in attrs else [0] * (2 * spatial)
    mode = attrs["auto_pad"].as_string() if "auto_pad" in attrs else "NOTSET"
    ceil = bool(attrs.get_int("ceil_mode", 0))
    channels = env.need(node.inputs[1])[0] if conv else x[1]
    out: list[Dim] = [x[0], channels]
    for i in range(spatial):
        length = x[2 + i]
        if mode in ("SAME_UPPER", "SAME_LOWER"):
            out.append(floor_div(length + stride[i] - 1, stride[i]))
        else:
            total = 0 if mode == "VALID" else pads[i] + pads[i + spatial]
            out.append(conv_length(length, kernel[i], stride[i], total, dilation[i], ceil))
    return [tuple(out)] * len(node.outputs)


@rule("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def _global_pool(env: ShapeEnv, node: ir.Node) -> Shapes:
    x = env.need(node.inputs[0])
    return [(*x[:2], *([1] * (len(x) - 2)))]


@rule("ConvTranspose")
def _conv_transpose(env: ShapeEnv, node: ir.Node) -> Shapes:
    x, weight = env.need(node.inputs[0]), env.need(node.inputs[1])
    spatial = len(x) - 2
    attrs = node.attributes

    def get(name: str, default: list[int]) -> list[int]:
        return list(attrs[name].as_ints()) if name in attrs else default

    stride, dilation = get("strides", [1] * spatial), get("dilations", [1] * spatial)
    pads, extra = get("pads", [0] * (2 * spatial)), get("output_padding", [0] * spatial)
    channels = weight[1] * attrs.get_int("group", 1)
    if "output_shape" in attrs:
        return [(x[0], channels, *attrs["output_shape"].as_ints()[-spatial:])]
    mode = attrs["auto_pad"].as_string() if "auto_pad" in attrs else "NOTSET"
    out: list[Dim] = [x[0], channels]
    for i in range(spatial):
        if mode in ("SAME_UPPER", "SAME_LOWER"):
            out.append(x[2 + i] * stride[i])
            continue
        total = 0 if mode == "VALID" else pads[i] + pads[i + spatial]
        span = dilation[i] * (weight[2 + i] - 1) + 1
        out.append((x[2 + i] - 1) * stride[i] + extra[i] + span - total)
    return [tuple(out)]


@rule("Resize", "Upsample")
def _resize(env: ShapeEnv, node: ir.Node) -> Shapes:
    x = env.need(node.inputs[0])
    out = list(x)
    axes = (
        [a % len(x) for a in node.attributes["axes"].as_ints()]
        if "axes" in node.attributes
        else range(len(x))
    )
    sizes = env.ints(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    which = 1 if node.op_type == "Upsample" else 2
    scale_value = node.inputs[which] if len(node.inputs) > which else None
    scales = env.ints(scale_value) if scale_value is not None else None
    for i, axis in enumerate(axes):
        if sizes:
            out[axis] = env.fresh(node.outputs[0], axis) if sizes[i] is None else sizes[i]
        elif scales:
            out[axis] = (
                env.fresh(node.outputs[0], axis)
                if scales[i] is None
                else dim(sympy.floor(sympy.sympify(out[axis]) * scales[i]))
            )
        else:
            out[axis] = env.fresh(node.outputs[0], axis)
    return [tuple(out)]


@rule("Pad")
def _pad(env: ShapeEnv, node: ir.Node) -> Shapes:
    x = env.need(node.inputs[0])
    pads: list[Any] | None = (
        list(node.attributes["pads"].as_ints()) if "pads" in node.attributes else env.ints(node.inputs[1])
    )
    axes = list(range(len(x)))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        axes = [a % len(x) for a in env.known_ints(node.inputs[3]) or axes]
    out = list(x)
    for i, axis in enumerate(axes):
        low, high = (None, None) if pads is None else (pads[i], pads[i + len(axes)])
        out[axis] = (
            env.fresh(node.outputs[0], axis) if low is None or high is None else dim(out[axis] + low + high)
        )
    return [tuple(out)]


@rule("DepthToSpace", "SpaceToDepth")
def _depth_to_space(env: ShapeEnv, node: ir.Node) -> Shapes:
    b, c, h, w = env.need(node.inputs[0])
    block = node.attributes["blocksize"].as_int()
    if node.op_type == "DepthToSpace":
        return [(b, quotient(c, block * block), h * block, w * block)]
    return [(b, c * block * block, quotient(h, block), quotient(w, block))]
