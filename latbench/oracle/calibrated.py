"""``CalibratedOracle``: sums of measured blocks, corrected by a few measured networks.

Blocks measured one by one miss what only a whole network shows: a constant per run, kernels that wait for each other,
weights that do not fit the cache together. The correction is a Gaussian process on the relative error of the sums,

    y = S + theta . phi + g(W) + noise,   noise ~ S,

with phi = (S, a constant, S by block type, weights, memory traffic, kernels, one-hot decisions), each group with a
prior width of its own, and g a smooth curve over the weights W of the network. Widths, the curve's length and the noise
maximise the marginal likelihood under log-normal priors (Rasmussen and Williams 2006, 5.4.1), so 10 networks move the
scale, 200 the single decisions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky
from scipy.optimize import minimize

from latbench.errors import MissingEntryError, TableError, UsageError
from latbench.graph.ir import Graph
from latbench.oracle.base import Archs, Floats, P, check_archs, one_hot
from latbench.oracle.conformal import Conformal
from latbench.oracle.factors import Factor, FactorOracle
from latbench.oracle.features import MAX_TABULATED, Additive, additive, costs
from latbench.oracle.lut import LutOracle, Measure
from latbench.provenance import Provenance
from latbench.spaces.base import Arch, FactoredSpace, SearchSpace
from latbench.tables import LatencyTable

GROUPS = ("scale", "constant", "type", "physical", "decision")
# Centres of the log-normal hyperpriors: relative widths of each group's correction, of the curve, its length in
# standard deviations of W, the noise. And how far the likelihood may pull them (standard deviations of the logarithm).
PRIOR = np.log([0.03, 0.01, 0.02, 0.01, 0.003, 0.02, 1.0, 0.005])
PRIOR_SD = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 1.0])
MIN_TO_TUNE = 8  # networks, below which the hyperparameters stay at their priors
OUTLIER = 3.0  # standard deviations beyond which a network counts for less
MAX_REWEIGHTINGS = 6


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
        physical = sums[..., :3] * (typical / _like(probs, self.scales))
        decided = [probs[..., i, : len(one.options)] * (typical / d) for i, one in enumerate(self.space.decisions)]
        constant = sums_ms * 0 + typical
        phi = _concat(probs, [sums_ms[..., None], constant[..., None], sums[..., 3:], physical, *decided])
        return phi, (sums[..., 0] - self.curve[0]) / self.curve[1]


@dataclass(frozen=True, eq=False)
class Posterior:
    """The fitted correction."""

    log_widths: Floats  # (8,) as PRIOR
    phi: Floats  # (n, F) of the fitted networks, each divided by its S
    weights: Floats  # (n,) standardised
    sums_ms: Floats  # (n,)
    inverse: Floats  # (n, n) of the covariance of the relative errors
    alpha: Floats  # (n,) inverse @ relative errors

    def prior_variance(self, groups: NDArray[np.int64]) -> Floats:
        """(F,)."""
        return np.exp(2 * self.log_widths[:5])[groups]


@dataclass(frozen=True, eq=False)
class CalibratedOracle:
    """Options of ``fit``: `missing`, `context`, `measure` as ``LutOracle``'s; `curve=False` leaves g out, so that the
    oracle is a plain sum over sites (``additive`` gives the nearest one otherwise).

    An expectation is exact but for g, for which the weights of the sampled networks count as Gaussian.
    """

    space: FactoredSpace
    provenance: Provenance
    base: LutOracle
    design: Design
    posterior: Posterior
    calibration: Conformal | None = None

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

        Raises TableError where the table has no blocks or no networks to calibrate with, UsageError as LutOracle.
        """
        base = LutOracle.fit(table, missing=missing, context=context, measure=measure)
        archs, measured = table.networks()
        if not len(archs):
            raise TableError("the table has no measured network to calibrate with: profile --networks N, or use lut")
        space = cast(FactoredSpace, base.space)
        canonical = _canonical(space, archs)
        whole = np.array([_summed(base, arch) for arch in canonical])
        if not whole.any():
            raise TableError(f"every measured network has a block that the table lacks: {_why(base, canonical[0])}")
        canonical, measured = canonical[whole], measured[whole]
        sums_ms = base.latencies(canonical)
        if not (sums_ms > 0).all():
            raise TableError("the blocks of a measured network add up to no positive latency: the table is damaged")
        design = _design(space, base, canonical, sums_ms)
        phi, weights = design.of(canonical, sums_ms)
        errors = measured / sums_ms - 1
        posterior, predicted, sd = _fit(phi / sums_ms[:, None], weights, sums_ms, errors, design, curve)
        calibration = Conformal.of(1 + predicted, 1 + errors, sd) if len(canonical) > 2 else None
        return cls(space, table.provenance, base, design, posterior, calibration)

    # -- queries

    def latency(self, arch: Arch) -> float:
        """One option index per decision -> ms."""
        self.space.check(tuple(arch))
        return float(self.latencies(np.array([arch], np.int64))[0])

    def latencies(self, archs: Archs) -> Floats:
        """(N, D) option indices -> (N,) ms."""
        array = check_archs(self.space, archs)
        if self._tabulated is not None:
            return self._tabulated.latencies(array)
        return self._predict(array)[0]

    def expected_latency(self, probs: P) -> P:
        """(..., D, K) probabilities -> (...) ms."""
        if self._tabulated is not None:
            return self._tabulated.expected_latency(probs)
        sums_ms: Any = self.base.expected_latency(probs)
        p: Any = probs if hasattr(probs, "new_tensor") else np.asarray(probs, np.float64)
        phi, weights = self.design.assemble(p, sums_ms, self.design.sums.expected(p))
        variance = self._weights_variance(p)
        found = sums_ms + (phi * _like(p, self._theta)).sum(-1) + self._curve(weights, variance)
        return cast(P, found)

    def interval(self, archs: Archs, confidence: float = 0.9) -> tuple[Floats, Floats] | None:
        """By leave-one-out errors over the predictive standard deviation; None with too few networks."""
        if self.calibration is None or self.calibration.quantile(confidence) is None:
            return None
        predicted, sd = self._predict(check_archs(self.space, archs))
        return self.calibration.interval(predicted, confidence, sd)

    def sources(self, arch: Arch) -> Mapping[str, int]:
        """Those of the blocks, and the fitted correction."""
        return {**self.base.sources(arch), "fitted": 1}

    def additive(self) -> FactorOracle:
        """The nearest plain sum over sites: g replaced by its best straight line over 2,000 sampled architectures.

        What a searcher that needs a chain (Viterbi) optimises; the answer is then checked with this oracle.
        """
        if self._tabulated is not None:
            return self._tabulated
        rng = np.random.default_rng(0)
        archs = np.array([self.space.sample(rng) for _ in range(2000)], np.int64)
        weights = (self.design.sums.of(archs)[:, 0] - self.design.curve[0]) / self.design.curve[1]
        slope, offset = np.polyfit(weights, self._curve(weights, 0.0), 1)
        constant, factors = self._factors(float(slope), float(offset))
        return FactorOracle(
            self.space,
            (Factor("constant", (), np.array(constant)), *factors),
            self.provenance,
            missing=self.base.missing,
        )

    # -- kept in a file

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """As ``Model.state``."""
        arrays, meta = self.base.state()
        post, design = self.posterior, self.design
        kept = {f"base/{name}": array for name, array in arrays.items()}
        kept |= {name: getattr(post, name) for name in _POSTERIOR}
        kept |= {"sums/constant": design.sums.constant, "scales": design.scales}
        kept |= {f"sums/{i}": values for i, (_, values) in enumerate(design.sums.parts)}
        if self.calibration is not None:
            kept["scores"] = np.array(self.calibration.scores)
        about = {
            "base": meta,
            "names": list(design.sums.names),
            "scopes": [list(scope) for scope, _ in design.sums.parts],
            "typical_ms": design.typical_ms,
            "curve": list(design.curve),
        }
        return kept, about

    @classmethod
    def from_state(
        cls, space: SearchSpace, provenance: Provenance, arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]
    ) -> CalibratedOracle:
        """Inverse of ``state``."""
        if not isinstance(space, FactoredSpace):
            raise UsageError(f"{space.name} does not factor into blocks")
        inner = {name.removeprefix("base/"): array for name, array in arrays.items() if name.startswith("base/")}
        base = LutOracle.from_state(space, provenance, inner, meta["base"])
        parts = tuple((tuple(scope), arrays[f"sums/{i}"]) for i, scope in enumerate(meta["scopes"]))
        sums = Additive(tuple(meta["names"]), arrays["sums/constant"], parts)
        mean, sd = meta["curve"]
        design = Design(space, sums, meta["typical_ms"], arrays["scales"], (mean, sd))
        posterior = Posterior(**{name: arrays[name] for name in _POSTERIOR})
        scores = arrays.get("scores")
        calibration = None if scores is None else Conformal(tuple(scores.tolist()))
        return cls(space, provenance, base, design, posterior, calibration)

    # -- the correction

    @cached_property
    def _theta(self) -> Floats:
        """(F,) posterior mean of the coefficients."""
        post = self.posterior
        theta: Floats = post.prior_variance(self.design.groups) * (post.phi.T @ post.alpha)
        return theta

    def _curve(self, weights: Any, variance: Any) -> Any:
        """g, ms, where the standardised weights are Gaussian: (...) mean and variance -> (...)."""
        post = self.posterior
        width, length = np.exp(post.log_widths[5:7])
        gain = _like(weights, post.alpha / post.sums_ms * self.design.typical_ms**2 * width**2 * length)
        spread = (variance + length**2) ** 0.5
        z = (weights[..., None] - _like(weights, post.weights)) / (spread[..., None] if np.ndim(spread) else spread)
        found = (gain * _exp(-0.5 * z * z)).sum(-1)
        return found / spread

    def _weights_variance(self, p: Any) -> Any:
        """Variance of the standardised weights, sites taken as independent (those that share a decision are not)."""
        column = self.design.sums
        mean = Additive(("w", "w2"), np.zeros(2), tuple((s, v[..., :1] ** np.arange(1, 3)) for s, v in column.parts))
        total: Any = 0.0
        for part in mean.parts:
            moments = replace(mean, parts=(part,)).expected(p)
            total = total + moments[..., 1] - moments[..., 0] ** 2
        return total * (total > 0) / self.design.curve[1] ** 2

    def _predict(self, archs: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """(N, D) -> ms and the predictive standard deviation of its logarithm, (N,) each."""
        canonical = _canonical(self.space, archs)
        sums_ms = self.base.latencies(canonical)
        phi, weights = self.design.of(canonical, sums_ms)
        mean: Floats = np.asarray(sums_ms + phi @ self._theta + self._curve(weights, 0.0))
        post = self.posterior
        scaled = phi / sums_ms[:, None]
        variance = post.prior_variance(self.design.groups)
        width, length, noise = np.exp(post.log_widths[5:8])
        ratio = self.design.typical_ms / sums_ms
        cross = (scaled * variance) @ post.phi.T + _curve_kernel(
            weights, post.weights, ratio, self.design.typical_ms / post.sums_ms, width, length
        )
        own = (scaled**2) @ variance + (width * ratio) ** 2
        spread = np.maximum(own - np.einsum("ij,jk,ik->i", cross, post.inverse, cross), 0) + noise**2
        return mean, np.sqrt(spread)

    def _factors(self, slope: float, offset: float) -> tuple[float, list[Factor]]:
        """The posterior mean as a constant and factors; g is offset + slope * standardised weights."""
        design, theta = self.design, self._theta
        n_types = len(design.sums.names) - 3
        scale, constant, types, physical = np.split(theta[: 5 + n_types], [1, 2, 2 + n_types])
        per_column = np.concatenate([physical * design.typical_ms / design.scales, types])
        per_column[0] += slope / design.curve[1]
        total = float(constant[0] * design.typical_ms + offset - slope * design.curve[0] / design.curve[1])
        total += float(design.sums.constant @ per_column)
        factors = [replace(f, values=f.values * (1 + scale[0])) for f in self.base.factors]
        for i, (scope, values) in enumerate(design.sums.parts):
            factors.append(Factor(f"correction{i}", scope, values @ per_column))
        at = 5 + n_types
        for d, decision in enumerate(self.space.decisions):
            k = len(decision.options)
            factors.append(
                Factor(f"decision{d}", (d,), theta[at : at + k] * design.typical_ms / len(self.space.decisions))
            )
            at += k
        return total, factors

    @cached_property
    def _tabulated(self) -> FactorOracle | None:
        """Every architecture of a small space in one factor: exact in expectation, and dead edges cost nothing."""
        if self.space.size > MAX_TABULATED:
            return None
        shape = tuple(len(d.options) for d in self.space.decisions)
        archs = np.stack(np.unravel_index(np.arange(self.space.size), shape), axis=1)
        values = self._predict(archs)[0].reshape(shape)
        return FactorOracle(self.space, (Factor("network", tuple(range(len(shape))), values),), self.provenance)


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


def _design(space: FactoredSpace, base: LutOracle, archs: NDArray[np.int64], sums_ms: Floats) -> Design:
    """The features of a space over the block latencies of `base`; its typical figures are those of `archs`."""
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
    totals = sums.of(archs)[:, :3]
    rng = np.random.default_rng(0)
    sampled = np.array([space.sample(rng) for _ in range(500)], np.int64)
    weights = sums.of(_canonical(space, sampled))[:, 0]
    return Design(
        space,
        sums,
        float(np.median(sums_ms)),
        np.maximum(np.median(totals, axis=0), 1.0),
        (float(weights.mean()), float(max(weights.std(), 1.0))),
    )


def _fit(
    phi: Floats, weights: Floats, sums_ms: Floats, errors: Floats, design: Design, curve: bool
) -> tuple[Posterior, Floats, Floats]:
    """The posterior, and each network's leave-one-out mean and standard deviation."""
    groups, ratio = design.groups, design.typical_ms / sums_ms
    grams = [phi[:, groups == g] @ phi[:, groups == g].T for g in range(len(GROUPS))]
    inflate = np.ones(len(errors))

    def covariance(logs: Floats) -> Floats:
        width, length, noise = np.exp(logs[5:8])
        k = sum(np.exp(2 * log) * gram for log, gram in zip(logs, grams, strict=False))
        if curve:
            k = k + _curve_kernel(weights, weights, ratio, ratio, width, length)
        return cast(Floats, k + np.diag(noise**2 * inflate))

    def objective(logs: Floats) -> float:
        try:
            lower = cholesky(covariance(logs), lower=True)
        except np.linalg.LinAlgError:
            return 1e10
        fit = float(errors @ cho_solve((lower, True), errors))
        return 0.5 * fit + float(np.log(np.diag(lower)).sum()) + 0.5 * float((((logs - PRIOR) / PRIOR_SD) ** 2).sum())

    logs: Floats = PRIOR.copy()
    for _ in range(MAX_REWEIGHTINGS):
        if len(errors) >= MIN_TO_TUNE:
            found = minimize(objective, logs, method="L-BFGS-B", bounds=[(p - 5, p + 4) for p in PRIOR])
            logs = np.asarray(found.x, np.float64)
        inverse = np.linalg.inv(covariance(logs))
        alpha = inverse @ errors
        variance = 1 / np.diag(inverse)  # of leaving each out: Rasmussen and Williams 2006, 5.12
        z = np.abs(alpha) * np.sqrt(variance)
        if not (z > OUTLIER).any():
            break
        inflate = inflate * np.maximum(1.0, (z / OUTLIER) ** 2)
    if not curve:
        logs = np.array([*logs[:5], -np.inf, *logs[6:]])
    return (
        Posterior(logs, phi, weights, sums_ms, np.asarray(inverse, np.float64), np.asarray(alpha, np.float64)),
        errors - alpha * variance,
        np.sqrt(variance),
    )


def _curve_kernel(a: Floats, b: Floats, ratio_a: Floats, ratio_b: Floats, width: float, length: float) -> Floats:
    """(n,), (m,) standardised weights -> (n, m) covariance of g / S."""
    z = (a[:, None] - b[None, :]) / length
    found: Floats = width**2 * np.exp(-0.5 * z * z) * ratio_a[:, None] * ratio_b[None, :]
    return found


def _canonical(space: SearchSpace, archs: Archs) -> NDArray[np.int64]:
    """The architectures in their one spelling: what a network leaves out is silenced."""
    array = np.asarray(archs, np.int64)
    if type(space).canonical is SearchSpace.canonical:
        return array
    distinct, back = np.unique(array, axis=0, return_inverse=True)
    found = np.array([space.canonical(tuple(int(i) for i in arch)) for arch in distinct], np.int64)
    return found.reshape(-1, array.shape[1])[back.ravel()]


def _like(like: Any, values: Any) -> Any:
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


def _exp(values: Any) -> Any:
    return values.exp() if hasattr(values, "exp") else np.exp(values)
