"""Every variant against the reference, on every draw, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from elision.kernels import cpu

from .draws import Draw, compare

ROOT = Path(__file__).parents[3]


def run_worker(variant: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.kernels.cpu.worker", str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, cpu.ISA: variant},
    )


def test_all_three_variants_run_on_this_kind_of_processor() -> None:
    """What the tests below iterate over; a processor without them would leave two thirds untested."""
    assert cpu.variants()[-1] == "portable"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert ("avx512" in cpu.variants()) == ("avx512dq" in flags and "avx512vl" in flags)
    assert ("avx2" in cpu.variants()) == (" avx2" in flags)


@pytest.mark.parametrize("variant", cpu.variants() if cpu.available() else ["portable"])
def test_variant_agrees_with_the_reference_on_any_number_of_threads(variant: str, tmp_path: Path) -> None:
    done = run_worker(variant, tmp_path / "results.pt")
    assert done.returncode == 0, done.stderr
    saved = torch.load(tmp_path / "results.pt")
    assert saved["variant"] == variant
    assert len(saved["results"]) > 300
    for call, found in saved["results"]:
        compare(Draw(*call), found)


def test_a_variant_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    done = run_worker("sse9", tmp_path / "results.pt")
    assert done.returncode != 0
    assert "ELISION_ISA=sse9 is not one of this processor's variants" in done.stderr
