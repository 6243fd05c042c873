"""Lowers a graph to ONNX: one ``singledispatch`` registration per operator.

Opset 17 and IR version 8 are what TensorRT 8.6 reads; newer runtimes read them too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from latbench.errors import GraphError
from latbench.graph import ops
from latbench.graph.ir import Graph, Node, Weights
from latbench.graph.ops import Op, Shape, Size2, pair
from latbench.graph.passes import check_weights

OPSET, IR_VERSION = 17, 8

Attribute = int | float | Sequence[int]
_MAX_NBYTES = 2**31 - 2**24  # protobuf's limit, less 16 MiB for what is not weights


def to_onnx(graph: Graph, weights: Weights) -> bytes:
    """A serialised model: names, static shapes and dtype are the graph's, weights are cast to its dtype.

    Raises GraphError where weights are missing, unknown or of another shape, or exceed protobuf's 2 GB.
    """
    check_weights(graph, weights)
    nbytes = sum(map(math.prod, graph.weight_shapes().values())) * np.dtype(graph.dtype).itemsize
    if nbytes > _MAX_NBYTES:
        raise GraphError(f"{nbytes} bytes of weights do not fit one ONNX file, which holds {_MAX_NBYTES}")
    ends = [*(name for name, _ in graph.inputs), *graph.outputs]
    if twice := {name for name in ends if ends.count(name) > 1}:
        raise GraphError(
            f"ONNX wants distinct inputs and outputs: add an Identity node after {', '.join(sorted(twice))}"
        )
    model = _Model(graph)
    for name in graph.weight_shapes():
        model.initializer(name, weights[name], model.dtype)
    for node in graph.nodes:
        _lower(node.op, node, model)
    proto = onnx.ModelProto(
        ir_version=IR_VERSION,
        producer_name="latbench",
        opset_import=[onnx.OperatorSetIdProto(domain="", version=OPSET)],
        graph=onnx.GraphProto(
            name=graph.key,
            node=model.nodes,
            initializer=model.initializers,
            input=[_value_info(name, shape, model.data_type) for name, shape in graph.inputs],
            output=[_value_info(name, graph.shapes[name], model.data_type) for name in graph.outputs],
        ),
    )
    data: bytes = proto.SerializeToString()
    return data


_DATA_TYPES = {"float32": onnx.TensorProto.FLOAT, "float16": onnx.TensorProto.FLOAT16, "int64": onnx.TensorProto.INT64}


class _Model:
    """The nodes and initializers of one model as they grow.

    A tensor carries the name of its node; helper tensors hold a ``.``, which no node name may.
    """

    def __init__(self, graph: Graph) -> None:
        self.shapes = graph.shapes
        self.dtype = graph.dtype
        self.data_type = _DATA_TYPES[graph.dtype]
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._constants: dict[str, str] = {}

    def initializer(self, name: str, values: NDArray[Any], dtype: str) -> str:
        # ONNX's raw data is little-endian whatever the host
        array = np.asarray(values, np.dtype(dtype).newbyteorder("<"))
        proto = onnx.TensorProto(
            name=name, dims=array.shape, data_type=_DATA_TYPES[dtype], raw_data=np.ascontiguousarray(array).tobytes()
        )
        self.initializers.append(proto)
        return name

    def constant(self, values: float | list[int], dtype: str) -> str:
        """Name of an initializer with these values; equal constants are stored once."""
        name = f".{dtype}{values}".replace(" ", "")
        if name not in self._constants:
            self._constants[name] = self.initializer(name, np.asarray(values), dtype)
        return name

    def emit(self, op_type: str, inputs: Sequence[str], output: str, /, **attributes: Attribute) -> str:
        """Appends a node, named as its output; gives that name back."""
        attribute = [_attribute(name, value) for name, value in attributes.items()]
        proto = onnx.NodeProto(op_type=op_type, name=output, input=inputs, output=[output], attribute=attribute)
        self.nodes.append(proto)
        return output


def _attribute(name: str, value: Attribute) -> onnx.AttributeProto:
    # onnx.helper would do, at three times the cost: it inspects every element of every list
    if isinstance(value, int):
        return onnx.AttributeProto(name=name, type=onnx.AttributeProto.INT, i=value)
    if isinstance(value, float):
        return onnx.AttributeProto(name=name, type=onnx.AttributeProto.FLOAT, f=value)
    return onnx.AttributeProto(name=name, type=onnx.AttributeProto.INTS, ints=value)


def _value_info(name: str, shape: Shape, data_type: int) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, data_type, shape)


def _pads(padding: Size2) -> tuple[int, int, int, int]:
    top, left = pair(padding)  # (height, width) -> ONNX's (top, left, bottom, right)
    return (top, left, top, left)


def _tensors(node: Node) -> list[str]:
    """Inputs of a node with weights, in ONNX's order, which is that of ``Op.weights``."""
    return [*node.inputs, *(f"{node.name}.{role}" for role in node.op.weights())]


@singledispatch
def _lower(op: Op, node: Node, model: _Model) -> None:
    raise GraphError(f"{node.name}: {type(op).__name__} has no lowering in latbench/graph/onnx.py: register one there")


@_lower.register
def _conv2d(op: ops.Conv2d, node: Node, model: _Model) -> None:
    model.emit(
        "Conv",
        _tensors(node),
        node.name,
        kernel_shape=pair(op.kernel_size),
        strides=pair(op.stride),
        pads=_pads(op.padding),
        dilations=pair(op.dilation),
        group=op.groups,
    )


@_lower.register
def _conv_transpose2d(op: ops.ConvTranspose2d, node: Node, model: _Model) -> None:
    model.emit(
        "ConvTranspose",
        _tensors(node),
        node.name,
        kernel_shape=pair(op.kernel_size),
        strides=pair(op.stride),
        pads=_pads(op.padding),
        output_padding=pair(op.output_padding),
        group=op.groups,
    )


@_lower.register
def _batch_norm2d(op: ops.BatchNorm2d, node: Node, model: _Model) -> None:
    model.emit("BatchNormalization", _tensors(node), node.name, epsilon=float(op.eps))


@_lower.register
def _linear(op: ops.Linear, node: Node, model: _Model) -> None:
    model.emit("Gemm", _tensors(node), node.name, transB=1)


@_lower.register
def _relu(op: ops.ReLU, node: Node, model: _Model) -> None:
    model.emit("Relu", node.inputs, node.name)


@_lower.register
def _relu6(op: ops.ReLU6, node: Node, model: _Model) -> None:
    model.emit("Clip", [*node.inputs, model.constant(0.0, model.dtype), model.constant(6.0, model.dtype)], node.name)


@_lower.register
def _sigmoid(op: ops.Sigmoid, node: Node, model: _Model) -> None:
    model.emit("Sigmoid", node.inputs, node.name)


@_lower.register
def _hardsigmoid(op: ops.Hardsigmoid, node: Node, model: _Model) -> None:
    model.emit("HardSigmoid", node.inputs, node.name, alpha=1 / 6, beta=0.5)


@_lower.register
def _hardswish(op: ops.Hardswish, node: Node, model: _Model) -> None:
    model.emit("HardSwish", node.inputs, node.name)


@_lower.register
def _silu(op: ops.SiLU, node: Node, model: _Model) -> None:
    gate = model.emit("Sigmoid", node.inputs, f"{node.name}.sigmoid")
    model.emit("Mul", [*node.inputs, gate], node.name)


@_lower.register
def _identity(op: ops.Identity, node: Node, model: _Model) -> None:
    model.emit("Identity", node.inputs, node.name)


@_lower.register
def _zero(op: ops.Zero, node: Node, model: _Model) -> None:
    (x,) = node.inputs
    if op.stride > 1:
        bounds = ([0, 0], [*model.shapes[x][2:]], [2, 3], [op.stride] * 2)  # starts, ends, axes, steps
        x = model.emit("Slice", [x, *(model.constant(b, "int64") for b in bounds)], f"{node.name}.slice")
    model.emit("Mul", [x, model.constant(0.0, model.dtype)], node.name)


@_lower.register
def _max_pool2d(op: ops.MaxPool2d, node: Node, model: _Model) -> None:
    window = {"kernel_shape": pair(op.kernel_size), "strides": pair(op.stride), "pads": _pads(op.padding)}
    model.emit("MaxPool", node.inputs, node.name, **window)


@_lower.register
def _avg_pool2d(op: ops.AvgPool2d, node: Node, model: _Model) -> None:
    window = {"kernel_shape": pair(op.kernel_size), "strides": pair(op.stride), "pads": _pads(op.padding)}
    model.emit("AveragePool", node.inputs, node.name, **window, count_include_pad=int(op.count_include_pad))


@_lower.register
def _adaptive_avg_pool2d(op: ops.AdaptiveAvgPool2d, node: Node, model: _Model) -> None:
    model.emit("GlobalAveragePool", node.inputs, node.name)


@_lower.register
def _flatten(op: ops.Flatten, node: Node, model: _Model) -> None:
    model.emit("Flatten", node.inputs, node.name, axis=1)


@_lower.register
def _add(op: ops.Add, node: Node, model: _Model) -> None:
    # A chain of Add, not Sum: ONNX Runtime accumulates each Add into the convolution before it (12-25 % less on three
    # to eight 1x1 convolutions), and elsewhere both take the same time.
    total, *rest = node.inputs
    for i, term in enumerate(rest, start=1):
        total = model.emit("Add", [total, term], node.name if i == len(rest) else f"{node.name}.add{i}")


@_lower.register
def _mul(op: ops.Mul, node: Node, model: _Model) -> None:
    model.emit("Mul", node.inputs, node.name)


@_lower.register
def _concat(op: ops.Concat, node: Node, model: _Model) -> None:
    model.emit("Concat", node.inputs, node.name, axis=1)


@_lower.register
def _channel_shuffle(op: ops.ChannelShuffle, node: Node, model: _Model) -> None:
    n, c, h, w = model.shapes[node.name]
    grouped = model.constant([n, op.groups, c // op.groups, h, w], "int64")
    x = model.emit("Reshape", [*node.inputs, grouped], f"{node.name}.group")
    x = model.emit("Transpose", [x], f"{node.name}.transpose", perm=(0, 2, 1, 3, 4))
    model.emit("Reshape", [x, model.constant([n, c, h, w], "int64")], node.name)


@_lower.register
def _crop(op: ops.Crop, node: Node, model: _Model) -> None:
    (x,) = node.inputs
    bounds = ([op.top, op.left], [*model.shapes[x][2:]], [2, 3])  # starts, ends, axes
    model.emit("Slice", [x, *(model.constant(b, "int64") for b in bounds)], node.name)
