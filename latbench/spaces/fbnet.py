"""FBNet's space (Wu et al., CVPR 2019), in the CIFAR build whose latencies HW-NAS-Bench and HELP published.

22 layers, one of 9 operations each. Layer widths, strides and head as in HW-NAS-Bench's released networks
(Li et al., ICLR 2021): the first two stages and the stem keep the 32x32 map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar

from latbench.errors import UsageError, shown
from latbench.graph.blocks import RELU, classifier, conv_bn_act
from latbench.graph.ir import DType, Graph, GraphBuilder
from latbench.graph.ops import Add, ChannelShuffle, Shape
from latbench.spaces.base import MAX_CHANNELS, Arch, Decision, FactoredSpace, Site

OPTIONS = ("k3_e1", "k3_e1_g2", "k3_e3", "k3_e6", "k5_e1", "k5_e1_g2", "k5_e3", "k5_e6", "skip")
LAYERS = (1, 4, 4, 4, 4, 4, 1)  # per stage
CHANNELS = (16, 24, 32, 64, 112, 184, 352)
STRIDES = (1, 1, 2, 2, 1, 2, 1)  # of a stage's first layer
STEM_CHANNELS = 16
HEAD_CHANNELS = 1504


@dataclass(frozen=True)
class _LayerSite(Site):
    in_channels: int
    out_channels: int
    stride: int
    reduction: int  # input pixels per pixel of the layer's input map, along one side


@dataclass(frozen=True)
class FBNetSpace(FactoredSpace):
    """One operation per layer: kernel k, expansion e, ``g2`` two groups in both 1x1 convolutions, or ``skip``.

    An option's index is its published code (``op0`` to ``op21``): ``from_columns`` reads a row of them. ``skip`` is a
    1x1 projection where channels or map change, and no block elsewhere. Every layer is a site of its own.
    """

    resolution: int = 32
    num_classes: int = 100

    name: ClassVar[str] = "fbnet"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_classes < 1:
            raise UsageError(f"{self.name}: num_classes must be at least 1, got {shown(self.num_classes)}")
        self._at_most(MAX_CHANNELS, "num_classes")

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        return tuple(Decision(f"layer{i}", OPTIONS) for i in range(sum(LAYERS)))

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        sites: list[Site] = [Site("stem", (), "stem")]
        channels, reduction = STEM_CHANNELS, 1
        for n_layers, width, first_stride in zip(LAYERS, CHANNELS, STRIDES, strict=True):
            for stride in (first_stride, *(1,) * (n_layers - 1)):
                i = len(sites) - 1
                sites.append(
                    _LayerSite(f"layer{i}", (i,), f"inverted residual s{stride}", channels, width, stride, reduction)
                )
                channels, reduction = width, reduction * stride
        return (*sites, Site("head", (), "head"))

    @classmethod
    def from_columns(cls, row: Mapping[str, Any]) -> Arch:
        """Columns ``op0`` to ``op21`` of the published latencies, codes 0 to 8 -> architecture; others are ignored.

        Raises UsageError where a column is missing; ``check`` says what is out of range.
        """
        names = [f"op{i}" for i in range(sum(LAYERS))]
        missing = [name for name in names if name not in row]
        if missing:
            raise UsageError(f"{cls.name}: a row needs the columns op0 to op{len(names) - 1}, {missing[0]} is missing")
        return tuple(int(row[name]) for name in names)

    def block(self, site: Site, picks: tuple[int, ...]) -> Graph | None:
        if isinstance(site, _LayerSite):
            return _layer(self._shape(site.in_channels, site.reduction), site, OPTIONS[picks[0]], self.dtype)
        if site.name == "head":
            last = next(s for s in reversed(self.sites) if isinstance(s, _LayerSite))
            shape = self._shape(last.out_channels, last.reduction * last.stride)
            return _head(shape, self.num_classes, self.dtype)
        return _stem(self.input_shape, self.dtype)

    def _shape(self, channels: int, reduction: int) -> Shape:
        side = -(-self.resolution // reduction)  # a stride-2 layer rounds up
        return (self.batch, channels, side, side)


def _layer(shape: Shape, site: _LayerSite, option: str, dtype: DType) -> Graph | None:
    if option == "skip":
        keeps = site.stride == 1 and site.in_channels == site.out_channels
        return None if keeps else _projection(shape, site.out_channels, site.stride, dtype)
    kernel, expansion, *groups = (int(part[1:]) for part in option.split("_"))
    return _inverted_residual(shape, site.out_channels, kernel, expansion, *groups, stride=site.stride, dtype=dtype)


@lru_cache(maxsize=1024)
def _inverted_residual(
    shape: Shape, out_channels: int, kernel: int, expansion: int, groups: int = 1, *, stride: int, dtype: DType
) -> Graph:
    """1x1, channel shuffle where grouped, depthwise, linear 1x1, and the input where shapes agree."""
    b = GraphBuilder(dtype)
    x = b.input("x", shape)
    width = expansion * shape[1]
    h = conv_bn_act(b, x, width, groups=groups, name="expand")
    if groups > 1:
        h = b.add(ChannelShuffle(groups), h, name="shuffle")
    h = conv_bn_act(b, h, width, kernel, stride=stride, groups=width, name="dw")
    h = conv_bn_act(b, h, out_channels, groups=groups, activation=None, name="project")
    return b.build(b.add(Add(), h, x, name="add") if b.shape(h) == shape else h)


@lru_cache(maxsize=256)
def _projection(shape: Shape, out_channels: int, stride: int, dtype: DType) -> Graph:
    b = GraphBuilder(dtype)
    return b.build(conv_bn_act(b, b.input("x", shape), out_channels, stride=stride, activation=RELU, name="project"))


@lru_cache
def _stem(shape: Shape, dtype: DType) -> Graph:
    b = GraphBuilder(dtype)
    return b.build(conv_bn_act(b, b.input("x", shape), STEM_CHANNELS, 3, name=""))


@lru_cache
def _head(shape: Shape, num_classes: int, dtype: DType) -> Graph:
    b = GraphBuilder(dtype)
    x = conv_bn_act(b, b.input("x", shape), HEAD_CHANNELS, name="expand")
    return b.build(classifier(b, x, num_classes, name=""))
