"""Weights, batch-norm folding and composition."""

from __future__ import annotations

import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from graphs import (
    NETWORKS,
    RUNNERS,
    Array,
    Grow,
    conv_bn,
    draw_inputs,
    graphs,
    relative_error,
    run_onnx,
    run_torch,
    single,
)
from hypothesis import given, settings

from latbench.errors import GraphError
from latbench.graph import ops
from latbench.graph.ir import DType, Graph, GraphBuilder
from latbench.graph.ops import Op, Shape
from latbench.graph.passes import FoldReport, as_dtype, chain, fold_batch_norm, fold_structure, random_weights, union

networks = pytest.mark.parametrize("network", NETWORKS)

# ---- weights ----------------------------------------------------------------------------------------------------


@networks
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_random_weights_are_those_the_graph_wants(network: Callable[[], Graph], dtype: DType) -> None:
    graph = as_dtype(network(), dtype)
    weights = random_weights(graph)
    assert {name: w.shape for name, w in weights.items()} == graph.weight_shapes()
    assert all(w.dtype == dtype and np.isfinite(w).all() and np.ptp(w) > 0 for w in weights.values())
    assert all(w.min() >= 0.5 and w.max() <= 2 for name, w in weights.items() if name.endswith(".running_var"))


def test_random_weights_are_the_same_in_every_process() -> None:
    program = (
        "import zlib; from latbench.graph.ir import GraphBuilder; from latbench.graph.ops import Conv2d; "
        "from latbench.graph.passes import random_weights; b = GraphBuilder(); "
        "g = b.build(b.add(Conv2d(8, 16, 3), b.input('x0', (1, 8, 4, 4)), name='op')); "
        "print(zlib.crc32(random_weights(g, 7)['op.weight'].tobytes()))"
    )
    here = zlib.crc32(random_weights(single(ops.Conv2d(8, 16, 3), (1, 8, 4, 4)), 7)["op.weight"].tobytes())
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert int(there) == here


def test_random_weights_differ_by_name_and_by_seed() -> None:
    g = Grow((1, 8, 4, 4))
    graph = g.builder.build(g(ops.Conv2d(8, 8), g(ops.Conv2d(8, 8), g.inputs[0])))
    first, second = random_weights(graph).values()
    other, _ = random_weights(graph, seed=1).values()
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_weights_larger_than_the_buffer_are_normal() -> None:
    weight = random_weights(single(ops.Linear(1500, 1000, False), (1, 1500)))["op.weight"]
    assert weight.mean() == pytest.approx(0, abs=3e-3 * 1500**-0.5)
    assert weight.std() == pytest.approx(1500**-0.5, rel=1e-2)
    assert len(np.unique(weight, axis=0)) == 1000  # the buffer's period is no multiple of a row


def _plain(g: Grow, x: str) -> str:
    return conv_bn(g, x, 32, 3, act=ops.ReLU())


def _residual(g: Grow, x: str) -> str:
    y = conv_bn(g, conv_bn(g, x, 96, act=ops.ReLU6()), 96, 3, groups=96, act=ops.ReLU6())
    return g(ops.Add(), conv_bn(g, y, 32), x)


def _bottleneck(g: Grow, x: str) -> str:
    y = conv_bn(g, conv_bn(g, x, 96, act=ops.Hardswish()), 96, 3, groups=96, act=ops.Hardswish())
    return conv_bn(g, y, 32)


@pytest.mark.parametrize("block", [_plain, _residual, _bottleneck])
@pytest.mark.parametrize("fold", [False, True], ids=["plain", "folded"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_activations_of_deep_networks_stay_of_order_one(
    block: Callable[[Grow, str], str], fold: bool, dtype: DType
) -> None:
    g = Grow((1, 32, 7, 7))
    x = g.inputs[0]
    for _ in range(40):
        x = block(g, x)
    graph = as_dtype(g.builder.build(x), dtype)
    graph = fold_structure(graph) if fold else graph
    (y,) = run_onnx(graph, random_weights(graph), draw_inputs(graph, scale=1))
    assert 0.01 < np.sqrt(np.mean(np.square(y, dtype=np.float64))) < 100


# ---- batch-norm folding -----------------------------------------------------------------------------------------

MAP: Shape = (2, 8, 7, 5)
FOLDABLE: list[tuple[Op, Shape]] = [
    (ops.Conv2d(8, 6, 3, padding=1), MAP),
    (ops.Conv2d(8, 6, (1, 3), (2, 1), bias=True), MAP),
    (ops.Conv2d(8, 8, 3, padding=1, groups=8), MAP),
    (ops.Conv2d(8, 12, 3, groups=4, bias=True), MAP),
    (ops.ConvTranspose2d(8, 6, 3, 2, 1, 1), MAP),
    (ops.ConvTranspose2d(8, 6, 3, 2, groups=2, bias=True), MAP),
    (ops.ConvTranspose2d(8, 8, 4, 2, 1, groups=8), MAP),
    (ops.Linear(8, 6), (3, 8)),
    (ops.Linear(8, 6, bias=False), (3, 8)),
]


def _assert_folds_exactly(graph: Graph) -> FoldReport:
    weights, inputs = random_weights(graph), draw_inputs(graph)
    folded, new_weights, report = fold_batch_norm(graph, weights)
    assert folded == fold_structure(graph)
    for run in RUNNERS.values():
        assert relative_error(run(folded, new_weights, inputs), run(graph, weights, inputs)) < 1e-5
    norms = {n.name for n in graph.nodes if isinstance(n.op, ops.BatchNorm2d)}
    assert {name for name, _ in report.folded} | {name for name, _ in report.kept} == norms
    assert {n.name for n in folded.nodes} == {n.name for n in graph.nodes} - {name for name, _ in report.folded}
    return report


@pytest.mark.parametrize(("op", "shape"), FOLDABLE, ids=lambda v: str(v) if isinstance(v, Op) else "")
def test_batch_norm_folds_into(op: Op, shape: Shape) -> None:
    b = GraphBuilder()
    x = b.add(op, b.input("x", shape), name="layer")
    x = b.add(ops.BatchNorm2d(b.shape(x)[1], 1e-3), x, name="bn")
    report = _assert_folds_exactly(b.build(b.add(ops.ReLU(), x, name="relu")))
    assert report == FoldReport((("bn", "layer"),), ())


def test_two_batch_norms_in_a_row_both_fold() -> None:
    b = GraphBuilder()
    x = b.add(ops.Conv2d(8, 6, 3, groups=2), b.input("x", MAP), name="conv")
    x = b.add(ops.BatchNorm2d(6), x, name="bn1")
    graph = b.build(b.add(ops.BatchNorm2d(6), x, name="bn2"))
    assert _assert_folds_exactly(graph).folded == (("bn1", "conv"), ("bn2", "conv"))
    assert fold_structure(graph).outputs == ("conv",)


@pytest.mark.parametrize(
    "op", [ops.ReLU(), ops.MaxPool2d(2, 2), ops.AvgPool2d(2, 2), ops.Identity(), ops.ChannelShuffle(2)], ids=str
)
def test_batch_norm_behind_anything_else_is_kept(op: Op) -> None:
    b = GraphBuilder()
    x = b.add(op, b.input("x", MAP), name="before")
    x = b.add(ops.BatchNorm2d(8), x, name="bn")
    graph = b.build(b.add(ops.Conv2d(8, 8, 3, padding=1), x, name="after"))  # padding: folding forward would be wrong
    ((name, why),) = _assert_folds_exactly(graph).kept
    assert name == "bn"
    assert why == f"follows before ({type(op).__name__}), which has no weights to scale"
    assert fold_structure(graph) == graph


def test_batch_norm_on_an_input_is_kept() -> None:
    report = _assert_folds_exactly(single(ops.BatchNorm2d(8), MAP))
    assert report.kept == (("op", "normalises the graph input x0"),)


def _shared(*, as_output: bool, after_norm: bool) -> Graph:
    """conv -> bn (-> bn2), where the tensor before the last batch norm is used a second time."""
    b = GraphBuilder()
    x = b.add(ops.Conv2d(8, 8), b.input("x", MAP), name="conv")
    if after_norm:
        x = b.add(ops.BatchNorm2d(8), x, name="bn")
    y = b.add(ops.BatchNorm2d(8), x, name="last")
    return b.build(y, x) if as_output else b.build(b.add(ops.Add(), y, b.add(ops.ReLU(), x, name="relu"), name="add"))


@pytest.mark.parametrize(
    ("as_output", "why"), [(False, "is also used by relu"), (True, "is also an output of the graph")]
)
def test_what_is_used_unnormalised_is_not_folded(as_output: bool, why: str) -> None:
    report = _assert_folds_exactly(_shared(as_output=as_output, after_norm=False))
    assert report == FoldReport((), (("last", f"output of conv {why}"),))


@pytest.mark.parametrize(
    ("as_output", "why"), [(False, "is also used by relu"), (True, "is also an output of the graph")]
)
def test_of_two_batch_norms_only_the_first_folds_where_it_is_shared(as_output: bool, why: str) -> None:
    report = _assert_folds_exactly(_shared(as_output=as_output, after_norm=True))
    assert report == FoldReport((("bn", "conv"),), (("last", f"output of bn {why}"),))


def test_two_batch_norms_on_one_convolution_are_kept() -> None:
    b = GraphBuilder()
    x = b.add(ops.Conv2d(8, 8), b.input("x", MAP), name="conv")
    left, right = (b.add(ops.BatchNorm2d(8, eps), x, name=f"bn{eps}".replace(".", "_")) for eps in (0.1, 0.2))
    report = _assert_folds_exactly(b.build(b.add(ops.Add(), left, right, name="add")))
    assert [why for _, why in report.kept] == [f"output of conv is also used by {n}" for n in (right, left)]


@pytest.mark.parametrize(
    ("network", "n_folded", "n_kept"), [(NETWORKS[0], 11, 0), (NETWORKS[1], 0, 3), (NETWORKS[2], 3, 0)]
)
def test_folding_networks_is_exact_and_leaves_nothing_more_to_fold(
    network: Callable[[], Graph], n_folded: int, n_kept: int
) -> None:
    graph = network()
    report = _assert_folds_exactly(graph)
    assert (len(report.folded), len(report.kept)) == (n_folded, n_kept)
    assert fold_structure(fold_structure(graph)) == fold_structure(graph)


@given(graph=graphs())
@settings(max_examples=40, deadline=None)
def test_folding_any_graph_is_exact(graph: Graph) -> None:
    _assert_folds_exactly(graph)


@networks
def test_folding_leaves_the_weights_it_was_given(network: Callable[[], Graph]) -> None:
    graph = network()
    weights = random_weights(graph)
    fold_batch_norm(graph, weights)
    assert all(np.array_equal(weights[name], w) for name, w in random_weights(graph).items())


def test_folding_float16_gives_float16() -> None:
    graph = as_dtype(NETWORKS[0](), "float16")
    folded, weights, _ = fold_batch_norm(graph, random_weights(graph))
    assert folded.dtype == "float16"
    assert {w.dtype for w in weights.values()} == {np.dtype(np.float16)}


# ---- composition ------------------------------------------------------------------------------------------------


def _under(name: str, graph: Graph) -> dict[str, Array]:
    return {f"{name}/{k}": w for k, w in random_weights(graph).items()}


def test_a_chain_computes_one_graph_after_the_other() -> None:
    first = single(ops.Conv2d(8, 4, 3), MAP)
    second = single(ops.ConvTranspose2d(4, 2, 3), first.shapes["op"])
    graph = chain([first, second], ["a", "b"])
    inputs = draw_inputs(graph)
    want = run_torch(second, random_weights(second), run_torch(first, random_weights(first), inputs))
    assert relative_error(run_onnx(graph, {**_under("a", first), **_under("b", second)}, inputs), want) < 1e-5
    assert graph.inputs == (("a/x0", MAP),)
    assert [n.name for n in graph.nodes] == ["a/op", "b/op"]
    assert graph.macs == first.macs + second.macs


def test_a_union_computes_both_side_by_side() -> None:
    a, b = single(ops.Add(), MAP, MAP), single(ops.Linear(8, 4), (1, 8))
    graph = union([a, b], ["a", "b"])
    inputs = draw_inputs(graph)
    want = [*run_torch(a, {}, inputs[:2]), *run_torch(b, random_weights(b), inputs[2:])]
    assert relative_error(run_onnx(graph, _under("b", b), inputs), want) < 1e-5
    assert [name for name, _ in graph.inputs] == ["a/x0", "a/x1", "b/x0"]
    assert graph.outputs == ("a/op", "b/op")


def test_a_chain_or_union_of_one_is_that_graph() -> None:
    graph = NETWORKS[1]()
    assert chain([graph], ["a"]).key == union([graph], ["a"]).key == graph.key


def test_graphs_that_do_not_fit_are_refused() -> None:
    relu, add = single(ops.ReLU(), MAP), single(ops.Add(), MAP, MAP)
    with pytest.raises(GraphError, match=r"b takes 2 input\(s\), the graph before it gives 1"):
        chain([relu, add], ["a", "b"])
    with pytest.raises(GraphError, match=r"b: input x0 is \(1, 8\), bound to \(2, 8, 7, 5\)"):
        chain([relu, single(ops.ReLU(), (1, 8))], ["a", "b"])
    for compose in (chain, union):
        with pytest.raises(GraphError, match=r"2 graph\(s\) need as many distinct names, got \['a', 'a'\]"):
            compose([relu, relu], ["a", "a"])
        with pytest.raises(GraphError, match="graphs of different dtypes: float16, float32"):
            compose([relu, as_dtype(relu, "float16")], ["a", "b"])


def test_as_dtype_changes_the_dtype_only() -> None:
    graph = NETWORKS[0]()
    half = as_dtype(graph, "float16")
    assert half == replace(graph, dtype="float16")
    assert half.key != graph.key
    assert as_dtype(half, "float32").key == graph.key
