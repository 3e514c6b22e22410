"""What `--model` names: a folder, a GGUF file, an ONNX file, or an installed package that holds one of them."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..passes.errors import ModelFileError

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
"""Endings of files that only an unpickler reads; none is ever read."""

_SMALL = 64 * 1024 * 1024  # bytes above which a file of a folder is no tokenizer or configuration


@dataclass(frozen=True)
class Source:
    """A causal language model somewhere on the disk.

    kind: "folder" (Hugging Face format), "gguf" or "onnx". path: the folder or the file. files: everything that decides
    what the model computes and how text becomes ids, in alphabetical order; `digest` covers them."""

    kind: str
    path: Path
    files: tuple[Path, ...]

    @property
    def folder(self) -> Path:
        """Where the tokenizer's files are, if there are any."""
        return self.path if self.kind == "folder" else self.path.parent

    def digest(self) -> str:
        """A hash of the names and contents of `files`. Raises ModelFileError where one cannot be read."""
        total = hashlib.sha256()
        for file in self.files:
            try:
                with file.open("rb") as handle:
                    content = hashlib.file_digest(handle, "sha256").hexdigest()
            except OSError as error:
                raise ModelFileError(f"{file}: cannot be read ({error.strerror})") from None
            total.update(f"{file.name} {content}\n".encode())
        return total.hexdigest()


def find(target: str | os.PathLike[str]) -> Source:
    """The model that a path or the name of an installed package stands for.

    A package is never imported: its files are found in what its installation recorded. Raises ModelFileError, one
    line, for what is none of these."""
    path = Path(target)
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{target}: not a path ({error})") from None
    if exists:
        return from_path(path)
    from .lm_packages import find_in_package, is_package_name

    text = os.fspath(target)
    if not is_package_name(text):
        raise ModelFileError(f"{path}: no such file or folder")
    return from_path(find_in_package(text))


def from_path(path: Path) -> Source:
    """The model in a folder or file. Raises ModelFileError where there is none, or none that is safe to read."""
    if path.is_dir():
        return _folder(path)
    ending = path.suffix.lower()
    if ending in PICKLES:
        raise ModelFileError(f"{path}: pickled weights are not read, they can run any code; safetensors are")
    if ending == ".safetensors":
        raise ModelFileError(f"{path}: weights alone; give the folder that has config.json beside them")
    if ending == ".gguf" or (ending != ".onnx" and _starts_with(path, b"GGUF")):
        return Source("gguf", path, (path,))
    if ending == ".onnx":
        return Source("onnx", path, (path, *_beside(path)))
    raise ModelFileError(f"{path}: neither a GGUF file, an ONNX file nor a folder in Hugging Face format")


def _folder(path: Path) -> Source:
    names = sorted(entry for entry in path.iterdir() if entry.is_file())
    weights = [file for file in names if file.suffix == ".safetensors"]
    if (path / "config.json").is_file():
        if not weights:
            pickled = [file.name for file in names if file.suffix in PICKLES]
            why = f"only pickled ones ({pickled[0]}), which are not read" if pickled else "none at all"
            raise ModelFileError(f"{path}: has no .safetensors weights, {why}")
        return Source("folder", path, (*weights, *_described(names)))
    for ending in (".gguf", ".onnx"):
        found = [file for file in names if file.suffix == ending]
        if len(found) == 1:
            return from_path(found[0])
        if found:
            raise ModelFileError(f"{path}: has {len(found)} {ending} files; give one of them")
    raise ModelFileError(f"{path}: no config.json, so not a model in Hugging Face format")


def _described(files: list[Path]) -> list[Path]:
    """Configuration and tokenizer files."""
    wanted = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
    return [file for file in files if file.suffix in wanted and file.stat().st_size < _SMALL]


def _beside(path: Path) -> list[Path]:
    """External data and tokenizer files of an ONNX file."""
    data = [path.with_name(path.name + ending) for ending in (".data", "_data")]
    folder = sorted(entry for entry in path.parent.iterdir() if entry.is_file())
    return [*[file for file in data if file.is_file()], *_described(folder)]


def _starts_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as handle:
            return handle.read(len(magic)) == magic
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror})") from None


def require(module: str, what: str) -> Any:
    """Import an optional dependency. Raises ModelFileError, with the way to install it, where it is missing."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise ModelFileError(f"{what} takes the package {module}: pip install 'elision[lm]'") from None
