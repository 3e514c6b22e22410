"""Writing ONNX function bodies: a few lines on top of onnx.helper, so that a body reads like the expression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64, INT32, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL
UINT8, FLOAT16 = TensorProto.UINT8, TensorProto.FLOAT16
FLOATS = (FLOAT, FLOAT16, TensorProto.BFLOAT16)
"""What the C++ kernels compute with."""


class Body:
    """Nodes of one function, in order. Values are names; every method returns the name of what it made."""

    def __init__(self, opset: int, op: str) -> None:
        self.opset = opset
        self.op = op
        self.nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[Any, ...], str] = {}
        self._count = 0
        self.domains = {""}  # of the operators in use
        self.references: set[str] = set()  # attributes that the body reads off its node

    # ---- nodes ---------------------------------------------------------------------------------------
    def many(
        self, kind: str, inputs: Sequence[str], outputs: int, *, domain: str = "", **attrs: Any
    ) -> list[str]:
        """A node with several outputs; an input "" is absent."""
        self.domains.add(domain)
        names = [self._fresh(kind) for _ in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, domain=domain, **attrs))
        return names

    def __call__(self, kind: str, *inputs: str, **attrs: Any) -> str:
        return self.many(kind, inputs, 1, **attrs)[0]

    def _fresh(self, kind: str) -> str:
        self._count += 1
        return f"{kind.lower()}_{self._count}"

    def constant(self, value: Any, dtype: int = INT64) -> str:
        """A constant; equal ones are made once."""
        array = np.asarray(value, dtype=helper.tensor_dtype_to_np_dtype(dtype))
        key = (array.tobytes(), array.shape, dtype)
        if key not in self._constants:
            self._constants[key] = self("Constant", value=numpy_helper.from_array(array))
        return self._constants[key]

    def attribute(self, name: str) -> str:
        """The node's own int attribute, int64 [1]: nodes that differ in nothing else share one function."""
        self.references.add(name)
        number = self("Constant")
        self.nodes[-1].attribute.add(name="value_int", ref_attr_name=name, type=onnx.AttributeProto.INT)
        return self.unsqueeze(number, 0)

    def refer(self, attribute: str, name: str) -> None:
        """The latest node gets its int attribute from the one called `name` of the node that calls the function."""
        self.references.add(name)
        self.nodes[-1].attribute.add(name=attribute, ref_attr_name=name, type=onnx.AttributeProto.INT)

    # ---- shapes --------------------------------------------------------------------------------------
    def length(self, x: str, axis: int) -> str:
        """The length of an axis, int64 [1]."""
        return self("Shape", x, start=axis, **({} if axis == -1 else {"end": axis + 1}))

    def join(self, *parts: str | int) -> str:
        """A shape, int64 [k], of ints and of int64 [1] values."""
        return self("Concat", *(self.constant([p]) if isinstance(p, int) else p for p in parts), axis=0)

    def reshape(self, x: str, *parts: str | int) -> str:
        return self("Reshape", x, self.join(*parts))

    def permute(self, x: str, order: Sequence[int]) -> str:
        return x if list(order) == list(range(len(order))) else self("Transpose", x, perm=list(order))

    def slice(self, x: str, axis: int, start: int | str, end: int | str | None = None, step: int = 1) -> str:
        """x[start:end:step] on one axis; end None: to its end. Bounds may be int64 [1] values."""
        stop = np.iinfo(np.int64).max if end is None else end
        bounds = [self.constant([b]) if isinstance(b, int) else b for b in (start, stop)]
        return self("Slice", x, *bounds, self.constant([axis]), self.constant([step]))

    def squeeze(self, x: str, *axes: int) -> str:
        return self("Squeeze", x, self.constant(list(axes)))

    def unsqueeze(self, x: str, *axes: int) -> str:
        return self("Unsqueeze", x, self.constant(list(axes)))

    def cast(self, x: str, to: int) -> str:
        return self("Cast", x, to=to)

    def count(self, length: str) -> str:
        """0, 1, ..., length-1 as int64 [length]; `length` is int64 [1]."""
        return self("Range", self.constant(0), self.squeeze(length, 0), self.constant(1))

    # ---- the result ----------------------------------------------------------------------------------
    def function(
        self,
        overload: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        results: Sequence[str],
        attrs: dict[str, Any],
    ) -> onnx.FunctionProto:
        """The function whose body is what was written; `results` are the values behind `outputs`."""
        nodes = [*self.nodes]
        for name, result in zip(outputs, results, strict=True):
            nodes.append(helper.make_node("Identity", [result], [name]))
        protos = [helper.make_attribute(k, int(v) if isinstance(v, bool) else v) for k, v in attrs.items()]
        function = helper.make_function(
            "elision",
            self.op,
            list(inputs),
            list(outputs),
            nodes,
            [helper.make_opsetid(d, 1 if d else self.opset) for d in sorted(self.domains)],
            attribute_protos=protos,
        )
        function.overload = overload
        return function

    @staticmethod
    def short_type(dtype: int) -> str:
        return TensorProto.DataType.Name(dtype).lower()  # type: ignore[attr-defined]
