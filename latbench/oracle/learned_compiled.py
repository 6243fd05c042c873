"""A Gaussian process's mean as it is asked: one weight per figure and decision, and the distances to what it measured.

Linear terms collapse to sums over sites, whose expectation is exact; so is that of the term that falls with the number
of differing decisions, as these are independent. The smooth term is taken at the expected features; where one decision
enters most sites (once-for-all's resolution), at those given each of its options, which takes out most of the error.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from latbench.oracle.base import Floats
from latbench.oracle.features import Additive, Ints, Whole
from latbench.oracle.learned_features import GROUPS
from latbench.oracle.learned_gp import CONSTANT, Process


@dataclass(frozen=True, eq=False)
class Compiled:
    """The mean of one process whose view counts every decision."""

    sums: Additive | Whole  # (1 + Q) figures: the linear terms' value, ms, and the smooth features
    chosen: Floats  # (D, K) ms per option
    smooth: Floats  # (n, Q) the measured networks' features
    measured: Ints  # (n, D) their decisions
    smooth_ms: Floats  # (n,) coefficients of the two kernels
    alike_ms: Floats
    reach: float  # factor per differing decision
    hub: tuple[int, int] | None  # a decision that most sites depend on, and how many options it has

    def of(self, archs: Ints) -> Floats:
        """(N, D) -> (N,) ms."""
        x = self.sums.of(archs)
        value = x[:, 0] + self.chosen[np.arange(archs.shape[1]), archs].sum(1)
        z = x[:, 1:]
        distance = (z**2).sum(1)[:, None] + (self.smooth**2).sum(1) - 2 * z @ self.smooth.T
        differing = np.zeros(distance.shape)
        for ours, theirs in zip(archs.T, self.measured.T, strict=True):
            differing += ours[:, None] != theirs
        total: Floats = value + np.exp(-0.5 * distance) @ self.smooth_ms + self.reach**differing @ self.alike_ms
        return total

    def expected(self, p: Any) -> Any:
        """(..., D, K) float64 probabilities, numpy or torch -> (...) ms; exact but for the smooth term."""
        make = p.new_tensor if hasattr(p, "new_tensor") else np.asarray
        d, k = self.chosen.shape
        agree = p[..., np.arange(d), self.measured]  # (..., n, D)
        alike = (self.reach + (1 - self.reach) * agree).prod(-1) @ make(self.alike_ms)
        given = p if self.hub is None else _given(p, *self.hub, make)  # (O, ..., D, K)
        x = self.sums.expected(given)
        distance = ((x[..., None, 1:] - make(self.smooth)) ** 2).sum(-1)  # (O, ..., n)
        value = x[..., 0] + exp(-0.5 * distance) @ make(self.smooth_ms)
        if self.hub is not None:
            decision, n = self.hub
            value = (value.reshape(n, -1) * p[..., decision, :n].reshape(-1, n).T).sum(0).reshape(alike.shape)
        return value + alike + (p[..., :k] * make(self.chosen)).sum(-1).sum(-1)


def _given(p: Any, decision: int, n: int, make: Any) -> Any:
    """(..., D, K) -> (n, ..., D, K): the decision's row certain of each of its options."""
    others = np.ones((p.shape[-2], 1))
    others[decision] = 0
    fixed = np.zeros((n, *(1,) * (p.ndim - 2), *p.shape[-2:]))
    fixed[np.arange(n), ..., decision, np.arange(n)] = 1
    return p * make(others) + make(fixed)


def compiled(process: Process) -> Compiled:
    """The mean of `process` where it knows of no drift."""
    scaler, rows = process.scaler, process.features
    theta = dict(zip((*GROUPS, "smooth", "smooth_length", "chosen", "chosen_length"), process.theta, strict=False))
    coefficients = process.unit_ms * process.solved[0] / process.weight
    worth = [np.exp(2 * theta[g]) * (x.T @ coefficients) for g, x in zip(GROUPS, rows.linear, strict=True)]
    weight, shift = process.unit_ms * scaler.mean[0], process.unit_ms * scaler.mean[1] + CONSTANT * coefficients.sum()
    for (matrix, offset), w in zip(scaler.linear, worth, strict=False):
        weight, shift = weight + matrix @ w, shift + offset @ w
    chosen = scaler.decision_scale * worth[-1].reshape(scaler.shares.shape)
    shift = shift - (chosen * scaler.shares).sum()
    short = np.exp(-theta["smooth_length"])
    matrix = np.hstack([weight[:, None], short * scaler.smooth[0]])
    sums = process.scaler.view.sums.combine(matrix, np.concatenate([[shift], short * scaler.smooth[1]]))
    return Compiled(
        sums,
        chosen,
        short * rows.smooth,
        rows.decisions,
        np.exp(2 * theta["smooth"]) * coefficients,
        np.exp(2 * theta["chosen"]) * coefficients,
        float(np.exp(-np.exp(-theta["chosen_length"]) / max(rows.decisions.shape[1], 1))),
        _hub(sums),
    )


def _hub(sums: Additive | Whole) -> tuple[int, int] | None:
    """The decision that most of at least 3 scopes share, if any, and its number of options."""
    sizes = {d: n for scope, values in sums.parts for d, n in zip(scope, values.shape, strict=False)}
    counts = Counter(d for scope, _ in sums.parts for d in scope)
    decision, often = max(counts.items(), key=lambda item: item[1], default=(0, 0))
    return (decision, sizes[decision]) if len(sums.parts) >= 3 and 2 * often > len(sums.parts) else None


def raised(value: Any, floor: float) -> Any:
    """`value` where it is above `floor`; below, smoothly towards 0 and never there."""
    above = value.clip(floor)  # numpy's and torch's
    return above + floor * (exp((value - above) / floor) - 1)


def exp(x: Any) -> Any:
    """Elementwise, of numpy or torch."""
    return x.exp() if hasattr(x, "exp") else np.exp(x)
