"""Inverted residuals whose operation, width and depth are searched: the space of TF-NAS (Hu et al., ECCV 2020).

Layout as released in AberHu/TF-NAS: 18 searchable blocks in 6 stages (the paper's stages 3 to 8) between a fixed stem
and a fixed head.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import numpy as np

from latbench.errors import UsageError
from latbench.graph.blocks import RELU, classifier, conv_bn_act, inverted_residual
from latbench.graph.ir import DType, Graph, GraphBuilder
from latbench.graph.ops import Op, Shape, SiLU
from latbench.spaces.base import MAX_CHANNELS, Arch, Decision, FactoredSpace, Site

SWISH = SiLU()
STEM_CHANNELS, FIRST_CHANNELS, STEM_SQUEEZE, HEAD_CHANNELS = 32, 16, 8, 1280


class Stage(NamedTuple):
    """Blocks of one width and activation."""

    out_channels: int
    n_blocks: int  # at most; the first carries the stride and changes the channels, the others are residual
    stride: int
    activation: Op


STAGES = (
    Stage(24, 2, 2, RELU),
    Stage(40, 3, 2, SWISH),
    Stage(80, 4, 2, SWISH),
    Stage(112, 4, 1, SWISH),
    Stage(192, 4, 2, SWISH),
    Stage(320, 1, 1, SWISH),
)


class Operation(NamedTuple):
    """Of a block with c input channels: max_expansion * c mid channels at most, half of that at least."""

    name: str
    kernel_size: int
    max_expansion: int
    squeeze: int  # hidden channels of squeeze-and-excitation, in multiples of c; they do not follow the width


OPERATIONS = (  # in the order of the released code
    Operation("k3_e3", 3, 4, 0),
    Operation("k3_e6", 3, 8, 0),
    Operation("k5_e3", 5, 4, 0),
    Operation("k5_e6", 5, 8, 0),
    Operation("k3_e3_se", 3, 4, 1),
    Operation("k3_e6_se", 3, 8, 2),
    Operation("k5_e3_se", 5, 4, 1),
    Operation("k5_e6_se", 5, 8, 2),
)
OPERATION_NAMES = tuple(operation.name for operation in OPERATIONS)
NONE = len(OPERATIONS)  # the option "none" of every block but a stage's first
MAX_MULTIPLIER = 16  # with width_step=1 a block has 20,480 widths then
WIDEST = 8  # the width options of a block end at 8 c
WidthsOfOps = tuple[tuple[tuple[int, int], ...], ...]  # per stage, per kept block: operation, mid channels

PUBLISHED: Mapping[str, WidthsOfOps] = MappingProxyType(
    {
        "tfnas-a": (  # TF_NAS_A of JDAI-CV/FaceX-Zoo, the one published configuration that is public
            ((5, 83), (3, 128)),
            ((5, 138), (1, 297), (7, 170)),
            ((7, 248), (1, 500), (1, 424), (1, 477)),
            ((5, 504), (1, 796), (5, 723), (5, 555)),
            ((1, 813), (1, 1370), (5, 1138), (5, 1359)),
            ((7, 1203),),
        )
    }
)


@dataclass(frozen=True)
class BlockSite(Site):
    """One of the 18 searchable blocks; its scope is (operation, width)."""

    stage: int  # 0 to 5
    position: int  # in its stage, from 0
    in_channels: int
    out_channels: int
    stride: int
    side: int  # of its input map


@dataclass(frozen=True)
class TFNASSpace(FactoredSpace):
    """An operation and a width for each of 18 blocks; a block of operation "none" is absent, which is depth.

    *Operation*: one of ``OPERATIONS``; every block of a stage but the first may also be "none". A stage of n blocks has
    n depths (sink-connecting: the stage's output may be any block's, never its input). TF-NAS's mixture of depths with
    probabilities beta is, for a sum over blocks, the choice of "none" at block b with probability
    sum(beta[d] for d < b), and of operation o with P(depth >= b) * w[b, o]: same expectation, same gradient. A depth
    decision of its own would make a site's table (depth, operation, width) 24,608 entries at exact widths. The price:
    an absent block before a present one spells the network of the shorter stage once more; ``canonical`` moves it back.

    *Width*: the options are mid channels of the e6 operations, 4c to 8c for c input channels; an e3 operation takes
    half of the option, rounded down, 2c to 4c. So one option is the same share of either range, and 6c is every
    operation's initial width. Options are every `width_step`-th integer, the initial width, the largest, and the widths
    of the published networks. ``width_step=1`` has every integer (21,954 blocks: what the published tables hold, and
    what elasticity scaling walks through in steps of one channel). The authors measured multiples of 8 and interpolated
    linearly: the default measures those, and ``oracle.base.spread(decision, option)`` settles a width between them, to
    the same figures as their table. A block's key does not depend on the step.

    `width_multiplier` scales all channels (0.25 trains on a CPU in minutes); published networks are of multiplier 1.

    Neighbouring decisions only: ``FactorOracle.chain`` holds.
    """

    width_step: int = 8
    num_classes: int = 1000
    width_multiplier: float = 1.0

    name: ClassVar[str] = "tfnas"
    stages: ClassVar[tuple[Stage, ...]] = STAGES
    min_resolution: ClassVar[int] = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width_step < 1 or self.num_classes < 1:
            raise UsageError(f"{self.name}: width_step and num_classes must be at least 1")
        if not 0 < self.width_multiplier < math.inf:
            raise UsageError(f"{self.name}: width_multiplier must be above zero, got {self.width_multiplier}")
        self._at_most(MAX_CHANNELS, "num_classes")
        self._at_most(MAX_MULTIPLIER, "width_multiplier")

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        decisions = []
        for site in self.block_sites:
            operations = OPERATION_NAMES + (("none",) if site.position else ())
            decisions += [Decision(f"{site.name}/op", operations), Decision(f"{site.name}/width", self._widths(site))]
        return tuple(decisions)

    @cached_property
    def block_sites(self) -> tuple[BlockSite, ...]:
        """The 18 searchable blocks, in order."""
        sites: list[BlockSite] = []
        side, channels = _halved(self.resolution), self._scaled(FIRST_CHANNELS)
        for i, stage in enumerate(self.stages):
            out_channels = self._scaled(stage.out_channels)
            for position in range(stage.n_blocks):
                stride = 1 if position else stage.stride
                scope = (2 * len(sites), 2 * len(sites) + 1)
                kind = f"inverted residual s{stride}"
                name = f"stage{i + 1}/block{position + 1}"
                sites.append(BlockSite(name, scope, kind, i, position, channels, out_channels, stride, side))
                side, channels = _halved(side) if stride == 2 else side, out_channels
        return tuple(sites)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        return (Site("stem", (), "stem"), *self.block_sites, Site("head", (), "head"))

    @cached_property
    def published(self) -> Mapping[str, Arch]:
        """``tfnas-a``; configurations of the other published networks are not public."""
        return {name: self.encode(stages) for name, stages in self._published.items()}

    def block(self, site: Site, picks: tuple[int, ...]) -> Graph | None:
        if isinstance(site, BlockSite):
            operation, width = picks
            if operation == NONE:
                return None
            option = self._widths(site)[width]
            return self._block(site, OPERATIONS[operation], _mid_channels(OPERATIONS[operation], option))
        if site.name == "stem":
            return _stem(self.input_shape, self._scaled(STEM_CHANNELS), self._scaled(FIRST_CHANNELS), self.dtype)
        last = self.block_sites[-1]
        shape = (self.batch, last.out_channels, last.side, last.side)
        return _head(shape, self._scaled(HEAD_CHANNELS), self.num_classes, self.dtype)

    def picks_of(self, site: BlockSite, operation: int, mid_channels: int) -> tuple[int, int]:
        """The picks of an operation at a width, the first where two options give it.

        Raises UsageError where the width is out of range or between two options.
        """
        options, chosen = self._widths(site), OPERATIONS[operation]
        i = bisect_left(options, _option(chosen, mid_channels))
        if i == len(options) or _mid_channels(chosen, options[i]) != mid_channels:
            low, high = (_mid_channels(chosen, end) for end in (options[0], options[-1]))
            raise UsageError(
                f"{self.name}: {site.name} has no {chosen.name} of {mid_channels} channels: {low} to {high} in steps"
                f" (width_step={self.width_step}; width_step=1 has them all)"
            )
        return operation, i

    def encode(self, stages: Sequence[Sequence[tuple[int, int]]]) -> Arch:
        """Per stage, per kept block, (operation, mid channels) -> architecture. Raises UsageError where it has none."""
        arch: list[int] = []
        if len(stages) != len(self.stages):
            raise UsageError(f"{self.name}: there are {len(self.stages)} stages, got {len(stages)}")
        for site in self.block_sites:
            blocks = stages[site.stage]
            most = self.stages[site.stage].n_blocks
            if not 1 <= len(blocks) <= most:
                raise UsageError(f"{self.name}: stage{site.stage + 1} has 1 to {most} blocks, got {len(blocks)}")
            kept = site.position < len(blocks)
            arch += self.picks_of(site, *blocks[site.position]) if kept else (NONE, 0)
        return tuple(arch)

    def decode(self, arch: Arch) -> WidthsOfOps:
        """Inverse of ``encode``: what each stage keeps."""
        self.check(arch)
        stages: list[list[tuple[int, int]]] = [[] for _ in self.stages]
        for site in self.block_sites:
            operation, width = self.picks(site, arch)
            if operation != NONE:
                mid_channels = _mid_channels(OPERATIONS[operation], self._widths(site)[width])
                stages[site.stage].append((operation, mid_channels))
        return tuple(tuple(stage) for stage in stages)

    def sample(self, rng: np.random.Generator) -> Arch:
        """Each stage's depth, and each kept block's operation and width, uniform."""
        arch: list[int] = []
        depths = [int(rng.integers(1, stage.n_blocks + 1)) for stage in self.stages]
        for site in self.block_sites:
            n_widths = len(self._widths(site))
            kept = site.position < depths[site.stage]
            arch += (int(rng.integers(len(OPERATIONS))), int(rng.integers(n_widths))) if kept else (NONE, 0)
        return tuple(arch)

    def canonical(self, arch: Arch) -> Arch:
        """The one spelling of `arch`'s network: absent blocks last in their stage, widths by the first option that
        gives them."""
        return self.encode(self.decode(arch))

    def _widths(self, site: BlockSite) -> tuple[int, ...]:
        return self._width_options[site.name]

    @cached_property
    def _width_options(self) -> Mapping[str, tuple[int, ...]]:
        options = {}
        for site in self.block_sites:
            c = site.in_channels
            wanted = {*range(4 * c, WIDEST * c, self.width_step), 6 * c, WIDEST * c}
            for stages in self._published.values():
                for operation, mid_channels in stages[site.stage][site.position : site.position + 1]:
                    wanted.add(_option(OPERATIONS[operation], mid_channels))
            options[site.name] = tuple(sorted(wanted))
        return options

    @property
    def _published(self) -> Mapping[str, WidthsOfOps]:
        return PUBLISHED if self.width_multiplier == 1 else {}

    def _scaled(self, channels: int) -> int:
        """The nearest multiple of 8, at least 8."""
        return max(8, 8 * round(channels * self.width_multiplier / 8))

    def _block(self, site: BlockSite, operation: Operation, mid_channels: int) -> Graph:
        shape = (self.batch, site.in_channels, site.side, site.side)
        activation = self.stages[site.stage].activation
        return _inverted_residual(
            shape, operation, mid_channels, site.out_channels, site.stride, activation, self.dtype
        )


def _mid_channels(operation: Operation, option: int) -> int:
    """Width option -> the operation's mid channels."""
    return option * operation.max_expansion // WIDEST


def _option(operation: Operation, mid_channels: int) -> int:
    """The first width option of an operation's mid channels."""
    return mid_channels * WIDEST // operation.max_expansion


def _halved(side: int) -> int:
    """Side of the map behind a convolution of stride 2, padded by kernel_size // 2."""
    return -(-side // 2)


# Blocks of one shape share their graphs, and every oracle walks all slots: at width_step=1 61,000 of 21,954 graphs.


@lru_cache(maxsize=32768)
def _inverted_residual(
    shape: Shape,
    operation: Operation,
    mid_channels: int,
    out_channels: int,
    stride: int,
    activation: Op,
    dtype: DType,
) -> Graph:
    b = GraphBuilder(dtype)
    y = inverted_residual(
        b,
        b.input("x", shape),
        mid_channels,
        out_channels,
        kernel_size=operation.kernel_size,
        stride=stride,
        squeeze_channels=operation.squeeze * shape[1] or None,
        activation=activation,
        name="",
    )
    return b.build(y)


@lru_cache
def _stem(shape: Shape, channels: int, out_channels: int, dtype: DType) -> Graph:
    b = GraphBuilder(dtype)
    x = conv_bn_act(b, b.input("x", shape), channels, 3, stride=2, name="first")
    x = inverted_residual(
        b, x, channels, out_channels, squeeze_channels=STEM_SQUEEZE, activation=RELU, expand=False, name="second"
    )
    return b.build(x)


@lru_cache
def _head(shape: Shape, channels: int, num_classes: int, dtype: DType) -> Graph:
    b = GraphBuilder(dtype)
    x = conv_bn_act(b, b.input("x", shape), channels, activation=SWISH, name="mix")
    return b.build(classifier(b, x, num_classes, name=""))
