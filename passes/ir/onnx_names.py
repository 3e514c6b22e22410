"""The elementwise operators of ONNX, and the plain names that the kinds table gives to operators."""

from __future__ import annotations

PLAIN_NAMES = {
    "GreaterOrEqual": "ge", "Greater": "gt", "LessOrEqual": "le", "Less": "lt", "Equal": "eq", "Not": "logical_not",
    "And": "logical_and", "Or": "logical_or", "Xor": "logical_xor", "Reciprocal": "reciprocal", "IsNaN": "isnan",
    "IsInf": "isinf", "BitwiseAnd": "bitwise_and", "BitwiseNot": "bitwise_not", "BitwiseOr": "bitwise_or",
    "BitwiseXor": "bitwise_xor", "BitShift": "bit_shift", "LeakyRelu": "leaky_relu", "HardSigmoid": "hardsigmoid",
    "HardSwish": "hardswish", "ThresholdedRelu": "threshold", "Swish": "silu", "Max": "maximum", "Min": "minimum",
    "Clip": "clamp", "PRelu": "prelu", "CastLike": "cast", "QuantizeLinear": "quantize",
    "DequantizeLinear": "dequantize", "FastGelu": "gelu", "BiasGelu": "gelu", "QuickGelu": "quick_gelu",
}  # fmt: skip
UNARY_AND_BROADCAST = [
    "Abs",
    "Acos",
    "Acosh",
    "Add",
    "And",
    "Asin",
    "Asinh",
    "Atan",
    "Atanh",
    "BitShift",
    "BitwiseAnd",
    "BitwiseNot",
    "BitwiseOr",
    "BitwiseXor",
    "Cast",
    "Ceil",
    "Celu",
    "Clip",
    "Cos",
    "Cosh",
    "Div",
    "Elu",
    "Equal",
    "Erf",
    "Exp",
    "Floor",
    "Gelu",
    "Greater",
    "GreaterOrEqual",
    "HardSigmoid",
    "HardSwish",
    "IsInf",
    "IsNaN",
    "LeakyRelu",
    "Less",
    "LessOrEqual",
    "Log",
    "Max",
    "Mean",
    "Min",
    "Mish",
    "Mod",
    "Mul",
    "Neg",
    "Not",
    "Or",
    "PRelu",
    "Pow",
    "Reciprocal",
    "Relu",
    "Round",
    "Selu",
    "Shrink",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sinh",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Sub",
    "Sum",
    "Swish",
    "Tan",
    "Tanh",
    "ThresholdedRelu",
    "Where",
    "Xor",
    "CastLike",
]  # fmt: skip


def unique_in(names: set[str | None] | set[str], base: str) -> str:
    """A name that is not in `names` yet, `base` if it is free; it is added to them."""
    name, count = base, 1
    while name in names:
        count += 1
        name = f"{base}_{count}"
    names.add(name)
    return name
