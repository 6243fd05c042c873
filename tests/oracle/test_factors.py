"""Factor oracles against brute force."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import numpy as np
import pytest

from latbench.errors import MissingEntryError, UsageError
from latbench.oracle.base import Constraint, spread
from latbench.oracle.conformal import Conformal, coverage
from latbench.oracle.factors import Factor, FactorOracle
from latbench.provenance import Provenance
from latbench.spaces.base import Decision, SearchSpace
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.testing import FactorOracleConformance


@dataclass(frozen=True)
class Tiny(SearchSpace):
    """Decisions without networks: what an oracle needs of a space."""

    name: ClassVar[str] = "tiny"
    n_options: tuple[int, ...] = (2, 3, 4, 2)

    @property
    def decisions(self):
        return tuple(Decision(f"d{i}", tuple(range(10, 10 + n))) for i, n in enumerate(self.n_options))

    def network(self, arch):
        raise NotImplementedError


def oracle(scopes, seed=0, space=None, **more):
    space = space or Tiny()
    rng = np.random.default_rng(seed)
    factors = [
        Factor(f"site{i}", scope, rng.uniform(0.1, 1, [len(space.decisions[d].options) for d in scope]))
        for i, scope in enumerate(scopes)
    ]
    return FactorOracle(space, tuple(factors), Provenance("", "", ""), **more)


SCOPES = {
    "unary": [(), (0,), (1,), (2,), (3,)],
    "chain": [(), (0,), (0, 1), (1, 2), (2, 3), (3,), (2, 3)],
    "triples": [(0, 1, 2), (1, 3), (0, 3), (1,), ()],
    "whole": [(0, 1, 2, 3)],
    "part": [(1,)],
}


@pytest.mark.parametrize("scopes", SCOPES.values(), ids=list(SCOPES))
class TestLaws(FactorOracleConformance):
    @pytest.fixture(autouse=True)
    def make(self, scopes):
        self.oracle = oracle(scopes, calibration=Conformal(tuple(np.linspace(0.001, 0.05, 40))))

    def test_latency_is_the_sum_of_its_entries(self):
        for arch in product(*(range(n) for n in Tiny().n_options)):
            want = sum(f.values[tuple(arch[d] for d in f.scope)] for f in self.oracle.factors)
            assert self.oracle.latency(arch) == pytest.approx(want)

    def test_fastest_is_brute_force(self):
        _, ms = self.oracle.fastest()
        assert ms == pytest.approx(min(self.oracle.latency(a) for a in product(*(range(n) for n in Tiny().n_options))))


class TestCounts(FactorOracleConformance):
    oracle = FactorOracle.counting(MobileNetV1Space(resolution=32), "n_params")

    def test_published_counts(self):
        space = self.oracle.space
        assert self.oracle.latency(space.published["mobilenet-v1"]) == 4_231_976
        assert self.oracle.unit == "parameters"


def test_the_chain_adds_up_to_the_latency():
    one = oracle(SCOPES["chain"])
    chain = one.chain()
    for arch in product(*(range(n) for n in Tiny().n_options)):
        total = chain.constant + sum(u[i] for u, i in zip(chain.unary, arch, strict=True))
        total += sum(p[i, j] for p, i, j in zip(chain.pairwise, arch, arch[1:], strict=False))
        assert one.latency(arch) == pytest.approx(total)


def test_no_chain_is_refused():
    with pytest.raises(UsageError, match="no chain: one site depends on d0, d3"):
        oracle([(0, 3)]).chain()


def test_every_missing_entry_raises_where_it_is_asked_for():
    whole = oracle(SCOPES["chain"])
    for i, factor in enumerate(whole.factors):
        for picks in np.ndindex(factor.values.shape):
            values = factor.values.copy()
            values[picks] = np.nan
            factors = (*whole.factors[:i], Factor(factor.site, factor.scope, values), *whole.factors[i + 1 :])
            holed = FactorOracle(whole.space, factors, whole.provenance)
            for arch in [(0, 0, 0, 0), (1, 2, 3, 1), (1, 1, 1, 1)]:
                hit = tuple(arch[d] for d in factor.scope) == picks
                if hit:
                    with pytest.raises(MissingEntryError, match=factor.site):
                        holed.latency(arch)
                    with pytest.raises(MissingEntryError, match=factor.site):
                        holed.latencies(np.array([arch]))
                else:
                    assert holed.latency(arch) == whole.latency(arch)
            with pytest.raises(MissingEntryError, match=factor.site):
                holed.expected_latency(np.full((4, 4), 0.25))
            if factor.scope:
                assert tuple(holed.fastest()[0][d] for d in factor.scope) != picks


def test_spread_is_linear_between_two_options():
    decision = Decision("width", (40, 48, 64, 24))
    assert spread(decision, 44).tolist() == [0.5, 0.5, 0, 0]
    assert spread(decision, 36).tolist() == [0.75, 0, 0, 0.25]
    assert spread(decision, 64).tolist() == [0, 0, 1, 0]
    for value in (23.9, 64.1, float("nan")):
        with pytest.raises(UsageError, match="outside 24 to 64"):
            spread(decision, value)
    with pytest.raises(UsageError, match="no numbers"):
        spread(Decision("op", ("a", "b")), 1)


def test_constraints():
    one = oracle(SCOPES["chain"], calibration=Conformal(tuple(np.linspace(0.01, 0.1, 100))))
    archs = np.array(list(product(*(range(n) for n in Tiny().n_options))))
    latencies = one.latencies(archs)
    target = float(np.median(latencies))
    np.testing.assert_array_equal(Constraint(one, target).satisfied(archs), latencies <= target)
    sure = Constraint(one, target, confidence=0.95)
    np.testing.assert_allclose(sure.bounds(archs), one.interval(archs, 0.9)[1])
    assert 0 < sure.satisfied(archs).sum() < (latencies <= target).sum()
    with pytest.raises(UsageError, match="positive number of ms"):
        Constraint(one, 0)
    with pytest.raises(UsageError, match=r"between 0\.5 and 1"):
        Constraint(one, 1, confidence=1)
    with pytest.raises(UsageError, match="kept out"):
        Constraint(oracle(SCOPES["chain"]), 1, confidence=0.9)


@pytest.mark.parametrize("n", [9, 10, 25, 200])
def test_conformal_coverage_is_the_confidence(n):
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(2000):
        noise = np.exp(0.05 * rng.standard_t(3, n + 20))
        interval = Conformal.of(np.ones(n), noise[:n]).interval(np.ones(20), 0.9)
        inside.append(coverage(interval, noise[n:]))
    assert 0.89 < np.mean(inside) < 0.91


def test_conformal_says_nothing_from_too_few():
    assert Conformal.of(np.ones(8), np.full(8, 1.1)).quantile(0.9) is None
    assert Conformal(()).quantile(0.5) is None
    with pytest.raises(UsageError):
        Conformal((0.1,)).quantile(1.0)
