"""Example inputs as users give them, brought to the form that tracing and sessions want."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..passes.base import Pass
from ..passes.errors import ElisionError
from ..passes.ir.graph import Dim, Graph, Value

BATCH = 2
"""The length given to a symbolic axis when example inputs have to be made up."""


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(positional, keyword) arguments for a torch module. A dict gives keywords, a tuple or list positions,
    one tensor is one position. Raises ElisionError for anything else."""
    import torch

    if isinstance(example_inputs, Mapping):
        named = {str(k): v for k, v in example_inputs.items()}
        return (), named
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str | bytes):
        return tuple(example_inputs), {}
    kind = type(example_inputs).__name__
    raise ElisionError(f"example_inputs must be a tuple, list or dict of tensors, not {kind}")


def set_apart(example_inputs: Any, passes: Sequence[Pass]) -> tuple[Any, dict[str, np.ndarray]]:
    """(the examples for the model's own inputs, those for inputs that the passes add). Only a dict can have both."""
    if not isinstance(example_inputs, Mapping):
        return example_inputs, {}
    names = {name for single in passes for name in single.new_inputs()}
    added = {str(n): to_array(item, str(n)) for n, item in example_inputs.items() if str(n) in names}
    return {n: item for n, item in example_inputs.items() if str(n) not in added}, added


def feeds_for(graph: Graph, example_inputs: Any) -> dict[str, np.ndarray]:
    """Example inputs of an ONNX graph by input name, checked against its declarations.

    Raises ElisionError, one line, when a name, count, type or length does not fit."""
    wanted = {value.name: value for value in graph.inputs}
    if isinstance(example_inputs, Mapping):
        given = {str(name): item for name, item in example_inputs.items()}
        unknown = [name for name in given if name not in wanted]
        if unknown:
            raise ElisionError(f"no input is called {unknown[0]!r}; the model has {_names(wanted)}")
        missing = [name for name in wanted if name not in given]
        if missing:
            raise ElisionError(f"example input {missing[0]!r} is missing; the model has {_names(wanted)}")
    else:
        items = list(split_inputs(example_inputs)[0]) if not _is_array(example_inputs) else [example_inputs]
        if len(items) != len(wanted):
            raise ElisionError(f"{len(items)} example inputs were given, the model has {_names(wanted)}")
        given = dict(zip(wanted, items))
    feeds: dict[str, np.ndarray] = {}
    lengths: dict[str, tuple[int, str]] = {}
    for name, value in wanted.items():
        array = to_array(given[name], name)
        _check(value, array, lengths)
        feeds[name] = array
    return feeds


def _is_array(item: Any) -> bool:
    return isinstance(item, np.ndarray)


def _names(wanted: Mapping[str, Value]) -> str:
    shown = ", ".join(repr(value)[1:] for value in wanted.values())
    return f"{len(wanted)} input{'s' if len(wanted) != 1 else ''} ({shown})"


def to_array(item: Any, name: str) -> np.ndarray:
    """A tensor, array or number as an array (bfloat16 through ml_dtypes)."""
    import torch

    if isinstance(item, torch.Tensor):
        tensor = item.detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:
            import ml_dtypes

            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()
    try:
        array = np.asarray(item)
    except ValueError as error:
        raise ElisionError(f"example input {name!r} is not an array ({first_line(error)})") from None
    if array.dtype == object:
        raise ElisionError(f"example input {name!r} is a {type(item).__name__}, not an array")
    return array


def _check(value: Value, array: np.ndarray, lengths: dict[str, tuple[int, str]]) -> None:
    where = f"example input {value.name!r}"
    if value.dtype and array.dtype.name != value.dtype:
        raise ElisionError(f"{where} is {array.dtype.name}, the model wants {value.dtype}")
    if value.shape is None:
        return
    if array.ndim != len(value.shape):
        raise ElisionError(f"{where} has {array.ndim} axes, the model wants {len(value.shape)} ({value!r})")
    for axis, (dim, length) in enumerate(zip(value.shape, array.shape)):
        if isinstance(dim, int) or dim.is_Integer:
            if int(dim) != length:
                raise ElisionError(f"{where} is {length} long on axis {axis}, the model wants {dim}")
        elif dim.is_Symbol:
            before = lengths.setdefault(str(dim), (length, value.name))
            if before[0] != length:
                raise ElisionError(
                    f"{where} is {length} long on axis {axis} ({dim}), {before[1]!r} is {before[0]} there"
                )


def made_up_feeds(graph: Graph, batch: int | None = None) -> dict[str, np.ndarray] | None:
    """Inputs for a model whose user gave none: normal noise, zeros for ids, ones for masks. None when the
    rank of an input is not known, or an axis other than the first is symbolic (a guess would hardly be
    valid)."""
    generator = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {}
    for value in graph.inputs:
        if value.shape is None or any(_symbolic(dim) for dim in value.shape[1:]):
            return None
        shape = tuple((batch or BATCH) if _symbolic(dim) else int(dim) for dim in value.shape)
        if int(np.prod(shape)) > 1 << 28:
            return None
        array = made_up(generator, value.dtype, shape)
        if array is None:
            return None
        feeds[value.name] = array
    return feeds


def made_up(generator: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """Noise for floats, ones for booleans, zeros and ones for integers; None for a type without numbers."""
    if dtype == "bfloat16":
        import ml_dtypes

        return generator.standard_normal(shape).astype(ml_dtypes.bfloat16)
    try:
        kind = np.dtype(dtype)
    except TypeError:
        return None
    if kind.kind == "f":
        return generator.standard_normal(shape).astype(kind)
    if kind.kind == "b":
        return np.ones(shape, kind)
    if kind.kind in "iu":
        return generator.integers(0, 2, shape).astype(kind)
    return None


def _symbolic(dim: Dim) -> bool:
    return not (isinstance(dim, int) or dim.is_Integer)


def first_line(error: BaseException, limit: int = 240) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
