"""`elision.Generator` for models that read pictures: with all of their tokens, and with some of them left out."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from elision.passes import PassContext, parse, run_pipeline
from elision.passes.errors import ElisionError
from elision.runtime.lm_compile import plain_graph
from elision.runtime.lm_export import pictures_of
from elision.runtime.lm_step import chain
from elision.runtime.lm_vision import parted
from torch import Tensor

import elision
from tests.zoo.vlm import VLMS

NEW = 10
MODEL = VLMS["llava"]
DROP = "token-drop{policy=cls-topk budget=0.25}"


@cache
def module() -> Any:
    return MODEL.module().inner


def picture(seed: int = 0, images: int = 1) -> dict[str, Tensor]:
    pixels = MODEL.inputs(1)["pixel_values"]
    noise = torch.randn(images, *pixels.shape[1:], generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": pixels.expand(images, -1, -1, -1) + noise}


@cache
def generator(runtime: str, drop: str = "", **options: Any) -> elision.Generator:
    given = {"context": 256, "cache": False, **options}
    return elision.Generator(module(), runtime=runtime, images=picture(), drop=drop, **given)


def prompt(images: int = 1, seed: int = 0) -> list[int]:
    words = np.random.default_rng(seed).integers(3, 180, (images + 1, 5)).tolist()
    return [1, *(token for part in words[:-1] for token in (*part, MODEL.placeholder)), *words[-1]]


def spelt_out(ids: list[int]) -> list[int]:
    return [known for token in ids for known in [token] * (64 if token == MODEL.placeholder else 1)]


def expected(ids: list[int], images: dict[str, Tensor] | None) -> list[int]:
    """The model's own greedy text."""
    given = torch.tensor([spelt_out(ids)])
    with torch.no_grad():
        made = module().generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            **(images or {}),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return made[0, given.shape[1] :].tolist()


@torch.no_grad()
def recomputed(
    found: elision.Generator,
    ids: list[int],
    images: dict[str, Any],
    compact: bool = False,
    whole: Any = None,
) -> list[int]:
    """Greedy text of the language model over the kept tokens, at the positions they had, with no cache at all."""
    assert found.pictures is not None
    written = found.pictures.written("it", ids, images)
    assert written is not None
    whole = whole or module()
    model, table = whole.model.language_model, whole.get_input_embeddings()
    tokens = torch.tensor(written.ids)
    rows = torch.from_numpy(written.rows)
    x = torch.where((tokens < 200)[:, None], table(tokens.clamp(max=199)), rows[(tokens - 200).clamp(min=0)])[
        None
    ]
    places = torch.arange(len(tokens)) if compact else torch.from_numpy(written.places)
    made: list[int] = []
    for _ in range(NEW):
        mask = torch.ones(
            x.shape[:2], dtype=torch.int64
        )  # without one, a jump of positions begins another text
        state = model(
            inputs_embeds=x, attention_mask=mask, position_ids=places[None], use_cache=False
        ).last_hidden_state
        made.append(int(whole.lm_head(state[0, -1]).argmax()))
        x = torch.cat([x, table(torch.tensor([[made[-1]]]))], 1)
        places = torch.cat([places, places[-1:] + 1])
    return made


def anew(found: elision.Generator, ids: list[int], images: dict[str, Any]) -> list[int]:
    """Greedy text of the compiled graph itself, with its rounded weights: every token by a call over the whole text
    into empty slots, so that nothing is read that an earlier call has left."""
    assert found.pictures is not None
    written = found.pictures.written("it", ids, images)
    assert written is not None
    made: list[int] = []
    for _ in range(NEW):
        for held in found.model.caches.values():  # type: ignore[attr-defined]
            held[:] = np.nan
        text = [*written.ids, *made]
        behind = written.places[-1] + 1 + np.arange(len(made))
        rows = replace(chain(0, 0, text), positions=np.concatenate([written.places, behind]))
        found.model.show(written.rows)
        made.append(int(found.model.step(rows, [len(text) - 1])[0].argmax()))
    return made


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_with_all_tokens_the_text_is_the_models_own(runtime: str) -> None:
    found = generator(runtime)
    prompts = [prompt(1, 1), prompt(2, 2), prompt(0, 3)]
    images = [picture(1), picture(2, 2), None]
    results = found.generate(prompts, NEW, images=images, eos=[])
    assert [one.token_ids for one in results] == [expected(*both) for both in zip(prompts, images)]
    assert [one.prompt_tokens for one in results] == [1 + 10 + 64, 1 + 15 + 128, 6]
    # One placeholder for each token says the same.
    one = found.generate(spelt_out(prompts[0]), NEW, images=images[0], eos=[])
    assert one.token_ids == results[0].token_ids


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_with_tokens_left_out_the_text_is_that_of_recomputation(runtime: str) -> None:
    found = generator(runtime, DROP)
    assert found.pictures is not None and found.pictures.facts.kept == 16
    prompts = [prompt(1, 1), prompt(2, 2), prompt(0, 3)]
    images: list[Any] = [picture(1), picture(2, 2), None]
    alone = [found.generate(ids, NEW, images=seen, eos=[]) for ids, seen in zip(prompts, images)]
    together = found.generate(prompts, NEW, images=images, eos=[])
    assert [one.token_ids for one in alone] == [one.token_ids for one in together]
    assert [one.prompt_tokens for one in alone] == [1 + 10 + 16, 1 + 15 + 32, 6]
    for one, ids, seen in zip(alone[:2], prompts, images):
        assert one.token_ids == recomputed(found, ids, seen)
    assert alone[2].token_ids == expected(prompts[2], None)


def test_places_are_those_of_the_whole_prompt() -> None:
    found = generator("torch", DROP)
    assert found.pictures is not None
    written = found.pictures.written("it", prompt(2, 2), picture(2, 2))
    assert written is not None
    assert len(written.ids) == len(written.places) == 1 + 15 + 32 and written.rows.shape == (32, 64)
    assert (np.diff(written.places) > 0).all() and written.places[-1] == 1 + 15 + 128 - 1
    assert [token for token in written.ids if token >= 200] == list(range(200, 232))


def test_a_compact_text_counts_without_them() -> None:
    found = generator("torch", DROP.replace("}", " positions=compact}"))
    one = found.generate(prompt(1, 1), NEW, images=picture(1), eos=[])
    assert one.token_ids == recomputed(found, prompt(1, 1), picture(1), compact=True)


@pytest.mark.parametrize(
    ("runtime", "bits"),
    [
        ("torch", 8),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (("torch", 4), ("onnxruntime", 8), ("onnxruntime", 4))
        ),
    ],
)
def test_with_weights_of_few_bits_the_text_is_that_of_recomputation(runtime: str, bits: int) -> None:
    found = generator(runtime, DROP, bits=bits)
    assert found.settings["bits"] == bits
    one = found.generate(prompt(2, 2), NEW, images=picture(2, 2), eos=[])
    assert one.token_ids == anew(found, prompt(2, 2), picture(2, 2))
    assert one.pictures is not None and (one.pictures["tokens"], one.pictures["kept"]) == (128, 32)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_the_quantized_graph_without_a_cache_says_the_same(bits: int) -> None:
    """positions=compact, so that the plain graph, which counts from 0, reads the same text."""
    drop = DROP.replace("}", " positions=compact}")
    found = generator("torch", drop, bits=bits, method="rtn")
    parts = parted_graph(drop)
    context = PassContext(force=True, target="torch")
    passes = f"quantize{{bits={bits} method=rtn}},lower"
    report = run_pipeline(parts.text, parse(passes), context=context)
    assert report.passes[0].changed
    plain = report.graph
    assert found.pictures is not None
    written = found.pictures.written("it", prompt(1, 1), picture(1))
    assert written is not None
    made: list[int] = []
    for _ in range(NEW):
        ids = np.array([[*written.ids, *made]])
        (scores,) = plain.evaluate(plain.outputs[:1], dict(zip(plain.inputs, (ids, written.rows))))
        made.append(int(scores[0, -1].argmax()))
    assert found.generate(prompt(1, 1), NEW, images=picture(1), eos=[]).token_ids == made


def parted_graph(drop: str) -> Any:
    def tell(_: str) -> None:
        pass

    images = pictures_of(picture())
    graph, _ = plain_graph(module(), "torch", tell, images)
    return parted(graph, module(), images, drop, 256, 512, tell)


@pytest.mark.slow
def test_drafts_and_weights_of_few_bits_go_with_it() -> None:
    plain = generator("onnxruntime", DROP, bits=8)
    drafting = generator("onnxruntime", DROP, bits=8, drafter="auto", guard=False)
    ids, seen = prompt(1, 1), picture(1)
    one, other = (each.generate(ids, 40, images=seen, eos=[]) for each in (plain, drafting))
    assert one.token_ids == other.token_ids and other.speculation is not None
    assert other.speculation["rows_verified"] > 39  # there were drafts


def test_what_does_not_fit_is_one_sentence() -> None:
    found = generator("torch", DROP)
    for images, ids, sentence in (
        (None, prompt(1), "the prompt has 1 image tokens .id 190. for 0 images"),
        (picture(0, 2), prompt(1), "the prompt has 1 image tokens .id 190. for 2 images"),
        ({"pixels": 1}, prompt(1), "images lack 'pixel_values'; the vision part reads pixel_values"),
        (
            {"pixel_values": np.zeros((1, 3, 16, 16))},
            prompt(1),
            r"pixel_values \[1, 3, 16, 16\] is no number of images",
        ),
        ([None, None], prompt(1), "there are 2 entries of images for 1 prompts"),
    ):
        with pytest.raises(ElisionError, match=sentence):
            found.generate(ids, 2, images=images)
    with pytest.raises(ElisionError, match="has 972 tokens, the model's context 512"):
        found.generate(prompt(14), 2, images=picture(0, 14))
    for drafter in ("self", "hierarchical"):
        with pytest.raises(ElisionError, match=f"the drafter '{drafter}' reads the prompt for itself"):
            elision.Generator(module(), images=picture(), drafter=drafter)
    with pytest.raises(ElisionError, match="drop is for models that read pictures"):
        elision.Generator(module(), drop=DROP)
    with pytest.raises(ElisionError, match="must be gone for the text"):
        elision.Generator(module(), images=picture(), drop="token-drop{outputs=restore}", cache=False)


def test_a_budget_by_content_gives_every_image_its_own_number_of_rows() -> None:
    found = generator("torch", "token-drop{policy=cls-topk budget=0.5 adaptive=mass mass=0.7}")
    assert found.pictures is not None
    busy = {"pixel_values": 30 * picture(5)["pixel_values"]}
    counts = []
    for images in (picture(3), busy):
        written = found.pictures.written("it", prompt(1), images)
        assert written is not None and len(written.ids) == 1 + 10 + len(written.rows)
        assert sorted(t for t in written.ids if t >= 200) == list(range(200, 200 + len(written.rows)))
        assert written.places[-1] == 1 + 10 + 64 - 1 and (np.diff(written.places) > 0).all()
        counts.append(len(written.rows))
        one = found.generate(prompt(1), NEW, images=images, eos=[])
        assert one.token_ids == recomputed(found, prompt(1), images)
    assert counts[0] != counts[1] and max(counts) < 32  # the capacity


@pytest.mark.slow
def test_a_folder_with_arrays_of_pixels(tmp_path: Path) -> None:
    module().save_pretrained(tmp_path / "model")
    example = {"pixel_values": picture()["pixel_values"].numpy()}
    options = {"images": example, "drop": DROP, "context": 256, "runtime": "torch"}
    for cached in (False, True, True):
        found = elision.Generator(tmp_path / "model", cache=cached, **options)
        one = found.generate(
            prompt(1, 1), NEW, images={"pixel_values": picture(1)["pixel_values"].numpy()}, eos=[]
        )
        assert (
            one.token_ids
            == generator("torch", DROP).generate(prompt(1, 1), NEW, images=picture(1), eos=[]).token_ids
        )


def test_a_file_reads_no_pictures(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"")
    with pytest.raises(
        ElisionError, match="pictures are read by a transformers model, in memory or in a folder"
    ):
        elision.Generator(file, images=picture())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("paligemma", "reads a prompt with an image otherwise than one token after the other"),
        ("mllama", "image-ids found no place"),
        ("qwen2_5_vl", "cannot be traced by torch.export"),
    ],
)
def test_models_that_read_otherwise_are_refused(name: str, sentence: str) -> None:
    given = {key: item for key, item in VLMS[name].inputs(1).items() if "pixel" in key or "aspect" in key}
    if name == "qwen2_5_vl":
        given["image_grid_thw"] = torch.tensor([[1, 8, 8]])
    with pytest.raises(ElisionError, match=sentence):
        elision.Generator(VLMS[name].module().inner, images=given, runtime="torch", cache=False)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "internvl", "blip2", "gemma3"])
def test_other_architectures_say_what_they_say_themselves(name: str, runtime: str) -> None:
    model, whole = VLMS[name].module().inner, VLMS[name].inputs(1)
    given: dict[str, Any] = {"pixel_values": whole["pixel_values"]}
    if name.startswith("llava"):
        given["image_sizes"] = [[24, 32]]
    found = elision.Generator(model, images=given, runtime=runtime, context=256, cache=False)
    ids = whole["input_ids"]
    one = found.generate(ids[0].tolist(), NEW, images={"pixel_values": given["pixel_values"]}, eos=[])
    mask = torch.ones_like(ids)
    how = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        made = model.generate(input_ids=ids, attention_mask=mask, **given, **how)
    assert one.token_ids == made[0, ids.shape[1] :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("drop", [DROP, "token-drop{policy=hired budget=0.25 tiles=5 grid=[2,2]}"])
def test_tiles_and_the_newlines_between_their_rows(name: str, runtime: str, drop: str) -> None:
    model, whole = VLMS[name].module().inner, VLMS[name].inputs(1)
    images: dict[str, Any] = {"pixel_values": whole["pixel_values"], "image_sizes": torch.tensor([[24, 32]])}
    found = elision.Generator(model, images=images, drop=drop, runtime=runtime, context=256, cache=False)
    ids = whole["input_ids"][0].tolist()
    one = found.generate(ids, NEW, images=images, eos=[])
    assert one.token_ids == recomputed(found, ids, images, whole=model)
    assert one.pictures is not None and one.pictures["tokens"] == 70
    assert 6 + 10 < one.pictures["kept"] <= 6 + 20  # all newlines; what was chosen in padding comes nowhere
    two = {key: torch.cat([item, item]) for key, item in images.items()}
    twice = found.generate([*ids, *ids], 2, images=two, eos=[])
    assert twice.pictures is not None and twice.pictures["kept"] == 2 * one.pictures["kept"]
    with pytest.raises(
        ElisionError, match=r"image_sizes of a picture is \[32, 24\], and \[24, 32\] of the example"
    ):
        found.generate(ids, 2, images={**images, "image_sizes": [[32, 24]]})
