"""What all benchmarks share: where they ran, and how results are kept."""

from __future__ import annotations

import json
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from elision.passes.failures import versions
from elision.runtime.bench import interleave

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The machine of a result: processor, cores in use, versions."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            named = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        model = named[0] if named else model
    except OSError:
        model += ", not named by the system"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_before": load,
        "versions": versions(),
    }


def keep(name: str, data: dict[str, Any]) -> Path:
    """Write benchmarks/results/NAME.json with the machine and the time."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    document = {"benchmark": name, "date": datetime.now(UTC).date().isoformat(), **data}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return path


def limits(rounds: int) -> tuple[float, float]:
    """Bytes read, and multiply-adds of float32, in a second: the fastest of some runs."""
    memory, square = torch.ones(64 << 20), torch.randn(768, 768)
    times = interleave({"read": lambda: memory.sum(), "product": lambda: square @ square}, rounds=rounds)
    best = {name: min(runs) for name, runs in times.items()}
    return memory.numel() * 4 / best["read"], 768**3 / best["product"]


def best_of(action: Any, runs: int) -> float:
    """The fastest of some runs, in seconds: for work that nothing can make faster than it is."""
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return min(times)
