"""Reading and writing files: whatever is wrong ends in one line, and nothing is half-written."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from elision.passes.errors import ElisionError, ModelFileError
from elision.passes.ir.onnx import OnnxGraph
from elision.passes.onnx import io
from elision.passes.onnx.io import from_proto, load_model, save_model, to_proto
from elision.passes.onnx.normalise import normalise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from .onnx_tools import Builder, run

N, H, D = 4, 2, 4
C = H * D


def small(dim: int = C) -> onnx.ModelProto:
    b = Builder(17)
    x = b.input("x", ["batch", N, dim])
    q, k, v = (
        b("Transpose", b("Reshape", b("MatMul", x, b.weight(dim, C)), b.ints(-1, N, H, D)), perm=perm)
        for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
    )
    out = b("MatMul", b("Softmax", b("Mul", b("MatMul", q, k), b.const(0.5)), axis=-1), v)
    b.output(b("Reshape", b("Transpose", out, perm=[0, 2, 1, 3]), b.ints(-1, N, C)))
    return b.model()


FEED = {"x": np.random.default_rng(0).normal(size=(2, N, C)).astype(np.float32)}


def fails(path: object, *words: str) -> None:
    """Loading fails with one line that holds `words`."""
    with pytest.raises(ModelFileError) as caught:
        load_model(path)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in words), text


# ---- reading -----------------------------------------------------------------------------------------
def test_a_good_file_and_a_proto(tmp_path: Path) -> None:
    onnx.save(small(), tmp_path / "m.onnx")
    for source in (tmp_path / "m.onnx", str(tmp_path / "m.onnx"), small()):
        model = load_model(source)
        normalise(model)
        assert len(OnnxGraph(model).ops_of("attention")) == 1


def test_missing_empty_folder_and_text(tmp_path: Path) -> None:
    fails(tmp_path / "none.onnx", "no such file")
    fails(tmp_path, "folder")
    (tmp_path / "empty.onnx").touch()
    fails(tmp_path / "empty.onnx", "empty")
    (tmp_path / "text.onnx").write_text("this is no model\n" * 20)
    fails(tmp_path / "text.onnx", "not an ONNX")
    (tmp_path / "zip.onnx").write_bytes(b"PK\x03\x04" + bytes(100))
    fails(tmp_path / "zip.onnx", "not an ONNX")
    fails("nul\0byte.onnx")
    fails("x" * 5000)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(small(), path)
    path.chmod(0)
    fails(path, "cannot be read")


def test_truncated(tmp_path: Path) -> None:
    data = small().SerializeToString()
    path = tmp_path / "m.onnx"
    for size in range(1, len(data) - 1, max(len(data) // 60, 1)):
        path.write_bytes(data[:size])
        fails(path)


def test_inconsistent_models() -> None:
    proto = small()
    proto.graph.node[3].input[0] = "nowhere"
    fails(proto, "nowhere")
    proto = small()
    del proto.graph.output[:]
    proto.graph.output.append(helper.make_tensor_value_info("nothing", 1, [1]))
    fails(proto, "nothing")
    proto = small()
    proto.graph.initializer[0].dims[0] = 3
    fails(proto, "bytes")
    proto = small()
    proto.graph.initializer[0].dims[0] = -1
    fails(proto, "negative")
    proto = small()
    proto.graph.initializer[0].data_type = 99
    fails(proto, "unknown type")
    proto = small()
    del proto.opset_import[:]
    fails(proto, "operator set")
    fails(onnx.ModelProto(), "no graph")


# ---- external data -----------------------------------------------------------------------------------
def external(folder: Path, location: str, data: str = "w.bin", **entries: int) -> Path:
    """A model whose one weight lies in the file `location`, as its proto says."""
    folder.mkdir(parents=True, exist_ok=True)
    b = Builder(17)
    b.output(b("MatMul", b.input("x", [1, C]), "w"))
    proto = b.model()
    weight = np.arange(C * C, dtype=np.float32).reshape(C, C)
    (folder / data).write_bytes(weight.tobytes())
    tensor = TensorProto(name="w", dims=[C, C], data_type=1, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    proto.graph.initializer.append(tensor)
    path = folder / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def test_external_data_beside_the_model(tmp_path: Path) -> None:
    path = external(tmp_path / "a", "w.bin")
    model = load_model(path)
    x = np.ones((1, C), np.float32)
    (found,) = run(model, {"x": x})
    np.testing.assert_allclose(found, x @ np.arange(C * C, dtype=np.float32).reshape(C, C))
    save_model(model, tmp_path / "b.onnx")
    assert (tmp_path / "b.onnx.data").exists()
    (again,) = run(load_model(tmp_path / "b.onnx"), {"x": x})
    np.testing.assert_array_equal(found, again)
    save_model(load_model(tmp_path / "b.onnx"), tmp_path / "b.onnx")  # onto itself
    (again,) = run(load_model(tmp_path / "b.onnx"), {"x": x})
    np.testing.assert_array_equal(found, again)


def test_external_data_elsewhere_is_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside.bin"
    outside.write_bytes(bytes(4 * C * C))
    for location in ("../outside.bin", str(outside), "sub/../../outside.bin", "..\\outside.bin"):
        fails(external(tmp_path / "m", location), "refused")
    (tmp_path / "m" / "link.bin").symlink_to(outside)
    fails(external(tmp_path / "m", "link.bin"), "refused")
    (tmp_path / "m" / "sub").symlink_to(tmp_path, target_is_directory=True)
    fails(external(tmp_path / "m", "sub/outside.bin"), "refused")


def test_external_data_that_does_not_fit(tmp_path: Path) -> None:
    fails(external(tmp_path / "a", "other.bin"), "missing")
    fails(external(tmp_path / "b", "w.bin", offset=4), "does not fit")
    fails(external(tmp_path / "c", "w.bin", length=8), "does not fit")
    fails(external(tmp_path / "d", "w.bin", offset=-4), "does not fit")
    fails(external(tmp_path / "e", ""), "location")
    proto = onnx.load(external(tmp_path / "f", "w.bin"), load_external_data=False)
    fails(proto, "load the data first")


# ---- writing -----------------------------------------------------------------------------------------
def test_saving_is_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    model = from_proto(small())
    path = tmp_path / "m.onnx"
    save_model(model, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx"]
    before = path.read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ir, "save", full)
        with pytest.raises(ModelFileError, match="No space left"):
            save_model(model, path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx"]


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    model = from_proto(small())
    with pytest.raises(ModelFileError, match="no such folder"):
        save_model(model, tmp_path / "none" / "m.onnx")
    with pytest.raises(ModelFileError, match="a folder"):
        save_model(model, tmp_path)
    with pytest.raises(ModelFileError, match="unknown target"):
        save_model(model, tmp_path / "m.onnx", target="abacus")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    with pytest.raises(ModelFileError, match="cannot be written"):
        save_model(from_proto(small()), folder / "m.onnx")
    assert not list(folder.iterdir())


def test_big_models_get_a_data_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(io, "PROTOBUF_LIMIT", 200)
    b = Builder(17)
    b.output(b("MatMul", b.input("x", ["batch", 40]), b.weight(40, 40)))
    model = from_proto(b.model())
    save_model(model, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").stat().st_size >= 4 * 40 * 40
    assert (tmp_path / "m.onnx").stat().st_size < 4 * 40 * 40
    with pytest.raises(ModelFileError, match="do not fit"):
        to_proto(model)
    x = np.ones((2, 40), np.float32)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x})
    np.testing.assert_allclose(found, x @ numpy_helper.to_array(b.initializers[0]), rtol=1e-5)


def test_targets() -> None:
    model = from_proto(small())
    normalise(model)
    kinds = {t: {n.op_type for n in to_proto(model, t).graph.node} for t in ("onnxruntime", "standard")}
    assert "joined_attention" in kinds["onnxruntime"]
    assert "Attention" in kinds["standard"]
    assert "Attention" in {n.op_type for n in model.graph}


# ---- broken bytes ------------------------------------------------------------------------------------
BYTES = small().SerializeToString()
QUIET = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def survives(data: bytes, folder: Path) -> None:
    """The whole way through, or one line."""
    path = folder / "broken.onnx"
    path.write_bytes(data)
    try:
        model = load_model(path)
        normalise(model)
        graph = OnnxGraph(model)
        graph.text()
        graph.verify()
        save_model(model, folder / "out.onnx")
    except ElisionError as error:
        assert "\n" not in str(error)
    assert not [p for p in folder.iterdir() if p.name.startswith(".elision")]


def test_a_shape_that_is_read_as_another_type(tmp_path: Path) -> None:
    """Found by changing types: -1 read as unsigned is a length that no file can say."""
    proto = small()
    shapes = {n.input[1] for n in proto.graph.node if n.op_type == "Reshape"}
    changed = [t for t in proto.graph.initializer if t.name in shapes]
    for tensor in changed:
        array = np.array(numpy_helper.to_array(tensor))
        array[0] = -1
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        tensor.data_type = TensorProto.UINT64
    assert changed
    survives(proto.SerializeToString(), tmp_path)


@QUIET
@given(st.lists(st.tuples(st.integers(0, len(BYTES) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_mutated_bytes(tmp_path_factory, changes: list[tuple[int, int]]) -> None:
    data = bytearray(BYTES)
    for position, byte in changes:
        data[position] = byte
    survives(bytes(data), tmp_path_factory.mktemp("mutated"))


@QUIET
@given(st.integers(0, len(BYTES)), st.binary(max_size=30), st.integers(0, 40))
def test_spliced_bytes(tmp_path_factory, position: int, extra: bytes, gone: int) -> None:
    data = BYTES[:position] + extra + BYTES[position + gone :]
    survives(data, tmp_path_factory.mktemp("spliced"))


@QUIET
@given(st.binary(max_size=400))
def test_random_bytes(tmp_path_factory, data: bytes) -> None:
    survives(data, tmp_path_factory.mktemp("random"))


@QUIET
@given(st.data())
def test_mutated_structure(tmp_path_factory, data: st.DataObject) -> None:
    """Fields of the proto changed: names, types, attributes, dims, whole nodes."""
    proto = small()
    nodes = proto.graph.node
    for _ in range(data.draw(st.integers(1, 3))):
        node = nodes[data.draw(st.integers(0, len(nodes) - 1))]
        change = data.draw(
            st.sampled_from(["drop", "op", "input", "attribute", "int", "dims", "type", "domain", "twice"])
        )
        if change == "drop" and len(nodes) > 1:
            nodes.remove(node)
        elif change == "op":
            node.op_type = data.draw(
                st.sampled_from(["Reshape", "Softmax", "MatMul", "Slice", "Nope", "Add"])
            )
        elif change == "input" and node.input:
            index = data.draw(st.integers(0, len(node.input) - 1))
            names = [i.name for i in proto.graph.initializer] + [o for n in nodes for o in n.output] + [""]
            node.input[index] = data.draw(st.sampled_from(names))
        elif change == "attribute" and node.attribute:
            node.attribute.pop()
        elif change == "int":
            for attribute in node.attribute:
                value = data.draw(st.integers(-(2**63), 2**63 - 1))
                attribute.i = value
                attribute.ints[:] = [value % 7 for _ in attribute.ints]
        elif change == "dims":
            tensor = data.draw(st.sampled_from(list(proto.graph.initializer)))
            tensor.dims[:] = data.draw(st.lists(st.integers(-2, 9), max_size=4))
        elif change == "type":
            tensor = data.draw(st.sampled_from(list(proto.graph.initializer)))
            tensor.data_type = data.draw(st.integers(0, 25))
        elif change == "domain":
            node.domain = data.draw(st.sampled_from(["com.microsoft", "elision", "x"]))
        else:
            nodes.append(node)
    survives(proto.SerializeToString(), tmp_path_factory.mktemp("structure"))
