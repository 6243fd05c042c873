"""The Gaussian process behind ``LearnedOracle``: kernels on what a network costs and on what was chosen.

Latency, over the mean of the measured ones, is a prior mean (the average of relative kernels, MACs and traffic) plus a
sum of terms: linear in totals, in sums per kind of kernel and per level, in blocks and in decisions; smooth in totals
and kinds (the larger of launch and compute time does not add up); and falling with the number of differing decisions.
Noise is relative. What a term is worth is found by maximum a posteriori (Rasmussen and Williams 2006, ch. 5), under
log-normal priors that keep 10 measurements from being taken at their word. Outliers are trusted less, as Student's t
would have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize

from latbench.oracle.base import Archs, Floats
from latbench.oracle.features import Ints, View
from latbench.oracle.learned_features import Features, Scaler, scaler
from latbench.spaces.base import SearchSpace

# Log-normal priors of the hyperparameters, in units of the mean latency: (median, sd of the logarithm). Set once for
# all spaces and devices; a median says how much of the latency such a term usually moves.
PRIORS = {
    "total": (0.3, 1.0),
    "kind": (0.3, 1.0),
    "level": (0.06, 1.0),
    "block": (0.1, 1.0),
    "decision": (0.01, 1.5),
    "smooth": (0.03, 1.5),
    "smooth_length": (3.7, 0.5),  # in sds of the features
    "chosen": (0.01, 1.5),
    "chosen_length": (0.6, 0.7),  # share of the decisions that differ
    "noise": (0.02, 1.5),
    "drift": (0.02, 1.0),
    "drift_length": (0.03, 1.5),  # share of the whole measuring order
}
CONSTANT = 0.25  # prior variance of the overall level
LEAST_WEIGHT = 0.2  # of the mean latency: the noise of faster networks is not relative
TRUSTED = 2.5  # robust sds of a left-out residual beyond which a measurement counts less
MAX_TUNED = 400  # measurements that settle the hyperparameters: each step of the search is cubic in them
_JITTER = 1e-10


@dataclass(frozen=True, eq=False)
class Measured:
    """What the process learns from."""

    archs: Ints  # (n, D)
    latency_ms: Floats  # (n,), > 0
    order: Floats | None = None  # (n,) place in the measuring order, where drift is to be told from the networks

    def take(self, rows: Any) -> Measured:
        """Some of the measurements."""
        return Measured(self.archs[rows], self.latency_ms[rows], None if self.order is None else self.order[rows])

    def __len__(self) -> int:
        return len(self.latency_ms)


@dataclass(frozen=True, eq=False)
class _Gram:
    """Pairwise statistics of two sets of rows, from which every kernel is made."""

    linear: tuple[Floats, ...]
    distance: Floats  # squared, of smooth features
    differing: Floats  # share of the decisions
    apart: Floats | None  # share of the measuring order


def _gram(a: Features, b: Features, orders: tuple[Floats, Floats] | None, span: float) -> _Gram:
    linear = tuple(x @ y.T for x, y in zip(a.linear, b.linear, strict=True))
    distance = (a.smooth**2).sum(1)[:, None] + (b.smooth**2).sum(1) - 2 * a.smooth @ b.smooth.T
    differing = np.zeros((len(a), len(b)))
    for x, y in zip(a.decisions.T, b.decisions.T, strict=True):
        differing += x[:, None] != y
    apart = None if orders is None else abs(orders[0][:, None] - orders[1]) / span
    return _Gram(linear, np.maximum(distance, 0), differing / max(a.decisions.shape[1], 1), apart)


def _kernel(theta: Floats, gram: _Gram, *, slopes: bool = False) -> tuple[Floats, list[Floats]]:
    """The sum without noise and drift and, if asked, its derivatives by `theta` (logarithms; PRIORS up to noise)."""
    n_linear = len(gram.linear)
    smooth, length, chosen, reach = theta[n_linear : n_linear + 4]
    near = gram.distance * np.exp(-2 * length)
    smooths = np.exp(2 * smooth - 0.5 * near)
    unlike = gram.differing * np.exp(-reach)
    likes = np.exp(2 * chosen - unlike)
    total = CONSTANT + smooths + likes
    for t, g in zip(theta[:n_linear], gram.linear, strict=True):
        total += np.exp(2 * t) * g
    if not slopes:
        return total, []
    parts = (np.exp(2 * t) * g for t, g in zip(theta[:n_linear], gram.linear, strict=True))
    return total, [*(2 * p for p in parts), 2 * smooths, smooths * near, 2 * likes, likes * unlike]


def _drift(theta: Floats, apart: Floats) -> tuple[Floats, list[Floats]]:
    """Relative drift: exponential in the distance along the measuring order; derivatives by its two parameters."""
    away = apart * np.exp(-theta[1])
    kernel = np.exp(2 * theta[0] - away)
    return kernel, [2 * kernel, kernel * away]


@dataclass(frozen=True, eq=False)
class Process:
    """A process on one view: a value. Its system's rows are divided by the scale of their noise (`weight`)."""

    scaler: Scaler
    measured: Measured
    theta: Floats  # logarithms, in the order of PRIORS; the last two only where there is an order
    trust: Floats  # (n,) in (0, 1]: variance of the noise is divided by it
    log_evidence: float
    level: Floats | None = None  # (n,) predictions that know no drift, relative to `unit_ms`: what drift multiplies

    @cached_property
    def unit_ms(self) -> float:
        return float(self.measured.latency_ms.mean())

    @cached_property
    def features(self) -> Features:
        return self.scaler(self.measured.archs)

    @cached_property
    def span(self) -> float:
        order = self.measured.order
        return 1.0 if order is None else float(max(np.ptp(order), 1.0))

    @property
    def noise(self) -> float:
        """Relative standard deviation of one measurement."""
        return float(np.exp(self.theta[_N_KERNEL]))

    @cached_property
    def weight(self) -> Floats:
        """(n,) scale of each measurement's noise, relative to `unit_ms`; larger where it is not trusted."""
        return np.maximum(self.measured.latency_ms / self.unit_ms, LEAST_WEIGHT) / np.sqrt(self.trust)

    @cached_property
    def solved(self) -> tuple[Floats, Floats, Floats]:
        """(n,) weighted coefficients, (n, n) lower Cholesky factor, (n,) weighted residuals left out one at a time."""
        target = (self.measured.latency_ms / self.unit_ms - self.features.mean) / self.weight
        system, _ = self.system(self.theta)
        lower = cholesky(system, lower=True, check_finite=False)
        coefficients = cho_solve((lower, True), target, check_finite=False)
        inverse = np.diag(cho_solve((lower, True), np.eye(len(target)), check_finite=False))
        return coefficients, lower, coefficients / inverse

    @cached_property
    def _gram(self) -> _Gram:
        order = self.measured.order if self.level is not None else None
        return _gram(self.features, self.features, None if order is None else (order, order), self.span)

    def system(self, theta: Floats, *, slopes: bool = False) -> tuple[Floats, list[Floats]]:
        """Covariance of the weighted measurements at `theta` and, if asked, its derivatives."""
        both = 1 / np.outer(self.weight, self.weight)
        total, derived = _kernel(theta[:_N_KERNEL], self._gram, slopes=slopes)
        total *= both
        noise = np.exp(2 * theta[_N_KERNEL])
        total[np.diag_indices_from(total)] += noise + _JITTER
        derived = [*(s * both for s in derived), *([2 * noise * np.eye(len(total))] if slopes else [])]
        if self.level is not None and self._gram.apart is not None:
            drift, drift_slopes = _drift(theta[_N_KERNEL + 1 :], self._gram.apart)
            both = np.outer(self.level / self.weight, self.level / self.weight)
            total += drift * both
            derived += [s * both for s in drift_slopes]
        return total, derived

    def without(self, rows: Ints) -> Process:
        """The same hyperparameters on the other measurements."""
        kept = np.delete(np.arange(len(self.measured)), rows)
        measured = self.measured.take(kept)
        level = None if self.level is None else self.level[kept]
        return replace(self, measured=measured, trust=self.trust[kept], level=level)

    def predict(self, archs: Archs, order: Floats | None = None, *, deviation: bool = False) -> tuple[Floats, Floats]:
        """(N, D) -> (N,) ms and, if asked, (N,) relative standard deviations of a new measurement (else empty)."""
        coefficients, lower, _ = self.solved
        rows, measured_at = self.scaler(archs), self.measured.order
        orders = None if order is None or measured_at is None else (order, measured_at)
        cross, _ = _kernel(self.theta[:_N_KERNEL], gram := _gram(rows, self.features, orders, self.span))
        cross /= self.weight
        value = rows.mean + cross @ coefficients
        if gram.apart is not None and self.level is not None:
            along, _ = _drift(self.theta[_N_KERNEL + 1 :], gram.apart)
            along *= np.maximum(value, LEAST_WEIGHT)[:, None] * self.level / self.weight
            value = value + along @ coefficients
            cross += along
        if not deviation:
            return self.unit_ms * value, np.empty(0)
        own = CONSTANT + np.exp(2 * self.theta[_SMOOTH]) + np.exp(2 * self.theta[_CHOSEN])
        for t, x in zip(self.theta, rows.linear, strict=False):
            own = own + np.exp(2 * t) * (x**2).sum(1)
        known = (solve_triangular(lower, cross.T, lower=True, check_finite=False) ** 2).sum(0)
        scale = np.maximum(value, LEAST_WEIGHT)
        drift = 0.0 if self.level is None else np.exp(2 * self.theta[_N_KERNEL + 1]) * scale**2
        variance = np.maximum(own + drift - known, 0) + (self.noise * scale) ** 2
        return self.unit_ms * value, np.sqrt(variance) / scale


_NAMES = [name for name in PRIORS if not name.startswith("drift")]
_N_KERNEL = _NAMES.index("noise")
_SMOOTH, _CHOSEN = _NAMES.index("smooth"), _NAMES.index("chosen")


def fit(space: SearchSpace, view: View, measured: Measured) -> Process:
    """Hyperparameters by maximum a posteriori; then drift along the order, if known; then outliers are trusted less.

    Of more than MAX_TUNED measurements, as many at random settle the hyperparameters, and all are used.
    """
    names = list(_NAMES)
    some = np.random.default_rng(0).permutation(len(measured))[:MAX_TUNED]
    part = measured.take(np.sort(some))
    process = _maximise(Process(scaler(space, view.name), part, _medians(names), np.ones(len(part)), 0.0), names)
    whole = replace(process, measured=measured, trust=np.ones(len(measured)))
    if measured.order is not None:
        names += ["drift", "drift_length"]
        theta = np.concatenate([process.theta, _medians(names[-2:])])
        process = _maximise(replace(process, theta=theta, level=_level(process)), names)
        whole = replace(whole, theta=process.theta, level=_level(whole))
    trust = _trust(process)
    if (trust < 1).any():
        process = replace(_maximise(replace(process, trust=trust), names), log_evidence=process.log_evidence)
    if len(part) == len(measured):
        return process
    whole = replace(whole, theta=process.theta, log_evidence=process.log_evidence)
    return replace(whole, trust=_trust(whole))


def _level(process: Process) -> Floats:
    """(n,) predictions for the measured networks, each from the others, by a process that knows no drift."""
    left_out = process.measured.latency_ms / process.unit_ms - process.solved[2] * process.weight
    level: Floats = np.maximum(left_out, LEAST_WEIGHT)
    return level


def _trust(process: Process) -> Floats:
    """(n,) 1, or less where a measurement is further off the prediction from the others than is usual."""
    left_out = abs(process.solved[2])
    typical = 1.4826 * np.median(left_out) + 1e-12
    trust: Floats = np.minimum(1.0, TRUSTED * typical / np.maximum(left_out, 1e-12)) ** 2
    return trust


def _medians(names: Sequence[str]) -> Floats:
    return np.log([PRIORS[name][0] for name in names])


def _maximise(process: Process, names: Sequence[str]) -> Process:
    centre, spread = _medians(names), np.array([PRIORS[name][1] for name in names])
    target = (process.measured.latency_ms / process.unit_ms - process.features.mean) / process.weight

    def loss(theta: Floats) -> tuple[float, Floats]:
        system, slopes = process.system(theta, slopes=True)
        try:
            lower = cho_factor(system, lower=True, overwrite_a=True, check_finite=False)
        except np.linalg.LinAlgError:  # at the ends of the search only
            return 1e10, np.zeros_like(theta)
        coefficients = cho_solve(lower, target, check_finite=False)
        inverse = cho_solve(lower, np.eye(len(target)), check_finite=False)
        pull = inverse - np.outer(coefficients, coefficients)
        off = (theta - centre) / spread
        value = 0.5 * target @ coefficients + np.log(np.diag(lower[0])).sum() + 0.5 * off @ off
        return float(value), np.array([0.5 * np.vdot(pull, s) for s in slopes]) + off / spread

    bounds = [(-14, 4)] * len(names)
    found = minimize(
        loss, process.theta, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 60, "ftol": 1e-6}
    )
    return replace(process, theta=found.x, log_evidence=-float(found.fun))
