"""Sets of modules per layer, chosen anew for every image: the space of InstaNAS (Cheng et al., AAAI 2020).

Layout as released in AnjieCheng/InstaNAS: MobileNet-v2's stages between a fixed stem and a fixed head, each layer the
plain sum of any of five modules. What differs from the released code:

* Global pooling; theirs has windows that fail on CIFAR's last map, or average a corner of ImageNet's.
* Residuals where shapes allow the identity, in every phase; theirs pretrains with projections and searches without.
* A stage's first layer with nothing selected runs module 4, whatever else the batch holds; theirs runs module 0 where
  all rows are empty.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import ClassVar, NamedTuple

from latbench.errors import UsageError, shown
from latbench.graph.blocks import RELU, RELU6, classifier, conv_bn_act, inverted_residual
from latbench.graph.ir import DType, Graph, GraphBuilder
from latbench.graph.ops import Add, Shape
from latbench.spaces.base import MAX_CHANNELS, MAX_LAYERS, Arch, Decision, FactoredSpace, Site


class Stage(NamedTuple):
    """Layers of one width."""

    out_channels: int
    n_layers: int  # the first carries the stride and changes the channels
    stride: int


class Layout(NamedTuple):
    """A data set's network."""

    strides: tuple[int, ...]  # of the stages' first layers
    stem_stride: int
    resolution: int
    num_classes: int


class Module(NamedTuple):
    """An inverted residual; expansion 0 is the plain pair of 3x3 convolutions."""

    name: str
    kernel_size: int
    expansion: int


CHANNELS, N_LAYERS = (16, 24, 32, 64, 96, 160, 320), (1, 2, 3, 4, 3, 3, 1)
LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "c10": Layout((1, 1, 2, 2, 1, 2, 1), 1, 32, 10),
        "c100": Layout((1, 1, 2, 2, 1, 2, 1), 1, 32, 100),
        "tiny": Layout((1, 2, 2, 2, 1, 2, 1), 1, 64, 200),
        "imagenet": Layout((1, 2, 2, 2, 1, 2, 1), 2, 224, 1000),
    }
)
MODULES = (  # in the order of the released code
    Module("ir_k3_e6", 3, 6),
    Module("ir_k3_e3", 3, 3),
    Module("ir_k5_e6", 5, 6),
    Module("ir_k5_e3", 5, 3),
    Module("basic", 3, 0),
)
DEFAULT = 4  # what an empty first layer of a stage runs
N_SUBSETS = 1 << len(MODULES)
SUBSETS = tuple(
    "+".join(module.name for i, module in enumerate(MODULES) if subset >> i & 1) or "none"
    for subset in range(N_SUBSETS)
)
_STAGE = re.compile(r"(\d{1,9})x(\d{1,9})(?:s([12]))?")


@dataclass(frozen=True)
class LayerSite(Site):
    """One searchable layer; its scope is its subset of modules."""

    stage: int  # from 0
    position: int  # in its stage, from 0
    in_channels: int
    out_channels: int
    stride: int
    side: int  # of its input map

    @property
    def first(self) -> bool:
        """Whether it is its stage's first, which cannot be left out."""
        return self.position == 0


@dataclass(frozen=True)
class InstaNASSpace(FactoredSpace):
    """A subset of five modules for each of 17 layers; option b has module i where bit i of b is set.

    A layer's output is the sum of its modules' outputs. Option 0, nothing, passes the layer's input through, which is
    depth; in a stage's first layer it is module 4, another spelling of option 16 (``canonical``). One site per layer:
    a table holds the measured latency of every *subset* as one block, which a sum over modules only comes near.

    `layout` names a data set (``LAYOUTS``) and gives what is left at 0 or empty: resolution, num_classes, plan. `plan`
    is a network of one's own, stages as CHANNELSxLAYERS with s2 where the first layer halves the map:
    ``16x1,24x2s2,32x2s2``. Raises UsageError where it reads otherwise.
    """

    resolution: int = 0  # pixels; 0: the layout's
    layout: str = "c10"
    num_classes: int = 0  # 0: the layout's
    plan: str = ""
    stem_channels: int = 32
    head_channels: int = 1280

    name: ClassVar[str] = "instanas"

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise UsageError(f"{self.name}: unknown layout {shown(self.layout)}: {', '.join(LAYOUTS)}")
        layout = LAYOUTS[self.layout]
        strides = zip(CHANNELS, N_LAYERS, layout.strides, strict=True)
        own = ",".join(f"{c}x{n}" + ("s2" if s == 2 else "") for c, n, s in strides)
        for field, value in (("resolution", layout.resolution), ("num_classes", layout.num_classes), ("plan", own)):
            object.__setattr__(self, field, getattr(self, field) or value)
        super().__post_init__()
        if min(self.num_classes, self.stem_channels, self.head_channels) < 1:
            raise UsageError(f"{self.name}: num_classes, stem_channels and head_channels must be at least 1")
        self._at_most(MAX_CHANNELS, "num_classes", "stem_channels", "head_channels")
        if not self.stages or min(min(stage) for stage in self.stages) < 1:
            raise UsageError(
                f"{self.name}: a plan needs stages of at least one channel and one layer, got {shown(self.plan)}"
            )
        if max(s.out_channels for s in self.stages) > MAX_CHANNELS or sum(s.n_layers for s in self.stages) > MAX_LAYERS:
            raise UsageError(f"{self.name}: a plan has at most {MAX_CHANNELS} channels and {MAX_LAYERS} layers")

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """As `plan` tells them."""
        stages = []
        for text in self.plan.split(","):
            match = _STAGE.fullmatch(text.strip())
            if match is None:
                raise UsageError(
                    f"{self.name}: {shown(text)} is no stage of a plan: write CHANNELSxLAYERS, or CHANNELSxLAYERSs2 "
                    "where its first layer halves the map (16x1,24x2s2,32x3s2)"
                )
            stages.append(Stage(int(match[1]), int(match[2]), int(match[3] or 1)))
        return tuple(stages)

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        return tuple(Decision(site.name, SUBSETS) for site in self.layers)

    @cached_property
    def layers(self) -> tuple[LayerSite, ...]:
        """The searchable layers, in order."""
        sites: list[LayerSite] = []
        side, channels = -(-self.resolution // LAYOUTS[self.layout].stem_stride), self.stem_channels
        for i, stage in enumerate(self.stages):
            for position in range(stage.n_layers):
                stride = 1 if position else stage.stride
                name, kind = f"stage{i + 1}/layer{position + 1}", f"modules s{stride}"
                shape = (channels, stage.out_channels, stride, side)
                sites.append(LayerSite(name, (len(sites),), kind, i, position, *shape))
                side, channels = -(-side // stride), stage.out_channels
        return tuple(sites)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        return (Site("stem", (), "stem"), *self.layers, Site("head", (), "head"))

    @cached_property
    def published(self) -> Mapping[str, Arch]:
        """The whole meta-graph, and its first modules alone, which are nearly MobileNet-v2. Networks of images are not
        published: each has its own."""
        n = len(self.layers)
        return {"meta-graph": (N_SUBSETS - 1,) * n, "mobilenet-v2": (1,) * n, "shallowest": (0,) * n}

    def block(self, site: Site, picks: tuple[int, ...]) -> Graph | None:
        if isinstance(site, LayerSite):
            subset = picks[0] or (1 << DEFAULT if site.first else 0)
            shape = (self.batch, site.in_channels, site.side, site.side)
            return _layer(shape, subset, site.out_channels, site.stride, self.dtype) if subset else None
        if site.name == "stem":
            return _stem(self.input_shape, self.stem_channels, LAYOUTS[self.layout].stem_stride, self.dtype)
        last = self.layers[-1]
        side = -(-last.side // last.stride)
        shape = (self.batch, last.out_channels, side, side)
        return _head(shape, self.head_channels, self.num_classes, self.dtype)

    def canonical(self, arch: Arch) -> Arch:
        """First layers that select nothing spelled as the module they run."""
        self.check(arch)
        return tuple(
            (subset or 1 << DEFAULT) if site.first else subset for site, subset in zip(self.layers, arch, strict=True)
        )


@lru_cache(maxsize=4096)
def _layer(shape: Shape, subset: int, out_channels: int, stride: int, dtype: DType) -> Graph:
    """The modules of a subset and their sum; a module's nodes have the same names in every subset."""
    b = GraphBuilder(dtype)
    x = b.input("x", shape)
    outputs = [_module(b, x, m, out_channels, stride) for i, m in enumerate(MODULES) if subset >> i & 1]
    return b.build(outputs[0] if len(outputs) == 1 else b.add(Add(), *outputs, name="sum"))


def _module(b: GraphBuilder, x: str, module: Module, out_channels: int, stride: int) -> str:
    if not module.expansion:
        y = conv_bn_act(b, x, out_channels, module.kernel_size, stride=stride, name=f"{module.name}/first")
        return conv_bn_act(b, y, out_channels, module.kernel_size, activation=RELU6, name=f"{module.name}/second")
    return inverted_residual(
        b,
        x,
        module.expansion * b.shape(x)[1],
        out_channels,
        kernel_size=module.kernel_size,
        stride=stride,
        activation=RELU,
        residual=stride == 1,
        name=module.name,
    )


@lru_cache
def _stem(shape: Shape, channels: int, stride: int, dtype: DType) -> Graph:
    b = GraphBuilder(dtype)
    return b.build(conv_bn_act(b, b.input("x", shape), channels, 3, stride=stride, name="first"))


@lru_cache
def _head(shape: Shape, channels: int, num_classes: int, dtype: DType) -> Graph:
    b = GraphBuilder(dtype)
    x = conv_bn_act(b, b.input("x", shape), channels, name="mix")
    return b.build(classifier(b, x, num_classes, name=""))
