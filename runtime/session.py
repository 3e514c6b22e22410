"""ONNX Runtime sessions, with our kernels registered where they are built."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..passes.errors import ElisionError, ModelFileError
from .inputs import first_line


def kernel_library() -> Path | None:
    """The library of custom ops for ONNX Runtime, None where it was not built or does not load here.

    Every file we write runs without it, through the function bodies inside."""
    from ..kernels import cpu

    return cpu.library_path() if cpu.available() else None


def session(
    path: str | os.PathLike[str] | bytes,
    sess_options: Any = None,
    providers: Sequence[Any] | None = None,
    **onnxruntime_options: Any,
) -> Any:
    """An onnxruntime.InferenceSession for `path` (a file, or a serialised model), our kernels registered if
    built.

    Arguments go to InferenceSession as they are; without our library the session is exactly its own.
    Raises ModelFileError when there is no such model or ONNX Runtime cannot load it, ElisionError for an
    argument it does not take."""
    import onnxruntime

    library = kernel_library()
    if sess_options is None:
        sess_options = onnxruntime.SessionOptions()
    if library is not None and isinstance(sess_options, onnxruntime.SessionOptions):
        sess_options.register_custom_ops_library(str(library))
    model: str | bytes
    if isinstance(path, bytes):
        model, where = path, "the serialised model"
    else:
        model = where = os.fspath(path)
        if not os.path.isfile(model):
            problem = "a folder, not an ONNX file" if os.path.isdir(model) else "no such file"
            raise ModelFileError(f"{where}: {problem}")
    try:
        return onnxruntime.InferenceSession(model, sess_options, providers, **onnxruntime_options)
    except (TypeError, ValueError) as error:
        raise ElisionError(f"onnxruntime: {first_line(error)}") from error
    except Exception as error:  # onnxruntime's own exceptions share no base but Exception
        raise ModelFileError(f"{where}: onnxruntime cannot load it ({first_line(error)})") from error
