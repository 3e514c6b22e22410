"""The kernels compiled for GPUs that are not there: the launches an op makes, each built for a target and measured."""

from __future__ import annotations

import importlib
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Target:
    """A GPU, and what a program may use of it: bytes of shared memory, registers of a thread."""

    name: str
    gpu: GPUTarget
    shared: int
    registers: int


TARGETS = {
    t.name: t
    for t in (
        Target("cuda80", GPUTarget("cuda", 80, 32), 163 * 1024, 255),
        Target("cuda90", GPUTarget("cuda", 90, 32), 227 * 1024, 255),
        Target("cuda100", GPUTarget("cuda", 100, 32), 227 * 1024, 255),
        Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 * 1024, 512),
    )
}


@dataclass
class Launch:
    """One launch of a tuned kernel."""

    kernel: Any
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.base_fn.__name__

    def configs(self) -> list[triton.Config]:
        """The configurations that the tuning would try for these arguments."""
        prune = self.kernel.early_config_prune
        return prune(self.kernel.configs, {}, **self.arguments) if prune else list(self.kernel.configs)


@dataclass(frozen=True)
class Resources:
    """What one thread and one program need."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


class _Recorder:
    def __init__(self, kernel: Any, found: list[Launch]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: Any) -> Any:
        return lambda **arguments: self.found.append(Launch(self.kernel, arguments))


def launches(op: str, operands: list[tuple[tuple[int, ...], torch.dtype] | None], attrs: Any) -> list[Launch]:
    """What the op would launch for CUDA tensors of these shapes; nothing runs."""
    from elision.kernels.gpu import KERNELS, load

    load()
    found: list[Launch] = []
    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        for name in (*KERNELS, "selection"):
            module = importlib.import_module(f"elision.kernels.gpu.{name}")
            patch.setattr(module, "wrap_triton", lambda kernel: _Recorder(kernel, found))
        tensors = [None if o is None else torch.empty(o[0], dtype=o[1], device="cuda") for o in operands]
        getattr(torch.ops.elision_triton, op)(*tensors, **attrs)
    return found


def build(launch: Launch, config: triton.Config, target: Target, **more: Any) -> Any:
    """The kernel compiled for the target, specialised as a launch would: for lengths that 16 divides, and ones."""
    function = launch.kernel.fn
    given = {**launch.arguments, **config.kwargs}
    if target.gpu.backend == "hip" and "PRECISION" in given:
        given["PRECISION"] = "ieee"
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(function.params):
        value = given[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **more}
    return triton.compile(ASTSource(function, signature, constants, attributes), target.gpu, options)


def resources(compiled: Any) -> Resources:
    """Registers, spills and shared memory as the compiled code states them."""
    shared = compiled.metadata.shared
    if "cubin" in compiled.asm:
        registers, frame = _of_cubin(compiled.asm["cubin"])
        return Resources(registers, frame, shared)
    text = compiled.asm["amdgcn"]

    def stated(key: str) -> int:
        return int(re.search(rf"^\s*\.{key}:\s*(\d+)", text, re.MULTILINE).group(1))  # type: ignore[union-attr]

    # Scalar registers spill into lanes of vector registers, not to memory: no cost worth a failure.
    spilled = max(4 * stated("vgpr_spill_count"), stated("private_segment_fixed_size"))
    return Resources(stated("vgpr_count"), spilled, shared)


# The attributes of `.nv.info` that are read here: (symbol, value) pairs of 32 bits.
_REGISTERS, _FRAME, _SIZED = 0x2F, 0x11, 0x04


def _of_cubin(data: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes of its stack frame) of the one kernel in a CUDA ELF file.

    These kernels have no arrays of their own, so what lies on the stack was spilled."""
    registers, frame = 0, 0
    for attribute, payload in _info(data):
        if attribute == _REGISTERS:
            registers = max(registers, struct.unpack("<II", payload)[1])
        elif attribute == _FRAME:
            frame = max(frame, struct.unpack("<II", payload)[1])
    assert registers, "the file states no register count"
    return registers, frame


def _info(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The sized entries of the section `.nv.info`."""
    (offset,) = struct.unpack_from("<Q", data, 40)
    size, count, names = struct.unpack_from("<HHH", data, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, offset + i * size) for i in range(count)]
    strings = sections[names][4]
    for section in sections:
        start = strings + section[0]
        if data[start : data.index(b"\0", start)] != b".nv.info":
            continue
        at, end = section[4], section[4] + section[5]
        while at < end:
            form, attribute, length = struct.unpack_from("<BBH", data, at)
            at += 4
            if form == _SIZED:
                yield attribute, data[at : at + length]
                at += length
