"""Delete gates and dynamic vocabularies on every text model of the zoo that they take, in both hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from .zoo.model import pick
from .zoo.outcome import HOSTS, as_arrays, real_rows
from .zoo.text_support import PASSES, TEXTS, outcome

FAST = {("bart", "onnx")}
PAIRS = [
    pytest.param(name, host, id=f"{name}-{host}", marks=() if (name, host) in FAST else pytest.mark.slow)
    for name in TEXTS
    for host in HOSTS
]


def run(found: Any, args: tuple[Tensor, ...]) -> np.ndarray:
    """The first output of a result for inputs in their order."""
    if found.host == "torch":
        with torch.no_grad():
            return as_arrays(pick(found.result.module(*args)))[0]
    session = onnxruntime.InferenceSession(found.result.model.SerializeToString())
    feeds = {i.name: v.numpy() for i, v in zip(session.get_inputs(), args, strict=True)}
    return np.asarray(session.run(None, feeds)[0])


@pytest.mark.parametrize(("name", "host"), PAIRS)
def test_gates(name: str, host: str, zoo_folder: Path) -> None:
    """Fewer tokens, and each sample as it is alone."""
    entry = TEXTS[name]
    found = outcome(entry, host, PASSES[1], zoo_folder)
    if found.result is None:
        assert name in ("deberta_v2", "llama_prompt")
        return
    three, one = entry.build(3), entry.build(1)
    together, alone = (real_rows(entry, call, run(found, call.args)) for call in (three, one))
    assert np.isfinite(together).all()
    np.testing.assert_allclose(together[: len(alone)], alone, atol=3e-4, rtol=1e-3)
    plain = real_rows(entry, three, as_arrays(three.run())[0])
    assert plain.shape == together.shape and not np.allclose(plain, together, atol=1e-3)


@pytest.mark.parametrize(("name", "host"), PAIRS)
def test_new_ids(name: str, host: str, zoo_folder: Path) -> None:
    """Own ids as before whatever the table; a new id with the row of a token is that token."""
    entry = TEXTS[name]
    found = outcome(entry, host, PASSES[2], zoo_folder)
    call = entry.build(2)
    inner = getattr(call.module, "inner", None) or call.module.encoder
    weight: Tensor = inner.get_input_embeddings().weight.detach()  # type: ignore[union-attr, operator]
    ids = call.args[0]
    wanted = real_rows(entry, call, as_arrays(call.run())[0])
    noise = torch.randn(2, weight.shape[1])
    own = run(found, (*call.args, noise))
    np.testing.assert_allclose(real_rows(entry, call, own), wanted, atol=3e-4, rtol=1e-3)
    new = ids.clone()
    new[0, 3], new[1, 2] = len(weight) + 1, len(weight)
    rows = torch.stack([weight[ids[1, 2]], weight[ids[0, 3]]])
    np.testing.assert_allclose(run(found, (new, *call.args[1:], rows)), own, atol=1e-5, rtol=1e-4)
    assert not np.allclose(run(found, (new, *call.args[1:], noise)), own, atol=1e-3)
