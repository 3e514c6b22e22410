"""The wheel: it builds, holds every module under `elision` and the C++ library, and runs from a folder of its own.

Without a compiler it is built too, and everything runs on the references."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"elision": "elision", "kernels": "elision/kernels", "passes": "elision/passes"}
FOLDERS["runtime"] = "elision/runtime"
LIBRARY = "elision/kernels/cpu/libelision.so"
NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no C++ compiler here"
)


def pip(command: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", *arguments]
    return subprocess.run(call, capture_output=True, text=True, env={**os.environ, **environment})


def build(temporary: pytest.TempPathFactory, **environment: str) -> Path:
    """Built from a copy, so that no build folder appears in the working tree; without optimization, which only
    makes the library slower and the build faster."""
    source, out = temporary.mktemp("source"), temporary.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so":
                target = source / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    environment = {"ELISION_CXXFLAGS": "-O0", **environment}
    done = pip("wheel", "--wheel-dir", str(out), str(source), **environment)
    assert done.returncode == 0, done.stderr
    (found,) = out.glob("elision-*.whl")
    return found


def run(code: str, wheel: Path, folder: Path) -> str:
    """What a program prints that sees the wheel, unpacked, and not the repository."""
    target = folder / "site"
    done = pip("install", "--target", str(target), str(wheel))
    assert done.returncode == 0, done.stderr
    # -S would lose the environment's packages; PYTHONPATH puts the wheel before the editable install.
    environment = {"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    code = f"import elision\nassert elision.__file__.startswith({str(target)!r}), elision.__file__\n" + code
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory)


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
    code = """
import elision.passes
from importlib.metadata import entry_points
assert elision.passes.__file__.startswith(elision.__path__[0]), elision.passes.__file__
assert 'token-merge' in elision.known_passes()
backends = entry_points(group='torch_dynamo_backends')
assert any(e.name == 'elision' and e.load() for e in backends)
scripts = entry_points(group='console_scripts')
assert any(e.name == 'elision' and callable(e.load()) for e in scripts)
"""
    run(code, wheel, tmp_path)


# ---- the C++ kernels -----------------------------------------------------------------------------------
MERGE = """
import numpy as np, onnx, torch
from onnx import helper
from elision.kernels import OPS, cpu
from elision.runtime.session import session

metric, x = torch.randn(2, 9, 4), torch.randn(2, 9, 5)
maps = torch.ops.elision.match_tokens(metric, r=3)
y, size = torch.ops.elision.merge_tokens(x, None, *maps, axis=1)
assert y.shape == (2, 6, 5) and float(size.sum()) == 18

F, I = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
match = OPS['match_tokens'].onnx_function([(3, F)], {'r': 3})
merge = OPS['merge_tokens'].onnx_function([(3, F), None, (2, I), (2, I), (2, I)], {'axis': 1})
nodes = [
    helper.make_node(match.name, ['metric'], ['slot', 'keep', 'source'], domain='elision', r=3),
    helper.make_node(merge.name, ['x', '', 'slot', 'keep', 'source'], ['y', 'size'], domain='elision', axis=1),
]
for node, function in zip(nodes, (match, merge)):
    node.overload = function.overload
inputs = [helper.make_tensor_value_info(name, F, ['b', 'n', None]) for name in ('metric', 'x')]
outputs = [helper.make_tensor_value_info(name, F, None) for name in ('y', 'size')]
graph = helper.make_graph(nodes, 'merge', inputs, outputs)
opsets = [helper.make_opsetid('', 20), helper.make_opsetid('elision', 1)]
model = helper.make_model(graph, functions=[match, merge], opset_imports=opsets, ir_version=10)
found = session(model.SerializeToString()).run(None, {'metric': metric.numpy(), 'x': x.numpy()})
np.testing.assert_allclose(found[0], y.numpy(), rtol=1e-5, atol=1e-5)
np.testing.assert_array_equal(found[1], size.numpy())
"""


@needs_compiler
def test_the_wheel_carries_the_library_and_serves_every_python(wheel: Path, tmp_path: Path) -> None:
    assert LIBRARY in zipfile.ZipFile(wheel).namelist()
    system = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{system}.whl")
    code = MERGE + (
        "assert cpu.available(), cpu.why_not()\n"
        "assert str(cpu.library_path()).startswith(elision.__path__[0])\n"
        "found = torch.ops.elision_cpu if cpu.kernels() else None\n"
        "for one, other in zip(found.merge_tokens(x, None, *maps, axis=1), (y, size)):\n"
        "    torch.testing.assert_close(one, other)\n"
        "print(cpu.variants())\n"
    )
    assert "portable" in run(code, wheel, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["no compiler", "not wanted"])
def test_without_the_library_everything_runs(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, how: str
) -> None:
    environment = NO_COMPILER if how == "no compiler" else {"ELISION_BUILD": "skip"}
    wheel = build(tmp_path_factory, **environment)
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    code = MERGE + (
        "assert not cpu.available() and 'not built' in cpu.why_not()\n"
        "from elision.runtime.doctor import examine, healthy\n"
        "found = examine()\n"
        "assert healthy(found)\n"
        "print(*[one.state for one in found if one.subject == 'C++ kernels'])\n"
    )
    assert run(code, wheel, tmp_path) == "absent\n"


@pytest.mark.slow
def test_a_required_library_needs_a_compiler(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(AssertionError, match="/nonexistent"):
        build(tmp_path_factory, ELISION_BUILD="require", **NO_COMPILER)
