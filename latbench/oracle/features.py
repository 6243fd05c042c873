"""What a network costs on paper: multiply-accumulates, memory traffic, weights and kernels, read from its graphs.

Nearly all of it adds up over sites: it is computed once per block and kept as one array per scope, so that 6,000
architectures take milliseconds and an expectation over choices is exact. In NAS-Bench-201 a runtime may or may not
execute the operations that its output does not read, which does not add up: ``views`` gives both accounts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latbench.errors import UsageError
from latbench.graph.ir import Graph
from latbench.graph.ops import AdaptiveAvgPool2d, Conv2d, Crop, Flatten, Identity, Op
from latbench.oracle.base import Archs, Floats, check_archs
from latbench.spaces.base import Arch, FactoredSpace, SearchSpace
from latbench.spaces.nasbench201 import EDGES, NODE_SCOPES, NASBench201Space

Ints = NDArray[np.int64]
QUANTITIES = ("kernels", "macs", "bytes", "weights")
MAX_BLOCKS = 600  # distinct blocks: beyond it (widths), a figure per block says less than its sizes do
N_WHOLE = 256  # sampled networks whose figures stand for those of a space that does not factor
_BYTES = {"float32": 4, "float16": 2}
_FREE = (Flatten, Identity, Crop)  # views: no kernel runs


@dataclass(frozen=True, eq=False)
class Additive:
    """(M,) figures of an architecture, each a sum over scopes."""

    names: tuple[str, ...]  # (M,) "total/macs", "kind/depthwise/bytes", "level2/kernels", "block17/kernels"
    constant: Floats  # (M,)
    parts: tuple[tuple[tuple[int, ...], Floats], ...]  # (scope, (K_1, ..., K_s, M))

    def of(self, archs: Ints, live: Sequence[NDArray[np.bool_]] | None = None) -> Floats:
        """(N, D) -> (N, M); `live`: per part (N,), whether its sites are in the network."""
        total = np.tile(self.constant, (len(archs), 1))
        for i, (scope, values) in enumerate(self.parts):
            found = values[tuple(archs[:, d] for d in scope)]
            total += found if live is None else found * live[i][:, None]
        return total

    def expected(self, p: Any) -> Any:
        """(..., D, K) probabilities, numpy or torch -> (..., M). Exact."""
        make = p.new_tensor if hasattr(p, "new_tensor") else np.asarray
        total: Any = make(self.constant)
        for scope, values in self.parts:
            total = total + _contract(p, scope, make(values))
        return total

    def covariance(self, p: Any) -> Any:
        """(..., D, K) probabilities, numpy or torch -> (..., M) covariance of each figure with the sum of all.

        By main effects of the decisions, and interactions within a scope (Hoeffding 1948): exact where no two scopes
        share more than one decision.
        """
        make = p.new_tensor if hasattr(p, "new_tensor") else np.asarray
        total: Any = 0.0
        main: dict[int, Any] = {}  # decision -> (..., K_d, M)
        for scope, array in self.parts:
            values = make(array)
            joint = _contract(p, scope, values * values.sum(-1)[..., None])
            mean = _contract(p, scope, values)
            total = total + joint - mean * mean.sum(-1)[..., None]
            for i, d in enumerate(scope):
                effect = _given(p, scope, values, i) - mean[..., None, :]
                total = total - _joint(p[..., d, : effect.shape[-2]], effect)
                main[d] = main[d] + effect if d in main else effect
        for d, effect in main.items():
            total = total + _joint(p[..., d, : effect.shape[-2]], effect)
        return total

    def combine(self, matrix: Floats, shift: Floats) -> Additive:
        """The figures `x @ matrix + shift`, nameless: (M, R) and (R,)."""
        parts = tuple((scope, values @ matrix) for scope, values in self.parts)
        return Additive(("",) * matrix.shape[1], self.constant @ matrix + shift, parts)

    def take(self, columns: Sequence[int]) -> Additive:
        """Some of the figures."""
        names = tuple(self.names[i] for i in columns)
        parts = tuple((scope, values[..., list(columns)]) for scope, values in self.parts)
        return Additive(names, self.constant[list(columns)], parts)


def _contract(p: Any, scope: tuple[int, ...], values: Any) -> Any:
    """Expectation of (K_1, ..., K_s, M) under its decisions' rows: (..., D, K) -> (..., M)."""
    shape = tuple(values.shape)
    found = p[..., scope[0], : shape[0]] @ values.reshape(shape[0], -1)
    for d, k in zip(scope[1:], shape[1:], strict=False):
        found = found.reshape(*found.shape[:-1], k, -1)
        found = (p[..., d, None, :k] @ found)[..., 0, :]
    return found


def _given(p: Any, scope: tuple[int, ...], values: Any, i: int) -> Any:
    """Expectation of (K_1, ..., K_s, M) given the i-th decision: (..., D, K) -> (..., K_i, M)."""
    if len(scope) == 1:
        return values
    order = [j for j in range(len(scope)) if j != i]
    axes = (*order, i, len(scope))
    permuted = values.permute(*axes) if hasattr(values, "permute") else values.transpose(*axes)
    n, m = permuted.shape[-2:]
    found = _contract(p, tuple(scope[j] for j in order), permuted.reshape(*permuted.shape[:-2], n * m))
    return found.reshape(*found.shape[:-1], n, m)


def _joint(p: Any, effect: Any) -> Any:
    """Second moments with the sum over figures: (..., K), (..., K, M) -> (..., M)."""
    return (p[..., None] * effect * effect.sum(-1)[..., None]).sum(-2)


def kind(op: Op) -> str:
    """The kind of kernel that runs `op`: convolutions by shape, everything else by class."""
    if not isinstance(op, Conv2d):
        return type(op).__name__
    if op.groups == op.in_channels and op.groups > 1:
        return "depthwise"
    size = "pointwise" if op.kernel_size == 1 else "dense"
    return f"grouped {size}" if op.groups > 1 else size


def costs(block: Graph) -> Iterator[tuple[str, int, Floats]]:
    """(kind, side of its output map, (4,) in the order of QUANTITIES) of every kernel, in order.

    Bytes are those read and written once: inputs, output, weights. BatchNorm and activations are kernels of their own.
    """
    for node in block.nodes:
        if isinstance(node.op, _FREE):
            continue
        inputs, output = [block.shapes[name] for name in node.inputs], block.shapes[node.name]
        n_weights = sum(math.prod(shape) for shape in node.op.weights().values())
        nbytes = _BYTES[block.dtype] * (sum(math.prod(shape) for shape in (*inputs, output)) + n_weights)
        side = output[2] if len(output) == 4 and not isinstance(node.op, AdaptiveAvgPool2d) else 1
        yield kind(node.op), side, np.array([1.0, node.op.macs(*inputs), nbytes, n_weights])


def identity(block: Graph) -> str:
    """Its operators without the sizes of their maps: one text for a block at two resolutions."""
    return ";".join(str(node.op) for node in block.nodes)


@lru_cache(maxsize=8)
def physical(space: SearchSpace) -> Additive:
    """Every figure of a space's blocks: in all, per kind of kernel, per level (halvings of the map), per block.

    A block's own are left out where there are more than MAX_BLOCKS of them; a space that does not factor has none.
    """
    if not isinstance(space, FactoredSpace):
        return Additive((), np.zeros(0), ())
    seen: dict[str, int] = {}
    for block in space.all_blocks().values():
        seen.setdefault(identity(block), len(seen))

    def figures(block: Graph) -> dict[str, float]:
        found = _sums(block, space.resolution)
        if len(seen) <= MAX_BLOCKS:
            found |= {f"block{seen[identity(block)]}/{q}": found.get(f"total/{q}", 0.0) for q in QUANTITIES[:3]}
        return found

    return additive(space, figures)


def _sums(graph: Graph, resolution: int) -> dict[str, float]:
    """In all, per kind of kernel and per level, each of QUANTITIES."""
    found: dict[str, float] = {}
    for what, side, values in costs(graph):
        level = "level_head" if side == 1 else f"level{max(0, round(math.log2(resolution / side)))}"
        for q, value in zip(QUANTITIES, values.tolist(), strict=True):
            for group in ("total", f"kind/{what}", level):
                found[f"{group}/{q}"] = found.get(f"{group}/{q}", 0.0) + value
    return found


def additive(space: FactoredSpace, figures: Callable[[Graph], Mapping[str, float]]) -> Additive:
    """One array per scope of what `figures` says of the blocks; sites of one scope are added up."""
    known: dict[str, Mapping[str, float]] = {}
    columns: dict[str, int] = {}
    sums: dict[tuple[int, ...], dict[tuple[int, ...], dict[str, float]]] = {}
    for site, picks, block in space.slots():
        if block.key not in known:
            known[block.key] = figures(block)
            for name in known[block.key]:
                columns.setdefault(name, len(columns))
        entry = sums.setdefault(site.scope, {}).setdefault(picks, {})
        for name, value in known[block.key].items():
            entry[name] = entry.get(name, 0.0) + value
    constant, parts = np.zeros(len(columns)), []
    for scope, entries in sums.items():
        values = np.zeros((*(len(space.decisions[d].options) for d in scope), len(columns)))
        for picks, entry in entries.items():
            values[picks][[columns[name] for name in entry]] = list(entry.values())
        if scope:
            parts.append((scope, values))
        else:
            constant = constant + values
    return Additive(tuple(columns), constant, tuple(parts))


# ── spaces that do not factor ────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Whole:
    """(M,) figures of each network, read from its whole graph, or a linear map of them: nothing adds up over sites."""

    space: SearchSpace
    known: tuple[str, ...]  # (M,) what is read
    names: tuple[str, ...]  # (R,) what is given
    matrix: Floats  # (M, R)
    shift: Floats  # (R,)
    parts: tuple[tuple[tuple[int, ...], Floats], ...] = ()

    def of(self, archs: Ints) -> Floats:
        """(N, D) -> (N, R)."""
        rows = [_row(self.space, self.known, tuple(arch)) for arch in archs.tolist()]
        return np.array(rows, np.float64).reshape(len(archs), len(self.known)) @ self.matrix + self.shift

    def expected(self, p: Any) -> Any:
        """(..., D, K) probabilities, all of them 0 or 1 -> (..., R).

        Raises UsageError on others: their expectation would run over every network's graph.
        """
        probs = np.asarray(p.detach().cpu() if hasattr(p, "detach") else p)
        if not np.isin(probs, (0.0, 1.0)).all():
            raise UsageError(f"{self.space.name} does not factor, so choices that are still open have no expectation")
        found = self.of(probs.argmax(-1).reshape(-1, probs.shape[-2])).reshape(*probs.shape[:-2], len(self.names))
        return p.new_tensor(found) if hasattr(p, "new_tensor") else found

    def combine(self, matrix: Floats, shift: Floats) -> Whole:
        """As ``Additive.combine``."""
        names = ("",) * matrix.shape[1]
        return replace(self, names=names, matrix=self.matrix @ matrix, shift=self.shift @ matrix + shift)


@lru_cache(maxsize=8)
def whole(space: SearchSpace) -> Whole:
    """The figures of a space that does not factor: those that its own samples have."""
    rng = np.random.default_rng(0)
    names: dict[str, None] = {}
    for _ in range(N_WHOLE):
        names |= dict.fromkeys(_sums(space.network(space.sample(rng)), space.resolution))
    return Whole(space, tuple(names), tuple(names), np.eye(len(names)), np.zeros(len(names)))


@lru_cache(maxsize=1 << 16)
def _row(space: SearchSpace, names: tuple[str, ...], arch: Arch) -> tuple[float, ...]:
    found = _sums(space.network(arch), space.resolution)
    return tuple(found.get(name, 0.0) for name in names)


# ── what of a cell is executed ───────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class View:
    """One account of what a device executes: the decisions that count, and the figures of what runs."""

    name: str  # "all": every operation; "live": those that the output reads, nothing where it reads no input
    space: SearchSpace

    @cached_property
    def sums(self) -> Additive | Whole:
        """The figures, without regard to what is live."""
        return whole(self.space) if self.space.whole_figures else physical(self.space)

    def figures(self, archs: Archs) -> tuple[Ints, Floats]:
        """(N, D) -> (N, D) decisions as they count and (N, M) figures, ``sums.names``."""
        array = check_archs(self.space, archs)
        if self.name == "all":
            return array, self.sums.of(array)
        cells, connected = live_cells(array)
        node = {scope: n for n, scope in NODE_SCOPES.items()}
        reads = {1: (cells[:, 2] > 0) | (cells[:, 4] > 0), 2: cells[:, 5] > 0, 3: np.ones(len(cells), bool)}
        found = physical(self.space)  # NAS-Bench-201 factors
        live = [reads[node[scope]] for scope, _ in found.parts]
        return cells, found.of(cells, live) * connected[:, None]


def views(space: SearchSpace) -> tuple[View, ...]:
    """What a device may execute of this space's networks: one account, in NAS-Bench-201 two.

    Eager PyTorch runs edges whose result nothing reads, exported graphs have lost them: in HELP's latencies a linear
    fit on all edges errs by 1.7 % against 4.7 % on live ones on a GTX 1080 Ti, and by 55 % against 30 % on a Pixel 3.
    """
    both = isinstance(space, NASBench201Space)
    return (View("all", space), View("live", space)) if both else (View("all", space),)


def live_cells(archs: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """NAS-Bench-201: (N, 6) -> ``NASBench201Space.canonical`` of each, and (N,) whether its output reads its input."""
    cells = archs.copy()
    for node in (2, 1):
        read = np.any([cells[:, i] > 0 for i, (_, source) in enumerate(EDGES) if source == node], axis=0)
        cells[:, list(NODE_SCOPES[node])] *= read[:, None]
    reached = [np.ones(len(cells), bool), *(np.zeros(len(cells), bool) for _ in NODE_SCOPES)]
    for i, (node, source) in enumerate(EDGES):
        reached[node] |= (cells[:, i] > 0) & reached[source]
    return cells, reached[-1]
