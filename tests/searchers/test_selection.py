"""The best path under budgets: against all paths, and against a mixed-integer program at full size."""

from __future__ import annotations

import chain_cases
import numpy as np
import pytest
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from latbench.errors import InfeasibleTargetError
from latbench.oracle.factors import FactorOracle
from latbench.oracle.lut import LutOracle
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from searchers.chains import Paths
from searchers.selection import select
from searchers.testing import roofline_table


def test_the_specification_s_chain():
    found = select(chain_cases.TINY, [5.5])
    assert (found.path, found.score, found.cost) == ((1, 0), pytest.approx(-0.6), (5.0,))
    assert (found.relaxed, found.relaxed_score, found.relaxed_cost) == ((0, 1), pytest.approx(-0.7), (4.5,))
    assert found.multipliers == pytest.approx((0.25,))
    assert found.bound == pytest.approx(-0.45)
    slack = select(chain_cases.TINY, [10.0])
    assert (slack.path, slack.multipliers) == ((1, 2), (0.0,))
    assert select(chain_cases.TINY, [6.5 * (1 - 1e-13)]).path == (1, 1), "at the boundary, up to rounding"
    assert select(chain_cases.TINY, [6.5 * (1 - 1e-9)]).path != (1, 1)
    with pytest.raises(InfeasibleTargetError, match="0,0 at 3"):
        select(chain_cases.TINY, [2.9])


@pytest.mark.parametrize("n_resources", [1, 2, 3])
@pytest.mark.parametrize("seed", range(100))
def test_random_chains_against_all_paths(seed, n_resources):
    paths = chain_cases.random_paths(seed, n_resources)
    _, scores, costs = chain_cases.brute_force(paths)
    rng = np.random.default_rng(seed)
    budgets = costs.min(0) + rng.uniform(0, 0.8, n_resources) * np.ptp(costs, axis=0)
    within = (costs <= budgets + 1e-12 * abs(budgets)).all(1)
    if not within.any():
        with pytest.raises(InfeasibleTargetError, match="by itself, but not all of them together"):
            select(paths, budgets)
        return
    found = select(paths, budgets)
    assert found.score == pytest.approx(scores[within].max(), abs=1e-12)
    assert (np.array(found.cost) <= budgets + 1e-11).all()
    assert found.relaxed_score <= found.score <= found.bound + 1e-9


def full_size(seed: int, n_resources: int) -> tuple[Paths, list[float]]:
    """mobilenet_v1 at 224 px: roofline times (and parameters), concave scores with noise."""
    space = MobileNetV1Space()
    oracles = [LutOracle.fit(roofline_table(space)), FactorOracle.counting(space, "n_params")][:n_resources]
    rng = np.random.default_rng(seed)
    scores = []
    for decision in space.decisions:
        gap = (decision.options[-1] / np.array(decision.options)) ** rng.uniform(0.4, 1.2) - 1
        scores.append(-rng.uniform(0.02, 0.25) * gap / gap[0] + rng.normal(0, 0.005, len(gap)))
    paths = Paths.of(scores, [oracle.chain() for oracle in oracles])
    free = paths.sums([int(row.argmax()) for row in scores])[1]
    return paths, [low + rng.uniform(0.2, 0.6) * (high - low) for low, high in zip(paths.least, free, strict=True)]


def program(paths: Paths):
    """Edge-flow form: objective to minimise, flow rows and their right-hand side, cost rows."""
    edges = [
        (layer, i, j)
        for layer, size in enumerate(paths.sizes)
        for i in range(paths.sizes[layer - 1] if layer else 1)
        for j in range(size)
    ]
    start = np.cumsum([1, *paths.sizes])
    flow = sparse.lil_matrix((start[-2], len(edges)))
    for column, (layer, i, j) in enumerate(edges):
        flow[start[layer - 1] + i if layer else 0, column] = 1.0 if layer == 0 else -1.0
        if layer + 1 < len(paths.sizes):
            flow[start[layer] + j, column] = 1.0
    right = np.zeros(start[-2])
    right[0] = 1
    gain = np.array([paths.scores[layer, j] for layer, _, j in edges])
    return -gain, flow.tocsr(), right, np.array([[cost[edge] for edge in edges] for cost in paths.costs])


@pytest.mark.parametrize(("seed", "n_resources"), [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)])
def test_full_size_against_integer_programming(seed, n_resources):
    paths, budgets = full_size(seed, n_resources)
    found = select(paths, budgets)
    objective, flow, right, costs = program(paths)
    limits = np.array(budgets) - paths.constants
    scale = limits[:, None]
    relaxed = linprog(objective, A_eq=flow, b_eq=right, A_ub=costs / scale, b_ub=limits / limits, bounds=(0, 1))
    assert found.bound == pytest.approx(-relaxed.fun, abs=1e-6)
    exact = milp(
        objective,
        integrality=np.ones(len(objective)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(flow, right, right), LinearConstraint(costs / scale, -np.inf, limits / limits)],
        options={"mip_rel_gap": 0.0},
    )
    assert found.score == pytest.approx(-exact.fun, abs=1e-6)
    assert found.relaxed_score <= found.score
    assert all(cost <= budget * (1 + 1e-12) for cost, budget in zip(found.cost, budgets, strict=True))
