"""What an entry of the zoo is, and how its weights and inputs are made."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[int], dict[str, Tensor]]


@dataclass(frozen=True)
class Built:
    """A module in eval mode and one call of it."""

    module: nn.Module
    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor] = field(default_factory=dict)

    def run(self, module: nn.Module | None = None) -> list[Tensor]:
        """Outputs of `module` (default: the original) for this call, as a flat list."""
        with torch.no_grad():
            return pick((module or self.module)(*self.args, **self.kwargs))


@dataclass(frozen=True)
class ZooModel:
    """One small random-weight configuration of a published architecture.

    make: a module; inputs: batch size -> positional inputs by name, in order. `dynamic` holds the axes that
    torch.export may vary, per input. `tokens` is the length of the sequence that the first block sees,
    `blocks` how many blocks see it. `mask` names the padding mask (1 attends), `per_token` says that the
    outputs have one row per token, so that rows of padding are not compared. `strides` are (kernel, stride)
    of the convolutions that make tokens of samples.

    passes: what the breadth tests apply; correlation: what the outputs must still have then, on smooth
    inputs. `whole_length` says that the architecture reads a fixed last position, padding or not: its
    results depend on the padding with no pass at all. `reads_padding`: it also reads the values there.
    `unfused_onnx`: torch.onnx knows this attention only as matmuls.
    """

    name: str
    source: str
    make: Callable[[], nn.Module]
    inputs: Inputs
    tokens: int
    blocks: int
    dynamic: dict[str, tuple[int, ...]] = field(default_factory=dict)
    mask: str = ""
    per_token: bool = False
    architecture: str = ""
    variant: bool = False
    note: str = ""
    strides: tuple[tuple[int, int], ...] = ()
    passes: str = "token-merge{r=2}"
    correlation: float = 0.9
    whole_length: bool = False
    reads_padding: bool = False
    unfused_onnx: bool = False

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode())

    def module(self) -> nn.Module:
        """The module, in eval mode, with weights that depend on the name only."""
        torch.manual_seed(self.seed)
        module = self.make()
        randomise(module, self.seed)
        return module.eval()

    def build(self, batch: int = 2, dtype: torch.dtype = torch.float32) -> Built:
        """The module and one call with `batch` samples; floating inputs and weights are of `dtype`."""
        return self.call(self.module().to(dtype), batch, dtype)

    def call(self, module: nn.Module, batch: int = 2, dtype: torch.dtype = torch.float32) -> Built:
        """The same call for a module that exists already."""
        values = self.inputs(batch).values()
        return Built(module, tuple(v.to(dtype) if v.is_floating_point() else v for v in values))

    def dynamic_shapes(self, *, lengths: bool = False) -> tuple[dict[int, Any], ...]:
        """dynamic_shapes for torch.export: the batch axis, with `lengths` the other dynamic axes too.

        The batch is one named axis over all inputs. With lengths everything is AUTO: export may then find
        that an axis is fixed; that is the model's doing."""
        auto = torch.export.Dim.AUTO
        batch = auto if lengths else torch.export.Dim("batch", min=1, max=32)
        specs: list[dict[int, Any]] = []
        for name in self.inputs(2):
            axes = self.dynamic.get(name, (0,))
            specs.append({axis: auto if axis else batch for axis in axes if axis == 0 or lengths})
        return tuple(specs)


def pick(output: Any) -> list[Tensor]:
    """The tensors of a module's output, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = tuple(output.values())
    return [tensor for part in output if part is not None for tensor in pick(part)]


def randomise(module: nn.Module, seed: int) -> None:
    """Draw every parameter anew so that each part of the model matters.

    Freshly made models hide parts of themselves: gates and position tables are zero, LayerScale is 1e-5,
    matrices so small that attention is flat. A pass that forgets such a part would go unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2 and min(parameter.shape[:2]) > 1:
                fan = parameter[0].numel()
                gain = 1.0 if "embed" in name else 1.4
                parameter.copy_(noise * gain / fan**0.5)
            elif parameter.dim() == 1 and bool((parameter == parameter.flatten()[0]).all()):
                centre = float(parameter.flatten()[0])
                centre = 0.6 if 0 < abs(centre) < 0.5 else centre
                parameter.copy_(centre + 0.1 * noise)
            else:
                parameter.copy_(0.3 * noise)


class Call(nn.Module):
    """Calls a module with its inputs by name and returns plain tensors.

    names: parameter names of the positional inputs; fields: what to take from the output object, in order
    (empty: the output itself); constants: further keyword arguments."""

    def __init__(self, inner: nn.Module, names: str, fields: str = "", **constants: Any) -> None:
        super().__init__()
        self.inner = inner
        self.names = names.split()
        self.fields = fields.split()
        self.constants = constants

    def forward(
        self, a: Tensor, b: Tensor | None = None, c: Tensor | None = None, d: Tensor | None = None
    ) -> Any:
        # Spelt out because torch.export matches dynamic_shapes to parameters, not to *inputs.
        named = dict(zip(self.names, (a, b, c, d)))
        output = self.inner(**named, **self.constants)
        if not self.fields:
            return output
        parts = tuple(getattr(output, f) for f in self.fields)
        return parts[0] if len(parts) == 1 else parts


class MeanPool(nn.Module):
    """Sentence vectors from an encoder: the mean of the tokens that the mask lets through."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.inner(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)


# ---- inputs ----------------------------------------------------------------------------------------------


def smooth_image(batch: int, height: int, width: int, channels: int = 3, seed: int = 0) -> Tensor:
    """[batch, channels, height, width] float32 pictures with large even areas, as photographs have them."""
    samples = []
    for index in range(batch):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        coarse = torch.randn(1, channels, 4, 4, generator=generator)
        fine = nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
        samples.append(fine + 0.02 * torch.randn(1, channels, height, width, generator=generator))
    return torch.cat(samples)


def images(size: int, channels: int = 3, name: str = "pixel_values") -> Inputs:
    return lambda batch: {name: smooth_image(batch, size, size, channels)}


def text(vocabulary: int, length: int, *, eos: int | None = None, runs: int = 2) -> Inputs:
    """Token ids and a right-padded mask; sample i is `2 * i` tokens shorter, at least 6 long.

    Ids come in runs of `runs`, so that neighbours are alike and merging is harmless. Where tokens carry no
    position of their own that would make exact ties, which each host may break in its own way: runs=1."""

    def make(batch: int) -> dict[str, Tensor]:
        ids = torch.zeros(batch, length, dtype=torch.int64)
        mask = torch.zeros(batch, length, dtype=torch.int64)
        for index in range(batch):
            generator = torch.Generator().manual_seed(77 + index)
            count = max(6, length - 2 * index)
            drawn = torch.randperm(vocabulary - 4, generator=generator)[:count] + 3
            ids[index, :count] = drawn.repeat_interleave(runs)[:count]
            ids[index, 0] = 1
            ids[index, count - 1] = 2 if eos is None else eos
            mask[index, :count] = 1
        return {"input_ids": ids, "attention_mask": mask}

    return make
