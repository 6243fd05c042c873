"""``Capacity``: what a network pays because its weights do not fit the last-level cache, read from a table's chains.

A chain is one block repeated, measured like a network (``profiling.chains``). Its time per weight is flat while the
chain fits the cache and rises with the total beyond. For each class of blocks (multiply-accumulates per weight) the
rise is a non-decreasing piecewise linear function of the total weights; a block belongs to the nearest class. A
network pays, for every weight of a class, the rise at the network's own total: no figure of a network enters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from scipy.special import erf

from latbench.graph.ir import Graph
from latbench.oracle.base import Floats
from latbench.oracle.features import Additive, additive
from latbench.spaces.base import FactoredSpace
from latbench.tables import LatencyTable


@dataclass(frozen=True, eq=False)
class Capacity:
    """The rises of G classes as sums of P hinges each, and how an architecture's weights fall into the classes."""

    weights: Additive  # (G,) weights of an architecture by class
    knots: Floats  # (G, P) total weights
    gains: Floats  # (G, P) change of slope there: ms per weight and weight; 0 pads

    @classmethod
    def of(cls, table: LatencyTable, space: FactoredSpace) -> Capacity | None:
        """None where the table holds no chains: the space's networks are small, or an older latbench measured it."""
        frame = table.select(kind="chain", status="ok").frame
        frame = frame[frame["n_params"].notna() & frame["macs"].notna()]
        if frame.empty:
            return None
        ms = frame["latency_ref_ms"].fillna(frame["latency_ms"])
        chains = frame.assign(ms=ms, intensity=(frame["macs"] / frame["n_params"]).round(6))
        hinges = {
            float(intensity): _hinges(part["n_params"].to_numpy(np.float64), part["ms"].to_numpy(np.float64))
            for intensity, part in chains.sort_values("n_params").groupby("intensity")
            if len(part) > 2
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
        held = self.weights.of(archs)
        return np.asarray(self._excess(held, held.sum(-1), None, None))

    def expected(self, probs: Any) -> Any:
        """(..., D, K) probabilities, numpy or torch -> (...) ms.

        The weights of the sampled networks count as Gaussian; for single architectures it is exact.
        """
        held = self.weights.expected(probs)
        covariance = self.weights.covariance(probs)  # (..., G): of each class with the total
        return self._excess(held, held.sum(-1), covariance, covariance.sum(-1))

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Arrays and JSON; ``from_state`` is its inverse."""
        parts = {f"weights/{i}": values for i, (_, values) in enumerate(self.weights.parts)}
        arrays = {"weights/constant": self.weights.constant, "knots": self.knots, "gains": self.gains, **parts}
        return arrays, {"scopes": [list(scope) for scope, _ in self.weights.parts]}

    @classmethod
    def from_state(cls, arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> Capacity:
        parts = tuple((tuple(scope), arrays[f"weights/{i}"]) for i, scope in enumerate(meta["scopes"]))
        names = tuple(f"class{g}" for g in range(len(arrays["knots"])))
        return cls(Additive(names, arrays["weights/constant"], parts), arrays["knots"], arrays["gains"])

    def _excess(self, held: Any, total: Any, covariance: Any, variance: Any) -> Any:
        """sum_g E[B_g e_g(W)] = sum_g E[B_g] E[e_g(W)] + Cov(B_g, W) E[e_g'(W)], W Gaussian (Stein's lemma)."""
        make = held.new_tensor if hasattr(held, "new_tensor") else np.asarray
        beyond, gains = total[..., None, None] - make(self.knots), make(self.gains)
        if variance is None:
            return (held * (beyond * (beyond > 0) * gains).sum(-1)).sum(-1)
        wide = variance > 1  # weight squared: below it a single network
        sd = (variance * wide + 1 * ~wide)[..., None, None] ** 0.5
        share, density = _normal(beyond / sd)
        sure = ~wide[..., None, None]
        step = share * ~sure + (beyond > 0) * sure
        rise = beyond * step + sd * density * ~sure
        return (held * (rise * gains).sum(-1)).sum(-1) + (covariance * (step * gains).sum(-1)).sum(-1)


def _hinges(weights: Floats, ms: Floats) -> tuple[Floats, Floats]:
    """Knots and changes of slope of the rise of ms per weight over the totals, ascending."""
    rise = np.asarray(isotonic_regression(ms / weights).x, np.float64)
    slopes = np.diff(rise - rise[0]) / np.diff(weights)
    return weights[:-1], np.diff(slopes, prepend=0.0)


def _by_class(space: FactoredSpace, intensities: list[float]) -> Additive:
    logs = np.log(intensities)

    def figures(block: Graph) -> dict[str, float]:
        found = {f"class{g}": 0.0 for g in range(len(logs))}
        if block.n_params:
            nearest = int(np.argmin(np.abs(logs - math.log(max(block.macs, 1) / block.n_params))))
            found[f"class{nearest}"] = float(block.n_params)
        return found

    return additive(space, figures)


def _normal(z: Any) -> tuple[Any, Any]:
    """Distribution function and density of the standard normal, numpy or torch."""
    if hasattr(z, "erf"):
        share, density = 0.5 * (1 + (z / math.sqrt(2)).erf()), (-0.5 * z * z).exp()
    else:
        share, density = 0.5 * (1 + erf(z / math.sqrt(2))), np.exp(-0.5 * z * z)
    return share, density / math.sqrt(2 * math.pi)
