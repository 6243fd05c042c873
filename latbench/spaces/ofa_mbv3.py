"""Once-for-all's MobileNetV3 space (Cai et al., ICLR 2020): elastic resolution, depth, kernel and expansion.

Widths, strides, activations and squeeze-and-excitation as in ``OFAMobileNetV3`` of the released code, width multiple 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from typing import Any, ClassVar

import numpy as np

from latbench.errors import UsageError, shown
from latbench.graph.blocks import RELU, conv2d, conv_bn_act, inverted_residual, squeeze_excite
from latbench.graph.ir import DType, Graph, GraphBuilder
from latbench.graph.ops import AdaptiveAvgPool2d, Add, Crop, Flatten, Hardsigmoid, Hardswish, Linear, Op, Shape
from latbench.spaces.base import MAX_CHANNELS, Arch, Decision, FactoredSpace, Site

KERNELS = (3, 5, 7)
EXPANSIONS = (3, 4, 6)
PRESENT = tuple(f"k{k}_e{e}" for k, e in product(KERNELS, EXPANSIONS))
ABSENT = "absent"
UNITS, MIN_DEPTH, MAX_DEPTH = 5, 2, 4
WIDTHS = (24, 40, 80, 112, 160)  # of a unit's output
STRIDES = (2, 2, 2, 1, 2)  # of its first layer
SWISH_FROM = 2  # units from here on use h-swish, those before ReLU
SQUEEZED = (1, 3, 4)  # units with squeeze-and-excitation
STEM_WIDTH, FINAL_WIDTH, FEATURES = 16, 960, 1280
MIN_RESOLUTION, RESOLUTION_STEP = 128, 4
MAX_RESOLUTION = 1024  # every side from 128 is an option, with 181 blocks each; published ones end at 224

HARDSWISH = Hardswish()
HARDSIGMOID = Hardsigmoid()


@dataclass(frozen=True)
class _LayerSite(Site):
    unit: int
    layer: int  # 0: changes width and map


@dataclass(frozen=True)
class OFAMobileNetV3Space(FactoredSpace):
    """Decisions: the input's side, then 5 units of 4 layers, each kernel and expansion or (layers 3 and 4) ``absent``.

    Option indices: ``resolution`` (side - 128) / 4; a layer 3 * (0, 1, 2 for kernel 3, 5, 7) + (0, 1, 2 for expansion
    3, 4, 6), and 9 for absent. ``from_columns`` reads a row of published columns. Layers 3 and 4 of a unit are alike:
    one alone may stand in either place (``canonical`` puts it in the third).

    The field ``resolution`` is the largest side. A network takes inputs of this side and crops them to the side that
    was chosen (a view in PyTorch; once-for-all resizes its images instead), so that all take one shape.
    """

    num_classes: int = 1000

    name: ClassVar[str] = "ofa_mbv3"
    min_resolution: ClassVar[int] = MIN_RESOLUTION

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resolution % RESOLUTION_STEP:
            raise UsageError(f"{self.name}: resolution must be a multiple of 4, got {self.resolution}")
        if self.num_classes < 1:
            raise UsageError(f"{self.name}: num_classes must be at least 1, got {shown(self.num_classes)}")
        self._at_most(MAX_CHANNELS, "num_classes")
        self._at_most(MAX_RESOLUTION, "resolution")

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        sides = tuple(range(MIN_RESOLUTION, self.resolution + 1, RESOLUTION_STEP))
        layers = (
            Decision(f"unit{u + 1}/layer{i + 1}", PRESENT if i < MIN_DEPTH else (*PRESENT, ABSENT))
            for u, i in product(range(UNITS), range(MAX_DEPTH))
        )
        return (Decision("resolution", sides), *layers)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        layers = (
            _LayerSite(
                f"unit{u + 1}/layer{i + 1}",
                (0, 1 + MAX_DEPTH * u + i),
                f"inverted residual s{1 if i else STRIDES[u]}",
                u,
                i,
            )
            for u, i in product(range(UNITS), range(MAX_DEPTH))
        )
        first = (
            Site("crop", (0,), "crop"),
            Site("stem", (0,), "stem"),
            Site("bottleneck", (0,), "inverted residual s1"),
        )
        return (*first, *layers, Site("head", (0,), "head"))

    def sample(self, rng: np.random.Generator) -> Arch:
        """As once-for-all samples: side, each unit's depth, and each layer's kernel and expansion uniform."""
        arch = [int(rng.integers(len(self.decisions[0].options)))]
        for _ in range(UNITS):
            depth = int(rng.integers(MIN_DEPTH, MAX_DEPTH + 1))
            layers = rng.integers(len(PRESENT), size=depth).tolist()
            arch += [*layers, *(len(PRESENT),) * (MAX_DEPTH - depth)]
        return tuple(arch)

    def canonical(self, arch: Arch) -> Arch:
        """`arch` with a unit's last layer moved forward where the third is absent: the same network graph."""
        self.check(arch)
        out = list(arch)
        for third in range(1 + MIN_DEPTH, len(out), MAX_DEPTH):
            if out[third] == len(PRESENT):
                out[third : third + 2] = [out[third + 1], len(PRESENT)]
        return tuple(out)

    @classmethod
    def from_columns(cls, row: Mapping[str, Any]) -> Arch:
        """Columns ``r``, ``ks0`` to ``ks19``, ``e0`` to ``e19`` (both 0: absent) -> architecture; others are ignored.

        Raises UsageError where a column is missing or a value is no kernel, expansion or side of the space.
        """
        n = UNITS * MAX_DEPTH
        try:
            side, layers = int(row["r"]), [(int(row[f"ks{i}"]), int(row[f"e{i}"])) for i in range(n)]
        except KeyError as error:
            raise UsageError(
                f"{cls.name}: a row needs the columns r, ks0 to ks{n - 1} and e0 to e{n - 1}, {error} is missing"
            ) from None
        options = {(k, e): i for i, (k, e) in enumerate((*product(KERNELS, EXPANSIONS), (0, 0)))}
        for i, layer in enumerate(layers):
            if layer not in options or (layer == (0, 0) and i % MAX_DEPTH < MIN_DEPTH):
                raise UsageError(f"{cls.name}: layer {i} cannot have kernel {layer[0]} with expansion {layer[1]}")
        if side < MIN_RESOLUTION or side % RESOLUTION_STEP:
            raise UsageError(f"{cls.name}: side {side} is no multiple of {RESOLUTION_STEP} from {MIN_RESOLUTION}")
        return ((side - MIN_RESOLUTION) // RESOLUTION_STEP, *(options[layer] for layer in layers))

    def block(self, site: Site, picks: tuple[int, ...]) -> Graph | None:
        side = MIN_RESOLUTION + RESOLUTION_STEP * picks[0]
        if isinstance(site, _LayerSite):
            return self._layer(site, side, picks[1])
        if site.name == "crop":
            return _crop(self.input_shape, self.resolution - side, self.dtype) if side < self.resolution else None
        if site.name == "stem":
            return _stem((self.batch, 3, side, side), self.dtype)
        if site.name == "bottleneck":
            return _bottleneck(self._shape(STEM_WIDTH, side, 2), self.dtype)
        return _head(self._shape(WIDTHS[-1], side, 32), self.num_classes, self.dtype)

    def _layer(self, site: _LayerSite, side: int, option: int) -> Graph | None:
        if option == len(PRESENT):
            return None
        unit, first = site.unit, site.layer == 0
        stride = STRIDES[unit] if first else 1
        width = (STEM_WIDTH, *WIDTHS)[unit] if first else WIDTHS[unit]
        reduction = 2 * int(np.prod(STRIDES[:unit] if first else STRIDES[: unit + 1]))
        kernel, expansion = (int(part[1:]) for part in PRESENT[option].split("_"))
        return _inverted_residual(
            self._shape(width, side, reduction),
            WIDTHS[unit],
            kernel,
            expansion,
            stride=stride,
            squeeze=unit in SQUEEZED,
            activation=HARDSWISH if unit >= SWISH_FROM else RELU,
            dtype=self.dtype,
        )

    def _shape(self, width: int, side: int, reduction: int) -> Shape:
        side = -(-side // reduction)  # every stride-2 layer rounds up
        return (self.batch, width, side, side)


def make_divisible(width: float, divisor: int = 8) -> int:
    """The nearest multiple of `divisor`, at least one, and no less than 90 % of `width`: the MobileNets' rounding."""
    rounded = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * width else rounded


@lru_cache(maxsize=8192)
def _inverted_residual(
    shape: Shape, out_channels: int, kernel: int, expansion: int, *, stride: int, squeeze: bool, activation: Op,
    dtype: DType,
) -> Graph:  # fmt: skip
    """MobileNet-v3's: squeeze-and-excitation with its own activations, ReLU inside and h-sigmoid as its gate."""
    b = GraphBuilder(dtype)
    x = b.input("x", shape)
    width = make_divisible(expansion * shape[1])
    h = conv_bn_act(b, x, width, activation=activation, name="expand")
    h = conv_bn_act(b, h, width, kernel, stride=stride, groups=width, activation=activation, name="dw")
    if squeeze:
        h = squeeze_excite(b, h, make_divisible(width // 4), gate=HARDSIGMOID, name="se")
    h = conv_bn_act(b, h, out_channels, activation=None, name="project")
    return b.build(b.add(Add(), h, x, name="add") if b.shape(h) == shape else h)


@lru_cache(maxsize=64)
def _crop(shape: Shape, margin: int, dtype: DType) -> Graph:
    b = GraphBuilder(dtype)
    return b.build(b.add(Crop(margin, margin), b.input("x", shape), name="crop"))


@lru_cache(maxsize=64)
def _stem(shape: Shape, dtype: DType) -> Graph:
    b = GraphBuilder(dtype)
    return b.build(conv_bn_act(b, b.input("x", shape), STEM_WIDTH, 3, stride=2, activation=HARDSWISH, name=""))


@lru_cache(maxsize=64)
def _bottleneck(shape: Shape, dtype: DType) -> Graph:
    b = GraphBuilder(dtype)
    return b.build(
        inverted_residual(b, b.input("x", shape), STEM_WIDTH, STEM_WIDTH, activation=RELU, expand=False, name="")
    )


@lru_cache(maxsize=64)
def _head(shape: Shape, num_classes: int, dtype: DType) -> Graph:
    """1x1 to 960 channels, global pool, 1x1 to 1280 without BN, linear: MobileNet-v3's efficient last stage."""
    b = GraphBuilder(dtype)
    x = conv_bn_act(b, b.input("x", shape), FINAL_WIDTH, activation=HARDSWISH, name="expand")
    x = b.add(AdaptiveAvgPool2d(), x, name="pool")
    x = conv2d(b, x, FEATURES, name="features")
    x = b.add(HARDSWISH, x, name="features_act")
    x = b.add(Flatten(), x, name="flatten")
    return b.build(b.add(Linear(FEATURES, num_classes), x, name="linear"))
