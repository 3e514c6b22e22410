"""The graph view of torch.fx: the level of `torch.export.export` before decomposition.

The host graph is one flat `fx.GraphModule`: parameters and buffers are `get_attr` nodes that point at the
original tensors (so training and shared weights keep working), or placeholders when Dynamo lifted them.
Every node carries `meta['val']`, a fake tensor or a symbolic number. The view (`ops`, `inputs`, `outputs`) is
built in one walk and kept in step by the editing primitives.

What the view shows: every call but three sorts. `getitem` is absorbed into its producer's outputs; runtime
checks (`_assert_scalar`, `sym_constrain_range`) and grad or autocast switches stay in the host graph only.
Arithmetic on lengths is `elementwise` on rank-0 integers.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import numpy as np
import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import compute_unbacked_bindings
from torch.utils import _pytree as pytree

from ...kernels import ops as _dialect  # noqa: F401  (importing it registers torch.ops.elision)
from ..errors import ElisionError, Refused, VerificationError
from . import fx_call, fx_lengths, fx_nodes, fx_prepare, fx_raise, fx_rewrite
from .fx_state import FxState
from .graph import Op, Value


class FxGraph(FxState):
    """A `Graph` over an `fx.GraphModule`. Build one with `trace`, `from_export` or `from_module`.

    Building brings the graph into a canonical form (no in-place writes, one attention op for each decomposed
    attention, ...). All of that keeps the function, and all but the raised attentions keep it to the bit.
    As long as no editing primitive was called, `edited` is False and `to_module`, `run` and `to_export` give
    the graph as it was before: a pass that changes nothing is the identity, bit for bit. `near_misses` says
    which attentions were left decomposed, and why."""

    # ---- construction --------------------------------------------------------------------------------
    @classmethod
    def trace(
        cls,
        module: torch.nn.Module,
        args: Sequence[Any],
        kwargs: dict[str, Any] | None = None,
        dynamic_shapes: Any = None,
        *,
        raise_attention: bool = True,
    ) -> Self:
        """Export `module` with torch.export (same arguments) and view the result."""
        program = torch.export.export(
            module, tuple(args), kwargs, dynamic_shapes=dynamic_shapes, strict=False
        )
        return cls.from_export(program, raise_attention=raise_attention)

    @classmethod
    def from_export(cls, program: torch.export.ExportedProgram, *, raise_attention: bool = True) -> Self:
        """View an exported program. Parameters and buffers stay the same tensor objects."""
        if any(node.target is torch.ops.higher_order.flat_apply for node in program.graph.nodes):
            # Calls of Python functions that the exporter could not see into: torch takes them apart.
            program = program.run_decompositions({})
        module = program.module(check_guards=False)
        assert isinstance(module, fx.GraphModule)
        return cls._prepared(module, raise_attention)

    @classmethod
    def from_module(
        cls,
        module: fx.GraphModule,
        example_inputs: Sequence[Any] | None = None,
        *,
        raise_attention: bool = True,
    ) -> Self:
        """View a graph from `make_fx(..., pre_dispatch=True)` or `fx_trace.retrace`.

        `node.meta['val']` must be set. Placeholders are inputs unless `meta['elision_origin']` says otherwise
        or the example input is a Parameter. `module` itself is left as it was."""
        return cls._prepared(module, raise_attention, example_inputs)

    @classmethod
    def _prepared(
        cls, module: fx.GraphModule, raise_attention: bool, examples: Sequence[Any] | None = None
    ) -> Self:
        # program.module() refuses train() and eval(); a plain GraphModule over the same tensors does not.
        original = fx_nodes.copy_module(module)
        fx_nodes.drop_guards(original.graph)
        holders = [n for n in original.graph.nodes if n.op == "placeholder"]
        for node, example in zip(holders, examples or ()):
            if isinstance(example, torch.nn.Parameter):
                node.meta.setdefault("elision_origin", "parameter")
            if isinstance(example, torch.Tensor) and not hasattr(example, "fake_mode"):
                node.meta.setdefault("elision_tensor", example)
        prepared = fx_nodes.copy_module(original)
        fx_prepare.prepare(prepared)
        graph = cls(prepared)
        if raise_attention:
            graph.near_misses = fx_raise.raise_attention(graph)
        graph.original = original
        return graph

    def to_module(self) -> fx.GraphModule:
        """The graph as a module of its own, with the original call signature and output structure.

        After `add_output` it returns `(original output, extra, ...)`. Tensors are shared with this graph;
        later edits of the graph do not reach the module. As with torch.export, train() and eval() do not
        change dropout or batch norm: the mode of tracing is written into the graph."""
        return fx_nodes.copy_module(self.module if self.original is None else self.original)

    def to_export(self, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> Any:
        """The graph as a new ExportedProgram; axes that were dynamic stay so. Takes example inputs."""
        module = self.to_module()
        leaves = pytree.tree_leaves((tuple(args), kwargs or {}))
        specs = []
        holders = [n for n in module.graph.nodes if n.op == "placeholder"]
        for node, leaf in zip(holders, leaves):
            value = node.meta.get("val")
            if not isinstance(leaf, torch.Tensor) or not isinstance(value, torch.Tensor):
                specs.append(None)
                continue
            dynamic = {
                i: torch.export.Dim.AUTO for i, s in enumerate(value.shape) if isinstance(s, torch.SymInt)
            }
            specs.append(dynamic)
        structure = pytree.tree_structure((tuple(args), kwargs or {}))
        shapes, named = pytree.tree_unflatten(specs, structure)
        if named:
            names = list(fx_nodes.parameter_names(module, len(args)))
            shapes = {**dict(zip(names, shapes)), **named}
        return torch.export.export(module, tuple(args), kwargs, dynamic_shapes=shapes, strict=False)

    @property
    def edited(self) -> bool:
        """Whether an editing primitive was called since the graph was built."""
        return self.original is None

    def copy(self) -> Self:
        twin = type(self)(fx_nodes.copy_module(self.module))
        twin.original = self.original
        twin.extra_outputs = list(self.extra_outputs)
        twin._input_names, twin._output_names = list(self._input_names), list(self._output_names)
        twin._lengths = dict(self._lengths)
        twin.near_misses = list(self.near_misses)
        return twin

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph eagerly, with the original call signature."""
        runner = self._runner or self.to_module()
        self._runner = runner
        return runner(*args, **kwargs)

    # ---- editing -------------------------------------------------------------------------------------
    def insert(
        self,
        op: str,
        inputs: Sequence[Value | None],
        attrs: dict[str, Any] | None = None,
        *,
        after: Op | None,
    ) -> list[Value]:
        """Insert `torch.ops.elision.<op>` after `after`. Attributes go by name; besides numbers and strings
        they may be a rank-0 Value or a sympy expression over the graph's dynamic lengths."""
        packet = getattr(torch.ops.elision, op, None)
        if packet is None:
            raise ElisionError(f"the dialect has no op {op!r}")
        return self.insert_call(packet.default, inputs, attrs, after=after).outputs

    def insert_call(
        self,
        target: Any,
        inputs: Sequence[Value | None],
        attrs: dict[str, Any] | None = None,
        *,
        after: Op | None,
    ) -> Op:
        """`insert` for any operator overload; host-specific passes use it."""
        graph = self.module.graph
        before = self._next_node(after)
        position = self._position(after)
        named = {}
        for name, value in (attrs or {}).items():
            named[name], position = self._attribute(value, before, position)
        args = tuple(None if v is None else self._node(v) for v in inputs)
        with graph.inserting_before(before):
            node = graph.call_function(target, args, named)
        if after is not None and after.raw in self._regions:
            self._regions[node] = self._regions[after.raw]
        made = self._enter(node, position)
        returns = getattr(getattr(target, "_schema", None), "returns", ())
        for index, value in enumerate(made.outputs):
            if value.raw is None and index < len(returns) and returns[index].name:
                value.name = f"{node.name}_{returns[index].name}"
        return made

    def repeat(self, op: Op, inputs: Sequence[Value | None], *, after: Op | None) -> list[Value]:
        graph = self.module.graph
        with graph.inserting_before(self._next_node(after)):
            node = graph.node_copy(op.raw)
        for path, value in zip(self._paths[op], inputs):
            if value is not None:
                self._set_argument(node, path, self._node(value))
        return self._enter(node, self._position(after)).outputs

    def hoist(self, value: Value, after: Op | None) -> Op | None:
        before = self._next_node(after)
        places = {node: index for index, node in enumerate(self.module.graph.nodes)}
        late: set[fx.Node] = set()
        waiting = [self._node(value)]
        while waiting:
            node = waiting.pop()
            if places[node] >= places[before] and node not in late:
                late.add(node)
                waiting += node.all_input_nodes
        if before in late:  # what stands there already stays there
            before = next(n for n in self.module.graph.nodes if places[n] > places[before] and n not in late)
        moved = sorted(late, key=places.__getitem__)
        for node in moved:
            before.prepend(node)
        self._changed()
        return self._move([self._ops[node] for node in moved if node in self._ops], after)

    def _position(self, after: Op | None) -> int:
        """Where in `ops` an op goes that comes right after `after`."""
        return 0 if after is None else self.ops.index(after) + 1

    def _enter(self, node: fx.Node, position: int) -> Op:
        """Make the op of a call that was just put into the graph; the call goes again when it cannot be made."""
        try:
            node.meta["val"] = self._evaluate(node)
        except Exception as error:
            self.module.graph.erase_node(node)
            raise VerificationError(
                f"{fx_call.target_text(node.target)} cannot take its operands: {fx_nodes.first_line(error)}"
            ) from error
        made = compute_unbacked_bindings(self._mode.shape_env, node.meta["val"])
        if made:
            node.meta["unbacked_bindings"] = made
        self._changed()
        return self._add_op(node, position)

    def _set_argument(self, node: fx.Node, path: fx_call.Path, new: fx.Node) -> None:
        name, place = path
        if isinstance(name, int):
            node.update_arg(name, new)
            return
        argument: Any = new
        if place is not None:
            argument = list(fx_call.Call(node)[name])
            argument[place] = new
        fx_lengths.set_argument(node, name, argument)

    def _attribute(self, value: Any, before: fx.Node, position: int) -> tuple[Any, int]:
        if isinstance(value, Value):
            return self._node(value), position
        if isinstance(value, sympy.Expr):
            argument, created = fx_lengths.expression(value, before)
            for node in created:
                self._add_op(node, position)
                position += 1
            return argument, position
        if isinstance(value, list | tuple):
            items = []
            for item in value:
                argument, position = self._attribute(item, before, position)
                items.append(argument)
            return items, position
        if isinstance(value, np.generic):
            return value.item(), position
        return value, position

    def insert_plain(
        self, kind: str, inputs: Sequence[Value], attrs: dict[str, Any], *, after: Op | None
    ) -> Value:
        targets: dict[str, tuple[Any, dict[str, str]]] = {
            "gather": (torch.ops.aten.index_select.default, {"axis": "dim"}),
            "reshape": (torch.ops.aten.reshape.default, {"shape": "shape"}),
            "expand": (torch.ops.aten.expand.default, {"shape": "size"}),
            "transpose": (torch.ops.aten.permute.default, {"perm": "dims"}),
            "cast": (torch.ops.aten.to.dtype, {"dtype": "dtype"}),
            "matmul": (torch.ops.aten.matmul.default, {}),
            "add": (torch.ops.aten.add.Tensor, {}),
        }
        if kind == "concat":
            return self._concat(inputs, attrs["axis"], after)
        target, names = targets[kind]
        named: dict[str, Any] = {names[name]: value for name, value in attrs.items()}
        if kind == "gather":
            inputs, named = inputs[:1], {**named, "index": inputs[1]}
        elif kind == "cast":
            named["dtype"] = getattr(torch, named["dtype"])
        return self.insert_call(target, inputs, named, after=after).output

    def _concat(self, inputs: Sequence[Value], axis: int, after: Op | None) -> Value:
        graph = self.module.graph
        with graph.inserting_before(self._next_node(after)):
            node = graph.call_function(torch.ops.aten.cat.default, ([self._node(v) for v in inputs], axis))
        return self._enter(node, self._position(after)).output

    def insert_constant(self, array: np.ndarray, name: str) -> Value:
        """A new buffer (not part of the state_dict), on the device of the graph's first tensor."""
        free, tensor = self._new_tensor(array, name)
        self.module.register_buffer(free, tensor, persistent=False)
        return self._attribute_of(free, tensor, "constant")

    def insert_parameter(self, array: np.ndarray, name: str) -> Value:
        """A new parameter of the module, on the device of the graph's first tensor."""
        free, tensor = self._new_tensor(array, name)
        with unset_fake_temporarily():
            parameter = torch.nn.Parameter(tensor)
        self.module.register_parameter(free, parameter)
        return self._attribute_of(free, parameter, "parameter")

    def _new_tensor(self, array: np.ndarray, name: str) -> tuple[str, torch.Tensor]:
        wanted = "".join(c if c.isalnum() or c == "_" else "_" for c in name)
        with unset_fake_temporarily():
            return fx_nodes.free_name(self.module, wanted), fx_nodes.to_tensor(array, self._device())

    def _attribute_of(self, name: str, tensor: torch.Tensor, origin: str) -> Value:
        graph = self.module.graph
        with graph.inserting_before(self._first_call()):
            node = graph.create_node("get_attr", name, name=name)
        node.meta["val"] = self._mode.from_tensor(tensor, static_shapes=True)
        self._changed()
        return self._new_value(node, origin)

    def set_operand(self, op: Op, index: int, value: Value) -> None:
        paths = self._paths[op]
        if index >= len(paths):
            raise ElisionError(f"{op.target} has {len(paths)} operands, there is no operand {index}")
        self._set_argument(op.raw, paths[index], self._node(value))
        self._changed()
        self._describe(op)

    def replace_output(self, index: int, value: Value) -> None:
        leaves = self._output_leaves()
        leaves[self._output_slots[index]] = self._node(value)
        self._set_output_leaves(leaves)
        self.outputs[index] = value

    def add_output(self, value: Value, name: str) -> None:
        """`value` becomes one more result: the module then returns (original output, extra, ...)."""
        output = self._output_node()
        node = self._node(value)
        codegen = self.module.graph._codegen
        info = getattr(codegen, "pytree_info", None)
        if info is not None and info.out_spec is not None:
            old = info.out_spec
            inner = list(old.children_specs) if self.extra_outputs else [old]
            spec = pytree.TreeSpec(tuple, None, [*inner, pytree.LeafSpec()])
            graph_codegen: Any = copy.copy(codegen)
            graph_codegen.pytree_info = info._replace(out_spec=spec)
            self.module.graph.set_codegen(graph_codegen)
            output.args = ((*self._output_leaves(), node),)
        else:
            original: Any = output.args[0]
            output.args = ((*original, node) if self.extra_outputs else (original, node),)
        self.extra_outputs.append(name)
        self._changed()
        self._read_outputs()

    def _set_output_leaves(self, leaves: list[Any]) -> None:
        output = self._output_node()
        spec = pytree.tree_structure(output.args[0], is_leaf=fx_nodes.is_node)
        output.args = (pytree.tree_unflatten(leaves, spec),)
        self._changed()

    def set_length(self, op: Op, axis: int, like: Value, like_axis: int) -> None:
        assert like.shape is not None
        node: fx.Node = op.raw
        length: Any = like.shape[like_axis]
        if not isinstance(length, int):
            length = fx_lengths.length_node(self.module.graph, self._node(like), like_axis, node)
            self._add_op(length, self.ops.index(op))

        def emit(function: Callable[..., Any], *args: Any) -> Any:
            if not any(isinstance(a, fx.Node) for a in args):
                return function(*args)
            with self.module.graph.inserting_before(node):
                made = self.module.graph.call_function(function, args)
            made.meta["val"] = function(*fx.map_arg(args, lambda n: n.meta["val"]))
            self._add_op(made, self.ops.index(op))
            return made

        fx_lengths.state_length(node, axis, length, emit)
        self._changed()
        self._describe(op)

    def refresh(self, op: Op) -> None:
        node: fx.Node = op.raw
        try:
            found = self._evaluate(node)
        except Exception as error:
            raise VerificationError(f"{op!r}: {fx_nodes.first_line(error)}") from error
        node.meta["val"] = found
        node.meta.pop("tensor_meta", None)
        items = found if isinstance(found, list | tuple) else [found]
        if len(items) != len(op.outputs):
            raise VerificationError(f"{op!r}: now has {len(items)} outputs, had {len(op.outputs)}")
        for value, item in zip(op.outputs, items):
            value.shape, value.dtype = fx_nodes.type_of(item)
        for user in node.users:
            if user.target is operator.getitem and user in self._values:
                user.meta["val"] = items[user.args[1]]  # type: ignore[index,call-overload]
                user.meta.pop("tensor_meta", None)
        self._changed()
        self._describe(op)

    def retarget(self, op: Op, overload: Any) -> None:
        """Let another operator with the same arguments compute `op`. Raises VerificationError."""
        op.raw.target = overload
        op.target = fx_call.target_text(overload)
        self.refresh(op)

    def take_apart(self, ops: Sequence[Op]) -> None:
        """Put the ATen of their definitions in the place of dialect ops. The view is built anew: ops and values
        that the caller holds are void."""
        from ...kernels import OPS

        for op in ops:
            if op.target.rpartition(".")[2] not in OPS:
                raise Refused(f"{op.target} cannot be taken apart: its weight was packed for our kernels")
            body = OPS[op.target.rpartition(".")[2]].spelled_out
            fx_rewrite.take_apart(self.module, op.raw, self._mode, body)
        fx_prepare.hoist_constants(self.module)
        fx_prepare.fill_meta(self.module)
        self._changed()
        self._build()

    def remove_op(self, op: Op) -> None:
        """Erase an op whose outputs nobody uses."""
        node: fx.Node = op.raw
        for user in list(node.users):
            if user.target is operator.getitem and not user.users:
                self.module.graph.erase_node(user)
                self._values.pop(user, None)
        self.module.graph.erase_node(node)
        self._forget(op)
        self.ops.remove(op)
        self._changed()

    def _forget(self, op: Op) -> None:
        for value in {id(v): v for v in op.inputs if v is not None}.values():
            value.users[:] = [(o, i) for o, i in value.users if o is not op]
        self._ops.pop(op.raw, None)
        self._values.pop(op.raw, None)
        self._paths.pop(op, None)
        self._regions.pop(op.raw, None)

    def remove_dead(self) -> int:
        """Remove ops that reach no output and write nothing. Checks go when what they check is gone."""
        graph = self.module.graph
        live = fx_nodes.live_nodes(graph)
        dead = [n for n in reversed(graph.nodes) if n not in live and n.op in ("call_function", "get_attr")]
        removed: set[int] = set()
        for node in dead:
            op = self._ops.get(node)
            graph.erase_node(node)
            if op is not None:
                removed.add(id(op))
                self._forget(op)
            self._values.pop(node, None)
        if removed:
            self.ops = [op for op in self.ops if id(op) not in removed]
        if dead:
            self._changed()
        return len(removed)

    def replace_uses(self, old: Value, new: Value, users: Iterable[tuple[Op, int]] | None = None) -> None:
        """Let the given uses of `old` (all of them and the outputs by default) be uses of `new`."""
        every = users is None
        for op, index in list(old.users if users is None else users):
            self.set_operand(op, index, new)
        if every:
            for index, value in enumerate(self.outputs):
                if value is old:
                    self.replace_output(index, new)
