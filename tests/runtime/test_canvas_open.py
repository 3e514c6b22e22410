"""From a model to its two compiled graphs, in both runtimes: what they say of rows, what is kept, every mistake."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from elision.kernels import cpu
from elision.passes.errors import ElisionError, ModelFileError, Refused
from elision.passes.onnx import io
from elision.runtime import canvas_open, lm_artefact
from elision.runtime.canvas_facts import CanvasFacts, canvas_facts, config_of, is_diffusion
from elision.runtime.canvas_open import Opened, _CanvasCompiler, compare, open_canvas
from elision.runtime.canvas_run import Canvases, start_canvas
from elision.runtime.canvas_step import Scored
from elision.runtime.lm_compile import plain_graph
from elision.runtime.lm_facts import Facts
from elision.runtime.lm_step import Rows, joined
from torch import nn

from .canvas_models import make
from .lm_double import tiny_llama

V, MASK, CONTEXT = 40, 39, 48
RUNTIMES = ("torch", "onnxruntime")
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
IDS: dict[str, Any] = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "eos_token_id": 2,
}


def modern(**more: Any) -> Any:
    return hf.ModernBertForMaskedLM(hf.ModernBertConfig(**SIZES, **IDS, global_attn_every_n_layers=1, **more))


MODELS: dict[str, Callable[[], Any]] = {
    "llada": lambda: make("llada", dtype=torch.float32),
    "dream": lambda: make("dream", dtype=torch.float32),
    "modernbert": modern,
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)),
    "distilbert": lambda: hf.DistilBertForMaskedLM(
        hf.DistilBertConfig(
            vocab_size=V, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64
        )
    ),
}
SLOW = [pytest.mark.slow]
EVERYWHERE = [
    pytest.param(name, runtime, marks=SLOW if (name, runtime) == ("distilbert", "onnxruntime") else [])
    for name in MODELS
    for runtime in RUNTIMES
]
TORCH_FIRST = ["torch", pytest.param("onnxruntime", marks=SLOW)]


def drawn(model: Any) -> Any:
    """Weights that make scores lie far apart."""
    for parameter in model.eval().requires_grad_(False).parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.25)
    return model


@functools.cache
def model_of(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]()
        return model if hasattr(model, "stale") else drawn(model)


MADE: dict[tuple[str, str], Path] = {}
"""The folders that `opened` has compiled; each is there as long as its model."""


@functools.cache
def opened(name: str, runtime: str) -> Opened:
    fill = _CanvasCompiler.fill

    def noted(self: _CanvasCompiler, folder: Path, tokenizer: Any) -> dict[str, Any]:
        MADE[name, runtime] = folder
        return fill(self, folder, tokenizer)

    mask = None if name in ("llada", "dream") else MASK  # the others' configurations name none
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_CanvasCompiler, "fill", noted)
        return open_canvas(model_of(name), runtime=runtime, context=CONTEXT, mask=mask, threads=1)


def artefact(runtime: str) -> Path:
    opened("llada", runtime)
    return MADE["llada", runtime]


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.delenv("ELISION_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setenv("LOCALAPPDATA", str(folder))
    return folder


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """The runtime of each compilation from now on."""
    made: list[str] = []
    pair = canvas_open.pair

    def counted(graph, wanted, *rest):
        made.append(wanted.runtime)
        return pair(graph, wanted, *rest)

    monkeypatch.setattr(canvas_open, "pair", counted)
    return made


def eager(model: Any, ids: np.ndarray) -> np.ndarray:
    return model(torch.from_numpy(ids)[None]).logits[0].numpy()


def rows_of(
    ids: np.ndarray, part: np.ndarray, start: int = 0, run: int | None = None, extras: Any = ()
) -> Rows:
    """The positions `part`, each of which sees the positions below `run`, and `extras`."""
    ancestors = np.full((len(part), len(extras) + 1), -1, np.int32)
    ancestors[:, : len(extras)] = start + np.asarray(extras, np.int32)
    prefix = np.tile(np.array([[start, len(ids) if run is None else run]], np.int32), (len(part), 1))
    return Rows(ids[part], part.astype(np.int64), (start + part).astype(np.int32), prefix, ancestors)


def agrees(scored: Scored, logits: np.ndarray, k: int) -> None:
    """With what the rows' logits say, by other means than ours."""
    scale = float(np.abs(logits).max())
    wanted = torch.from_numpy(logits).double()
    values, ids = wanted.topk(k)
    assert scored.ids.dtype == np.int64 and scored.values.dtype == np.float32
    assert scored.log_sum.dtype == scored.entropy.dtype == np.float32
    np.testing.assert_array_equal(scored.ids, ids.numpy())
    np.testing.assert_allclose(scored.values, values.numpy(), rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(scored.log_sum, wanted.logsumexp(-1).numpy(), rtol=0, atol=1e-5 * scale)
    p = wanted.log_softmax(-1)
    np.testing.assert_allclose(scored.entropy, -(p.exp() * p).sum(-1).numpy(), rtol=0, atol=1e-4)
    if scored.logits is not None:
        np.testing.assert_allclose(scored.logits, logits, rtol=0, atol=1e-5 * scale)


# ---- what the graphs say -------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "runtime"), EVERYWHERE)
def test_scores_are_those_of_the_model(name, runtime):
    one, rng = opened(name, runtime), np.random.default_rng(0)
    model: Any = one.model
    assert (model.capacity, model.vocabulary, model.largest_k) == (CONTEXT, V, 8)
    for count, start in ((1, 0), (12, 5), (30, 18)):
        ids = rng.integers(0, V, count)
        logits = eager(model_of(name), ids)
        for keep in (np.arange(count), rng.permutation(count)[: (count + 1) // 2]):
            scored = model.refresh(start, ids, keep)
            assert scored.logits is None
            agrees(scored, logits[keep], 8)
            scored = model.refresh(start, ids, keep, whole=True)
            assert scored.logits is not None
            agrees(scored, logits[keep], 8)
        part = rng.permutation(count)
        run = int(rng.integers(0, count + 1))
        for rows in (
            rows_of(ids, part, start),
            rows_of(ids, part, start, run, run + rng.permutation(count - run)),
        ):
            for keep in (np.arange(count), np.array([count - 1])):
                for whole in (False, True):
                    scored = model.step(rows, keep, whole)
                    assert (scored.logits is not None) == whole
                    agrees(scored, logits[part[keep]], 8)


@pytest.mark.parametrize(("name", "runtime"), EVERYWHERE)
def test_facts_and_settings(name, runtime):
    one = opened(name, runtime)
    ends = {"llada": (38,), "dream": (38,), "modernbert": (2,)}.get(name, ())
    positions = 128 if name in ("llada", "dream") else 64
    assert one.facts == CanvasFacts(V, MASK, positions, ends, name == "dream", name)
    assert one.tokenizer is None
    apart = one.settings["step_against_refresh"]
    assert one.settings == {
        "architecture": name, "bits": 32, "runtime": runtime, "step_against_refresh": apart
    }  # fmt: skip
    assert 0 <= apart <= 1e-5 and compare(one.model, one.facts) == apart


@pytest.mark.skipif(
    not cpu.available(), reason="without the C++ kernels sums depend on who else is in a call"
)
@pytest.mark.parametrize(("name", "runtime"), [(n, r) for n in ("llada", "dream", "bert") for r in RUNTIMES])
def test_a_row_has_the_same_bits_alone_and_among_others(name, runtime):
    model, rng = opened(name, runtime).model, np.random.default_rng(1)
    ids, other = rng.integers(0, V, 20), rng.integers(0, V, 17)

    def fresh() -> None:
        model.refresh(0, ids, np.arange(1))
        model.refresh(22, other, np.arange(1))

    def rows(part: np.ndarray, more: np.ndarray) -> Rows:
        given = [rows_of(ids, part, 0, 12, [19, 14])]
        return joined([*given, rows_of(other, more, 22)] if len(more) else given)

    part = np.array([0, 3, 11, 14, 19])
    # A step writes what it computes, so its rows are among what is seen in every one of these calls.
    fresh()
    first = bits(model.step(rows(part, np.arange(0)), np.arange(5), True))
    for more in (np.arange(1), np.arange(6), rng.permutation(17)):
        fresh()
        among = bits(model.step(rows(part, more), np.arange(5), True))
        assert same(first, among)
        fresh()
        reverse = joined([rows_of(other, more, 22), rows_of(ids, part, 0, 12, [19, 14])])
        assert same(first, bits(model.step(reverse, len(more) + np.arange(5), True)))
    for place in range(5):
        fresh()
        kept = bits(model.step(rows(part, np.arange(0)), np.array([place]), True))
        assert same([array[[place]] for array in first], kept)
    fresh()
    few = model.step(rows(part, np.arange(0)), np.arange(5))
    assert same(first[:4], bits(few))


def bits(scored: Scored) -> list[np.ndarray]:
    arrays = [scored.ids, scored.values, scored.log_sum, scored.entropy, scored.logits]
    return [array.copy() for array in arrays if array is not None]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(a.tobytes() == b.tobytes() for a, b in zip(one, other))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_refresh_leaves_other_canvases_alone(runtime):
    model, rng = opened("dream", runtime).model, np.random.default_rng(2)
    ids, other = rng.integers(0, V, 12), rng.integers(0, V, 9)
    logits = eager(model_of("dream"), ids)
    model.refresh(20, ids, np.arange(1))
    model.refresh(11, other, np.arange(9))
    model.refresh(32, other, np.arange(9))
    model.step(rows_of(other[::-1].copy(), np.arange(9), 11), np.arange(1))
    agrees(model.step(rows_of(ids, np.arange(12)[::2], 20), np.arange(6), True), logits[::2], 8)


@pytest.mark.parametrize(("bits", "runtime"), [(8, "torch"), (4, "onnxruntime")])
def test_few_bits(bits, runtime):
    one = open_canvas(
        model_of("llada"), bits=bits, group=16, method="rtn", runtime=runtime, context=32, threads=1
    )
    told = one.settings
    assert (told["bits"], told["group"], told["method"], told["samples"]) == (bits, 16, "rtn", 0)
    assert told["step_against_refresh"] <= 1e-5
    ids = np.random.default_rng(3).integers(0, V, 20)
    scored = one.model.refresh(0, ids, np.arange(20), True)
    apart = np.abs(scored.logits - eager(model_of("llada"), ids)).max() / np.abs(scored.logits).max()
    assert 1e-4 < apart < (0.1 if bits == 8 else 1.0)


class Capped(nn.Module):
    """Something stands behind the head's product: scores are read whole."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model_of("llada")
        self.config = self.inner.config

    def forward(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=4 * torch.tanh(self.inner(input_ids).logits / 4))


@pytest.mark.parametrize("runtime", TORCH_FIRST)
def test_a_head_that_cannot_rank(runtime):
    one = open_canvas(Capped().eval(), runtime=runtime, context=24, threads=1)
    ids = np.random.default_rng(4).integers(0, V, 13)
    logits = eager(Capped().eval(), ids)
    keep = np.array([12, 0, 5])
    agrees(one.model.refresh(2, ids, keep), logits[keep], one.model.largest_k)
    part = np.array([1, 4, 12])
    scored = one.model.step(rows_of(ids, part, 2), np.array([2, 0]), True)
    agrees(scored, logits[part[[2, 0]]], one.model.largest_k)


# ---- where models come from ----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A ModernBERT in Hugging Face format whose configuration names the mask."""
    path = tmp_path_factory.mktemp("modernbert")
    torch.manual_seed(0)
    drawn(modern(mask_token_id=MASK)).save_pretrained(path)
    return path


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_folder_is_compiled_once(runtime, folder, own_cache, compiled):
    told: list[str] = []
    first = open_canvas(folder, runtime=runtime, context=32, threads=1, notify=told.append)
    assert compiled == [runtime] and "tracing the model" in told
    assert (first.facts.mask, first.facts.ends, first.facts.architecture) == (MASK, (2,), "modernbert")
    (kept,) = (own_cache / "elision" / "lm").iterdir()
    again = open_canvas(str(folder), runtime=runtime, context=32, threads=1)
    assert compiled == [runtime] and again.facts == first.facts and again.settings == first.settings
    ids = np.random.default_rng(5).integers(0, V, 20)
    model = hf.ModernBertForMaskedLM.from_pretrained(folder).eval().requires_grad_(False)
    for one in (first, again):
        agrees(one.model.refresh(0, ids, np.arange(20), True), eager(model, ids), 8)
        agrees(one.model.step(rows_of(ids, np.arange(3)), np.arange(3), True), eager(model, ids)[:3], 8)
    assert json.loads((kept / lm_artefact.ABOUT).read_text())["facts"]["mask"] == MASK
    # Damaged, it is compiled anew.
    for place, damage in enumerate((spoil, unsay, unsay_all)):
        damage(kept, runtime)
        again = lm_artefact.find(kept.name)
        assert again is not None
        with pytest.raises(ModelFileError) as error:
            canvas_open._opened(again, None, 1)
        assert "\n" not in str(error.value), place
    found = open_canvas(folder, runtime=runtime, context=32, threads=1)
    assert compiled == [runtime] * 2 and found.facts == first.facts
    assert [entry.name for entry in (own_cache / "elision" / "lm").iterdir()] == [kept.name]


def spoil(kept: Path, runtime: str) -> None:
    file = kept / ("refresh.onnx" if runtime == "onnxruntime" else "refresh/step.safetensors")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def unsay(kept: Path, _runtime: str) -> None:
    about = json.loads((kept / lm_artefact.ABOUT).read_text())
    del about["settings"]["runtime"]
    (kept / lm_artefact.ABOUT).write_text(json.dumps(about))


def unsay_all(kept: Path, _runtime: str) -> None:
    about = json.loads((kept / lm_artefact.ABOUT).read_text())
    (kept / lm_artefact.ABOUT).write_text(json.dumps(about | {"settings": None}))


@pytest.fixture
def filled(monkeypatch) -> list[str]:
    """Nothing is compiled: the graphs of LladaLike stand for those of any model. What was filled, by its runtime."""
    made: list[str] = []

    def fill(self: _CanvasCompiler, folder: Path, tokenizer: Any) -> dict[str, Any]:
        made.append(self.wanted.runtime)
        shutil.copytree(artefact(self.wanted.runtime), folder, dirs_exist_ok=True)
        config = config_of(self.source if self.source is not None else self.module)
        facts = canvas_facts(config, Facts(V), tokenizer, **self.said)
        return {"facts": facts.to_json(), "settings": {"runtime": self.wanted.runtime}}

    artefact("torch"), artefact("onnxruntime")
    monkeypatch.setattr(_CanvasCompiler, "fill", fill)
    return made


class Tokens:
    """A tokenizer, as far as facts go."""

    def __init__(self, mask: int, end: int) -> None:
        self.mask_token_id, self.eos_token_id = mask, end


def test_what_is_kept_under_one_name(folder, own_cache, filled):
    """What decides what is in it: settings, the mask and the shift that were said, what another tokenizer says."""
    first = {"runtime": "torch", "context": 32, "threads": 1}
    asked: list[dict[str, Any]] = [
        first,
        first | {"context": 30},
        first | {"runtime": "onnxruntime"},
        first | {"mask": 7},
        first | {"shift": True},
        first | {"shift": False},
        first | {"tokenizer": Tokens(5, 6)},
        first | {"tokenizer": Tokens(5, 7)},
    ]
    for _ in range(2):
        for options in asked:
            one = open_canvas(folder, **options)
            assert one.facts.mask == options.get("mask", MASK)
            assert one.facts.shift == options.get("shift", False)
    assert len(filled) == len(asked) == len(list((own_cache / "elision" / "lm").iterdir()))
    open_canvas(folder, **first, cache=False)
    assert len(filled) == len(asked) + 1


def test_the_mask_of_another_tokenizer(tmp_path, own_cache, filled):
    drawn(MODELS["bert"]()).save_pretrained(tmp_path)
    for mask, end, count in ((5, 6, 1), (7, 6, 2), (5, 6, 2)):
        tokens = Tokens(mask, end)
        one = open_canvas(tmp_path, tokenizer=tokens, runtime="torch", threads=1)
        assert (one.facts.mask, one.facts.ends) == (mask, (end,)) and one.tokenizer is tokens
        assert len(filled) == count
    assert said(ModelFileError, tmp_path).startswith("no mask token: ")


def test_an_onnx_file_with_its_configuration(tmp_path, own_cache, compiled):
    graph: Any = plain_graph(model_of("dream"), "onnxruntime", lambda _step: None)[0]
    file = tmp_path / "model.onnx"
    io.save_model(graph.model, file)
    with pytest.raises(ModelFileError, match="no mask token"):
        open_canvas(file, threads=1)
    (tmp_path / "config.json").write_text(json.dumps(model_of("dream").config.to_dict()))
    one = open_canvas(file, context=CONTEXT, threads=1)
    assert one.facts == opened("dream", "onnxruntime").facts and one.model.capacity == CONTEXT
    ids = np.random.default_rng(6).integers(0, V, 15)
    agrees(one.model.refresh(3, ids, np.arange(15), True), eager(model_of("dream"), ids), 8)
    part = np.array([9, 2])
    agrees(one.model.step(rows_of(ids, part, 3), np.arange(2), True), eager(model_of("dream"), ids)[part], 8)
    count = len(compiled)
    open_canvas(file, context=CONTEXT, threads=1)
    assert len(compiled) == count
    with pytest.raises(ElisionError, match="an ONNX file runs with --runtime onnxruntime"):
        open_canvas(file, runtime="torch", context=CONTEXT)


# ---- mistakes ------------------------------------------------------------------------------------------
def said(kind: type[ElisionError], model: Any, **options: Any) -> str:
    with pytest.raises(kind) as error:
        open_canvas(model, **{"runtime": "torch", "threads": 1, **options})
    text = str(error.value)
    assert "\n" not in text
    return text


def test_models_without_a_mask_or_with_a_wrong_one():
    assert said(ModelFileError, model_of("bert")) == (
        "no mask token: neither the configuration (mask_token_id) nor the tokenizer names one, so this is no "
        "diffusion language model"
    )
    for mask in (V, -1):
        text = f"the mask token {mask} is not among the {V} ids of the model"
        assert said(ModelFileError, model_of("bert"), mask=mask) == text
        assert said(ModelFileError, make("llada", mask_token_id=mask)) == text


@pytest.mark.parametrize("runtime", TORCH_FIRST)
def test_a_causal_model(runtime):
    text = said(Refused, tiny_llama(), mask=3, runtime=runtime)
    assert text.startswith("window: the mask %")
    assert text.endswith(" cannot be cached: hides later tokens: the attention is causal")


def test_a_folder_of_a_causal_model(tmp_path, own_cache):
    tiny_llama().save_pretrained(tmp_path)
    assert said(ModelFileError, tmp_path).startswith("no mask token: ")
    assert said(Refused, tmp_path, mask=3).endswith("the attention is causal")
    kept = own_cache / "elision" / "lm"
    assert not kept.is_dir() or not list(kept.iterdir()), "what fails leaves nothing behind"


def test_what_is_no_model(tmp_path):
    assert said(ElisionError, 3) == "a model is a path, the name of a package or a module, not a int"
    assert said(ModelFileError, tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: no such file or folder"
    text = said(ModelFileError, nn.Linear(2, 2))
    assert text == "the configuration does not say how many ids the model knows (vocab_size)"


def test_what_cannot_be_wanted():
    bert = model_of("bert")
    assert said(ElisionError, bert, mask=3, context=65) == (
        "a context of 65 is asked for, the model has 64 positions"
    )
    assert said(ElisionError, bert, mask=3, bits=5) == "bits is 4, 8, 16 or 32, not 5"
    assert said(ElisionError, bert, mask=3, runtime="tpu") == ("runtime is onnxruntime or torch, not 'tpu'")
    text = said(ElisionError, bert, mask=3, colour="red")
    assert text == "DiffusionGenerator: got an unexpected keyword argument 'colour'"


def test_a_pair_that_disagrees_is_not_kept():
    damaged = make("llada", dtype=torch.float32)
    damaged.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    text = said(ElisionError, damaged, context=16)
    assert text == "the step graph and the refresh graph differ by nan of the largest logit"


FILES = {
    "torch": ("step/step.json", "step/step.safetensors", "refresh/step.json", "refresh/step.safetensors"),
    "onnxruntime": ("step.onnx", "refresh.onnx"),
}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_damaged_files(runtime, tmp_path):
    whole = artefact(runtime)
    assert isinstance(start_canvas(whole, runtime, V, 1), Canvases)
    external = [str(file.relative_to(whole)) for file in whole.rglob("*.data")]
    for name in (*FILES[runtime], *external):
        for number, damage in enumerate((lambda data: data[: len(data) // 2], lambda data: b"", None)):
            copy = tmp_path / f"{Path(name).name}-{number}-{len(name)}"
            shutil.copytree(whole, copy)
            file = copy / name
            file.unlink() if damage is None else file.write_bytes(damage(file.read_bytes()))
            with pytest.raises(ModelFileError) as error:
                start_canvas(copy, runtime, V, 1)
            assert "\n" not in str(error.value), (name, number)


def test_no_folder_stays_where_nothing_is_kept(own_cache, filled, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    one = open_canvas(model_of("llada"), runtime="torch", context=16, threads=1)
    assert len(list(tmp_path.glob("elision-*"))) == 1
    del one
    assert not list(tmp_path.glob("elision-*"))
    assert not (own_cache / "elision" / "lm").is_dir()


# ---- facts ---------------------------------------------------------------------------------------------
def test_what_says_which_token_is_the_mask():
    facts = Facts(50, 64, (2,), architecture="bert")
    tokenizer = SimpleNamespace(mask_token_id=7, eos_token_id=9)
    assert canvas_facts({"mask_token_id": 5}, facts, tokenizer, 3).mask == 3
    assert canvas_facts({"mask_token_id": 5}, facts, tokenizer).mask == 5
    assert canvas_facts({"mask_token_id": None}, facts, tokenizer).mask == 7
    assert canvas_facts({}, facts, tokenizer, 0).mask == 0
    assert canvas_facts({}, facts, tokenizer, np.int64(4)).mask == 4
    assert canvas_facts({}, facts, None, 2).ends == (), "the mask ends no text"
    assert canvas_facts({}, facts, tokenizer).ends == (2,)
    assert canvas_facts({}, Facts(50), tokenizer).ends == (9,)


def test_what_says_whose_logits_decide():
    facts = Facts(50)
    for config, shift, expected in (
        ({}, None, False),
        ({"model_type": "llada"}, None, False),
        ({"model_type": "Dream"}, None, True),
        ({"model_type": "Dream"}, False, False),
        ({"model_type": "Dream", "shift_logits": False}, None, False),
        ({"model_type": "bert", "shift_logits": True}, None, True),
        ({"model_type": "bert"}, True, True),
    ):
        assert canvas_facts(config, facts, None, 3, shift).shift is expected
    told = canvas_facts({}, Facts(50, 64, (1, 2), architecture="x"), None, 3, True)
    assert CanvasFacts.from_json(json.loads(json.dumps(told.to_json()))) == told


def test_which_configurations_are_diffusion_models():
    assert is_diffusion({"architectures": ["BertForMaskedLM"]}) and is_diffusion({"mask_token_id": 3})
    assert not is_diffusion({"architectures": ["LlamaForCausalLM"]}) and not is_diffusion({})
    assert not is_diffusion({"mask_token_id": None, "architectures": None})
    assert config_of(nn.Linear(1, 1)) == {}
    assert config_of(model_of("llada"))["mask_token_id"] == MASK
