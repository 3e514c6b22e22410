"""`elision optimize --part`: a model that comes in parts, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..passes.errors import ElisionError
from .commands import result_json, show_report
from .parts import PartsResult, optimize_parts
from .shell import out, print_json, read_arrays, working


def optimize_files(
    parts: Sequence[str],
    folder: Path | None,
    passes: str,
    inputs: Path | None,
    force: bool,
    verify: bool,
    dry_run: bool,
    json: bool,
) -> None:
    """Optimise the parts said as NAME=FILE and write them into `folder`, all or none. Raises ElisionError."""
    files = named(parts)
    if folder is None and not dry_run:
        raise ElisionError("say into which folder (-o FOLDER), or that nothing is written (--dry-run)")
    if folder is not None and not folder.is_dir() and (folder.exists() or not folder.parent.is_dir()):
        raise ElisionError(f"{folder}: no folder, and none can be made")
    with working("reading", silent=json) as tell:
        examples = by_part(read_arrays(inputs), list(files))
        result = optimize_parts(files, passes, examples, force=force, verify=verify, notify=tell)
        tell("writing the files")
        written = {} if folder is None else result.save(folder)
    if json:
        print_json(_json(result, written))
    else:
        _show(result, written)


def named(parts: Sequence[str]) -> dict[str, Path]:
    """NAME=FILE, each name once. Raises ElisionError."""
    found: dict[str, Path] = {}
    for text in parts:
        name, equals, file = text.partition("=")
        if not equals or not name or not file:
            raise ElisionError(f"--part {text}: a part is given as NAME=FILE.onnx")
        if name in found:
            raise ElisionError(f"--part {text}: there is a part {name} already")
        found[name] = Path(file)
    return found


def by_part(arrays: dict[str, Any] | None, parts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Arrays called PART.INPUT, by part. Raises ElisionError where a name begins with no part."""
    found: dict[str, dict[str, Any]] = {}
    for name, array in (arrays or {}).items():
        part, dot, rest = name.partition(".")
        if not dot or part not in parts:
            raise ElisionError(
                f"input {name!r}: inputs of parts are called PART.INPUT, with {', '.join(parts)}"
            )
        found.setdefault(part, {})[rest] = array
    return found


def _json(result: PartsResult, written: dict[str, Path]) -> dict[str, Any]:
    parts = {name: result_json(one, written.get(name)) for name, one in result.parts.items()}
    return {"parts": parts, "notes": result.notes}


def _show(result: PartsResult, written: dict[str, Path]) -> None:
    console = out()
    for name, one in result.parts.items():
        console.print(f"part {name}", markup=False)
        show_report(console, one, written.get(name))
    for note in result.notes:
        console.print(note, markup=False)
