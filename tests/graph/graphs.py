"""Shared by the tests of this folder: operators with an independent truth, sample networks, random graphs, runners."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from latbench.graph import ops
from latbench.graph.ir import Graph, GraphBuilder, Weights
from latbench.graph.onnx import to_onnx
from latbench.graph.ops import Op, Shape
from latbench.graph.torch import to_module

Array = NDArray[Any]
Case = tuple[Op, tuple[Shape, ...], Callable[..., Tensor]]  # the last takes the inputs and the weights by role

X: Shape = (2, 8, 9, 11)


def _conv(**settings: Any) -> Callable[..., Tensor]:
    return lambda x, weight, bias=None: F.conv2d(x, weight, bias, **settings)


def _transposed(**settings: Any) -> Callable[..., Tensor]:
    return lambda x, weight, bias=None: F.conv_transpose2d(x, weight, bias, **settings)


def _norm(eps: float) -> Callable[..., Tensor]:
    def reference(x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
        mean, var, gamma, beta = (
            t.reshape(1, -1, *[1] * (x.ndim - 2)) for t in (running_mean, running_var, weight, bias)
        )
        return (x - mean) / (var + eps).sqrt() * gamma + beta

    return reference


def _max_pool(k: Any, s: Any, p: Any) -> Callable[..., Tensor]:
    return lambda x: F.max_pool2d(x, k, s, p)


def _avg_pool(k: Any, s: Any, p: Any, count: bool) -> Callable[..., Tensor]:
    return lambda x: F.avg_pool2d(x, k, s, p, count_include_pad=count)


def _shuffle(g: int) -> Callable[..., Tensor]:
    # channel j of the output is channel (j mod g) * (c / g) + j div g of the input
    return lambda x: x[:, [(j % g) * (x.shape[1] // g) + j // g for j in range(x.shape[1])]]


# Every operator, with attributes at their defaults and away from them.
CASES: list[Case] = [
    (ops.Conv2d(8, 6), (X,), _conv()),
    (ops.Conv2d(8, 6, bias=True), (X,), _conv()),
    (ops.Conv2d(8, 6, 3, 2, 1), (X,), _conv(stride=2, padding=1)),
    (ops.Conv2d(8, 6, (3, 5), (2, 1), (1, 2)), (X,), _conv(stride=(2, 1), padding=(1, 2))),
    (ops.Conv2d(8, 6, (1, 3), padding=(0, 2), dilation=(1, 2)), (X,), _conv(padding=(0, 2), dilation=(1, 2))),
    (ops.Conv2d(8, 4, 3, padding=2, dilation=2, groups=4, bias=True), (X,), _conv(padding=2, dilation=2, groups=4)),
    (ops.Conv2d(8, 8, 5, 2, 2, groups=8), (X,), _conv(stride=2, padding=2, groups=8)),
    (ops.Conv2d(8, 16, 3, groups=8), (X,), _conv(groups=8)),
    (ops.ConvTranspose2d(8, 6), (X,), _transposed()),
    (ops.ConvTranspose2d(8, 6, 3, 2, 1, 1, bias=True), (X,), _transposed(stride=2, padding=1, output_padding=1)),
    (
        ops.ConvTranspose2d(8, 4, (2, 4), (2, 3), (0, 1), (1, 2), groups=2),
        (X,),
        _transposed(stride=(2, 3), padding=(0, 1), output_padding=(1, 2), groups=2),
    ),
    (ops.ConvTranspose2d(8, 8, 4, 2, 1, groups=8, bias=True), (X,), _transposed(stride=2, padding=1, groups=8)),
    (ops.BatchNorm2d(8), (X,), _norm(1e-5)),
    (ops.BatchNorm2d(8, 0.1), (X,), _norm(0.1)),
    (ops.BatchNorm2d(8, 1e-3), ((3, 8),), _norm(1e-3)),
    (ops.Linear(8, 5), ((3, 8),), lambda x, weight, bias: x @ weight.T + bias),
    (ops.Linear(8, 5, False), ((3, 8),), lambda x, weight: x @ weight.T),
    (ops.ReLU(), (X,), lambda x: x.clamp(min=0)),
    (ops.ReLU6(), (X,), lambda x: x.clamp(0, 6)),
    (ops.Sigmoid(), (X,), lambda x: 1 / (1 + torch.exp(-x))),
    (ops.Hardsigmoid(), (X,), lambda x: (x + 3).clamp(0, 6) / 6),
    (ops.Hardswish(), (X,), lambda x: x * (x + 3).clamp(0, 6) / 6),
    (ops.SiLU(), (X,), lambda x: x / (1 + torch.exp(-x))),
    (ops.Identity(), (X,), lambda x: x),
    (ops.Zero(), (X,), torch.zeros_like),
    (ops.Zero(2), (X,), lambda x: torch.zeros(2, 8, 5, 6)),
    (ops.Zero(3), (X,), lambda x: torch.zeros(2, 8, 3, 4)),
    (ops.MaxPool2d(2, 2), (X,), _max_pool(2, 2, 0)),
    (ops.MaxPool2d((3, 2), (2, 1), (1, 0)), (X,), _max_pool((3, 2), (2, 1), (1, 0))),
    (ops.AvgPool2d(2, 2), (X,), _avg_pool(2, 2, 0, False)),
    (ops.AvgPool2d(3, 1, 1), (X,), _avg_pool(3, 1, 1, False)),
    (ops.AvgPool2d(3, 2, 1, True), (X,), _avg_pool(3, 2, 1, True)),
    (ops.AvgPool2d((2, 3), (1, 2), (0, 1)), (X,), _avg_pool((2, 3), (1, 2), (0, 1), False)),
    (ops.AdaptiveAvgPool2d(), (X,), lambda x: x.mean((2, 3), keepdim=True)),
    (ops.Flatten(), (X,), lambda x: x.reshape(2, 792)),
    (ops.Flatten(), ((2, 8),), lambda x: x),
    (ops.Add(), (X, X), lambda a, b: a + b),
    (ops.Add(), (X, X, X, X), lambda a, b, c, d: a + b + c + d),
    (ops.Mul(), (X, X), lambda a, b: a * b),
    (ops.Mul(), (X, (2, 8, 1, 1)), lambda a, b: a * b),
    (ops.Concat(), (X, (2, 3, 9, 11), X), lambda *xs: torch.cat(xs, 1)),
    (ops.Concat(), ((2, 8), (2, 3)), lambda *xs: torch.cat(xs, 1)),
    (ops.ChannelShuffle(2), (X,), _shuffle(2)),
    (ops.ChannelShuffle(4), (X,), _shuffle(4)),
    (ops.Crop(), (X,), lambda x: x[:, :, 1:, 1:]),
    (ops.Crop(0, 3), (X,), lambda x: x[:, :, :, 3:]),
]


def case_id(case: Case) -> str:
    op, shapes, _ = case
    return f"{op}-{len(shapes)}x{'x'.join(map(str, shapes[0]))}"


def single(op: Op, *shapes: Shape) -> Graph:
    """The graph of one node, ``op``, on inputs ``x0``, ``x1``, ..."""
    b = GraphBuilder()
    return b.build(b.add(op, *(b.input(f"x{i}", shape) for i, shape in enumerate(shapes)), name="op"))


class Grow:
    """Adds nodes named by their count and type: the tests here read structure, not names."""

    def __init__(self, *shapes: Shape) -> None:
        self.builder = GraphBuilder()
        self.inputs = tuple(self.builder.input(f"x{i}", shape) for i, shape in enumerate(shapes))
        self._count = 0

    def __call__(self, op: Op, *inputs: str) -> str:
        self._count += 1
        return self.builder.add(op, *inputs, name=f"stage/{self._count}_{type(op).__name__.lower()}")


def conv_bn(g: Grow, x: str, out: int, k: int = 1, stride: int = 1, groups: int = 1, act: Op | None = None) -> str:
    x = g(ops.Conv2d(g.builder.shape(x)[1], out, k, stride, k // 2, groups=groups), x)
    x = g(ops.BatchNorm2d(out), x)
    return x if act is None else g(act, x)


def mobile_network() -> Graph:
    """Stem, inverted residuals with squeeze-and-excitation, classifier."""
    g = Grow((2, 3, 17, 15))
    x = conv_bn(g, g.inputs[0], 8, 3, 2, act=ops.Hardswish())
    for stride, act in ((1, ops.ReLU6()), (2, ops.SiLU()), (1, ops.Hardswish())):
        y = conv_bn(g, x, 24, act=act)
        y = conv_bn(g, y, 24, 3, stride, groups=24, act=act)
        s = g(ops.Conv2d(24, 4, bias=True), g(ops.AdaptiveAvgPool2d(), y))
        s = g(ops.Hardsigmoid(), g(ops.Conv2d(4, 24, bias=True), g(ops.ReLU(), s)))
        y = conv_bn(g, g(ops.Mul(), y, s), 8)
        x = g(ops.Add(), y, x) if stride == 1 else y
    x = g(ops.Flatten(), g(ops.AdaptiveAvgPool2d(), x))
    x = g(ops.ReLU(), g(ops.BatchNorm2d(12), g(ops.Linear(8, 12), x)))
    return g.builder.build(g(ops.Linear(12, 10), x))


def cell_network() -> Graph:
    """A DARTS-like cell of two inputs with a factorised reduction, BN before convolution, two outputs."""
    g = Grow((1, 8, 8, 8), (1, 8, 8, 8))
    a, b = g.inputs
    r = g(ops.ReLU(), a)
    left, right = g(ops.Conv2d(8, 4, 1, 2), r), g(ops.Conv2d(8, 4, 1, 2), g(ops.Crop(), r))
    a = g(ops.BatchNorm2d(8), g(ops.Concat(), left, right))
    b = g(ops.Conv2d(8, 8, 3, 2, 1), g(ops.ReLU(), g(ops.BatchNorm2d(8), b)))
    pooled = g(ops.BatchNorm2d(8), g(ops.AvgPool2d(3, 1, 1), a))
    total = g(ops.Add(), pooled, b, g(ops.MaxPool2d(3, 1, 1), a), g(ops.Zero(), b))
    return g.builder.build(g(ops.Concat(), total, a), g(ops.ChannelShuffle(2), b))


def decoder_network() -> Graph:
    """Transposed convolutions, plain, grouped and depthwise, each with its BN, around a skip."""
    g = Grow((1, 8, 5, 6))
    (x,) = g.inputs
    x = g(ops.ReLU(), g(ops.BatchNorm2d(12), g(ops.ConvTranspose2d(8, 12, 3, 2, 1, 1), x)))
    y = g(ops.BatchNorm2d(12), g(ops.ConvTranspose2d(12, 12, 3, 1, 1, groups=3, bias=True), x))
    z = g(ops.BatchNorm2d(12), g(ops.ConvTranspose2d(12, 12, 3, 1, 1, groups=12), x))
    return g.builder.build(g(ops.Add(), x, y, z))


NETWORKS = [mobile_network, cell_network, decoder_network]


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Graphs of up to two inputs and a dozen nodes; every loose end is an output."""
    g = Grow(*[(1, 4, 5, 6)] * draw(st.integers(1, 2)))
    values, used = list(g.inputs), set[str]()
    for _ in range(draw(st.integers(1, 12))):
        x = draw(st.sampled_from(values))
        peers = [v for v in values if g.builder.shape(v) == g.builder.shape(x)]
        c = g.builder.shape(x)[1]
        op = draw(
            st.sampled_from(
                [
                    ops.BatchNorm2d(c),
                    ops.BatchNorm2d(c, 1e-3),
                    ops.Conv2d(c, 4, 3, padding=1),
                    ops.Conv2d(c, 2 * c, (1, 3), padding=(0, 1), groups=2, bias=True),
                    ops.Conv2d(c, c, 3, padding=1, groups=c),
                    ops.ConvTranspose2d(c, 4, 3, padding=1, groups=2),
                    ops.ReLU6(),
                    ops.AvgPool2d(3, 1, 1),
                    ops.Add(),
                    ops.Concat(),
                ]
            )
        )
        inputs = [x, draw(st.sampled_from(peers))] if isinstance(op, (ops.Add, ops.Concat)) else [x]
        used.update(inputs)
        values.append(g(op, *inputs))
    loose = [v for v in values if v not in used and v not in g.inputs]
    return g.builder.build(*loose)


def draw_inputs(graph: Graph, seed: int = 0, scale: float = 3.0) -> list[Array]:
    """Normals wide enough to reach both ends of every activation."""
    rng = np.random.default_rng(seed)
    return [(scale * rng.standard_normal(shape)).astype(graph.dtype) for _, shape in graph.inputs]


def run_onnx(graph: Graph, weights: Weights, inputs: list[Array]) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(to_onnx(graph, weights), options, providers=["CPUExecutionProvider"])
    feeds = dict(zip((name for name, _ in graph.inputs), inputs, strict=True))
    results: list[Array] = session.run(list(graph.outputs), feeds)
    return results


def run_torch(graph: Graph, weights: Weights, inputs: list[Array]) -> list[Array]:
    with torch.no_grad():
        result = to_module(graph, weights)(*map(torch.from_numpy, inputs))
    return [t.numpy() for t in (result if isinstance(result, tuple) else (result,))]


RUNNERS: Mapping[str, Callable[[Graph, Weights, list[Array]], list[Array]]] = {"onnx": run_onnx, "torch": run_torch}


def relative_error(got: list[Array], want: list[Array]) -> float:
    """Largest over the outputs of max |got - want| / max |want|."""
    assert [g.shape for g in got] == [w.shape for w in want]
    return max(
        float(np.abs(g.astype(np.float64) - w).max() / max(np.abs(w.astype(np.float64)).max(), 1e-30))
        for g, w in zip(got, want, strict=True)
    )
