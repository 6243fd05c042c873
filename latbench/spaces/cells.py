"""RelativeNAS' networks: two searched cells, DARTS-like, stacked as on CIFAR or on ImageNet.

Tan et al., RelativeNAS, TNNLS 2021, and its released code; cells as in Liu et al., DARTS, ICLR 2019, without ``none``,
and both pairs of a node may read the same state by the same operation.

Differs from the released code: a state that no node of a cell reads is not computed (there its preprocessing runs, has
parameters and is counted: 52,272 of the published CIFAR network's). `keep_unread` restores it, times 0: the published
sizes are those. A sum of block latencies counts it either way. Concatenation is always of all four nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import ClassVar

from latbench.errors import UsageError, shown
from latbench.graph.blocks import (
    RELU,
    batch_norm,
    classifier,
    conv2d,
    conv_bn_act,
    darts_op,
    factorized_reduce,
    relu_conv_bn,
)
from latbench.graph.ir import DType, Graph, GraphBuilder
from latbench.graph.ops import Add, AvgPool2d, Concat, Conv2d, Flatten, Linear, Shape, Zero
from latbench.spaces.base import MAX_CHANNELS, MAX_LAYERS, Arch, Decision, FactoredSpace, Site

OPERATIONS = (
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
KINDS = ("normal", "reduce")
NODES = (2, 3, 4, 5)  # a cell's states 0 and 1 are its inputs
DIMS = 4 * len(NODES)  # decisions of one cell: input, operation, input, operation of each node
STEMS = {"cifar": 4, "imagenet": 32}  # stem -> the divisor that a resolution needs

Pairs = Sequence[tuple[str, int]]  # (operation, state), two a node
GENOTYPES: Mapping[str, Mapping[str, Pairs]] = MappingProxyType(
    {
        "relativenas": {  # the released one, of all three data sets
            "normal": (
                *(("sep_conv_3x3", 0), ("dil_conv_5x5", 1), ("sep_conv_3x3", 1), ("sep_conv_3x3", 1)),
                *(("sep_conv_3x3", 1), ("sep_conv_5x5", 1), ("skip_connect", 0), ("sep_conv_3x3", 0)),
            ),
            "reduce": (
                *(("avg_pool_3x3", 1), ("max_pool_3x3", 1), ("dil_conv_5x5", 1), ("max_pool_3x3", 1)),
                *(("avg_pool_3x3", 3), ("skip_connect", 1), ("dil_conv_5x5", 3), ("sep_conv_3x3", 1)),
            ),
        },
        "darts-v1": {  # Liu et al., first order
            "normal": (
                *(("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("skip_connect", 0), ("sep_conv_3x3", 1)),
                *(("skip_connect", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("skip_connect", 2)),
            ),
            "reduce": (
                *(("max_pool_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 2), ("max_pool_3x3", 0)),
                *(("max_pool_3x3", 0), ("skip_connect", 2), ("skip_connect", 2), ("avg_pool_3x3", 0)),
            ),
        },
        "darts-v2": {  # second order
            "normal": (
                *(("sep_conv_3x3", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("sep_conv_3x3", 1)),
                *(("sep_conv_3x3", 1), ("skip_connect", 0), ("skip_connect", 0), ("dil_conv_3x3", 2)),
            ),
            "reduce": (
                *(("max_pool_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 2), ("max_pool_3x3", 1)),
                *(("max_pool_3x3", 0), ("skip_connect", 2), ("skip_connect", 2), ("max_pool_3x3", 1)),
            ),
        },
    }
)
NETWORKS = {  # published networks -> stem, channels, layers, num_classes
    "relativenas-cifar10": ("cifar", 36, 20, 10),
    "relativenas-cifar100": ("cifar", 36, 20, 100),
    "relativenas-imagenet": ("imagenet", 46, 14, 1000),
}


def arch_of(genotype: Mapping[str, Pairs]) -> Arch:
    """Two pairs a node of each cell, in order -> option indices. ``genotype_of`` is its inverse."""
    return tuple(i for kind in KINDS for op, state in genotype[kind] for i in (state, OPERATIONS.index(op)))


def genotype_of(arch: Arch) -> dict[str, list[tuple[str, int]]]:
    """Option indices -> (operation, state) pairs of both cells."""
    pairs = [(OPERATIONS[op], state) for state, op in zip(arch[::2], arch[1::2], strict=True)]
    return {"normal": pairs[: DIMS // 2], "reduce": pairs[DIMS // 2 :]}


@dataclass(frozen=True)
class Cell:
    """One of the stack."""

    name: str
    reduction: bool
    channels: int  # of its states; its output has four times as many
    side: int  # of states 0 and 1
    sources: tuple[tuple[int, int], tuple[int, int]]  # channels and side of the outputs of the two before it

    def stride(self, state: int) -> int:
        """Of an operation that reads this state."""
        return 2 if self.reduction and state < 2 else 1

    def side_of(self, state: int) -> int:
        """Of the map of this state."""
        return self.side // 2 if self.reduction and state >= 2 else self.side

    def decision(self, node: int, pair: int) -> int:
        """Of the state that this pair of a node reads; the next one is its operation."""
        return DIMS * self.reduction + 4 * (node - 2) + 2 * pair


@dataclass(frozen=True)
class CellSite(Site):
    """A place in a cell."""

    cell: Cell
    state: int = 0  # that a preprocessing makes


@dataclass(frozen=True)
class RelativeNASSpace(FactoredSpace):
    """A normal cell and a reduction cell, each of four nodes that sum two (operation, earlier state) pairs.

    Of `layers` cells those at layers // 3 and 2 * layers // 3 reduce: maps halved, channels doubled. The blocks are one
    per operation, width and stride, and of what lies between: preprocessing, sums, concatenation.
    """

    resolution: int = 32  # a multiple of 4, of 32 with ImageNet's stem
    stem: str = "cifar"  # or "imagenet", which divides maps by 8
    channels: int = 36
    layers: int = 20
    num_classes: int = 10
    keep_unread: bool = False

    name: ClassVar[str] = "relativenas"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stem not in STEMS:
            raise UsageError(f"{self.name}: unknown stem {shown(self.stem)}: {' or '.join(STEMS)}")
        if self.resolution % STEMS[self.stem]:  # a reduction halves even sides only
            raise UsageError(
                f"{self.name}: resolution must be a multiple of {STEMS[self.stem]} with the {self.stem} stem,"
                f" got {self.resolution}"
            )
        if self.layers < 3 or self.num_classes < 1 or self.channels < 2 or self.channels % 2:
            raise UsageError(f"{self.name}: layers must be at least 3, num_classes 1, channels even and at least 2")
        self._at_most(MAX_LAYERS, "layers")
        self._at_most(MAX_CHANNELS, "channels", "num_classes")

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        found = []
        for kind in KINDS:
            for node in NODES:
                states = tuple(f"state{i}" for i in range(node))
                for pair in "ab":
                    found.append(Decision(f"{kind}/node{node}/{pair}/input", states))
                    found.append(Decision(f"{kind}/node{node}/{pair}/op", OPERATIONS))
        return tuple(found)

    @property
    def published(self) -> Mapping[str, Arch]:
        """Cells by name, and the published networks that these settings give."""
        cells = {name: arch_of(genotype) for name, genotype in GENOTYPES.items()}
        ours = (self.stem, self.channels, self.layers, self.num_classes)
        return {**cells, **{name: cells["relativenas"] for name, settings in NETWORKS.items() if settings == ours}}

    def parse_arch(self, text: str) -> Arch:
        """Also says which settings a published network needs."""
        name = text.strip()
        if name in NETWORKS and name not in self.published:
            settings = zip(("stem", "channels", "layers", "num_classes"), NETWORKS[name], strict=True)
            wanted = " ".join(f"--set {setting}={value}" for setting, value in settings)
            raise UsageError(f"{self.name}: {name} is a network of other settings: {wanted}")
        return super().parse_arch(text)

    def describe(self, arch: Arch) -> str:
        """Both cells, node by node: operations and the states that they read."""
        self.check(arch)
        cells = []
        for name, pairs in genotype_of(arch).items():
            each = [f"{op}({state})" for op, state in pairs]
            nodes = [" + ".join(each[i : i + 2]) for i in range(0, len(each), 2)]
            cells.append(f"{name} {' | '.join(nodes)}")
        return "; ".join(cells)

    def canonical(self, arch: Arch) -> Arch:
        """The pairs of every node ascending: their sum has no order."""
        self.check(arch)
        return tuple(i for at in range(0, len(arch), 4) for pair in _sorted_pairs(arch[at : at + 4]) for i in pair)

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """The stack, first to last."""
        c, side = self.channels, self.resolution
        before = ((3 * c, side), (3 * c, side))
        if self.stem == "imagenet":
            side //= 8
            before = ((c, 2 * side), (c, side))
        cells: list[Cell] = []
        for i in range(self.layers):
            reduction = i in (self.layers // 3, 2 * self.layers // 3)
            c *= 2 if reduction else 1
            cells.append(Cell(f"cell{i}", reduction, c, side, before))
            side //= 2 if reduction else 1
            before = (before[1], (4 * c, side))
        return tuple(cells)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        stems = [Site(name, (), "stem") for name in (("stem0", "stem1") if self.stem == "imagenet" else ("stem",))]
        return (*stems, *(site for cell in self.cells for site in _cell_sites(cell)), Site("head", (), "head"))

    def block(self, site: Site, picks: tuple[int, ...]) -> Graph | None:
        if not isinstance(site, CellSite):
            return self._end(site.name)
        cell, c = site.cell, site.cell.channels
        out: Shape = (self.batch, c, cell.side_of(2), cell.side_of(2))
        if site.block_type == "operation":
            state, op = picks
            shape = (self.batch, c, cell.side_of(state), cell.side_of(state))
            return operation(shape, OPERATIONS[op], cell.stride(state), self.dtype)
        if site.block_type == "preprocessing":
            channels, side = cell.sources[site.state]
            return _preprocessing((self.batch, channels, side, side), c, side != cell.side, self.dtype)
        return _joined(out, site.block_type == "sum", self.dtype)

    def wire(self, b: GraphBuilder, x: str, arch: Arch) -> str:
        *_, (out, _) = self._stack(b, x, arch)
        return b.inline(self._end("head"), out, prefix="head")[0]

    def with_auxiliary(self, arch: Arch) -> Graph:
        """The network with a second output, of the auxiliary classifier that some trainings have: (N, num_classes).

        It reads the cell behind which maps are smallest first. Raises GraphError where these are too small for it.
        """
        self.check(arch)
        b = GraphBuilder(self.dtype)
        x = b.input("x", self.input_shape)
        outputs = {cell: out for out, cell in self._stack(b, x, arch)}
        between = outputs[self.cells[2 * self.layers // 3]]
        auxiliary = _auxiliary(b.shape(between), self.num_classes, self.stem == "imagenet", self.dtype)
        (logits,) = b.inline(self._end("head"), outputs[self.cells[-1]], prefix="head")
        return b.build(logits, *b.inline(auxiliary, between, prefix="auxiliary"))

    def _stack(self, b: GraphBuilder, x: str, arch: Arch) -> Iterator[tuple[str, Cell]]:
        """Appends stem and cells; each cell's output."""
        if self.stem == "imagenet":
            (before,) = b.inline(self._end("stem0"), x, prefix="stem0")
            (last,) = b.inline(self._end("stem1"), before, prefix="stem1")
        else:
            (before,) = (last,) = b.inline(self._end("stem"), x, prefix="stem")
        for cell in self.cells:
            before, last = last, self._cell(b, cell, (before, last), arch)
            yield last, cell

    def _cell(self, b: GraphBuilder, cell: Cell, sources: tuple[str, str], arch: Arch) -> str:
        states: list[str] = []
        terms: list[tuple[tuple[int, int], str]] = []  # of the node, (state, operation) before the tensor
        read: set[int] = set()
        for site in _cell_sites(cell):
            picks = self.picks(site, arch)
            block = self.block(site, picks)
            if site.block_type == "preprocessing":
                inputs = [sources[site.state]]
            elif site.block_type == "operation":
                inputs = [states[picks[0]]]
                read.add(picks[0])
            elif site.block_type == "sum":
                inputs = [x for _, x in sorted(terms)]
            else:
                inputs = self._keep(b, cell, [x for i, x in enumerate(states[:2]) if i not in read], states)
            (x,) = inputs if block is None else b.inline(block, *inputs, prefix=site.name)
            if site.block_type == "operation":
                terms.append(((picks[0], picks[1]), x))
            else:
                states, terms = [*states, x], []
        return states[-1]

    def _keep(self, b: GraphBuilder, cell: Cell, unread: Sequence[str], states: Sequence[str]) -> list[str]:
        """The nodes; with `keep_unread` what is not read is added to the last one, times 0."""
        nodes = list(states[2:])
        for x in unread if self.keep_unread else ():
            nothing = b.add(Zero(cell.stride(0)), x, name=f"{x}/unread")
            nodes[-1] = b.add(Add(), nodes[-1], nothing, name=f"{nothing}/sum")
        return nodes

    def _end(self, name: str) -> Graph:
        """Stem or head."""
        if name == "head":
            channels, side = 4 * self.cells[-1].channels, self.cells[-1].side_of(2)
            return _head((self.batch, channels, side, side), self.num_classes, self.dtype)
        if name == "stem1":
            side = self.resolution // 4
            return _second_stem((self.batch, self.channels, side, side), self.dtype)
        return _stem(self.input_shape, self.channels, self.stem == "imagenet", self.dtype)


def _sorted_pairs(node: tuple[int, ...]) -> list[tuple[int, ...]]:
    return sorted((node[:2], node[2:]))


@lru_cache(maxsize=256)
def _cell_sites(cell: Cell) -> tuple[CellSite, ...]:
    """In the order of execution."""
    sites = [CellSite(f"{cell.name}/pre{i}", (), "preprocessing", cell, i) for i in (0, 1)]
    for node in NODES:
        for pair in (0, 1):
            first = cell.decision(node, pair)
            sites.append(CellSite(f"{cell.name}/node{node}/{'ab'[pair]}", (first, first + 1), "operation", cell))
        sites.append(CellSite(f"{cell.name}/node{node}/sum", (), "sum", cell))
    return (*sites, CellSite(f"{cell.name}/concat", (), "concatenation", cell))


# ---- blocks ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def operation(shape: Shape, name: str, stride: int, dtype: DType) -> Graph | None:
    """One of ``OPERATIONS`` on a map; None for the identity."""
    b = GraphBuilder(dtype)
    x = b.input("x", shape)
    y = darts_op(b, name, x, stride=stride, name="op")
    return None if y == x else b.build(y)


@lru_cache
def _preprocessing(shape: Shape, channels: int, halve: bool, dtype: DType) -> Graph:
    b = GraphBuilder(dtype)
    x = b.input("x", shape)
    return b.build((factorized_reduce if halve else relu_conv_bn)(b, x, channels, name=""))


@lru_cache
def _joined(shape: Shape, added: bool, dtype: DType) -> Graph:
    """Two terms of a node added, or its four nodes concatenated."""
    b = GraphBuilder(dtype)
    parts = [b.input(f"n{i}", shape) for i in range(2 if added else len(NODES))]
    return b.build(b.add(Add() if added else Concat(), *parts, name="out"))


@lru_cache
def _stem(shape: Shape, channels: int, large: bool, dtype: DType) -> Graph:
    b = GraphBuilder(dtype)
    x = b.input("x", shape)
    if not large:
        return b.build(conv_bn_act(b, x, 3 * channels, 3, activation=None, name=""))
    x = conv_bn_act(b, x, channels // 2, 3, stride=2, name="first")
    return b.build(conv_bn_act(b, x, channels, 3, stride=2, activation=None, name="second"))


@lru_cache
def _second_stem(shape: Shape, dtype: DType) -> Graph:
    b = GraphBuilder(dtype)
    return b.build(relu_conv_bn(b, b.input("x", shape), shape[1], 3, stride=2, name=""))


@lru_cache
def _head(shape: Shape, num_classes: int, dtype: DType) -> Graph:
    b = GraphBuilder(dtype)
    return b.build(classifier(b, b.input("x", shape), num_classes, name=""))


@lru_cache
def _auxiliary(shape: Shape, num_classes: int, large: bool, dtype: DType) -> Graph:
    """As released: stride 2 and no second BN on ImageNet."""
    b = GraphBuilder(dtype)
    x = b.add(RELU, b.input("x", shape), name="act")
    x = b.add(AvgPool2d(5, 2 if large else 3), x, name="pool")
    x = b.add(RELU, batch_norm(b, conv2d(b, x, 128, name="conv1"), name="bn1"), name="act1")
    x = b.add(Conv2d(128, 768, 2), x, name="conv2")
    x = b.add(RELU, x if large else batch_norm(b, x, name="bn2"), name="act2")
    x = b.add(Flatten(), x, name="flatten")
    return b.build(b.add(Linear(b.shape(x)[1], num_classes), x, name="linear"))
