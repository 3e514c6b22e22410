"""A torch step graph on the disk: its nodes as JSON, its tensors as safetensors. Nothing is pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..passes.errors import ElisionError, ModelFileError
from .fx_json import decode_call, decode_item, encode_call, fetch
from .inputs import first_line
from .lm_source import require

GRAPH, TENSORS = "step.json", "step.safetensors"


def save(module: fx.GraphModule, folder: Path, names: Mapping[str, Any]) -> None:
    """`names`: anything that is to be kept with the graph. Raises ElisionError for a node that JSON cannot say."""
    nodes: list[dict[str, Any]] = []
    tensors: dict[str, torch.Tensor] = {}
    known: dict[tuple[Any, ...], str] = {}
    for node in module.graph.nodes:
        entry: dict[str, Any] = {"name": node.name, "op": node.op}
        if node.op == "get_attr":
            entry["tensor"] = _store(_tensor(module, str(node.target)), tensors, known)
        elif node.op in ("call_function", "output"):
            entry |= encode_call(node)
        elif node.op != "placeholder":
            raise ElisionError(f"{node.name}: a {node.op} node cannot be kept")
        nodes.append(entry)
    require("safetensors", "keeping a torch graph")
    from safetensors.torch import save_file

    save_file(tensors, str(folder / TENSORS))
    (folder / GRAPH).write_text(json.dumps({"nodes": nodes, **names}))


def _tensor(module: fx.GraphModule, path: str) -> torch.Tensor:
    found = fetch(module, path)
    if not isinstance(found, torch.Tensor):
        raise ElisionError(f"{path}: a {type(found).__name__} cannot be kept")
    return found.detach()


def _store(tensor: torch.Tensor, tensors: dict[str, torch.Tensor], known: dict[tuple[Any, ...], str]) -> str:
    """The name under which a tensor is kept; each piece of memory once."""
    key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))
    if tensor.numel() == 0 or key not in known:
        known[key] = name = f"t{len(tensors)}"
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        used = {other.untyped_storage().data_ptr() for other in tensors.values()}
        shared = tensor.untyped_storage().data_ptr() in used
        tensors[name] = (
            tensor if whole and not shared else tensor.clone(memory_format=torch.contiguous_format)
        )
        return name
    return known[key]


def load(folder: Path) -> tuple[fx.GraphModule, dict[str, Any]]:
    """The module and the names kept with it. Raises ModelFileError for files that are not what `save` wrote."""
    require("safetensors", "reading a torch graph")
    from safetensors.torch import load_file

    try:
        data = json.loads((folder / GRAPH).read_text())
        tensors = load_file(str(folder / TENSORS))
        return _rebuild(data.pop("nodes"), tensors), data
    except ModelFileError:
        raise
    except Exception as error:  # a damaged cache fails in any of the parsers below
        raise ModelFileError(f"{folder}: the kept graph cannot be read ({first_line(error)})") from error


def _rebuild(entries: list[dict[str, Any]], tensors: dict[str, torch.Tensor]) -> fx.GraphModule:
    root = torch.nn.Module()
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for name, tensor in tensors.items():
        root.register_buffer(name, tensor)
    for entry in entries:
        match entry["op"]:
            case "placeholder":
                node = graph.placeholder(entry["name"])
            case "get_attr":
                node = graph.get_attr(entry["tensor"])
            case "call_function":
                node = graph.call_function(*decode_call(entry, nodes))
            case _:
                graph.output(decode_item(entry["args"][0], nodes))
                break
        nodes[entry["name"]] = node
    return fx.GraphModule(root, graph).eval()
