"""Helpers on the nodes of an fx graph: copies, fake types, differences, liveness."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true
from torch.utils import _pytree as pytree
from torch.utils._sympy.symbol import SymT, symbol_is_type

from ..errors import VerificationError
from . import fx_call, fx_ops
from .graph import Dim, Shape, Value

NUMBER_DTYPES = {
    torch.SymInt: "int64",
    int: "int64",
    torch.SymFloat: "float64",
    float: "float64",
    torch.SymBool: "bool",
    bool: "bool",
}


def is_node(item: Any) -> bool:
    return isinstance(item, fx.Node)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy whose nodes keep their names and fake values; tensors are not copied."""
    twin = fx.Graph(tracer_cls=graph._tracer_cls)
    twin._codegen = copy.copy(graph._codegen)
    mapped: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapped[node] = twin.node_copy(node, lambda n: mapped[n])
    return twin


def copy_module(module: fx.GraphModule) -> fx.GraphModule:
    """A module with a copy of the graph, over the same tensors."""
    twin = fx.GraphModule(module, copy_graph(module.graph))
    twin.train(module.training)
    return twin


def drop_guards(graph: fx.Graph) -> None:
    """Erase the call of torch.export's module of input guards."""
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            graph.erase_node(node)


def type_of(value: Any) -> tuple[Shape | None, str]:
    if isinstance(value, torch.Tensor):
        return fx_call.as_shape(value), fx_call.dtype_name(value.dtype)
    return ((), NUMBER_DTYPES[type(value)]) if type(value) in NUMBER_DTYPES else (None, "none")


def to_tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of the array as a tensor, ml_dtypes' bfloat16 too."""
    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).to(device)
    return torch.from_numpy(array.copy()).to(device)


def to_array(item: Any) -> np.ndarray:
    """A tensor or number as an array in host memory; bfloat16 as ml_dtypes'."""
    if not isinstance(item, torch.Tensor):
        return np.asarray(item)
    tensor = item.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def follow_region(region: list[tuple[Any, ...]], node: fx.Node, name: str) -> None:
    if name.endswith("_enter_autocast"):
        region.append(tuple(node.args))
    elif name.endswith("_exit_autocast"):
        region.pop()


def attribute_text(value: Any) -> str:
    if isinstance(value, Value):
        return f"%{value.name}"
    if isinstance(value, tuple):
        return "[" + ", ".join(attribute_text(v) for v in value) + "]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def parameter_names(module: fx.GraphModule, count: int) -> list[str]:
    info = getattr(module.graph._codegen, "pytree_info", None)
    if info is not None:
        return [n for n in info.orig_args if n != "self"][:count]
    return [n.target for n in module.graph.nodes if n.op == "placeholder"][:count]


def same_length(a: Dim | Any, b: Dim | Any) -> bool:
    return a is b or statically_known_true(a == b)


def difference(stored: Any, found: Any) -> str:
    """What differs between two fake results, "" when nothing does."""
    if isinstance(stored, list | tuple):
        if not isinstance(found, list | tuple) or len(stored) != len(found):
            return "the number of outputs changed"
        return next((d for d in map(difference, stored, found) if d), "")
    if isinstance(stored, torch.Tensor):
        if not isinstance(found, torch.Tensor):
            return "is no tensor any more"
        if stored.dtype != found.dtype:
            return f"dtype is {fx_call.dtype_name(found.dtype)}, recorded {fx_call.dtype_name(stored.dtype)}"
        if len(stored.shape) != len(found.shape) or not all(map(same_length, stored.shape, found.shape)):
            return f"shape is {list(found.shape)}, recorded {list(stored.shape)}"
    return ""


def writes(node: fx.Node) -> bool:
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    if fx_call.target_name(node.target) in fx_ops.SWITCHES:
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    live: set[fx.Node] = set()
    checks: list[fx.Node] = []
    for node in reversed(graph.nodes):
        if node.op == "call_function" and fx_call.target_name(node.target) in fx_ops.CHECKS:
            checks.append(node)
        elif node in live or writes(node):
            live.add(node)
            live.update(node.all_input_nodes)
    for check in checks:
        numbers = scalar_chain(check)
        tensors = {n for s in numbers for n in s.all_input_nodes if n not in numbers}
        if tensors <= live | {n for n in tensors if n.op in ("placeholder", "get_attr")}:
            live |= numbers | tensors
    return live


def scalar_chain(check: fx.Node) -> set[fx.Node]:
    """The check and the arithmetic on numbers that feeds it."""
    found, queue = {check}, [check]
    while queue:
        for node in queue.pop().all_input_nodes:
            if node not in found and fx_call.is_symbolic_number(node.meta.get("val")):
                found.add(node)
                queue.append(node)
    return found


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


def free_name(module: torch.nn.Module, wanted: str) -> str:
    wanted = wanted.replace(".", "_")
    name, count = wanted, 0
    while hasattr(module, name):
        count += 1
        name = f"{wanted}_{count}"
    return name


def evaluate(node: fx.Node, mode: FakeTensorMode) -> Any:
    """The call's result on its operands' fake values."""
    args = fx.map_arg(node.args, lambda n: n.meta["val"])
    kwargs = fx.map_arg(node.kwargs, lambda n: n.meta["val"])
    # With symbolic lengths composites must run torch's Python kernels: those in C++ read lengths as numbers.
    symbolic = mode.shape_env is not None and _has_symbols((args, kwargs))
    with mode, torch.no_grad(), enable_python_dispatcher() if symbolic else nullcontext():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _has_symbols(arguments: Any) -> bool:
    for leaf in pytree.tree_leaves(arguments):
        if isinstance(leaf, torch.SymInt):
            return True
        if isinstance(leaf, torch.Tensor) and any(isinstance(s, torch.SymInt) for s in leaf.shape):
            return True
    return False


@contextmanager
def unpinned(env: ShapeEnv | None) -> Iterator[None]:
    """Raise VerificationError when what runs inside fixes a dynamic length or ties two together, and put the
    knowledge about lengths back as it was: it is shared by all copies of a graph."""
    if env is None:
        yield
        return
    replacements, ranges, guards = dict(env.replacements), dict(env.var_to_range), len(env.guards)
    yield
    fresh = [s for s in env.replacements if s not in replacements and symbol_is_type(s, SymT.SIZE)]
    if not fresh:
        return
    symbol, value = fresh[0], env.replacements[fresh[0]]
    env.replacements.clear()
    env.replacements.update(replacements)
    env.var_to_range.clear()
    env.var_to_range.update(ranges)
    del env.guards[guards:]
    env._update_version_counter()
    if hasattr(
        env, "_replacements_version_counter"
    ):  # torch 2.14: lengths remember what they were replaced by
        env._replacements_version_counter += 1
    raise VerificationError(f"the dynamic length {symbol} would be fixed to {value}")
