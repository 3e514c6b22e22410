"""The lowering table of this machine: where it lies on the disk, for what hardware and versions it holds."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

from ..passes.errors import ElisionError
from ..passes.lowering import ONNXRUNTIME, TORCH_CPU, TORCH_CUDA, Table
from ..passes.lowering_defaults import DEFAULTS
from .files import write_text

FORMAT = "elision-lowering-table"
VARIABLE = "ELISION_CACHE"
PACKAGES = {ONNXRUNTIME: ("onnxruntime",), TORCH_CPU: ("torch",), TORCH_CUDA: ("torch", "triton")}
"""The targets that can be measured, and the packages whose versions a measurement holds for."""

LARGEST = 10_000_000
"""Bytes; a table is a few kilobytes."""


def cache_folder() -> Path:
    """ELISION_CACHE, or the folder that the platform has for caches."""
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "elision" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "elision"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elision"


def conditions(target: str) -> dict[str, str]:
    """The hardware and the versions that a measurement for `target` holds for."""
    found = {"target": target, "elision": version("elision")}
    found.update({package: version(package) for package in PACKAGES[target]})
    if target == TORCH_CUDA:
        import torch

        return found | {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none"}
    return found | {"processor": processor(), "vectors": vectors(), "threads": str(threads())}


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def threads() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """The name of the processor, as the system tells it."""
    return next(_cpuinfo("model name"), platform.processor() or platform.machine())


def vectors() -> str:
    """The vector instructions of the processor, the most telling ones only; "" where the system does not say."""
    flags = next(_cpuinfo("flags"), "").split()
    return ", ".join(f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile") if f in flags)


def _cpuinfo(name: str) -> Any:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() == name:
                    yield value.strip()
    except OSError:
        return


def table_file(target: str) -> Path:
    """Where the table of `target` lies for this machine and these versions."""
    key = json.dumps(conditions(target), sort_keys=True)
    return cache_folder() / f"{target}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def save(target: str, table: Table) -> Path:
    """Write what was measured for `target`, whole or not at all. Raises ElisionError."""
    file = table_file(target)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ElisionError(
            f"{file.parent}: cannot be made ({error.strerror}); {VARIABLE} names another"
        ) from None
    document = {"format": FORMAT, "conditions": conditions(target), "table": table.to_json()}
    return write_text(file, json.dumps(document, indent=1) + "\n")


def read(target: str, fallback: Table = DEFAULTS) -> Table:
    """The table in force for `target`: what was measured here, before `fallback`; that alone without a measurement.

    A damaged file counts as none and is told as a warning."""
    file = table_file(target)
    try:
        if not file.is_file():
            return fallback
        if file.stat().st_size > LARGEST:
            raise ValueError("it is far too large")
        document = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError("it is no lowering table")
        found = Table.from_json(document["table"], str(file), fallback)
        if any(entry[1] != target for entry in found.entries):
            raise ValueError("it is for another target")
        return found
    except (OSError, ValueError, KeyError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        warnings.warn(
            f"{file} is damaged ({reason}): the shipped defaults are used; `elision tune-kernels` writes it anew",
            stacklevel=2,
        )
        return fallback


def table_for(host: str) -> Table:
    """The table in force for graphs of `host`, "onnx" or "fx"."""
    if host == "onnx":
        return read(ONNXRUNTIME)
    table = read(TORCH_CPU)
    import torch

    return read(TORCH_CUDA, table) if torch.cuda.is_available() else table
