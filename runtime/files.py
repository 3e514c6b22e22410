"""Writing files whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..passes.errors import ElisionError


def check_target(path: str | os.PathLike[str]) -> Path:
    """`path` as a file that can be written: its folder exists and takes new files. Raises ElisionError.

    Asked before long work, so that nobody waits for minutes to hear of a missing folder."""
    file = Path(path)
    try:
        if file.is_dir():
            raise ElisionError(f"{file}: a folder, not a file")
        folder = file.parent
        if not folder.is_dir():
            raise ElisionError(f"{folder}: no such folder")
        with tempfile.TemporaryFile(dir=folder):
            return file
    except (OSError, ValueError) as error:
        raise ElisionError(f"{file}: cannot be written ({_reason(error)})") from None


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file in the same folder, then give it its name. Raises ElisionError."""
    file = check_target(path)
    handle, name = tempfile.mkstemp(prefix=".elision-", suffix=file.suffix, dir=file.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        # mkstemp is private to the user; the result gets the usual permissions.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, file)
    except OSError as error:
        raise ElisionError(f"{file}: cannot be written ({_reason(error)})") from None
    finally:
        temporary.unlink(missing_ok=True)
    return file


def write_together(folder: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary folder inside `folder`, then move all files of it to `folder`, or none: those that
    were there come back when a move fails. `folder` is made where only it is missing. Raises ElisionError."""
    place = Path(folder)
    made = not place.exists()
    try:
        if made:
            place.mkdir()
        if not place.is_dir():
            raise ElisionError(f"{place}: a file, not a folder")
        workplace = Path(tempfile.mkdtemp(prefix=".elision-", dir=place))
    except (OSError, ValueError) as error:
        raise ElisionError(f"{place}: cannot be written to ({_reason(error)})") from None
    done = False
    try:
        new, old = workplace / "new", workplace / "old"
        new.mkdir()
        old.mkdir()
        write(new)
        _move_all(new, old, place)
        done = True
    except OSError as error:
        raise ElisionError(f"{place}: cannot be written to ({_reason(error)})") from None
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
        if made and not done:
            shutil.rmtree(place, ignore_errors=True)
    return place


def _move_all(new: Path, old: Path, place: Path) -> None:
    moved: list[str] = []
    try:
        for file in sorted(new.iterdir()):
            if (place / file.name).exists():
                os.replace(place / file.name, old / file.name)
            moved.append(file.name)
            os.replace(file, place / file.name)
    except OSError:
        for name in moved:
            (place / name).unlink(missing_ok=True)
            if (old / name).exists():
                os.replace(old / name, place / name)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """`text` as a UTF-8 file, whole or not at all."""
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
