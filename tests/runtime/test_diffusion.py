"""`elision.DiffusionGenerator` and `elision generate` for a masked diffusion model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from elision.passes.errors import ElisionError
from elision.runtime.canvas_facts import CanvasFacts
from elision.runtime.cli import app
from elision.runtime.diffusion import DiffusionGenerator, How
from typer.testing import CliRunner

import elision

from .canvas_models import EagerCanvas, make
from .lm_double import byte_tokenizer, tiny_llama

MASK, END = 259, 2


def around(kind: str = "llada", **changes: Any) -> DiffusionGenerator:
    model = make(kind, dtype=torch.float32, **changes)
    config = model.config
    facts = CanvasFacts(config.vocab_size, config.mask_token_id, 96, (config.eos_token_id,), kind == "dream")
    return DiffusionGenerator.around(EagerCanvas(model), facts, batch=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny masked language model with a byte tokenizer, as transformers saves it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("masked")
    config = transformers.ModernBertConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        global_attn_every_n_layers=1, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
        cls_token_id=1, sep_token_id=END, eos_token_id=END, mask_token_id=MASK,
    )  # fmt: skip
    model = transformers.ModernBertForMaskedLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.3)
    model.save_pretrained(path)
    byte_tokenizer(259).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def autoregressive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("causal")
    tiny_llama().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


def refused(*arguments: object) -> str:
    """The one line of a call that must fail."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.output.splitlines() if line.strip()]
    assert len(lines) == 1, result.output
    return lines[0]


# ---- the class ---------------------------------------------------------------------------------------------
def test_one_prompt_gives_one_result_and_several_give_a_list() -> None:
    generator = around()
    one = generator.generate([1, 2, 3], 12)
    assert one.new_tokens == len(one.token_ids) == 12 and one.prompt_tokens == 3 and one.finish == "masks"
    assert 39 not in one.token_ids
    several = generator.generate([[1, 2, 3], [4, 5]], 12)
    assert [item.prompt_tokens for item in several] == [3, 2]
    assert several[0].token_ids == one.token_ids


def test_what_was_computed_and_the_seconds_add_up() -> None:
    one = around().generate([1, 2, 3], 40, window=12, active=4, refresh=5)
    assert one.steps == 40 and one.refreshes == 8
    assert one.token_computations < one.token_computations_full == 40 * 43
    told = one.to_json()
    assert "result" not in told and told["settings"]["window"] == 12
    assert told["settings"]["policy"] == "window" and told["settings"]["rule"] == "confidence"
    assert min(told["refresh_seconds"], told["step_seconds"], told["rest_seconds"]) > 0
    json.dumps(told)


def test_masks_in_the_prompt_are_filled_in_where_they_stand() -> None:
    one = around().generate([1, 39, 2, 39, 3], 0)
    assert one.new_tokens == 2 and one.result.token_ids[::2] == [1, 2, 3]


def test_every_policy_and_rule_goes_by_its_name() -> None:
    generator = around()
    for policy in ("window", "prefix", "dual", "delayed", "block", "none"):
        for rule in ("confidence", "entropy", "margin", "random", "threshold", "left"):
            one = generator.generate([1, 2, 3], 8, policy=policy, rule=rule)
            assert one.new_tokens == 8 and one.settings["policy"] == policy


def test_a_window_alone_makes_room_for_fewer_active_tokens() -> None:
    assert How(window=8).parts()[0] == How(window=8, active=8).parts()[0]
    assert How(window=200).to_json()["active"] == 32


def test_an_end_of_text_cuts_the_text_and_with_early_stop_the_canvas() -> None:
    generator = around()
    plain = generator.generate([1, 2, 3], 16, rule="left")
    end = plain.token_ids[5]
    first = plain.token_ids.index(end)
    stopped = generator.generate([1, 2, 3], 16, rule="left", eos=end, early_stop=True)
    assert stopped.finish == "eos" and stopped.token_ids == plain.token_ids[: first + 1]
    assert stopped.steps == first + 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"window": 4, "active": 8}, "a window of 4 tokens has no room for 8 active ones"),
        ({"active": 0}, "at least 1 token is active, not 0"),
        ({"refresh": 0}, "a refresh every 1 or more steps, not 0"),
        ({"policy": "none", "window": 8}, "the policy none has no window"),
        ({"policy": "windows"}, "unknown policy 'windows'"),
        ({"rule": "best"}, "unknown rule 'best'"),
        ({"steps": 0}, "at least 1 denoising step is needed, not 0"),
        ({"tempo": 1}, "'tempo' is no option of generate"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ElisionError, match=message):
        around().generate([1, 2, 3], 8, **options)


def test_canvases_that_cannot_be_made() -> None:
    generator = around()
    with pytest.raises(ElisionError, match="no mask"):
        generator.generate([1, 2, 3], 0)
    with pytest.raises(ElisionError, match="97 positions"):
        generator.generate([1, 2, 3], 94)
    with pytest.raises(ElisionError, match="without a tokenizer"):
        generator.generate("text", 4)
    with pytest.raises(ElisionError, match="token id 40 is out of range"):
        generator.generate([40], 4)


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_a_module_is_compiled_and_decides_what_its_double_decides(runtime: str) -> None:
    module = make("dream", dtype=torch.float32)
    generator = elision.DiffusionGenerator(module, runtime=runtime, context=64)
    assert generator.facts.shift and generator.facts.mask == 39
    assert generator.settings["step_against_refresh"] < 1e-5
    for options in ({}, {"window": 8, "active": 4, "refresh": 3}, {"policy": "dual", "block": 8}):
        expected = around("dream").generate([5, 6, 7], 20, **options)
        assert generator.generate([5, 6, 7], 20, **options).token_ids == expected.token_ids


# ---- the command ---------------------------------------------------------------------------------------------
def test_the_command_writes_text_json_and_a_page(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "canvas.html"
    shared = ["--model", folder, "--prompt", "abc", "--max-new-tokens", 12]
    window = ["--window", 8, "--active", 4, "--refresh", 4]
    found = run(*shared, *window, "--json", "--report", page)
    assert found.exit_code == 0, found.output
    (line,) = found.output.splitlines()
    told = json.loads(line)
    assert told["new_tokens"] == 12 and told["steps"] == 12 and told["refreshes"] == 3
    assert told["token_computations"] < told["token_computations_full"] == 12 * 15
    assert told["settings"]["bits"] == 32
    assert page.is_file() and page.with_suffix(".png").is_file()
    plain = run(*shared, *window)
    assert plain.exit_code == 0 and plain.output.rstrip("\n") == told["text"].rstrip("\n")
    again = run(*shared, "--policy", "none", "--runtime", "torch", "--steps", 6, "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.output)["steps"] == 6


def test_the_command_takes_a_file_of_prompts(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "ab"}\n{"prompt": "longer than that"}\n')
    found = run("--model", folder, "--prompts", prompts, "--max-new-tokens", 8, "--json")
    assert found.exit_code == 0, found.output
    assert [json.loads(line)["prompt_tokens"] for line in found.output.splitlines()] == [2, 16]


def test_the_command_says_in_one_line_what_cannot_be(
    folder: Path, autoregressive: Path, tmp_path: Path
) -> None:
    shared = ["--model", folder, "--prompt", "abc", "--max-new-tokens", 8]
    assert "a window of 4 tokens has no room for 8" in refused(*shared, "--window", 4, "--active", 8)
    assert "at least 1 token is active, not 0" in refused(*shared, "--active", 0)
    assert "a refresh every 1 or more steps, not 0" in refused(*shared, "--refresh", 0)
    assert "--drafter takes an autoregressive model" in refused(*shared, "--drafter", "ngram")
    assert "67 positions" in refused("--model", folder, "--prompt", "abc", "--max-new-tokens", 64)
    assert "no mask" in refused("--model", folder, "--prompt", "abc", "--max-new-tokens", 0)
    causal = ["--model", autoregressive, "--prompt", "abc", "--max-new-tokens", 8]
    assert "an autoregressive model (LlamaForCausalLM): --window takes" in refused(*causal, "--window", 8)
    lost = tmp_path / "no" / "page.html"
    assert str(lost.parent) in refused(*shared, "--report", lost)


def test_a_causal_module_is_refused_by_the_graph() -> None:
    with pytest.raises(ElisionError, match="the attention is causal"):
        elision.DiffusionGenerator(tiny_llama(), mask=3)
    with pytest.raises(ElisionError, match="no mask token"):
        elision.DiffusionGenerator(tiny_llama())


def test_ids_come_as_arrays_too() -> None:
    generator = around()
    ids = np.array([1, 2, 3])
    assert generator.generate(ids, 6).token_ids == generator.generate(ids.tolist(), 6).token_ids


def test_the_trained_model_fills_in_as_well_through_a_window() -> None:
    """examples/models: half of 160 held-out ids of two excerpts. Both are far above what four-grams reach (15 %)."""
    model = Path(__file__).parents[2] / "examples" / "models" / "pycode-diffusion"
    generator = elision.DiffusionGenerator(str(model), context=256)
    lines = (model / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:2]
    right, total = {"none": 0, "window": 0, "whole": 0}, 0
    for number, line in enumerate(lines):
        row = json.loads(line)
        true = np.array(generator.encode(row["prompt"] + row["rest"])[:160])
        masked = np.random.default_rng(number).random(160) < 0.5
        masked[:4] = False
        canvas = np.where(masked, generator.facts.mask, true)
        total += int(masked.sum())
        found = {
            "none": generator.generate(canvas, 0, policy="none", eos=[]),
            "window": generator.generate(canvas, 0, window=32, active=16, refresh=8, eos=[]),
            "whole": generator.generate(canvas, 0, window=160, active=160, refresh=1, eos=[]),
        }
        for name, one in found.items():
            right[name] += int((np.array(one.result.token_ids) == true)[masked].sum())
        assert found["whole"].token_ids == found["none"].token_ids
        assert found["window"].token_computations < 0.75 * found["none"].token_computations
    assert right["none"] > 0.25 * total and right["window"] > 0.8 * right["none"]
