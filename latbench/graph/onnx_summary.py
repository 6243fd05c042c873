"""What a user's ONNX model is: its key, parameters, multiply-accumulates, inputs and operators."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from latbench.graph.onnx_proto import number, opset, subgraphs, walk
from latbench.graph.onnx_shapes import Dims, dims, value_shapes

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
# Operator -> position of its weight (convolutions) or of its left operand (matrix products).
_CONVS = {"Conv": 1, "FusedConv": 1, "ConvInteger": 1, "QLinearConv": 3}
_MATMULS = {"MatMul": 0, "MatMulInteger": 0, "QLinearMatMul": 0}
# They multiply matrices too, but by rules that are not counted here.
_UNCOUNTED = {"Attention", "DeformConv", "Einsum", "GRU", "LSTM", "RNN"}


class TensorInfo(NamedTuple):
    """An input or output; a dimension that is unknown is None, and so is a shape of unknown rank."""

    name: str
    shape: Dims | None
    dtype: str  # as numpy calls it


@dataclass(frozen=True)
class ModelSummary:
    """What `summarise` counts."""

    key: str  # of the computation, weights included
    n_params: int
    macs: int | None  # None: some shape is unknown, or some operator is not counted
    nodes: int  # those of subgraphs included
    opset: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    n_by_op: Mapping[str, int]  # most frequent first; operators of other domains carry theirs


def summarise(model: ModelProto) -> ModelSummary:
    """Counts a model that `latbench.graph.onnx_model.load` gave."""
    nodes = list(walk(model.graph))
    n_by_op = Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in nodes)
    return ModelSummary(
        key=key(model),
        n_params=n_params(model),
        macs=macs(model),
        nodes=len(nodes),
        opset=opset(model),
        inputs=tuple(_info(value) for value in model.graph.input),
        outputs=tuple(_info(value) for value in model.graph.output),
        n_by_op=dict(sorted(n_by_op.items(), key=lambda item: (-item[1], item[0]))),
    )


def _info(value: ValueInfoProto) -> TensorInfo:
    elem_type = value.type.tensor_type.elem_type
    dtype = helper.tensor_dtype_to_np_dtype(elem_type).name if elem_type else "unknown"
    return TensorInfo(value.name, dims(value), dtype)


# ── key ──────────────────────────────────────────────────────────────────────


def key(model: ModelProto) -> str:
    """First 16 hex digits of a sha256 over operator sets, nodes, weights, inputs and outputs, their names included.

    Left out: IR version, producer, model version, graph name, doc strings, metadata and the shapes noted for inner
    values, none of which a runtime computes with. Whether weights lay in the file or beside it makes no difference.
    """
    bare = ModelProto()
    bare.graph.CopyFrom(model.graph)
    bare.opset_import.extend(sorted(model.opset_import, key=lambda o: o.domain))
    _strip(bare)
    bare.graph.ClearField("name")
    bare.graph.ClearField("value_info")
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()[:16]


def _strip(message: Any) -> None:
    """Clears doc strings and metadata of a message and of all within it, in place."""
    for field, value in message.ListFields():
        if field.name in ("doc_string", "metadata_props"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for inner in [value] if hasattr(value, "ListFields") else value:
                _strip(inner)


# ── parameters ───────────────────────────────────────────────────────────────


def n_params(model: ModelProto) -> int:
    """Elements of the float weights that nodes read: what torch's ``parameters()`` of the same network holds.

    A weight is an initializer of rank 1 or more (scalars are an operator's settings), or a Constant read by a
    convolution, matrix product or normalisation. Each name counts once, an Identity of a weight under its own name:
    so exporters write a parameter that happens to equal another. Running means and variances and the scales of a
    Resize do not count.
    """
    sizes: dict[str, int] = {}
    constants: set[str] = set()
    counted: dict[str, int] = {}
    for tensor in model.graph.initializer:
        sizes.update(_weight_size(tensor.name, tensor))
    for node in walk(model.graph):
        for body in subgraphs(node):
            for tensor in body.initializer:
                sizes.update(_weight_size(tensor.name, tensor))
        if node.op_type == "Constant":
            value = next((a.t for a in node.attribute if a.name == "value"), TensorProto())
            sizes.update(_weight_size(node.output[0], value))
            constants.add(node.output[0])
        elif node.op_type == "Identity" and node.input[0] in sizes:
            sizes[node.output[0]] = sizes[node.input[0]]
            constants.update(node.output if node.input[0] in constants else ())
        else:
            for name in _parameter_slots(node):
                if name in sizes and (name not in constants or node.op_type in _READ_CONSTANTS):
                    counted[name] = sizes[name]
    return sum(counted.values())


_READ_CONSTANTS = {"Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "InstanceNormalization"}


def _weight_size(name: str, tensor: TensorProto) -> dict[str, int]:
    return {name: math.prod(tensor.dims)} if tensor.data_type in _FLOATS and tensor.dims else {}


def _parameter_slots(node: NodeProto) -> list[str]:
    if node.op_type in ("Resize", "Upsample"):
        return []
    return list(node.input[:3]) if node.op_type == "BatchNormalization" else list(node.input)


# ── multiply-accumulates ─────────────────────────────────────────────────────


def macs(model: ModelProto) -> int | None:
    """Multiply-accumulates of the convolutions and matrix products of one inference, batch included.

    None where a shape they need is unknown, where they stand in a branch or loop, or where an operator multiplies
    matrices in a way that is not counted (Einsum, LSTM, ... and ONNX Runtime's own operators): never a partial sum.
    """
    shapes = value_shapes(model)
    total = 0
    for node in model.graph.node:
        n = _macs(node, shapes)
        if n is None or any(_macs(inner, {}) != 0 for body in subgraphs(node) for inner in walk(body)):
            return None
        total += n
    return total


def _macs(node: NodeProto, shapes: Mapping[str, Dims]) -> int | None:
    """0: the operator multiplies no matrices; None: it does, and how often is unknown."""
    if node.op_type in _CONVS:
        weight = node.input[_CONVS[node.op_type]]
        return _product((shapes.get(node.output[0]), shapes.get(weight, (None,))[1:]))
    if node.op_type == "ConvTranspose":
        return _product((shapes.get(node.input[0]), shapes.get(node.input[1], (None,))[1:]))
    if node.op_type in _MATMULS:
        left = shapes.get(node.input[_MATMULS[node.op_type]])
        return _product((shapes.get(node.output[0]), left and left[-1:]))
    if node.op_type == "Gemm":
        left = shapes.get(node.input[0], (None, None))
        return _product((shapes.get(node.output[0]), left[:1] if number(node, "transA", 0) else left[-1:]))
    return None if node.op_type in _UNCOUNTED or node.domain == "com.microsoft" else 0


def _product(parts: tuple[Dims | None, Dims | None]) -> int | None:
    """Product of all dimensions; None where one is unknown."""
    sizes = [n for part in parts for n in (part if part is not None else (None,))]
    return None if None in sizes else math.prod(n for n in sizes if n is not None)
