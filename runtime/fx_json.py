"""A flat torch.fx graph as JSON and back, without pickle.

Functions are named, never imported: an operator of torch.ops, or one of the few plain functions in PLAIN.
Tensors are kept by type and shape; small ones with their data, large ones are made up again on reading.
Symbolic lengths become the lengths of the example.
"""

from __future__ import annotations

import contextlib
import math
import operator
from typing import Any

import numpy as np
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_arg

from ..kernels.kernel import NAMESPACES, TORCH_CPU, TORCH_CUDA
from ..passes.errors import ElisionError

EMBED = 4096
"""Elements of a constant above which its data is not kept."""

PLAIN: dict[str, Any] = {
    f"operator.{name}": getattr(operator, name)
    for name in ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow")
}
PLAIN |= {f"operator.{name}": getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
PLAIN |= {f"torch.{name}": getattr(torch, name) for name in ("sym_max", "sym_min", "sym_float", "sym_int")}
PLAIN |= {"torch.sym_not": torch.sym_not, "math.floor": math.floor, "math.ceil": math.ceil}
_NAMES = {function: name for name, function in PLAIN.items()}

_KINDS: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


# ---- writing -------------------------------------------------------------------------------------------
def encode(module: fx.GraphModule) -> dict[str, Any]:
    """The nodes of `module`. Raises ElisionError for what JSON cannot say (higher-order operators,
    objects)."""
    nodes: list[dict[str, Any]] = []
    for node in module.graph.nodes:
        entry: dict[str, Any] = {"name": node.name, "op": node.op}
        if node.op == "placeholder":
            entry["value"] = _encode_value(node.meta.get("val"))
            entry["origin"] = node.meta.get("elision_origin", "input")
        elif node.op == "get_attr":
            entry["value"] = _encode_value(fetch(module, str(node.target)), data=True)
        elif node.op in ("call_function", "output"):
            entry |= encode_call(node)
        else:
            raise ElisionError(f"{node.name}: a {node.op} node cannot be put into a reproducer")
        nodes.append(entry)
    return {"nodes": nodes, "training": module.training}


def encode_call(node: fx.Node) -> dict[str, Any]:
    """What a call, or the output, of a graph takes, and of a call what is called."""
    entry: dict[str, Any] = {"args": [encode_item(item) for item in node.args]}
    if node.op == "call_function":
        entry["target"] = encode_target(node.target)
        entry["kwargs"] = {key: encode_item(item) for key, item in node.kwargs.items()}
    return entry


def fetch(module: fx.GraphModule, path: str) -> Any:
    """What a get_attr node of this target reads."""
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    return found


def encode_target(target: Any) -> str:
    if target in _NAMES:
        return _NAMES[target]
    if isinstance(target, torch._ops.OpOverload):
        return f"ops.{target.namespace}.{target._opname}.{target._overloadname}"
    raise ElisionError(f"{target}: this function cannot be put into a reproducer")


def _encode_value(value: Any, *, data: bool = False) -> Any:
    if not isinstance(value, torch.Tensor):
        return {"number": _hint(value)} if value is not None else None
    entry: dict[str, Any] = {
        "dtype": str(value.dtype).removeprefix("torch."),
        "shape": [_hint(length) for length in value.shape],
        "parameter": isinstance(value, torch.nn.Parameter),
    }
    small = value.numel() <= EMBED if data else False
    if small and not value.is_complex() and not hasattr(value, "fake_mode"):
        entry["data"] = [encode_item(item) for item in value.detach().cpu().flatten().tolist()]
    return entry


def _hint(length: Any) -> Any:
    if isinstance(length, torch.SymInt | torch.SymFloat | torch.SymBool):
        if not length.node.has_hint():
            raise ElisionError("a length that depends on data cannot be put into a reproducer")
        return length.node.hint
    return length


def encode_item(item: Any) -> Any:
    if item is None or isinstance(item, bool | int | str):
        return item
    if isinstance(item, float):
        return item if math.isfinite(item) else {"float": str(item)}
    if isinstance(item, fx.Node):
        return {"node": item.name}
    if isinstance(item, tuple | list):
        return {"tuple" if isinstance(item, tuple) else "list": [encode_item(one) for one in item]}
    if isinstance(item, dict):
        return {"dict": {str(key): encode_item(one) for key, one in item.items()}}
    if isinstance(item, slice):
        return {"slice": [encode_item(one) for one in (item.start, item.stop, item.step)]}
    if isinstance(item, torch.device):
        return {"device": str(item)}
    for name, kind in _KINDS.items():
        if isinstance(item, kind):
            return {name: str(item).removeprefix("torch.")}
    raise ElisionError(f"a {type(item).__name__} cannot be put into a reproducer")


# ---- reading -------------------------------------------------------------------------------------------
def decode(data: dict[str, Any]) -> fx.GraphModule:
    """The graph again, with fake values on its nodes. Raises ElisionError when the data is not such a
    graph."""
    root = torch.nn.Module()
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    values: dict[str, Any] = {}
    # Shapes depend on nothing that is computed, so a fake run gives every node its value.
    with FakeTensorMode() as mode, torch.no_grad():
        for index, entry in enumerate(data["nodes"]):
            name, op = str(entry["name"]), entry["op"]
            if op == "placeholder":
                node = graph.placeholder(name)
                node.meta["elision_origin"] = str(entry.get("origin", "input"))
                value = _decode_value(entry["value"], index)
                value = mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            elif op == "get_attr":
                value = _decode_value(entry["value"], index)
                setattr(root, f"weight_{index}", _attribute(value, entry["value"]))
                node = graph.get_attr(f"weight_{index}")
                value = mode.from_tensor(value)
            elif op == "call_function":
                node = graph.call_function(*decode_call(entry, nodes))
                fakes = map_arg((node.args, node.kwargs), lambda n: values[n.name])
                value = node.target(*fakes[0], **fakes[1])  # type: ignore[operator]
            elif op == "output":
                graph.output(decode_item(entry["args"][0], nodes))
                break
            else:
                raise ElisionError(f"{name}: unknown sort of node {op!r} in the reproducer")
            node.meta["val"] = values[node.name] = value
            nodes[name] = node
    module = fx.GraphModule(root, graph)
    module.train(bool(data.get("training", False)))
    return module


def decode_call(
    entry: dict[str, Any], nodes: dict[str, fx.Node]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The function, args and kwargs of a call."""
    args = tuple(decode_item(item, nodes) for item in entry["args"])
    kwargs = {str(key): decode_item(item, nodes) for key, item in entry["kwargs"].items()}
    return decode_target(str(entry["target"])), args, kwargs


def _attribute(value: torch.Tensor, entry: dict[str, Any]) -> torch.Tensor:
    parameter = bool(entry.get("parameter")) and value.is_floating_point()
    return torch.nn.Parameter(value) if parameter else value


def decode_target(name: str) -> Any:
    if name in PLAIN:
        return PLAIN[name]
    parts = name.split(".")
    found = None
    if len(parts) == 4 and parts[0] == "ops" and all(part.isidentifier() for part in parts):
        _register(parts[1])
        packet = getattr(getattr(torch.ops, parts[1]), parts[2], None)
        found = getattr(packet, parts[3], None)
    if not isinstance(found, torch._ops.OpOverload):
        raise ElisionError(f"the reproducer calls {name!r}, which is not an operator here")
    return found


def _register(namespace: str) -> None:
    """Ours are operators as soon as their modules are loaded, and a kept graph may be the first to ask for one."""
    from ..kernels import cpu, gpu  # which registers the definitions

    if namespace == NAMESPACES[TORCH_CPU] and cpu.available():
        cpu.kernels()
    elif namespace == NAMESPACES[TORCH_CUDA]:
        with contextlib.suppress(ModuleNotFoundError):  # without Triton none is an operator
            gpu.load()


def _decode_value(entry: Any, seed: int) -> Any:
    if entry is None:
        return None
    if "number" in entry:
        return entry["number"]
    dtype = getattr(torch, str(entry["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise ElisionError(f"the reproducer has a tensor of the unknown type {entry['dtype']!r}")
    shape = tuple(int(length) for length in entry["shape"])
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        if "data" in entry:
            return torch.tensor([decode_item(item, {}) for item in entry["data"]], dtype=dtype).reshape(shape)
        generator = np.random.default_rng(seed)
        if dtype.is_floating_point:
            return torch.from_numpy(np.asarray(generator.standard_normal(shape) * 0.02)).to(dtype)
        return torch.from_numpy(np.asarray(generator.integers(0, 2, shape))).to(dtype)


def decode_item(item: Any, nodes: dict[str, fx.Node]) -> Any:
    if not isinstance(item, dict):
        return item
    ((kind, inner),) = item.items()
    if kind == "node":
        return nodes[str(inner)]
    if kind in ("list", "tuple"):
        decoded = [decode_item(one, nodes) for one in inner]
        return tuple(decoded) if kind == "tuple" else decoded
    if kind == "dict":
        return {key: decode_item(one, nodes) for key, one in inner.items()}
    if kind == "slice":
        return slice(*(decode_item(one, nodes) for one in inner))
    if kind == "float":
        return float(inner)
    if kind == "device":
        return torch.device("cpu" if "cpu" in str(inner) else str(inner))
    found = getattr(torch, str(inner), None)
    if kind in _KINDS and isinstance(found, _KINDS[kind]):
        return found
    raise ElisionError(f"the reproducer holds an unknown {kind} {inner!r}")
