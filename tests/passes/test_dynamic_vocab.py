"""dynamic-vocab: ids of the vocabulary to the bit as before, new ones as if the table were longer; both hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from elision.passes import testing
from elision.passes.dynamic_vocab import DynamicVocab
from elision.passes.errors import NothingMatched, PipelineError, Refused
from elision.passes.ir.fx import FxGraph
from elision.passes.overlay import overlaid, own_rows
from torch import Tensor, nn

import elision
from tests.zoo.export import quiet, saved

from .vocabulary_models import MODELS, VOCABULARY, WIDTH, clip, embedded, module, table_of, text

V, C = VOCABULARY, WIDTH
FILES = list(MODELS)


def exported(model: nn.Module, dynamic: bool = True) -> Any:
    auto = torch.export.Dim.AUTO
    shapes = ({0: auto, 1: auto}, {0: auto, 1: auto}) if dynamic else None
    with quiet():
        return torch.export.export(model, text(), dynamic_shapes=shapes, strict=False)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("roberta", "llama") else pytest.mark.slow) for n in MODELS]
)
def test_every_architecture(name: str) -> None:
    model = module(name)
    result = elision.optimize(exported(model), "dynamic-vocab", text())
    ids, mask = text(11)
    rows = torch.randn(3, C)
    with torch.no_grad():
        plain = FxGraph.from_export(exported(model))
        feeds = dict(zip(plain.inputs, (ids.numpy(), mask.numpy())))
        wanted = torch.from_numpy(plain.evaluate(plain.outputs, feeds)[0])
        unlowered = testing.apply(plain, [DynamicVocab()], text())
        assert torch.equal(unlowered.run(ids, mask, rows), wanted)
        ids[0, 3], ids[1, 2], ids[1, 5] = V, V + 2, V + 1
        found = result.module(ids, mask, table=rows)
    torch.testing.assert_close(found, embedded(model, ids, mask, rows), atol=2e-5, rtol=1e-4)
    if name == "llama":
        assert found.shape[-1] == V  # the tied head scores its own


@pytest.mark.parametrize("name", ["bert", *(pytest.param(n, marks=pytest.mark.slow) for n in FILES[1:])])
def test_files(name: str, tmp_path: Path) -> None:
    model = module(name)
    model.requires_grad_(False)
    batch = {0: torch.export.Dim("batch", min=1, max=32)}
    with quiet():
        program = torch.export.export(model, text(), dynamic_shapes=(batch, batch), strict=False)
    plain = saved(program, ["input_ids", "attention_mask"], tmp_path / "plain.onnx")
    source = elision.optimize(plain, "lower", text())
    result = elision.optimize(plain, "dynamic-vocab", text())
    file = result.save(tmp_path / "model.onnx")
    names = [i.name for i in elision.session(file).get_inputs()]
    ids, mask = text()
    rows = torch.randn(3, C)
    before = dict(zip(names, (ids.numpy(), mask.numpy())))
    wanted = elision.session(source.model.SerializeToString()).run(None, before)[0]
    same = elision.session(file).run(None, {**before, "table": rows.numpy()})[0]
    np.testing.assert_array_equal(same, wanted)
    ids[0, 3], ids[1, 2] = V + 2, V
    feeds = dict(zip(names, (ids.numpy(), mask.numpy(), rows.numpy())))
    found = elision.session(file).run(None, feeds)[0]
    np.testing.assert_allclose(found, embedded(model, ids, mask, rows), atol=1e-4, rtol=1e-3)
    vocabulary = elision.DynamicVocabulary(file)
    np.testing.assert_array_equal(vocabulary.source.rows(np.array([7, 3])), table_of(model)[[7, 3]])


def test_the_edit() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 4)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.table(input_ids) * 2

    args = (torch.tensor([[0, 4, 2]]),)
    before = testing.capture(Lookup(), args)
    after = testing.apply(before, DynamicVocab(rows=2), args)
    testing.expect_diff(
        before,
        after,
        """\

...
+ %table: float32[2, 4] = input
+ %own_ids_default: int64[1, 3] = elision.own_ids(%input_ids) {first=5}
- %embedding: float32[1, 3, 4] = aten.embedding(%table_weight, %input_ids)
+ %embedding: float32[1, 3, 4] = aten.embedding(%table_weight, %own_ids_default)
+ %overlay_rows_default: float32[1, 3, 4] = elision.overlay_rows(%embedding, %input_ids, %table) {first=5}
- %mul: float32[1, 3, 4] = aten.mul(%embedding) {fn=mul, other=2}
+ %mul: float32[1, 3, 4] = aten.mul(%overlay_rows_default) {fn=mul, other=2}
...
""",
    )


def test_results_compile_and_save(tmp_path: Path) -> None:
    model = module("bert")
    result = elision.optimize(exported(model), "dynamic-vocab", text())
    again = torch.export.load(result.save(tmp_path / "model.pt2")).module()
    ids, mask = text()
    ids[0, 1] = V
    rows = torch.randn(1, C)
    wanted = result.module(ids, mask, rows)
    torch.testing.assert_close(again(ids, mask, table=rows), wanted)
    compiled = torch.compile(result.module, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, mask, rows), wanted)
    with pytest.raises(
        elision.Refused, match="adds the input 'table', which callers of a compiled model cannot"
    ):
        torch.compile(model, backend="elision", options={"passes": "dynamic-vocab{ids=l_input_ids_}"})(
            *text()
        )


def test_the_call_stays_as_it_was() -> None:
    """Arguments by name and structured outputs stay."""
    import transformers as hf

    model = module("bert").inner
    ids, mask = text()
    given = {"input_ids": ids, "attention_mask": mask}
    result = elision.optimize(model, "dynamic-vocab", given)
    found = result.module(**given, table=torch.zeros(1, C))
    assert isinstance(found, hf.utils.ModelOutput)
    hidden: Any = found["last_hidden_state"]
    assert torch.equal(hidden, elision.optimize(model, "", given).module(**given).last_hidden_state)


def test_every_text_has_rows_of_its_own() -> None:
    model = module("minilm")
    result = elision.optimize(exported(model), "dynamic-vocab{per_text=true rows=4}", text())
    ids, mask = text()
    ids[:, 2] = V + 3
    rows = torch.randn(2, 4, C)
    found = result.module(ids, mask, rows)
    for index in (0, 1):
        wanted = embedded(model, ids[index : index + 1], mask[index : index + 1], rows[index])
        torch.testing.assert_close(found[index : index + 1], wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.slow
def test_with_other_passes() -> None:
    """A table of few bits is read as it is, and merging and quantizing find the same as before."""
    model = module("bert")
    ids, mask = text()
    for passes in (
        "quantize{bits=8 embedding_bits=8 group=32},dynamic-vocab",
        "dynamic-vocab,token-merge{r=2}",
    ):
        result = elision.optimize(exported(model), passes, text(), force=True)
        assert torch.isfinite(result.module(ids, mask, table=torch.randn(2, C))).all()
    result = elision.optimize(
        exported(model), "quantize{bits=8 embedding_bits=8 group=32},dynamic-vocab", text()
    )
    graph: FxGraph = result.graph
    op, lookup = overlaid(graph)[0]
    assert lookup.op.target == "elision.embedding_nbits" and op.attrs["first"] == V
    rows = own_rows(graph, lookup, np.array([5, 9, 5]))
    np.testing.assert_allclose(rows, table_of(model)[[5, 9, 5]], atol=0.01)


# ---- refusals --------------------------------------------------------------------------------------------
class Odd(nn.Module):
    """Reads ids in a way that new ones break."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.other, self.how = nn.Embedding(9, 4), nn.Embedding(9, 4), how

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        if self.how == "parity":
            return x * (input_ids % 2)[..., None]
        if self.how == "two tables":
            return x + self.other(input_ids)
        if self.how == "labels":
            return (x @ self.table.weight.T).gather(2, input_ids[..., None])
        if self.how == "no table":
            return torch.nn.functional.embedding(input_ids, self.table.weight * 2 + self.other.weight)
        return x * (input_ids == 20)[..., None]


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        (
            "parity",
            r"aten.remainder \(%remainder\) reads the ids of %input_ids for something other than their",
        ),
        (
            "two tables",
            r"%input_ids is looked up in several tables \(%.*weight, %.*weight\), and a new id has one row",
        ),
        ("labels", r"aten.gather \(%gather\) reads the ids of %input_ids for something other"),
        ("no table", r"aten.embedding \(%embedding.*\) looks tokens up in %add, which is no constant table"),
        ("compared", r"aten.eq \(%eq\) compares %input_ids with 20, which may be a new id"),
    ],
)
def test_refusals(how: str, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        elision.optimize(Odd(how), "dynamic-vocab", (torch.tensor([[1, 2, 3]]),))


def test_clip_takes_the_largest_id_for_the_end() -> None:
    with pytest.raises(
        Refused, match=r"argmax.*reads the ids of %input_ids for something other than their embeddings"
    ):
        elision.optimize(exported(clip().eval(), False), "dynamic-vocab", text())


def test_names() -> None:
    args = (torch.tensor([[1, 2]]),)
    with pytest.raises(
        NothingMatched, match="no input 'ids' with token ids among input_ids; option ids names it"
    ):
        elision.optimize(Odd("compared"), "dynamic-vocab{ids=ids}", args)
    with pytest.raises(
        Refused, match="embeddings that are given with the ids by then; a graph takes it once"
    ):
        elision.optimize(exported(module("bert")), "dynamic-vocab,dynamic-vocab", text())
    with pytest.raises(Refused, match="has an input called 'attention_mask' already"):
        elision.optimize(exported(module("bert")), "dynamic-vocab{name=attention_mask}", text())
    with pytest.raises(PipelineError, match="name must be an identifier"):
        DynamicVocab(name="a table")
    with pytest.raises(PipelineError, match="rows must be at least 0"):
        DynamicVocab(rows=-1)
