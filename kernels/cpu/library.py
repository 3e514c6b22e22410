"""The shared library: where it is, whether it fits, and its structs for ctypes (csrc/elision.h has the originals)."""

from __future__ import annotations

import ctypes
import functools
import os
import weakref
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

ISA = "ELISION_ISA"
"""The environment variable that asks for a variant: avx512, avx2 or portable. Read when the library loads."""

ABI = 7
NAME = "libelision.so"

FLOAT32, UINT8, BOOL, FLOAT16, BFLOAT16 = 1, 2, 9, 10, 16
"""Element types, by ONNX's numbers."""


class Runner(Structure):
    _fields_ = [("run", c_void_p), ("self", c_void_p)]


class Match(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("metric", "size", "slot", "keep", "source")),
        *((name, c_int64) for name in ("batch", "count", "width", "size_batch", "gone")),
        *((name, c_int64) for name in ("r", "numerator", "denominator", "prefix", "suffix")),
        *((name, c_int32) for name in ("dtype", "published")),
    ]


class Mean(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("k", "metric")),
        *((name, c_int64) for name in ("batch", "heads", "tokens", "width")),
        ("k_stride", c_int64 * 3),
        ("dtype", c_int32),
    ]


class Layout(Structure):
    _fields_ = [*((name, c_int64) for name in ("pre", "mid", "width")), ("swapped", c_int32)]


class Merge(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "y", "size", "slot", "keep", "source", "new_size")),
        *((name, c_int64) for name in ("batch", "x_batch", "size_batch", "map_batch")),
        *((name, c_int64) for name in ("count", "left", "gone")),
        ("layout", Layout),
        ("dtype", c_int32),
    ]


class Restore(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("y", "x", "slot")),
        *((name, c_int64) for name in ("batch", "y_batch", "map_batch", "count", "left")),
        ("layout", Layout),
        ("itemsize", c_int32),
    ]


class Attention(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "v", "out", "mask", "mask_offset", "size")),
        *((name, c_int64) for name in ("batch", "heads", "kv_heads", "queries", "keys")),
        *((name, c_int64) for name in ("width", "value_width", "size_batch", "batch_per_size")),
        *((name, c_int64 * 3) for name in ("q_stride", "k_stride", "v_stride", "out_stride", "mask_stride")),
        *((name, c_float) for name in ("scale", "masked")),
        *((name, c_int32) for name in ("causal", "dtype", "mask_dtype")),
    ]


class Pack(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("weight", "scales", "zeros", "packed")),
        *((name, c_int64) for name in ("channels", "width", "group")),
        *((name, c_int32) for name in ("bits", "weight_dtype", "scale_dtype", "zero_dtype")),
    ]


class Linear(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "packed", "bias", "norm", "out", "values", "indices", "spread")),
        *((name, c_int64) for name in ("rows", "width", "channels", "packed_bytes", "k")),
        *((name, c_float) for name in ("eps", "norm_offset")),
        ("dtype", c_int32),
    ]


class Cached(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "v", "out", "key_cache", "value_cache")),
        *(
            (name, c_void_p)
            for name in ("slots", "prefix", "ancestors", "bias", "cos", "sin", "q_norm", "k_norm")
        ),
        *((name, c_int64) for name in ("rows", "heads", "kv_heads", "capacity", "width", "value_width")),
        *((name, c_int64) for name in ("columns", "bias_heads", "bias_length", "turned")),
        *((name, c_int64) for name in ("q_norm_length", "k_norm_length")),
        *((name, c_int64 * 2) for name in ("q_stride", "k_stride", "v_stride", "out_stride")),
        ("window", c_int64),
        *((name, c_float) for name in ("scale", "softcap", "eps", "norm_offset")),
        *((name, c_int32) for name in ("key_bias", "rotary", "cache_dtype")),
    ]


class Gated(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "y", "out")),
        *((name, c_int64) for name in ("rows", "width", "x_stride", "y_stride")),
        ("fn", c_int32),
    ]


class Norm(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "residual", "weight", "out", "total")),
        *((name, c_int64) for name in ("rows", "width")),
        ("eps", c_float),
    ]


_FUNCTIONS: dict[str, type[Structure]] = {
    "elision_match": Match,
    "elision_mean": Mean,
    "elision_merge": Merge,
    "elision_restore": Restore,
    "elision_attention": Attention,
    "elision_cached": Cached,
    "elision_gated": Gated,
    "elision_norm": Norm,
    "elision_pack": Pack,
    "elision_linear": Linear,
}


def library_path() -> Path | None:
    """The built library, None where there is none. Its presence says nothing about whether it loads."""
    path = Path(__file__).parent / NAME
    return path if path.is_file() else None


@functools.cache
def _loaded() -> tuple[Any, str]:
    """(the library, ""), or (None, why not)."""
    path = library_path()
    if path is None:
        return None, "it was not built: there was no C++ compiler when elision was installed"
    try:
        library = ctypes.CDLL(str(path))
        library.elision_abi.restype = c_int
        if library.elision_abi() != ABI:
            return None, f"{path} belongs to another version of elision; install elision again"
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded ({error})"
    for name, struct in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype = c_int
        function.argtypes = [POINTER(struct), POINTER(Runner), c_char_p, c_size_t]
    library.elision_weight_memory.argtypes = [c_size_t]
    library.elision_weight_memory.restype = c_void_p
    library.elision_free_weight.argtypes = [c_void_p]
    library.elision_free_weight.restype = None
    library.elision_packed_bytes.restype = c_int64
    library.elision_packed_bytes.argtypes = [POINTER(Pack)]
    library.elision_own_threads.argtypes = [c_int, POINTER(Runner)]
    library.elision_own_threads.restype = None
    library.elision_borrow_threads.argtypes = [c_void_p]
    library.elision_borrow_threads.restype = None
    for name in ("elision_variant", "elision_variants"):
        getattr(library, name).restype = c_char_p
    wish = os.environ.get(ISA, "")
    if wish and wish != library.elision_variant().decode():
        usable = library.elision_variants().decode()
        return None, f"{ISA}={wish} is not one of this processor's variants ({usable})"
    return library, ""


def available() -> bool:
    """Can the kernels be used here?"""
    return _loaded()[0] is not None


def why_not() -> str:
    """Why they cannot, "" where they can."""
    return _loaded()[1]


def _need() -> Any:
    library, reason = _loaded()
    if library is None:
        raise RuntimeError(f"elision's C++ kernels: {reason}")
    return library


def variant() -> str:
    """The variant in use: "avx512", "avx2" or "portable". Raises RuntimeError without the library."""
    return _need().elision_variant().decode()


def variants() -> list[str]:
    """The variants this processor runs, best first. Raises RuntimeError without the library."""
    return _need().elision_variants().decode().split()


def call(name: str, args: Structure, threads: int) -> None:
    """Run a kernel on at most `threads` threads. Raises ValueError with the kernel's own sentence."""
    library = _need()
    runner, error = Runner(), ctypes.create_string_buffer(256)
    library.elision_own_threads(threads, ctypes.byref(runner))
    if getattr(library, name)(ctypes.byref(args), ctypes.byref(runner), error, len(error)):
        raise ValueError(error.value.decode())


def weight_memory(size: int) -> Any:
    """A ctypes array of `size` bytes in large pages, freed with its last reader. Raises MemoryError."""
    library = _need()
    at = library.elision_weight_memory(size)
    if not at:
        raise MemoryError(f"no room for a weight of {size} bytes")
    memory = (ctypes.c_uint8 * size).from_address(at)
    weakref.finalize(memory, library.elision_free_weight, at)
    return memory


def packed_bytes(args: Pack) -> int:
    """Bytes of a packed weight; 0 where there is none of this kind."""
    return _need().elision_packed_bytes(ctypes.byref(args))


def borrow_threads(openmp: Path) -> bool:
    """Run on the threads of this OpenMP library (GNU's), if the process has loaded it already; else on our own."""
    try:
        address = ctypes.CDLL(str(openmp), mode=os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel
    except (OSError, AttributeError):
        return False
    _need().elision_borrow_threads(ctypes.cast(address, c_void_p))
    return True
