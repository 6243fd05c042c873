"""Tests of many ratios at once: variances moderated over all rows, three regions, adjusted p-values. Pure."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import digamma, polygamma, stdtr

Floats = NDArray[np.float64]

CERTAIN = 1e6  # degrees of freedom of a standard deviation that is known
_ENOUGH = 10  # rows from which the scatter of variances can be told


def adjust(p: Floats) -> Floats:
    """(N,) p-values -> (N,) adjusted for their number (Benjamini and Hochberg): of those with q <= a, at most the share
    a are expected to be false."""
    n = len(p)
    order = np.argsort(p)
    scaled = p[order] * (n / np.arange(1, n + 1))
    q = np.empty(n)
    q[order] = np.minimum.accumulate(scaled[::-1])[::-1]
    return np.minimum(q, 1.0)


def region_tests(log_ratio: Floats, error: Floats, dof: Floats, margin: float) -> tuple[Floats, Floats]:
    """(N,) p-values of "the change lies within the margin" and of "it lies beyond", all in logarithms.

    The first is small for changes beyond: both tails, at the border of the margin, where they are largest (McCarthy and
    Smyth 2009, eq. 3). The second is small for sameness (the larger of two one-sided tests). An error of 0 decides
    without doubt.
    """

    def above(distance: Floats) -> Floats:  # p-value against "not above 0"
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.where(error > 0, distance / error, np.where(distance > 0, np.inf, -np.inf))
        upper: Floats = stdtr(dof, -t)
        return upper

    size = np.abs(log_ratio)
    change = np.minimum(above(size - margin) + above(size + margin), 1.0)
    same = above(margin - size)
    return change, same


def moderate(variances: Floats, dofs: Floats) -> tuple[Floats, Floats]:
    """(N,) variances and their degrees of freedom -> (N,) each, with what all rows tell of the spread put in.

    A variance of four blocks is known to within a factor of 3. The true ones are taken to scatter as s0^2 d0 / chi^2
    with d0 degrees of freedom: s0 and d0 come from the scatter of log variances beyond that of chi^2, and a row's
    variance becomes (d0 s0^2 + d s^2) / (d0 + d) with d0 + d degrees of freedom. Smyth 2004, section 6. Variances of 0
    and those that are known stay; below ten others nothing changes.
    """
    found = (variances > 0) & (dofs < CERTAIN)
    if found.sum() < _ENOUGH:
        return variances, dofs
    half = dofs[found] / 2
    logs = np.log(variances[found]) - digamma(half) + np.log(half)
    excess = float(logs.var(ddof=1) - polygamma(1, half).mean())
    prior = 2 * _trigamma_inverse(excess) if excess > 0 else CERTAIN  # no more scatter than chi^2 has: all are one
    centre = float(np.exp(logs.mean() + digamma(prior / 2) - np.log(prior / 2)))
    posterior = (prior * centre + dofs * variances) / (prior + dofs)
    return np.where(found, posterior, variances), np.where(found, np.minimum(prior + dofs, CERTAIN), dofs)


def _trigamma_inverse(y: float) -> float:
    """x > 0 with trigamma(x) = y, by Newton's method on 1 / trigamma, which is convex. Smyth 2004, appendix."""
    x = 0.5 + 1 / y
    for _ in range(50):
        trigamma = float(polygamma(1, x))
        step = trigamma * (1 - trigamma / y) / float(polygamma(2, x))
        x += step
        if abs(step) < 1e-8 * x:
            break
    return x
