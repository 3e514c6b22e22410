"""From ATen operators to canonical kinds: one row for each family of operators.

A row reads a call (`Call`: an fx node whose arguments can be asked for by their schema names) and answers
with a `Spec`: the kind, which arguments are data operands, and the canonical attributes. `describe` looks the
row up. Operators without a row fall back to their schema: pointwise operators are `elementwise`, those of our
own dialect `elision`, everything else `unknown`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from . import fx_rows_compute, fx_rows_move  # noqa: F401  (importing them fills the table)
from .fx_call import ROWS, Call, Path, Spec, as_plain, is_symbolic_number, row, target_name

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
TAKEN_APART = frozenset(
    {"aten::einsum", "aten::tensordot", "aten::cosine_similarity", "aten::inner", "aten::meshgrid"}
)

DIALECT = frozenset({"elision", "elision_cpu", "elision_triton"})
"""Namespaces of our own ops: the dialect, and the kernels that implement it on a device."""

# ---- pointwise ---------------------------------------------------------------------------------------
# Pointwise operators that torch does not tag as such.
_POINTWISE = (
    *(
        "dropout",
        "native_dropout",
        "feature_dropout",
        "alpha_dropout",
        "where",
        "masked_fill",
        "prelu",
        "item",
    ),
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "bernoulli", "isin"),
    *(
        "rrelu",
        "_local_scalar_dense",
        "bucketize",
        "nan_to_num",
        "square",
        "clip",
        "clamp",
        "hardtanh",
        "fill",
    ),
    *("copy", "zero", "__and__", "__or__", "__xor__", "__lshift__", "__rshift__", "normal", "uniform"),
    *("quantize_per_tensor", "fake_quantize_per_tensor_affine", "selu", "relu6", "logical_not", "isfinite"),
)
_RENAMED = {
    "native_dropout": "dropout",
    "_local_scalar_dense": "item",
    "divide": "div",
    "multiply": "mul",
    "__and__": "bitwise_and",
    "__or__": "bitwise_or",
}


def _pointwise(c: Call) -> Spec:
    name = target_name(c.node.target).split("::")[1]
    name = _RENAMED.get(name, name.strip("_"))
    operands = [path for path in c.tensors() if isinstance(c[path[0]], fx.Node | list | tuple)]
    # A symbolic number may stand where a tensor could: it is data all the same.
    for arg in c.signature:
        value = c[arg.name]
        if not arg.tensor and isinstance(value, fx.Node) and arg.name in ("self", "other", "exponent"):
            operands.append((arg.name, None))
    return Spec("elementwise", operands, {"fn": name, **c.numbers(("device", "layout", "pin_memory"))})


row(*_POINTWISE)(_pointwise)


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
    if target.namespace in DIALECT:
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
