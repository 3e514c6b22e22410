"""Photographs and a prompt as the processor of a model's folder reads them: ids with placeholders, and pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..passes.errors import ElisionError, ModelFileError
from .api import quietly
from .lm_facts import read_json
from .lm_load import load_processor, load_tokenizer
from .lm_source import Source, require

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""What is read: formats that Pillow decodes by itself, without another program."""

PROCESSORS = ("preprocessor_config.json", "processor_config.json")

ALONG = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""What processors say of each token."""


@dataclass(frozen=True)
class Read:
    """A prompt with its pictures. ids: its tokens. images: what the model reads of all of the pictures, by name."""

    ids: list[int]
    images: dict[str, Any]


def open_photographs(paths: Sequence[Path]) -> list[Any]:
    """The pictures in files, in RGB and turned as the camera was. Raises ElisionError, one line, for a file that is
    missing or no picture."""
    require("PIL", "reading pictures")
    from PIL import Image, ImageOps

    found = []
    for path in paths:
        if not path.is_file():
            raise ElisionError(f"{path}: no such file")
        try:
            with Image.open(path, formats=FORMATS) as picture:
                found.append(ImageOps.exif_transpose(picture).convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            why = "" if isinstance(error, Image.UnidentifiedImageError) else f": {error}"
            raise ElisionError(f"{path}: no picture that can be read ({', '.join(FORMATS)}){why}") from None
    return found


class PictureReader:
    """The processor of a folder in Hugging Face format. Raises ModelFileError where it has none."""

    def __init__(self, source: Source) -> None:
        if source.kind != "folder":
            raise ModelFileError(
                f"{source.path}: pictures are read by a folder in Hugging Face format, not by a "
                f"{source.kind.upper()} file"
            )
        if not any((source.path / name).is_file() for name in PROCESSORS):
            raise ModelFileError(
                f"{source.path}: has no {' or '.join(PROCESSORS)}, so its model reads no pictures"
            )
        self.where = str(source.path)
        loaded = load_processor(source)
        self.pixels = getattr(loaded, "image_processor", loaded)
        self.processor = loaded if hasattr(loaded, "image_processor") else None
        self.tokenizer = load_tokenizer(source) if self.processor is None else self.processor.tokenizer
        if self.tokenizer is None:
            raise ModelFileError(f"{source.path}: has no tokenizer")
        self.placeholder, self.mark = self._placeholder(read_json(source.path / "config.json"))

    def _placeholder(self, config: Mapping[str, Any]) -> tuple[int, str]:
        """The id that stands for a picture, and how it is written."""
        mark = getattr(self.processor, "image_token", None)
        if mark is not None:
            mark = str(getattr(mark, "content", mark))
            return int(self.tokenizer.convert_tokens_to_ids(mark)), mark
        for name in ("image_token_id", "image_token_index"):
            if isinstance(config.get(name), int):
                return config[name], str(self.tokenizer.convert_ids_to_tokens(config[name]))
        raise ModelFileError(f"{self.where}: nothing says which token stands for a picture (image_token_id)")

    def example(self, picture: Any) -> dict[str, Any]:
        """What the model reads of one picture, by name."""
        with quietly(f"{self.where}: its image processor cannot read a picture"):
            return self._wanted(self.pixels(images=[picture], return_tensors="pt"))

    def read(self, prompt: str, pictures: Sequence[Any], *, chat: bool, system: str | None) -> Read:
        """A prompt with these pictures. chat: in the folder's chat template, which puts them where it wants them.
        Else they stand where the prompt has their marks, or where the processor puts them, or in front of it. Raises
        ElisionError, one line."""
        if chat:
            return self._said(prompt, pictures, system)
        if self.mark not in prompt:
            found = self._tried(prompt, pictures)
            if found is not None and self.placeholder in found.ids:
                return found
            prompt = self.mark * len(pictures) + prompt
        with quietly(f"{self.where}: its processor does not take this prompt"):
            return self._processed(prompt, pictures)

    def _tried(self, prompt: str, pictures: Sequence[Any]) -> Read | None:
        """The prompt as it is; some processors refuse one without marks."""
        try:
            with quietly("a prompt without marks"):
                return self._processed(prompt, pictures)
        except ElisionError:
            return None

    def _processed(self, text: str, pictures: Sequence[Any]) -> Read:
        if self.processor is None:
            given = self.pixels(images=list(pictures), return_tensors="pt")
            return Read(list(self.tokenizer(text)["input_ids"]), self._wanted(given))
        return self._taken(self.processor(text=text, images=list(pictures), return_tensors="pt"))

    def _said(self, prompt: str, pictures: Sequence[Any], system: str | None) -> Read:
        if self.processor is None or not getattr(self.processor, "chat_template", None):
            raise ElisionError(f"{self.where}: its processor has no chat template: leave --chat away")
        parts = [{"type": "image", "image": one} for one in pictures]
        said = [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]
        if system is not None:
            said.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        with quietly(f"{self.where}: its chat template does not take this prompt"):
            return self._taken(
                self.processor.apply_chat_template(
                    said, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
                )
            )

    def _taken(self, given: Mapping[str, Any]) -> Read:
        return Read(given["input_ids"][0].tolist(), self._wanted(given))

    def _wanted(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All but what is said of the tokens."""
        unused = getattr(self.processor, "unused_input_names", ())
        along = {*self.tokenizer.model_input_names, *ALONG, *unused}
        return {name: item for name, item in given.items() if name not in along}
