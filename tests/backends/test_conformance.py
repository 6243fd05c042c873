"""Thirty graphs, one truth: every back-end's outputs against the graph computed by torch in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="the truth is computed by it: pip install 'latbench[search]'")

from latbench import plugins  # noqa: E402
from latbench.backends.base import Scalar  # noqa: E402
from latbench.errors import EnvironmentUnfitError  # noqa: E402
from latbench.graph import ops  # noqa: E402
from latbench.graph.blocks import (  # noqa: E402
    bottleneck,
    conv_bn_act,
    darts_op,
    factorized_reduce,
    inverted_residual,
    irlas_conv,
    separable_conv,
    squeeze_excite,
)
from latbench.graph.ir import Graph, GraphBuilder  # noqa: E402
from latbench.graph.onnx import to_onnx  # noqa: E402
from latbench.graph.ops import OPS, Op  # noqa: E402
from latbench.graph.passes import as_dtype, fold_structure, random_weights  # noqa: E402
from latbench.graph.torch import to_module  # noqa: E402
from latbench.spaces.mobilenet_v1 import MobileNetV1Space  # noqa: E402
from latbench.spaces.nasbench201 import NASBench201Space  # noqa: E402

SHAPE = (2, 8, 9, 11)
TOLERANCE = {"float32": 2e-5, "float16": 2e-2}  # largest difference over the largest output


def single(*chain: Op) -> Graph:
    """Operators in a row, behind a convolution that makes of the input what they are given in networks."""
    b = GraphBuilder()
    x = b.add(ops.Conv2d(8, 8, bias=True), b.input("x", SHAPE), name="first")
    for i, op in enumerate(chain):
        x = b.add(op, x, name=f"op{i}")
    return b.build(x)


def joined(op: Op) -> Graph:
    """Two branches and what joins them; the second output is one of them, so that nothing may overwrite it."""
    b = GraphBuilder()
    x = b.input("x", SHAPE)
    left, right = (b.add(ops.Conv2d(8, 8, 3, padding=1, bias=True), x, name=name) for name in ("left", "right"))
    return b.build(b.add(op, left, right, name="joined"), right)


def block(grow: Callable[[GraphBuilder, str], str]) -> Graph:
    b = GraphBuilder()
    return fold_structure(b.build(grow(b, b.input("x", (1, 16, 14, 14)))))


def decoder() -> Graph:
    b = GraphBuilder()
    x = b.add(ops.ConvTranspose2d(8, 6, 3, 2, 1, 1, bias=True), b.input("x", SHAPE), name="up")
    return b.build(b.add(ops.ConvTranspose2d(6, 6, 4, 2, 1, groups=6), b.add(ops.ReLU(), x, name="act"), name="wide"))


def gated() -> Graph:
    b = GraphBuilder()
    x = b.input("x", SHAPE)
    gate = b.add(ops.Hardsigmoid(), b.add(ops.AdaptiveAvgPool2d(), x, name="pool"), name="gate")
    return b.build(b.add(ops.Mul(), x, gate, name="scaled"))


def head() -> Graph:
    b = GraphBuilder()
    x = b.add(ops.Flatten(), b.add(ops.AdaptiveAvgPool2d(), b.input("x", SHAPE), name="pool"), name="flat")
    return b.build(b.add(ops.ReLU(), b.add(ops.Linear(8, 12), x, name="fc"), name="act"))


def unfolded() -> Graph:
    b = GraphBuilder()
    return b.build(inverted_residual(b, b.input("x", (1, 16, 14, 14)), 48, 16, name="mb"))


SPACE, CELLS = MobileNetV1Space(resolution=32), NASBench201Space()

GRAPHS: dict[str, Callable[[], Graph]] = {
    "dense convolution, stride 2": lambda: single(ops.Conv2d(8, 6, 3, 2, 1, bias=True), ops.ReLU()),
    "uneven kernel, stride and padding": lambda: single(ops.Conv2d(8, 6, (3, 5), (2, 1), (1, 2))),
    "dilated and grouped": lambda: single(ops.Conv2d(8, 4, 3, padding=2, dilation=2, groups=4, bias=True)),
    "depthwise 5x5": lambda: single(ops.Conv2d(8, 8, 5, 2, 2, groups=8, bias=True), ops.ReLU6()),
    "depthwise, two filters a channel": lambda: single(ops.Conv2d(8, 16, 3, groups=8)),
    "transposed": decoder,
    "batch norm alone": lambda: single(ops.ReLU(), ops.BatchNorm2d(8, 1e-3)),
    "sigmoid and SiLU": lambda: single(ops.Sigmoid(), ops.SiLU()),
    "hard activations": lambda: single(ops.Hardswish(), ops.Hardsigmoid()),
    "max pool": lambda: single(ops.MaxPool2d((3, 2), (2, 1), (1, 0))),
    "average pool, padding left out": lambda: single(ops.AvgPool2d(3, 2, 1)),
    "average pool, padding counted": lambda: single(ops.AvgPool2d(3, 2, 1, True)),
    "zero and identity": lambda: single(ops.Identity(), ops.Zero(2)),
    "shuffle and crop": lambda: single(ops.ChannelShuffle(4), ops.Crop()),
    "sum": lambda: joined(ops.Add()),
    "product": lambda: joined(ops.Mul()),
    "concatenation": lambda: joined(ops.Concat()),
    "gate": gated,
    "classifier": head,
    "separable": lambda: block(lambda b, x: separable_conv(b, x, 24, stride=2, name="s")),
    "inverted residual": lambda: block(lambda b, x: inverted_residual(b, x, 48, 16, name="mb")),
    "inverted residual, unfolded": unfolded,
    "squeeze and excite": lambda: block(lambda b, x: squeeze_excite(b, x, 4, name="se")),
    "bottleneck": lambda: block(lambda b, x: bottleneck(b, x, 32, 8, stride=2, name="bn")),
    "factorised reduction": lambda: block(lambda b, x: factorized_reduce(b, x, 32, name="fr")),
    "DARTS separable": lambda: block(lambda b, x: darts_op(b, "sep_conv_5x5", x, stride=2, name="d")),
    "IRLAS": lambda: block(lambda b, x: irlas_conv(b, x, 24, 3, name="i")),
    "conv, norm, act, float16": lambda: as_dtype(block(lambda b, x: conv_bn_act(b, x, 32, 3, name="c")), "float16"),
    "MobileNet": lambda: fold_structure(SPACE.network(SPACE.published["narrowest"])),
    "NAS-Bench-201": lambda: fold_structure(CELLS.network(CELLS.published["resnet"])),
}


@lru_cache(maxsize=1)
def truth(title: str) -> tuple[Graph, dict[str, NDArray[Any]], dict[str, NDArray[np.float64]]]:
    """The graph, its inputs, and its outputs computed in float64 from the same weights."""
    graph = GRAPHS[title]()
    rng = np.random.default_rng(0)
    inputs = {name: (2 * rng.standard_normal(shape)).astype(graph.dtype) for name, shape in graph.inputs}
    module = to_module(graph, random_weights(graph)).double()
    with torch.inference_mode():
        result = module(*(torch.from_numpy(array).double() for array in inputs.values()))
    results = result if isinstance(result, tuple) else (result,)
    return graph, inputs, dict(zip(graph.outputs, (t.numpy() for t in results), strict=True))


def backend_of(name: str, **options: Scalar) -> Any:
    try:
        plugin = plugins.load("latbench.backends", name)
        plugin.available()
        backend = plugin({"threads": 1, **options})
        getattr(backend, "open", lambda: None)()
        return backend
    except EnvironmentUnfitError as error:
        pytest.skip(str(error))


def check(backend: Any, title: str, folder: Path, factor: float = 1.0) -> None:
    graph, inputs, want = truth(title)
    path = folder / "model"
    if backend.artifact == "graph":
        path.write_text(graph.to_json())
    else:
        path.write_bytes(to_onnx(graph, random_weights(graph)))
    with backend.load(path) as runner:
        got = runner.outputs(inputs)
        assert runner.sample(1) > 0
    assert set(got) == set(want)
    for name, array in want.items():
        assert got[name].shape == array.shape
        assert got[name].dtype == np.dtype(graph.dtype)
        scale = max(float(np.abs(array).max()), 1e-30)
        assert float(np.abs(got[name] - array).max()) <= factor * TOLERANCE[graph.dtype] * scale


def test_there_are_thirty_and_every_operator_is_among_them() -> None:
    assert len(GRAPHS) == 30
    used = {type(node.op).__name__ for make in GRAPHS.values() for node in make().nodes}
    assert used == set(OPS)
    assert {make().dtype for make in GRAPHS.values()} == {"float32", "float16"}


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "torch"])
@pytest.mark.parametrize("title", GRAPHS)
def test_outputs_are_the_graphs(title: str, name: str, tmp_path: Path) -> None:
    check(backend_of(name), title, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("title", GRAPHS)
def test_outputs_are_the_graphs_when_compiled(title: str, tmp_path: Path) -> None:
    check(backend_of("torch_compile"), title, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tensorrt", {"launch": "graph"}),
        ("tensorrt", {"launch": "eager"}),
        ("torch", {"device": 0}),
        ("torch_compile", {"device": 0, "mode": "reduce-overhead"}),
    ],
)
@pytest.mark.parametrize("title", GRAPHS)
def test_outputs_are_the_graphs_on_a_gpu(title: str, name: str, options: dict[str, Scalar], tmp_path: Path) -> None:
    check(backend_of(name, **options), title, tmp_path, factor=5)
