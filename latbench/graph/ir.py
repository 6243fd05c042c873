"""``Graph``: a static-shape dataflow graph, the one description of a block or of a whole network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from numpy.typing import NDArray

from latbench import foreign
from latbench.errors import GraphError
from latbench.graph.ops import OPS, Op, Shape

DType = Literal["float32", "float16"]  # part of the computation, hence of the key
Weights = Mapping[str, NDArray[Any]]  # "node.role" -> array; beside a graph, never inside it


@dataclass(frozen=True)
class Node:
    """One use of an operator. ``/`` nests names; ``.`` is kept for weight roles."""

    name: str  # "block3/dw"
    op: Op
    inputs: tuple[str, ...]  # names of earlier nodes or of graph inputs


@dataclass(frozen=True)
class Graph:
    """Inputs, nodes in topological order, outputs, dtype.

    Raises GraphError on construction where names repeat or are unknown, shapes do not fit, or a node or an input feeds
    no output.
    """

    inputs: tuple[tuple[str, Shape], ...]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    dtype: DType = "float32"

    def __post_init__(self) -> None:
        if not self.outputs:
            raise GraphError("a graph needs at least one output")
        if self.dtype not in ("float32", "float16"):
            raise GraphError(f"unknown dtype {self.dtype!r}: float32 or float16")
        _ = self.shapes  # checks names and shapes
        used = {name for node in self.nodes for name in node.inputs} | set(self.outputs)
        idle = [n for n in (*dict(self.inputs), *(node.name for node in self.nodes)) if n not in used]
        if idle:
            raise GraphError(f"feeds no output: {', '.join(idle)} (GraphBuilder.build drops it)")

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Shape of every input and node, by name."""
        shapes: dict[str, Shape] = {}
        for name, shape in self.inputs:
            if name in shapes or "." in name or not name:
                raise GraphError(f"input name {name!r} is empty, repeated or holds a '.'")
            if any(not isinstance(n, int) or n < 1 for n in shape):
                raise GraphError(f"input {name!r}: {shape} is not a static, positive shape")
            shapes[name] = shape
        for node in self.nodes:
            if node.name in shapes or "." in node.name or not node.name:
                raise GraphError(f"node name {node.name!r} is empty, repeated or holds a '.'")
            try:
                shapes[node.name] = node.op.infer(*(shapes[name] for name in node.inputs))
            except KeyError as error:
                raise GraphError(f"{node.name}: unknown input {error}") from None
            except GraphError as error:
                raise GraphError(f"{node.name}: {error}") from None
        for name in self.outputs:
            if name not in shapes:
                raise GraphError(f"unknown output {name!r}")
        return shapes

    @cached_property
    def signature(self) -> str:
        """Canonical text: operators in depth-first order from the outputs, names replaced by positions.

        Equal computations have equal signatures whatever their names and the order of independent nodes.
        """
        position = {name: f"i{i}" for i, (name, _) in enumerate(self.inputs)}
        by_name = {node.name: node for node in self.nodes}
        lines = ["x".join(map(str, shape)) for _, shape in self.inputs]
        for name in _depth_first(self.outputs, by_name, set(position)):
            node = by_name[name]
            lines.append(f"{node.op}({','.join(position[i] for i in node.inputs)})")
            position[name] = str(len(lines) - 1 - len(self.inputs))
        outputs = ",".join(position[name] for name in self.outputs)
        return f"{self.dtype};" + ";".join(lines) + f"->{outputs}"

    @cached_property
    def key(self) -> str:
        """First 16 hex digits of sha256(signature): the primary key of every latency table."""
        return hashlib.sha256(self.signature.encode()).hexdigest()[:16]

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of one inference, batch included."""
        return sum(node.op.macs(*(self.shapes[i] for i in node.inputs)) for node in self.nodes)

    @cached_property
    def n_params(self) -> int:
        """Trainable parameters, as torch counts them."""
        return sum(node.op.n_params for node in self.nodes)

    def weight_shapes(self) -> dict[str, Shape]:
        """ "node.role" -> shape, in node order."""
        return {f"{node.name}.{role}": s for node in self.nodes for role, s in node.op.weights().items()}

    def to_json(self) -> str:
        """One line of JSON; ``from_json`` is its inverse."""
        nodes = [
            {"name": n.name, "op": type(n.op).__name__, "attributes": n.op.attributes(), "inputs": n.inputs}
            for n in self.nodes
        ]
        return json.dumps({"dtype": self.dtype, "inputs": self.inputs, "nodes": nodes, "outputs": self.outputs})

    @classmethod
    def from_json(cls, text: str) -> Graph:
        """Raises GraphError on malformed text, unknown operators or attributes."""
        try:
            raw = foreign.parse_json(text)
            nodes = []
            for n in raw["nodes"]:
                attributes = {k: tuple(v) if isinstance(v, list) else v for k, v in n["attributes"].items()}
                nodes.append(Node(n["name"], OPS[n["op"]](**attributes), tuple(n["inputs"])))
            inputs = tuple((name, tuple(shape)) for name, shape in raw["inputs"])
            return cls(inputs, tuple(nodes), tuple(raw["outputs"]), raw["dtype"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise GraphError(f"not a graph in JSON: {type(error).__name__}: {error}") from None


def _depth_first(outputs: Sequence[str], nodes: Mapping[str, Node], inputs: set[str]) -> Iterator[str]:
    """Names of the nodes that feed `outputs`, each after its inputs (iterative: networks are deep)."""
    done = set(inputs)
    for output in outputs:
        stack = [output]
        while stack:
            name = stack[-1]
            waiting = [] if name in done else [i for i in nodes[name].inputs if i not in done]
            if waiting:
                stack.extend(reversed(waiting))
                continue
            stack.pop()
            if name not in done:
                done.add(name)
                yield name


class GraphBuilder:
    """Grows a graph node by node.

    >>> b = GraphBuilder()
    >>> x = b.input("x", (1, 3, 32, 32))
    >>> x = b.add(Conv2d(3, 16, 3, padding=1), x, name="conv")
    >>> b.build(x).macs
    442368
    """

    def __init__(self, dtype: DType = "float32") -> None:
        self.dtype: DType = dtype
        self._inputs: dict[str, Shape] = {}
        self._nodes: dict[str, Node] = {}
        self._shapes: dict[str, Shape] = {}

    def input(self, name: str, shape: Shape) -> str:
        """Declares a graph input; gives its name back. Raises GraphError where the name is taken."""
        if name in self._shapes:
            raise GraphError(f"input name {name!r} is taken")
        self._inputs[name] = self._shapes[name] = shape
        return name

    def shape(self, name: str) -> Shape:
        """Shape of an input or node added so far."""
        return self._shapes[name]

    def add(self, op: Op, *inputs: str, name: str) -> str:
        """Appends a node; gives its name back. Raises GraphError where shapes or names do not fit."""
        if name in self._shapes:
            raise GraphError(f"node name {name!r} is taken")
        try:
            self._shapes[name] = op.infer(*(self._shapes[i] for i in inputs))
        except KeyError as error:
            raise GraphError(f"{name}: unknown input {error}") from None
        except GraphError as error:
            raise GraphError(f"{name}: {error}") from None
        self._nodes[name] = Node(name, op, inputs)
        return name

    def inline(self, graph: Graph, *inputs: str, prefix: str) -> tuple[str, ...]:
        """Appends a copy of `graph`, its inputs bound to `inputs`, its names under ``prefix/``; gives its outputs."""
        if graph.dtype != self.dtype or len(graph.inputs) != len(inputs):
            raise GraphError(
                f"{prefix}: {graph.dtype} with {len(graph.inputs)} inputs does not fit {self.dtype}, {inputs}"
            )
        bound = dict(zip((name for name, _ in graph.inputs), inputs, strict=True))
        for name, shape in graph.inputs:
            if self._shapes[bound[name]] != shape:
                raise GraphError(f"{prefix}: input {name} is {shape}, bound to {self._shapes[bound[name]]}")
        for node in graph.nodes:
            bound[node.name] = self.add(node.op, *(bound[i] for i in node.inputs), name=f"{prefix}/{node.name}")
        return tuple(bound[name] for name in graph.outputs)

    def build(self, *outputs: str) -> Graph:
        """The graph of what feeds `outputs`; other nodes and inputs are dropped."""
        live = set(_depth_first(outputs, self._nodes, set(self._inputs)))
        nodes = tuple(node for name, node in self._nodes.items() if name in live)
        used = {i for node in nodes for i in node.inputs} | set(outputs)
        inputs = tuple((n, s) for n, s in self._inputs.items() if n in used)
        return Graph(inputs, nodes, outputs, self.dtype)
