"""Models as .mlir files through torch-mlir, and what IREE makes of them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from elision.runtime.cli import app
from elision.runtime.mlir_lower import PIPELINES
from onnx import TensorProto, helper
from torch import nn
from torch.testing import assert_close
from typer.testing import CliRunner

import elision

OPTIONAL = "an optional package of elision[mlir], which the test extra has"
pytest.importorskip("torch_mlir", reason=OPTIONAL)
pytest.importorskip("iree.compiler", reason=OPTIONAL)
pytest.importorskip("iree.runtime", reason=OPTIONAL)

MERGE = "token-merge{r=4}"


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    """Two blocks with random weights: 17 tokens, of which 13 and 9 are left."""
    import timm

    torch.manual_seed(0)
    name = "vit_tiny_patch16_224"
    return timm.create_model(name, img_size=64, depth=2, embed_dim=96, num_heads=3, num_classes=10).eval()


@pytest.fixture(scope="module")
def merged(vit: nn.Module, picture: torch.Tensor) -> torch.fx.GraphModule:
    return elision.optimize(vit, MERGE, (picture,), verify=False).module


@pytest.fixture(scope="module")
def vit_file(vit: nn.Module, picture: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vit") / "vit.onnx"
    elision.export_onnx(vit, (picture[:1],), path, verify=False)
    return path


def written(path: Path) -> str:
    """The file without its constants."""
    text = path.read_text()
    return text[: text.index("{-#")] if "{-#" in text else text


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# ---- torch models ------------------------------------------------------------------------------------
def test_a_merged_vit_in_iree_is_what_it_is_in_torch(
    vit: nn.Module, picture: torch.Tensor, tmp_path: Path
) -> None:
    wanted = elision.optimize(vit, MERGE, (picture,)).module(picture)
    path = tmp_path / "vit.mlir"
    result = elision.export_mlir(vit, (picture,), path, MERGE)
    assert [single.name for single in result.report.passes] == ["token-merge", "lower"]
    assert result.report.passes[1].statistics["match_tokens taken apart"] == 2
    assert_close(result.module(picture), wanted, rtol=1e-5, atol=1e-5)
    compiled = elision.compile_iree(path, device="local-sync")
    found = compiled(picture)
    assert isinstance(found, torch.Tensor)
    assert_close(found, wanted.detach(), rtol=1e-3, atol=1e-3)
    assert (
        float((vit(picture) - wanted).detach().abs().max()) > 1e-3
    )  # it is the merged model that was compared
    array = compiled(picture.numpy())
    assert isinstance(array, np.ndarray) and np.array_equal(array, found.numpy())
    for wrong, text in (
        ((picture[:1],), "expected 2"),
        ((), "argument"),
        ((picture.double(),), "element type"),
    ):
        with pytest.raises(elision.ElisionError, match=text) as caught:
            compiled(*wrong)
        assert "\n" not in str(caught.value) and ".c:" not in str(caught.value)


@pytest.mark.parametrize("dialect", PIPELINES)
def test_dialects(
    vit: nn.Module, merged: torch.fx.GraphModule, picture: torch.Tensor, tmp_path: Path, dialect: str
) -> None:
    """Each file is complete, parses, and holds no op of ours nor of torch-mlir's own `tm_tensor`."""
    import iree.compiler.tools as compiler
    from torch_mlir import ir
    from torch_mlir.dialects import torch as torch_dialect

    path = tmp_path / "vit.mlir"
    elision.export_mlir(merged, (picture,), path, dialect=dialect, verify=False)
    assert [p.name for p in tmp_path.iterdir()] == ["vit.mlir"]
    used = set(re.findall(r"\b(linalg|stablehlo|tosa|torch|tm_tensor|elision)\.", written(path)))
    assert used == {"linalg-on-tensors": {"linalg"}}.get(dialect, {dialect})
    weights = sum(p.numel() * p.element_size() for p in vit.parameters())
    assert 2 * weights < path.stat().st_size < 2 * weights + 500_000
    if dialect == "stablehlo":  # which torch-mlir's Python does not parse
        flags = ["--compile-to=input"]
        assert compiler.compile_file(str(path), target_backends=["llvm-cpu"], extra_args=flags)
        return
    with ir.Context() as context:
        torch_dialect.register_dialect(context)
        module = ir.Module.parse(path.read_text())
        assert module.operation.verify()
        (main,) = module.body.operations
        assert main.operation.name == "func.func" and str(main.operation.attributes["sym_name"]) == '"main"'


class Positions(nn.Module):
    """Sorts of the model itself, a stable one among them, and the op that has most of ours in it."""

    def forward(self, metric: torch.Tensor) -> Any:
        slot, keep, _ = torch.ops.elision.match_tokens(metric, r=2, prefix=1)
        return slot, keep, torch.sort(metric[:, :, 0], dim=1, descending=True, stable=True).indices


def test_a_dynamic_batch(tmp_path: Path) -> None:
    module, batch = Positions(), torch.export.Dim("batch", min=2, max=64)
    compiled = elision.compile_iree(
        module, (torch.randn(3, 9, 4),), dynamic_shapes=({0: batch},), device="local-sync"
    )
    for length in (2, 5):
        metric = torch.randn(length, 9, 4)
        for one, other in zip(compiled(metric), module(metric), strict=True):
            assert torch.equal(one, other)


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor, factor: torch.Tensor) -> Any:
        return x * factor, x.sum() > 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_run_iree_compiles_for_its_inputs(dtype: torch.dtype) -> None:
    x, factor = torch.randn(3, 4).to(dtype), torch.tensor(2.0).to(dtype)  # a scalar stays one
    found = elision.run_iree(Scaled(), x, factor, device="local-sync")
    assert torch.equal(found[0], x * factor) and torch.equal(found[1], torch.tensor(False))


# ---- ONNX models -------------------------------------------------------------------------------------
def test_an_onnx_file_on_the_command_line(vit_file: Path, picture: torch.Tensor, tmp_path: Path) -> None:
    """What lowers for onnxruntime is undone: the file is one that `elision optimize` wrote."""
    out, faster = tmp_path / "vit.mlir", tmp_path / "faster.onnx"
    elision.optimize(vit_file, MERGE, verify=False).save(faster)
    feeds = {"x": picture[:1].numpy()}
    (wanted,) = ort.InferenceSession(faster).run(None, feeds)
    result = run("export-mlir", faster, "-o", out, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["dialect"] == "linalg-on-tensors" and data["bytes"] == out.stat().st_size
    assert not re.search(r"\b(torch|tm_tensor|onnx)\.", written(out).replace("torch.assume_strict", ""))
    found = elision.compile_iree(out, device="local-sync")(feeds["x"])
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)


def test_passes_on_the_command_line(vit_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "vit.mlir"
    result = run("export-mlir", vit_file, "-o", out, "-p", MERGE, "--dialect", "torch", "--no-verify")
    assert result.exit_code == 0, result.output
    assert "token-merge: match_tokens 2" in result.stdout and f"wrote {out}" in result.stdout
    assert "torch.aten.matmul" in written(out) and "[1,13,96]" in written(out)


def one_node(kind: str, shape: list[Any], *, inputs: int = 1, **attributes: Any) -> onnx.ModelProto:
    """A model of one node over operands of one shape, the first of which is its output's too."""
    names = [f"x{i}" for i in range(inputs)]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node(kind, names, ["y"], **attributes)], "g", values, [out])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_lengths_of_an_onnx_model(tmp_path: Path) -> None:
    """Symbols become numbers: the batch, or what the example inputs have."""
    out = tmp_path / "y.mlir"
    elision.export_mlir(one_node("Tanh", ["batch", 4]), None, out, batch=3)
    assert "tensor<3x4xf32>" in written(out)
    symbolic = one_node("Tanh", ["batch", "length"])
    with pytest.raises(elision.ElisionError, match="length"):
        elision.export_mlir(symbolic, None, tmp_path / "z.mlir")
    elision.export_mlir(symbolic, (torch.zeros(2, 7),), out)
    assert "tensor<2x7xf32>" in written(out)


# ---- mistakes ----------------------------------------------------------------------------------------
class Values(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svdvals(x)


def test_an_operator_that_cannot_be_lowered_is_named(tmp_path: Path) -> None:
    out = tmp_path / "y.mlir"
    with pytest.raises(elision.ElisionError, match=r"aten\._linalg_svd"):
        elision.export_mlir(Values(), (torch.randn(3, 3),), out)
    with pytest.raises(elision.ElisionError, match=r"aten\.fft_fft"):
        elision.export_mlir(one_node("DFT", [3, 4, 1]), None, out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["{model}", "-o", "{out}", "--dialect", "linalg"], "linalg-on-tensors"),
        (["{model}", "-o", "{folder}/no/out.mlir"], "no such folder"),
        (["{model}", "-o", "{folder}"], "a folder"),
        (["{model}", "-o", "{out}", "-p", "token-merge{r=many}"], "r"),
        (["{model}"], "--output"),
        (["{folder}/model.pt2", "-o", "{out}"], "unpickles"),
        (["{folder}/model.onnx", "-o", "{out}"], "no such file"),
    ],
)
def test_mistakes_leave_nothing(vit_file: Path, tmp_path: Path, arguments: list[str], text: str) -> None:
    names = {"model": vit_file, "folder": tmp_path, "out": tmp_path / "out.mlir"}
    filled = []
    for argument in arguments:
        for name, value in names.items():
            argument = argument.replace("{" + name + "}", str(value))
        filled.append(argument)
    result = run("export-mlir", *filled)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert text in line and "internal error" not in line
    assert not list(tmp_path.iterdir())


def test_without_torch_mlir(vit_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch_mlir", "torch_mlir.ir"):
        monkeypatch.setitem(sys.modules, name, None)
    result = run("export-mlir", vit_file, "-o", tmp_path / "out.mlir")
    assert result.exit_code == 2
    assert "pip install 'elision[mlir]'" in result.stderr and not list(tmp_path.iterdir())


def test_without_iree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("iree.compiler", "iree.compiler.tools"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(elision.ElisionError, match=r"pip install 'elision\[mlir\]'"):
        elision.run_iree(nn.Tanh(), torch.randn(3))


def test_files_that_are_no_mlir(tmp_path: Path) -> None:
    path = tmp_path / "model.mlir"
    with pytest.raises(elision.ElisionError, match="no such file"):
        elision.compile_iree(path)
    path.write_text("func.func @main( {")
    with pytest.raises(elision.ElisionError, match=r"IREE cannot compile model\.mlir"):
        elision.compile_iree(path)
    with pytest.raises(elision.ElisionError, match="as it stands"):
        elision.compile_iree(path, (torch.zeros(1),))
