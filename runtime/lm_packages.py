"""Models inside installed packages: found in what the installation recorded, joined from parts where need be.

No code of such a package runs. A model that is too large for one package comes in several, whose files are numbered
parts (NAME.gguf.part00, NAME.gguf.part01, ...); the first requires the others.
"""

from __future__ import annotations

import hashlib
import importlib.metadata as metadata
import re
from pathlib import Path

from ..passes.errors import ModelFileError
from .files import write_atomically
from .table import cache_folder

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_PART = re.compile(r"(?P<name>.+\.gguf)[.-]part-?(?P<number>\d+)")
_PIECE = 1 << 20


def is_package_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None


def find_in_package(name: str) -> Path:
    """The model file or folder that the installed package `name` holds; parts are joined in the cache folder.

    Raises ModelFileError for a package that is not installed, holds no model, more than one, or lacks a part."""
    try:
        package = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise ModelFileError(
            f"{name}: no such file, folder or installed package (pip install {name}, if it is one)"
        ) from None
    files = _files(package)
    for ending in (".gguf", ".onnx"):
        found = [file for file in files if file.name.endswith(ending)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ModelFileError(
                f"{name}: the package holds {len(found)} {ending} files; give the path of one"
            )
    folders = {file.parent for file in files if file.suffix == ".safetensors"}
    folders = {folder for folder in folders if (folder / "config.json").is_file()}
    if len(folders) == 1:
        return folders.pop()
    parts = _parts(package, files)
    if parts:
        return _joined(name, package, parts, files)
    raise ModelFileError(f"{name}: the package is installed, but holds no language model")


def _files(package: metadata.Distribution) -> list[Path]:
    recorded = package.files or []
    return [path for path in (Path(str(file.locate())) for file in recorded) if path.is_file()]


def _parts(package: metadata.Distribution, own: list[Path]) -> dict[str, dict[int, Path]]:
    """Numbered pieces by the name of the file they make up, from the package and those it requires."""
    files = list(own)
    for requirement in package.requires or []:
        match = re.match(_NAME, requirement)
        if match is None or "extra ==" in requirement:
            continue
        try:
            files += _files(metadata.distribution(match.group()))
        except metadata.PackageNotFoundError:
            raise ModelFileError(
                f"{package.name}: the package {match.group()} that it requires is missing"
            ) from None
    found: dict[str, dict[int, Path]] = {}
    for file in files:
        match = _PART.fullmatch(file.name)
        if match is not None:
            found.setdefault(match["name"], {})[int(match["number"])] = file
    return found


def _joined(
    name: str, package: metadata.Distribution, parts: dict[str, dict[int, Path]], own: list[Path]
) -> Path:
    if len(parts) > 1:
        raise ModelFileError(f"{name}: the package holds {len(parts)} models; give the path of one")
    (title, pieces), *_ = parts.items()
    first = min(pieces)
    numbers = list(range(first, first + len(pieces)))
    if first not in (0, 1) or sorted(pieces) != numbers:
        raise ModelFileError(f"{name}: parts of {title} are missing (there are {sorted(pieces)})")
    ordered = [pieces[number] for number in numbers]
    expected = _expected(title, own)
    tag = (expected or f"{package.name}-{package.version}")[:32]
    target = cache_folder() / "lm" / "joined" / tag / title
    size = sum(piece.stat().st_size for piece in ordered)
    if target.is_file() and target.stat().st_size == size:
        return target
    total = hashlib.sha256()

    def write(temporary: Path) -> None:
        with temporary.open("wb") as handle:
            for piece in ordered:
                with piece.open("rb") as source:
                    while block := source.read(_PIECE):
                        total.update(block)
                        handle.write(block)
        if expected is not None and total.hexdigest() != expected:
            raise ModelFileError(f"{name}: the joined parts of {title} have another checksum than recorded")

    target.parent.mkdir(parents=True, exist_ok=True)
    return write_atomically(target, write)


def _expected(title: str, files: list[Path]) -> str | None:
    """The checksum of the whole file, where the package carries a list of them."""
    for file in files:
        if file.name.upper() != "SHA256SUMS":
            continue
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            match = re.fullmatch(r"([0-9a-fA-F]{64})\s+\*?(.+)", line.strip())
            if match is not None and match.group(2) == title:
                return match.group(1).lower()
    return None
