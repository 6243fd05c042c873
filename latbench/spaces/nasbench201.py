"""NAS-Bench-201's cells (Dong and Yang, ICLR 2020): the space whose 15,625 networks have published accuracies.

Definitions as released in D-X-Y/AutoDL-Projects (``cell_operations.py``, ``cell_infers/``), in evaluation mode.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from types import MappingProxyType
from typing import ClassVar

from latbench.errors import UsageError, shown
from latbench.graph.blocks import RELU, batch_norm, classifier, conv2d, conv_bn_act, relu_conv_bn
from latbench.graph.ir import DType, Graph, GraphBuilder
from latbench.graph.ops import Add, AvgPool2d, Shape, Zero
from latbench.spaces.base import MAX_CHANNELS, MAX_LAYERS, Arch, Decision, FactoredSpace, Site

OPTIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = ((1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2))  # (node, earlier node), in the order of the decisions
NODE_SCOPES = {1: (0,), 2: (1, 2), 3: (3, 4, 5)}  # node -> decisions of its edges
NONE = OPTIONS.index("none")
CELL_TEXT = re.compile(r"\|(\w+)~0\|\+\|(\w+)~0\|(\w+)~1\|\+\|(\w+)~0\|(\w+)~1\|(\w+)~2\|")

PUBLISHED: Mapping[str, Arch] = MappingProxyType(  # genotypes.py of the released code
    {
        "resnet": (3, 0, 3, 1, 0, 1),
        "all_c3x3": (3,) * 6,
        "all_c1x1": (2,) * 6,
        "all_idnt": (1,) * 6,
    }
)


@dataclass(frozen=True)
class _StageSite(Site):
    stage: int  # 0 to 2
    node: int = 0  # of a cell; 0: the reduction before the stage


@dataclass(frozen=True)
class NASBench201Space(FactoredSpace):
    """One cell of 4 nodes and 6 edges, repeated in 3 stages of `num_cells`; a residual block halves the map between.

    A node is the sum of its edges' operations on earlier nodes; it is a site of its own, which keeps scopes at 3
    decisions. ``none`` adds nothing to a sum; a node of nothing else is its cell's input times 0. Nodes that do not
    reach the cell's output have blocks, but are left out of the network (``canonical`` silences their edges).
    """

    resolution: int = 32  # a multiple of 4
    num_cells: int = 5  # per stage
    channels: int = 16  # of the first stage
    num_classes: int = 10

    name: ClassVar[str] = "nasbench201"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resolution % 4:  # the residual block's two paths round odd sides differently
            raise UsageError(f"{self.name}: resolution must be a multiple of 4, got {self.resolution}")
        if min(self.num_cells, self.channels, self.num_classes) < 1:
            raise UsageError(f"{self.name}: num_cells, channels and num_classes must be at least 1")
        self._at_most(MAX_LAYERS, "num_cells")
        self._at_most(MAX_CHANNELS, "channels", "num_classes")

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        return tuple(Decision(f"{node}<-{source}", OPTIONS) for node, source in EDGES)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        sites = [Site("stem", (), "stem")]
        for stage in range(3):
            if stage:
                sites.append(_StageSite(f"reduction{stage}", (), "residual s2", stage))
            for cell, (node, scope) in product(range(1, self.num_cells + 1), NODE_SCOPES.items()):
                name = f"stage{stage + 1}/cell{cell}/node{node}"
                sites.append(_StageSite(name, scope, "cell node", stage, node))
        return (*sites, Site("head", (), "head"))

    @property
    def published(self) -> Mapping[str, Arch]:
        """The reference cells of the released code."""
        return PUBLISHED

    def parse_arch(self, text: str) -> Arch:
        """Also takes NAS-Bench-201's own text, ``|op~0|+|op~0|op~1|+|op~0|op~1|op~2|``."""
        if not text.strip().startswith("|"):
            return super().parse_arch(text)
        found = CELL_TEXT.fullmatch(text.strip())
        if found is None or set(found.groups()) - set(OPTIONS):
            raise UsageError(
                f"{self.name}: {shown(text)} is no cell: write |op~0|+|op~0|op~1|+|op~0|op~1|op~2|, op one of"
                f" {', '.join(OPTIONS)}"
            )
        return tuple(OPTIONS.index(op) for op in found.groups())

    def canonical(self, arch: Arch) -> Arch:
        """`arch` with the edges that do not reach the cell's output set to ``none``: the same network graph."""
        self.check(arch)
        live = {3}
        for node in (3, 2):
            live |= {EDGES[i][1] for i in NODE_SCOPES[node] if node in live and arch[i] != NONE}
        return tuple(option if node in live else NONE for (node, _), option in zip(EDGES, arch, strict=True))

    def block(self, site: Site, picks: tuple[int, ...]) -> Graph | None:
        if isinstance(site, _StageSite):
            if site.node:
                return _node(self._stage_shape(site.stage), picks, self.dtype)
            return _reduction(self._stage_shape(site.stage - 1), self.dtype)
        if site.name == "head":
            return _head(self._stage_shape(2), self.num_classes, self.dtype)
        return _stem(self.input_shape, self.channels, self.dtype)

    def wire(self, b: GraphBuilder, x: str, arch: Arch) -> str:
        nodes = [x]  # of the current cell, its input first
        for site in self.sites:
            if isinstance(site, _StageSite) and site.node == 1:
                nodes = nodes[-1:]
            block = self.block(site, self.picks(site, arch))
            if block is None:  # a lone skip
                (source,) = (EDGES[i][1] for i in site.scope if arch[i] != NONE)
                nodes.append(nodes[source])
            else:
                tensors = {"x": nodes[-1], **{f"n{i}": node for i, node in enumerate(nodes)}}
                nodes += b.inline(block, *(tensors[name] for name, _ in block.inputs), prefix=site.name)
        return nodes[-1]

    def _stage_shape(self, stage: int) -> Shape:
        side = self.resolution >> stage
        return (self.batch, self.channels << stage, side, side)


@lru_cache(maxsize=8192)
def _node(shape: Shape, picks: tuple[int, ...], dtype: DType) -> Graph | None:
    """The sum of a node's live edges; inputs n0, n1, n2 as far as it reads them; None for a lone skip.

    Edges are taken in the order of their operations: sums of the same operations cost the same, whichever nodes they
    read, and so get one key (34 blocks a stage, not 84).
    """
    b = GraphBuilder(dtype)
    live = sorted((pick, source) for source, pick in enumerate(picks) if pick != NONE)
    if not live:
        return b.build(b.add(Zero(), b.input("n0", shape), name="zero"))
    terms = []
    for pick, source in live:
        x = b.input(f"n{source}", shape)
        option = OPTIONS[pick]
        if option.startswith("nor_conv"):
            x = relu_conv_bn(b, x, shape[1], int(option[-1]), name=f"edge{source}")
        elif option == "avg_pool_3x3":
            x = b.add(AvgPool2d(3, 1, 1), x, name=f"edge{source}")
        terms.append(x)
    if len(terms) == 1:
        return None if OPTIONS[live[0][0]] == "skip_connect" else b.build(*terms)
    return b.build(b.add(Add(), *terms, name="sum"))


@lru_cache
def _stem(shape: Shape, out_channels: int, dtype: DType) -> Graph:
    b = GraphBuilder(dtype)
    return b.build(conv_bn_act(b, b.input("x", shape), out_channels, 3, activation=None, name=""))


@lru_cache
def _reduction(shape: Shape, dtype: DType) -> Graph:
    """The released ``ResNetBasicblock`` at stride 2: channels doubled, map halved."""
    b = GraphBuilder(dtype)
    x = b.input("x", shape)
    width = 2 * shape[1]
    h = relu_conv_bn(b, x, width, 3, stride=2, name="conv_a")
    h = relu_conv_bn(b, h, width, 3, name="conv_b")
    shortcut = b.add(AvgPool2d(2, 2), x, name="shortcut/pool")
    shortcut = conv2d(b, shortcut, width, name="shortcut/conv")
    return b.build(b.add(Add(), shortcut, h, name="sum"))


@lru_cache
def _head(shape: Shape, num_classes: int, dtype: DType) -> Graph:
    b = GraphBuilder(dtype)
    x = batch_norm(b, b.input("x", shape), name="bn")
    x = b.add(RELU, x, name="act")
    return b.build(classifier(b, x, num_classes, name=""))
