"""The Gaussian process of ``CalibratedOracle``: coefficients of the features and a curve over the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky
from scipy.optimize import minimize

from latbench.oracle.base import Floats
from latbench.oracle.calibrated_design import GROUPS, Design

# Centres of the log-normal hyperpriors: relative widths of each group's correction, of the curve, its length in
# standard deviations of W, the noise. And how far the likelihood may pull them (standard deviations of the logarithm).
PRIOR = np.log([0.03, 0.01, 0.02, 0.01, 0.003, 0.02, 1.0, 0.005])
PRIOR_SD = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 1.0])
MIN_TO_TUNE = 8  # networks, below which the hyperparameters stay at their priors
OUTLIER = 3.0  # standard deviations beyond which a network counts for less
MAX_REWEIGHTINGS = 6
MAX_REFITTED = 100  # networks, beyond which hyperparameters are not found anew without each fold
FOLDS = 10


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

    def predict(self, design: Design, phi: Floats, weights: Floats, sums_ms: Floats) -> tuple[Floats, Floats]:
        """Features (N, F) over their sums, standardised weights and sums (N,) -> relative error and its deviation."""
        variance = self.prior_variance(design.groups)
        width, length, noise = np.exp(self.log_widths[5:8])
        ratio = design.typical_ms / sums_ms
        cross = (phi * variance) @ self.phi.T + curve_kernel(
            weights, self.weights, ratio, design.typical_ms / self.sums_ms, width, length
        )
        own = (phi**2) @ variance + (width * ratio) ** 2
        spread = np.maximum(own - np.einsum("ij,jk,ik->i", cross, self.inverse, cross), 0) + noise**2
        return cross @ self.alpha, np.sqrt(spread)


def posterior_of(
    phi: Floats, weights: Floats, sums_ms: Floats, errors: Floats, design: Design, curve: bool
) -> tuple[Posterior, Floats, Floats]:
    """The posterior, and what it says of each network without it: (n,) means and deviations. Without any, the prior.

    Few networks are left out in folds, the hyperparameters found anew for each: those of all know the one left out.
    """
    n = len(errors)
    if not n:
        return Posterior(PRIOR.copy(), phi, weights, sums_ms, np.zeros((0, 0)), errors), errors, errors
    posterior, left_out, deviation = _fit(phi, weights, sums_ms, errors, design, curve)
    if MIN_TO_TUNE <= n <= MAX_REFITTED:
        fold = np.random.default_rng(0).permutation(np.arange(n) % min(n, FOLDS))
        for out in range(min(n, FOLDS)):
            kept, left = np.flatnonzero(fold != out), np.flatnonzero(fold == out)
            part, _, _ = _fit(phi[kept], weights[kept], sums_ms[kept], errors[kept], design, curve)
            left_out[left], deviation[left] = part.predict(design, phi[left], weights[left], sums_ms[left])
    return posterior, left_out, deviation


def _fit(
    phi: Floats, weights: Floats, sums_ms: Floats, errors: Floats, design: Design, curve: bool
) -> tuple[Posterior, Floats, Floats]:
    """The posterior, and each network's leave-one-out mean and deviation at its hyperparameters."""
    groups, ratio = design.groups, design.typical_ms / sums_ms
    grams = [phi[:, groups == g] @ phi[:, groups == g].T for g in range(len(GROUPS))]
    inflate = np.ones(len(errors))

    def covariance(logs: Floats) -> Floats:
        width, length, noise = np.exp(logs[5:8])
        k = sum(np.exp(2 * log) * gram for log, gram in zip(logs, grams, strict=False))
        if curve:
            k = k + curve_kernel(weights, weights, ratio, ratio, width, length)
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


def curve_kernel(a: Floats, b: Floats, ratio_a: Floats, ratio_b: Floats, width: float, length: float) -> Floats:
    """(n,), (m,) standardised weights -> (n, m) covariance of g / S."""
    z = (a[:, None] - b[None, :]) / length
    found: Floats = width**2 * np.exp(-0.5 * z * z) * ratio_a[:, None] * ratio_b[None, :]
    return found
