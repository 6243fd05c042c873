"""``CalibratedOracle``: sums of measured blocks, corrected by a few measured networks.

Blocks measured one by one miss what only a whole network shows: a constant per run, kernels that wait for each other,
weights that do not fit the cache together. The correction is a Gaussian process on the relative error of the sums,

    y = S + theta . phi + g(W) + noise,   noise ~ S,

where S is the sum of the blocks and, in a table with chains, what they say of weights beyond the cache
(``Capacity``), so that such a table needs no network; phi = (S, a constant, S by block type, weights, memory traffic,
kernels, one-hot decisions), each group with a prior width of its own, and g a smooth curve over the weights W of the
network. Widths, the curve's length and the noise maximise the marginal likelihood under log-normal priors (Rasmussen
and Williams 2006, 5.4.1), so 10 networks move the scale, 200 the single decisions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from latbench.errors import MissingEntryError, TableError, UsageError
from latbench.oracle.base import Archs, Floats, P, check_archs
from latbench.oracle.calibrated_design import Design, canonical, design_of, like_of
from latbench.oracle.calibrated_posterior import Posterior, posterior_of
from latbench.oracle.capacity import Capacity
from latbench.oracle.conformal import Conformal
from latbench.oracle.factors import MAX_TABULATED, FactorOracle, in_full
from latbench.oracle.features import Additive
from latbench.oracle.lut import LutOracle, Measure
from latbench.provenance import Provenance
from latbench.spaces.base import Arch, FactoredSpace, SearchSpace
from latbench.tables import LatencyTable


@dataclass(frozen=True, eq=False)
class CalibratedOracle:
    """Options of ``fit``: `missing`, `context`, `measure` as ``LutOracle``'s; `curve=False` leaves g and the cache out,
    so that the oracle is a plain sum over sites (``AdditiveOracle`` is the nearest one otherwise).

    An expectation is exact but for these two, for which the weights of the sampled networks count as Gaussian.
    """

    space: FactoredSpace
    provenance: Provenance
    base: LutOracle
    design: Design
    posterior: Posterior
    capacity: Capacity | None = None
    calibration: Conformal | None = None
    ratio: float = 1.0  # of every figure to what was fitted: ``scaled``

    name: ClassVar[str] = "calibrated"
    unit: ClassVar[str] = "ms"

    @classmethod
    def fit(
        cls,
        table: LatencyTable,
        *,
        missing: str = "error",
        context: str | None = None,
        measure: Measure | None = None,
        curve: bool = True,
    ) -> CalibratedOracle:
        """Networks with a block that the table lacks are left out.

        Raises TableError where the table has no blocks, or neither networks nor chains, UsageError as LutOracle.
        """
        base = LutOracle.fit(table, missing=missing, context=context, measure=measure)
        space = cast(FactoredSpace, base.space)
        isolated = context == "isolated" or "sandwich" not in set(
            table.select(kind="block").frame_of("context")["context"]
        )
        capacity = None if isolated or not curve else Capacity.of(table, space)
        archs, measured = table.networks()
        if not len(archs) and capacity is None:
            raise TableError("the table has no measured network to calibrate with: profile --networks N, or use lut")
        archs = canonical(space, archs) if len(archs) else np.empty((0, len(space.decisions)), np.int64)
        whole = np.array([_summed(base, arch) for arch in archs], bool)
        if len(archs) and not whole.any():
            raise TableError(f"every measured network has a block that the table lacks: {_why(base, archs[0])}")
        archs, measured = archs[whole], measured[whole]
        sums_ms = _sums(base, capacity, archs)
        if not (sums_ms > 0).all():
            raise TableError("the blocks of a measured network add up to no positive latency: the table is damaged")
        design = design_of(space, base, archs, sums_ms)
        phi, weights = design.of(archs, sums_ms)
        errors = measured / sums_ms - 1
        posterior, predicted, sd = posterior_of(phi / sums_ms[:, None], weights, sums_ms, errors, design, curve)
        calibration = Conformal.of(1 + predicted, 1 + errors, sd) if len(archs) > 2 else None
        return cls(space, table.provenance, base, design, posterior, capacity, calibration)

    def scaled(self, by: float) -> CalibratedOracle:
        """Every figure `by` times what it is."""
        return replace(self, ratio=by * self.ratio)

    # -- queries

    def latency(self, arch: Arch) -> float:
        """One option index per decision -> ms."""
        self.space.check(tuple(arch))
        return float(self.latencies(np.array([arch], np.int64))[0])

    def latencies(self, archs: Archs) -> Floats:
        """(N, D) option indices -> (N,) ms."""
        array = check_archs(self.space, archs)
        if self.tabulated is not None:
            return self.tabulated.latencies(array)
        return self.predict(array)[0]

    def expected_latency(self, probs: P) -> P:
        """(..., D, K) probabilities -> (...) ms."""
        if self.tabulated is not None:
            return self.tabulated.expected_latency(probs)
        sums_ms: Any = self.base.expected_latency(probs)
        if self.capacity is not None:
            sums_ms = sums_ms + self.capacity.expected(probs)
        p: Any = probs if hasattr(probs, "new_tensor") else np.asarray(probs, np.float64)
        phi, weights = self.design.assemble(p, sums_ms, self.design.sums.expected(p))
        variance = self.design.sums.take([0]).covariance(p)[..., 0] / self.design.curve[1] ** 2
        found = sums_ms + (phi * like_of(p, self.theta)).sum(-1) + self._curve(weights, variance * (variance > 0))
        return cast(P, self.ratio * found)

    def interval(self, archs: Archs, confidence: float = 0.9) -> tuple[Floats, Floats] | None:
        """(N, D) -> (N,) and (N,) ms, by errors of networks left out over the predictive standard deviation.

        None with too few networks.
        """
        if self.calibration is None or self.calibration.quantile(confidence) is None:
            return None
        predicted, sd = self.predict(check_archs(self.space, archs))
        return self.calibration.interval(predicted, confidence, sd)

    def sources(self, arch: Arch) -> Mapping[str, int]:
        """Those of the blocks, and the fitted correction."""
        return {**self.base.sources(arch), "fitted": 1}

    # -- kept in a file

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """As ``Model.state``."""
        arrays, meta = self.base.state()
        post, design = self.posterior, self.design
        kept = {f"base/{name}": array for name, array in arrays.items()}
        kept |= {name: getattr(post, name) for name in _POSTERIOR}
        kept |= {"sums/constant": design.sums.constant, "scales": design.scales}
        kept |= {f"sums/{i}": values for i, (_, values) in enumerate(design.sums.parts)}
        beyond: dict[str, Any] | None = None
        if self.capacity is not None:
            parts, beyond = self.capacity.state()
            kept |= {f"capacity/{name}": array for name, array in parts.items()}
        if self.calibration is not None:
            kept["scores"] = np.array(self.calibration.scores)
        about = {
            "base": meta,
            "names": list(design.sums.names),
            "scopes": [list(scope) for scope, _ in design.sums.parts],
            "typical_ms": design.typical_ms,
            "curve": list(design.curve),
            "capacity": beyond,
            "ratio": self.ratio,
        }
        return kept, about

    @classmethod
    def from_state(
        cls, space: SearchSpace, provenance: Provenance, arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]
    ) -> CalibratedOracle:
        """Inverse of ``state``."""
        if not isinstance(space, FactoredSpace):
            raise UsageError(f"{space.name} does not factor into blocks")
        base = LutOracle.from_state(space, provenance, _under("base/", arrays), meta["base"])
        parts = tuple((tuple(scope), arrays[f"sums/{i}"]) for i, scope in enumerate(meta["scopes"]))
        sums = Additive(tuple(meta["names"]), arrays["sums/constant"], parts)
        mean, sd = meta["curve"]
        design = Design(space, sums, meta["typical_ms"], arrays["scales"], (mean, sd))
        posterior = Posterior(**{name: arrays[name] for name in _POSTERIOR})
        capacity = None
        if meta.get("capacity") is not None:  # a model of an earlier latbench has none
            capacity = Capacity.from_state(_under("capacity/", arrays), meta["capacity"])
        scores = arrays.get("scores")
        calibration = None if scores is None else Conformal(tuple(scores.tolist()))
        ratio = float(meta.get("ratio", 1.0))  # nor a ratio
        return cls(space, provenance, base, design, posterior, capacity, calibration, ratio)

    # -- the correction

    @cached_property
    def theta(self) -> Floats:
        """(F,) posterior mean of the coefficients."""
        post = self.posterior
        theta: Floats = post.prior_variance(self.design.groups) * (post.phi.T @ post.alpha)
        return theta

    def _curve(self, weights: Any, variance: Any) -> Any:
        """g, ms, where the standardised weights are Gaussian: (...) mean and variance -> (...)."""
        post = self.posterior
        width, length = np.exp(post.log_widths[5:7])
        gain = like_of(weights, post.alpha / post.sums_ms * self.design.typical_ms**2 * width**2 * length)
        spread = (variance + length**2) ** 0.5
        z = (weights[..., None] - like_of(weights, post.weights)) / (spread[..., None] if np.ndim(spread) else spread)
        bump = -0.5 * z * z
        found = (gain * (bump.exp() if hasattr(bump, "exp") else np.exp(bump))).sum(-1)
        return found / spread

    def predict(self, archs: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """(N, D) -> ms and the predictive standard deviation of its logarithm, (N,) each."""
        spelled = canonical(self.space, archs)
        sums_ms = _sums(self.base, self.capacity, spelled)
        phi, weights = self.design.of(spelled, sums_ms)
        error, deviation = self.posterior.predict(self.design, phi / sums_ms[:, None], weights, sums_ms)
        return self.ratio * sums_ms * (1 + error), deviation

    @cached_property
    def tabulated(self) -> FactorOracle | None:
        """Every architecture of a small space in one factor: exact in expectation, and dead edges cost nothing."""
        if self.space.size > MAX_TABULATED:
            return None
        every = in_full(self.space, lambda archs: self.predict(archs)[0])
        return FactorOracle(self.space, (every,), self.provenance)


_POSTERIOR = ("log_widths", "phi", "weights", "sums_ms", "inverse", "alpha")


def _summed(base: LutOracle, arch: NDArray[np.int64]) -> bool:
    """Whether every block of `arch` has an entry."""
    return not _why(base, arch)


def _why(base: LutOracle, arch: NDArray[np.int64]) -> str:
    try:
        base.latency(tuple(int(i) for i in arch))
    except MissingEntryError as error:
        return str(error)
    return ""


def _sums(base: LutOracle, capacity: Capacity | None, archs: NDArray[np.int64]) -> Floats:
    """(N, D) -> (N,) ms of the blocks, and of their weights beyond the cache."""
    sums_ms = base.latencies(archs)
    return sums_ms if capacity is None else sums_ms + capacity.excess(archs)


def _under(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
