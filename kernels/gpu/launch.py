"""What the kernels share: tuning tables, the launch, registration, addresses of tokens."""

from __future__ import annotations

import inspect
import itertools
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..definition import OpDef
from ..kernel import NAMESPACES, TORCH_CUDA, add_fake_and_gradient
from ..layout import from_rows, to_rows
from . import limits

NAMESPACE = NAMESPACES[TORCH_CUDA]
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Do the kernels run in Triton's interpreter, on tensors of the CPU? Decided when Triton is imported. There products of
bfloat16 are taken in float32: the interpreter multiplies bfloat16 as if its bits were whole numbers."""


def tuned(
    configs: Sequence[triton.Config],
    key: Sequence[str],
    fits: Callable[[triton.Config, dict[str, Any]], bool] | None = None,
) -> Callable[[Any], Any]:
    """Autotune a kernel over `configs`, anew for every value of the arguments `key`.

    fits(config, arguments): is the configuration one for this call?"""
    if fits is None:
        return triton.autotune(list(configs), list(key))

    def prune(given: list[Any], named: dict[str, Any], **others: Any) -> list[Any]:
        return [c for c in given if fits(c, {**named, **others})]

    return triton.autotune(list(configs), list(key), prune_configs_by={"early_config_prune": prune})


class _Interpreted:
    """A tuned kernel in the interpreter, where there is nothing to tune: the first configuration that fits."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(**arguments: Any) -> None:
            prune = self.kernel.early_config_prune
            configs = prune(self.kernel.configs, {}, **arguments) if prune else self.kernel.configs
            self.kernel.fn[grid](**arguments, **configs[0].kwargs)

        return launch


def wrap_triton(kernel: Any) -> Any:
    """The kernel as torch traces it. (Named as torch's: torch finds an op's kernels by this name.)"""
    return _Interpreted(kernel) if INTERPRETED else torch.library.wrap_triton(kernel)


def size_class(length: Any) -> Any:
    """The next power of two, so that a kernel is tuned once for lengths alike; 0 where it is symbolic."""
    return triton.next_power_of_2(max(length, 16)) if isinstance(length, int) else 0


def precision(dtype: torch.dtype, plain: bool) -> str:
    """How products of float32 are taken: in three steps of tf32, which is as exact and has tensor cores, or plainly."""
    return "ieee" if plain or dtype != torch.float32 else "tf32x3"


def register(op: OpDef, implementation: Callable[..., Any]) -> None:
    """Register `implementation` as the Triton kernel of `op`: the same schema, refusals as ValueError, gradients."""
    torch.library.triton_op(
        f"{NAMESPACE}::{op.name}",
        _checked(op, op.name, implementation, signature(op)),
        mutates_args={},
        schema=op.schema.removeprefix(op.name),
    )
    add_fake_and_gradient(op, NAMESPACE, fake=False)


def register_in_place(op: OpDef, implementation: Callable[..., Tensor], written: Sequence[str]) -> None:
    """Register `<op>_`, which writes into the operands `written` and returns the first result alone; no gradients."""
    schema, results = op.schema.removeprefix(op.name).split(" -> ")
    for letter, name in zip("abcdef", written, strict=False):
        schema = re.sub(rf"Tensor {name}\b", f"Tensor({letter}!) {name}", schema)
    shown = signature(op).replace(return_annotation=Tensor)
    torch.library.triton_op(
        f"{NAMESPACE}::{op.name}_",
        _checked(op, f"{op.name}_", implementation, shown),
        mutates_args=set(written),
        schema=f"{schema} -> {results.strip('()').split(',')[0]}",
    )


def _checked(
    op: OpDef, name: str, implementation: Callable[..., Any], shown: inspect.Signature
) -> Callable[..., Any]:
    """`implementation` with all operands and attributes of the op spelled out, behind its refusals."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        kwargs = op.complete(kwargs)
        operands = [*args, *[None] * (len(op.inputs) - len(args))]
        first = operands[0]
        if not INTERPRETED and first.device.type != "cuda":
            raise ValueError(f"{NAMESPACE}::{name} needs tensors on a GPU, not on {first.device}")
        limits.check(op.name, operands, kwargs)
        return implementation(*operands, **kwargs)

    # torch looks for the kernels in the source of the function, through `__wrapped__`.
    checked.__wrapped__ = implementation  # type: ignore[attr-defined]
    checked.__signature__ = shown  # type: ignore[attr-defined]
    return checked


def signature(op: OpDef) -> inspect.Signature:
    """The op's schema as a Python signature: torch 2.11 reads it off the function whatever schema it is given."""
    kinds = inspect.Parameter
    parameters = []
    for name in op.inputs:
        plain = name.removesuffix("?")
        default, kind = (kinds.empty, Tensor) if plain == name else (None, Tensor | None)
        parameters.append(kinds(plain, kinds.POSITIONAL_OR_KEYWORD, default=default, annotation=kind))
    if any(
        a.default is not kinds.empty and b.default is kinds.empty for a, b in itertools.pairwise(parameters)
    ):
        parameters = [p.replace(default=kinds.empty) for p in parameters]  # as OpDef.schema has it
    for attr in op.attrs:
        default = kinds.empty if attr.default is None else attr.default
        kind = int if attr.default is None else type(attr.default)
        parameters.append(kinds(attr.name, kinds.KEYWORD_ONLY, default=default, annotation=kind))
    one = len(op.outputs) == 1
    returns = Tensor if one else tuple[tuple(Tensor for _ in op.outputs)]  # type: ignore[misc]
    return inspect.Signature(parameters, return_annotation=returns)


class Rows:
    """A value of any rank as rows of tokens [B, N, F]; copied only where there are several feature axes."""

    def __init__(self, x: Tensor, axis: int, batch_axis: int) -> None:
        self.like, self.axis, self.batch_axis = x, axis, batch_axis
        self.others = [a for a in range(x.dim()) if a not in (axis, batch_axis)]
        self.flat = len(self.others) > 1  # several feature axes, seldom adjacent: copied into one
        self.data = to_rows(x, axis, batch_axis) if self.flat else x
        self.batch: Any = 1 if batch_axis < 0 else x.shape[batch_axis]
        self.count: Any = x.shape[axis]
        self.width: Any = self.data.shape[2] if self.flat else x.shape[self.others[0]] if self.others else 1

    def strides(self, x: Tensor) -> tuple[Any, Any, Any]:
        """Of batch, tokens and features in `x`, laid out as `data`; 0 for a batch of 1, which serves all."""
        batch, axis, others = (0, 1, [2]) if self.flat else (self.batch_axis, self.axis, self.others)
        own = 0 if batch < 0 or x.shape[batch] == 1 else x.stride(batch)
        return own, x.stride(axis), x.stride(others[0]) if others else 0

    def empty(self, batch: Any, count: Any) -> Tensor:
        """Room for the result with this many tokens, laid out as `data`."""
        if self.flat:
            return self.data.new_empty([batch, count, self.width])
        shape: list[Any] = list(self.like.shape)
        shape[self.axis] = count
        if self.batch_axis >= 0:
            shape[self.batch_axis] = batch
        return self.data.new_empty(shape)

    def finish(self, out: Tensor) -> Tensor:
        """`out`, which `empty` made, as the op returns it."""
        return from_rows(out, self.like, self.axis, self.batch_axis).contiguous() if self.flat else out


def map_stride(x: Tensor) -> Any:
    """The stride from sample to sample of a contiguous [B or 1, M]; 0 where one row serves all."""
    return 0 if x.shape[0] == 1 else x.stride(0)
