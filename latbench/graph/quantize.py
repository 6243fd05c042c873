"""int8 networks: QuantizeLinear and DequantizeLinear (Q/DQ) nodes in a float32 ONNX model, from calibrated ranges.

Weights are int8, symmetric, one scale per output channel; activations have one scale per tensor. Which pairs a runtime
fuses to int8 kernels differs so much that one model does not serve all (mobilenet_v1 at 96 px on ONNX Runtime: 0.89 ms
in float32, 0.38 with its own scheme, 2.8 with TensorRT's). A scheme is named after the runtime it is for:

* ``onnxruntime``: uint8 activations with a zero point, int32 biases, a pair on the inputs of every quantised operator
  and behind it: signed ones fuse with no ReLU, and what is not followed by a pair stays in float32.
* ``openvino``: as above, on inputs only: pairs inside a SiLU or a hard swish would break up what it fuses.
* ``tensorrt``: int8 activations with zero points of 0 (it refuses others), float32 weights behind a pair of their own
  (8.6 takes no int8 constants) and float32 biases (it refuses an int32 DequantizeLinear), on inputs only. Of a sum's
  inputs the one that comes straight from a convolution stays as it is: the sum is fused into that (NVIDIA's guide,
  "Q/DQ Layer-Placement Recommendations"; ModelOpt does the same).

onnxruntime.quantization would serve the first only: for TensorRT its models have to be rewritten (ModelOpt patches it),
and it works through files and a logger. So: one pass of ours, and a test that holds it against theirs. Transposed
convolutions stay in float32: ONNX Runtime has no int8 kernel for them. Processors without VNNI add pairs of products in
16 bits, which may saturate: that costs accuracy, not time, and ``bench`` says how much.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from latbench.errors import ModelError
from latbench.graph.onnx_proto import label, number, opset

Scheme = Literal["onnxruntime", "openvino", "tensorrt"]
Range = tuple[float, float]  # least and most that a tensor holds

MATRIX = ("Conv", "Gemm", "MatMul")  # with a constant weight
JOINS = ("Add", "Concat", "Mul")  # of activations
POOLS = ("AveragePool", "GlobalAveragePool")
ACTIVATIONS = ("Clip", "Relu")  # run inside the operator before them, which is quantised behind them
MOVES = ("Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")  # change no value

_LEAST_OPSET = 13  # scales per channel
_INT32_ROOM = 2.0**30


def quantised_tensors(model: ModelProto, scheme: Scheme) -> dict[str, str]:
    """Activations that get a Q/DQ pair -> the tensor whose range they take: their own, or what was only moved.

    Raises ModelError where the model is no float32 network, is quantised already, or holds nothing to quantise.
    """
    if opset(model) < _LEAST_OPSET:
        raise ModelError(f"int8 needs opset {_LEAST_OPSET}, the model has {opset(model)}: export it with a newer one")
    if any(node.op_type in ("QuantizeLinear", "QLinearConv") for node in model.graph.node):
        raise ModelError("the model is quantised already: leave out --dtype int8")
    chosen = _Placement(model, scheme).tensors()
    if not chosen:
        raise ModelError("the model has no float32 convolution or matrix product with a constant weight: no int8 of it")
    return chosen


def quantize(model: ModelProto, ranges: Mapping[str, Range], scheme: Scheme) -> ModelProto:
    """The model with Q/DQ pairs; `ranges` by ``quantised_tensors``' values. The model given stays as it is.

    Raises ModelError as ``quantised_tensors`` does, and where a range is missing or not finite.
    """
    chosen = quantised_tensors(model, scheme)
    for source in chosen.values():
        if source not in ranges or not np.isfinite(ranges[source]).all():
            raise ModelError(f"no finite range of {source!r}: does the calibration data fit the model?")
    quantised = ModelProto()
    quantised.CopyFrom(model)
    writer = _Writer(quantised, scheme)
    for value in model.graph.input:
        if value.name in chosen:
            writer.activation(value.name, ranges[chosen[value.name]])
    for node in model.graph.node:
        writer.node(node)
        for name in node.output:
            if name in chosen:
                writer.activation(name, ranges[chosen[name]])
    writer.finish()
    return quantised


def scale_and_zero(extent: Range, scheme: Scheme) -> tuple[np.float32, np.integer[Any]]:
    """Such that zero is hit exactly. A tensor that is all zeros gets a scale of 1."""
    least, most = min(extent[0], 0.0), max(extent[1], 0.0)
    if scheme == "tensorrt":
        return np.float32(max(-least, most) / 127 or 1.0), np.int8(0)
    scale = np.float32((most - least) / 255 or 1.0)
    return scale, np.uint8(np.clip(round(-least / float(scale)), 0, 255))


def _weight_axis(node: NodeProto, weights: Mapping[str, Any]) -> int | None:
    """The axis of output channels of a weight that can be quantised; None where there is none."""
    if node.op_type not in MATRIX or node.domain or len(node.input) < 2 or node.input[1] not in weights:
        return None
    rank = len(weights[node.input[1]].dims)
    if weights[node.input[1]].data_type != TensorProto.FLOAT or node.input[0] in weights:
        return None
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        plain = number(node, "alpha", 1) == number(node, "beta", 1) == 1 and not number(node, "transA", 0)
        return (0 if number(node, "transB", 0) else 1) if plain else None
    return 1 if rank == 2 else None


class _Placement:
    """Which activations get a pair."""

    def __init__(self, model: ModelProto, scheme: Scheme) -> None:
        graph, self.scheme = model.graph, scheme
        self.nodes = list(graph.node)
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.outputs = {value.name for value in graph.output}
        self.producer = {name: node for node in self.nodes for name in node.output}
        self.users: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.users.setdefault(name, []).append(node)

    def tensors(self) -> dict[str, str]:
        matrices = [node for node in self.nodes if _weight_axis(node, self.weights) is not None]
        if not matrices:
            return {}
        wanted: dict[str, None] = {}
        for node in self.nodes:
            if node in matrices or node.op_type in POOLS:
                wanted[node.input[0]] = None
            elif node.op_type in JOINS and not set(node.input) & set(self.weights):
                wanted |= dict.fromkeys(self._joined(node))
            else:
                continue
            if self.scheme == "onnxruntime":
                wanted[self._behind(node)] = None
        return {name: self._origin(name) for name in wanted if name not in self.outputs}

    def _joined(self, node: NodeProto) -> list[str]:
        """The inputs of a sum or product that are quantised."""
        if self.scheme == "onnxruntime":
            return list(node.input)
        if node.op_type != "Add":
            return []
        fused = next((name for name in node.input if self._from_matrix(name)), None)
        return [name for name in node.input if name != fused]

    def _from_matrix(self, name: str) -> bool:
        made = self.producer.get(name)
        return made is not None and len(self.users[name]) == 1 and _weight_axis(made, self.weights) is not None

    def _behind(self, node: NodeProto) -> str:
        """A node's output, or that of the activation that runs inside it."""
        (name,) = node.output
        users = self.users.get(name, [])
        inside = len(users) == 1 and users[0].op_type in ACTIVATIONS and name not in self.outputs
        return str(users[0].output[0] if inside else name)

    def _origin(self, name: str) -> str:
        while name in self.producer and self.producer[name].op_type in MOVES:
            name = self.producer[name].input[0]
        return name


class _Writer:
    """The quantised model as it grows."""

    def __init__(self, model: ModelProto, scheme: Scheme) -> None:
        self.model, self.scheme = model, scheme
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.taken = {name for node in model.graph.node for name in (*node.input, *node.output)}
        self.nodes: list[NodeProto] = []
        self.read: dict[str, str] = {}  # tensor -> what its users read in its place
        self.scales: dict[str, np.float32] = {}  # of activations, by the name that their users read
        self.channels: dict[tuple[str, int], tuple[str, NDArray[np.float32]]] = {}  # quantised weights

    def activation(self, name: str, extent: Range) -> None:
        """A pair behind a tensor."""
        scale, zero = scale_and_zero(extent, self.scheme)
        self.read[name] = self._pair(name, scale, np.array(zero))
        self.scales[self.read[name]] = scale

    def node(self, node: NodeProto) -> None:
        """A node of the model, its inputs and its weight quantised."""
        made = NodeProto()
        made.CopyFrom(node)
        for i, name in enumerate(node.input):
            made.input[i] = self.read.get(name, name)
        axis = _weight_axis(node, self.weights)
        if axis is not None:
            bias = node.input[2] if len(node.input) > 2 and self.scheme != "tensorrt" else ""
            bias = bias if bias in self.weights else ""
            x_scale = self.scales[made.input[0]]
            made.input[1], w_scale = self._weight(node.input[1], axis, float(x_scale), bias)
            if bias:
                made.input[2] = self._bias(label(node), bias, w_scale * x_scale)
        self.nodes.append(made)

    def finish(self) -> None:
        graph = self.model.graph
        del graph.node[:]
        graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input} | {value.name for value in graph.output}
        kept = [tensor for tensor in graph.initializer if tensor.name in used]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        del graph.value_info[:]
        onnx.checker.check_model(self.model)

    def _weight(self, name: str, axis: int, x_scale: float, bias: str) -> tuple[str, NDArray[np.float32]]:
        if (name, axis) in self.channels and not bias:
            return self.channels[name, axis]
        values = numpy_helper.to_array(self.weights[name])
        scale = np.abs(values).max(axis=tuple(i for i in range(values.ndim) if i != axis)) / np.float32(127)
        if bias:  # a channel of tiny weights must leave room for its bias in 32 bits
            floor = np.abs(numpy_helper.to_array(self.weights[bias])).reshape(-1) / (x_scale * _INT32_ROOM)
            scale = np.maximum(scale, floor)
        scale = np.where(scale > 0, scale, 1).astype(np.float32)
        zero = np.zeros(scale.shape, np.int8)
        if self.scheme == "tensorrt":
            read = self._pair(name, scale, zero, axis=axis)
        else:
            shape = [-1 if i == axis else 1 for i in range(values.ndim)]
            integers = np.clip(np.rint(values / scale.reshape(shape)), -127, 127).astype(np.int8)
            read = self._dequantized(name, self._constant(f"{name}.int8", integers), scale, zero, axis)
        self.channels[name, axis] = read, scale
        return read, scale

    def _bias(self, node: str, name: str, scale: NDArray[np.float32]) -> str:
        values = numpy_helper.to_array(self.weights[name]).reshape(-1)
        integers = np.rint(values / scale.astype(np.float64)).astype(np.int32)
        stored = self._constant(f"{node}.bias.int32", integers)
        return self._dequantized(f"{node}.bias", stored, scale, np.zeros(scale.shape, np.int32), 0)

    def _pair(self, name: str, scale: Any, zero: NDArray[Any], axis: int | None = None) -> str:
        about = [self._constant(f"{name}.scale", np.array(scale)), self._constant(f"{name}.zero", zero)]
        attribute: dict[str, Any] = {} if axis is None else {"axis": axis}
        between, read = self._fresh(f"{name}.quantized"), self._fresh(f"{name}.dequantized")
        self.nodes.append(helper.make_node("QuantizeLinear", [name, *about], [between], name=between, **attribute))
        self.nodes.append(helper.make_node("DequantizeLinear", [between, *about], [read], name=read, **attribute))
        return read

    def _dequantized(self, name: str, stored: str, scale: Any, zero: NDArray[Any], axis: int) -> str:
        about = [self._constant(f"{name}.scale", scale), self._constant(f"{name}.zero", zero)]
        read = self._fresh(f"{name}.dequantized")
        self.nodes.append(helper.make_node("DequantizeLinear", [stored, *about], [read], name=read, axis=axis))
        return read

    def _constant(self, name: str, values: NDArray[Any]) -> str:
        name = self._fresh(name)
        self.model.graph.initializer.append(numpy_helper.from_array(values, name))
        return name

    def _fresh(self, name: str) -> str:
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name
