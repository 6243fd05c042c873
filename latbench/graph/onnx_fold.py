"""Folds batch normalisation into the layer before it, in a user's ONNX model.

A BatchNormalization in evaluation mode is ``y = scale * x + shift`` per channel, so it disappears into the weight and
bias of the linear layer that makes x.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from latbench.errors import ModelError
from latbench.graph.onnx_proto import drop_initializer_inputs, label, number, opset, subgraphs, walk
from latbench.graph.onnx_shapes import value_shapes
from latbench.graph.passes import FoldReport

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_WIRES = ("Constant", "Identity", "Transpose")  # what may stand between an initializer and the node that reads it

_MAX_WIRES = 16  # in a row: exporters write two; a chain of thousands would be walked for each that reads it

Array = NDArray[np.float64]


def fold_batch_norm(model: ModelProto) -> tuple[ModelProto, FoldReport]:
    """A copy of `model` with its batch normalisations folded, and which went where or stayed, and why.

    Folds what follows Conv, ConvTranspose, Gemm or MatMul, with or without an Add of a per-channel constant between.
    Arithmetic is in float64, stored in the weight's own type. Weights that other nodes read too are copied, not
    changed. Raises ModelError on a batch normalisation in training mode.
    """
    result = ModelProto()
    result.CopyFrom(model)
    drop_initializer_inputs(result)
    for node in walk(result.graph):
        if node.op_type == "BatchNormalization" and _trains(node, opset(model)):
            raise ModelError(f"{label(node)} is a BatchNormalization in training mode: export the model in eval mode")
    editor = _Editor(result)
    names = {id(node): label(node) for node in editor.nodes}  # before outputs, which name the nameless, move
    folded, kept = [], []
    for node in editor.nodes:
        if node.op_type == "BatchNormalization":
            try:
                layer = _fold(editor, node)
                folded.append((names[id(node)], names[id(layer)]))
            except _Unfoldable as reason:
                kept.append((names[id(node)], str(reason)))
        for body in subgraphs(node):
            where = f"inside a branch or loop of {label(node)}"
            kept += [(label(inner), where) for inner in walk(body) if inner.op_type == "BatchNormalization"]
    editor.finish()
    return result, FoldReport(tuple(folded), tuple(kept))


def _turned(value: NDArray[np.generic], turns: list[list[int] | None]) -> NDArray[np.generic] | None:
    """`value` after these transpositions, the last one first; None where they do not fit it."""
    try:
        for perm in reversed(turns):
            value = np.transpose(value, perm)
    except ValueError:
        return None
    return value


class _Unfoldable(Exception):  # noqa: N818  (never leaves this module)
    """Why a batch normalisation stays."""


class _Editor:
    """The main graph under edit: who makes a value, how often it is read, which values are constant."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.opset = opset(model)
        self.nodes = list(model.graph.node)
        self.initializers = {t.name: t for t in model.graph.initializer}
        self.producers: dict[str, NodeProto] = {name: node for node in self.nodes for name in node.output if name}
        self.outputs = {o.name for o in model.graph.output}
        self.reads = self._count_reads()
        self._taken = {*self.initializers, *(i.name for i in model.graph.input)}
        self._taken.update(name for node in walk(model.graph) for name in node.output)
        self._removed: set[int] = set()
        # Only a MatMul's rank is not plain from its weight; read before the first edit.
        needed = {"MatMul", "BatchNormalization"} <= {node.op_type for node in self.nodes}
        self.shapes = value_shapes(model) if needed else {}

    def _count_reads(self) -> Counter[str]:
        """Readers of each value: nodes, also those in subgraphs, and the graph's outputs."""
        reads = Counter(name for node in walk(self.model.graph) for name in node.input)
        for node in self.nodes:
            reads.update(o.name for body in subgraphs(node) for o in body.output)
        reads.update(o.name for o in self.model.graph.output)
        return reads

    def constant(self, name: str) -> NDArray[np.generic] | None:
        """The value, if it is an initializer, a Constant, or an Identity or Transpose of one; else None.

        torch.onnx.export writes equal initializers once and the others as Identity of the first, and transposes the
        weight of a bias-free Linear in the graph.
        """
        turns: list[list[int] | None] = []  # of the transpositions passed on the way to the initializer
        for _ in range(_MAX_WIRES):
            if name in self.initializers:
                return _turned(numpy_helper.to_array(self.initializers[name]), turns)
            node = self.producers.get(name)
            if node is None or node.op_type not in _WIRES:
                return None
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type == "Constant":
                value = next((v for k, v in attributes.items() if k.startswith("value")), None)
                return _turned(numpy_helper.to_array(value), turns) if isinstance(value, TensorProto) else None
            if node.op_type == "Transpose":
                turns.append(attributes.get("perm"))
            name = node.input[0]
        return None

    def add_constant(self, value: NDArray[np.generic], name: str) -> str:
        """Stores a new initializer under `name`, or under `name` and a number where that is taken."""
        candidates = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))
        fresh = next(candidate for candidate in candidates if candidate not in self._taken)
        self._taken.add(fresh)
        self.initializers[fresh] = numpy_helper.from_array(value, fresh)
        return fresh

    def remove(self, node: NodeProto) -> None:
        """Takes a node out; its output must have found another producer."""
        self._removed.add(id(node))

    def rename_output(self, node: NodeProto, name: str) -> None:
        node.output[0] = name
        self.producers[name] = node

    def finish(self) -> None:
        """Writes the edits back, without the constants and value infos that nothing reads any more."""
        graph = self.model.graph
        live = [node for node in self.nodes if id(node) not in self._removed]
        del graph.node[:]
        graph.node.extend(live)
        reads = self._count_reads()
        for node in reversed(live):
            if node.op_type in _WIRES and not reads[node.output[0]] and self.constant(node.output[0]) is not None:
                reads.subtract(node.input)
                self.remove(node)
        live = [node for node in live if id(node) not in self._removed]
        del graph.node[:]
        graph.node.extend(live)
        del graph.initializer[:]
        graph.initializer.extend(t for name, t in self.initializers.items() if reads[name] > 0)
        alive = {name for node in graph.node for name in node.output}
        infos = [v for v in graph.value_info if v.name in alive]
        del graph.value_info[:]
        graph.value_info.extend(infos)


def _trains(bn: NodeProto, version: int) -> bool:
    """Whether a BatchNormalization updates its statistics, by the rules of its opset."""
    if version >= 14:
        return bool(number(bn, "training_mode", 0))
    return any(bn.output[1:]) or (version < 7 and not number(bn, "is_test", 0))


def _fold(editor: _Editor, bn: NodeProto) -> NodeProto:
    """Folds one BatchNormalization; gives the layer that took it in. Raises _Unfoldable."""
    scale, shift = _affine(editor, bn)
    layer, add = _layer_before(editor, bn)
    weight = _weight(editor, layer)
    rank = weight.ndim
    factor = _factor(layer, scale, weight.shape)
    bias = np.zeros_like(scale)
    if layer.op_type != "MatMul" and len(layer.input) > 2 and layer.input[2]:
        bias = _per_channel(editor, layer.input[2], scale.size, 1 if layer.op_type.startswith("Conv") else rank)
        bias = bias * (number(layer, "beta", 1.0) if layer.op_type == "Gemm" else 1.0)
    if add is not None:
        addend = next(name for name in add.input if editor.constant(name) is not None)
        bias = bias + _per_channel(editor, addend, scale.size, rank)
    new_weight = _stored(_wide(weight) * factor, weight.dtype, layer)
    new_bias = _stored(bias * scale + shift, weight.dtype, layer)

    name = layer.input[1]
    bias_name = editor.add_constant(new_bias, f"{name}/folded_bias")
    layer.input[1] = editor.add_constant(new_weight, f"{name}/folded")
    if layer.op_type == "MatMul":
        # It has no bias of its own: the batch normalisation becomes the Add.
        addition = helper.make_node("Add", [layer.output[0], bias_name], [bn.output[0]], name=bn.name)
        bn.CopyFrom(addition)
    else:
        del layer.input[2:]
        layer.input.append(bias_name)
        if layer.op_type == "Gemm":
            attributes = [a for a in layer.attribute if a.name != "beta"]
            del layer.attribute[:]
            layer.attribute.extend(attributes)
        editor.rename_output(layer, bn.output[0])
        editor.remove(bn)
    if add is not None:
        editor.remove(add)
    return layer


def _wide(values: NDArray[Any]) -> Array:
    """In double precision; a signalling NaN is only a NaN."""
    with np.errstate(invalid="ignore"):
        return values.astype(np.float64)


def _affine(editor: _Editor, bn: NodeProto) -> tuple[Array, Array]:
    """Scale and shift, (C,) each."""
    if not number(bn, "spatial", 1):
        raise _Unfoldable("normalises each activation, not each channel (spatial=0)")
    values = []
    for role, name in zip(("scale", "bias", "mean", "variance"), bn.input[1:5], strict=True):
        value = editor.constant(name)
        if value is None:
            raise _Unfoldable(f"its {role} is not constant")
        values.append(_wide(value).reshape(-1))
    gamma, beta, mean, variance = values
    if len({v.size for v in values}) > 1:
        raise _Unfoldable("its parameters differ in length")
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = gamma / np.sqrt(variance + number(bn, "epsilon", 1e-5))
        return scale, beta - mean * scale


def _layer_before(editor: _Editor, bn: NodeProto) -> tuple[NodeProto, NodeProto | None]:
    """The layer whose output, read by nothing else, `bn` normalises, and the Add of a constant between them."""
    node = _producer(editor, bn.input[0])
    add: NodeProto | None = None
    if node.op_type == "Add":
        variable = [name for name in node.input if editor.constant(name) is None]
        if len(variable) == 1:
            add, node = node, _producer(editor, variable[0])
    if node.op_type not in _LAYERS:
        raise _Unfoldable(f"its input comes from {node.op_type} {label(node)}")
    for maker in (node, add):
        if maker is not None and editor.reads[maker.output[0]] > 1:
            also = "is a graph output too" if maker.output[0] in editor.outputs else "is read by other nodes too"
            raise _Unfoldable(f"the output of {maker.op_type} {label(maker)} {also}")
    if editor.opset < 7 and (add is not None or not node.op_type.startswith("Conv")):
        raise _Unfoldable("opset 6 and older broadcast by attributes")
    return node, add


def _producer(editor: _Editor, name: str) -> NodeProto:
    if name not in editor.producers:
        raise _Unfoldable(f"no layer precedes it: it reads the input {name}")
    return editor.producers[name]


def _weight(editor: _Editor, layer: NodeProto) -> NDArray[np.generic]:
    weight = editor.constant(layer.input[1])
    if weight is None:
        raise _Unfoldable(f"the weight of {layer.op_type} {label(layer)} is not constant")
    if weight.dtype not in (np.float16, np.float32, np.float64):
        raise _Unfoldable(f"the weight of {layer.op_type} {label(layer)} is {weight.dtype}")
    if layer.op_type == "MatMul" and (weight.ndim != 2 or len(editor.shapes.get(layer.input[0], ())) != 2):
        raise _Unfoldable(f"MatMul {label(layer)} is not known to be (N, in) x (in, out)")
    return weight


def _factor(layer: NodeProto, scale: Array, shape: tuple[int, ...]) -> Array:
    """`scale` in a shape that multiplies a weight of `shape` along its output channels."""
    groups = int(number(layer, "group", 1))
    if layer.op_type == "ConvTranspose":
        axis, channels = 1, shape[1] * groups
    else:
        axis = 0 if layer.op_type == "Conv" or number(layer, "transB", 0) else 1
        channels = shape[axis]
    if channels != scale.size:
        raise _Unfoldable(f"{scale.size} channels do not fit the weight {shape} of {layer.op_type} {label(layer)}")
    if layer.op_type == "ConvTranspose":  # (in, out / groups, ...): the inputs of one group make its outputs only
        rows = np.repeat(scale.reshape(groups, -1), shape[0] // groups, axis=0)  # (in, out / groups)
        return rows.reshape(*rows.shape, *(1,) * (len(shape) - 2))
    return scale.reshape([-1 if i == axis else 1 for i in range(len(shape))])


def _per_channel(editor: _Editor, name: str, channels: int, rank: int) -> Array:
    """A constant that is added to (N, C, ...) of `rank`, or is itself (C,) where rank is 1, as (C,)."""
    value = editor.constant(name)
    if value is None:
        raise _Unfoldable(f"the bias {name} is not constant")
    axis = min(1, rank - 1)
    shape = (1,) * (rank - value.ndim) + value.shape
    if len(shape) != rank or shape[axis] not in (1, channels) or value.size != shape[axis]:
        raise _Unfoldable(f"the bias {name} of shape {value.shape} is not one value per channel")
    return np.broadcast_to(_wide(value).reshape(-1), (channels,))


def _stored(value: Array, dtype: np.dtype[np.generic], layer: NodeProto) -> NDArray[np.generic]:
    with np.errstate(over="ignore"):
        stored = value.astype(dtype)
    if not np.isfinite(stored).all():
        raise _Unfoldable(f"the folded weights of {layer.op_type} {label(layer)} would overflow {dtype}")
    return stored
