"""Sandwiches and stubs: the sum over a chain telescopes, by the roofline, where a latency is a sum of kernels."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from latbench.backends.roofline import OPTIONS, kernels
from latbench.graph.context import THIN, borders, sandwich, stub
from latbench.graph.ir import Graph, GraphBuilder
from latbench.graph.ops import Add, Concat, Conv2d, Linear, ReLU
from latbench.graph.passes import fold_structure
from latbench.spaces.mobilenet_v1 import MobileNetV1Space

ROOFLINE = {name: float(value) for name, value in OPTIONS.items()}
SPACE = MobileNetV1Space(resolution=64, num_classes=10)


def latency_ms(graph: Graph, *, fold: bool) -> float:
    graph = fold_structure(graph) if fold else graph
    return ROOFLINE["call_us"] / 1e3 + sum(layer.ms for layer in kernels(graph, ROOFLINE))


def increments_ms(blocks: list[Graph], *, fold: bool) -> list[float]:
    """A chain's blocks, each in its sandwich, less half of its stubs."""
    found = []
    for i, block in enumerate(blocks):
        edges = {"first": i == 0, "last": i == len(blocks) - 1}
        stubs_ms = sum(latency_ms(stub(shape, block.dtype), fold=fold) for shape in borders(block, **edges))
        found.append(latency_ms(sandwich(block, **edges), fold=fold) - stubs_ms / 2)
    return found


@pytest.mark.parametrize("fold", [True, False])
def test_increments_of_a_chain_sum_to_the_network(fold: bool) -> None:
    rng = np.random.default_rng(0)
    for arch in [SPACE.sample(rng) for _ in range(10)]:
        total_ms = latency_ms(SPACE.network(arch), fold=fold)
        assert sum(increments_ms(list(SPACE.blocks(arch)), fold=fold)) == pytest.approx(total_ms, rel=1e-9)


def test_neighbours_share_the_stub_between_them() -> None:
    blocks = list(SPACE.blocks(SPACE.sample(np.random.default_rng(1))))
    for before, after in pairwise(blocks):
        (_, behind) = borders(before) if before is not blocks[0] else (None, *borders(before, first=True))
        assert behind == borders(after, last=True)[0]


def two_inputs(left: tuple[int, ...], right: tuple[int, ...]) -> Graph:
    b = GraphBuilder()
    x, y = b.input("x", left), b.input("y", right)
    joined = b.add(Add() if left == right else Concat(), x, y, name="join")
    return b.build(b.add(ReLU(), joined, name="relu"))


def test_inputs_of_one_shape_share_a_thin_convolution() -> None:
    same = two_inputs((1, 32, 8, 8), (1, 32, 8, 8))
    assert borders(same) == ((1, 32, 8, 8), (1, 32, 8, 8))  # before, behind
    around = sandwich(same)
    assert [shape for _, shape in around.inputs] == [(1, THIN, 8, 8)]
    assert sum(isinstance(node.op, Conv2d) for node in around.nodes) == 2


def test_inputs_of_different_shapes_have_one_each() -> None:
    block = two_inputs((1, 32, 8, 8), (1, 48, 8, 8))
    assert borders(block) == ((1, 32, 8, 8), (1, 48, 8, 8), (1, 80, 8, 8))
    around = sandwich(block)
    assert len(around.inputs) == 2
    assert sum(isinstance(node.op, Conv2d) for node in around.nodes) == 3


def test_a_block_keeps_its_nodes_between_thin_borders() -> None:
    block = two_inputs((1, 32, 8, 8), (1, 32, 8, 8))
    ops = [node.op for node in block.nodes]
    for first, last in [(False, False), (True, False), (False, True), (True, True)]:
        around = sandwich(block, first=first, last=last)
        assert [node.op for node in around.nodes if node.name.startswith("block/")] == ops
        assert len(borders(block, first=first, last=last)) == (not first) + (not last)
        assert (around.key == block.key) == (first and last)


def test_a_stub_is_the_two_thin_convolutions_that_meet() -> None:
    image, vector = stub((2, 40, 7, 7), "float32"), stub((2, 40), "float16")
    assert [type(node.op) for node in image.nodes] == [Conv2d, ReLU, Conv2d]
    assert image.macs == 2 * 7 * 7 * 2 * THIN * 40
    assert [type(node.op) for node in vector.nodes] == [Linear, Linear]
    assert (image.dtype, vector.dtype) == ("float32", "float16")
    for graph in (image, vector):
        (_, given), result = graph.inputs[0], graph.shapes[graph.outputs[0]]
        assert given == result
