"""`python ort_worker.py FOLDER LIBRARY`: every model in FOLDER on its feeds, without and with the library of kernels.

Needs onnxruntime and numpy only, so that it runs in any version of them. Results go beside the models."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime


def run(model: Path, feeds: dict[str, np.ndarray], library: str) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    if library:
        options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def main(folder: Path, library: str) -> None:
    for model in sorted(folder.glob("*.onnx")):
        feeds = dict(np.load(model.with_suffix(".npz")))
        for name, use in (("plain", ""), ("custom", library)):
            try:
                found = run(model, feeds, use)
            except Exception as error:
                raise SystemExit(f"{model.stem}, {name}: {error}") from error
            np.savez(model.with_suffix(f".{name}.npz"), *found)
    print(onnxruntime.__version__)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
