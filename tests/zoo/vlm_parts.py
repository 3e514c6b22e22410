"""A vision-language model of the zoo in the parts that exporters make of one, as ONNX files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .export import export, quiet
from .model import Built
from .vlm import VLMS

Dims = Any


@cache
def model(name: str) -> nn.Module:
    return VLMS[name].module()


class Tower(nn.Module):
    """Pictures to the hidden states of the last layer but one, class token included, and what is pooled of them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.tower = model(name).get_submodule("inner.model.vision_tower")

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        found = self.tower(pixel_values, output_hidden_states=True)
        return found.hidden_states[-2], found.pooler_output


class Projector(nn.Module):
    """Hidden states without the class token to features as wide as embeddings."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.projector = model(name).get_submodule("inner.model.multi_modal_projector")

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.projector(hidden_states[:, 1:])


class Vision(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.tower, self.projector = Tower(name), Projector(name)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projector(self.tower(pixel_values)[0])


class Embeddings(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.table = model(name).get_submodule("inner.model.language_model.embed_tokens")

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids)


class Language(nn.Module):
    """Embeddings to logits."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.text = model(name).get_submodule("inner.model.language_model")
        self.head = model(name).get_submodule("inner.lm_head")

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        found = self.text(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        )
        return self.head(found.last_hidden_state)


class Text(nn.Module):
    """Ids and features [images, tokens, C] to logits: the features are written among the embeddings in here."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.embeddings, self.language = Embeddings(name), Language(name)
        self.placeholder = VLMS[name].placeholder

    def forward(
        self, input_ids: Tensor, image_features: Tensor, attention_mask: Tensor, position_ids: Tensor
    ) -> Tensor:
        where = (input_ids == self.placeholder).unsqueeze(-1)
        embeds = self.embeddings(input_ids)
        joined = embeds.masked_scatter(where.expand_as(embeds), image_features.reshape(-1, embeds.shape[-1]))
        return self.language(joined, attention_mask, position_ids)


@dataclass(frozen=True)
class Part:
    module: nn.Module
    args: tuple[Tensor, ...]
    names: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: tuple[Dims, ...]


def parts_of(name: str, *wanted: str, fixed: bool = False) -> dict[str, Part]:
    """The parts of these names; `fixed`: texts and features of one length."""
    ids, mask, pixels = VLMS[name].inputs(2).values()
    positions = torch.arange(ids.shape[1]).expand(2, -1).contiguous()
    images, batch = torch.export.Dim("images", min=1, max=32), torch.export.Dim("batch", min=1, max=32)
    tokens, left = torch.export.Dim("tokens", min=2, max=256), torch.export.Dim("left", min=3, max=128)
    line = {0: batch} if fixed else {0: batch, 1: tokens}
    rows = {0: images} if fixed else {0: images, 1: left}
    with torch.no_grad():
        states = Tower(name)(pixels)[0]
        features = Projector(name)(states)
        embeds = Embeddings(name)(ids)
    every = {
        "vision": Part(Vision(name), (pixels,), ("pixel_values",), ("image_features",), ({0: images},)),
        "tower": Part(
            Tower(name), (pixels,), ("pixel_values",), ("last_hidden_state", "pooled"), ({0: images},)
        ),
        "projector": Part(Projector(name), (states,), ("states",), ("image_features",), (rows,)),
        "embed": Part(Embeddings(name), (ids,), ("input_ids",), ("inputs_embeds",), (line,)),
        "language": Part(
            Language(name),
            (embeds, mask, positions),
            ("inputs_embeds", "attention_mask", "position_ids"),
            ("logits",),
            (line,) * 3,
        ),
        "text": Part(
            Text(name),
            (ids, features, mask, positions),
            ("input_ids", "image_features", "attention_mask", "position_ids"),
            ("logits",),
            (line, rows, line, line),
        ),
    }
    return {part: every[part] for part in wanted}


def part_files(name: str, folder: Path, *wanted: str, fixed: bool = False) -> dict[str, Path]:
    """The ONNX files of these parts, exported the first time they are asked for."""
    files = {part: folder / f"{name}_{part}{'_fixed' if fixed else ''}.onnx" for part in wanted}
    for part, made in parts_of(name, *wanted, fixed=fixed).items():
        if files[part].exists():
            continue
        with quiet():
            program = export(Built(made.module, made.args), made.dynamic)
            names = {"input_names": list(made.names), "output_names": list(made.outputs)}
            onnx = torch.onnx.export(program, dynamo=True, verbose=False, optimize=True, **names)
            assert onnx is not None
            temporary = files[part].with_suffix(f".{os.getpid()}.onnx")
            onnx.save(temporary)
        temporary.replace(files[part])
    return files
