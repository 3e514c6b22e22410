"""`elision generate --image`: photographs from files, read by the processor of the model's folder."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from elision.passes.errors import ElisionError
from elision.runtime.cli import app
from elision.runtime.generate_command import figures
from typer.testing import CliRunner

from .vlm_folder import MARK, TOKENS, llava_folder, photograph

DROP = "token-drop{policy=cls-topk budget=0.25}"
SAID = ["--max-new-tokens", "8", "--context", "128", "--ignore-eos", "--runtime", "torch"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and two photographs beside it."""
    folder = tmp_path_factory.mktemp("photographs")
    llava_folder(folder / "model")
    photograph(folder / "one.png", 1)
    photograph(folder / "two.jpg", 2, (30, 50))
    return folder


@pytest.fixture(autouse=True)
def own_cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELISION_CACHE", str(place / "cache"))  # shared, so that each form is compiled once


def generate(place: Path, *arguments: object) -> Any:
    given = ["generate", "--model", place / "model", *SAID, *arguments]
    return CliRunner().invoke(app, [str(one) for one in given])


def expected(place: Path, text: str, *files: str) -> list[int]:
    """What the model itself writes after a text with marks, its pictures read by its processor."""
    import transformers as hf
    from PIL import Image

    processor = hf.AutoProcessor.from_pretrained(place / "model")
    model = hf.LlavaForConditionalGeneration.from_pretrained(place / "model").eval()
    pictures = [Image.open(place / name).convert("RGB") for name in files]
    given = processor(text=text, images=pictures, return_tensors="pt")
    with torch.no_grad():
        made = model.generate(**given, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    return made[0, given["input_ids"].shape[1] :].tolist()


def test_with_all_tokens_the_text_is_the_models_own(place: Path) -> None:
    one, two = place / "one.png", place / "two.jpg"
    for arguments, text, files in (
        (("--image", one, "--prompt", "What is this?"), f"{MARK}What is this?", ["one.png"]),
        (("--image", one, "--prompt", f"This {MARK} is"), f"This {MARK} is", ["one.png"]),
        (("--image", one, "--image", two, "--prompt", "Both"), f"{MARK}{MARK}Both", ["one.png", "two.jpg"]),
        (
            ("--image", two, "--prompt", "Well?", "--chat", "--system", "Be brief"),
            f"system:Be brief\nuser:{MARK}Well?\nassistant:",
            ["two.jpg"],
        ),
    ):
        result = generate(place, *arguments, "--json")
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert found["token_ids"] == expected(place, text, *files)
        pictures = found["pictures"]
        assert pictures.pop("vision_seconds") > 0
        assert pictures == {"images": len(files), "tokens": TOKENS * len(files), "kept": TOKENS * len(files)}
        assert found["prefill_seconds"] > 0 and found["settings"].get("chat", False) == (
            "--chat" in arguments
        )


def test_the_report_says_how_many_tokens_were_kept(place: Path) -> None:
    given = ("--image", place / "one.png", "--prompt", "What is this?", "--drop", DROP)
    result = generate(place, *given, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["pictures"]["tokens"] == TOKENS and found["pictures"]["kept"] == TOKENS // 4
    assert found["prompt_tokens"] == TOKENS // 4 + len("What is this?") and found["settings"]["drop"] == DROP
    text = generate(place, *given)
    assert text.stdout == found["text"] + "\n"
    line = figures(SimpleNamespace(**found | {"prefill_seconds": 0.123, "tokens_per_second": 45.67}))
    assert re.fullmatch(
        r"22 \+ 8 tokens, 9 of 36 image tokens, seen in \d\.\d\d s, first token after 0\.12 s, 45\.7 tokens/s",
        line,
    )
    prompts = place / "prompts.jsonl"
    prompts.write_text('{"prompt": "What is this?"}\n{"prompt": "And where?"}\n')
    many = generate(place, *given[:2], "--prompts", prompts, "--drop", DROP, "--json")
    assert many.exit_code == 0, many.output
    lines = [json.loads(line) for line in many.stdout.splitlines()]
    assert lines[0]["token_ids"] == found["token_ids"] and lines[1]["pictures"]["kept"] == TOKENS // 4


def test_mistakes_are_one_line(place: Path, tmp_path: Path) -> None:
    one, about = place / "one.png", ["--prompt", "What is this?"]
    words = tmp_path / "words.png"
    words.write_text("no picture")
    torn = tmp_path / "torn.png"
    torn.write_bytes(one.read_bytes()[:60])
    blind = tmp_path / "blind"
    blind.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(place / "model" / name, blind)
    file = tmp_path / "model.onnx"
    file.write_bytes(b"")
    for arguments, sentence in (
        (["--image", tmp_path / "none.png", *about], "none.png: no such file"),
        (["--image", words, *about], "words.png: no picture that can be read (JPEG, PNG, WEBP"),
        (["--image", torn, *about], "torn.png: no picture that can be read"),
        (["--image", tmp_path, *about], "no such file"),
        (["--drop", DROP, *about], "--drop takes --image"),
        (["--image", one, "--drop", "token-drop{policy=best}", *about], "best"),
        (
            ["--image", one, "--drop", "token-drop{policy=fastv}", *about],
            "fastv drops inside the language model, whose layers would have caches of two lengths",
        ),
        (["--image", one, "--drop", "token-drop{outputs=restore}", *about], "must be gone for the text"),
        (["--image", one, "--drop", "token-drop{tiles=5 grid=[2,2]}", *about], "are no images of 5 pictures"),
        (
            ["--image", one, "--model", blind, *about],
            "has no preprocessor_config.json or processor_config.json, so its model reads no pictures",
        ),
        (["--image", one, "--model", file, *about], "not by a ONNX file"),
        (["--image", one, "--prompt", f"{MARK} and {MARK}"], "does not take this prompt"),
        (["--image", one, "--cache-size", "16", *about], "h2o reads the prompt for itself"),
    ):
        result = generate(place, *arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert sentence in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_without_a_processor_for_the_whole_its_image_processor_reads_the_pictures(
    place: Path, tmp_path: Path
) -> None:
    from elision.runtime.lm_photographs import PictureReader, open_photographs
    from elision.runtime.lm_source import find

    whole = PictureReader(find(place / "model"))
    pictures = open_photographs([place / "one.png", place / "two.jpg"])
    both = whole.read("Both", pictures, chat=False, system=None)
    reader = PictureReader(find(place / "model"))
    reader.processor = None  # as where transformers knows no class for it
    alone = reader.read("Both", pictures, chat=False, system=None)
    assert alone.ids == [whole.placeholder, whole.placeholder, *both.ids[-4:]]  # one for each picture
    assert torch.equal(alone.images["pixel_values"], both.images["pixel_values"])
    assert torch.equal(reader.example(pictures[0])["pixel_values"], both.images["pixel_values"][:1])


def test_some_processors_put_the_placeholders_themselves(place: Path) -> None:
    import transformers as hf
    from elision.runtime.lm_photographs import PictureReader, open_photographs
    from elision.runtime.lm_source import find

    reader = PictureReader(find(place / "model"))
    reader.processor = hf.Blip2Processor(reader.pixels, reader.tokenizer, num_query_tokens=4)
    found = reader.read("Both", open_photographs([place / "one.png"]), chat=False, system=None)
    assert found.ids == [*[reader.placeholder] * 4, *reader.tokenizer("Both")["input_ids"]]
    assert list(found.images) == ["pixel_values"]
    with pytest.raises(ElisionError, match="has no chat template: leave --chat away"):
        reader.read("Both", [], chat=True, system=None)
