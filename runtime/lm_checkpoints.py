"""Folders whose weights are stored by GPTQ or AWQ: loaded as the plain model, their own codes kept beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..passes.errors import ModelFileError
from .lm_facts import read_json
from .lm_source import Source, require


def is_quantized(source: Source) -> bool:
    """Whether config.json says that the weights of a folder are stored in few bits."""
    return source.kind == "folder" and bool(read_json(source.path / "config.json").get("quantization_config"))


def load_quantized(source: Source, auto: Any) -> tuple[Any, list[Any]]:
    """(the model in float32, its matrices as `passes.formats.Quantized`). auto: transformers' class of loaders.

    Raises ModelFileError for another method than GPTQ and AWQ, and for weights that do not fit the model."""
    import torch
    import transformers

    from ..passes.formats.checkpoints import dequantized, scheme_of

    config: Any = transformers.AutoConfig.from_pretrained(
        str(source.path), local_files_only=True, trust_remote_code=False
    )
    scheme = scheme_of(read_json(source.path / "config.json")["quantization_config"])
    del config.quantization_config
    module = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
    state: dict[str, torch.Tensor] = {}
    kept = []
    for name, array, made in dequantized(_tensors(source), scheme):
        state[name] = torch.from_numpy(np.ascontiguousarray(array)).to(torch.float32)
        if made is not None:
            kept.append(made)
    if not kept:
        raise ModelFileError(f"{source.path}: quantization_config is there, but no quantized layer")
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except RuntimeError as error:  # torch lists every shape that differs
        line = str(error).splitlines()[-1].strip()
        raise ModelFileError(f"{source.path}: the weights do not fit the model ({line})") from error
    module.tie_weights()
    tied = getattr(config, "tie_word_embeddings", False)
    missing = [name for name in missing if not (tied and name.startswith("lm_head"))]
    if missing or unexpected:
        odd, what = (missing, "missing") if missing else (unexpected, "unknown to the model")
        raise ModelFileError(f"{source.path}: {len(odd)} weights are {what}, {odd[0]} among them")
    return module, kept


def _tensors(source: Source) -> dict[str, np.ndarray]:
    require("safetensors", "reading weights")
    import torch
    from safetensors.torch import load_file

    found: dict[str, np.ndarray] = {}
    for file in source.files:
        if file.suffix == ".safetensors":
            for name, tensor in load_file(str(Path(file))).items():
                found[name] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return found
