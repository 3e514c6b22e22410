"""Runs models in whatever onnxruntime this interpreter finds: called with PYTHONPATH at an old version.

python old_onnxruntime.py FOLDER    reads NAME.onnx and NAME.npz (inputs), writes NAME.found.npz (outputs)
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime


def main(folder: Path) -> None:
    for path in sorted(folder.glob("*.onnx")):
        with np.load(path.with_suffix(".npz")) as feeds:
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            outputs = session.run(None, dict(feeds))
        np.savez(path.with_suffix(".found.npz"), *outputs)
    (folder / "version").write_text(onnxruntime.__version__)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
