"""The wheel: it builds, holds every module under `elision`, and imports from a folder of its own."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"elision": "elision", "kernels": "elision/kernels", "passes": "elision/passes"}
FOLDERS["runtime"] = "elision/runtime"


def pip(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", *arguments]
    return subprocess.run(call, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build folder appears in the working tree."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                target = source / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    done = pip("wheel", "--wheel-dir", str(out), str(source))
    assert done.returncode == 0, done.stderr
    (found,) = out.glob("elision-*.whl")
    return found


def test_every_module_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"{home}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, home in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".j2") and "__pycache__" not in path.parts
    }
    assert wanted <= names, sorted(wanted - names)
    assert not [name for name in names if name.startswith("tests/")]


def test_the_wheel_runs_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    done = pip("install", "--target", str(target), str(wheel))
    assert done.returncode == 0, done.stderr
    code = (
        "import elision, elision.passes\n"
        "from importlib.metadata import distribution, entry_points\n"
        f"assert elision.__file__.startswith({str(target)!r}), elision.__file__\n"
        f"assert elision.passes.__file__.startswith({str(target)!r}), elision.passes.__file__\n"
        "assert 'token-merge' in elision.known_passes()\n"
        "backends = entry_points(group='torch_dynamo_backends')\n"
        "assert any(e.name == 'elision' and e.load() for e in backends)\n"
        "scripts = entry_points(group='console_scripts')\n"
        "assert any(e.name == 'elision' and callable(e.load()) for e in scripts)\n"
    )
    # -S would lose the environment's packages; PYTHONPATH puts the wheel before the editable install.
    environment = {"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
