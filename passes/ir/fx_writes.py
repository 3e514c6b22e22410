"""In-place writes made functional, at the level where composite operators are still whole.

torch's own functionalisation would take `scaled_dot_product_attention` and others apart on the way, so the
graph is rewritten here: a write into a view becomes a new value of the view, and the `*_scatter` calls that
carry it back to the tensor behind it. What is read after the write reads the new values. A write into a
parameter, buffer or input also stays as one `copy_`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from ..errors import ElisionError
from . import fx_call, fx_ops
from .fx_nodes import evaluate, fake_mode_of, free_name

aten = torch.ops.aten

# Kinds whose output may share memory with their input.
_ALIASING = frozenset({"reshape", "transpose", "expand", "split", "unbind", "slice", "select", "tie"})
_MAYBE_ALIASING = frozenset(
    {"aten::to", "aten::type_as", "aten::real", "aten::view_as_real", "aten::diagonal"}
)


def make_functional(module: fx.GraphModule) -> None:
    """Replace every in-place write in `module`; raise ElisionError for one that cannot be undone."""
    writes = [n for n in module.graph.nodes if _written(n)]
    if not writes:
        return
    mode = fake_mode_of(module)
    assert mode is not None
    writer = _Writer(module.graph, mode)
    for node in writes:
        writer.replace(node)
    fold_written_constants(module, mode)


def _written(node: fx.Node) -> list[fx.Node]:
    """The nodes that a call writes into; none for the update of a buffer that stays as it is."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return []
    call = fx_call.Call(node)
    found = [
        call[a.name] for a in target._schema.arguments if a.alias_info is not None and a.alias_info.is_write
    ]
    found = [n for item in found for n in (item if isinstance(item, list | tuple) else [item])]
    nodes = [n for n in found if isinstance(n, fx.Node)]
    if target is aten.copy_.default and _is_state(nodes[0]):
        return []
    return nodes


def _is_state(node: fx.Node) -> bool:
    return node.op in ("get_attr", "placeholder")


class _Writer:
    """Replaces writes one by one, in program order."""

    def __init__(self, graph: fx.Graph, mode: FakeTensorMode) -> None:
        self.graph, self.mode = graph, mode
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.parents: dict[fx.Node, fx.Node] = {}  # view -> the node it is a view of
        self.views: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            self._enter(node)

    def _enter(self, node: fx.Node) -> None:
        parent = self._viewed(node)
        if parent is not None:
            self.parents[node] = parent
            self.views.setdefault(parent, []).append(node)

    def _viewed(self, node: fx.Node) -> fx.Node | None:
        if node.op != "call_function":
            return None
        if node.target is operator.getitem:
            source = node.args[0]
            return source if source in self.parents else None  # type: ignore[return-value]
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
            return None
        if node.target._schema.is_mutable:
            return first  # x.add_() is x
        name = fx_call.target_name(node.target)
        if name not in _MAYBE_ALIASING and fx_ops.describe(node).kind not in _ALIASING:
            return None
        return first if _shares_memory(evaluate(node, self.mode), first.meta.get("val")) else None

    def replace(self, node: fx.Node) -> None:
        """Make one write functional and let all later readers see its result."""
        written = _written(node)
        if len(set(written)) != 1:
            raise ElisionError(f"{node.name}: {fx_call.target_text(node.target)} writes into several tensors")
        target = written[0]
        position = self.order[node]
        later = self._later(node)
        with self.graph.inserting_before(node):
            fresh = self._functional(node, target, position)
            news = {node: fresh, target: fresh}
            # Up: every tensor that the written one is a view of.
            while target in self.parents:
                parent = self.parents[target]
                fresh = self._carry_back(parent, target, fresh, position)
                news[parent] = fresh
                target = parent
            if _is_state(target):
                self._call(aten.copy_.default, (target, fresh), position)
            # Down: every other view of it that is read later.
            self._replay(target, news, later, position)
        for old, new in news.items():
            for user in list(old.users):
                if user in later:
                    user.replace_input_with(old, new)
        self.graph.erase_node(node)
        if node in self.parents:
            self.views[self.parents.pop(node)].remove(node)
        self._reparent(news)

    def _later(self, node: fx.Node) -> set[fx.Node]:
        found, node = set(), node.next
        while node.op != "root":
            found.add(node)
            node = node.next
        return found

    def _reparent(self, news: dict[fx.Node, fx.Node]) -> None:
        """Views made later hang on the new values now."""
        for view, parent in list(self.parents.items()):
            if parent in news and parent not in view.all_input_nodes:
                self.views[parent].remove(view)
                self.parents[view] = news[parent]
                self.views.setdefault(news[parent], []).append(view)

    def _call(self, target: Any, args: tuple[Any, ...], position: int) -> fx.Node:
        made = self.graph.call_function(target, args)
        made.meta["val"] = evaluate(made, self.mode)
        self.order[made] = position
        return made

    def _functional(self, node: fx.Node, target: fx.Node, position: int) -> fx.Node:
        """The value that the write leaves in `target`."""
        old = target.meta["val"]
        if node.target is aten.copy_.default:
            made: fx.Node = node.args[1]  # type: ignore[assignment]
        else:
            twin = fx_ops.functional_twin(node.target)
            if twin is None:
                raise ElisionError(f"{fx_call.target_text(node.target)} has no form that writes nothing")
            made = self.graph.call_function(twin, node.args, node.kwargs)
            made.meta["val"] = evaluate(made, self.mode)
            self.order[made] = position
        if made.meta["val"].dtype != old.dtype:
            made = self._call(aten.to.dtype, (made, old.dtype), position)
        if tuple(made.meta["val"].shape) != tuple(old.shape):
            made = self._call(aten.expand.default, (made, self._sizes(target, position)), position)
        return made

    def _sizes(self, node: fx.Node, position: int) -> list[Any]:
        return [
            size if isinstance(size, int) else self._call(aten.sym_size.int, (node, axis), position)
            for axis, size in enumerate(node.meta["val"].shape)
        ]

    def _carry_back(self, parent: fx.Node, view: fx.Node, fresh: fx.Node, position: int) -> fx.Node:
        """`parent` with the elements of `view` replaced by `fresh`."""
        if view.target is operator.getitem:
            return self._carry_part(view, fresh, position)
        spec = fx_ops.describe(view)
        if spec.kind == "tie" or view.target._schema.is_mutable:  # type: ignore[union-attr]
            return fresh
        if spec.kind == "select":
            args = (parent, fresh, *view.args[1:3])
            return self._call(aten.select_scatter.default, args, position)
        if spec.kind == "slice" and view.target is aten.slice.Tensor:
            return self._call(aten.slice_scatter.default, (parent, fresh, *view.args[1:]), position)
        if spec.kind == "reshape":
            return self._call(aten.reshape.default, (fresh, self._sizes(parent, position)), position)
        if spec.kind == "transpose":
            perm = spec.attrs["perm"]
            return self._call(
                aten.permute.default, (fresh, [perm.index(a) for a in range(len(perm))]), position
            )
        if tuple(view.meta["val"].shape) == tuple(parent.meta["val"].shape) and spec.kind != "unknown":
            return fresh
        raise ElisionError(
            f"a write through {fx_call.target_text(view.target)} ({view.name}) cannot be undone"
        )

    def _carry_part(self, view: fx.Node, fresh: fx.Node, position: int) -> fx.Node:
        parts: fx.Node = view.args[0]  # type: ignore[assignment]
        parent, index = self.parents[parts], int(view.args[1])  # type: ignore[call-overload]
        spec = fx_ops.describe(parts)
        axis = spec.attrs["axis"]
        if spec.kind == "unbind":
            return self._call(aten.select_scatter.default, (parent, fresh, axis, index), position)
        sizes = spec.attrs["sizes"]
        if not all(isinstance(s, int) for s in sizes[: index + 1]):
            raise ElisionError(f"a write into a part of unknown length ({view.name}) cannot be undone")
        start = sum(sizes[:index])
        args = (parent, fresh, axis, start, start + sizes[index])
        return self._call(aten.slice_scatter.default, args, position)

    def _replay(
        self, parent: fx.Node, news: dict[fx.Node, fx.Node], later: set[fx.Node], position: int
    ) -> None:
        """Make the older views of `parent` anew where something later reads them."""
        for view in list(self.views.get(parent, ())):
            if self.order[view] >= position or view in later:
                continue
            if view not in news and self._read_later(view, later):
                fresh = self.graph.node_copy(view, lambda n: news.get(n, n))
                fresh.meta["val"] = view.meta.get("val")
                self.order[fresh] = position
                news[view] = fresh
            if view in news:
                self._replay(view, news, later, position)

    def _read_later(self, view: fx.Node, later: set[fx.Node]) -> bool:
        return any(u in later for u in view.users) or any(
            self._read_later(v, later) for v in self.views.get(view, ())
        )


def _shares_memory(out: Any, source: Any) -> bool:
    if isinstance(out, list | tuple):
        return bool(out) and _shares_memory(out[0], source)
    if not isinstance(out, FakeTensor) or not isinstance(source, FakeTensor):
        return False
    return out.untyped_storage()._cdata == source.untyped_storage()._cdata


# ---- constants ---------------------------------------------------------------------------------------
def fold_written_constants(module: fx.GraphModule, mode: FakeTensorMode) -> None:
    """Compute now what was assembled by writes from no input and no weight (tables of relative positions,
    window masks): the result becomes a buffer, computed by the very same calls."""
    graph = module.graph
    fixed: dict[fx.Node, bool] = {}  # node -> whether a write is behind it
    for node in graph.nodes:
        if node.op != "call_function" or not _is_fixed(node, fixed):
            continue
        spec_kind = "" if node.target is operator.getitem else fx_ops.describe(node).kind
        fixed[node] = spec_kind == "scatter" or any(fixed[n] for n in node.all_input_nodes)
    ends = [
        n
        for n, written in fixed.items()
        if written and isinstance(n.meta["val"], torch.Tensor) and any(u not in fixed for u in n.users)
    ]
    values: dict[fx.Node, Any] = {}
    for node in ends:
        with unset_fake_temporarily(), torch.no_grad():
            tensor = _compute(node, values)
        name = free_name(module, f"folded_{node.name}")
        module.register_buffer(name, tensor, persistent=False)
        with graph.inserting_before(node):
            constant = graph.get_attr(name)
        constant.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
        values[constant] = tensor  # a later table may be made from this one
        node.replace_all_uses_with(constant)
    for node in reversed(list(fixed)):
        if not node.users:
            graph.erase_node(node)


def _is_fixed(node: fx.Node, fixed: dict[fx.Node, bool]) -> bool:
    target = node.target
    if not all(n in fixed for n in node.all_input_nodes):
        return False
    if target is operator.getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    random = torch.Tag.nondeterministic_seeded in target.tags
    return not random and isinstance(node.meta.get("val"), torch.Tensor | list | tuple)


def _compute(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The value of a fixed node; every node is computed once."""
    waiting = [node]
    while waiting:
        top = waiting[-1]
        missing = [n for n in top.all_input_nodes if n not in values]
        if missing:
            waiting += missing
            continue
        waiting.pop()
        if top not in values:
            args, kwargs = fx.map_arg((top.args, top.kwargs), lambda n: values[n])
            values[top] = top.target(*args, **kwargs)  # type: ignore[operator]
    return values[node]
