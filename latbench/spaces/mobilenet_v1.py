"""MobileNet-v1 with searchable widths: the space of AOWS (Berman et al., CVPR 2020; released code, see its README)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from latbench.errors import UsageError
from latbench.graph.blocks import classifier, conv_bn_act, separable_conv
from latbench.graph.ir import DType, Graph, GraphBuilder
from latbench.graph.ops import Shape
from latbench.spaces.base import MAX_CHANNELS, MAX_LAYERS, Arch, Decision, FactoredSpace, Site

BASE_WIDTHS = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
STRIDES = (2, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
DIVISOR = 8  # widths are multiples of it

PUBLISHED_WIDTHS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "mobilenet-v1": BASE_WIDTHS,
        "aows-readme": (16, 32, 64, 112, 360, 48, 464, 664, 152, 664, 256, 208, 816, 304),  # README of bermanmaxim/AOWS
    }
)


@dataclass(frozen=True)
class MobileNetV1Space(FactoredSpace):
    """14 widths; a dense 3x3 stem, 13 depthwise separable stages, a linear head.

    The depthwise width is the previous stage's, so a stage's block depends on two neighbouring decisions and the space
    is a chain.
    """

    min_width: float = 0.2  # multiples of the base width
    max_width: float = 1.5
    levels: int = 14
    num_classes: int = 1000

    name: ClassVar[str] = "mobilenet_v1"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.min_width <= self.max_width:
            raise UsageError(
                f"{self.name}: needs 0 < min_width <= max_width, got {self.min_width} and {self.max_width}"
            )
        if self.levels < 1 or self.num_classes < 1:
            raise UsageError(f"{self.name}: levels and num_classes must be at least 1")
        self._at_most(MAX_LAYERS, "levels", "max_width")
        self._at_most(MAX_CHANNELS, "num_classes")

    @cached_property
    def candidates(self) -> tuple[tuple[int, ...], ...]:
        """Candidate widths of each stage, ascending: `levels` equally spaced multiples, rounded to multiples of 8."""
        multiples = np.linspace(self.min_width, self.max_width, self.levels)
        rounded = [np.maximum(1, np.round(base * multiples / DIVISOR)).astype(int) for base in BASE_WIDTHS]
        return tuple(tuple(DIVISOR * int(n) for n in np.unique(counts)) for counts in rounded)

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        return tuple(Decision(f"width{i}", widths) for i, widths in enumerate(self.candidates, 1))

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        stages = (Site(f"stage{i + 1}", (i - 1, i), f"separable conv s{STRIDES[i]}") for i in range(1, len(STRIDES)))
        return (Site("stem", (0,), "stem"), *stages, Site("head", (len(STRIDES) - 1,), "head"))

    @cached_property
    def published(self) -> Mapping[str, Arch]:
        """``mobilenet-v1`` and ``aows-readme`` where their widths are candidates, ``narrowest``, ``widest``."""
        exact = {
            name: tuple(options.index(w) for options, w in zip(self.candidates, widths, strict=True))
            for name, widths in PUBLISHED_WIDTHS.items()
            if all(w in options for options, w in zip(self.candidates, widths, strict=True))
        }
        widest = tuple(len(options) - 1 for options in self.candidates)
        return {**exact, "narrowest": (0,) * len(widest), "widest": widest}

    def widths(self, arch: Arch) -> tuple[int, ...]:
        """Channels of each stage."""
        self.check(arch)
        return tuple(options[i] for options, i in zip(self.candidates, arch, strict=True))

    def block(self, site: Site, picks: tuple[int, ...]) -> Graph:
        widths = [self.candidates[decision][pick] for decision, pick in zip(site.scope, picks, strict=True)]
        if site.name == "stem":
            return _stem(self.input_shape, widths[0], self.dtype)
        stage = site.scope[-1]
        side = self._sides[stage]
        if site.name == "head":
            return _head((self.batch, widths[0], side, side), self.num_classes, self.dtype)
        before = self._sides[stage - 1]
        return _separable((self.batch, widths[0], before, before), widths[1], STRIDES[stage], self.dtype)

    @cached_property
    def _sides(self) -> tuple[int, ...]:
        """Side of each stage's output map."""
        sides = [self.resolution]
        for stride in STRIDES:
            sides.append(-(-sides[-1] // stride))  # 3x3 with padding 1: rounded up
        return tuple(sides[1:])


# Stages 8 to 12 share their blocks, and every oracle walks all slots: 110 ms the first time, 5 ms from these caches.


@lru_cache(maxsize=8192)
def _separable(shape: Shape, out_channels: int, stride: int, dtype: DType) -> Graph:
    b = GraphBuilder(dtype)
    return b.build(separable_conv(b, b.input("x", shape), out_channels, stride=stride, name=""))


@lru_cache
def _stem(shape: Shape, out_channels: int, dtype: DType) -> Graph:
    b = GraphBuilder(dtype)
    return b.build(conv_bn_act(b, b.input("x", shape), out_channels, 3, stride=2, name=""))


@lru_cache
def _head(shape: Shape, num_classes: int, dtype: DType) -> Graph:
    b = GraphBuilder(dtype)
    return b.build(classifier(b, b.input("x", shape), num_classes, name=""))
