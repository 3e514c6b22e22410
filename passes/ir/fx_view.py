"""The readable half of the torch.fx view: building it from nodes, text, constants, the verifier."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils import _pytree as pytree

from ..errors import ElisionError, VerificationError
from . import fx_call, fx_nodes, fx_ops
from .graph import Graph, Op, Value


class FxView(Graph):
    """Reads an `fx.GraphModule`; `FxGraph` adds construction and editing."""

    host = "fx"

    def __init__(self, module: fx.GraphModule) -> None:
        """A view of `module`, which must be prepared (see fx_prepare) and which this object then owns."""
        self.module = module
        self.original: fx.GraphModule | None = None
        self.extra_outputs: list[str] = []
        self.near_misses: list[str] = []
        mode = fx_nodes.fake_mode_of(module)
        if mode is None:
            raise ElisionError("the graph carries no fake values (node.meta['val'])")
        self._mode = mode
        self._runner: fx.GraphModule | None = None
        self._input_names: list[str] = []
        self._output_names: list[str] = []
        self._lengths: dict[str, Any] = {}
        self._build()

    def _build(self) -> None:
        self.ops = []
        self.inputs = []
        self._values: dict[fx.Node, Value] = {}
        self._ops: dict[fx.Node, Op] = {}
        self._paths: dict[Op, list[fx_call.Path]] = {}
        self._regions: dict[fx.Node, tuple[Any, ...]] = {}
        region: list[tuple[Any, ...]] = []
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                self._add_placeholder(node)
            elif node.op == "get_attr":
                tensor = fx_nodes.fetch(self.module, str(node.target))
                if isinstance(tensor, torch.Tensor):
                    parameter = isinstance(tensor, torch.nn.Parameter)
                    self._new_value(node, "parameter" if parameter else "constant")
            elif node.op == "call_function":
                name = fx_call.target_name(node.target)
                if name in fx_ops.SWITCHES:
                    fx_nodes.follow_region(region, node, name)
                elif name not in fx_ops.CHECKS and not self._absorb_getitem(node):
                    self._add_op(node, len(self.ops))
                    if region:
                        self._regions[node] = region[-1]
            elif node.op != "output":
                raise ElisionError(f"{node.name}: a {node.op} node has no place in a flat graph")
        self._read_outputs()

    def _add_placeholder(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) and type(value) not in fx_nodes.NUMBER_DTYPES:
            return  # None, strings and the like
        made = self._new_value(node, node.meta.get("elision_origin", "input"))
        if isinstance(value, torch.Tensor) and made.origin == "input":
            self.inputs.append(made)

    def _new_value(self, node: fx.Node, origin: str) -> Value:
        shape, dtype = fx_nodes.type_of(node.meta.get("val"))
        value = Value(node.name, shape, dtype, origin=origin, raw=node)
        self._values[node] = value
        return value

    def _absorb_getitem(self, node: fx.Node) -> bool:
        if node.target is not operator.getitem or not isinstance(node.args[1], int):
            return False
        op = self._ops.get(node.args[0])  # type: ignore[arg-type]
        if op is None:
            return False
        if not isinstance(node.args[0].meta.get("val"), list | tuple):  # type: ignore[union-attr]
            return False
        value = op.outputs[node.args[1]]
        if value.raw is None:
            value.name, value.raw = node.name, node
        self._values[node] = value
        return True

    def _add_op(self, node: fx.Node, position: int) -> Op:
        value = node.meta.get("val")
        op = Op("unknown", fx_call.target_text(node.target), node.name, [], [], {}, raw=node)
        if isinstance(value, list | tuple):
            for index, item in enumerate(value):
                shape, dtype = fx_nodes.type_of(item)
                op.outputs.append(Value(f"{node.name}.{index}", shape, dtype, op, index))
        else:
            shape, dtype = fx_nodes.type_of(value)
            op.outputs.append(Value(node.name, shape, dtype, op, 0, raw=node))
            self._values[node] = op.outputs[0]
        self._ops[node] = op
        self.ops.insert(position, op)
        self._describe(op)
        return op

    def _describe(self, op: Op) -> None:
        """Fill in kind, operands, attributes and users from the host's node."""
        for value in {id(v): v for v in [*op.inputs, *op.shape_inputs] if v is not None}.values():
            value.users[:] = [(o, i) for o, i in value.users if o is not op]
        node: fx.Node = op.raw
        spec = fx_ops.describe(node)
        call = fx_call.Call(node)
        op.kind = spec.kind
        op.attrs = {k: self._values[v] if isinstance(v, fx.Node) else v for k, v in spec.attrs.items()}
        self._paths[op] = spec.operands
        op.inputs = []
        used: set[fx.Node] = set()
        for index, (name, place) in enumerate(spec.operands):
            operand = call[name] if place is None or call[name] is None else call[name][place]
            if isinstance(operand, fx.Node):
                used.add(operand)
                value = self._values[operand]
                value.users.append((op, index))
                op.inputs.append(value)
            else:
                op.inputs.append(None)
        rest = [n for n in node.all_input_nodes if n not in used and n in self._values]
        op.shape_inputs = [self._values[n] for n in rest]

    def _read_outputs(self) -> None:
        leaves = self._output_leaves()
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, fx.Node) and self._is_tensor(leaf)]
        self._output_slots = tensors
        self.outputs = [self._values[leaves[i]] for i in tensors]

    def _is_tensor(self, node: fx.Node) -> bool:
        return isinstance(node.meta.get("val"), torch.Tensor)

    def _output_node(self) -> fx.Node:
        return self.module.graph.output_node()

    def _output_leaves(self) -> list[Any]:
        return pytree.tree_leaves(self._output_node().args[0], is_leaf=fx_nodes.is_node)

    # ---- reading -------------------------------------------------------------------------------------
    def tensor(self, value: Value) -> torch.Tensor | None:
        """The tensor of a parameter or constant; None when `value` is computed, or has no data here."""
        node = value.raw
        if not isinstance(node, fx.Node):
            return None
        if node.op == "get_attr":
            found = fx_nodes.fetch(self.module, str(node.target))
        else:
            found = node.meta.get("elision_tensor") if value.origin in ("parameter", "constant") else None
        return found if isinstance(found, torch.Tensor) else None

    def constant_value(self, value: Value) -> np.ndarray | None:
        tensor = self.tensor(value)
        if tensor is None or hasattr(tensor, "fake_mode"):
            return None
        with unset_fake_temporarily():
            return fx_nodes.to_array(tensor)

    def text(self) -> list[str]:
        lines = [f"{value!r} = input" for value in self.inputs]
        lines += [self._line(op) for op in self.ops]
        lines.append("return " + ", ".join(f"%{v.name}" for v in self.outputs))
        return lines

    def _line(self, op: Op) -> str:
        operands = ", ".join("none" if v is None else f"%{v.name}" for v in op.inputs)
        if op.shape_inputs:
            operands += (", " if operands else "") + "by " + ", ".join(f"%{v.name}" for v in op.shape_inputs)
        attrs = ", ".join(f"{k}={fx_nodes.attribute_text(v)}" for k, v in op.attrs.items() if v is not None)
        left = ", ".join(map(repr, op.outputs))
        return f"{left} = {op.target}({operands})" + (f" {{{attrs}}}" if attrs else "")

    def verify(self) -> None:
        """Lint the graph, recompute every fake value and compare; raise VerificationError.

        Also raised when recomputing would pin a dynamic axis to one length."""
        graph = self.module.graph
        try:
            graph.lint()
        except RuntimeError as error:
            raise VerificationError(f"broken graph: {error}") from error
        for node in graph.nodes:
            if node.op != "call_function" or node not in self._ops:
                continue
            if node.meta.get("unbacked_bindings"):
                continue  # every evaluation would invent a new symbol
            try:
                found = self._evaluate(node)
            except Exception as error:
                raise VerificationError(f"{self._ops[node]!r}: {fx_nodes.first_line(error)}") from error
            problem = fx_nodes.difference(node.meta.get("val"), found)
            if problem:
                raise VerificationError(f"{self._ops[node]!r}: {problem}")

    def _evaluate(self, node: fx.Node) -> Any:
        """The call's result on fake values; raises VerificationError if it would pin a dynamic length."""
        region = self._regions.get(node)
        with fx_nodes.unpinned(self._mode.shape_env):
            if region is None:
                return fx_nodes.evaluate(node, self._mode)
            device, dtype, enabled, cache = region
            with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache):
                return fx_nodes.evaluate(node, self._mode)

    # ---- inside --------------------------------------------------------------------------------------
    def _changed(self) -> None:
        self._runner = None
        self.original = None

    def _node(self, value: Value) -> fx.Node:
        """The node of a value; an output that nobody read yet gets its getitem now."""
        if value.raw is None:
            assert value.producer is not None
            node: fx.Node = value.producer.raw
            graph = self.module.graph
            with graph.inserting_after(node):
                item = graph.create_node(
                    "call_function",
                    operator.getitem,
                    (node, value.index),
                    name=value.name.replace(".", "_out"),
                )
            item.meta["val"] = node.meta["val"][value.index]
            value.raw, value.name = item, item.name
            self._values[item] = value
        return value.raw

    def _next_node(self, after: Op | None) -> fx.Node:
        """The node before which something goes that must come right after `after`."""
        if after is None:
            return self._first_call()
        node = after.raw.next
        while node.target is operator.getitem and node.args[0] is after.raw:
            node = node.next
        return node

    def _first_call(self) -> fx.Node:
        return next(n for n in self.module.graph.nodes if n.op not in ("placeholder", "get_attr"))

    @property
    def device_type(self) -> str:
        """The device of the graph's tensors: "cpu", "cuda", ..."""
        return self._device().type

    def _device(self) -> torch.device:
        for node in self.module.graph.nodes:
            if isinstance(node.meta.get("val"), torch.Tensor):
                return node.meta["val"].device
        return torch.device("cpu")
