"""Where diffusion models come from, what is kept, and what is said of wrong ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from elision.passes.errors import ElisionError, ModelFileError, Refused
from elision.passes.onnx import io
from elision.runtime import canvas_open, lm_artefact
from elision.runtime.canvas_facts import CanvasFacts, canvas_facts, config_of, is_diffusion
from elision.runtime.canvas_open import _CanvasCompiler, open_canvas
from elision.runtime.canvas_run import Canvases, start_canvas
from elision.runtime.lm_compile import plain_graph
from elision.runtime.lm_facts import Facts
from torch import nn

from .canvas_models import make
from .canvas_pairs import (
    CONTEXT,
    MASK,
    MODELS,
    RUNTIMES,
    TORCH_FIRST,
    V,
    agrees,
    artefact,
    drawn,
    eager,
    model_of,
    modern,
    opened,
    rows_of,
)
from .lm_double import tiny_llama


# ---- where models come from ----------------------------------------------------------------------------
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
