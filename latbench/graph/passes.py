"""Graph to graph: weights, batch-norm folding, composition. numpy only."""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latbench.errors import GraphError
from latbench.graph import ops
from latbench.graph.ir import DType, Graph, GraphBuilder, Node, Weights
from latbench.graph.ops import Op, Shape, pair

# ---- weights ----------------------------------------------------------------------------------------------------

_Matrix = ops.Conv2d | ops.ConvTranspose2d | ops.Linear  # what multiplies its input by a weight
_N_NORMALS = 1_000_003  # prime: a tensor that wraps around does not repeat along its rows


def check_weights(graph: Graph, weights: Weights) -> None:
    """Raises GraphError where weights are missing, unknown or of another shape than the graph's."""
    shapes = graph.weight_shapes()
    if missing := [name for name in shapes if name not in weights]:
        raise GraphError(f"missing weights: {_some(missing)} (passes.random_weights draws them)")
    if unknown := [name for name in weights if name not in shapes]:
        raise GraphError(f"weights of no node: {_some(unknown)} (does another graph own them, or a folded one?)")
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise GraphError(f"weight {name} has shape {weights[name].shape}, the graph wants {shape}")


def random_weights(graph: Graph, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Weights in the graph's dtype, the same in every process, under which a unit normal input stays of order one.

    Each weight is a stretch of one buffer of normals, at an offset that follows from its name: thousands of blocks get
    theirs at the speed of memory. A layer's scale is He et al.'s (2015), with the second moment of its actual input in
    the place of their 1/2: a linear bottleneck does not double the variance, and a deep float16 network stays finite.
    """
    normals = _normals(seed)
    moments = {name: 1.0 for name, _ in graph.inputs}  # estimated mean square of every tensor
    weights: dict[str, NDArray[Any]] = {}
    for node in graph.nodes:
        inputs = [moments[name] for name in node.inputs]
        for role, shape in node.op.weights().items():
            name = f"{node.name}.{role}"
            weights[name] = _draw(normals, name, shape, graph.dtype, *_distribution(node.op, role, inputs[0]))
        moments[node.name] = _moment(node.op, inputs)
    return weights


@lru_cache(maxsize=2)
def _normals(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(_N_NORMALS, np.float32)


def _draw(normals: NDArray[np.float32], name: str, shape: Shape, dtype: DType, mean: float, std: float) -> NDArray[Any]:
    flat = np.empty(math.prod(shape), dtype)
    start, source = 0, zlib.crc32(name.encode()) % normals.size  # hash() differs between processes
    while start < flat.size:
        n = min(flat.size - start, normals.size - source)
        np.multiply(normals[source : source + n], np.float32(std), out=flat[start : start + n], casting="same_kind")
        start, source = start + n, 0
    if mean:
        np.clip(flat, -mean / 2, mean, out=flat)  # a variance in [mean / 2, 2 * mean]
        flat += flat.dtype.type(mean)
    return flat.reshape(shape)


def _distribution(op: Op, role: str, moment: float) -> tuple[float, float]:
    """(mean, standard deviation) of a weight, given the mean square of the operator's input."""
    if isinstance(op, ops.BatchNorm2d):
        return {"weight": (1.0, 0.1), "running_var": (1.0, 0.3)}.get(role, (0.0, 0.1))
    if role == "bias":
        return 0.0, 0.1
    shape = op.weights()["weight"]
    fan_in = float(math.prod(shape[1:]))
    if isinstance(op, ops.ConvTranspose2d):  # (in, out / groups, kh, kw): stride spreads the taps over the output
        fan_in = op.in_channels / op.groups * math.prod(shape[2:]) / math.prod(pair(op.stride))
    return 0.0, 1 / math.sqrt(max(fan_in, 1.0) * moment)


def _moment(op: Op, inputs: Sequence[float]) -> float:
    """Estimated mean square of an operator's output from those of its inputs, taken as independent.

    Where it depends on the scale, this is its value at large scale. There an estimate too small would feed on itself
    from layer to layer, whereas one too large is stopped by the biases.
    """
    if isinstance(op, _Matrix):
        return 1.0
    if isinstance(op, (ops.Sigmoid, ops.Hardsigmoid)):
        return 0.5
    if isinstance(op, ops.Add):
        return sum(inputs)
    if isinstance(op, ops.Mul):
        return math.prod(inputs)
    gain = 0.5 if isinstance(op, (ops.ReLU, ops.ReLU6, ops.SiLU, ops.Hardswish)) else 1.0
    return gain * sum(inputs) / len(inputs)


# ---- batch-norm folding -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoldReport:
    """What became of every BatchNorm2d, in node order."""

    folded: tuple[tuple[str, str], ...]  # (batch norm, the layer that absorbed it)
    kept: tuple[tuple[str, str], ...]  # (batch norm, why)


def fold_batch_norm(graph: Graph, weights: Weights) -> tuple[Graph, dict[str, NDArray[Any]], FoldReport]:
    """The same function with each batch norm absorbed by the layer before it, where that is exact.

    The layer keeps its name and gains a bias; whatever read the batch norm reads the layer. Computed in float64,
    given in the graph's dtype. Raises GraphError where `weights` are not the graph's.
    """
    check_weights(graph, weights)
    report = plan_fold(graph)
    by_name = {node.name: node for node in graph.nodes}
    wide: dict[str, NDArray[np.float64]] = {}  # the folded weights; a second batch norm in a row folds on top
    for bn_name, into in report.folded:
        bn, layer = by_name[bn_name].op, by_name[into].op
        assert isinstance(bn, ops.BatchNorm2d)
        assert isinstance(layer, _Matrix)
        gamma, beta, mean, var = (np.asarray(weights[f"{bn_name}.{role}"], np.float64) for role in bn.weights())
        scale = gamma / np.sqrt(var + bn.eps)
        weight, bias = f"{into}.weight", f"{into}.bias"
        wide[weight] = _scale_outputs(layer, np.asarray(wide.get(weight, weights[weight]), np.float64), scale)
        wide[bias] = (np.asarray(wide.get(bias, weights.get(bias, 0.0)), np.float64) - mean) * scale + beta
    result = _apply_fold(graph, report)
    folded = {
        name: wide[name].astype(graph.dtype) if name in wide else weights[name] for name in result.weight_shapes()
    }
    return result, folded, report


def fold_structure(graph: Graph) -> Graph:
    """The graph that ``fold_batch_norm`` gives, without weights: enough where only time matters."""
    return _apply_fold(graph, plan_fold(graph))


def plan_fold(graph: Graph) -> FoldReport:
    """Which batch norms can be folded, into which node, and why the others cannot."""
    by_name = {node.name: node for node in graph.nodes}
    users: dict[str, list[str]] = defaultdict(list)
    for node in graph.nodes:
        for name in node.inputs:
            users[name].append(node.name)
    into: dict[str, str] = {}
    kept: dict[str, str] = {}
    for node in graph.nodes:
        if not isinstance(node.op, ops.BatchNorm2d):
            continue
        (source,) = node.inputs
        layer = into.get(source, source)  # of a second batch norm in a row: where the first went
        others = [name for name in users[source] if name != node.name]
        if layer not in by_name:
            kept[node.name] = f"normalises the graph input {source}"
        elif not isinstance(by_name[layer].op, _Matrix):
            kept[node.name] = f"follows {source} ({type(by_name[layer].op).__name__}), which has no weights to scale"
        elif others:
            kept[node.name] = f"output of {source} is also used by {_some(others)}"
        elif source in graph.outputs:
            kept[node.name] = f"output of {source} is also an output of the graph"
        else:
            into[node.name] = layer
    return FoldReport(tuple(into.items()), tuple(kept.items()))


def _apply_fold(graph: Graph, report: FoldReport) -> Graph:
    into = dict(report.folded)
    biased = set(into.values())
    nodes = []
    for node in graph.nodes:
        if node.name in into:
            continue
        op = node.op
        if node.name in biased:
            assert isinstance(op, _Matrix)
            op = replace(op, bias=True)
        nodes.append(Node(node.name, op, tuple(into.get(i, i) for i in node.inputs)))
    return replace(graph, nodes=tuple(nodes), outputs=tuple(into.get(name, name) for name in graph.outputs))


def _scale_outputs(layer: _Matrix, weight: NDArray[np.float64], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """The weight of a layer whose output channel c is scaled by ``scale[c]``."""
    if isinstance(layer, ops.ConvTranspose2d):  # (in, out / groups, kh, kw), group g owning the g-th share of both
        grouped = weight.reshape(layer.groups, -1, *weight.shape[1:])  # (g, in / g, out / g, kh, kw)
        return (grouped * scale.reshape(layer.groups, 1, -1, 1, 1)).reshape(weight.shape)
    return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))


# ---- composition ------------------------------------------------------------------------------------------------


def as_dtype(graph: Graph, dtype: DType) -> Graph:
    """The same graph in another precision."""
    return replace(graph, dtype=dtype)


def chain(graphs: Sequence[Graph], names: Sequence[str]) -> Graph:
    """One after another: the outputs of each feed the inputs of the next. Names become ``name/...``.

    Raises GraphError where counts, shapes, dtypes or names do not fit.
    """
    builder = _builder(graphs, names)
    feed = tuple(builder.input(f"{names[0]}/{name}", shape) for name, shape in graphs[0].inputs)
    for graph, name in zip(graphs, names, strict=True):
        if len(feed) != len(graph.inputs):
            raise GraphError(f"{name} takes {len(graph.inputs)} input(s), the graph before it gives {len(feed)}")
        feed = builder.inline(graph, *feed, prefix=name)
    return builder.build(*feed)


def union(graphs: Sequence[Graph], names: Sequence[str]) -> Graph:
    """Side by side: inputs and outputs concatenated. Names become ``name/...``.

    Raises GraphError where dtypes or names do not fit.
    """
    builder = _builder(graphs, names)
    outputs: list[str] = []
    for graph, name in zip(graphs, names, strict=True):
        inputs = (builder.input(f"{name}/{i}", shape) for i, shape in graph.inputs)
        outputs += builder.inline(graph, *inputs, prefix=name)
    return builder.build(*outputs)


def _builder(graphs: Sequence[Graph], names: Sequence[str]) -> GraphBuilder:
    if not graphs or len(names) != len(graphs) or len(set(names)) != len(names):
        raise GraphError(f"{len(graphs)} graph(s) need as many distinct names, got {list(names)}")
    if len(dtypes := {graph.dtype for graph in graphs}) > 1:
        raise GraphError(f"graphs of different dtypes: {', '.join(sorted(dtypes))} (passes.as_dtype converts)")
    return GraphBuilder(graphs[0].dtype)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
