"""``Capacity``: what a network pays because it does not fit the caches, read from a table's chains.

A network touches its footprint once an inference: its weights, and the memory of its maps, which a runtime uses again
and again and which is as large as the maps around its most demanding convolution. A chain is one block repeated,
measured like a network (``profiling.chains``). Its time per weight is flat while the chain fits a cache and rises
with its footprint beyond: the core's own cache, then the last level. For each class of blocks (multiply-accumulates
per element) the rise is a non-decreasing piecewise linear function of the footprint; weights and maps belong to the
class nearest to their block's. A network pays, for every element of a class, the rise at the network's footprint less
the rise at its block's, which the block's own latency holds already. No figure of a network enters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from scipy.special import erf

from latbench.graph.ir import Graph
from latbench.graph.ops import Conv2d
from latbench.oracle.base import Floats
from latbench.oracle.features import Additive, additive
from latbench.spaces.base import FactoredSpace
from latbench.tables import LatencyTable

ALIKE = 1.25  # ratio of the weights of blocks that stream alike
SETTLED = 3  # chains beyond a core's own cache, by whose median the next level's curve begins
FIT = 2  # of the last level's chains, the first ones, that it holds (``profiling.chains.SHARED_FIT``)
_ADDITIVE = ("footprint", "held")


@dataclass(frozen=True, eq=False)
class Capacity:
    """The rises of G classes as sums of P hinges each, and how an architecture's footprint falls into the classes."""

    footprint: Additive  # (G,) elements of an architecture by class: weights, and the site of the largest maps
    held: Additive  # (1,) ms of it that the blocks' own latencies hold
    knots: Floats  # (G, P) whole footprints
    gains: Floats  # (G, P) change of slope there: ms per element and element; 0 pads

    @classmethod
    def of(cls, table: LatencyTable, space: FactoredSpace) -> Capacity | None:
        """None where the table holds no chains: the space's networks are small, or an older latbench measured it."""
        frame = table.select(kind="chain", status="ok").frame_of("n_params", "macs", "latency_ref_ms", "latency_ms")
        frame = frame[frame["n_params"].notna() & frame["macs"].notna()]
        if frame.empty:
            return None
        ms = frame["latency_ref_ms"].fillna(frame["latency_ms"])
        chains = frame.assign(ms=ms, intensity=(frame["macs"] / frame["n_params"]).round(6)).sort_values("n_params")
        links = {round(block.macs / block.n_params, 6): block for block in _weighty(space)}
        alike = _alike(space, table)
        curves: dict[int, _Curve] = {}  # by class: the nearest power of two
        logs: dict[int, float] = {}
        for intensity, part in sorted(chains.groupby("intensity"), key=lambda found: found[1]["n_params"].iloc[0]):
            if len(part) < 3 or intensity not in links:
                continue
            link, group = links[intensity], round(math.log2(intensity))
            weights, took = part["n_params"].to_numpy(np.float64), part["ms"].to_numpy(np.float64)
            alone = weights[0] < 2 * link.n_params  # where a chain of one is among them, it is a block like those
            below, fit = (alike(group, link.n_params), 1) if alone else (0.0, FIT)
            curve = _Curve.of(weights, _maps(link), took, below, fit)
            curves[group] = curves[group].then(curve) if group in curves else curve
            logs[group] = math.log(intensity)
        if not curves:
            return None
        hinges = {logs[group]: curve.hinges() for group, curve in sorted(curves.items())}
        width = max(len(knots) for knots, _ in hinges.values())
        knots, gains = np.zeros((2, len(hinges), width))
        for g, (at, rise) in enumerate(hinges.values()):
            knots[g, : len(at)], gains[g, : len(at)] = at, rise
        footprint, held = _by_class(space, np.array(list(hinges)), knots, gains)
        return cls(footprint, held, knots, gains)

    def excess(self, archs: NDArray[np.int64]) -> Floats:
        """(N, D) option indices -> (N,) ms."""
        elements = self.footprint.of(archs)
        paid = np.asarray(self._excess(elements, elements.sum(-1), None, None))
        return paid - self.held.of(archs)[:, 0]

    def expected(self, probs: Any) -> Any:
        """(..., D, K) probabilities, numpy or torch -> (...) ms.

        The footprint of the sampled networks counts as Gaussian; for single architectures it is exact.
        """
        elements = self.footprint.expected(probs)
        covariance = self.footprint.covariance(probs)  # (..., G): of each class with the total
        paid = self._excess(elements, elements.sum(-1), covariance, covariance.sum(-1))
        return paid - self.held.expected(probs)[..., 0]

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Arrays and JSON; ``from_state`` is its inverse."""
        arrays, scopes = {"knots": self.knots, "gains": self.gains}, {}
        for name in _ADDITIVE:
            figures: Additive = getattr(self, name)
            arrays[f"{name}/constant"] = figures.constant
            arrays |= {f"{name}/{i}": values for i, (_, values) in enumerate(figures.parts)}
            scopes[name] = [list(scope) for scope, _ in figures.parts]
        return arrays, {"scopes": scopes}

    @classmethod
    def from_state(cls, arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> Capacity:
        """Inverse of ``state``. Raises KeyError where something is missing."""
        found = {}
        for name in _ADDITIVE:
            parts = tuple((tuple(scope), arrays[f"{name}/{i}"]) for i, scope in enumerate(meta["scopes"][name]))
            constant = arrays[f"{name}/constant"]
            found[name] = Additive(tuple(f"{name}{g}" for g in range(len(constant))), constant, parts)
        return cls(**found, knots=arrays["knots"], gains=arrays["gains"])

    def _excess(self, elements: Any, total: Any, covariance: Any, variance: Any) -> Any:
        """sum_g E[B_g e_g(F)] = sum_g E[B_g] E[e_g(F)] + Cov(B_g, F) E[e_g'(F)], F Gaussian (Stein's lemma)."""
        make = elements.new_tensor if hasattr(elements, "new_tensor") else np.asarray
        beyond, gains = total[..., None, None] - make(self.knots), make(self.gains)
        if variance is None:
            return (elements * (beyond * (beyond > 0) * gains).sum(-1)).sum(-1)
        wide = variance > 1  # element squared: below it a single network
        sd = (variance * wide + 1 * ~wide)[..., None, None] ** 0.5
        share, density = _normal(beyond / sd)
        sure = ~wide[..., None, None]
        step = share * ~sure + (beyond > 0) * sure
        rise = beyond * step + sd * density * ~sure
        return (elements * (rise * gains).sum(-1)).sum(-1) + (covariance * (step * gains).sum(-1)).sum(-1)


@dataclass(frozen=True, eq=False)
class _Curve:
    """How much more an element costs than in a chain that fits: ms, non-decreasing over the footprint."""

    footprint: Floats
    rise: Floats

    @classmethod
    def of(cls, weights: Floats, maps: int, ms: Floats, held: float = 0.0, fit: int = 1) -> _Curve:
        """Of the chains of one block, by ascending weights: three at least. `held`: what blocks like it take by their
        own rows, ms per weight; in context they do not have the caches to themselves as a chain of one has. `fit`: how
        many of the first the cache holds; what lies between them is noise, and no rise.

        The median of each with its neighbours leaves what rises as it is, and takes out one chain in a bad moment.
        """
        each = ms / weights
        middle = np.median([each[:-2], each[1:-1], each[2:]], axis=0)
        smooth = np.concatenate([[min(each[0], middle[0])], middle, each[-1:]])
        per_weight = np.asarray(isotonic_regression(smooth).x, np.float64)
        return cls(weights + maps, np.maximum(per_weight - max(per_weight[fit - 1], held), 0.0))

    def then(self, other: _Curve) -> _Curve:
        """This one where the other has not begun, which stands on what this one has reached there.

        Past a cache the rise is flat until the next: no further than the median of the last three, so that one chain in
        a bad moment does not lift all that follows.
        """
        before = self.footprint < other.footprint[0]
        rise = np.minimum(self.rise, np.median(self.rise[-SETTLED:]))
        reached = np.interp(other.footprint[0], self.footprint, rise)
        return _Curve(
            np.concatenate([self.footprint[before], other.footprint]),
            np.concatenate([rise[before], other.rise + reached]),
        )

    def hinges(self) -> tuple[Floats, Floats]:
        """Knots and the changes of slope there."""
        return self.footprint[:-1], np.diff(np.diff(self.rise) / np.diff(self.footprint), prepend=0.0)


def _by_class(space: FactoredSpace, logs: Floats, knots: Floats, gains: Floats) -> tuple[Additive, Additive]:
    """What a ``Capacity`` sums up: elements by the class of nearest log, and ms that the blocks hold."""
    maps: dict[str, list[int]] = {}
    for site, _, block in space.slots():
        maps.setdefault(site.name, []).append(_maps(block))
    peak = max(maps, key=lambda name: float(np.mean(maps[name])))
    (site,) = (site for site in space.sites if site.name == peak)
    inner = additive(space, lambda block: _figures(_elements(block, logs), block, knots, gains))
    values = np.zeros((*(len(space.decisions[d].options) for d in site.scope), len(inner.names)))
    for one, picks, block in space.slots():
        if one == site:
            found = _figures(_elements(block, logs, maps=True), block, knots, gains)
            values[picks] = [found[name] for name in inner.names]
    parts, constant = inner.parts, inner.constant
    if site.scope:
        parts = (*parts, (site.scope, values))
    else:
        constant = constant + values
    whole = Additive(inner.names, constant, parts)
    return whole.take(range(len(logs))), whole.take([len(logs)])


def _elements(block: Graph, logs: Floats, *, maps: bool = False) -> Floats:
    """(G,) weights of a block, or its maps, in the class nearest to its multiply-accumulates per one of them."""
    found = np.zeros(len(logs))
    if n := _maps(block) if maps else block.n_params:
        found[int(np.argmin(np.abs(logs - math.log(max(block.macs, 1) / n))))] = n
    return found


def _figures(elements: Floats, block: Graph, knots: Floats, gains: Floats) -> dict[str, float]:
    """The elements by class, and what they pay at the block's own footprint: ms."""
    beyond = block.n_params + _maps(block) - knots
    paid = elements @ (beyond * (beyond > 0) * gains).sum(-1)
    return {**{f"class{g}": float(n) for g, n in enumerate(elements)}, "held": float(paid)}


def _maps(block: Graph) -> int:
    """Elements of what a convolution reads and writes, where that is most; what is elementwise runs in place."""
    around = ((*node.inputs, node.name) for node in block.nodes if isinstance(node.op, Conv2d))
    return max((sum(math.prod(block.shapes[name]) for name in names) for names in around), default=0)


def _alike(space: FactoredSpace, table: LatencyTable) -> Callable[[int, float], float]:
    """(class, weights of a block) -> the median ms per weight of blocks about as large; 0 where there are none."""
    ms = table.select(kind="block", status="ok").select(context="sandwich").blocks_ms()
    known = [block for block in _weighty(space) if block.key in ms]
    groups = np.array([round(math.log2(round(max(block.macs, 1) / block.n_params, 6))) for block in known])
    weights = np.array([block.n_params for block in known], np.float64)
    each = np.array([ms[block.key] for block in known]) / weights

    def of(group: int, n: float) -> float:
        near = (groups == group) & (weights > n / ALIKE) & (weights < n * ALIKE)
        return float(np.median(each[near])) if near.any() else 0.0

    return of


def _weighty(space: FactoredSpace) -> list[Graph]:
    return [block for block in space.all_blocks().values() if block.n_params]


def _normal(z: Any) -> tuple[Any, Any]:
    """Distribution function and density of the standard normal, numpy or torch."""
    if hasattr(z, "erf"):
        share, density = 0.5 * (1 + (z / math.sqrt(2)).erf()), (-0.5 * z * z).exp()
    else:
        share, density = 0.5 * (1 + erf(z / math.sqrt(2))), np.exp(-0.5 * z * z)
    return share, density / math.sqrt(2 * math.pi)
