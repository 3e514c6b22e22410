"""The C++ tests (native/): the C interface with hostile shapes, plain, and under the sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from elision.kernels import cpu

from .sessions import write_models

ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "kernels" / "cpu" / "csrc"
TESTS = sorted((Path(__file__).parent / "native").glob("*.cc"))
COMPILER = os.environ.get("CXX", "c++")
STRICT = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{SOURCES}"]

needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="there is no C++ compiler here")


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """What a command prints; its errors are the failure."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def link_driver(folder: Path, library: Path, *flags: str) -> Path:
    """The C++ tests as one program on a built library."""
    driver = folder / "driver"
    run(COMPILER, *STRICT, *flags, *TESTS, library, f"-Wl,-rpath,{library.parent}", "-o", driver)
    return driver


def build_library(folder: Path, *flags: str) -> Path:
    """The library as setup.py builds it, with more flags, outside the working tree."""
    more = {"ELISION_BUILD": "require", "ELISION_CXXFLAGS": " ".join(["-O1", "-g", *flags])}
    build = ["build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp"]
    run(sys.executable, "setup.py", "-q", *build, cwd=ROOT, **more)
    (library,) = (folder / "lib").rglob("libelision.so")
    return library


def check_all_variants(driver: Path, *tests: str, **environment: str) -> None:
    names = tests or ("match", "mean", "merge", "restore", "attention", "linear", "threads", "fork")
    for variant in cpu.variants():
        printed = run(driver, *tests, ELISION_ISA=variant, **environment)
        assert printed.splitlines() == [f"{variant} {name}" for name in names]


@needs_compiler
def test_native_tests_on_the_built_library(tmp_path: Path) -> None:
    path = cpu.library_path()
    assert path is not None
    check_all_variants(link_driver(tmp_path, path))


@needs_compiler
@pytest.mark.slow
def test_native_tests_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
    library = build_library(tmp_path, *flags)
    driver = link_driver(tmp_path, library, *flags)
    options = {
        "ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=1:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    check_all_variants(driver, **options)
    # The same library in onnxruntime, which is not sanitized: Python loads the runtimes first. What Python and
    # onnxruntime keep until the end is not ours.
    runtimes = [run(COMPILER, f"-print-file-name={name}").strip() for name in ("libasan.so", "libubsan.so")]
    options = {**options, "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0"}
    models = tmp_path / "models"
    models.mkdir()
    labels = write_models(models)
    worker = Path(__file__).with_name("ort_worker.py")
    run(sys.executable, worker, models, library, LD_PRELOAD=" ".join(runtimes), **options)
    assert len(list(models.glob("*.custom.npz"))) == len(labels)


@needs_compiler
@pytest.mark.slow
def test_threads_under_the_thread_sanitizer(tmp_path: Path) -> None:
    """One variant: the pool and the scratch memory are the same for all."""
    names = ("common", "threads", "interface", "variant", "linear_pack", "weight_memory")
    units = [SOURCES / f"{name}.cc" for name in names]
    flags = ["-std=c++17", "-O1", "-g", "-pthread", "-fsanitize=thread", "-Wno-psabi", f"-I{SOURCES}"]
    driver = tmp_path / "driver"
    run(COMPILER, *flags, "-DELISION_VARIANT=portable", *units, *TESTS, "-o", driver)
    printed = run(driver, "threads", ELISION_ISA="portable", TSAN_OPTIONS="halt_on_error=1")
    assert printed.splitlines() == ["portable threads"]
