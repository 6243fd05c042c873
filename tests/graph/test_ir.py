"""Operators and graphs: keys, JSON, counts, and what is said of a graph that does not hold together."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from graphs import CASES, NETWORKS, Grow, case_id, graphs, single
from hypothesis import given, settings
from hypothesis import strategies as st

from latbench.errors import GraphError
from latbench.graph import ops
from latbench.graph.ir import Graph, GraphBuilder, Node
from latbench.graph.ops import Op, Shape

networks = pytest.mark.parametrize("network", NETWORKS)

# ---- keys -------------------------------------------------------------------------------------------------------


def _renamed(graph: Graph, rng: random.Random) -> Graph:
    names = [name for name, _ in graph.inputs] + [node.name for node in graph.nodes]
    new = dict(zip(names, rng.sample([f"block{i}/x" for i in range(len(names))], len(names)), strict=True))
    nodes = tuple(Node(new[n.name], n.op, tuple(new[i] for i in n.inputs)) for n in graph.nodes)
    inputs = tuple((new[name], shape) for name, shape in graph.inputs)
    return replace(graph, inputs=inputs, nodes=nodes, outputs=tuple(new[name] for name in graph.outputs))


def _reordered(graph: Graph, rng: random.Random) -> Graph:
    """Another topological order of the same nodes."""
    known, waiting, nodes = {name for name, _ in graph.inputs}, list(graph.nodes), list[Node]()
    while waiting:
        node = rng.choice([n for n in waiting if known.issuperset(n.inputs)])
        waiting.remove(node)
        nodes.append(node)
        known.add(node.name)
    return replace(graph, nodes=tuple(nodes))


@given(graph=graphs(), seed=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_key_ignores_names_and_the_order_of_independent_nodes(graph: Graph, seed: int) -> None:
    rng = random.Random(seed)
    other = _reordered(_renamed(graph, rng), rng)
    assert other.signature == graph.signature
    assert other.key == graph.key


@given(graph=graphs(), seed=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_equal_signatures_mean_isomorphic_graphs(graph: Graph, seed: int) -> None:
    """Rewire one input of one node to another tensor of its shape: the keys differ unless the graphs are isomorphic."""
    rng = random.Random(seed)
    position = rng.randrange(len(graph.nodes))
    node = graph.nodes[position]
    earlier = [name for name, _ in graph.inputs] + [n.name for n in graph.nodes[:position]]
    slot = rng.randrange(len(node.inputs))
    shape = graph.shapes[node.inputs[slot]]
    source = rng.choice([name for name in earlier if graph.shapes[name] == shape])
    inputs = (*node.inputs[:slot], source, *node.inputs[slot + 1 :])
    nodes = (*graph.nodes[:position], replace(node, inputs=inputs), *graph.nodes[position + 1 :])
    try:
        other = replace(graph, nodes=nodes)
    except GraphError:  # the tensor it was taken from feeds nothing any more
        return
    assert (other.signature == graph.signature) == (_unfolded(other) == _unfolded(graph))


def _unfolded(graph: Graph) -> object:
    """The graph as nested tuples, sharing told by the order in which nodes are met: equal for isomorphic graphs."""
    by_name, seen = {node.name: node for node in graph.nodes}, dict[str, int]()
    inputs = [name for name, _ in graph.inputs]

    def term(name: str) -> object:
        if name in inputs:
            return inputs.index(name)
        if name in seen:
            return ("seen", seen[name])
        node = by_name[name]
        inside = tuple(term(i) for i in node.inputs)
        seen[name] = len(seen)
        return (node.op, inside)

    return tuple(shape for _, shape in graph.inputs), tuple(term(name) for name in graph.outputs)


def _relu_sums() -> Iterator[Graph]:
    """relu(x) + relu(x), with one node and with two; x + relu(x) both ways round."""
    g = Grow((1, 4))
    y = g(ops.ReLU(), "x0")
    yield g.builder.build(g(ops.Add(), y, y))
    g = Grow((1, 4))
    yield g.builder.build(g(ops.Add(), g(ops.ReLU(), "x0"), g(ops.ReLU(), "x0")))
    for first in (True, False):
        g = Grow((1, 4))
        y = g(ops.ReLU(), "x0")
        yield g.builder.build(g(ops.Add(), "x0", y) if first else g(ops.Add(), y, "x0"))


def test_key_tells_attributes_shapes_dtypes_and_wiring_apart() -> None:
    distinct = [single(op, *shapes) for op, shapes, _ in CASES]
    distinct += [replace(graph, dtype="float16") for graph in distinct]
    distinct += [single(ops.ReLU(), shape) for shape in [(1, 8), (8, 1), (1, 8, 1, 1), (1, 1, 8, 1), (18, 1), (1, 81)]]
    distinct += [*_relu_sums(), *(network() for network in NETWORKS)]
    b = GraphBuilder()
    x, y = b.input("x", (1, 4)), b.input("y", (1, 4))
    s, t = b.add(ops.ReLU(), x, name="s"), b.add(ops.Sigmoid(), y, name="t")
    distinct += [b.build(s, t), b.build(t, s), b.build(s), b.build(t)]
    assert len({graph.signature for graph in distinct}) == len(distinct)
    assert len({graph.key for graph in distinct}) == len(distinct)


def test_equal_settings_written_differently_have_one_key() -> None:
    square = ops.Conv2d(8, 8, (3, 3), (1, 1), (1, 1), (1, 1))
    assert square == ops.Conv2d(8, 8, 3, padding=1)
    assert str(square) == "Conv2d(in_channels=8,out_channels=8,kernel_size=3,padding=1)"


def test_keys_are_those_of_the_published_tables() -> None:
    """A change here makes every table measured so far unreadable."""
    graph = single(ops.Conv2d(3, 16, (3, 5), 2, 1, bias=True), (1, 3, 32, 32))
    assert graph.signature == (
        "float32;1x3x32x32;Conv2d(in_channels=3,out_channels=16,kernel_size=3x5,stride=2,padding=1,bias=1)(i0)->0"
    )
    assert graph.key == "8dd452f42f216117"


# ---- JSON -------------------------------------------------------------------------------------------------------


@given(graph=graphs(), dtype=st.sampled_from(["float32", "float16"]))
@settings(max_examples=100, deadline=None)
def test_json_gives_the_same_graph_back(graph: Graph, dtype: str) -> None:
    graph = Graph(graph.inputs, graph.nodes, graph.outputs, "float16" if dtype == "float16" else "float32")
    assert Graph.from_json(graph.to_json()) == graph


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_json_keeps_every_operator(case: tuple[Op, tuple[Shape, ...], object]) -> None:
    graph = single(case[0], *case[1])
    assert Graph.from_json(graph.to_json()) == graph
    assert "\n" not in graph.to_json()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"inputs": []}', "KeyError: 'nodes'"),
        (single(ops.ReLU(), (1, 4)).to_json().replace("ReLU", "Softmax"), "KeyError: 'Softmax'"),
        (single(ops.Crop(2, 1), (1, 4, 4, 4)).to_json().replace('"top"', '"up"'), "'up'"),
        (single(ops.Crop(2, 1), (1, 4, 4, 4)).to_json().replace('{"top": 2}', "null"), "AttributeError"),
    ],
)
def test_text_that_is_no_graph_is_refused(text: str, why: str) -> None:
    with pytest.raises(GraphError, match=f"not a graph in JSON: .*{why}"):
        Graph.from_json(text)


# ---- counts -----------------------------------------------------------------------------------------------------


def test_counts_of_mobilenet_v1_are_the_published_ones() -> None:
    """569 M multiply-accumulates and 4.2 M parameters: Howard et al. 2017, table 4."""
    g = Grow((1, 3, 224, 224))
    x = g(ops.ReLU(), g(ops.BatchNorm2d(32), g(ops.Conv2d(3, 32, 3, 2, 1), "x0")))
    width = 32
    for out, stride in [
        (64, 1),
        (128, 2),
        (128, 1),
        (256, 2),
        (256, 1),
        (512, 2),
        *[(512, 1)] * 5,
        (1024, 2),
        (1024, 1),
    ]:
        x = g(ops.ReLU(), g(ops.BatchNorm2d(width), g(ops.Conv2d(width, width, 3, stride, 1, groups=width), x)))
        x = g(ops.ReLU(), g(ops.BatchNorm2d(out), g(ops.Conv2d(width, out), x)))
        width = out
    graph = g.builder.build(g(ops.Linear(1024, 1000), g(ops.Flatten(), g(ops.AdaptiveAvgPool2d(), x))))
    assert graph.macs == 568_740_352
    assert graph.n_params == 4_231_976


@networks
def test_macs_grow_with_the_batch_and_parameters_do_not(network: Callable[[], Graph]) -> None:
    graph = network()
    tripled = replace(graph, inputs=tuple((name, (3 * shape[0], *shape[1:])) for name, shape in graph.inputs))
    assert tripled.macs == 3 * graph.macs
    assert tripled.n_params == graph.n_params


# ---- graphs that do not hold together ---------------------------------------------------------------------------

RELU = Node("r", ops.ReLU(), ("x",))
X = ("x", (1, 4))


@pytest.mark.parametrize(
    ("inputs", "nodes", "outputs", "why"),
    [
        ([X], [RELU], [], "a graph needs at least one output"),
        ([X], [RELU], ["y"], "unknown output 'y'"),
        ([X], [Node("r", ops.ReLU(), ("y",))], ["r"], "r: unknown input 'y'"),
        ([X], [Node("s", ops.ReLU(), ("r",)), RELU], ["s"], "s: unknown input 'r'"),
        ([X], [RELU, RELU], ["r"], "node name 'r' is empty, repeated or holds a '.'"),
        ([X], [Node("x", ops.ReLU(), ("x",))], ["x"], "node name 'x' is empty, repeated"),
        ([X], [Node("a.b", ops.ReLU(), ("x",))], ["a.b"], "node name 'a.b' is empty, repeated or holds a '.'"),
        ([X, X], [RELU], ["r"], "input name 'x' is empty, repeated"),
        ([("", (1, 4))], [], [""], "input name '' is empty"),
        ([("x", (1, 0))], [RELU], ["r"], "'x': .1, 0. is not a static, positive shape"),
        ([("x", (1, None))], [RELU], ["r"], "'x': .1, None. is not a static, positive shape"),
        ([X], [RELU, Node("s", ops.ReLU(), ("x",))], ["r"], "feeds no output: s"),
        ([X, ("y", (1, 4))], [RELU], ["r"], "feeds no output: y"),
        (
            [X],
            [Node("fc", ops.Linear(5, 2), ("x",))],
            ["fc"],
            r"fc: Linear\(in_features=5,out_features=2\) does not fit",
        ),
    ],
)
def test_a_malformed_graph_says_what_is_wrong(
    inputs: list[tuple[str, Shape]], nodes: list[Node], outputs: list[str], why: str
) -> None:
    with pytest.raises(GraphError, match=why):
        Graph(tuple(inputs), tuple(nodes), tuple(outputs))


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(GraphError, match="unknown dtype 'bfloat16': float32 or float16"):
        Graph((X,), (RELU,), ("r",), "bfloat16")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("op", "shapes", "why"),
    [
        (ops.Conv2d(8, 8), [(1, 4, 5, 5)], "4 channels"),
        (ops.Conv2d(8, 8), [(1, 8)], r"takes 1 input\(s\) of rank 4"),
        (ops.Conv2d(8, 8, 7), [(1, 8, 6, 9)], "the window is larger than the padded input"),
        (ops.ConvTranspose2d(8, 8), [(1, 4, 5, 5)], "4 channels"),
        (ops.ConvTranspose2d(8, 8, 1, padding=3), [(1, 8, 5, 9)], "the output would be empty"),
        (ops.BatchNorm2d(8), [(1, 4, 5, 5)], "expects 8 channels"),
        (ops.BatchNorm2d(8), [(1, 8, 5)], "expects 8 channels"),
        (ops.Linear(8, 2), [(1, 8, 1, 1)], r"takes 1 input\(s\) of rank 2"),
        (ops.ReLU(), [(1, 8), (1, 8)], r"takes 1 input\(s\), got shapes"),
        (ops.MaxPool2d(3, 1), [(1, 8, 2, 2)], "the window is larger than the padded input"),
        (ops.AvgPool2d(3, 1), [(1, 8, 4, 2)], "the window is larger than the padded input"),
        (ops.Add(), [(1, 8)], "wants two or more tensors of one shape"),
        (ops.Add(), [(1, 8), (1, 4)], "wants two or more tensors of one shape"),
        (ops.Mul(), [(1, 8, 2, 2), (1, 4, 1, 1)], "shapes neither equal nor a channel gate"),
        (ops.Concat(), [(1, 8, 2, 2), (1, 8, 2, 3)], "differ in channels only"),
        (ops.ChannelShuffle(3), [(1, 8, 2, 2)], "channels are not divisible by groups"),
        (ops.Crop(2, 1), [(1, 8, 2, 4)], "nothing would remain"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused_by_name(op: Op, shapes: list[Shape], why: str) -> None:
    with pytest.raises(GraphError, match=rf"^op: {type(op).__name__}\(.*{why}"):
        single(op, *shapes)


@pytest.mark.parametrize("op", [ops.Conv2d, ops.ConvTranspose2d])
def test_groups_must_divide_the_channels(op: Callable[..., Op]) -> None:
    with pytest.raises(GraphError, match="channels are not divisible by groups"):
        op(8, 6, groups=4)


# ---- the builder ------------------------------------------------------------------------------------------------


def test_the_builder_drops_what_feeds_no_output() -> None:
    b = GraphBuilder("float16")
    x, _ = b.input("x", (1, 4)), b.input("unused", (1, 4))
    y = b.add(ops.ReLU(), x, name="y")
    b.add(ops.Sigmoid(), y, name="idle")
    assert b.build(y) == Graph((("x", (1, 4)),), (Node("y", ops.ReLU(), ("x",)),), ("y",), "float16")


def test_the_builder_says_what_is_wrong() -> None:
    b = GraphBuilder()
    x = b.input("x", (1, 4))
    b.add(ops.ReLU(), x, name="r")
    with pytest.raises(GraphError, match="node name 'r' is taken"):
        b.add(ops.ReLU(), x, name="r")
    with pytest.raises(GraphError, match="input name 'x' is taken"):
        b.input("x", (1, 5))
    with pytest.raises(GraphError, match="s: unknown input 'y'"):
        b.add(ops.ReLU(), "y", name="s")
    with pytest.raises(GraphError, match=r"fc: Linear\(.* does not fit"):
        b.add(ops.Linear(5, 5), x, name="fc")


@given(graph=graphs())
@settings(max_examples=30, deadline=None)
def test_an_inlined_graph_is_the_graph(graph: Graph) -> None:
    b = GraphBuilder()
    outputs = b.inline(graph, *(b.input(f"in/{name}", shape) for name, shape in graph.inputs), prefix="block")
    copy = b.build(*outputs)
    assert copy.key == graph.key
    assert [n.name for n in copy.nodes] == [f"block/{n.name}" for n in graph.nodes]


def test_deep_graphs_need_no_recursion() -> None:
    g = Grow((1, 4))
    x = g.inputs[0]
    for _ in range(3000):
        x = g(ops.ReLU(), x)
    graph = g.builder.build(x)
    assert len(graph.nodes) == 3000
    assert graph.signature.count("ReLU()") == 3000
