"""Without a C++ compiler there is no library and nothing to test here; with one, its absence is a failure."""

from __future__ import annotations

import os
import shutil

import pytest
from elision.kernels import cpu


@pytest.fixture(autouse=True, scope="session")
def library() -> None:
    if cpu.available():
        return
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("there is no C++ compiler here, and so no library of kernels")
    pytest.fail(f"the C++ kernels are not built: {cpu.why_not()}")
