"""Folders that GPTQ or AWQ wrote: the function of their dequantized weights, from their own codes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from elision.passes.errors import ModelFileError
from elision.runtime import lm_load, lm_source
from elision.runtime.lm_checkpoints import is_quantized
from safetensors.torch import load_file, save_file

import elision

from .lm_double import byte_tokenizer, tiny_llama


def words(codes: np.ndarray) -> np.ndarray:
    """4-bit codes [K, N] -> int32 [K / 8, N], the first of eight rows in the lowest bits."""
    parts = codes.astype(np.uint32).reshape(-1, 8, codes.shape[1])
    packed = np.zeros((parts.shape[0], parts.shape[2]), np.uint32)
    for i in range(8):
        packed |= parts[:, i] << np.uint32(4 * i)
    return packed.view(np.int32)


def gptq_folder(path, group=16):
    """A model whose products are stored as GPTQ has them, and the same with their values as plain weights."""
    model = tiny_llama(vocabulary=260)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    random = np.random.default_rng(0)
    state = load_file(str(path / "model.safetensors"))
    plain, stored = {}, {}
    for name, tensor in state.items():
        if "proj" not in name:
            plain[name] = stored[name] = tensor
            continue
        n, k = tensor.shape
        codes = random.integers(0, 16, (k, n))
        zeros = random.integers(1, 16, (k // group, n))
        scales = random.uniform(0.01, 0.03, (k // group, n)).astype(np.float16)
        values = (codes - zeros.repeat(group, 0)) * scales.repeat(group, 0).astype(np.float32)
        plain[name] = torch.from_numpy(values.T.astype(np.float32).copy())
        prefix = name.removesuffix(".weight")
        stored[f"{prefix}.qweight"] = torch.from_numpy(words(codes))
        stored[f"{prefix}.qzeros"] = torch.from_numpy(words((zeros - 1).T).T.copy())
        stored[f"{prefix}.scales"] = torch.from_numpy(scales)
    save_file(stored, str(path / "model.safetensors"))
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group,
        "desc_act": False,
    }
    (path / "config.json").write_text(json.dumps(config))
    model.load_state_dict(plain)
    return model.eval()


def test_gptq(tmp_path):
    model = gptq_folder(tmp_path)
    source = lm_source.find(tmp_path)
    assert is_quantized(source)
    loaded, kept = lm_load.load_module(source)
    assert len(kept) == 14 and {item.bits for item in kept} == {4}
    ids = torch.tensor([[5, 80, 33, 7]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    generator = elision.Generator(tmp_path, runtime="torch", cache=False, context=32)
    assert generator.settings["bits"] == "source" and generator.settings["formats"] == {"4 bits": 14}


def test_what_cannot_be_read(tmp_path):
    gptq_folder(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for change, text in (
        ({"quant_method": "bitsandbytes"}, "bitsandbytes cannot be read"),
        ({"quant_method": "gptq", "bits": 3}, "3 bits cannot be read"),
    ):
        file.write_text(json.dumps(config | {"quantization_config": change}))
        with pytest.raises(ModelFileError, match=text):
            lm_load.load_module(lm_source.find(tmp_path))
    file.write_text(json.dumps(config))
    state = load_file(str(tmp_path / "model.safetensors"))
    state.pop("model.norm.weight")
    save_file(state, str(tmp_path / "model.safetensors"))
    with pytest.raises(ModelFileError, match=r"model\.norm\.weight among them"):
        lm_load.load_module(lm_source.find(tmp_path))
