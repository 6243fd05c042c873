"""Non-negative least squares with a squared hinge on pairs of unknowns: the problem of AOWS's latency fit, solved.

    minimise  |Mx - y|^2 + kappa * sum_r max(0, x[lower_r] - x[higher_r])^2   subject to  x >= 0

(Berman et al. 2020, eq. 7; ``Problem.objective`` is that number, unscaled.) The objective is piecewise quadratic and
convex. ``solve`` takes a hundred projected gradient steps of Barzilai and Borwein's length, which find most of the
active pieces in a sixtieth of a second (and spare the tenth that importing scipy.optimize takes), then projected
semismooth Newton steps (Bertsekas 1982; Qi and Sun 1993) with a line search, one P x P Cholesky each, in
single precision where that suffices: gradients stay in double, so only the direction is rounded. ``solve_cvxpy`` states
the same problem to cvxpy, as the released code does: the reference, and the fall-back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from latbench.errors import UsageError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

FIRST_STEPS = 100  # by gradients: more cost what they save in Newton steps
MAX_NEWTON = 100  # 4 to 20 are usual
LADDER = 100.0  # the kappa that is solved first
LINE_STEPS, MAX_LINE_STEPS = 7, 40
SHIFT = 1e-7  # of the largest diagonal entry: what keeps a Hessian with free directions (the chain's gauge) definite
CVXPY_SOLVERS = ("CLARABEL", "SCS", "OSQP")


@dataclass(frozen=True, eq=False)
class Problem:
    """N measurements, P unknowns, R pairs."""

    design: csr_matrix[Any]  # M: (N, P)
    target: Floats  # y: (N,)
    pairs: Integers  # (R, 2): lower, higher; each pair once
    kappa: float

    def objective(self, x: Floats) -> float:
        """As the paper states it, in squared units of the target."""
        return self._value(x)[0]

    def gradient(self, x: Floats) -> tuple[float, Floats]:
        """The objective and its (P,) gradient."""
        value, residual, hinge = self._value(x)
        lower, higher = self.pairs.T
        slope = self.design.T @ residual + self.kappa * (
            np.bincount(lower, hinge, len(x)) - np.bincount(higher, hinge, len(x))
        )
        return value, 2 * slope

    def _value(self, x: Floats) -> tuple[float, Floats, Floats]:
        residual = self.design @ x - self.target
        hinge = np.maximum(0.0, x[self.pairs[:, 0]] - x[self.pairs[:, 1]])
        return float(residual @ residual + self.kappa * (hinge @ hinge)), residual, hinge


@dataclass(frozen=True, eq=False)
class Solution:
    """The minimiser and how close to it the iteration came."""

    x: Floats  # (P,) >= 0
    objective: float
    excess: float  # estimated distance to the optimum, relative: the last Newton decrement
    newton_steps: int
    factor: Callable[[Floats], Floats]  # solves with half the Hessian on the active pieces: (P, m) -> (P, m)


def solve(problem: Problem, tolerance: float = 1e-7) -> Solution:
    """To an estimated relative excess of `tolerance`, or as near as rounding lets it come; see ``Solution.excess``."""
    scale = float(np.abs(problem.target).mean())
    if not scale > 0:
        raise UsageError("nothing to fit: every target is 0")
    scaled = replace(problem, target=problem.target / scale, kappa=min(problem.kappa, LADDER))
    start = np.full(problem.design.shape[1], problem.design.shape[0] / problem.design.sum())
    half = problem.design.astype(np.float32)
    gram = (half.T @ half).toarray(order="F")  # counts: exact in single precision; LAPACK's order
    x, steps = _gradient_steps(scaled, start), 0
    while scaled.kappa < problem.kappa:
        x, _, taken, _ = _newton(scaled, gram, x, 1e-3)
        steps += taken
        scaled = replace(scaled, kappa=min(problem.kappa, 10 * scaled.kappa))
    x, excess, taken, half_solver = _newton(scaled, gram, x, tolerance)
    return Solution(x * scale, problem.objective(x * scale), excess, steps + taken, half_solver)


def _gradient_steps(problem: Problem, x: Floats) -> Floats:
    """The best of the points on the way, each coordinate in units of its own curvature. Barzilai and Borwein 1988."""
    curvature = 2 * np.asarray(problem.design.multiply(problem.design).sum(axis=0)).ravel()
    curvature = np.maximum(curvature, 1e-3 * curvature.mean())  # where nothing was measured
    value, slope = problem.gradient(x)
    best, length = (value, x), 0.1
    for step in range(FIRST_STEPS):
        new = np.maximum(0.0, x - length * slope / curvature)
        value, new_slope = problem.gradient(new)
        if value < best[0]:
            best = value, new
        moved, turned = new - x, new_slope - slope
        along = float(moved @ turned)
        if along <= 0:  # at rest
            break
        length = moved @ (curvature * moved) / along if step % 2 else along / (turned @ (turned / curvature))
        x, slope = new, new_slope
    return best[1]


def _newton(
    problem: Problem, gram: NDArray[np.float32], x: Floats, tolerance: float
) -> tuple[Floats, float, int, Callable[[Floats], Floats]]:
    floor = 1e-15 * float(problem.target @ problem.target)  # noise-free data leave nothing to be relative to
    value, slope = problem.gradient(x)
    steps = 0
    while True:
        steps += 1
        fixed = (x <= 0) & (slope >= 0)
        solver = _factorise(problem, gram, x, fixed)
        slope[fixed] = 0.0
        direction = -0.5 * solver(slope)
        excess = -0.5 * float(slope @ direction) / (value + floor)
        new = _descend(problem, x, direction)
        old = value
        value, slope = problem.gradient(new)
        if value < old:
            x = new
        if excess <= tolerance or value >= old or steps == MAX_NEWTON:  # the second: rounding leaves no way down
            return x, excess, steps, solver


def _descend(problem: Problem, x: Floats, direction: Floats) -> Floats:
    """The best point of the projected ray, by bisection of its slope: a few gradients spare one Cholesky in four."""

    def falls_at(length: float) -> bool:
        raw = x + length * direction
        _, slope = problem.gradient(np.maximum(0.0, raw))
        return float(slope @ np.where(raw > 0, direction, 0.0)) <= 0

    low, high = (1.0, 1.0) if falls_at(1.0) else (0.0, 1.0)
    for step in range(MAX_LINE_STEPS if low < high else 0):
        if step >= LINE_STEPS and low > 0:
            break
        middle = (low + high) / 2
        low, high = (middle, high) if falls_at(middle) else (low, middle)
    return np.maximum(0.0, x + low * direction)


def _factorise(
    problem: Problem, gram: NDArray[np.float32], x: Floats, fixed: NDArray[np.bool_]
) -> Callable[[Floats], Floats]:
    """Cholesky of G + kappa * K_active' K_active + shift over the unknowns that are free to move; the rest stay."""
    from scipy.linalg import LinAlgError, cho_factor, cho_solve

    active = problem.pairs[x[problem.pairs[:, 0]] > x[problem.pairs[:, 1]]]
    lower, higher = active.max(axis=1), active.min(axis=1)  # row and column: LAPACK reads the lower triangle
    degree = problem.kappa * np.bincount(active.ravel(), minlength=len(x))
    for dtype, shift in ((np.float32, SHIFT), (np.float64, SHIFT / 10), (np.float64, 100 * SHIFT)):
        hessian = gram.astype(dtype, order="F")
        hessian[lower, higher] -= problem.kappa
        diagonal = np.einsum("ii->i", hessian)
        diagonal += degree.astype(dtype)
        diagonal += shift * diagonal.max()
        hessian[fixed, :] = 0
        hessian[:, fixed] = 0
        diagonal[fixed] = 1
        try:
            factor = cho_factor(hessian, lower=True, overwrite_a=True, check_finite=False)
        except LinAlgError:
            continue
        return partial(_solve_as, cho_solve, factor, dtype)
    raise UsageError(f"kappa={problem.kappa:g} leaves the fit without a unique direction; take a smaller one")


def _solve_as(cho_solve: Any, factor: Any, dtype: type, b: Floats) -> Floats:
    solved: Floats = cho_solve(factor, b.astype(dtype), check_finite=False).astype(np.float64)
    return solved


def solve_cvxpy(problem: Problem, solver: str = "CLARABEL", **options: Any) -> Floats:
    """(P,), by slack variables as the released code states it; with its own settings where none are given.

    Raises UsageError where cvxpy does not know or have the solver, or the solver gives up.
    """
    import cvxpy
    from scipy.sparse import csr_matrix

    cp: Any = cvxpy  # half of its names are made at run time
    n_rows, n_unknowns = len(problem.pairs), problem.design.shape[1]
    x = cp.Variable(n_unknowns)
    loss = cp.sum_squares(problem.design @ x - problem.target)
    constraints = [x >= 0]
    if problem.kappa and n_rows:
        each = np.arange(n_rows)
        rows = csr_matrix(
            (np.repeat([1.0, -1.0], n_rows), (np.r_[each, each], problem.pairs.T.ravel())), (n_rows, n_unknowns)
        )
        slack = cp.Variable(n_rows)
        loss = loss + problem.kappa * cp.sum_squares(slack)
        constraints += [slack >= 0, rows @ x <= slack]
    try:
        cp.Problem(cp.Minimize(loss), constraints).solve(solver=solver, **options)
    except cp.SolverError as error:
        raise UsageError(f"cvxpy with {solver} did not solve the fit: {error}; take solver='newton'") from None
    if x.value is None:
        raise UsageError(f"cvxpy with {solver} found no solution of the fit; take solver='newton'")
    return np.maximum(np.asarray(x.value, np.float64), 0.0)
