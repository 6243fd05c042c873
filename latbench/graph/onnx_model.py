"""Users' own ONNX models: reads a file safely and fixes its input shapes; with `fold_batch_norm` and `summarise`, all
that is done to a model before it is measured.

What `load` gives has its weights inside, static inputs, initializers that are constants, and operators that a runtime
can know.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import ModelProto, TensorProto, ValueInfoProto, checker, defs, helper, inliner, numpy_helper

from latbench.errors import ModelError, UsageError, one_line, shown
from latbench.graph.onnx_fold import fold_batch_norm
from latbench.graph.onnx_limits import check_bytes, check_functions
from latbench.graph.onnx_proto import drop_initializer_inputs, label, opset, subgraphs, walk
from latbench.graph.onnx_shapes import dims, value_shapes
from latbench.graph.onnx_summary import ModelSummary, summarise

__all__ = ["ModelSummary", "fold_batch_norm", "from_bytes", "load", "summarise"]

Shape = tuple[int, ...]

_MAX_BYTES = 2**31 - 1  # of one protobuf message, weights included: what can be handed to a runtime in one piece
_DOMAINS = ("", "ai.onnx.ml", "com.microsoft")


def load(path: str | Path, shapes: Mapping[str | None, Shape] = {}) -> ModelProto:
    """The model in `path`, checked and self-contained, every input static.

    `shapes`: input name -> shape of inputs that the file leaves dynamic; None names the only input. A dimension that
    the file calls by one name in several inputs needs to be given once. Raises ModelError where the file is not a
    model that can run here, UsageError where `shapes` does not fit it.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise ModelError(f"{path} is a directory: give the .onnx file inside it")
        if path.exists() and not path.is_file():
            raise ModelError(f"{path} is not a regular file")
        if path.stat().st_size > _MAX_BYTES:
            raise ModelError(f"{path} is larger than 2 GiB, which protobuf cannot hold: not an ONNX model")
        data = path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ModelError(f"{path} cannot be read: {one_line(error)}") from None
    return from_bytes(data, shapes, source=str(path), folder=path.parent)


def from_bytes(
    data: bytes,
    shapes: Mapping[str | None, Shape] = {},
    *,
    source: str = "model",
    folder: Path | None = None,
) -> ModelProto:
    """As `load`, from a serialised model; `source` names it in errors, `folder` holds its external data, if any."""
    model = _parse(data, source)
    _embed_external_data(model, source, folder)
    _check_types(model, source)
    model = _inline_functions(model, source)
    _check_operators(model, source)
    _check(model, source)
    drop_initializer_inputs(model)
    return _fix_shapes(model, shapes, source)


# ── reading ──────────────────────────────────────────────────────────────────


def _parse(data: bytes, source: str) -> ModelProto:
    if not data:
        raise ModelError(f"{source} is empty")
    if data.startswith(b"version https://git-lfs"):
        raise ModelError(f"{source} is a git-lfs pointer, not the model: git lfs pull")
    check_bytes(data, source)
    model = ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        raise ModelError(f"{source} is not an ONNX model, or only a part of one") from None
    if not model.HasField("graph"):  # any short text can be a protobuf of unknown fields
        raise ModelError(f"{source} is not an ONNX model, or only a part of one: it holds no graph")
    check_functions(model, source)
    if not _is_text(model):
        raise ModelError(f"{source} is damaged: it holds names that are not printable text")
    if not opset(model):
        raise ModelError(f"{source} names no operator set: an ONNX model of 2017, or only a part of one")
    if opset(model) > defs.onnx_opset_version():
        raise ModelError(
            f"{source} has opset {opset(model)}, onnx {onnx.__version__} knows up to {defs.onnx_opset_version()}: "
            "pip install --upgrade onnx, or export with an older opset"
        )
    for part in (*model.opset_import, *walk(model.graph)):
        if part.domain == "ai.onnx":  # its written-out name, which onnx.defs does not know
            part.domain = ""
    return model


def _is_text(message: Any) -> bool:
    """Whether every name in a message and within it is printable: protobuf's older rules let through any bytes."""
    for field, value in message.ListFields():
        if field.name in ("doc_string", "metadata_props"):
            continue
        values = value if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) else [value]
        if field.message_type is not None:
            if not all(_is_text(inner) for inner in values):
                return False
        elif field.type == field.TYPE_STRING and not all(isinstance(t, str) and t.isprintable() for t in values):
            return False
    return True


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor a model holds: initializers and attributes, in branches, loops and functions too."""
    yield from model.graph.initializer
    for node in (node for part in (model.graph, *model.functions) for node in walk(part)):
        for body in subgraphs(node):
            yield from body.initializer
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _embed_external_data(model: ModelProto, source: str, folder: Path | None) -> None:
    """Brings external tensors into `model`, in place. They may lie in the model's folder only."""
    outside = [t for t in _tensors(model) if t.data_location == TensorProto.EXTERNAL]
    total = model.ByteSize()
    for tensor in outside:
        entries = {e.key: e.value for e in tensor.external_data}
        where = f"{source}: weight {shown(tensor.name)} lies in {shown(entries.get('location', ''))}"
        if folder is None:
            raise ModelError(f"{where}, but the model came without a folder: give the file's path")
        path = _inside(folder, entries.get("location", ""), where)
        try:
            nbytes = math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            offset = int(entries.get("offset", 0))
            length = int(entries.get("length", nbytes))
        except (KeyError, TypeError, ValueError):
            raise ModelError(f"{where}, and its type, offset or length is malformed") from None
        if length != nbytes:
            raise ModelError(f"{where}, {length} bytes of it, and its shape has {nbytes}")
        total += length
        if total > _MAX_BYTES:
            raise ModelError(f"{source} with its external data is larger than 2 GiB: too large to hand to a runtime")
        if offset < 0 or length < 0 or offset + length > path.stat().st_size:
            raise ModelError(f"{where}, which is shorter than {offset + length} bytes: a part is missing")
        with path.open("rb") as file:
            file.seek(offset)
            tensor.raw_data = file.read(length)
        tensor.ClearField("data_location")
        tensor.ClearField("external_data")


def _inside(folder: Path, location: str, where: str) -> Path:
    """`location` within `folder`, links followed; raises ModelError where it leads out of it, or to no file."""
    try:
        path = (folder / location).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise ModelError(f"{where}, outside the model's folder: put the data beside the model")
        if not path.is_file():
            raise ModelError(f"{where}, which is not there: put the data beside the model")
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL in the name
        raise ModelError(f"{where}: {one_line(error)}") from None
    return path


def _inline_functions(model: ModelProto, source: str) -> ModelProto:
    if not model.functions:
        return model
    try:
        return inliner.inline_local_functions(model)
    except (RuntimeError, ValueError, checker.ValidationError) as error:
        raise ModelError(f"{source}: its functions cannot be inlined: {one_line(error)}") from None


# ── checking ─────────────────────────────────────────────────────────────────


def _check_types(model: ModelProto, source: str) -> None:
    """Every weight's type is known and its data has the size of its shape; inputs and outputs have known types."""
    for tensor in _tensors(model):
        _check_tensor(tensor, source)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        elem_type = value.type.tensor_type.elem_type
        if elem_type not in TensorProto.DataType.values():
            raise ModelError(f"{source}: value {value.name!r} has the unknown type {elem_type}")


def _check_tensor(tensor: TensorProto, source: str) -> None:
    if min(tensor.dims, default=0) < 0:
        raise ModelError(f"{source}: weight {tensor.name!r} has a negative dimension")
    try:
        numpy_helper.to_array(tensor)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{source}: weight {tensor.name!r} is malformed: {one_line(error)}") from None


def _check_operators(model: ModelProto, source: str) -> None:
    versions = {o.domain: o.version for o in model.opset_import}
    for node in walk(model.graph):
        where = f"{source}: node {label(node)!r}"
        if node.domain not in _DOMAINS:
            raise ModelError(
                f"{where} is a custom operator, {node.op_type} of domain {node.domain!r}: no runtime here can run it"
            )
        if node.domain == "com.microsoft":
            continue  # ONNX Runtime's own operators: onnx has no schema for them
        domain, version = node.domain or "ai.onnx", versions.get(node.domain, 0)
        try:
            schema = defs.get_schema(node.op_type, version, node.domain)
        except (defs.SchemaError, TypeError):  # TypeError: a version beyond 32 bits
            raise ModelError(f"{where}: domain {domain} opset {version} has no operator {node.op_type}") from None
        if schema.deprecated:
            raise ModelError(f"{where}: domain {domain} opset {version} no longer has the operator {node.op_type}")


def _check(model: ModelProto, source: str) -> None:
    ends = (*model.graph.input, *model.graph.output)
    bare = [v.type.tensor_type for v in ends if v.type.HasField("tensor_type") and dims(v) is None]
    for tensor in bare:  # the checker insists on a shape, no runtime does
        tensor.shape.SetInParent()
    try:
        checker.check_model(model)
    except (checker.ValidationError, UnicodeDecodeError, ValueError) as error:
        raise ModelError(f"{source} is not a valid ONNX model: {one_line(error)}") from None
    for tensor in bare:
        tensor.ClearField("shape")
    if not model.graph.node or not model.graph.output:
        raise ModelError(f"{source} computes nothing: it has no nodes or no outputs")


# ── shapes ───────────────────────────────────────────────────────────────────


def _fix_shapes(model: ModelProto, shapes: Mapping[str | None, Shape], source: str) -> ModelProto:
    inputs = {value.name: value for value in model.graph.input}
    if not inputs:
        raise ModelError(f"{source} has no inputs: there is nothing to run it on")
    for name, value in inputs.items():
        if not value.type.HasField("tensor_type"):
            raise ModelError(f"{source}: input {name!r} is not a tensor: no runtime here can be given one")
    given = _by_name(shapes, list(inputs), source)
    bound: dict[str, int] = {}  # symbolic dimension -> size
    for name, shape in given.items():
        _bind(inputs[name], shape, bound, source)
    open_inputs = [name for name, value in inputs.items() if not _settle(value, given.get(name), bound)]
    if open_inputs:
        told = ", ".join(f"{name!r} of shape {_text(inputs[name])}" for name in open_inputs)
        flags = " ".join(f"--shape {name}:{'x'.join(map(str, _example(inputs[name])))}" for name in open_inputs)
        raise ModelError(f"{source} leaves dimensions open, input {told}: fix them, for example {flags}")
    if given or any(dims(output) is None for output in model.graph.output):
        _refresh(model)
    return model


def _by_name(shapes: Mapping[str | None, Shape], names: list[str], source: str) -> dict[str, Shape]:
    """`shapes` with None replaced by the only input; raises UsageError on unknown names."""
    given: dict[str, Shape] = {}
    for name, shape in shapes.items():
        if name is None and len(names) > 1:
            raise UsageError(f"{source} has inputs {', '.join(names)}: say whose shape it is, --shape {names[0]}:...")
        key = names[0] if name is None else name
        if key not in names:
            near = get_close_matches(key, names, 1, 0)[0] if len(names) > 1 else names[0]
            raise UsageError(f"{source} has no input {key!r}; it has {', '.join(names)}: did you mean {near}?")
        if key in given:
            raise UsageError(f"the shape of input {key!r} is given twice")
        given[key] = shape
    return given


def _bind(value: ValueInfoProto, shape: Shape, bound: dict[str, int], source: str) -> None:
    """Checks a given shape against the declared one; notes what its symbols mean."""
    given = f"{source}: the shape {'x'.join(map(str, shape))} given for input {value.name!r}"
    if any(n < 1 for n in shape):
        raise UsageError(f"{given} holds a size below 1")
    if dims(value) is None:
        return
    declared = value.type.tensor_type.shape.dim
    if len(declared) != len(shape):
        raise UsageError(f"{given} has rank {len(shape)}, the model wants {_text(value)}")
    for dim, n in zip(declared, shape, strict=True):
        if dim.dim_value > 0 and dim.dim_value != n:
            raise UsageError(f"{given} contradicts the model's {_text(value)}: export it with that dimension dynamic")
        if dim.dim_param and bound.setdefault(dim.dim_param, n) != n:
            raise UsageError(
                f"{given} makes {dim.dim_param} {n}, and another dimension makes it {bound[dim.dim_param]}"
            )


def _settle(value: ValueInfoProto, shape: Shape | None, bound: Mapping[str, int]) -> bool:
    """Writes the sizes that are known into `value`; whether that is all of them."""
    tensor = value.type.tensor_type
    if shape is not None:
        tensor.shape.CopyFrom(helper.make_tensor_type_proto(tensor.elem_type, shape).tensor_type.shape)
    for dim in tensor.shape.dim:
        if dim.dim_param in bound:
            dim.dim_value = bound[dim.dim_param]  # a oneof: the name goes
    known = dims(value)
    return known is not None and None not in known


def _refresh(model: ModelProto) -> None:
    """Infers the outputs' shapes anew, in place, and drops those of inner values that were symbolic."""
    graph = model.graph
    settled = [v for v in graph.value_info if None not in (dims(v) or (None,))]
    del graph.value_info[:]
    graph.value_info.extend(settled)
    for output in graph.output:
        if None in (dims(output) or ()):
            output.type.tensor_type.ClearField("shape")
    shapes = value_shapes(model)
    for output in graph.output:
        if dims(output) is None and output.type.HasField("tensor_type") and output.name in shapes:
            elem_type = output.type.tensor_type.elem_type
            output.CopyFrom(helper.make_tensor_value_info(output.name, elem_type, shapes[output.name]))


def _text(value: ValueInfoProto) -> str:
    if dims(value) is None:
        return "unknown"
    declared = value.type.tensor_type.shape.dim
    return "x".join(d.dim_param or (str(d.dim_value) if d.dim_value > 0 else "?") for d in declared) or "scalar"


def _example(value: ValueInfoProto) -> list[int]:
    """A likely shape to show in a message: an image, or a sequence of tokens."""
    known = dims(value) or (None,) * 4
    likely = (1, 3, 224, 224) if len(known) == 4 else (1, *[128] * (len(known) - 1))
    return [n or guess for n, guess in zip(known, likely, strict=True)]
