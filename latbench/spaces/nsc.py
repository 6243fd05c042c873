"""IRLAS's space: one block written as a network structure code, repeated in a fixed stack.

Codes: Zhong et al., CVPR 2018 (BlockQNN), table 1. Layers, mobile stack and the published block: Guo et al., CVPR 2019
(IRLAS), released code, exact to the last parameter; the CIFAR stack is BlockQNN's.

What neither published, and is decided here: binary layers read two distinct earlier layers and stand at index 2 or
later, as does the terminal; pooling and identity keep their width; a concatenation that is read goes through a 1x1
convolution (ReLU, convolution, BN) to the stage's width. So does every output of a block that is wider than its stage:
else a stage of 4 identical blocks whose layers hand their input on would be 9^4 times as wide at its end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import combinations
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from latbench.errors import UsageError, shown
from latbench.graph.blocks import batch_norm, classifier, conv2d, conv_bn_act, irlas_conv, relu_conv_bn, under
from latbench.graph.ir import DType, Graph, GraphBuilder, Node, Weights
from latbench.graph.ops import Add, AvgPool2d, Concat, Conv2d, Identity, MaxPool2d, Shape
from latbench.spaces.base import MAX_CHANNELS, MAX_LAYERS, Arch, Decision, SearchSpace

Code = tuple[int, int, int, int, int]  # index from 1, type, kernel, predecessors (0: the block's input)

CONV, MAX_POOL, AVG_POOL, IDENTITY, ADD, CONCAT, TERMINAL = range(1, 8)  # types
KINDS = (  # name, type, kernel: in the order of an index's options
    *(("conv1", CONV, 1), ("conv3", CONV, 3), ("conv5", CONV, 5)),
    *(("max1", MAX_POOL, 1), ("max3", MAX_POOL, 3), ("avg1", AVG_POOL, 1), ("avg3", AVG_POOL, 3)),
    *(("identity", IDENTITY, 0), ("add", ADD, 0), ("concat", CONCAT, 0), ("terminal", TERMINAL, 0)),
)
KIND_OF = {(kind, kernel): i for i, (_, kind, kernel) in enumerate(KINDS)}  # (type, kernel) -> place in KINDS
BINARY = (ADD, CONCAT)
FIRST_BINARY = FIRST_TERMINAL = 2  # least index

IRLAS_BLOCK: tuple[Code, ...] = (
    *((1, CONV, 1, 0, 0), (2, CONV, 3, 0, 0), (3, ADD, 0, 0, 2), (4, CONV, 5, 0, 0), (5, CONV, 1, 3, 0)),
    (6, TERMINAL, 0, 0, 0),
)
RESNEXT: tuple[Code, ...] = (  # Xie et al. 2017: its grouped 3x3 written as one convolution
    *((1, CONV, 1, 0, 0), (2, CONV, 3, 1, 0), (3, CONV, 1, 2, 0), (4, ADD, 0, 0, 3), (5, TERMINAL, 0, 0, 0)),
)
RESNEXT_SPLIT: tuple[Code, ...] = (  # the same with two visible paths
    *((1, CONV, 1, 0, 0), (2, CONV, 3, 1, 0), (3, CONV, 1, 2, 0)),
    *((4, CONV, 1, 0, 0), (5, CONV, 3, 4, 0), (6, CONV, 1, 5, 0)),
    *((7, ADD, 0, 3, 6), (8, ADD, 0, 0, 7), (9, TERMINAL, 0, 0, 0)),
)
PUBLISHED = {"irlas-mobile": IRLAS_BLOCK, "resnext": RESNEXT, "resnext-split": RESNEXT_SPLIT}

STACKS = {  # widths and repeats of the stages
    "mobile": ((32, 128, 256, 512), (1, 1, 4, 1)),
    "cifar": ((32, 64, 128), (4, 4, 4)),
}
MAX_INDEX = 64  # a layer has t^2 + 7 t legal codes at index t, 97,000 in all at this
_NUMBER = r"\s*(\d{1,9})\s*"
CODE_TEXT = re.compile(rf"\({','.join([_NUMBER] * 5)}\)")


@lru_cache(maxsize=64)
def legal_codes(index: int, max_index: int) -> tuple[Code, ...]:
    """What may stand at `index` (from 1) whatever came before; at `max_index` the terminal alone.

    8 t + t (t - 1) + [t >= 2] codes at t = `index`: unary kinds by predecessor, binary ones by pair, the terminal.
    """
    terminal = ((index, TERMINAL, 0, 0, 0),)
    if index == max_index:
        return terminal
    unary = tuple((index, t, k, p, 0) for _, t, k in KINDS if t not in (*BINARY, TERMINAL) for p in range(index))
    if index < FIRST_BINARY:
        return unary
    binary = tuple((index, t, 0, p, q) for t in BINARY for p, q in combinations(range(index), 2))
    return (*unary, *binary, *terminal) if index >= FIRST_TERMINAL else (*unary, *binary)


def predecessors(code: Code) -> tuple[int, ...]:
    """Indices that a layer reads: none, one or two."""
    _, kind, _, first, second = code
    if kind == TERMINAL:
        return ()
    return (first, second) if kind in BINARY else (first,)


def leaves(codes: Sequence[Code]) -> tuple[int, ...]:
    """Indices of the layers that no layer reads, ascending: their concatenation is the block's output."""
    read = {source for code in codes for source in predecessors(code)}
    return tuple(code[0] for code in codes if code[1] != TERMINAL and code[0] not in read)


def density(codes: Sequence[Code]) -> float:
    """Edges per node of a block: its nodes are input, layers and output, and an edge leads from each leaf to the last.

    BlockQNN, section 3.3.
    """
    layers = [code for code in codes if code[1] != TERMINAL]
    return (sum(len(predecessors(code)) for code in layers) + len(leaves(codes))) / (len(layers) + 2)


def parse_codes(text: str) -> tuple[Code, ...]:
    """ "(1,1,3,0,0)(2,7,0,0,0)" -> codes, not checked for legality. Raises UsageError on other text."""
    found: list[Code] = []
    for parts in CODE_TEXT.findall(text):
        index, kind, kernel, first, second = map(int, parts)
        found.append((index, kind, kernel, first, second))
    if not found or re.sub(r"[\s,;]", "", CODE_TEXT.sub("", text)):
        raise UsageError(
            f"{shown(text)} is no network structure code: write (index,type,kernel,pred1,pred2) for each layer"
        )
    return tuple(found)


def format_codes(codes: Sequence[Code]) -> str:
    """Inverse of ``parse_codes``."""
    return "".join(f"({','.join(map(str, code))})" for code in codes)


@dataclass(frozen=True)
class IRLASSpace(SearchSpace):
    """A block of at most `max_index` - 1 layers, in a stack. It does not factor: only whole networks are measured.

    One decision per layer index, whose options are the codes that are legal there; behind a terminal nothing counts
    (``canonical`` writes 0). An architecture is also read from its code, ``(1,1,1,0,0)(2,1,3,0,0)...``.

    `widths` and `repeats` of the stages are texts such as "32,128,256,512"; "" means the stack's own. `conv_kind`:
    "sep", the depthwise and pointwise convolutions of IRLAS-mobile, or "dense", BlockQNN's. `scales`: whether a
    separable 1x1 convolution keeps its 1x1 depthwise part, a factor per channel that ``fold_scales`` removes.
    """

    stack: str = "mobile"  # or "cifar"
    max_index: int = 10
    conv_kind: str = "sep"
    scales: bool = True
    widths: str = ""
    repeats: str = ""
    num_classes: int = 1000

    name: ClassVar[str] = "irlas"
    whole_figures: ClassVar[bool] = True  # oracles read the graphs of whole networks: one takes 2 ms to build

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stack not in STACKS:
            raise UsageError(f"{self.name}: unknown stack {shown(self.stack)}: {' or '.join(STACKS)}")
        if self.conv_kind not in ("sep", "dense"):
            raise UsageError(f"{self.name}: unknown conv_kind {shown(self.conv_kind)}: sep or dense")
        if self.max_index < FIRST_TERMINAL:
            raise UsageError(f"{self.name}: max_index must be at least {FIRST_TERMINAL}, got {shown(self.max_index)}")
        if self.num_classes < 1:
            raise UsageError(f"{self.name}: num_classes must be at least 1, got {shown(self.num_classes)}")
        self._at_most(MAX_INDEX, "max_index")
        self._at_most(MAX_CHANNELS, "num_classes")
        if self.resolution < 2 ** (len(self.stages) - 1):
            raise UsageError(f"{self.name}: {self.resolution} pixels cannot be halved in {len(self.stages)} stages")

    @cached_property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """(width, repeats) of each. Raises UsageError where the two settings do not fit."""
        widths, repeats = STACKS[self.stack]
        widths = _counts(self.widths, "widths") if self.widths else widths
        repeats = _counts(self.repeats, "repeats") if self.repeats else repeats
        if len(widths) != len(repeats):
            raise UsageError(
                f"{self.name}: {len(widths)} widths and {len(repeats)} repeats: give one of each per stage"
            )
        if max(widths) > MAX_CHANNELS or sum(repeats) > MAX_LAYERS:
            raise UsageError(f"{self.name}: stages have at most {MAX_CHANNELS} channels and {MAX_LAYERS} blocks in all")
        return tuple(zip(widths, repeats, strict=True))

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        return tuple(
            Decision(f"layer{index}", tuple(map(_told, legal_codes(index, self.max_index))))
            for index in range(1, self.max_index + 1)
        )

    @cached_property
    def published(self) -> Mapping[str, Arch]:
        """IRLAS-mobile's block and the experts, as far as `max_index` has room for them."""
        return {name: self.encode(codes) for name, codes in PUBLISHED.items() if len(codes) <= self.max_index}

    def sample(self, rng: np.random.Generator) -> Arch:
        """Each layer uniform over its legal codes until the terminal is drawn; short blocks are rare."""
        return self.canonical(super().sample(rng))

    def describe(self, arch: Arch) -> str:
        """The block's network structure code."""
        return format_codes(self.codes(arch))

    def canonical(self, arch: Arch) -> Arch:
        """`arch` with 0 behind its terminal: the same network."""
        n_layers = len(self.codes(arch))
        return (*arch[:n_layers], *(0,) * (self.max_index - n_layers))

    def codes(self, arch: Arch) -> tuple[Code, ...]:
        """The block's layers, up to its terminal."""
        self.check(arch)
        found: list[Code] = []
        for index, option in enumerate(arch, 1):
            found.append(legal_codes(index, self.max_index)[option])
            if found[-1][1] == TERMINAL:
                break
        return tuple(found)

    def encode(self, codes: Sequence[Code]) -> Arch:
        """Inverse of ``codes``. Raises UsageError, naming the layer, where one is not legal or no terminal ends it."""
        arch: list[int] = []
        for index, code in enumerate(codes, 1):
            legal = legal_codes(index, self.max_index) if index <= self.max_index else ()
            if code not in legal:
                raise UsageError(f"{self.name}: {code} cannot be layer {index} of at most {self.max_index}")
            arch.append(legal.index(code))
        if [i for i, code in enumerate(codes, 1) if code[1] == TERMINAL] != [len(codes)]:
            raise UsageError(f"{self.name}: a block ends with its terminal, (index,{TERMINAL},0,0,0)")
        return (*arch, *(0,) * (self.max_index - len(arch)))

    def parse_arch(self, text: str) -> Arch:
        """Also takes a network structure code."""
        return self.encode(parse_codes(text)) if text.strip().startswith("(") else super().parse_arch(text)

    def block(self, arch: Arch, width: int, shape: Shape) -> Graph:
        """The block alone, at a stage's width, on an input of this shape."""
        return _block(self.codes(arch), shape, width, self.conv_kind, self.scales, self.dtype)

    def network(self, arch: Arch) -> Graph:
        """Stem, stages of identical blocks, classifier; no activation before its pooling."""
        codes = self.codes(arch)
        b = GraphBuilder(self.dtype)
        x = b.input("x", self.input_shape)
        mobile = self.stack == "mobile"
        x = conv_bn_act(b, x, self.stages[0][0], 3, stride=2 if mobile else 1, name="stem")
        for i, (width, repeats) in enumerate(self.stages, 1):
            if mobile:
                x = _entry(b, x, width, first=i == 1, name=f"stage{i}/entry")
            elif i > 1:
                x = b.add(MaxPool2d(2, 2), x, name=f"stage{i}/entry")
            for j in range(1, repeats + 1):
                graph = _block(codes, b.shape(x), width, self.conv_kind, self.scales, self.dtype)
                (x,) = b.inline(graph, x, prefix=f"stage{i}/block{j}")
        return b.build(classifier(b, x, self.num_classes, name="head"))


def _counts(text: str, name: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = (0,)
    if min(counts) < 1:
        raise UsageError(
            f"{IRLASSpace.name}: {name} must be whole numbers above zero such as 32,64,128, got {shown(text)}"
        )
    return counts


def _told(code: Code) -> str:
    """A code for people: "conv3<-1", "add<-0+2", "terminal"."""
    title = KINDS[KIND_OF[code[1:3]]][0]
    return f"{title}<-{'+'.join(map(str, predecessors(code)))}" if code[1] != TERMINAL else title


def _entry(b: GraphBuilder, x: str, width: int, *, first: bool, name: str) -> str:
    """Halves the map: a dense 3x3, before which all stages but the first mix their channels; biases as published."""
    if not first:
        x = relu_conv_bn(b, x, width, bias=True, name=under(name, "mix"))
    return relu_conv_bn(b, x, width, 3, stride=2, bias=True, name=under(name, "reduce"))


# ---- a block ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _block(
    codes: tuple[Code, ...], shape: Shape, width: int, conv_kind: str, scales: bool, dtype: DType
) -> Graph:  # fmt: skip
    b = GraphBuilder(dtype)
    tensors = {0: b.input("x", shape)}
    ends = leaves(codes)
    for code in codes[:-1]:
        index, kind, kernel = code[:3]
        sources = [tensors[source] for source in predecessors(code)]
        name = f"layer{index}"
        if kind == CONV:
            x = _conv(b, sources[0], width, kernel, conv_kind, scales, name)
        elif kind in (MAX_POOL, AVG_POOL):
            pool = MaxPool2d if kind == MAX_POOL else AvgPool2d
            x = b.add(pool(kernel, 1, kernel // 2), sources[0], name=name)
        elif kind == IDENTITY:
            x = b.add(Identity(), sources[0], name=name)
        elif kind == ADD:
            x = _add(b, sources, name)
        else:
            x = b.add(Concat(), *sources, name=name)
        narrow = b.shape(x)[1] > width if index in ends else kind == CONCAT and b.shape(x)[1] != width
        tensors[index] = relu_conv_bn(b, x, width, name=under(name, "narrow")) if narrow else x
    outputs = [tensors[index] for index in ends]
    return b.build(b.add(Concat(), *outputs, name="out") if len(outputs) > 1 else outputs[0])


def _conv(b: GraphBuilder, x: str, width: int, kernel: int, conv_kind: str, scales: bool, name: str) -> str:
    if conv_kind == "dense" or (kernel == 1 and not scales):
        return relu_conv_bn(b, x, width, kernel, name=name)
    return irlas_conv(b, x, width, kernel, name=name)


def _add(b: GraphBuilder, sources: Sequence[str], name: str) -> str:
    """Narrower operands are lifted to the widest by a 1x1 convolution and BN, without activation."""
    widest = max(b.shape(x)[1] for x in sources)
    terms = []
    for side, x in zip(("left", "right"), sources, strict=True):
        if b.shape(x)[1] < widest:
            lift = under(name, side)
            x = batch_norm(b, conv2d(b, x, widest, name=under(lift, "conv")), name=under(lift, "bn"))
        terms.append(x)
    return b.add(Add(), *terms, name=under(name, "add"))


def fold_scales(graph: Graph, weights: Weights) -> tuple[Graph, dict[str, NDArray[Any]]]:
    """The same function with every 1x1 depthwise convolution multiplied into the pointwise one that alone reads it.

    On a network of IRLASSpace, before or after batch norms are folded, it gives that of `scales` false.
    """
    nodes = {node.name: node for node in graph.nodes}
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for source in node.inputs:
            readers.setdefault(source, []).append(node)
    gone: dict[str, str] = {}  # pointwise -> the scale before it
    for node in graph.nodes:
        scale = nodes.get(node.inputs[0])
        if scale is not None and _is_scale(scale) and len(readers[scale.name]) == 1 and _is_pointwise(node):
            gone[node.name] = scale.name
    kept = [
        replace(node, inputs=nodes[gone[node.name]].inputs) if node.name in gone else node
        for node in graph.nodes
        if node.name not in gone.values()
    ]
    folded = replace(graph, nodes=tuple(kept))
    found = {name: np.asarray(weights[name]) for name in folded.weight_shapes()}
    for pointwise, scale_name in gone.items():
        factors = np.asarray(weights[f"{scale_name}.weight"])[:, 0, 0, 0]  # (C,)
        found[f"{pointwise}.weight"] = found[f"{pointwise}.weight"] * factors[None, :, None, None]
    return folded, found


def _is_scale(node: Node) -> bool:
    op = node.op
    square = isinstance(op, Conv2d) and op.groups == op.in_channels == op.out_channels
    return square and isinstance(op, Conv2d) and (op.kernel_size, op.stride, op.bias) == (1, 1, False)


def _is_pointwise(node: Node) -> bool:
    return isinstance(node.op, Conv2d) and (node.op.kernel_size, node.op.groups) == (1, 1)
