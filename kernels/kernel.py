"""Kernels: the faster implementations that an op of the dialect has on a target, and how torch is told of them.

An op keeps its one meaning, `torch.ops.elision.<name>`, which torch takes apart. A kernel for a torch target is an
op of its own with the same schema in another namespace, whole for Inductor; the pass `lower` puts it in where a
measurement says that it pays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .definition import Attributes, OpDef
from .lengths import Shape

TORCH_CPU, TORCH_CUDA, ONNXRUNTIME = "torch-cpu", "torch-cuda", "onnxruntime"
NAMESPACES = {TORCH_CPU: "elision_cpu", TORCH_CUDA: "elision_triton"}
"""Where torch finds the kernels of a target."""

Shapes = Sequence[Shape | None]
Dtypes = Sequence[str | None]


def takes_all(shapes: Shapes, dtypes: Dtypes, attrs: Attributes) -> str:
    """What a kernel without limits answers."""
    return ""


@dataclass(frozen=True)
class Kernel:
    """An implementation of `op` on `target`.

    refuses: from the operands' shapes (ints or symbolic), numpy dtype names (None: absent) and complete attributes,
    why it cannot take them, "" where it can."""

    op: str
    target: str
    refuses: Callable[[Shapes, Dtypes, Attributes], str] = takes_all

    @property
    def overload(self) -> Any:
        """The torch operator of a torch target."""
        return getattr(getattr(torch.ops, NAMESPACES[self.target]), self.op).default


def add_fake_and_gradient(
    op: OpDef, namespace: str, *, fake: bool = True, empty: Callable[..., Any] | None = None
) -> None:
    """Give the kernel `namespace::op` the shapes of its op and, for what carries features, its gradient.

    Results are dense unless `empty` makes room for them from the operands. The gradient is that of the reference,
    computed anew from the operands: kernels compute forwards only."""
    name = f"{namespace}::{op.name}"
    if fake:

        def shaped(*args: Any, **kwargs: Any) -> Any:
            if empty is not None:
                return empty(*args)
            first = next(a for a in args if a is not None)
            shapes = op.output_shapes([None if a is None else tuple(a.shape) for a in args], kwargs)
            dtypes = op.output_dtypes(
                [None if a is None else str(a.dtype).removeprefix("torch.") for a in args], kwargs
            )
            made = [first.new_empty(s, dtype=getattr(torch, d)) for s, d in zip(shapes, dtypes)]
            return tuple(made) if len(made) > 1 else made[0]

        torch.library.register_fake(name, shaped)

    def keep(ctx: Any, inputs: Any, output: Any, keyword_only_inputs: Any = None) -> None:
        ctx.attrs = dict(keyword_only_inputs or {})  # torch hands none where the schema has none
        ctx.present = [x is not None for x in inputs]
        ctx.save_for_backward(*[x for x in inputs if x is not None])
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*[o for o in outputs if not o.is_floating_point()])

    def backward(ctx: Any, *grads: Any) -> Any:
        saved = list(ctx.saved_tensors)
        inputs = [saved.pop(0) if there else None for there in ctx.present]
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[: len(inputs)]) if need]

        def floats(*chosen: Any) -> Any:
            full = list(inputs)
            for i, x in zip(wanted, chosen):
                full[i] = x
            found = op.reference(*full, **ctx.attrs)
            return [o for o in (found if isinstance(found, tuple) else (found,)) if o.is_floating_point()]

        outputs, pull, *_ = torch.func.vjp(floats, *[inputs[i] for i in wanted])
        used = [g for g in grads if g is None or g.is_floating_point()]
        filled = [torch.zeros_like(o) if g is None else g for o, g in zip(outputs, used, strict=True)]
        result: list[Any] = [None] * len(inputs)
        for i, g in zip(wanted, pull(filled)):
            result[i] = g
        return tuple(result)

    torch.library.register_autograd(name, backward, setup_context=keep)
