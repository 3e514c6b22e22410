"""Drafting on compiled models: both runtimes, every drafter and tree, all through what users call."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from elision.passes.errors import ElisionError
from elision.passes.onnx import io
from elision.runtime.bench_verify_command import describe
from elision.runtime.cli import app
from elision.runtime.drafter_heads import Heads
from elision.runtime.lm_compile import plain_graph
from elision.runtime.verify_costs import VerifyCosts
from typer.testing import CliRunner

import elision

from .lm_double import byte_tokenizer, tiny_llama

PROMPTS = ["aba aba aba", "once upon", "x"]
NEW = 24


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELISION_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def saved(path, seed, positions=128):
    tiny_llama(vocabulary=260, positions=positions, seed=seed).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"), 0)


@pytest.fixture(scope="module")
def draft_folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("draft"), 1)


@pytest.fixture(scope="module", params=["onnxruntime", "torch"])
def plain(request, folder):
    """(runtime, the ids of plain decoding, the ids that a seed draws)."""
    generator = elision.Generator(folder, runtime=request.param, context=96)
    assert generator.settings["exactness"] == "exact"
    greedy = [one.token_ids for one in generator.generate(PROMPTS, NEW, eos=[])]
    drawn = [
        one.token_ids for one in generator.generate(PROMPTS, NEW, eos=[], temperature=1.0, top_k=8, seed=3)
    ]
    return request.param, greedy, drawn


CASES = [
    *(("auto", tree) for tree in ("marginal", "fixed", "beam", "dyspec")),
    *((drafter, "marginal") for drafter in ("ngram", "recycling", "model", "self", "hierarchical")),
]


@pytest.mark.parametrize(("drafter", "tree"), CASES, ids=["-".join(case) for case in CASES])
def test_the_text_is_that_of_plain_decoding(folder, draft_folder, plain, drafter, tree):
    runtime, greedy, drawn = plain
    given = {"draft_model": draft_folder} if drafter in ("model", "hierarchical") else {}
    generator = elision.Generator(
        folder, runtime=runtime, context=96, drafter=drafter, tree=tree, guard=False, batch=2, **given
    )
    assert [one.token_ids for one in generator.generate(PROMPTS, NEW, eos=[])] == greedy
    again = generator.generate(PROMPTS, NEW, eos=[])  # with what was learned
    assert [one.token_ids for one in again] == greedy
    found = generator.generate(PROMPTS, NEW, eos=[], temperature=1.0, top_k=8, seed=3)
    assert [one.token_ids for one in found] == drawn
    told = again[0].to_json()["speculation"]
    assert told["rows_verified"] >= told["verifications"] > 0
    assert told["mode"] == "exact" and told["tree"] == tree


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_heads_on_hidden_states(folder, plain, runtime):
    """The model's own head as every head: it then guesses the token that was just committed, again."""
    if plain[0] != runtime:
        pytest.skip("the other runtime's turn")
    model = tiny_llama(vocabulary=260, positions=128, seed=0)
    weight = model.lm_head.weight.detach().numpy()
    drafter = Heads([(weight, None), (weight[::-1].copy(), None)], vocabulary=260)
    options = {"runtime": runtime, "context": 96, "guard": False, "tree": "fixed"}
    generator = elision.Generator(folder, drafter=drafter, taps="last", **options)
    found = generator.generate(PROMPTS, NEW, eos=[])
    assert [one.token_ids for one in found] == plain[1]
    assert all(one.speculation["rows_verified"] > one.speculation["verifications"] for one in found)
    without = elision.Generator(folder, drafter=Heads([(weight, None)]), **options)
    told = without.generate(PROMPTS, NEW, eos=[])  # no hidden states: nothing is guessed
    assert all(one.speculation["rows_verified"] == one.speculation["verifications"] for one in told)


def test_a_model_of_four_bits_drafts_for_itself_with_fewer_layers(folder, tmp_path):
    with pytest.raises(ElisionError, match="keeps the first and the last layer, and the graph has 2"):
        elision.Generator(folder, bits=4, context=96, method="rtn", drafter="self")
    tiny_llama(vocabulary=260, positions=128, layers=4).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    folder = tmp_path
    options = {"bits": 4, "context": 96, "method": "rtn"}
    target = elision.Generator(folder, **options).generate(PROMPTS, NEW, eos=[])
    told: list[str] = []
    generator = elision.Generator(folder, drafter="self", guard=False, notify=told.append, **options)
    assert any("skip-layers" in step for step in told)
    found = generator.generate(PROMPTS, NEW, eos=[])
    assert [one.token_ids for one in found] == [one.token_ids for one in target]


def test_an_onnx_file_is_a_model_too(folder, tmp_path):
    """Without a cache of its own, as torch writes it."""
    model = tiny_llama(vocabulary=260, positions=128, seed=0)
    graph, _ = plain_graph(model, "onnxruntime", lambda _step: None)
    io.save_model(graph.model, tmp_path / "model.onnx")
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ElisionError, match="an ONNX file runs with --runtime onnxruntime"):
        elision.Generator(tmp_path / "model.onnx", runtime="torch")
    generator = elision.Generator(tmp_path / "model.onnx", context=96, drafter="auto", guard=False)
    ids = generator.encode(PROMPTS[0])
    with torch.no_grad():
        expected = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(), max_new_tokens=NEW,
            do_sample=False, pad_token_id=0, eos_token_id=None,
        )[0, len(ids) :].tolist()  # fmt: skip
    assert generator.generate(PROMPTS[0], NEW, eos=[]).token_ids == expected


# ---- the shell -------------------------------------------------------------------------------------------
def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_generate_with_a_drafter(folder):
    basic = (
        "generate",
        "-m",
        folder,
        "--prompt",
        PROMPTS[0],
        "--max-new-tokens",
        NEW,
        "--context",
        96,
        "--json",
    )
    without, drafted = run(*basic, "--ignore-eos"), run(*basic, "--ignore-eos", "--drafter", "auto")
    assert without.exit_code == drafted.exit_code == 0, drafted.output
    without, drafted = json.loads(without.stdout), json.loads(drafted.stdout)
    assert drafted["text"] == without["text"] and "speculation" not in without
    assert {"verifications", "acceptance", "draft_seconds", "verify_seconds", "rest_seconds"} <= set(
        drafted["speculation"]
    )


def test_bench_verify(folder):
    found = run("bench-verify", "-m", folder, "--context", 96, "--json")
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    assert told["rows"][0] == 1 and all(line == sorted(line) for line in told["milliseconds"])
    text = run("bench-verify", "-m", folder, "--context", 96)
    assert text.exit_code == 0 and "chance 0.9" in text.stdout
    again = run("bench-verify", "-m", folder, "--context", 96, "--json")
    assert json.loads(again.stdout) == told  # kept, not measured again


def test_the_best_chain_follows_the_costs():
    flat = describe(VerifyCosts((1, 8), (0,), ((1.0, 1.0),)))["best_chains"]
    assert [entry["rows"] for entry in flat] == [8] * len(flat)
    steep = describe(VerifyCosts((1, 2, 8), (0,), ((1.0, 2.0, 8.0),)))["best_chains"]
    assert [entry["rows"] for entry in steep] == [1] * len(steep) and steep[0]["speedup"] == 1
    (half, *_) = describe(VerifyCosts((1, 2, 3), (0,), ((1.0, 1.1, 2.0),)))["best_chains"]
    assert (half["chance"], half["rows"]) == (0.5, 2) and np.isclose(half["speedup"], 1.5 / 1.1, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--drafter", "fast"], "a drafter is none, auto"),
        (["--drafter", "model"], "needs a draft model"),
        (["--draft-model", "x"], "is for the drafters"),
        (["--drafter", "auto", "--mode", "fast"], "the mode is exact or sampling"),
        (["--drafter", "auto", "--tree", "oak"], "a tree is marginal"),
        (["--report", "x.html"], "takes one --prompt and a --drafter"),
        (["--drafter", "auto", "--report", "/nowhere/x.html"], "no such folder"),
    ],
)
def test_mistakes(folder, arguments, text):
    result = run("generate", "-m", folder, "--prompt", "a", *arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert text in line
