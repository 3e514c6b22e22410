"""What becomes of an error of a pass: one sentence that names the pass, and what it takes to run it again."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from typing import Any

from .base import Pass, PassContext
from .errors import ElisionError, NothingMatched, PipelineError, Refused, VerificationError
from .options import format_value
from .order import Step, advice
from .pipeline import format

_PACKAGES = ("elision", "torch", "numpy", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "sympy")


class PassFailed(ElisionError):
    """A pass or the host broke down in a way nobody foresaw: a bug, with a reproducer. `__cause__` has it."""


def explained(
    error: Exception, passes: Sequence[Pass], index: int, now: Step, done: Sequence[Step]
) -> ElisionError:
    """The error to raise for a failing pass, with its reproducer."""
    single = passes[index]
    if isinstance(error, PipelineError):
        return error
    if isinstance(error, NothingMatched | Refused | VerificationError):
        text = one_line(error)
        known = text if text.startswith(single.name) or single.name in text else f"{single.name}: {text}"
        if not isinstance(error, VerificationError):
            known = advice(error, single, now, done, passes[index + 1 :]) or known
        result: ElisionError = type(error)(known)
    elif isinstance(error, ElisionError):
        result = error
    else:
        result = PassFailed(f"pass {single.name} failed: {type(error).__name__}: {one_line(error)}")
    result.failed, result.graph = single, now.graph
    result.reproducer = reproducer(passes, index, now.context, error, now.graph.host)
    return result


def reproducer(
    passes: Sequence[Pass], index: int, context: PassContext, error: BaseException, host: str
) -> dict[str, Any]:
    """What it takes to run the failing pass again on the graph it got, as plain data.

    `pipeline` is the failing pass and the rest; `whole_pipeline` is where it came from.
    """
    single = passes[index]
    return {
        "format": "elision-reproducer",
        "pipeline": format(passes[index:]),
        "whole_pipeline": format(passes),
        "failing_pass": single.name,
        "failing_class": f"{type(single).__module__}.{type(single).__qualname__}",
        "options": {name: format_value(value) for name, value in vars(single.options).items()},
        "context": {"force": context.force, "target": context.target, "want_map": context.want_map},
        "host": host,
        "error_type": type(error).__name__,
        "error": one_line(error),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter here; "absent" for one that is not installed."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
