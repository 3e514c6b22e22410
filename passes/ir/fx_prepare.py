"""Bring a traced graph into the form the view wants: flat, functional, constants first.

Every step here keeps the numbers to the bit. `prepare` edits the module it is given.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ..errors import ElisionError
from . import fx_ops

_GRAD_REGION = "higher_order::wrap_with_set_grad_enabled"
_AUTOCAST_REGION = "higher_order::wrap_with_autocast"
# Kinds whose output may share memory with their input.
_ALIASING = frozenset({"reshape", "transpose", "expand", "split", "unbind", "slice", "select", "tie", "unknown"})


def prepare(module: fx.GraphModule) -> fx.GraphModule:
    """Inline regions, take composites apart, remove in-place writes, put constants first. In place, except
    that a module which writes through views is retraced; the result is returned in either case."""
    inline_regions(module)
    drop_metadata_checks(module.graph)
    hoist_constants(module)
    fill_meta(module)
    if not make_functional(module):
        module = functionalise(module)
        hoist_constants(module)
        fill_meta(module)
    split_composites(module)
    return module


def fake_mode_of(module: fx.GraphModule) -> FakeTensorMode | None:
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, list | tuple):
            value = next((v for v in value if isinstance(v, torch.Tensor)), None)
        mode = getattr(value, "fake_mode", None)
        if mode is not None:
            return mode
    return None


def fetch(module: torch.nn.Module, path: str) -> Any:
    """The attribute at a dotted path."""
    return operator.attrgetter(path)(module)


# ---- regions -----------------------------------------------------------------------------------------
def inline_regions(module: fx.GraphModule) -> None:
    """Inline `with torch.no_grad()` and `with torch.autocast()` regions, nested ones too.

    A no-grad region becomes its ops followed by `detach` of what leaves it: the same gradients, and an op
    inserted beside it is not caught in it. An autocast region keeps its enter and exit calls."""
    found = True
    while found:
        found = False
        for node in list(module.graph.nodes):
            name = fx_ops.target_name(node.target) if node.op == "call_function" else ""
            if name == _GRAD_REGION:
                enabled, body, *operands = node.args
                leave = None if enabled else torch.ops.aten.detach.default
                _inline(module, node, fetch(module, body.target), operands, leave)
            elif name == _AUTOCAST_REGION:
                device, dtype, enabled, cache, body, *operands = node.args
                with module.graph.inserting_before(node):
                    enter = module.graph.call_function(
                        torch.amp.autocast_mode._enter_autocast, (device, dtype, enabled, cache)
                    )
                _inline(module, node, fetch(module, body.target), operands, None, after=enter)
            else:
                continue
            found = True
    dead = [n for n in module.graph.nodes if n.op == "get_attr" and not n.users]
    for node in dead:
        module.graph.erase_node(node)
    module.delete_all_unused_submodules()


def _inline(
    module: fx.GraphModule,
    node: fx.Node,
    body: fx.GraphModule,
    operands: list[Any],
    leave: Any,
    after: fx.Node | None = None,
) -> None:
    graph = module.graph
    mapped: dict[fx.Node, Any] = {}
    feed = iter(operands)
    results: Any = None
    with graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                mapped[inner] = next(feed)
            elif inner.op == "output":
                results = fx.map_arg(inner.args[0], lambda n: mapped[n])
            elif inner.op == "get_attr":
                name = _free_name(module, inner.target)
                setattr(module, name, fetch(body, inner.target))
                mapped[inner] = graph.get_attr(name)
                mapped[inner].meta = dict(inner.meta)
            else:
                mapped[inner] = graph.node_copy(inner, lambda n: mapped[n])
        if after is not None:
            graph.call_function(torch.amp.autocast_mode._exit_autocast, (after,))
        if leave is not None:

            def detach(result: fx.Node) -> fx.Node:
                value = result.meta.get("val")
                if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                    return result
                outside = graph.call_function(leave, (result,))
                outside.meta = dict(result.meta)
                return outside

            results = fx.map_arg(results, detach)
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(results)
    else:
        for user in list(node.users):
            if user.target is not operator.getitem:
                raise ElisionError(f"cannot inline region {node.name}: {user.name} uses it whole")
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(node)


def _free_name(module: torch.nn.Module, wanted: str) -> str:
    wanted = wanted.replace(".", "_")
    name, count = wanted, 0
    while hasattr(module, name):
        count += 1
        name = f"{wanted}_{count}"
    return name


# ---- order and metadata ------------------------------------------------------------------------------
def drop_metadata_checks(graph: fx.Graph) -> None:
    """Erase the dtype checks that tracing puts before every cast: the verifier compares dtypes itself."""
    for node in list(graph.nodes):
        if node.op == "call_function" and fx_ops.target_name(node.target) == "aten::_assert_tensor_metadata":
            graph.erase_node(node)
        elif node.op == "call_module" and node.target == "_guards_fn":
            graph.erase_node(node)


def hoist_constants(module: fx.GraphModule) -> None:
    """Put every get_attr right after the placeholders, so that a constant can be used anywhere."""
    graph = module.graph
    anchor = next((n for n in graph.nodes if n.op not in ("placeholder", "get_attr")), None)
    if anchor is None:
        return
    late = False
    for node in list(graph.nodes):
        if node is anchor:
            late = True
        elif node.op == "placeholder" and late:
            raise ElisionError(f"placeholder {node.name} comes after an operation")
        elif node.op == "get_attr" and late:
            anchor.prepend(node)


def fill_meta(module: fx.GraphModule) -> None:
    """Give every constant and call that has none its fake value."""
    mode = fake_mode_of(module)
    if mode is None:
        raise ElisionError("the graph carries no fake values (node.meta['val']): trace it with fake tensors")
    for node in module.graph.nodes:
        if "val" in node.meta:
            continue
        if node.op == "get_attr":
            value = fetch(module, node.target)
            if isinstance(value, torch.Tensor):
                node.meta["val"] = mode.from_tensor(value, static_shapes=True)
        elif node.op == "call_function" and fx_ops.target_name(node.target) not in fx_ops.SWITCHES:
            node.meta["val"] = evaluate(node, mode)


def evaluate(node: fx.Node, mode: FakeTensorMode) -> Any:
    """The call's result on its operands' fake values."""
    args = fx.map_arg(node.args, lambda n: n.meta["val"])
    kwargs = fx.map_arg(node.kwargs, lambda n: n.meta["val"])
    with mode, torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


# ---- in-place writes ---------------------------------------------------------------------------------
def make_functional(module: fx.GraphModule) -> bool:
    """Swap in-place calls on values of their own for functional ones. False when one writes through a view,
    or into something that is read again: then the graph must be retraced."""
    for node in list(module.graph.nodes):
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
            continue
        if target is torch.ops.aten.copy_.default and _is_state(node.args[0]):
            continue  # a buffer's update at the end of the graph
        written = [
            node.args[i] if i < len(node.args) else node.kwargs.get(a.name)
            for i, a in enumerate(target._schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write
        ]
        twin = fx_ops.functional_twin(target)
        if not any(isinstance(w, fx.Node) for w in written):
            continue  # optional running statistics that are absent
        if twin is None or len(written) != 1 or not _is_own(written[0], node):
            return False
        node.target = twin
    return True


def _is_state(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op in ("get_attr", "placeholder")


def _is_own(written: Any, writer: fx.Node) -> bool:
    """Whether nothing but `writer` can see the memory of `written`."""
    if not isinstance(written, fx.Node) or written.op != "call_function" or set(written.users) != {writer}:
        return False
    return fx_ops.describe(written).kind not in _ALIASING


def functionalise(module: fx.GraphModule) -> fx.GraphModule:
    """Retrace with torch's functionalisation, at the same level: composites stay whole."""
    from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize

    mode = fake_mode_of(module)
    holders = [n for n in module.graph.nodes if n.op == "placeholder"]
    fakes = [n.meta["val"] for n in holders]
    states = [n for n in module.graph.nodes if n.op == "get_attr"]

    def body(*flat: Any) -> Any:
        env: dict[fx.Node, Any] = dict(zip([*holders, *states], flat))
        result: Any = None
        for node in module.graph.nodes:
            if node in env:
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
            if node.op == "output":
                result = args[0]
            else:
                env[node] = node.target(*args, **kwargs)
        return result

    functional = dispatch_functionalize(body, FunctionalTensorMode(pre_dispatch=True))
    with mode if mode is not None else torch.no_grad():
        traced = make_fx(functional, pre_dispatch=True)(*fakes, *[n.meta["val"] for n in states])
    return _adopt(module, traced, holders, states)


def _adopt(
    module: fx.GraphModule, traced: fx.GraphModule, holders: list[fx.Node], states: list[fx.Node]
) -> fx.GraphModule:
    """The traced body under the original signature: its last placeholders become the original attributes."""
    graph = fx.Graph()
    graph._codegen = module.graph._codegen
    mapped: dict[fx.Node, fx.Node] = {}
    old = iter([*holders, *states])
    root = torch.nn.Module()
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            source = next(old)
            mapped[node] = graph.node_copy(source)
            if source.op == "get_attr":
                _put(root, source.target, fetch(module, source.target))
        elif node.op == "output":
            results = fx.map_arg(node.args[0], lambda n: mapped[n])
            graph.output(results)
        else:
            if node.op == "get_attr":
                _put(root, node.target, fetch(traced, node.target))
            mapped[node] = graph.node_copy(node, lambda n: mapped[n])
    rebuilt = fx.GraphModule(root, graph)
    rebuilt.meta = dict(module.meta)
    rebuilt.train(module.training)
    return rebuilt


def _put(root: torch.nn.Module, path: Any, value: Any) -> None:
    *folders, name = path.split(".")
    for folder in folders:
        if not hasattr(root, folder):
            root.add_module(folder, torch.nn.Module())
        root = getattr(root, folder)
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        root.register_buffer(name, value)
    else:
        setattr(root, name, value)


# ---- composites --------------------------------------------------------------------------------------
def split_composites(module: fx.GraphModule) -> None:
    """Replace the composite operators in `fx_ops.TAKEN_APART` by the operators that they run as, and an
    indexing by several tensors by one gather for each axis where that is the same."""
    mode = fake_mode_of(module)
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if fx_ops.target_name(node.target) in fx_ops.TAKEN_APART:
            _take_apart(module, node, mode)


def _take_apart(module: fx.GraphModule, node: fx.Node, mode: FakeTensorMode | None) -> None:
    sources: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda n: sources.append(n) or n)
    sources = list(dict.fromkeys(sources))

    def call(*values: Any) -> Any:
        given = dict(zip(sources, values))
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: given[n])
        return node.target(*args, **kwargs)  # type: ignore[operator]

    with mode if mode is not None else torch.no_grad(), torch.no_grad():
        traced = make_fx(call)(*[s.meta["val"] for s in sources])
    mapped: dict[fx.Node, Any] = {}
    feed = iter(sources)
    result: Any = None
    with module.graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                mapped[inner] = next(feed)
            elif inner.op == "output":
                result = mapped[inner.args[0]]
            elif inner.target is torch.ops.aten.detach.default:
                mapped[inner] = mapped[inner.args[0]]
            else:
                mapped[inner] = module.graph.node_copy(inner, lambda n: mapped[n])
    node.replace_all_uses_with(result)
    module.graph.erase_node(node)
