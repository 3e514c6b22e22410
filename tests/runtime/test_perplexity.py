"""Perplexity through rows is that of the whole model."""

from __future__ import annotations

import math

import pytest
import torch
from elision.passes.errors import ElisionError
from elision.runtime.generate import Generator
from elision.runtime.lm_facts import facts_of_module
from elision.runtime.perplexity import perplexity, shipped_text

from .lm_double import Recompute, byte_tokenizer, tiny_llama


def test_perplexity():
    model = tiny_llama(260)
    generator = Generator.around(Recompute(model, 32), facts_of_module(model), byte_tokenizer())
    text = "Rain in the hills makes rivers."
    ids = generator.encode(text)
    with torch.no_grad():
        loss = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    found = perplexity(generator, text)
    assert found["tokens"] == len(ids) - 1
    assert math.isclose(found["perplexity"], math.exp(loss), rel_tol=1e-4)
    pieces = perplexity(generator, ids + ids)  # longer than the context: pieces of 32
    assert pieces["tokens"] == 2 * len(ids) - 2
    with pytest.raises(ElisionError, match="two tokens"):
        perplexity(generator, [5])


def test_the_texts_differ():
    from pathlib import Path

    import elision.runtime.perplexity as module

    other = (Path(module.__file__).parent / "data" / "calibration.txt").read_text(encoding="utf-8")
    lines = {line for line in shipped_text().splitlines() if len(line) > 40}
    assert len(lines) > 10 and not lines & set(other.splitlines())
