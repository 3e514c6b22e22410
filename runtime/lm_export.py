"""From a causal language model in PyTorch to its plain graph: token ids in, logits of every position out, no cache."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ..passes.errors import ElisionError
from .api import quietly

LENGTH = 7  # of the example: not 1, which tracing would fix
SOURCE_LENGTH = 5


def plain_causal_graph(
    model: torch.nn.Module,
    source: torch.Tensor | None = None,
    images: Mapping[str, Any] | None = None,
) -> torch.export.ExportedProgram:
    """`model` as an exported program in batches of 1 whose decoder length is dynamic.

    Inputs: `input_ids` int64 [1, S]; of a model whose `config.is_encoder_decoder` is true, its `main_input_name`
    (ids [1, T], T dynamic, or float features of a static shape) and `decoder_input_ids` [1, S]. `source` is an
    example of that main input, needed where it is neither ids nor log-mel features. `images` is what the model reads
    besides the ids, by name: float tensors are inputs of that shape, everything else (sizes, grids) is the same for
    every picture. Output: `logits` [1, S, V].
    `model` is called as transformers' models are, with `use_cache=False`. Weights stay the model's own tensors,
    under their own names behind `model.`.

    Raises ElisionError with one line where torch.export cannot trace the model."""
    inputs: dict[str, torch.Tensor] = {}
    ids = torch.arange(LENGTH)[None] % 3 + 3
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inputs[getattr(model, "main_input_name", "input_ids")] = _source(model) if source is None else source
        inputs["decoder_input_ids"] = ids
    else:
        inputs["input_ids"] = ids
    fixed: dict[str, Any] = {}
    for name, value in (images or {}).items():
        (inputs if is_picture(value) else fixed)[name] = value
    lengths = {
        name: {} if value.is_floating_point() else {1: torch.export.Dim.AUTO}
        for name, value in inputs.items()
    }
    what = f"{type(model).__name__} cannot be traced by torch.export"

    def traced(fixed: Mapping[str, Any]) -> torch.export.ExportedProgram:
        with quietly(what), torch.no_grad(), _unchecked():
            return torch.export.export(
                _Logits(model, list(inputs), fixed).eval(), (), inputs, dynamic_shapes=lengths, strict=False
            )

    listed = plain_numbers(fixed)
    if listed is not None:  # sizes that a model computes with: as tensors they would be unknown to the trace
        with contextlib.suppress(ElisionError):
            return traced(listed)
    return traced(fixed)


def plain_numbers(fixed: Mapping[str, Any]) -> dict[str, Any] | None:
    """Whole numbers in tensors, a few for each picture, as lists of them; None where there are none."""
    found = {
        name: item.tolist() if isinstance(item, torch.Tensor) and item.ndim == 2 else item
        for name, item in fixed.items()
    }
    return found if any(found[name] is not item for name, item in fixed.items()) else None


def is_picture(value: Any) -> bool:
    """Whether this is what differs from picture to picture."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def pictures_of(images: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays and tensors of floats as tensors of float32, other arrays as tensors, everything else as it is."""
    found: dict[str, Any] = {}
    for name, item in images.items():
        if isinstance(item, np.ndarray):
            item = torch.from_numpy(item)
        found[name] = item.to(torch.float32) if isinstance(item, torch.Tensor) and is_picture(item) else item
    return found


@contextlib.contextmanager
def _unchecked() -> Iterator[None]:
    """Without transformers' check that placeholders and image features are as many: its switch, for what is traced."""
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class _Logits(torch.nn.Module):
    """names: of the inputs. They are the signature: how `dynamic_shapes` of **inputs are said depends on torch.
    fixed: what else the model is called with."""

    def __init__(self, model: torch.nn.Module, names: list[str], fixed: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model

        taken = inspect.signature(model.forward).parameters
        any_name = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values())
        kept = {"use_cache": False} if any_name or "use_cache" in taken else {}

        def forward(**inputs: torch.Tensor) -> torch.Tensor:
            return self.model(**inputs, **fixed, **kept).logits

        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward


def _source(model: Any) -> torch.Tensor:
    """An example of an encoder's input."""
    if getattr(model, "main_input_name", "input_ids") == "input_ids":
        return torch.arange(SOURCE_LENGTH)[None] % 3 + 3
    bins = getattr(model.config, "num_mel_bins", None)
    frames = getattr(model.config, "max_source_positions", None)
    if bins is None or frames is None:
        raise ElisionError(f"{type(model).__name__} needs an example of its {model.main_input_name}")
    return torch.zeros(1, bins, 2 * frames)  # its convolutions halve the frames
