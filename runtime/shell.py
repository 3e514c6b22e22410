"""What all commands share: consoles, progress, JSON, and errors as one line with exit code 2."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from ..passes.errors import ElisionError
from ..passes.failures import PassFailed

BAD_INPUT = 2
BUG = 70


class Shell(TyperGroup):
    """A command group in which every mistake of a user is one line on stderr and exit code 2."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        arguments = list(sys.argv[1:] if args is None else args) or ["--help"]
        extra["standalone_mode"] = False
        try:
            with _quiet():
                code = super().main(arguments, *rest, **extra)
        except ElisionError as error:
            code = _complain(error)
        except (KeyboardInterrupt, typer.Abort):
            code = _say("interrupted", 130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whoever read our output has gone
            code = 1
        except MemoryError:
            code = _say("not enough memory", BAD_INPUT)
        except Exception as error:
            usage = _usage(error)
            code = _bug(error) if usage is None else _say(usage, BAD_INPUT)
        sys.exit(code if isinstance(code, int) else 0)


def _usage(error: Any) -> str | None:
    """What Typer has to say about the arguments, whichever copy of click raised it; None for other errors."""
    known = hasattr(error, "format_message") and hasattr(error, "exit_code")
    return error.format_message() if known else None


def _say(text: str, code: int) -> int:
    print(f"elision: {' '.join(text.split())}", file=sys.stderr)
    return code


def _complain(error: ElisionError) -> int:
    if os.environ.get("ELISION_DEBUG"):
        traceback.print_exception(error, file=sys.stderr)
    return _say(f"{error}{getattr(error, 'hint', '')}", BAD_INPUT)


def _bug(error: Exception) -> int:
    if os.environ.get("ELISION_DEBUG"):
        traceback.print_exception(error, file=sys.stderr)
    text = f"{type(error).__name__}: {error}"
    return _say(f"internal error, a bug in Elision ({text[:300]}); ELISION_DEBUG=1 shows more", BUG)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Libraries below us warn about themselves; a shell user can do nothing about it."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def out() -> Console:
    """The console for results. Made anew each time, because tests and pipes replace sys.stdout."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=2, default=_plain))


def _plain(item: Any) -> Any:
    """Numbers of numpy and sympy, paths: as JSON knows them."""
    for kind in (int, float):
        with contextlib.suppress(TypeError, ValueError):
            return kind(item)
    return str(item)


@contextlib.contextmanager
def working(first: str, *, silent: bool = False) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr with the name of the current step; nothing where stderr is no terminal."""
    if silent or not sys.stderr.isatty():
        yield lambda _step: None
        return
    console = Console(stderr=True)
    with console.status(first) as status:
        yield lambda step: status.update(step)


@contextlib.contextmanager
def counting(what: str, *, silent: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, told (done, total); nothing where stderr is no terminal."""
    if silent or not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def read_arrays(path: Path | None) -> dict[str, Any] | None:
    """The arrays of an .npz file by name; no pickled objects. None for None. Raises ElisionError."""
    if path is None:
        return None
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            if isinstance(archive, np.ndarray):
                raise ElisionError(f"{path}: a single array; inputs come as .npz, one array per input name")
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise ElisionError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise ElisionError(f"{path}: not an .npz file of arrays ({str(error).splitlines()[0]})") from None


def keep_reproducer(error: ElisionError, source: Path, folder: Path, asked: Path | None) -> None:
    """Write the reproducer of a failed pass and say so in the error's line. A pass that refuses or finds
    nothing has done its work: its reproducer is only written when it was asked for."""
    from . import reproduce

    if not hasattr(error, "reproducer"):
        return
    expected = not isinstance(error, PassFailed) and type(error).__name__ != "VerificationError"
    if asked is None and expected:
        return
    target = asked or folder / f"{source.stem}.reproducer.json"
    try:
        reproduce.write(error, target, source=source)
    except ElisionError as problem:
        error.hint = f" (no reproducer: {problem})"  # type: ignore[attr-defined]
    else:
        error.hint = f" (reproducer: {target})"  # type: ignore[attr-defined]
