"""``Capacity``: what a network pays because it does not fit the last-level cache, read from a table's chains.

A network touches its footprint once an inference: its weights, and the memory of its maps, which a runtime uses again
and again and which is as large as the maps around its most demanding convolution. A chain is one block repeated,
measured like a network (``profiling.chains``). Its time per weight is flat while the chain fits the cache and rises
with its footprint beyond. For each class of blocks (multiply-accumulates per element) the rise is a non-decreasing
piecewise linear function of the footprint; weights and maps belong to the class nearest to their block's. A network
pays, for every element of a class, the rise at the network's own footprint: no figure of a network enters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, eq=False)
class Capacity:
    """The rises of G classes as sums of P hinges each, and how an architecture's footprint falls into the classes."""

    footprint: Additive  # (G,) elements of an architecture by class: weights, and the site of the largest maps
    knots: Floats  # (G, P) whole footprints
    gains: Floats  # (G, P) change of slope there: ms per element and element; 0 pads

    @classmethod
    def of(cls, table: LatencyTable, space: FactoredSpace) -> Capacity | None:
        """None where the table holds no chains: the space's networks are small, or an older latbench measured it."""
        frame = table.select(kind="chain", status="ok").frame
        frame = frame[frame["n_params"].notna() & frame["macs"].notna()]
        if frame.empty:
            return None
        ms = frame["latency_ref_ms"].fillna(frame["latency_ms"])
        chains = frame.assign(ms=ms, intensity=(frame["macs"] / frame["n_params"]).round(6))
        maps = {round(block.macs / block.n_params, 6): _maps(block) for block in _weighty(space)}
        hinges = {
            float(intensity): _hinges(
                part["n_params"].to_numpy(np.float64), maps[intensity], part["ms"].to_numpy(np.float64)
            )
            for intensity, part in chains.sort_values("n_params").groupby("intensity")
            if len(part) > 2 and intensity in maps
        }
        if not hinges:
            return None
        width = max(len(knots) for knots, _ in hinges.values())
        knots, gains = np.zeros((2, len(hinges), width))
        for g, (at, rise) in enumerate(hinges.values()):
            knots[g, : len(at)], gains[g, : len(at)] = at, rise
        return cls(_by_class(space, list(hinges)), knots, gains)

    def excess(self, archs: NDArray[np.int64]) -> Floats:
        """(N, D) option indices -> (N,) ms."""
        held = self.footprint.of(archs)
        return np.asarray(self._excess(held, held.sum(-1), None, None))

    def expected(self, probs: Any) -> Any:
        """(..., D, K) probabilities, numpy or torch -> (...) ms.

        The footprint of the sampled networks counts as Gaussian; for single architectures it is exact.
        """
        held = self.footprint.expected(probs)
        covariance = self.footprint.covariance(probs)  # (..., G): of each class with the total
        return self._excess(held, held.sum(-1), covariance, covariance.sum(-1))

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Arrays and JSON; ``from_state`` is its inverse."""
        parts = {f"footprint/{i}": values for i, (_, values) in enumerate(self.footprint.parts)}
        arrays = {"footprint/constant": self.footprint.constant, "knots": self.knots, "gains": self.gains, **parts}
        return arrays, {"scopes": [list(scope) for scope, _ in self.footprint.parts]}

    @classmethod
    def from_state(cls, arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> Capacity:
        parts = tuple((tuple(scope), arrays[f"footprint/{i}"]) for i, scope in enumerate(meta["scopes"]))
        names = tuple(f"class{g}" for g in range(len(arrays["knots"])))
        return cls(Additive(names, arrays["footprint/constant"], parts), arrays["knots"], arrays["gains"])

    def _excess(self, held: Any, total: Any, covariance: Any, variance: Any) -> Any:
        """sum_g E[B_g e_g(W)] = sum_g E[B_g] E[e_g(W)] + Cov(B_g, W) E[e_g'(W)], W Gaussian (Stein's lemma)."""
        make = held.new_tensor if hasattr(held, "new_tensor") else np.asarray
        beyond, gains = total[..., None, None] - make(self.knots), make(self.gains)
        if variance is None:
            return (held * (beyond * (beyond > 0) * gains).sum(-1)).sum(-1)
        wide = variance > 1  # element squared: below it a single network
        sd = (variance * wide + 1 * ~wide)[..., None, None] ** 0.5
        share, density = _normal(beyond / sd)
        sure = ~wide[..., None, None]
        step = share * ~sure + (beyond > 0) * sure
        rise = beyond * step + sd * density * ~sure
        return (held * (rise * gains).sum(-1)).sum(-1) + (covariance * (step * gains).sum(-1)).sum(-1)


def _hinges(weights: Floats, maps: int, ms: Floats) -> tuple[Floats, Floats]:
    """Knots and changes of slope of the rise of ms per weight over the chains' footprints, ascending."""
    rise = np.asarray(isotonic_regression(ms / weights).x, np.float64)
    slopes = np.diff(rise - rise[0]) / np.diff(weights)
    return weights[:-1] + maps, np.diff(slopes, prepend=0.0)


def _by_class(space: FactoredSpace, intensities: list[float]) -> Additive:
    """Weights of every block, and the maps of the site whose blocks hold the most, by nearest class."""
    logs = np.log(intensities)

    def nearest(macs: int, elements: int) -> int:
        return int(np.argmin(np.abs(logs - math.log(max(macs, 1) / elements))))

    def figures(block: Graph) -> dict[str, float]:
        found = {f"class{g}": 0.0 for g in range(len(logs))}
        if block.n_params:
            found[f"class{nearest(block.macs, block.n_params)}"] = float(block.n_params)
        return found

    weights = additive(space, figures)
    held: dict[str, list[int]] = {}
    for site, _, block in space.slots():
        held.setdefault(site.name, []).append(_maps(block))
    (peak,) = (site for site in space.sites if site.name == max(held, key=lambda name: float(np.mean(held[name]))))
    values = np.zeros((*(len(space.decisions[d].options) for d in peak.scope), len(logs)))
    for site, picks, block in space.slots():
        if site == peak and (maps := _maps(block)):
            values[picks][nearest(block.macs, maps)] = maps
    if not peak.scope:
        return replace(weights, constant=weights.constant + values)
    return replace(weights, parts=(*weights.parts, (peak.scope, values)))


def _maps(block: Graph) -> int:
    """Elements of what a convolution reads and writes, where that is most; what is elementwise runs in place."""
    around = ((*node.inputs, node.name) for node in block.nodes if isinstance(node.op, Conv2d))
    return max((sum(math.prod(block.shapes[name]) for name in names) for names in around), default=0)


def _weighty(space: FactoredSpace) -> list[Graph]:
    return [block for block in space.all_blocks().values() if block.n_params]


def _normal(z: Any) -> tuple[Any, Any]:
    """Distribution function and density of the standard normal, numpy or torch."""
    if hasattr(z, "erf"):
        share, density = 0.5 * (1 + (z / math.sqrt(2)).erf()), (-0.5 * z * z).exp()
    else:
        share, density = 0.5 * (1 + erf(z / math.sqrt(2))), np.exp(-0.5 * z * z)
    return share, density / math.sqrt(2 * math.pi)
