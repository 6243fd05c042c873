"""Shapes of the values of an ONNX model, shape arithmetic included.

onnx.shape_inference on a whole model stops at a division: torch exports ShuffleNet's channel split as Shape, Gather,
Add, Div, Mul, Slice, and from there on no shape would be known. So nodes are inferred one by one, and those that
compute with small constants are evaluated on the way. No weight is copied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, TypeProto, ValueInfoProto, defs, helper, numpy_helper
from onnx.checker import ValidationError
from onnx.reference import ReferenceEvaluator
from onnx.shape_inference import InferenceError, infer_node_outputs

from latbench.graph.onnx_proto import opset, subgraphs

Dims = tuple[int | None, ...]  # None: unknown or symbolic

MAX_EVALUATED = 3000  # nodes, 1 ms each on the reference implementation; ShuffleNet has 100
_SMALL = 256  # elements: shapes, axes, sizes and scales are smaller, weights are not needed
_LAYOUT = {"Concat", "Expand", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
_NUMBERS = {"Add", "Cast", "Ceil", "Div", "Floor", "Max", "Min", "Mod", "Mul", "Neg", "ReduceProd", "Round", "Sub"}
_LOGIC = {"And", "ConstantOfShape", "Equal", "Greater", "Less", "Not", "Or", "Range", "Where"}
_ARITHMETIC = _LAYOUT | _NUMBERS | _LOGIC  # what exporters compute shapes with


def dims(value: ValueInfoProto) -> Dims | None:
    """Dimensions of a tensor; None where not even the rank is known, or where it is no tensor."""
    return _dims(value.type)


def value_shapes(model: ModelProto) -> dict[str, Dims]:
    """Shapes of the main graph's values, by name, as far as they can be known; values of unknown rank are absent.

    What the file declares stands in where inference fails: in branches and loops, for ONNX Runtime's own operators.
    """
    graph = model.graph
    declared = {v.name: v.type for v in (*graph.value_info, *graph.output)}
    types = {v.name: v.type for v in graph.input}
    known: dict[str, TensorProto] = {}  # small constants
    for tensor in graph.initializer:
        types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        if math.prod(tensor.dims) <= _SMALL:
            known[tensor.name] = tensor
    evaluated = 0
    for node in graph.node:
        inferred = _infer(node, types, known, model)
        for name in filter(None, node.output):
            both = (t for t in (inferred.get(name), declared.get(name)) if t is not None)
            found = min(both, key=_unknowns, default=None)
            if found is not None:
                types[name] = found
        found_values = _evaluate(node, types, known, opset(model)) if evaluated < MAX_EVALUATED else {}
        evaluated += bool(found_values)
        known.update(found_values)
    shapes = {name: _dims(type_) for name, type_ in types.items()}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def _dims(type_: TypeProto) -> Dims | None:
    if not type_.HasField("tensor_type") or not type_.tensor_type.HasField("shape"):
        return None
    # 0 and -1 are what some exporters write for "any".
    return tuple(d.dim_value if d.dim_value > 0 else None for d in type_.tensor_type.shape.dim)


def _unknowns(type_: TypeProto) -> float:
    shape = _dims(type_)
    return math.inf if shape is None else shape.count(None)


def _infer(
    node: NodeProto, types: Mapping[str, TypeProto], known: Mapping[str, TensorProto], model: ModelProto
) -> dict[str, TypeProto]:
    """Types of a node's outputs; empty where ONNX cannot tell."""
    names = [name for name in node.input if name]
    if node.domain not in ("", "ai.onnx.ml") or any(subgraphs(node)) or not all(name in types for name in names):
        return {}
    version = next((o.version for o in model.opset_import if o.domain == node.domain), 0)
    try:
        schema = defs.get_schema(node.op_type, version, node.domain)
        return infer_node_outputs(
            schema,
            node,
            {name: types[name] for name in names},
            {name: known[name] for name in names if name in known},
            opset_imports=list(model.opset_import),
            ir_version=model.ir_version,
        )
    except (InferenceError, ValidationError, ValueError, defs.SchemaError):  # types that do not fit, among others
        return {}


def _evaluate(
    node: NodeProto, types: Mapping[str, TypeProto], known: Mapping[str, TensorProto], version: int
) -> dict[str, TensorProto]:
    """Values of a node's outputs, where it computes with small constants; else empty."""
    if node.op_type == "Constant":
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        return {node.output[0]: value} if value is not None and math.prod(value.dims) <= _SMALL else {}
    if node.op_type == "Shape" and node.input[0] in types:
        shape = _dims(types[node.input[0]])
        if shape is None or None in shape:
            return {}
        start, end = (helper.get_node_attr_value(node, k) if _has(node, k) else None for k in ("start", "end"))
        return {node.output[0]: _tensor(np.array(shape[start:end], np.int64))}
    sizes = [_dims(types[name]) if name in types else None for name in node.output]
    if node.op_type not in _ARITHMETIC or node.domain or not all(name in known for name in node.input if name):
        return {}
    if any(s is None or None in s or math.prod(n or 0 for n in s) > _SMALL for s in sizes):
        return {}
    return _run(node, {name: numpy_helper.to_array(known[name]) for name in node.input if name}, version)


def _run(node: NodeProto, inputs: Mapping[str, NDArray[np.generic]], version: int) -> dict[str, TensorProto]:
    """One node on the reference implementation; empty where it refuses."""
    arguments = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape) for n, x in inputs.items()
    ]
    results = [helper.make_value_info(name, TypeProto()) for name in node.output]
    model = helper.make_model(
        helper.make_graph([node], "node", arguments, results), opset_imports=[helper.make_opsetid("", version)]
    )
    try:
        with np.errstate(all="ignore"):
            values = ReferenceEvaluator(model).run(None, dict(inputs))
    except (ArithmeticError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return {}
    return {name: _tensor(np.asarray(value)) for name, value in zip(node.output, values, strict=True)}


def _tensor(value: NDArray[np.generic]) -> TensorProto:
    return numpy_helper.from_array(value)


def _has(node: NodeProto, attribute: str) -> bool:
    return any(a.name == attribute for a in node.attribute)
