"""``AdditiveOracle``: the plain sum over sites that comes nearest to a ``CalibratedOracle``.

What searchers optimise that need a sum (Viterbi, elasticity scaling). The Gaussian process' linear part is one. Its
curve over the weights and what is beyond the caches are replaced by their tangent at a latency: least squares over
sampled architectures about as fast as that, in the weights of each class and a constant. Further away it may be some
percent off. Where a space can spell a block in several ways, all cost the same, and an absent block costs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from latbench.oracle.base import Floats
from latbench.oracle.calibrated import CalibratedOracle
from latbench.oracle.calibrated_design import canonical
from latbench.oracle.conformal import Conformal
from latbench.oracle.factors import Factor, FactorOracle
from latbench.oracle.features import Additive
from latbench.spaces.base import FactoredSpace
from latbench.tables import LatencyTable

N_SAMPLES = 4000
N_NEAR = 500  # of them


@dataclass(frozen=True, eq=False)
class AdditiveOracle(FactorOracle):
    """Options of ``fit``: `near_ms`, where the tangent is taken, by default over all that the space samples; others as
    ``CalibratedOracle``'s. Its interval is the calibrated oracle's typical one there, wider by what the tangent is
    off."""

    name: ClassVar[str] = "additive"

    @classmethod
    def fit(cls, table: LatencyTable, *, near_ms: float | None = None, **options: Any) -> AdditiveOracle:
        """Raises as ``CalibratedOracle.fit``, and MissingEntryError where an entry is missing."""
        return cls.of(CalibratedOracle.fit(table, **options), near_ms)

    @classmethod
    def of(cls, oracle: CalibratedOracle, near_ms: float | None = None) -> AdditiveOracle:
        """Raises MissingEntryError where samples need an entry that the table lacks."""
        if oracle.ratio != 1:
            fitted = replace(oracle, ratio=1.0)
            return cls.of(fitted, None if near_ms is None else near_ms / oracle.ratio).scaled(oracle.ratio)
        if oracle.tabulated is not None:
            return cls(oracle.space, oracle.tabulated.factors, oracle.provenance)
        linear = _linear(oracle)
        archs = _sampled(linear, evenly=near_ms is None)
        latencies, deviations = oracle.predict(archs)
        if near_ms is not None:
            close = np.argsort(np.abs(np.log(latencies / near_ms)))[:N_NEAR]
            archs, latencies, deviations = archs[close], latencies[close], deviations[close]
        factors = (*linear.factors, *_tangent(oracle, archs, latencies - linear.latencies(archs)))
        constant, merged = spelled(replace(linear, factors=factors), oracle.space, archs)
        factors = (Factor("constant", (), np.array(constant)), *merged)
        found = cls(oracle.space, factors, oracle.provenance, missing=oracle.base.missing)
        if oracle.calibration is None:
            return found
        off = np.log(np.maximum(found.latencies(archs), 1e-3 * latencies) / latencies)
        spread = math.sqrt(np.median(deviations) ** 2 + np.mean(off**2))
        return replace(found, calibration=Conformal(tuple(spread * score for score in oracle.calibration.scores)))


def _tangent(oracle: CalibratedOracle, archs: NDArray[np.int64], rest: Floats) -> list[Factor]:
    """(N, D) and (N,) ms that the linear part leaves -> the nearest sum."""
    factors: list[Factor] = []
    figures = [oracle.design.sums.take([0])]  # the weights
    if oracle.capacity is not None:
        held = oracle.capacity.held.combine(np.array([[-1 - oracle.theta[0]]]), np.zeros(1))
        rest = rest - held.of(archs)[:, 0]
        factors += _factors("held", held, np.ones(1))
        figures.append(oracle.capacity.footprint)
    x = np.column_stack([*(f.of(archs) for f in figures), np.ones(len(archs))])
    scale = np.maximum(np.abs(x).max(0), 1.0)
    found: Floats = np.linalg.lstsq(x / scale, rest, rcond=1e-6)[0] / scale
    at = 0
    for f in figures:
        factors += _factors("beyond", f, found[at : at + len(f.names)])
        at += len(f.names)
    return [*factors, Factor("beyond", (), np.array(found[-1]))]


def spelled(oracle: FactorOracle, space: FactoredSpace, archs: NDArray[np.int64]) -> tuple[float, list[Factor]]:
    """The same sum as a constant and one factor per scope, in which every spelling of a block costs what its usual one
    in `archs` does, (N, D), and an absent block nothing: the constant has what it cost."""
    names = {site.scope: site.name for site in space.sites}
    constant, merged = oracle.merged
    factors = []
    for scope, values in merged:
        used = np.bincount(np.ravel_multi_index([archs[:, d] for d in scope], values.shape), minlength=values.size)
        spellings: dict[tuple[str, ...], list[int]] = {}
        for i, picks in enumerate(np.ndindex(values.shape)):
            blocks = (space.block(site, picks) for site in space.sites if site.scope == scope)
            spellings.setdefault(tuple(block.key if block else "" for block in blocks), []).append(i)
        flat = values.ravel().copy()
        for key, places in spellings.items():
            if key:
                flat[places] = flat[max(places, key=lambda i: used[i])]
        if absent := spellings.get(("",)):
            constant += flat[absent[0]]
            flat -= flat[absent[0]]
        factors.append(Factor(names.get(scope, "correction"), scope, flat.reshape(values.shape)))
    return constant, factors


def _linear(oracle: CalibratedOracle) -> FactorOracle:
    """Blocks and the posterior mean of all coefficients."""
    design, theta = oracle.design, oracle.theta
    n_types = len(design.sums.names) - 3
    scale, constant, types, physical = np.split(theta[: 5 + n_types], [1, 2, 2 + n_types])
    per_column = np.concatenate([physical * design.typical_ms / design.scales, types])
    factors = [replace(f, values=f.values * (1 + scale[0]), source=None) for f in oracle.base.factors]
    factors.append(Factor("constant", (), np.array(constant[0] * design.typical_ms)))
    factors += _factors("correction", design.sums, per_column)
    at = 5 + n_types
    for d, decision in enumerate(oracle.space.decisions):
        k = len(decision.options)
        effect = theta[at : at + k] * design.typical_ms / len(oracle.space.decisions)
        factors.append(Factor(f"decision{d}", (d,), effect))
        at += k
    return FactorOracle(oracle.space, tuple(factors), oracle.provenance, missing=oracle.base.missing)


def _factors(name: str, figures: Additive, per_column: Floats) -> list[Factor]:
    """(M,) ms per figure -> their sum over sites."""
    constant = Factor(name, (), np.asarray(figures.constant @ per_column))
    return [constant, *(Factor(name, scope, values @ per_column) for scope, values in figures.parts)]


def _sampled(oracle: FactorOracle, *, evenly: bool) -> NDArray[np.int64]:
    """(N, D) in their one spelling: as the space samples, or from its fastest to its slowest."""
    space, rng = oracle.space, np.random.default_rng(0)
    archs = np.array([space.sample(rng) for _ in range(N_SAMPLES)], np.int64)
    if not evenly:
        ends = [one.fastest()[0] for one in (oracle, _negated(oracle))]
        share = rng.uniform(-1, 1, len(archs))[:, None]  # of decisions that are taken from an end
        end = np.where(share < 0, *(np.array(arch) for arch in ends))
        archs = np.where(rng.random(archs.shape) < np.abs(share), end, archs)
    return canonical(space, archs)


def _negated(oracle: FactorOracle) -> FactorOracle:
    return replace(oracle, factors=tuple(replace(f, values=-f.values) for f in oracle.factors))
