"""Reading and writing ONNX files that other people made.

A file is taken as untrusted: whatever is wrong with it ends in one ModelFileError. Weights beside the model are
mapped lazily, only from inside the model's own folder. Writing is atomic: nothing appears under the final
name before all of it is on the disk.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from ..errors import ModelFileError
from ..ir.onnx_check import light_proto
from ..ir.onnx_run import inside
from ..lowering import Table
from ..lowering_defaults import DEFAULTS
from .lower import lower

PROTOBUF_LIMIT = 1_900_000_000
"""Bytes of weights above which a model is written with an external data file; protobuf itself ends at 2 GiB."""

MANY = 1_000_000
"""More nodes than this is not a model we open."""


def load_model(path: str | os.PathLike[str] | onnx.ModelProto) -> ir.Model:
    """Read an ONNX file, or take a ModelProto. External data stays on the disk until it is asked for.

    Raises ModelFileError, with one line, when the file is missing, unreadable, not ONNX, inconsistent, or
    when its external data lies outside its folder.
    """
    if isinstance(path, onnx.ModelProto):
        return from_proto(path)
    file = Path(path)
    try:
        if file.is_dir():
            raise ModelFileError(f"{file}: a folder, not an ONNX file")
        if file.exists() and not file.is_file():
            raise ModelFileError(f"{file}: not a plain file")
        data = file.read_bytes()
    except FileNotFoundError:
        raise ModelFileError(f"{file}: no such file") from None
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{file}: cannot be read ({reason(error)})") from None
    if not data:
        raise ModelFileError(f"{file}: the file is empty")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except (DecodeError, ValueError, RecursionError):
        raise ModelFileError(f"{file}: not an ONNX file, or a truncated one") from None
    del data
    return deserialise(proto, str(file), file.parent)


def from_proto(proto: onnx.ModelProto) -> ir.Model:
    """A model from memory. Raises ModelFileError when it is inconsistent or refers to data outside itself."""
    return deserialise(proto, "the ModelProto", None)


def deserialise(proto: onnx.ModelProto, where: str, folder: Path | None) -> ir.Model:
    """The checked model of a proto; `folder` is where its external data may lie."""
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
        raise ModelFileError(f"{where}: not an ONNX model (it has no graph)")
    if not proto.opset_import:
        raise ModelFileError(f"{where}: not an ONNX model (it names no operator set)")
    if len(proto.graph.node) > MANY:
        raise ModelFileError(f"{where}: {len(proto.graph.node)} nodes are more than any model has")
    for tensor in proto_tensors(proto.graph):
        check_tensor(tensor, where, folder)
    try:
        model = ir.from_proto(proto)
        for initializer in model.graph.initializers.values():
            if isinstance(initializer.const_value, ir.ExternalTensor) and folder is not None:
                initializer.const_value.base_dir = folder
        for node in model.graph.all_nodes():
            for attr in node.attributes.values():
                if (
                    isinstance(attr, ir.Attr)
                    and isinstance(attr.value, ir.ExternalTensor)
                    and folder is not None
                ):
                    attr.value.base_dir = folder
        for node in model.graph.all_nodes():
            if node.domain not in ("", "ai.onnx"):  # onnxruntime does not ask for an import of its own domain
                model.opset_imports.setdefault(node.domain, 1)
        ensure_order(model, where)
        problem = checked(model)
    except ModelFileError:
        raise
    except Exception as error:  # whatever a broken proto does to the parser is one fact to the user
        raise ModelFileError(f"{where}: not a usable ONNX model ({reason(error)})") from error
    if problem:
        raise ModelFileError(f"{where}: not a valid ONNX model ({problem})")
    return model


def proto_tensors(graph: onnx.GraphProto, depth: int = 0) -> Iterator[onnx.TensorProto]:
    """Every tensor of a graph and of the graphs inside its nodes."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if depth < 20:
                for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                    yield from proto_tensors(inner, depth + 1)


def check_tensor(tensor: onnx.TensorProto, where: str, folder: Path | None) -> None:
    """Refuse a tensor whose data does not fit its dims, or lies where it must not."""
    name = tensor.name[:80] or "?"
    count = 1
    for length in tensor.dims:
        if length < 0:
            raise ModelFileError(f"{where}: tensor '{name}' has a negative length")
        count *= length
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        raise ModelFileError(f"{where}: tensor '{name}' has the unknown type {tensor.data_type}") from None
    if dtype == ir.DataType.UNDEFINED:
        raise ModelFileError(f"{where}: tensor '{name}' has no type")
    wanted = 0 if dtype == ir.DataType.STRING else (count * int(dtype.itemsize * 8) + 7) // 8
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        check_external(tensor, name, wanted, where, folder)
    elif tensor.HasField("raw_data"):
        if len(tensor.raw_data) != wanted:
            raise ModelFileError(f"{where}: tensor '{name}' holds {len(tensor.raw_data)} bytes, not {wanted}")
    else:
        held = max(
            len(tensor.float_data),
            len(tensor.int32_data),
            len(tensor.int64_data),
            len(tensor.double_data) // (2 if dtype == ir.DataType.COMPLEX128 else 1),
            len(tensor.uint64_data),
            len(tensor.string_data),
        )
        if held < (wanted if dtype.itemsize < 1 else count) and not (dtype == ir.DataType.COMPLEX64 and held):
            raise ModelFileError(f"{where}: tensor '{name}' holds {held} elements, not {count}")


def check_external(tensor: onnx.TensorProto, name: str, wanted: int, where: str, folder: Path | None) -> None:
    """External data must be a plain file inside the model's folder, and long enough."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if folder is None:
        raise ModelFileError(f"{where}: tensor '{name}' refers to the file '{location}'; load the data first")
    if not location:
        raise ModelFileError(f"{where}: tensor '{name}' has external data without a location")
    if os.path.isabs(location) or "\\" in location or ".." in Path(location).parts or "\0" in location:
        raise ModelFileError(
            f"{where}: tensor '{name}' refers to '{location}', outside the model's folder: refused"
        )
    root = folder.resolve()
    target = root / location
    if any(
        part.is_symlink() for part in [target, *target.parents] if part.is_relative_to(root) and part != root
    ):
        raise ModelFileError(f"{where}: tensor '{name}' refers to '{location}', a symbolic link: refused")
    if not target.resolve().is_relative_to(root):
        raise ModelFileError(
            f"{where}: tensor '{name}' refers to '{location}', outside the model's folder: refused"
        )
    if not target.is_file():
        raise ModelFileError(f"{where}: the external data file '{location}' is missing")
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", wanted))
    except ValueError:
        raise ModelFileError(f"{where}: tensor '{name}' has a broken external data entry") from None
    if offset < 0 or length != wanted or offset + length > target.stat().st_size:
        raise ModelFileError(f"{where}: tensor '{name}' does not fit its external data file '{location}'")


def ensure_order(model: ir.Model, where: str) -> None:
    """Every operand is made before it is read."""
    known: set[ir.Value] = {*model.graph.inputs, *model.graph.initializers.values()}
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value not in known:
                raise ModelFileError(
                    f"{where}: {node.op_type} reads '{value.name}', which nothing computes before it"
                )
        known.update(node.outputs)
    for value in model.graph.outputs:
        if value not in known:
            raise ModelFileError(f"{where}: the output '{value.name}' is not computed")


def checked(model: ir.Model) -> str | None:
    """What onnx's checker has against the model; operators it does not know are no objection."""
    proto = light_proto(model)
    for info in [*proto.graph.input, *proto.graph.output]:
        if info.type.HasField("tensor_type"):
            info.type.tensor_type.shape.SetInParent()  # onnxruntime does not ask for shapes; the checker does
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        text = reason(error)
        # Files that ONNX Runtime wrote use some of its own operators under the standard domain.
        return None if "No Op registered" in text else text
    return None


def reason(error: BaseException) -> str:
    """The first line of an error, short."""
    text = getattr(error, "strerror", None) or str(error)
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return first[:200]


# ---- writing -----------------------------------------------------------------------------------------
def weight_bytes(model: ir.Model) -> int:
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def has_external_data(model: ir.Model) -> bool:
    return any(isinstance(v.const_value, ir.ExternalTensor) for v in model.graph.initializers.values())


def lowered(model: ir.Model, target: str, table: Table | None = None) -> ir.Model:
    """A copy of `model` in the forms its target runs fastest; `standard` keeps every operator."""
    clone = model.clone()
    if target == "onnxruntime":
        lower(clone, table or DEFAULTS)
    elif target != "standard":
        raise ModelFileError(f"unknown target '{target}' (known: onnxruntime, standard)")
    return clone


def to_proto(model: ir.Model, target: str = "onnxruntime", table: Table | None = None) -> onnx.ModelProto:
    """The model as one ModelProto with its weights inside, lowered for `target` by `table` (None: the defaults);
    `model` is not changed.

    Raises ModelFileError when the weights are over 2 GB.
    """
    total = weight_bytes(model)
    if total > PROTOBUF_LIMIT:
        raise ModelFileError(
            f"{total / 1e9:.1f} GB of weights do not fit in one message; save the model to a file"
        )
    clone = lowered(model, target, table)
    for graph in clone.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = inside(value.const_value)
    return ir.to_proto(clone)


def save_model(
    model: ir.Model,
    path: str | os.PathLike[str],
    target: str = "onnxruntime",
    table: Table | None = None,
    *,
    external: bool = False,
) -> None:
    """Write `model`, lowered for `target` by `table`, to `path`, whole or not at all; `model` is not changed.

    Weights go to `<path>.data` when there are more than 1.9 GB of them, when the model came with external data, or
    when `external` says so (a runtime maps such a file). Raises ModelFileError when the folder is missing or not
    writable, or when the disk is full.
    """
    file = Path(path)
    folder = file.parent
    if file.is_dir():
        raise ModelFileError(f"{file}: a folder, not a file")
    if not folder.is_dir():
        raise ModelFileError(f"{folder}: no such folder")
    external = external or has_external_data(model) or weight_bytes(model) > PROTOBUF_LIMIT
    data_name = f"{file.name}.data"
    try:
        workplace = Path(tempfile.mkdtemp(prefix=".elision-", dir=folder))
    except OSError as error:
        raise ModelFileError(f"{folder}: cannot be written to ({reason(error)})") from None
    try:
        clone = lowered(model, target, table)
        if external:
            ir.save(clone, workplace / file.name, external_data=data_name, size_threshold_bytes=1024)
        else:
            ir.save(clone, workplace / file.name)
        put_in_place(workplace, file, data_name if (workplace / data_name).exists() else None)
    except OSError as error:
        raise ModelFileError(f"{file}: cannot be written ({reason(error)})") from error
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def put_in_place(workplace: Path, file: Path, data_name: str | None) -> None:
    """Move the finished files to their final names; if the second move fails, the first is undone."""
    if data_name is None:
        os.replace(workplace / file.name, file)
        return
    final, kept = file.parent / data_name, workplace / "previous.data"
    had_previous = final.exists()
    if had_previous:
        os.replace(final, kept)
    try:
        os.replace(workplace / data_name, final)
        os.replace(workplace / file.name, file)
    except OSError:
        if had_previous:
            os.replace(kept, final)
        else:
            final.unlink(missing_ok=True)
        raise
