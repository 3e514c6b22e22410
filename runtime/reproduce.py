"""Reproducers: a failing pass, its options and the graph it got, in one JSON file that replays it.

A file holds data only: an ONNX message in base64, or the nodes of a torch graph as lists. Nothing in it is
unpickled, imported or evaluated. Weights above EMBED bytes are left out and made up again, the same each
time.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..passes.base import PassContext
from ..passes.errors import ElisionError
from ..passes.ir.graph import Graph
from .files import check_target, write_text
from .inputs import first_line, made_up, made_up_feeds
from .runners import FxRunner, OnnxRunner, Runner
from .tensors import read_tensors

FORMAT = "elision-reproducer"
EMBED = 1 << 16
"""Bytes of a weight above which only its type and shape are kept."""

FLOATS = (1, 10, 11, 16)
"""ONNX's numbers for float32, float16, float64 and bfloat16."""

LARGEST = 1 << 28
"""Bytes of a reproducer that we are willing to read, and of what it unpacks to."""


@dataclass(frozen=True)
class Outcome:
    """What a replay gave. `same`: the pass failed in the same way as it did when the file was written."""

    failing_pass: str
    expected: tuple[str, str]
    found: tuple[str, str] | None

    @property
    def same(self) -> bool:
        return self.found is not None and self.found[0] == self.expected[0]

    def lines(self) -> list[str]:
        then = f"{self.failing_pass} failed with {self.expected[0]}: {self.expected[1]}"
        if self.found is None:
            return [then, "now it does not fail"]
        if self.found == self.expected:
            return [then, "it fails the same way now"]
        return [then, f"now it fails with {self.found[0]}: {self.found[1]}"]

    def to_json(self) -> dict[str, Any]:
        found = None if self.found is None else {"error_type": self.found[0], "error": self.found[1]}
        return {
            "failing_pass": self.failing_pass,
            "expected": {"error_type": self.expected[0], "error": self.expected[1]},
            "found": found,
            "same": self.same,
        }


# ---- writing -------------------------------------------------------------------------------------------
def write(error: ElisionError, path: str | os.PathLike[str], *, source: object = "") -> Path:
    """Write what it takes to run the failing pass of `error` again. `error` is one that the pass manager
    raised; ElisionError when it is not, or when `path` cannot be written."""
    facts, graph = getattr(error, "reproducer", None), getattr(error, "graph", None)
    if facts is None or graph is None:
        raise ElisionError("this error does not come from a pass, so there is nothing to reproduce")
    file = check_target(path)
    document = {**facts, "source": str(source), "graph": encode_graph(graph), "text": graph.text()}
    return write_text(file, json.dumps(document, indent=1))


def encode_graph(graph: Graph) -> dict[str, Any]:
    """A graph as plain data. Raises ElisionError when it has a part that cannot be said in JSON."""
    if graph.host == "onnx":
        return _encode_onnx(graph)
    from . import fx_json

    return {"host": "fx"} | fx_json.encode(graph.module)  # type: ignore[attr-defined]


def _encode_onnx(graph: Any) -> dict[str, Any]:
    from ..passes.onnx import io

    proto = io.to_proto(graph.model)
    kept, left_out = [], []
    for tensor in proto.graph.initializer:
        if len(tensor.raw_data) > EMBED and tensor.data_type in FLOATS:
            left_out.append({"name": tensor.name, "dtype": tensor.data_type, "shape": list(tensor.dims)})
        else:
            kept.append(tensor)
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    data = proto.SerializeToString()
    packed = base64.b64encode(zlib.compress(data, 6)).decode("ascii")
    return {"host": "onnx", "model": packed, "made_up_weights": left_out}


# ---- reading -------------------------------------------------------------------------------------------
def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The document of a reproducer file. Raises ElisionError, one line, for anything that is not one."""
    file = Path(path)
    try:
        if file.stat().st_size > LARGEST:
            raise ElisionError(f"{file}: too large for a reproducer")
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ElisionError(f"{file}: no such file") from None
    except OSError as error:
        raise ElisionError(f"{file}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise ElisionError(f"{file}: not a reproducer ({first_line(error, 80)})") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ElisionError(f"{file}: not a reproducer (no format {FORMAT!r})")
    for key in ("pipeline", "failing_pass", "error_type", "error"):
        if not isinstance(document.get(key), str):
            raise ElisionError(f"{file}: a broken reproducer ({key!r} is missing)")
    return document


def decode_graph(data: Any) -> tuple[Graph, Runner | None]:
    """The graph of a reproducer and a runner on made-up inputs. Raises ElisionError when it is broken."""
    host = data.get("host") if isinstance(data, dict) else None
    try:
        if host == "onnx":
            return _decode_onnx(data)
        if host == "fx":
            return _decode_fx(data)
    except ElisionError:
        raise
    except Exception as error:
        raise ElisionError(f"the reproducer's graph is broken ({first_line(error, 120)})") from error
    raise ElisionError("the reproducer has no graph")


def _decode_onnx(data: dict[str, Any]) -> tuple[Graph, Runner | None]:
    import onnx

    from .api import open_onnx

    unpacker = zlib.decompressobj()
    raw = unpacker.decompress(base64.b64decode(data["model"], validate=True), LARGEST)
    if not unpacker.eof:
        raise ElisionError("the reproducer's model is too large, or cut off")
    proto = onnx.ModelProto()
    proto.ParseFromString(raw)
    generator = np.random.default_rng(0)
    for entry in data.get("made_up_weights", []):
        shape = tuple(int(d) for d in entry["shape"])
        dtype = onnx.helper.tensor_dtype_to_np_dtype(int(entry["dtype"]))
        array = np.asarray(generator.standard_normal(shape) * 0.02).astype(dtype)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, str(entry["name"])))
    graph = open_onnx(proto)
    feeds = made_up_feeds(graph)
    return graph, OnnxRunner(feeds) if feeds is not None else None


def _decode_fx(data: dict[str, Any]) -> tuple[Graph, Runner | None]:
    import torch

    from ..passes.ir.fx import FxGraph
    from . import fx_json

    graph = FxGraph.from_module(fx_json.decode(data))
    generator = np.random.default_rng(0)
    arguments: list[Any] = []
    for node in graph.module.graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            arguments.append(value)
            continue
        dtype = "float32" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")
        array = made_up(generator, dtype, tuple(int(d) for d in value.shape))
        if array is None:
            return graph, None
        arguments.append(torch.from_numpy(np.ascontiguousarray(array)).to(value.dtype))
    return graph, FxRunner(arguments, {})


# ---- replaying -----------------------------------------------------------------------------------------
def replay(path: str | os.PathLike[str]) -> Outcome:
    """Run the failing pass of a reproducer again. Raises ElisionError when the file is not one, or when the
    pass is not registered here (a pass of your own: import its module and call this function)."""
    from ..passes.manager import run_pipeline
    from ..passes.pipeline import parse

    document = read(path)
    passes = parse(document["pipeline"])
    graph, runner = decode_graph(document.get("graph"))
    asked = document.get("context")
    asked = asked if isinstance(asked, dict) else {}
    context = PassContext(
        force=bool(asked.get("force", False)),
        target=str(asked.get("target", "torch")),
        want_map=bool(asked.get("want_map", False)),
        read_arrays=read_tensors,
    )
    expected = (document["error_type"], document["error"])
    try:
        run_pipeline(graph, passes, context=context, runner=runner)
    except ElisionError as error:
        facts = getattr(error, "reproducer", None) or {}
        found = (facts.get("error_type", type(error).__name__), facts.get("error", str(error)))
        return Outcome(document["failing_pass"], expected, found)
    return Outcome(document["failing_pass"], expected, None)
