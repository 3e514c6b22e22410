"""The library in ONNX Runtime: the results of the function bodies, errors for maps that lead nowhere, threads."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from elision.kernels import OPS, cpu
from onnx import TensorProto, helper

from .. import onnx_call
from ..cases import call, token_map
from .sessions import assert_same, calls, feeds_of, library, open_session, write_models

WORKER = Path(__file__).with_name("ort_worker.py")
OLDEST = "1.20.1"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("models")
    return folder, write_models(folder)


def run_worker(folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder), library()],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def check_results(folder: Path, labels: list[str]) -> None:
    assert len(labels) > 60
    for i, label in enumerate(labels):
        plain, custom = (np.load(folder / f"{i:03d}.{name}.npz") for name in ("plain", "custom"))
        for output in plain.files:
            assert_same(custom[output], plain[output], label)


@pytest.mark.parametrize("variant", cpu.variants() if cpu.available() else ["portable"])
def test_files_give_the_same_with_and_without_the_library(
    models: tuple[Path, list[str]], variant: str
) -> None:
    run_worker(models[0], **{cpu.ISA: variant})
    check_results(*models)


@pytest.fixture(scope="module")
def oldest_onnxruntime() -> Path:
    """A folder with the oldest onnxruntime that we support, fetched once for all runs on this machine."""
    folder = Path(tempfile.gettempdir()) / f"elision-onnxruntime-{OLDEST}-{sys.implementation.cache_tag}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{fresh}/it"]
            done = subprocess.run([*pip, f"onnxruntime=={OLDEST}"], capture_output=True, text=True)
            if "No matching distribution" in done.stderr:
                pytest.skip(f"there is no onnxruntime {OLDEST} for this Python")
            assert done.returncode == 0, done.stderr
            os.replace(f"{fresh}/it", folder)
    return folder


@pytest.mark.slow
def test_the_oldest_onnxruntime_runs_the_files_and_the_library(
    models: tuple[Path, list[str]], oldest_onnxruntime: Path, tmp_path: Path
) -> None:
    """All but attention in float64, which it fuses into an operator that it has no float64 kernel for, and products
    with weights of 8 bits, whose body's MatMulNBits came with 1.23."""
    folder, labels = models
    double = [i for i, label in enumerate(labels) if "attention" in label and "float64" in label]
    eight = [i for i, label in enumerate(labels) if "8 bits" in label]
    kept = [i for i in range(len(labels)) if i not in (*double, *eight)]
    for new, old in enumerate(kept):
        for kind in ("onnx", "npz"):
            (tmp_path / f"{new:03d}.{kind}").symlink_to(folder / f"{old:03d}.{kind}")
    assert run_worker(tmp_path, PYTHONPATH=str(oldest_onnxruntime)) == OLDEST
    check_results(tmp_path, [labels[i] for i in kept])


def test_an_unknown_variant_is_refused_on_registration(models: tuple[Path, list[str]]) -> None:
    with pytest.raises(
        AssertionError, match="ELISION_ISA names no variant of elision's kernels that runs here"
    ):
        run_worker(models[0], **{cpu.ISA: "sse9"})


@pytest.mark.parametrize("op", [op for op in OPS if OPS[op].custom])
def test_the_kernel_takes_the_place_of_the_body(op: str, tmp_path: Path) -> None:
    """A node of float32 stays whole, one of an element type without a kernel is taken apart."""
    seen = set()
    for label, name, operands, attrs in calls():
        double = "float64" in label
        if name != op or (name, double) in seen:
            continue
        seen.add((name, double))
        open_session(onnx_call.model(op, operands, attrs), optimized=tmp_path / "optimized.onnx")
        left = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node if n.domain == "elision"]
        assert left == ([op] if not double or op == "restore_tokens" else [])
    assert seen


# ---- what does not fit ---------------------------------------------------------------------------------
def run(session: Any, op: str, operands: list[Any]) -> list[np.ndarray]:
    return session.run(None, feeds_of(op, operands))


@pytest.mark.parametrize("wild", [-(2**31), -2, 13, 2**31 - 1])
def test_inconsistent_maps_are_errors_that_leave_the_session_usable(wild: int) -> None:
    x, (slot, keep, source) = torch.randn(2, 13, 4), token_map(2, 13, 4)
    session = open_session(
        onnx_call.model("merge_tokens", [x, None, slot, keep, source], {"axis": 1}), threads=2
    )
    right = run(session, "merge_tokens", [x, None, slot, keep, source])
    for broken, message in ((0, "a slot is"), (1, "a kept token is"), (2, "a source is")):
        maps = [m.clone() for m in (slot, keep, source)]
        maps[broken][1, int(source[1, 0]) if broken == 0 else 0] = wild
        with pytest.raises(Exception, match=f"merge_tokens: the map is inconsistent, {message} out of range"):
            run(session, "merge_tokens", [x, None, *maps])
        again = run(session, "merge_tokens", [x, None, slot, keep, source])
        assert all(np.array_equal(a, b) for a, b in zip(right, again))
    y = torch.from_numpy(right[0])
    session = open_session(onnx_call.model("restore_tokens", [y, slot], {"axis": 1}), threads=2)
    full = run(session, "restore_tokens", [y, slot])
    broken_slot = slot.clone()
    broken_slot[1, 12] = wild
    with pytest.raises(Exception, match="restore_tokens: the map is inconsistent, a slot is out of range"):
        run(session, "restore_tokens", [y, broken_slot])
    assert np.array_equal(run(session, "restore_tokens", [y, slot])[0], full[0])


def test_lengths_that_do_not_fit_are_errors_that_name_the_op() -> None:
    x, (slot, keep, source) = torch.randn(2, 13, 4), token_map(2, 13, 4)
    size, q = torch.ones(2, 13), torch.randn(2, 4, 9, 8)
    wrong: list[tuple[str, list[Any], list[Any], dict[str, Any]]] = [
        ("merge_tokens", [x, size, slot, keep, source], [x, size[:, 1:], slot, keep, source], {"axis": 1}),
        ("merge_tokens", [x, size, slot, keep, source], [x[:, 1:], size, slot, keep, source], {"axis": 1}),
        ("merge_tokens", [x, size, slot, keep, source], [x, size, slot, keep[:1], source], {"axis": 1}),
        ("merge_tokens", [x, size, slot, keep, source], [x[[0, 1, 1]], size, slot, keep, source], {"axis": 1}),
        ("merge_tokens", [x, size, slot, keep, source], [x, size[[0, 1, 1]], slot, keep, source], {"axis": 1}),
        ("restore_tokens", [x, slot], [x[[0, 1, 1]], slot], {"axis": 1}),
        ("restore_tokens", [x[0], slot[:1]], [x[0], slot], {"axis": 0, "batch_axis": -1}),
        ("match_padded_tokens", [x, size], [x, size[:, 1:]], {"r": 3}),
        ("match_padded_tokens", [x, size], [x, size[[0, 1, 1]]], {"r": 3}),
        ("attention", [q, q, q, None, size[:, :9]], [q, q, q, None, size], {}),
        ("attention", [q, q, q, None, size[:, :9]], [q, q[:1], q[:1], None, size[:, :9]], {}),
        ("attention", [q, q, q], [q, q[:, :3], q[:, :3]], {}),
        ("attention", [q, q, q], [q, q[..., 1:], q], {}),
        ("attention", [q, q, q, q @ q.mT], [q, q, q, (q @ q.mT)[:, :2]], {}),
    ]  # fmt: skip
    for op, fits, unfit, attrs in wrong:
        session = open_session(onnx_call.model(op, fits, attrs))
        right = run(session, op, fits)
        with pytest.raises(Exception, match=op):
            run(session, op, unfit)
        assert all(np.array_equal(a, b) for a, b in zip(right, run(session, op, fits)))


def test_bad_attributes_are_refused_when_the_session_is_made() -> None:
    for attrs in (
        {"ratio": 1.5},
        {"ratio": float("nan")},
        {},
        {"r": 1, "prefix": -1},
        {"r": 1, "suffix": 2**40},
    ):
        node = helper.make_node(
            "match_tokens", ["metric"], ["slot", "keep", "source"], domain="elision", **attrs
        )
        outputs = [helper.make_tensor_value_info(n, TensorProto.INT32, None) for n in node.output]
        metric = helper.make_tensor_value_info("metric", TensorProto.FLOAT, ["b", "n", 4])
        graph = helper.make_graph([node], "one", [metric], outputs)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("elision", 1)]
        with pytest.raises(Exception, match="match_tokens: "):
            open_session(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def test_bfloat16_is_computed_like_torch_does() -> None:
    """onnxruntime has no bfloat16 of its own on the CPU: the casts around the node are all it does."""
    x, maps = torch.randn(2, 13, 20).bfloat16(), token_map(2, 13, 4)
    model = onnx_call.model("merge_tokens", [x.half(), None, *maps], {"axis": 1})
    node = model.graph.node[0]
    node.overload, node.input[0], node.output[0] = "", "narrow", "merged"
    del model.functions[:]
    model.graph.node.insert(0, helper.make_node("Cast", ["x"], ["narrow"], to=TensorProto.BFLOAT16))
    model.graph.node.append(helper.make_node("Cast", ["merged"], ["y"], to=TensorProto.FLOAT))
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    found = run(open_session(model), "merge_tokens", [x.float(), None, *maps])
    cpu.kernels()
    expected = torch.ops.elision_cpu.merge_tokens(x, None, *maps, axis=1)
    assert np.array_equal(found[0], expected[0].float().numpy())
    assert np.array_equal(found[1], expected[1].numpy())


# ---- threads -------------------------------------------------------------------------------------------
def large_calls() -> list[tuple[str, list[Any], dict[str, Any]]]:
    size = torch.randint(0, 3, (2, 211)).float()
    q = torch.randn(2, 3, 301, 16)
    maps = call("match_padded_tokens", [torch.randn(2, 211, 8), size], {"r": 60})
    return [
        ("match_padded_tokens", [torch.randn(2, 211, 24), size], {"r": 60, "prefix": 1}),
        ("merge_tokens", [torch.randn(2, 211, 40), size, *maps], {"axis": 1}),
        ("restore_tokens", [torch.randn(2, 151, 40), maps[0]], {"axis": 1}),
        ("mean_heads", [q], {}),
        ("attention", [q, q, q, None, torch.randint(0, 3, (2, 301)).float()], {}),
    ]


def test_bits_do_not_depend_on_the_threads_of_the_session() -> None:
    for op, operands, attrs in large_calls():
        model = onnx_call.model(op, operands, attrs)
        first = run(open_session(model), op, operands)
        for threads in (2, 5):
            session = open_session(model, threads=threads)
            for _ in range(3):
                assert all(np.array_equal(a, b) for a, b in zip(first, run(session, op, operands)))


def test_sessions_and_threads_at_once_give_the_serial_results() -> None:
    """Two sessions of every op, four Python threads over all of them, torch's kernels in between."""
    cpu.kernels()
    work = []
    for op, operands, attrs in large_calls():
        model = onnx_call.model(op, operands, attrs)
        expected = run(open_session(model), op, operands)
        for threads in (1, 2):
            session = open_session(model, threads=threads)
            work.append((lambda s=session, o=op, x=operands: run(s, o, x), expected))
        kernel = getattr(torch.ops.elision_cpu, op)

        def by_torch(kernel: Any = kernel, operands: Any = operands, attrs: Any = attrs) -> list[np.ndarray]:
            out = kernel(*operands, **attrs)
            return [t.numpy() for t in (out if isinstance(out, tuple) else (out,))]

        work.append((by_torch, by_torch()))
    wrong: list[str] = []

    def repeat(start: int) -> None:
        torch.set_num_threads(1 + start % 3)
        for i in range(6 * len(work)):
            task, expected = work[(start + i * 7) % len(work)]
            if not all(np.array_equal(a, b) for a, b in zip(task(), expected)):
                wrong.append(f"thread {start}, run {i}")

    threads = [threading.Thread(target=repeat, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
