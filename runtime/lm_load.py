"""Models and tokenizers through transformers, from local files only: no hub, no pickles, no code of theirs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..passes.errors import ElisionError, ModelFileError
from .inputs import first_line
from .lm_checkpoints import is_quantized, load_quantized
from .lm_facts import read_json
from .lm_source import Source, require

_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
    "vocab.txt",
    "tokenizer_config.json",
)


def load_tokenizer(source: Source) -> Any:
    """The tokenizer of a source, None where it has none (ids only). Raises ModelFileError."""
    if source.kind != "gguf":
        return tokenizer_in(source.folder)
    transformers = _transformers()
    require("gguf", "reading GGUF files")
    with _quietly(f"{source.path}: its tokenizer cannot be read"):
        return transformers.AutoTokenizer.from_pretrained(
            str(source.folder), gguf_file=source.path.name, local_files_only=True, trust_remote_code=False
        )


def tokenizer_in(folder: Path) -> Any:
    """The tokenizer whose files lie in a folder, None where there are none."""
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        return None
    with _quietly(f"{folder}: its tokenizer cannot be read"):
        return _transformers().AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )


def load_processor(source: Source) -> Any:
    """What makes ids and pixels of a prompt with pictures, from the files of a folder; its image processor alone where
    there is no more. Raises ModelFileError."""
    transformers = _transformers()
    options = {"local_files_only": True, "trust_remote_code": False}
    with _quietly(f"{source.path}: its processor cannot be read"):
        try:
            found = transformers.AutoProcessor.from_pretrained(str(source.folder), **options)
        except (ValueError, KeyError, TypeError):  # no class is known for the whole
            found = None
        if not hasattr(found, "image_processor"):
            found = transformers.AutoImageProcessor.from_pretrained(str(source.folder), **options)
        return found


def load_module(source: Source, pictures: bool = False) -> tuple[Any, list[Any]]:
    """(the model of a folder or GGUF file as an nn.Module in float32, in evaluation mode; the matrices that a GPTQ or
    AWQ folder keeps in few bits). pictures: of a folder, one that reads pictures. Raises ModelFileError."""
    transformers = _transformers()
    import torch

    options = {"local_files_only": True, "trust_remote_code": False, "dtype": torch.float32}
    if source.kind == "gguf":
        require("gguf", "reading GGUF files")
        require("accelerate", "loading GGUF files with transformers")
        options["gguf_file"] = source.path.name
        auto = transformers.AutoModelForCausalLM
    else:
        options["use_safetensors"] = True
        auto = _auto_class(transformers, source, pictures)
    kept: list[Any] = []
    with _quietly(f"{source.path}: the model cannot be loaded"):
        if is_quantized(source):
            module, kept = load_quantized(source, auto)
            return module.eval().requires_grad_(False), kept
        module, told = auto.from_pretrained(str(source.folder), output_loading_info=True, **options)
    missing = sorted(told.get("missing_keys", ()))
    if missing:
        raise ModelFileError(f"{source.path}: {len(missing)} weights are missing, {missing[0]} among them")
    return module.eval().requires_grad_(False), kept


def _auto_class(transformers: Any, source: Source, pictures: bool) -> Any:
    """The class of loaders for what config.json describes."""
    config = read_json(source.path / "config.json")
    if not config.get("model_type"):
        raise ModelFileError(f"{source.path}: config.json names no model_type")
    if pictures:
        return transformers.AutoModelForImageTextToText
    names = config.get("architectures") or [""]
    if config.get("is_encoder_decoder"):
        speech = "Speech" in names[0] or config["model_type"] == "whisper"
        return transformers.AutoModelForSpeechSeq2Seq if speech else transformers.AutoModelForSeq2SeqLM
    if names[0].endswith("ForMaskedLM"):
        return transformers.AutoModelForMaskedLM
    return transformers.AutoModelForCausalLM


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Into an artefact, so that it need not be made from a GGUF file again."""
    with _quietly("the tokenizer cannot be kept"):
        tokenizer.save_pretrained(str(folder))


def _transformers() -> Any:
    return require("transformers", "loading language models")


@contextlib.contextmanager
def _quietly(what: str) -> Iterator[None]:
    """Loaders print bars and warnings; what stops them is one line."""
    transformers = _transformers()
    bars, level = (
        transformers.utils.logging.is_progress_bar_enabled(),
        logging.getLogger("transformers").level,
    )
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    try:
        yield
    except ElisionError:
        raise
    except ImportError as error:
        raise ModelFileError(
            f"{what}: a package is missing ({first_line(error)}); pip install 'elision[lm]'"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # loaders raise whatever their parsers do
        raise ModelFileError(f"{what} ({first_line(error)})") from error
    finally:
        logging.getLogger("transformers").setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
