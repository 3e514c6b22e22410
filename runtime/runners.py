"""Running a graph on example inputs, for the pass manager's numeric check."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..passes.errors import ElisionError, VerificationError
from ..passes.ir.graph import Graph
from .inputs import first_line
from .tensors import tensors_of

Runner = Callable[[Graph], list[np.ndarray]]


@dataclass(frozen=True)
class FxRunner:
    """Runs an FxGraph eagerly, without gradients, random numbers the same every time."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    def __call__(self, graph: Graph) -> list[np.ndarray]:
        import torch
        from torch.utils import _pytree as pytree

        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            try:
                # Copies: a model may write into its inputs.
                given = (tuple(self.args), dict(self.kwargs))
                copies = pytree.tree_map_only(torch.Tensor, torch.clone, given)
                result = graph.run(*copies[0], **copies[1])  # type: ignore[attr-defined]
            except Exception as error:
                raise VerificationError(f"the graph does not run: {first_line(error)}") from error
        leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        return [plain_array(leaf) for leaf in leaves]

    def with_inputs(self, added: Mapping[str, np.ndarray]) -> Runner:
        """The same for a graph that takes inputs of these names besides."""
        return FxRunner(self.args, {**self.kwargs, **tensors_of(added)})


def plain_array(tensor: Any) -> np.ndarray:
    """A tensor as an array; bfloat16 comes as float32."""
    import torch

    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


@dataclass(frozen=True)
class OnnxRunner:
    """Runs an OnnxGraph in plain ONNX Runtime on the CPU."""

    feeds: Mapping[str, np.ndarray]

    def __call__(self, graph: Graph) -> list[np.ndarray]:
        try:
            found = run_model(graph.model, self.feeds)  # type: ignore[attr-defined]
        except ElisionError:
            raise
        except Exception as error:
            raise VerificationError(f"onnxruntime does not run the graph: {first_line(error)}") from error
        return [np.asarray(item) for item in found]

    def with_inputs(self, added: Mapping[str, np.ndarray]) -> Runner:
        """The same for a graph that takes inputs of these names besides."""
        return OnnxRunner({**self.feeds, **added})


@dataclass(frozen=True)
class Remembered:
    """`runner`, with what it found for one graph."""

    runner: OnnxRunner
    graph: Graph
    found: list[np.ndarray]

    def __call__(self, graph: Graph) -> list[np.ndarray]:
        return self.found if graph is self.graph else self.runner(graph)

    def with_inputs(self, added: Mapping[str, np.ndarray]) -> Runner:
        return self.runner.with_inputs(added)


def run_model(model: Any, feeds: Mapping[str, np.ndarray]) -> list[Any]:
    """One run of an onnx_ir model. Above protobuf's limit the model goes through a temporary folder."""
    from ..passes.onnx import io

    session: Any
    if io.weight_bytes(model) <= io.PROTOBUF_LIMIT:
        session = plain_session(io.to_proto(model).SerializeToString())
        return session.run(None, dict(feeds))
    with tempfile.TemporaryDirectory(prefix="elision-") as folder:
        path = Path(folder) / "model.onnx"
        io.save_model(model, path)
        session = plain_session(str(path))
        return session.run(None, dict(feeds))


def plain_session(model: str | bytes, options: Any = None) -> Any:
    """A quiet CPU session with no library of ours."""
    import onnxruntime

    if options is None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
