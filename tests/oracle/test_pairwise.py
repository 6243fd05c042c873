"""The fit of AOWS: its rows, its optimum, its accuracy and its interval, against cvxpy and a synthetic device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from latbench.errors import MissingEntryError, TableError, UsageError
from latbench.graph.ir import GraphBuilder
from latbench.graph.ops import Conv2d
from latbench.oracle.conformal import coverage
from latbench.oracle.hinge_nnls import Problem, solve, solve_cvxpy
from latbench.oracle.lut import LutOracle
from latbench.oracle.monotone import monotone_rows
from latbench.oracle.pairwise import PairwiseOracle, fit_blocks
from latbench.oracle.sampling import biased, uniform
from latbench.oracle.vocabulary import vocabulary
from latbench.provenance import Provenance
from latbench.spaces.base import Decision, FactoredSpace, Site
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.spaces.nasbench201 import NASBench201Space
from latbench.tables import LatencyTable, Row
from latbench.testing import FactorOracleConformance

FULL = MobileNetV1Space()
SMALL = MobileNetV1Space(resolution=64, levels=3)


def truth(words):
    """(P,) ms: a roofline whose widths come in steps of 32; additive and monotone."""
    ms = []
    for block in words.blocks:
        steps = [np.ceil(d / 32) * 32 for node in block.nodes for d in block.shapes[node.name][1:2]]
        ms.append(3e-4 + block.macs / 2e10 + 1e-6 * sum(steps))
    return np.array(ms)


def measured(words, archs, rng=None):
    """(N,) ms, with 1 % of noise where a generator is given."""
    clean = words.design(archs) @ truth(words)
    return clean if rng is None else clean * (1 + 0.01 * rng.standard_normal(len(clean)))


def nrmse(words, x, archs):
    want = measured(words, archs)
    return float(np.sqrt(np.mean((words.design(archs) @ x - want) ** 2)) / want.mean())


def table(space, archs, ms):
    rows = [
        Row(f"{i:016x}", "network", "", arch=tuple(arch), latency_ms=float(y))
        for i, (arch, y) in enumerate(zip(archs.tolist(), ms, strict=True))
    ]
    return LatencyTable.from_rows(rows, Provenance("", "a model", "", space=space.name, settings=space.settings()))


def small_table(n=400, seed=0, space=SMALL):
    rng = np.random.default_rng(seed)
    archs = biased(space, n, rng)
    return table(space, archs, measured(vocabulary(space), archs, rng))


@pytest.mark.parametrize(
    ("target", "kappa", "want"),
    [
        ((3, 1), 0.5, (2.5, 1.5)),
        ((3, 1), 0, (3, 1)),
        ((3, 1), 1e9, (2, 2)),
        ((-1, 1), 0, (0, 1)),
        ((0, -1), 10, (0, 0)),
        ((1, 3), 10, (1, 3)),
    ],
)
def test_two_unknowns_by_hand(target, kappa, want):
    problem = Problem(csr_matrix(np.eye(2)), np.array(target, float), np.array([[0, 1]]), kappa)
    np.testing.assert_allclose(solve(problem).x, want, atol=1e-6)
    if kappa < 1e9:
        np.testing.assert_allclose(solve_cvxpy(problem), want, atol=1e-4)  # Clarabel's own


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kappa", [0.0, 0.3, 100.0, 1e4])
def test_the_optimum_is_cvxpys(seed, kappa):
    rng = np.random.default_rng(seed)
    n, p = int(rng.integers(5, 80)), int(rng.integers(3, 30))
    design = csr_matrix(rng.poisson(0.4, (n, p)).astype(float))
    pairs = np.array(sorted({tuple(rng.choice(p, 2, replace=False).tolist()) for _ in range(2 * p)}))
    problem = Problem(design, rng.normal(1, 2, n), pairs, kappa)
    if (np.asarray(design.sum(axis=0)) == 0).any():
        problem = replace(problem, design=csr_matrix(design.toarray() + np.eye(n, p)))
    ours = solve(problem)
    assert (ours.x >= 0).all()
    reference = problem.objective(solve_cvxpy(problem))
    assert ours.objective <= reference * (1 + 1e-6) + 1e-9
    assert ours.excess <= 1e-6


def test_the_gradient_is_the_finite_difference():
    rng = np.random.default_rng(0)
    problem = Problem(csr_matrix(rng.random((6, 4))), rng.random(6), np.array([[0, 1], [1, 2], [3, 0]]), 2.0)
    x, slope = rng.random(4), []
    for i in range(4):
        step = 1e-6 * (np.arange(4) == i)
        slope.append((problem.objective(x + step) - problem.objective(x - step)) / 2e-6)
    np.testing.assert_allclose(problem.gradient(x)[1], slope, rtol=1e-6)


def test_the_rows_of_the_whole_vocabulary():
    words = vocabulary(FULL)
    rows = monotone_rows(words)
    assert rows.shape == (3198, 2)
    assert len(np.unique(rows, axis=0)) == 3198
    n_sizes = 0
    for lower, higher in rows.tolist():
        small, large = words.blocks[lower], words.blocks[higher]
        (_, (_, c_small, *side_small)), (_, (_, c_large, *side_large)) = *small.inputs, *large.inputs
        outs = [block.shapes[block.outputs[0]][1] for block in (small, large)]
        ordered = [c_small - c_large, outs[0] - outs[1], side_small[0] - side_large[0]]
        assert sorted(difference < 0 for difference in ordered) == [False, False, True]
        assert sorted(difference == 0 for difference in ordered) == [False, True, True]
        assert [type(n.op) for n in small.nodes] == [type(n.op) for n in large.nodes]
        n_sizes += side_small != side_large
    assert n_sizes == 234


def test_rows_skip_what_is_not_known():
    words = vocabulary(SMALL)
    stem = words.tables[0].tolist()
    known = np.ones(len(words.blocks), bool)
    known[stem[1]] = False
    rows = monotone_rows(words, known).tolist()
    assert [stem[0], stem[2]] in rows
    assert not any(stem[1] in row for row in rows)


def test_options_that_are_names_give_no_rows():
    assert monotone_rows(vocabulary(NASBench201Space(num_cells=1))).shape == (0, 2)


@dataclass(frozen=True)
class Groups(FactoredSpace):
    """One convolution whose groups and kernel size are chosen."""

    name: ClassVar[str] = "groups"

    @property
    def decisions(self):
        return (Decision("kernel", (5, 3)), Decision("groups", (1, 2)))

    @property
    def sites(self):
        return (Site("conv", (0, 1), "conv"),)

    def block(self, site, picks):
        kernel, groups = self.decisions[0].options[picks[0]], self.decisions[1].options[picks[1]]
        b = GraphBuilder()
        op = Conv2d(8, 8, kernel, padding=kernel // 2, groups=groups)
        return b.build(b.add(op, b.input("x", (1, 8, 4, 4)), name="conv"))


def test_rows_follow_the_work_not_the_number():
    words = vocabulary(Groups())  # numbered (5, 1), (5, 2), (3, 1), (3, 2)
    assert sorted(monotone_rows(words).tolist()) == [[2, 0], [3, 1]]


def test_clean_data_are_fitted_exactly():
    words = vocabulary(FULL)
    archs = uniform(FULL, 8000, np.random.default_rng(0))
    x, _ = fit_blocks(words, archs, measured(words, archs))
    assert nrmse(words, x, uniform(FULL, 1000, np.random.default_rng(1))) < 1e-4


def test_noisy_data_are_fitted_within_half_a_percent():
    words, rng = vocabulary(FULL), np.random.default_rng(2)
    archs = uniform(FULL, 8000, rng)
    x, scores = fit_blocks(words, archs, measured(words, archs, rng))
    fresh = uniform(FULL, 2000, rng)
    assert 0.0040 < nrmse(words, x, fresh) < 0.0050
    inside = coverage(scores.interval(words.design(fresh) @ x, 0.9), measured(words, fresh, rng))
    assert 0.87 < inside < 0.93


@pytest.mark.parametrize("solver", ["CLARABEL", "SCS"])
def test_solvers_agree_on_the_networks_not_on_the_gauge(solver):
    rows, archs = small_table(), biased(SMALL, 50, np.random.default_rng(5))
    ours, theirs = PairwiseOracle.fit(rows), PairwiseOracle.fit(rows, solver=solver)
    np.testing.assert_allclose(ours.latencies(archs), theirs.latencies(archs), rtol=2e-3 if solver == "SCS" else 1e-4)


def test_kappa_has_no_unit_and_does_not_fade():
    archs = biased(SMALL, 300, np.random.default_rng(6))
    words, fresh = vocabulary(SMALL), biased(SMALL, 50, np.random.default_rng(7))
    ms = measured(words, archs, np.random.default_rng(6))
    x, _ = fit_blocks(words, archs, ms)
    in_seconds, _ = fit_blocks(words, archs, ms / 1000)
    twice, _ = fit_blocks(words, np.concatenate([archs, archs]), np.concatenate([ms, ms]))
    design = words.design(fresh)
    np.testing.assert_allclose(design @ in_seconds * 1000, design @ x, rtol=1e-4)
    np.testing.assert_allclose(design @ twice, design @ x, rtol=1e-4)


class TestLaws(FactorOracleConformance):
    oracle = PairwiseOracle.fit(small_table())

    def test_everything_is_fitted(self):
        assert self.oracle.sources((0,) * 14) == {"fitted": 15}

    def test_its_table_gives_the_same_sums_and_says_what_it_is(self):
        fitted = self.oracle.to_table()
        assert set(fitted.frame["origin"]) == {"fitted"}
        assert "not the latencies of these blocks" in fitted.notes["fitted"]
        twin = LutOracle.fit(fitted)
        assert twin.sources((0,) * 14) == {"fitted": 15}
        np.testing.assert_allclose(twin.latencies(self.archs()), self.oracle.latencies(self.archs()), rtol=1e-12)

    def test_it_predicts(self):
        words = vocabulary(SMALL)
        archs = uniform(SMALL, 300, np.random.default_rng(8))
        off = self.oracle.latencies(archs) / measured(words, archs) - 1
        assert np.sqrt(np.mean(off**2)) < 0.01


@pytest.mark.parametrize("n", [150, 400])  # by folds; by leverages
def test_intervals_cover(n):
    words, inside = vocabulary(SMALL), []
    for seed in range(4):
        oracle, rng = PairwiseOracle.fit(small_table(n, seed)), np.random.default_rng(100 + seed)
        archs = biased(SMALL, 400, rng)
        inside.append(coverage(oracle.interval(archs, 0.9), measured(words, archs, rng)))
    assert 0.86 < np.mean(inside) < 0.95


def test_a_block_that_no_network_has_is_missing():
    words = vocabulary(SMALL)
    archs = biased(SMALL, 300, np.random.default_rng(9))
    archs = archs[(archs[:, 3] != 1) | (archs[:, 4] != 2)]
    oracle = PairwiseOracle.fit(table(SMALL, archs, measured(words, archs)))
    gap = [0] * 14
    gap[3:5] = 1, 2
    with pytest.raises(MissingEntryError, match="stage5"):
        oracle.latency(tuple(gap))
    with pytest.raises(MissingEntryError, match="stage5"):
        oracle.expected_latency(np.full((14, 3), 1 / 3))
    assert oracle.latency((0,) * 14) > 0
    key = SMALL.block(SMALL.sites[4], (1, 2)).key
    assert key not in oracle.to_table()


def test_spaces_without_rows_are_fitted_by_plain_least_squares():
    space = NASBench201Space(num_cells=1)
    words, archs = vocabulary(space), uniform(space, 500, np.random.default_rng(10))
    oracle = PairwiseOracle.fit(table(space, archs, measured(words, archs)))
    fresh = uniform(space, 100, np.random.default_rng(11))
    np.testing.assert_allclose(oracle.latencies(fresh), measured(words, fresh), rtol=1e-4)


def test_few_networks_give_no_interval():
    rows = small_table(5)
    assert PairwiseOracle.fit(rows).interval(rows.networks()[0][:1]) is None


def test_what_cannot_be_fitted_is_refused():
    good = small_table(20)
    with pytest.raises(TableError, match="no measured network of mobilenet_v1"):
        PairwiseOracle.fit(good.take([]))
    for kappa in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="kappa must be"):
            PairwiseOracle.fit(good, kappa=kappa)
    with pytest.raises(UsageError, match="unknown solver 'gurobi': auto, newton, CLARABEL"):
        PairwiseOracle.fit(good, solver="gurobi")
    archs, ms = good.networks()
    with pytest.raises(TableError, match="latency of 0"):
        PairwiseOracle.fit(table(SMALL, archs, ms * (np.arange(20) > 0)))
    other = table(replace(SMALL, levels=1), archs, ms)
    with pytest.raises(UsageError, match="has no option"):
        PairwiseOracle.fit(other)
