"""Composite operators and indexing brought into the forms that have an axis signature, to the bit."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from . import fx_call, fx_ops
from .fx_nodes import evaluate, fake_mode_of, fetch, free_name, same_length

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten._unsafe_view.default)
_RESHAPES = (aten.reshape.default, aten.unsqueeze.default)


def rewrite(module: fx.GraphModule) -> None:
    """Take apart the composites of `fx_ops.TAKEN_APART`, and turn indexing by several tensors and `gather`
    into what they amount to: nothing (all rows in order), or one `index_select` for each axis."""
    mode = fake_mode_of(module)
    assert mode is not None
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        name = fx_call.target_name(node.target)
        if node.target in _VIEWS:
            # The same elements; and it goes on working when a pass changes the strides that come in.
            node.args, node.kwargs = (*node.args, *node.kwargs.values()), {}
            node.target = aten.reshape.default
        elif name in fx_ops.TAKEN_APART:
            take_apart(module, node, mode)
        elif name in ("aten::index", "aten::_unsafe_index"):
            _Rewriter(module.graph, node, mode).index()
        elif name == "aten::gather":
            _Rewriter(module.graph, node, mode).gather()
        elif name == "aten::index_put":
            _Rewriter(module.graph, node, mode).index_put()


def take_apart(
    module: fx.GraphModule, node: fx.Node, mode: FakeTensorMode, body: Callable[..., Any] | None = None
) -> None:
    """Put what `body` (None: the target itself) does on the node's arguments in the node's place.

    Below autograd without a body; with one, at the level of torch.export, where linear or attention stay whole."""
    run = node.target if body is None else body
    sources: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda n: sources.append(n) or n)
    sources = list(dict.fromkeys(sources))

    def call(*values: Any) -> Any:
        given = dict(zip(sources, values))
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: given[n])
        return run(*args, **kwargs)  # type: ignore[operator]

    with mode, torch.no_grad(), enable_python_dispatcher():
        traced = make_fx(call, pre_dispatch=body is not None)(*[s.meta["val"] for s in sources])
    mapped: dict[fx.Node, Any] = {}
    feed = iter(sources)
    result: Any = None
    with module.graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                mapped[inner] = next(feed)
            elif inner.op == "output":
                result = fx.map_arg(inner.args[0], lambda n: mapped[n])
            elif inner.target is aten.detach.default:
                mapped[inner] = mapped[inner.args[0]]
            elif inner.op == "get_attr":
                mapped[inner] = _constant(module, fetch(traced, str(inner.target)))
            else:
                copied = mapped[inner] = module.graph.node_copy(inner, lambda n: mapped[n])
                mapped[inner] = _Rewriter(module.graph, copied, mode).move()
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(result[user.args[1]])
            module.graph.erase_node(user)
    module.graph.erase_node(node)


def _constant(module: fx.GraphModule, tensor: torch.Tensor) -> fx.Node:
    """A constant that a definition holds, as a buffer of the module. Its fake value comes with `fill_meta`."""
    name = free_name(module, "constant")
    module.register_buffer(name, tensor, persistent=False)
    return module.graph.create_node("get_attr", name, name=name)


class _Rewriter:
    """Rewrites one indexing call; leaves it alone where nothing simpler is provably the same."""

    def __init__(self, graph: fx.Graph, node: fx.Node, mode: FakeTensorMode) -> None:
        self.graph, self.node, self.mode = graph, node, mode

    def call(self, target: Any, *args: Any) -> fx.Node:
        with self.graph.inserting_before(self.node):
            made = self.graph.call_function(target, args)
        made.meta["val"] = evaluate(made, self.mode)
        return made

    def finish(self, result: fx.Node) -> None:
        self.node.replace_all_uses_with(result)
        self.graph.erase_node(self.node)

    def index_put(self) -> None:
        """One value written where a mask as large as the whole is true: a choice between the two, place by place."""
        call = fx_call.Call(self.node)
        x, indices, values = call["self"], call["indices"], call["values"]
        if len(indices) != 1 or not isinstance(indices[0], fx.Node) or call["accumulate"]:
            return
        whole, mask, value = (n.meta["val"] for n in (x, indices[0], values))
        # A mask of as many axes is as long on each: index_put takes no other.
        if mask.dtype != torch.bool or mask.dim() != whole.dim() or value.dim() != 0:
            return
        if value.dtype == whole.dtype:
            self.finish(self.call(aten.where.self, indices[0], values, x))

    def sizes(self, node: fx.Node) -> list[Any]:
        shape = node.meta["val"].shape
        return [
            s if isinstance(s, int) else self.call(aten.sym_size.int, node, axis)
            for axis, s in enumerate(shape)
        ]

    def move(self) -> fx.Node:
        """Einsum's moves without its axes of length 1: a permutation of those alone is a reshape, others go
        before the unsqueeze that made them, and of two reshapes in a row one is left."""
        node = self.node
        source: Any = node.args[0] if node.args else None
        if node.target in _VIEWS:
            node.target = aten.reshape.default
        if node.target is aten.permute.default and isinstance(source, fx.Node):
            perm = [int(a) % len(node.args[1]) for a in node.args[1]]  # type: ignore[union-attr, arg-type]
            while source.target is aten.permute.default:
                inner: Any = source.args[1]
                perm = [int(inner[a]) % len(perm) for a in perm]
                node.args = (source.args[0], perm)
                source = source.args[0]
            if perm == sorted(perm):
                return self.replaced(source)
            shape = source.meta["val"].shape
            moved = [a for a in perm if not (isinstance(shape[a], int) and shape[a] == 1)]
            if moved == sorted(moved):
                sizes = self.sizes(source)
                lengths = [sizes[a] for a in perm]
                return self.replaced(self.call(aten.reshape.default, source, lengths))
            if source.target is aten.unsqueeze.default:
                return self.replaced(self._permute_first(source, perm))
        while node.target is aten.reshape.default and source.target in _RESHAPES:
            behind: Any = source.args[0]
            node.replace_input_with(source, behind)
            source = behind
        return node

    def _permute_first(self, unsqueezed: fx.Node, perm: list[int]) -> fx.Node:
        inner: Any = unsqueezed.args[0]
        axis = int(unsqueezed.args[1]) % len(perm)  # type: ignore[call-overload]
        rest = [a - (a > axis) for a in perm if a != axis]
        moved = _Rewriter(self.graph, self.call(aten.permute.default, inner, rest), self.mode).move()
        return self.call(aten.unsqueeze.default, moved, perm.index(axis))

    def replaced(self, result: fx.Node) -> fx.Node:
        self.graph.erase_node(self.node)
        return result

    def index(self) -> None:
        x: Any = self.node.args[0]
        indices: Any = self.node.args[1]
        at = [i for i, index in enumerate(indices) if index is not None]
        if len(at) < 2 or at != list(range(at[0], at[-1] + 1)):
            return
        if not all(fx_call.integer_index(indices[i]) for i in at):
            return
        used = [indices[i] for i in at]
        if self._outer(x, at[0], used):
            return
        shape = x.meta["val"].shape
        if len(used) == 2 and _is_range(used[0], shape[at[0]]) and at[0] == 0:
            self._pick(x, used[1])

    def _outer(self, x: fx.Node, first: int, used: list[fx.Node]) -> bool:
        """x[i, j] whose indices vary along different axes, in order: each axis is picked from by itself."""
        out_rank = max(len(u.meta["val"].shape) for u in used)
        varying: list[int | None] = []
        for index in used:
            shape = index.meta["val"].shape
            axes = [
                a + out_rank - len(shape) for a, s in enumerate(shape) if not (isinstance(s, int) and s == 1)
            ]
            if len(axes) > 1:
                return False
            varying.append(axes[0] if axes else None)
        order = [a for a in varying if a is not None]
        if len(order) < len(varying) or order != sorted(set(order)):
            return False
        shape = list(x.meta["val"].shape)
        broadcast: list[Any] = [1] * out_rank
        result = x
        for offset, (index, axis) in enumerate(zip(used, order)):
            if not _is_range(index, shape[first + offset]):
                flat = self.call(aten.reshape.default, index, [-1])
                result = self.call(aten.index_select.default, result, first + offset, flat)
            broadcast[axis] = self.sizes(result)[first + offset]
        lengths = self.sizes(result)
        sizes = [*lengths[:first], *broadcast, *lengths[first + len(used) :]]
        self.finish(self.call(aten.reshape.default, result, sizes))
        return True

    def _pick(self, x: fx.Node, index: fx.Node) -> None:
        """x[range, index]: one position of axis 1 for each sample."""
        if len(index.meta["val"].shape) != 1 or index.meta["val"].dtype != torch.int64:
            return
        rank = len(x.meta["val"].shape)
        sizes = self.sizes(x)
        column = self.call(aten.reshape.default, index, [sizes[0], *[1] * (rank - 1)])
        wide = self.call(aten.expand.default, column, [sizes[0], 1, *sizes[2:]])
        # An index may count from the end, `gather` may not.
        low = self.call(aten.lt.Scalar, wide, 0)
        turned = self.call(aten.add.Tensor, wide, sizes[1])
        wide = self.call(aten.where.self, low, turned, wide)
        picked = self.call(aten.gather.default, x, 1, wide)
        self.finish(self.call(aten.squeeze.dim, picked, 1))

    def gather(self) -> None:
        """gather whose other axes are all of length 1 is an index_select."""
        x, axis, index = self.node.args[:3]
        assert isinstance(x, fx.Node) and isinstance(index, fx.Node)
        rank = len(x.meta["val"].shape)
        if self.node.kwargs.get("sparse_grad") or rank == 0:
            return
        axis = int(axis) % rank  # type: ignore[call-overload]
        for value in (x, index):
            lengths = [s for a, s in enumerate(value.meta["val"].shape) if a != axis]
            if not all(isinstance(s, int) and s == 1 for s in lengths):
                return
        flat = self.call(aten.reshape.default, index, [-1])
        self.finish(self.call(aten.index_select.default, x, axis, flat))


def _is_range(index: fx.Node, length: Any) -> bool:
    """Whether the elements of `index` are 0, 1, ... length-1, in this order."""
    node: Any = index
    while isinstance(node, fx.Node) and node.op == "call_function":
        name = fx_call.target_name(node.target)
        call = fx_call.Call(node)
        if name in ("aten::add", "aten::sub") and isinstance(call["other"], int) and call["other"] == 0:
            node = node.args[0]
        elif name == "aten::arange":
            start = call["start"] if call.has("start") else 0
            step = call["step"] if call.has("step") else None
            whole = start == 0 and step in (None, 1) and not node.meta["val"].is_floating_point()
            return whole and same_length(node.meta["val"].shape[0], length)
        elif name in ("aten::to", "aten::_to_copy", "aten::clone") or fx_ops.describe(node).kind == "reshape":
            if node.meta["val"].dtype not in (torch.int64, torch.int32):
                return False
            node = node.args[0]
        else:
            return False
    return False
