"""The features of ``CalibratedOracle``: what of an architecture its correction may depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from latbench.graph.ir import Graph
from latbench.oracle.base import Archs, Floats, one_hot
from latbench.oracle.features import Additive, additive, costs
from latbench.oracle.lut import LutOracle
from latbench.spaces.base import FactoredSpace, SearchSpace

GROUPS = ("scale", "constant", "type", "physical", "decision")


@dataclass(frozen=True, eq=False)
class Design:
    """The features of a space's architectures, in ms so that a coefficient is a relative correction."""

    space: FactoredSpace
    sums: Additive  # columns: weights, bytes, kernels, then S of each block type
    typical_ms: float
    scales: Floats  # (3,) typical weights, bytes, kernels
    curve: tuple[float, float]  # mean and standard deviation of the weights

    @property
    def groups(self) -> NDArray[np.int64]:
        """(F,) position in GROUPS of every column."""
        n_types, n_onehot = len(self.sums.names) - 3, sum(len(d.options) for d in self.space.decisions)
        return np.repeat(np.arange(5), [1, 1, n_types, 3, n_onehot])

    def of(self, archs: NDArray[np.int64], sums_ms: Floats) -> tuple[Floats, Floats]:
        """(N, D), (N,) -> features (N, F) and standardised weights (N,)."""
        probs = one_hot(self.space, archs)
        phi, weights = self.assemble(probs, sums_ms, self.sums.of(archs))
        return cast(Floats, phi), cast(Floats, weights)

    def assemble(self, probs: Any, sums_ms: Any, sums: Any) -> tuple[Any, Any]:
        """(..., D, K), (...), (..., M) -> (..., F) and (...): for architectures and, being linear, for expectations."""
        typical, d = self.typical_ms, len(self.space.decisions)
        physical = sums[..., :3] * (typical / like_of(probs, self.scales))
        decided = [probs[..., i, : len(one.options)] * (typical / d) for i, one in enumerate(self.space.decisions)]
        constant = sums_ms * 0 + typical
        phi = _concat(probs, [sums_ms[..., None], constant[..., None], sums[..., 3:], physical, *decided])
        return phi, (sums[..., 0] - self.curve[0]) / self.curve[1]


def design_of(space: FactoredSpace, base: LutOracle, archs: NDArray[np.int64], sums_ms: Floats) -> Design:
    """The features of a space over the block latencies of `base`; typical figures are those of `archs`, if any."""
    ms: dict[str, float] = {}
    types: dict[str, str] = {}
    factors = {f.site: f for f in base.factors}
    for site, picks, block in space.slots():
        value = float(factors[site.name].values[picks])
        ms.setdefault(block.key, 0.0 if np.isnan(value) else value)
        types.setdefault(block.key, site.block_type)
    names = sorted(set(types.values()))

    def figures(block: Graph) -> dict[str, float]:
        kernels = np.sum([values for _, _, values in costs(block)], axis=0) if block.nodes else np.zeros(4)
        found = {"weights": float(kernels[3]), "bytes": float(kernels[2]), "kernels": float(kernels[0])}
        return found | dict.fromkeys(names, 0.0) | {types[block.key]: ms[block.key]}

    sums = additive(space, figures)
    rng = np.random.default_rng(0)
    sampled = sums.of(canonical(space, np.array([space.sample(rng) for _ in range(500)], np.int64)))
    typical = sums.of(archs) if len(archs) else sampled
    weights = sampled[:, 0]
    return Design(
        space,
        sums,
        float(np.median(sums_ms if len(archs) else sampled[:, 3:].sum(-1))),
        np.maximum(np.median(typical[:, :3], axis=0), 1.0),
        (float(weights.mean()), float(max(weights.std(), 1.0))),
    )


def canonical(space: SearchSpace, archs: Archs) -> NDArray[np.int64]:
    """(N, D) -> (N, D) architectures in their one spelling: what a network leaves out is silenced."""
    array = np.asarray(archs, np.int64)
    if type(space).canonical is SearchSpace.canonical:
        return array
    distinct, back = np.unique(array, axis=0, return_inverse=True)
    found = np.array([space.canonical(tuple(int(i) for i in arch)) for arch in distinct], np.int64)
    return found.reshape(-1, array.shape[1])[back.ravel()]


def like_of(like: Any, values: Any) -> Any:
    """`values` in the kind, dtype and device of `like`."""
    return like.new_tensor(values) if hasattr(like, "new_tensor") else np.asarray(values)


def _concat(like: Any, parts: list[Any]) -> Any:
    if not hasattr(like, "new_tensor"):
        return np.concatenate(parts, axis=-1)
    whole = like.new_zeros((*parts[0].shape[:-1], sum(part.shape[-1] for part in parts)))
    at = 0
    for part in parts:
        whole[..., at : at + part.shape[-1]] = part
        at += part.shape[-1]
    return whole
