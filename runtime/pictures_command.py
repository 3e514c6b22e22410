"""`elision generate --image`: photographs from files among the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .lm_photographs import PictureReader, open_photographs
from .lm_source import find
from .lm_vision import dropping

if TYPE_CHECKING:
    from .generate_command import Asked


def with_pictures(asked: Asked, model: str, files: Sequence[Path], drop: str) -> tuple[Asked, dict[str, Any]]:
    """`asked` with the ids of its prompts, each of which has all of the pictures, and what Generator is told of them.
    Raises ElisionError, one line, before anything is compiled."""
    dropping(drop)
    pictures = open_photographs(files)
    reader = PictureReader(find(model))
    chat, system = asked.how["chat"], asked.how["system"]
    read = [reader.read(prompt, pictures, chat=chat, system=system) for prompt in asked.prompts]
    images = [one.images for one in read]
    example = {name: item for name, item in reader.example(pictures[0]).items() if name in images[0]}
    asked = replace(asked, prompts=[one.ids for one in read], how={**asked.how, "images": images})
    return asked, {"images": example, "drop": drop}
