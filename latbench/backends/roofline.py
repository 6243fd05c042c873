"""An analytic device: each kernel takes the longer of its arithmetic and its memory traffic. Deterministic.

For tests, documentation and newcomers. Its rows say ``origin=simulated``; it is never called a measurement.
Williams, Waterman, Patterson 2009: Roofline: an insightful visual performance model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from latbench.backends.base import LayerTime, Scalar, checked
from latbench.errors import GraphError, MeasurementError, UsageError
from latbench.graph import ops
from latbench.graph.ir import Graph, Node

OPTIONS: dict[str, Scalar] = {"peak_gflops": 100.0, "bandwidth_gbs": 20.0, "kernel_us": 1.0, "call_us": 3.0}

# Runtimes run these inside the kernel before them; here they are free where that kernel feeds nothing else.
FUSED = (ops.BatchNorm2d, ops.ReLU, ops.ReLU6, ops.Hardswish, ops.Hardsigmoid, ops.Sigmoid, ops.SiLU)
FREE = (ops.Identity, ops.Flatten)
PRODUCERS = (ops.Conv2d, ops.ConvTranspose2d, ops.Linear, ops.Add)


class RooflineBackend:
    """Options: `peak_gflops` (2 per MAC), `bandwidth_gbs`, `kernel_us` per kernel, `call_us` per inference."""

    name: ClassVar[str] = "roofline"
    artifact: ClassVar[Literal["onnx", "graph"]] = "graph"
    clock: ClassVar[Literal["host", "cuda_event", "model"]] = "model"
    kinds: ClassVar[tuple[str, ...]] = ("cpu", "gpu")

    def __init__(self, options: Mapping[str, Scalar]) -> None:
        self.options: dict[str, float] = {}
        for name, value in checked(self.name, OPTIONS, options).items():
            if isinstance(value, (str, bool)) or not 0 < value < math.inf:
                raise UsageError(f"roofline: {name} must be a number above zero, got {value!r}")
            self.options[name] = float(value)

    @classmethod
    def available(cls) -> None:
        """Always."""

    @classmethod
    def versions(cls) -> dict[str, str]:
        return {"roofline": "1"}

    @contextmanager
    def load(self, artifact: Path) -> Iterator[RooflineRunner]:
        try:
            graph = Graph.from_json(artifact.read_text())
        except (OSError, ValueError, GraphError) as error:  # ValueError: no text
            raise MeasurementError(str(error)) from error
        yield RooflineRunner(graph, self.options)


class RooflineRunner:
    """A graph and the sum of its kernels."""

    def __init__(self, graph: Graph, options: Mapping[str, float]) -> None:
        self._layers = kernels(graph, options)
        self.ms = options["call_us"] / 1e3 + sum(layer.ms for layer in self._layers)

    def sample(self, repeat: int) -> float:
        return repeat * self.ms

    def outputs(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        raise MeasurementError("roofline computes times, not outputs")

    def layers(self) -> list[LayerTime] | None:
        return self._layers


def kernels(graph: Graph, options: Mapping[str, float]) -> list[LayerTime]:
    """One LayerTime per kernel, fused operators left out."""
    nodes = {node.name: node for node in graph.nodes}
    uses: dict[str, int] = {}
    for name in (*(i for node in graph.nodes for i in node.inputs), *graph.outputs):
        uses[name] = uses.get(name, 0) + 1
    itemsize = np.dtype(graph.dtype).itemsize
    layers = []
    for node in graph.nodes:
        if isinstance(node.op, FREE) or _fused(node, nodes, uses):
            continue
        shapes = [graph.shapes[i] for i in node.inputs]
        elements = [*shapes, graph.shapes[node.name], *node.op.weights().values()]
        traffic = itemsize * sum(math.prod(s) for s in elements)
        compute_ms = 2 * node.op.macs(*shapes) / options["peak_gflops"] / 1e6
        memory_ms = traffic / options["bandwidth_gbs"] / 1e6
        ms = max(compute_ms, memory_ms) + options["kernel_us"] / 1e3
        layers.append(LayerTime(node.name, type(node.op).__name__, ms))
    return layers


def _fused(node: Node, nodes: Mapping[str, Node], uses: Mapping[str, int]) -> bool:
    """Runs inside the kernel before it: a chain of elementwise operators behind a producer that feeds nothing else."""
    while isinstance(node.op, FUSED):
        if uses[node.inputs[0]] != 1 or node.inputs[0] not in nodes:
            return False
        node = nodes[node.inputs[0]]
        if isinstance(node.op, PRODUCERS):
            return True
    return False
