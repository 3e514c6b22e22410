"""Compiled models on the disk: one folder each, in the user's cache folder, written whole or not at all.

A folder's name is a hash of everything that decides what is in it: the model's files, the settings, the versions of
what compiled it, our own code, and the processor where kernels pack weights for it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..passes.errors import ElisionError, ModelFileError
from .table import cache_folder, processor, table_for, vectors, version

FORMAT = 1
ABOUT = "artefact.json"
_PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "gguf", "numpy")


@dataclass(frozen=True)
class Artefact:
    """folder: what was written. about: its artefact.json."""

    folder: Path
    about: dict[str, Any]


def key(digest: str, settings: Mapping[str, Any]) -> str:
    """The name of the folder for a model with this content under these settings."""
    parts = {
        "format": FORMAT,
        "model": digest,
        "settings": dict(settings),
        "versions": {name: version(name) for name in _PACKAGES},
        "code": own_code(),
        "processor": [processor(), vectors()],
        "lowering": table_for("onnx" if settings.get("runtime") == "onnxruntime" else "fx").to_json(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


@functools.cache
def own_code() -> str:
    """A hash of Elision itself, its C++ kernels included: what another version compiled is not taken."""
    total = hashlib.sha256()
    root = Path(__file__).parent
    for folder in (root, root.parent / "passes", root.parent / "kernels"):
        for file in sorted(folder.rglob("*")):
            if file.suffix in (".py", ".so", ".pyd", ".dylib") and "__pycache__" not in file.parts:
                total.update(f"{file.relative_to(folder.parent)} {file.stat().st_size}\n".encode())
                total.update(file.read_bytes())
    return total.hexdigest()


def find(name: str) -> Artefact | None:
    """What was kept under this name, None where there is nothing. A damaged one is removed."""
    folder = cache_folder() / "lm" / name
    if not folder.is_dir():
        return None
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise ValueError("another format")
    except (OSError, ValueError):
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return Artefact(folder, about)


def write(name: str | None, fill: Callable[[Path], dict[str, Any]]) -> Artefact:
    """Lets `fill` write into a temporary folder, and gives it its name: `name` in the cache folder, or none at all
    (None: the caller removes it). `fill` returns what artefact.json says. Raises ElisionError."""
    parent = cache_folder() / "lm" if name is not None else Path(tempfile.gettempdir())
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".elision-" if name is not None else "elision-", dir=parent))
    except OSError as error:
        raise ElisionError(
            f"{parent}: compiled models cannot be kept here ({error.strerror}); --no-cache keeps none"
        ) from None
    try:
        about = fill(temporary) | {"format": FORMAT}
        (temporary / ABOUT).write_text(json.dumps(about, indent=1, default=str), encoding="utf-8")
        if name is None:
            return Artefact(temporary, about)
        final = parent / name
        try:
            os.replace(temporary, final)
        except OSError:
            if not final.is_dir():  # else somebody else was faster, with the same content
                raise
            shutil.rmtree(temporary, ignore_errors=True)
        return Artefact(final, about)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise ModelFileError(f"{parent}: cannot be written to ({error.strerror or error})") from None
        raise
