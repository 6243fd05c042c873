"""Blocks against torchvision's own modules, plain torch, and the parameter counts that papers' code gives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.efficientnet import MBConv, MBConvConfig
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import Bottleneck
from torchvision.ops import SqueezeExcitation

from latbench.errors import GraphError
from latbench.graph import blocks, ops
from latbench.graph.ir import Graph, GraphBuilder
from latbench.graph.passes import random_weights
from latbench.graph.torch import to_module

Grow = Callable[[GraphBuilder, str], str]


def build(grow: Grow, channels: int = 8, side: int = 6) -> Graph:
    b = GraphBuilder()
    return b.build(grow(b, b.input("x", (2, channels, side, side))))


def assert_computes(graph: Graph, reference: nn.Module) -> None:
    """`reference`, given the graph's weights in state_dict order, gives the graph's outputs."""
    weights = random_weights(graph, seed=3)
    state = reference.state_dict()
    names = [name for name in state if not name.endswith("num_batches_tracked")]
    assert [tuple(state[name].shape) for name in names] == list(graph.weight_shapes().values())
    reference.load_state_dict({n: torch.from_numpy(w) for n, w in zip(names, weights.values(), strict=True)}, False)
    (shape,) = (shape for _, shape in graph.inputs)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal(shape, np.float32))
    with torch.inference_mode():
        want = reference.eval()(x).numpy()
        got = to_module(graph, weights)(x).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    assert graph.n_params == sum(p.numel() for p in reference.parameters())


def conv_bn(
    c: int, out: int, k: int = 1, *, s: int = 1, groups: int = 1, act: type[nn.Module] | None = nn.ReLU
) -> list[nn.Module]:
    return [nn.Conv2d(c, out, k, s, k // 2, groups=groups, bias=False), nn.BatchNorm2d(out), *([act()] if act else [])]


@pytest.mark.parametrize(("kernel", "stride", "act"), [(3, 1, "ReLU"), (5, 2, "ReLU6"), (1, 1, "Hardswish")])
def test_conv_bn_act_is_a_sequential(kernel: int, stride: int, act: str) -> None:
    activation = getattr(ops, act)()
    graph = build(lambda b, x: blocks.conv_bn_act(b, x, 12, kernel, stride=stride, activation=activation, name="c"))
    assert_computes(graph, nn.Sequential(*conv_bn(8, 12, kernel, s=stride, act=getattr(nn, act))))


@pytest.mark.parametrize("stride", [1, 2])
def test_separable_conv_is_depthwise_then_pointwise(stride: int) -> None:
    graph = build(lambda b, x: blocks.separable_conv(b, x, 16, stride=stride, name="s"))
    assert_computes(graph, nn.Sequential(*conv_bn(8, 8, 3, s=stride, groups=8), *conv_bn(8, 16)))
    assert graph.macs == 2 * (6 // stride) ** 2 * (9 * 8 + 8 * 16)


@pytest.mark.parametrize(("stride", "out", "expand_ratio"), [(1, 8, 6), (2, 8, 3), (1, 12, 6), (1, 8, 1)])
def test_inverted_residual_is_mobilenet_v2s(stride: int, out: int, expand_ratio: int) -> None:
    grow = partial(blocks.inverted_residual, stride=stride, expand=expand_ratio > 1, name="ir")
    graph = build(lambda b, x: grow(b, x, 8 * expand_ratio, out))
    assert_computes(graph, InvertedResidual(8, out, stride, expand_ratio))


@pytest.mark.parametrize(("kernel", "stride", "out"), [(3, 1, 8), (5, 2, 16)])
def test_inverted_residual_with_squeeze_is_efficientnets(kernel: int, stride: int, out: int) -> None:
    graph = build(
        lambda b, x: blocks.inverted_residual(
            b, x, 32, out, kernel_size=kernel, stride=stride, squeeze_channels=2, activation=ops.SiLU(), name="mb"
        )
    )
    assert_computes(graph, MBConv(MBConvConfig(4, kernel, stride, 8, out, 1), 0.0, nn.BatchNorm2d))


def test_squeeze_excite_is_torchvisions() -> None:
    graph = build(lambda b, x: blocks.squeeze_excite(b, x, 4, gate=ops.Hardsigmoid(), name="se"))
    assert_computes(graph, SqueezeExcitation(8, 4, scale_activation=nn.Hardsigmoid))


def test_residual_is_added_only_where_asked_and_possible() -> None:
    def adds(**options: Any) -> int:
        graph = build(lambda b, x: blocks.inverted_residual(b, x, 16, options.pop("out", 8), name="ir", **options))
        return sum(node.op == ops.Add() for node in graph.nodes)

    assert adds() == 1
    assert adds(residual=False) == adds(stride=2) == adds(out=12) == 0


def test_expansion_is_left_out_only_where_asked() -> None:
    kept = build(lambda b, x: blocks.inverted_residual(b, x, 8, 8, name="ir"))
    left_out = build(lambda b, x: blocks.inverted_residual(b, x, 8, 8, expand=False, name="ir"))
    assert kept.n_params - left_out.n_params == 8 * 8 + 2 * 8
    with pytest.raises(GraphError, match="ir: without expansion hidden_channels must be 8, not 16"):
        build(lambda b, x: blocks.inverted_residual(b, x, 16, 8, expand=False, name="ir"))


@pytest.mark.parametrize(("stride", "out", "groups"), [(1, 8, 1), (2, 16, 1), (1, 16, 2)])
def test_bottleneck_is_torchvisions(stride: int, out: int, groups: int) -> None:
    graph = build(lambda b, x: blocks.bottleneck(b, x, 4, out, stride=stride, groups=groups, name="b"))
    shortcut = None if (stride, out) == (1, 8) else nn.Sequential(*conv_bn(8, out, s=stride, act=None))
    reference = Bottleneck(8, 4, stride, shortcut, groups, base_width=64 // groups)
    if out != 16:  # torchvision's expansion is 4
        reference.conv3, reference.bn3 = nn.Conv2d(4, out, 1, bias=False), nn.BatchNorm2d(out)
    assert_computes(graph, reference)


def test_classifier_is_pool_and_linear() -> None:
    graph = build(lambda b, x: blocks.classifier(b, x, 5, name="head"))
    assert_computes(graph, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)))


def relu_separable(c: int, k: int, s: int = 1, d: int = 1) -> list[nn.Module]:
    depthwise = nn.Conv2d(c, c, k, s, d * (k - 1) // 2, dilation=d, groups=c, bias=False)
    return [nn.ReLU(), depthwise, nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c)]


class FactorizedReduce(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(c, c // 2, 1, 2, bias=False) for _ in range(2))
        self.bn = nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        y: Tensor = self.bn(torch.cat([self.a(x), self.b(x[:, :, 1:, 1:])], 1))
        return y


def darts_reference(op: str, c: int, s: int) -> nn.Module:
    """The definitions of the RelativeNAS table, and DARTS' own for the two operations that it leaves out."""
    kind, _, size = op.rpartition("_")
    k = int(size[0]) if size[0].isdigit() else 0
    if kind == "sep_conv":
        return nn.Sequential(*relu_separable(c, k, s), *relu_separable(c, k))
    if kind == "dil_conv":
        return nn.Sequential(*relu_separable(c, k, s, d=2))
    if op == "max_pool_3x3":
        return nn.MaxPool2d(3, s, 1)
    if op == "avg_pool_3x3":
        return nn.AvgPool2d(3, s, 1, count_include_pad=False)
    if op == "conv_7x1_1x7":
        row = nn.Conv2d(c, c, (1, 7), (1, s), (0, 3), bias=False)
        return nn.Sequential(nn.ReLU(), row, nn.Conv2d(c, c, (7, 1), (s, 1), (3, 0), bias=False), nn.BatchNorm2d(c))
    return FactorizedReduce(c)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("op", blocks.DARTS_OPS)
def test_darts_operations_are_the_definitions(op: str, stride: int) -> None:
    if (op, stride) == ("skip_connect", 1):
        assert blocks.darts_op(GraphBuilder(), op, "x", name="o") == "x"
        return
    assert_computes(
        build(lambda b, x: blocks.darts_op(b, op, x, stride=stride, name="o")), darts_reference(op, 8, stride)
    )


@pytest.mark.parametrize(
    ("op", "n_params"),
    [
        ("skip_connect", lambda c: c * c + 2 * c),
        ("sep_conv_3x3", lambda c: 2 * (9 * c + c * c + 2 * c)),
        ("sep_conv_5x5", lambda c: 2 * (25 * c + c * c + 2 * c)),
        ("dil_conv_3x3", lambda c: 9 * c + c * c + 2 * c),
        ("dil_conv_5x5", lambda c: 25 * c + c * c + 2 * c),
    ],
)
def test_darts_parameters_are_the_tables(op: str, n_params: Callable[[int], int]) -> None:
    for c in (16, 36):
        graph = build(lambda b, x: blocks.darts_op(b, op, x, stride=2, name="o"), channels=c)
        assert graph.n_params == n_params(c)


def test_unknown_darts_operation_is_refused() -> None:
    with pytest.raises(GraphError, match="unknown DARTS operation 'none': max_pool_3x3, "):
        build(lambda b, x: blocks.darts_op(b, "none", x, name="o"))


def test_factorized_reduce_wants_even_maps() -> None:
    with pytest.raises(GraphError, match="concat"):
        build(lambda b, x: blocks.factorized_reduce(b, x, 8, name="fr"), side=7)


def irlas_block(b: GraphBuilder, x: str, c: int) -> str:
    """The published block: concat(conv1 x, conv5 x, conv1 (x + conv3 x)), the sum lifted to x's width."""
    b1 = blocks.irlas_conv(b, x, c, 1, name="op1")
    b2 = blocks.irlas_conv(b, x, c, 3, name="op2")
    if b.shape(x)[1] != c:
        b2 = blocks.conv_bn_act(b, b2, b.shape(x)[1], activation=None, name="op3")
    s = b.add(ops.Add(), x, b2, name="sum")
    b4 = blocks.irlas_conv(b, x, c, 5, name="op4")
    b5 = blocks.irlas_conv(b, s, c, 1, name="op5")
    return b.add(ops.Concat(), b1, b4, b5, name="out")


@pytest.mark.parametrize(("n", "c", "n_params"), [(32, 32, 5_504), (256, 256, 273_408), (768, 256, 1_129_472)])
def test_irlas_layers_make_the_published_block(n: int, c: int, n_params: int) -> None:
    graph = build(lambda b, x: irlas_block(b, x, c), channels=n)
    assert graph.n_params == n_params
    assert graph.shapes[graph.outputs[0]] == (2, 3 * c, 6, 6)


def test_irlas_layer_lifts_with_bias_and_scales_per_channel() -> None:
    lift = [nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)]
    graph = build(lambda b, x: blocks.irlas_conv(b, x, 4, 3, name="c"))
    assert_computes(graph, nn.Sequential(*lift, *relu_separable(4, 3)))
    scale = [nn.ReLU(), nn.Conv2d(8, 8, 1, groups=8, bias=False), nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)]
    assert_computes(build(lambda b, x: blocks.irlas_conv(b, x, 4, 1, name="c")), nn.Sequential(*scale))


def test_empty_name_leaves_nodes_bare() -> None:
    graph = build(lambda b, x: blocks.conv_bn_act(b, x, 4, name=""))
    assert [node.name for node in graph.nodes] == ["conv", "bn", "act"]
