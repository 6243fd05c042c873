"""``PairwiseOracle``: block latencies fitted to whole networks, as AOWS does (Berman et al. 2020, eq. 7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from latbench.errors import TableError, UsageError
from latbench.graph.ir import Graph
from latbench.oracle.base import SOURCES, Archs, Floats, check_archs, space_of
from latbench.oracle.conformal import Conformal
from latbench.oracle.factors import MISSING, FactorOracle, site_factors
from latbench.oracle.hinge_nnls import CVXPY_SOLVERS, Problem, Solution, solve, solve_cvxpy
from latbench.oracle.monotone import monotone_rows
from latbench.oracle.vocabulary import Vocabulary, vocabulary
from latbench.spaces.base import FactoredSpace
from latbench.tables import LatencyTable, Row

SOLVERS = ("auto", "newton", *CVXPY_SOLVERS)
KAPPA_NETWORKS = 8000  # the number of networks that the published kappa of 100 belongs to
MAX_EXCESS = 1e-6  # of the objective, beyond which "auto" asks cvxpy
CALIBRATION = 500  # networks whose left-out residuals make the interval
MAX_LEVERAGE = 0.9  # above it a network's own measurement decides its prediction
FOLDS = 10  # of cross-validation, where leverages say nothing: fewer networks than unknowns
FOLD_TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class PairwiseOracle(FactorOracle):
    """One unknown per distinct block; blocks that sites share are one unknown. Options of ``fit``:

    * `kappa`: weight of monotonicity (``monotone_rows``): minimise, over x >= 0,
      |Mx - y|^2 / N + kappa / 8000 * sum max(0, Kx)^2. At 8,000 networks that is the published problem, where README
      and paper have kappa = 100; with fewer or more it does not grow or fade against the data. Both terms are squares
      of latencies, so it has no unit.
    * `solver`: "newton" (``hinge_nnls.solve``), a solver of cvxpy (SCS is the released code's), or "auto": the first,
      unless it misses the optimum by more than a millionth.

    Entries are defined up to a shift between neighbouring sites: sums over networks are right, one entry is not the
    latency of that block. A block that no measured network has is missing. Its interval is calibrated on left-out
    residuals (leverages, or ten folds where networks are few), so that no measurement is kept from the fit.

    Differs from the released code: monotonicity rows corrected, kappa per measurement, the interval.
    """

    name: ClassVar[str] = "pairwise"

    @classmethod
    def fit(cls, table: LatencyTable, *, kappa: float = 100.0, solver: str = "auto") -> PairwiseOracle:
        """From a table's networks. Raises TableError where it has none of a factored space, UsageError on an option."""
        space = space_of(table.provenance)
        if not isinstance(space, FactoredSpace):
            raise TableError(f"{space.name} does not factor into blocks, so none can be fitted; use learned")
        if not (np.isfinite(kappa) and kappa >= 0):
            raise UsageError(f"kappa must be a number of at least 0, got {kappa}")
        if solver not in SOLVERS:
            raise UsageError(f"unknown solver {solver!r}: {', '.join(SOLVERS)}")
        archs, ms = table.networks()
        if not len(archs):
            raise TableError(
                f"the table has no measured network of {space.name} to fit to; add some: latbench profile --networks N"
            )
        if not (ms > 0).all():
            raise TableError("a network of the table has a latency of 0; measure it again")
        words = vocabulary(space)
        fitted, scores = fit_blocks(words, check_archs(space, archs), ms, kappa, solver)
        values = {block.key: float(x) for block, x in zip(words.blocks, fitted, strict=True) if x == x}

        def entry(block: Graph | None) -> tuple[float, int]:
            if block is None:
                return 0.0, SOURCES.index("absent")
            if block.key not in values:
                return np.nan, MISSING
            return values[block.key], SOURCES.index("fitted")

        return cls(space, site_factors(space, entry), table.provenance, calibration=scores)

    def to_table(self) -> LatencyTable:
        """The fitted entries as block rows of origin "fitted", from which ``LutOracle`` gives the same sums.

        A sum's terms, not latencies: the table's notes say so.
        """
        assert isinstance(self.space, FactoredSpace)
        words = vocabulary(self.space)
        entries: dict[int, float] = {}
        for factor, numbers in zip(self.factors, words.tables, strict=True):
            entries |= dict(zip(numbers.ravel().tolist(), factor.values.ravel().tolist(), strict=True))
        rows = [
            Row.of(block, "block", space=self.space.name, site=site, latency_ms=entries[number], origin="fitted")
            for number, (block, site) in enumerate(zip(words.blocks, words.sites, strict=True))
            if entries[number] == entries[number]
        ]
        notes: Mapping[str, Any] = {
            "fitted": "pairwise: entries are terms of a sum, defined up to a shift between neighbouring sites, "
            "not the latencies of these blocks"
        }
        provenance = replace(self.provenance, clock_ref_us=None)  # entries are what the networks' figures were
        return LatencyTable.from_rows(rows, provenance, notes)


def fit_blocks(
    words: Vocabulary, archs: Archs, ms: Floats, kappa: float = 100.0, solver: str = "auto"
) -> tuple[Floats, Conformal]:
    """(N, D) architectures and (N,) ms -> (P,) ms per block, NaN where none has it, and scores of left-out networks."""
    design = words.design(archs)
    problem, used = problem_of(words, design, ms, kappa)
    solution = solve(problem)
    x = solution.x
    if solver in CVXPY_SOLVERS:
        x = _through_cvxpy(problem, solver)
    elif solver == "auto" and solution.excess > MAX_EXCESS:
        x = min(x, _through_cvxpy(problem, "CLARABEL"), key=problem.objective)
    entries = np.full(len(used), np.nan)
    entries[used] = x
    scores = _by_leverage(problem, solution, x)
    return entries, _by_folds(words, design, ms, kappa) if scores is None else scores


def problem_of(words: Vocabulary, design: Any, ms: Floats, kappa: float) -> tuple[Problem, NDArray[np.bool_]]:
    """The fit over the blocks that occur, and which of all those are."""
    used = np.asarray(design.sum(axis=0)).ravel() > 0
    numbers = np.cumsum(used) - 1
    rows = numbers[monotone_rows(words, used)]
    return Problem(design[:, used], ms, rows, kappa * len(ms) / KAPPA_NETWORKS), used


def _through_cvxpy(problem: Problem, solver: str) -> Floats:
    scale = float(problem.target.mean())  # SCS stops at absolute tolerances
    return scale * solve_cvxpy(replace(problem, target=problem.target / scale), solver)


def _by_leverage(problem: Problem, solution: Solution, x: Floats) -> Conformal | None:
    """Scores of up to ``CALIBRATION`` networks, each as if it had not been fitted: residual / (1 - leverage).

    Exact for a linear fit, and here as long as leaving one network out moves no kink (Beirami et al. 2017; Barber et
    al. 2021 for intervals from such residuals). Networks that alone have some block are passed over: without them it
    would be missing. None where the fit follows single measurements too closely for that.
    """
    alone = np.asarray((problem.design > 0).sum(axis=0)).ravel() == 1
    usable = np.flatnonzero(problem.design[:, alone].sum(axis=1) == 0)
    if len(usable) > CALIBRATION:
        usable = np.sort(np.random.default_rng(0).choice(usable, CALIBRATION, replace=False))
    rows = problem.design[usable]
    leverage = np.einsum("ip,pi->i", rows.toarray(), solution.factor(rows.T.toarray()))
    if not len(leverage) or np.quantile(leverage, 0.9) > MAX_LEVERAGE:
        return None
    measured, predicted = problem.target[usable], rows @ x
    left_out = measured - (measured - predicted) / (1 - np.clip(leverage, 0.0, MAX_LEVERAGE))
    return _scores(left_out, measured)


def _by_folds(words: Vocabulary, design: Any, ms: Floats, kappa: float) -> Conformal:
    """Scores of networks fitted without their tenth of the measurements; those with a block unseen there are left."""
    fold = np.random.default_rng(0).permutation(len(ms)) % FOLDS
    predicted = np.full(len(ms), np.nan)
    for i in range(min(FOLDS, len(ms)) if len(ms) > 1 else 0):
        rest, out = np.flatnonzero(fold != i), np.flatnonzero(fold == i)
        problem, used = problem_of(words, design[rest], ms[rest], kappa)
        out = out[design[out] @ ~used == 0]
        predicted[out] = design[out][:, used] @ solve(problem, FOLD_TOLERANCE).x
    known = predicted == predicted
    return _scores(predicted[known], ms[known])


def _scores(predicted: Floats, measured: Floats) -> Conformal:
    return Conformal.of(np.maximum(predicted, 1e-3 * measured), measured)  # a sum may fall to 0, a ratio may not
