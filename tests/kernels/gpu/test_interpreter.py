"""The numerics tests of the Triton kernels, in Triton's interpreter: on the CPU, with no compiler and no GPU.

Triton decides at import whether it interprets, so each file runs in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
MARK = re.compile(r"^pytestmark = WHERE$", re.MULTILINE)  # a line of its own, which this file has not
FILES = sorted(path.name for path in HERE.glob("test_*.py") if MARK.search(path.read_text()))


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def test_this_file_does_not_run_itself() -> None:
    assert Path(__file__).name not in FILES and {"test_attention.py", "test_cached_attention.py"} <= set(
        FILES
    )


@pytest.mark.parametrize("name", FILES)
def test_kernels_agree_with_the_reference(name: str) -> None:
    triton = pytest.importorskip("triton", reason="Triton comes with torch for GPUs only")
    if version(triton.__version__) < (3, 7) and version(numpy.__version__) >= (2, 4):
        pytest.skip(
            "the interpreter of Triton before 3.7 breaks on numpy 2.4, which makes no scalars of arrays [1]"
        )
    others = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore", str(HERE / name)],
        env={**others, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed.group(1)) > 5 and "skipped" not in done.stdout, done.stdout
