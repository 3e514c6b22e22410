"""Parts of the torch.fx view that change what a graph takes and gives, or run a piece of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import sympy
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import DimDynamic
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from ..errors import ElisionError, Refused
from . import fx_call, fx_lengths, fx_nodes
from .fx_view import FxView
from .graph import Dim, Value

_HINT = 11  # what a new symbolic length counts as where torch wants a number


class FxState(FxView):
    """`FxView` with another signature, new inputs, and evaluation of single values."""

    @property
    def input_names(self) -> list[str]:
        return self._input_names or super().input_names

    @property
    def output_names(self) -> list[str]:
        names = self._output_names or super().output_names[: len(self.outputs) - len(self.extra_outputs)]
        return [*names, *self.extra_outputs]

    # ---- running a part ------------------------------------------------------------------------------
    def evaluate(self, values: Sequence[Value], feeds: Mapping[Value, np.ndarray]) -> list[np.ndarray]:
        module, holders = self._part([self._node(v) for v in values])
        given: dict[fx.Node, np.ndarray] = {v.raw: array for v, array in feeds.items()}
        absent = [n.name for n, needed in holders.items() if needed and n not in given]
        if absent:
            raise ElisionError(f"%{values[0].name} cannot be evaluated without the input %{absent[0]}")
        with unset_fake_temporarily(), torch.no_grad():
            tensors = [
                None if n not in given else fx_nodes.to_tensor(given[n], self._device()) for n in holders
            ]
            try:
                found = module(*tensors)
            except Exception as error:
                raise ElisionError(f"the graph does not run: {fx_nodes.first_line(error)}") from error
            return [fx_nodes.to_array(item) for item in found]

    def _part(self, wanted: Sequence[fx.Node]) -> tuple[fx.GraphModule, dict[fx.Node, bool]]:
        """A module that computes `wanted` from all placeholders, and those, with whether it needs them."""
        needed, queue = set(wanted), list(wanted)
        source = self.module.graph
        for node in source.nodes:
            if node.op == "placeholder" or (node.op == "call_function" and fx_nodes.writes(node)):
                queue.append(node)
                needed.add(node)
        while queue:
            for node in queue.pop().all_input_nodes:
                if node not in needed:
                    needed.add(node)
                    queue.append(node)
        graph, mapped = fx.Graph(), {}
        for node in source.nodes:
            if node in needed:
                mapped[node] = graph.node_copy(node, lambda n: mapped[n])
        graph.output(tuple(mapped[n] for n in wanted))
        holders = {n: bool(mapped[n].users) for n in source.nodes if n.op == "placeholder"}
        return fx.GraphModule(self.module, graph), holders

    # ---- inputs --------------------------------------------------------------------------------------
    def add_input(self, name: str, dtype: str, shape: Sequence[Dim | str]) -> Value:
        graph = self.module.graph
        holders = [n for n in graph.nodes if n.op == "placeholder"]
        sizes = [self._size(dim) for dim in shape]
        with graph.inserting_after(holders[-1]) if holders else graph.inserting_before():
            node = graph.placeholder(_identifier(name))
        with self._mode:
            node.meta["val"] = torch.empty(sizes, dtype=getattr(torch, dtype), device=self._device())
        info = getattr(graph._codegen, "pytree_info", None)
        if info is not None:
            codegen: Any = copy.copy(graph._codegen)
            codegen.pytree_info = _with_argument(info, str(node.target))
            graph.set_codegen(codegen)
        self._changed()
        value = self._new_value(node, "input")
        self.inputs.append(value)
        return value

    def _size(self, dim: Dim | str) -> Any:
        if isinstance(dim, int):
            return dim
        if isinstance(dim, sympy.Expr):
            for node in self.module.graph.nodes:
                found = node.meta.get("val")
                for size in found.shape if isinstance(found, torch.Tensor) else [found]:
                    if isinstance(size, torch.SymInt) and size.node.expr == dim:
                        return size
            raise ElisionError(f"no axis of the graph has the length {dim}")
        if dim not in self._lengths:
            env = self._mode.shape_env
            if env is None:
                raise ElisionError("the graph was traced without symbolic lengths")
            source = ConstantSource(dim)
            symbol = env.create_symbol(_HINT, source, DimDynamic.DYNAMIC, None)
            self._lengths[dim] = env.create_symintnode(symbol, hint=_HINT, source=source)
        return self._lengths[dim]

    # ---- the signature -------------------------------------------------------------------------------
    def set_signature(
        self, inputs: Sequence[tuple[str, Value]], outputs: Sequence[tuple[str, Value]]
    ) -> None:
        graph = self.module.graph
        results = tuple(self._node(v) for _, v in outputs)
        self._output_node().args = (results,)
        graph.set_codegen(CodeGen())
        self.remove_dead()
        kept = [v.raw for _, v in inputs]
        holders = [n for n in graph.nodes if n.op == "placeholder"]
        self._read_lengths_off(kept, {n for n in holders if n not in kept})
        self.remove_dead()
        for node in holders:
            if node not in kept:
                for user in node.users:
                    what = f"{fx_call.target_text(user.target)} (%{user.name})"
                    raise Refused(f"{what} still needs the input %{node.name}")
                graph.erase_node(node)
        for node in reversed(kept):
            first = next(iter(graph.nodes))
            if first is not node:
                first.prepend(node)
        taken = {n.name for n in graph.nodes if n not in kept}
        for name, value in inputs:
            free = _identifier(name)
            while free in taken:
                free += "_"
            taken.add(free)
            value.raw.name = value.raw.target = value.name = free
        self.extra_outputs = []
        self._changed()
        self._input_names = [name for name, _ in inputs]
        self._output_names = [name for name, _ in outputs]
        self._build()

    def _read_lengths_off(self, kept: Sequence[fx.Node], gone: set[fx.Node]) -> None:
        """Let lengths that come from inputs in `gone` be read off inputs in `kept`, where those have them."""
        graph = self.module.graph
        places: dict[Dim, tuple[fx.Node, int]] = {}
        for holder in kept:
            value = holder.meta.get("val")
            for axis, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                places.setdefault(fx_call.as_dim(size), (holder, axis))
        before = self._first_call()
        found: dict[Dim, fx.Node] = {}
        tainted = set(gone)
        for node in list(graph.nodes):
            if node.op != "call_function" or not any(n in tainted for n in node.all_input_nodes):
                continue
            size = node.meta.get("val")
            dim = fx_call.as_dim(size) if isinstance(size, torch.SymInt) else None
            if dim is None or isinstance(dim, int) or dim not in places:
                tainted.add(node)
                continue
            if dim not in found:
                found[dim] = fx_lengths.length_node(graph, *places[dim], before)
            node.replace_all_uses_with(found[dim])

    # ---- lengths -------------------------------------------------------------------------------------
    def fix_length(self, value: Value, axis: int, length: int) -> None:
        assert value.shape is not None
        symbol = value.shape[axis]
        if isinstance(symbol, int):
            if symbol != length:
                raise Refused(f"%{value.name} has length {symbol} along axis {axis}, not {length}")
            return
        if not isinstance(symbol, sympy.Symbol):
            raise Refused(f"%{value.name} has the computed length {symbol} along axis {axis}")
        for node in list(self.module.graph.nodes):
            if node.op == "placeholder":
                self._fix_input(node, symbol, length)
            elif node.op == "call_function" and "val" in node.meta:
                if node.meta.get("unbacked_bindings"):
                    raise Refused(f"%{node.name} has a length that only its data say")
                try:
                    found = self._evaluate(node)
                except Exception as error:
                    raise Refused(
                        f"{fx_call.target_text(node.target)} (%{node.name}) cannot work with {length} along "
                        f"axis {axis} of %{value.name}: {fx_nodes.first_line(error)}"
                    ) from error
                node.meta["val"] = found
                node.meta.pop("tensor_meta", None)
                if isinstance(found, int) and not isinstance(found, bool):
                    node.replace_all_uses_with(found)  # type: ignore[arg-type]
                    self.module.graph.erase_node(node)
        self._changed()
        self._build()

    def _fix_input(self, node: fx.Node, symbol: sympy.Symbol, length: int) -> None:
        fake = node.meta.get("val")
        if not isinstance(fake, torch.Tensor):
            return
        shape = [length if isinstance(s, torch.SymInt) and s.node.expr == symbol else s for s in fake.shape]
        with self._mode:
            node.meta["val"] = torch.empty(shape, dtype=fake.dtype, device=fake.device)


def _with_argument(info: Any, name: str) -> Any:
    """A call signature with one more argument at its end, by position or by name."""
    spec = info.in_spec
    if not (spec.type is tuple and spec.num_children == 2 and spec.child(1).type is dict):
        raise ElisionError(f"the call of this graph cannot be given the argument {name}")
    args, kwargs = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    both = pytree.tree_structure((args, {**kwargs, name: spec.num_leaves}))
    return info._replace(orig_args=[*info.orig_args, name], in_spec=both)


def _identifier(name: str) -> str:
    return "".join(c if c.isalnum() or c == "_" else "_" for c in name)
