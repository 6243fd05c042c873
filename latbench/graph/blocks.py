"""Blocks that the literature names, each a function that grows a ``GraphBuilder`` and gives its output's name.

Nodes are named under ``name/``; ``name=""`` leaves them bare. Input channels are read from the input's shape. Padding
keeps the map's size at stride 1; convolutions before a BatchNorm have no bias unless asked. All raise GraphError where
shapes do not fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Protocol

from latbench.errors import GraphError
from latbench.graph.ir import GraphBuilder
from latbench.graph.ops import (
    AdaptiveAvgPool2d,
    Add,
    AvgPool2d,
    BatchNorm2d,
    Concat,
    Conv2d,
    Crop,
    Flatten,
    Linear,
    MaxPool2d,
    Mul,
    Op,
    ReLU,
    ReLU6,
    Sigmoid,
    Size2,
    pair,
)

RELU = ReLU()
RELU6 = ReLU6()
SIGMOID = Sigmoid()


def under(name: str, part: str) -> str:
    """``name/part``, or ``part`` where `name` is empty."""
    return f"{name}/{part}" if name else part


def conv2d(
    b: GraphBuilder,
    x: str,
    out_channels: int,
    kernel_size: Size2 = 1,
    *,
    stride: Size2 = 1,
    dilation: int = 1,
    groups: int = 1,
    bias: bool = False,
    name: str,
) -> str:
    """Convolution padded by dilation * (kernel_size // 2)."""
    kh, kw = pair(kernel_size)
    padding = (dilation * (kh // 2), dilation * (kw // 2))
    op = Conv2d(b.shape(x)[1], out_channels, kernel_size, stride, padding, dilation, groups, bias)
    return b.add(op, x, name=name)


def batch_norm(b: GraphBuilder, x: str, *, name: str) -> str:
    """BatchNorm2d over the channels of `x`."""
    return b.add(BatchNorm2d(b.shape(x)[1]), x, name=name)


def conv_bn_act(
    b: GraphBuilder,
    x: str,
    out_channels: int,
    kernel_size: int = 1,
    *,
    stride: int = 1,
    groups: int = 1,
    activation: Op | None = RELU,
    name: str,
) -> str:
    """Convolution, BN, activation (None: linear)."""
    x = conv2d(b, x, out_channels, kernel_size, stride=stride, groups=groups, name=under(name, "conv"))
    x = batch_norm(b, x, name=under(name, "bn"))
    return x if activation is None else b.add(activation, x, name=under(name, "act"))


def separable_conv(
    b: GraphBuilder,
    x: str,
    out_channels: int,
    kernel_size: int = 3,
    *,
    stride: int = 1,
    activation: Op = RELU,
    name: str,
) -> str:
    """MobileNet-v1: depthwise, BN, activation, pointwise, BN, activation. Howard et al. 2017."""
    width = b.shape(x)[1]
    x = conv_bn_act(
        b, x, width, kernel_size, stride=stride, groups=width, activation=activation, name=under(name, "dw")
    )
    return conv_bn_act(b, x, out_channels, activation=activation, name=under(name, "pw"))


def squeeze_excite(
    b: GraphBuilder, x: str, squeeze_channels: int, *, activation: Op = RELU, gate: Op = SIGMOID, name: str
) -> str:
    """x * gate(conv1x1(activation(conv1x1(mean(x))))), both convolutions with bias. Hu et al. 2018."""
    s = b.add(AdaptiveAvgPool2d(), x, name=under(name, "pool"))
    s = conv2d(b, s, squeeze_channels, bias=True, name=under(name, "reduce"))
    s = b.add(activation, s, name=under(name, "act"))
    s = conv2d(b, s, b.shape(x)[1], bias=True, name=under(name, "expand"))
    s = b.add(gate, s, name=under(name, "gate"))
    return b.add(Mul(), x, s, name=under(name, "scale"))


def inverted_residual(
    b: GraphBuilder,
    x: str,
    hidden_channels: int,
    out_channels: int,
    *,
    kernel_size: int = 3,
    stride: int = 1,
    squeeze_channels: int | None = None,
    activation: Op = RELU6,
    expand: bool = True,
    residual: bool = True,
    name: str,
) -> str:
    """MobileNet-v2: 1x1 to `hidden_channels`, depthwise, optional squeeze-and-excitation, linear 1x1.

    Sandler et al. 2018; with squeeze-and-excitation after the depthwise activation, as MobileNet-v3 and TF-NAS have it.
    ``expand=False`` leaves the first convolution out (hidden_channels must equal the input's). The input is added
    where `residual` and its shape equals the output's. Squeeze-and-excitation uses the block's activation.
    """
    h = x
    if expand:
        h = conv_bn_act(b, h, hidden_channels, activation=activation, name=under(name, "expand"))
    elif b.shape(x)[1] != hidden_channels:
        raise GraphError(f"{name}: without expansion hidden_channels must be {b.shape(x)[1]}, not {hidden_channels}")
    h = conv_bn_act(
        b,
        h,
        hidden_channels,
        kernel_size,
        stride=stride,
        groups=hidden_channels,
        activation=activation,
        name=under(name, "dw"),
    )
    if squeeze_channels is not None:
        h = squeeze_excite(b, h, squeeze_channels, activation=activation, name=under(name, "se"))
    h = conv_bn_act(b, h, out_channels, activation=None, name=under(name, "project"))
    if residual and b.shape(h) == b.shape(x):
        h = b.add(Add(), h, x, name=under(name, "add"))
    return h


def bottleneck(
    b: GraphBuilder, x: str, width: int, out_channels: int, *, stride: int = 1, groups: int = 1, name: str
) -> str:
    """ResNet-50's block as torchvision builds it (v1.5: the 3x3 carries the stride).

    The shortcut is a 1x1 convolution with BN where shapes change. He et al. 2016; ``groups > 1``: ResNeXt.
    """
    h = conv_bn_act(b, x, width, name=under(name, "conv1"))
    h = conv_bn_act(b, h, width, 3, stride=stride, groups=groups, name=under(name, "conv2"))
    h = conv_bn_act(b, h, out_channels, activation=None, name=under(name, "conv3"))
    if b.shape(h) != b.shape(x):
        x = conv_bn_act(b, x, out_channels, stride=stride, activation=None, name=under(name, "shortcut"))
    h = b.add(Add(), h, x, name=under(name, "add"))
    return b.add(RELU, h, name=under(name, "act"))


def classifier(b: GraphBuilder, x: str, num_classes: int, *, name: str) -> str:
    """Global average pool, flatten, linear with bias: (N, C, H, W) -> (N, num_classes)."""
    x = b.add(AdaptiveAvgPool2d(), x, name=under(name, "pool"))
    x = b.add(Flatten(), x, name=under(name, "flatten"))
    return b.add(Linear(b.shape(x)[1], num_classes), x, name=under(name, "linear"))


# ── activation first: NAS-Bench-201, DARTS and its kin ───────────────────────


def relu_conv_bn(
    b: GraphBuilder,
    x: str,
    out_channels: int,
    kernel_size: int = 1,
    *,
    stride: int = 1,
    bias: bool = False,
    name: str,
) -> str:
    """ReLU, convolution, BN: NAS-Bench-201's ``nor_conv``, DARTS' preprocessing."""
    x = b.add(RELU, x, name=under(name, "act"))
    x = conv2d(b, x, out_channels, kernel_size, stride=stride, bias=bias, name=under(name, "conv"))
    return batch_norm(b, x, name=under(name, "bn"))


def relu_separable_bn(
    b: GraphBuilder,
    x: str,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    name: str,
) -> str:
    """ReLU, depthwise, pointwise, BN, nothing between the convolutions: DARTS' ``dil_conv`` at dilation 2."""
    width = b.shape(x)[1]
    x = b.add(RELU, x, name=under(name, "act"))
    x = conv2d(b, x, width, kernel_size, stride=stride, dilation=dilation, groups=width, name=under(name, "dw"))
    x = conv2d(b, x, out_channels, name=under(name, "pw"))
    return batch_norm(b, x, name=under(name, "bn"))


def irlas_conv(b: GraphBuilder, x: str, out_channels: int, kernel_size: int, *, name: str) -> str:
    """IRLAS-mobile's convolution layer: ``relu_separable_bn``, also for kernel size 1 (a scale per channel).

    Where kernel_size > 1 and channels change, ReLU, 1x1 convolution *with* bias and BN bring them to `out_channels`
    first. Guo et al. 2019, released code.
    """
    if kernel_size > 1 and b.shape(x)[1] != out_channels:
        x = relu_conv_bn(b, x, out_channels, bias=True, name=under(name, "lift"))
    return relu_separable_bn(b, x, out_channels, kernel_size, name=name)


def factorized_reduce(b: GraphBuilder, x: str, out_channels: int, *, name: str) -> str:
    """Halves the map: ReLU, two 1x1 stride-2 convolutions, the second shifted by one pixel, concatenated, BN.

    Map sides must be even. Liu et al. 2019 (DARTS).
    """
    x = b.add(RELU, x, name=under(name, "act"))
    shifted = b.add(Crop(), x, name=under(name, "shift"))
    half = out_channels // 2
    first = conv2d(b, x, half, stride=2, name=under(name, "conv1"))
    second = conv2d(b, shifted, out_channels - half, stride=2, name=under(name, "conv2"))
    x = b.add(Concat(), first, second, name=under(name, "concat"))
    return batch_norm(b, x, name=under(name, "bn"))


# ── DARTS' operations: (builder, x, stride=, name=) -> output, channels kept ──


class DartsOp(Protocol):
    """Appends one DARTS operator to `b` behind node `x` and gives its output's name."""

    def __call__(self, b: GraphBuilder, x: str, /, *, stride: int, name: str) -> str: ...


def _pool(b: GraphBuilder, x: str, *, pool: type[MaxPool2d | AvgPool2d], stride: int, name: str) -> str:
    return b.add(pool(3, stride, 1), x, name=name)  # padding counts in neither


def _skip(b: GraphBuilder, x: str, *, stride: int, name: str) -> str:
    return x if stride == 1 else factorized_reduce(b, x, b.shape(x)[1], name=name)


def _separable_twice(b: GraphBuilder, x: str, *, kernel_size: int, stride: int, name: str) -> str:
    width = b.shape(x)[1]
    x = relu_separable_bn(b, x, width, kernel_size, stride=stride, name=under(name, "1"))
    return relu_separable_bn(b, x, width, kernel_size, name=under(name, "2"))


def _dilated(b: GraphBuilder, x: str, *, kernel_size: int, stride: int, name: str) -> str:
    return relu_separable_bn(b, x, b.shape(x)[1], kernel_size, stride=stride, dilation=2, name=name)


def _conv_7x1_1x7(b: GraphBuilder, x: str, *, stride: int, name: str) -> str:
    width = b.shape(x)[1]
    x = b.add(RELU, x, name=under(name, "act"))
    x = conv2d(b, x, width, (1, 7), stride=(1, stride), name=under(name, "row"))
    x = conv2d(b, x, width, (7, 1), stride=(stride, 1), name=under(name, "column"))
    return batch_norm(b, x, name=under(name, "bn"))


DARTS_OPS: Mapping[str, DartsOp] = MappingProxyType(
    {
        "max_pool_3x3": partial(_pool, pool=MaxPool2d),
        "avg_pool_3x3": partial(_pool, pool=AvgPool2d),
        "skip_connect": _skip,
        "sep_conv_3x3": partial(_separable_twice, kernel_size=3),
        "sep_conv_5x5": partial(_separable_twice, kernel_size=5),
        "sep_conv_7x7": partial(_separable_twice, kernel_size=7),
        "dil_conv_3x3": partial(_dilated, kernel_size=3),
        "dil_conv_5x5": partial(_dilated, kernel_size=5),
        "conv_7x1_1x7": _conv_7x1_1x7,
    }
)


def darts_op(b: GraphBuilder, op: str, x: str, *, stride: int = 1, name: str) -> str:
    """One of ``DARTS_OPS`` on `x`, channels kept; no BN after the pools (RelativeNAS's derived networks).

    ``skip_connect`` at stride 1 is `x` itself. Raises GraphError where `op` is unknown.
    """
    if op not in DARTS_OPS:
        raise GraphError(f"{name}: unknown DARTS operation {op!r}: {', '.join(DARTS_OPS)}")
    return DARTS_OPS[op](b, x, stride=stride, name=name)
