"""Reading an ``onnx.ModelProto``: walks, names, attributes."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import FunctionProto, GraphProto, ModelProto, NodeProto


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The bodies of an If, Loop or Scan."""
    for a in node.attribute:
        if a.HasField("g"):
            yield a.g
        yield from a.graphs


def walk(graph: GraphProto | FunctionProto) -> Iterator[NodeProto]:
    """Every node, those of subgraphs right after the node that holds them."""
    for node in graph.node:
        yield node
        for body in subgraphs(node):
            yield from walk(body)


def label(node: NodeProto) -> str:
    """The node's name, or its first named output: names are optional in ONNX."""
    return node.name or next((name for name in node.output if name), node.op_type)


def number(node: NodeProto, name: str, default: float) -> float:
    """A scalar attribute."""
    for a in node.attribute:
        if a.name == name:
            return float(a.f) if a.HasField("f") else float(a.i)
    return default


def opset(model: ModelProto) -> int:
    """Version of the default domain; 0 where the model does not say."""
    return next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)


def drop_initializer_inputs(model: ModelProto) -> None:
    """Takes initializers off the list of inputs, in place.

    Up to IR 3 every initializer is listed as an input too. From IR 4 such an entry means "may be overridden at run
    time", which keeps ONNX Runtime from treating weights as constants: it would run a slower network.
    """
    names = {t.name for t in model.graph.initializer}
    real = [i for i in model.graph.input if i.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(real)
    model.ir_version = max(model.ir_version, 4)
