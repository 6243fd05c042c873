"""The learned oracle on made-up devices whose latencies are known, and its laws."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import pytest

from latbench.errors import TableError, UsageError
from latbench.oracle.conformal import coverage
from latbench.oracle.features import physical, views
from latbench.oracle.learned import LearnedOracle
from latbench.oracle.learned_gp import Measured
from latbench.provenance import Provenance
from latbench.spaces.base import Decision, SearchSpace
from latbench.spaces.fbnet import FBNetSpace
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.spaces.nasbench201 import NASBench201Space
from latbench.spaces.ofa_mbv3 import OFAMobileNetV3Space
from latbench.tables import LatencyTable, Row
from latbench.testing import OracleConformance

FBNET, CELLS = FBNetSpace(), NASBench201Space()
SPACES = {s.name: s for s in (FBNET, CELLS, OFAMobileNetV3Space(), MobileNetV1Space(resolution=64))}


def sample(space, n, seed=0):
    rng = np.random.default_rng(seed)
    return np.array([space.sample(rng) for _ in range(n)])


def device(space, archs, *, view=0, overlap=0.0):
    """ms: 10 us a kernel, 5 GMAC/s, 10 GB/s; with `overlap`, the larger of launching and computing counts instead."""
    _, x = views(space)[view].figures(archs)
    kernels, macs, nbytes = (x[:, physical(space).names.index(f"total/{q}")] for q in ("kernels", "macs", "bytes"))
    launch, compute = 0.010 * kernels, macs / 5e9 * 1e3 + nbytes / 10e9 * 1e3
    return (1 - overlap) * (launch + compute) + overlap * np.maximum(launch, compute) + 0.1


def table(space, archs, latency_ms, orders=None):
    rows = [
        Row(
            key=f"{i:016x}", kind="network", signature="", arch=tuple(arch.tolist()), latency_ms=float(ms),
            order=None if orders is None else int(orders[i]),
        )
        for i, (arch, ms) in enumerate(zip(archs, latency_ms, strict=True))
    ]  # fmt: skip
    provenance = Provenance("", "", "", space=space.name, settings=space.settings())
    return LatencyTable.from_rows(rows, provenance)


def fitted(space, n=40, noise=0.01, **more):
    archs = sample(space, n, seed=1)
    noisy = device(space, archs, **more) * np.exp(noise * np.random.default_rng(2).standard_normal(n))
    return LearnedOracle.fit(table(space, archs, noisy))


@cache
def oracle_of(name):
    return fitted(SPACES[name], overlap=0.5)


@pytest.mark.parametrize("name", SPACES)
class TestLaws(OracleConformance):
    closure = 0.01

    @pytest.fixture(autouse=True)
    def make(self, name):
        self.oracle = oracle_of(name)


@dataclass(frozen=True)
class Bare(SearchSpace):
    """Decisions whose networks nothing is known about: 4,782,969 architectures."""

    name: ClassVar[str] = "bare"

    @property
    def decisions(self):
        return tuple(Decision(f"d{i}", (0, 1, 2)) for i in range(14))

    def network(self, arch):
        raise NotImplementedError


def bare_oracle(n=60):
    archs, price = sample(Bare(), n, seed=1), np.random.default_rng(0).uniform(0.5, 1.5, (14, 3))
    truth = price[np.arange(14), archs].sum(axis=1)
    return LearnedOracle.of(Bare(), Provenance("", "", ""), Measured(archs, truth)), price


class TestLawsOfASpaceThatDoesNotFactor(OracleConformance):
    oracle = bare_oracle()[0]

    def test_a_model_is_the_same_from_its_file(self, tmp_path):  # the space has no name to be found by
        arrays, meta = self.oracle.state()
        twin = LearnedOracle.from_state(self.oracle.space, self.oracle.provenance, arrays, meta)
        np.testing.assert_array_equal(twin.latencies(self.archs()), self.oracle.latencies(self.archs()))
        np.testing.assert_array_equal(twin.interval(self.archs()), self.oracle.interval(self.archs()))


def test_decisions_alone_tell_what_adds_up():
    oracle, price = bare_oracle()
    archs = sample(Bare(), 200)
    assert error(oracle, archs, price[np.arange(14), archs].sum(axis=1)) < 1e-3


def error(oracle, archs, truth):
    return float(np.mean(abs(oracle.latencies(archs) / truth - 1)))


@pytest.mark.parametrize("name", SPACES)
def test_ten_networks_tell_what_a_device_pays_for(name):
    space, held_out = SPACES[name], sample(SPACES[name], 300, seed=3)
    truth = device(space, held_out)
    assert error(fitted(space, n=10, noise=0.0), held_out, truth) < 0.02 < error_of_the_mean(truth)


def error_of_the_mean(truth):
    return float(np.mean(abs(truth.mean() / truth - 1)))


def test_what_adds_up_exactly_is_found_exactly():
    """Arbitrary block latencies: 104 distinct blocks, 300 networks."""
    price = dict(zip(FBNET.all_blocks(), np.random.default_rng(0).uniform(0.1, 2, 104), strict=True))
    archs = sample(FBNET, 500)
    total = np.array([sum(price[b.key] for b in FBNET.blocks(tuple(a.tolist()))) for a in archs])
    oracle = LearnedOracle.fit(table(FBNET, archs[:300], total[:300]))
    assert error(oracle, archs[300:], total[300:]) < 1e-4


@pytest.mark.parametrize("view", [0, 1])
def test_evidence_tells_what_a_runtime_executes_of_a_cell(view):
    oracle = fitted(CELLS, n=60, view=view)
    assert oracle.shares.argmax() == view
    assert oracle.shares.max() > 0.99


def test_a_wild_measurement_is_not_believed():
    archs = sample(FBNET, 300, seed=1)
    truth = device(FBNET, archs)
    wild = truth * np.exp(0.002 * np.random.default_rng(0).standard_normal(300))
    wild[:50:10] *= 4
    believing = LearnedOracle.fit(table(FBNET, archs[5:50], (wild)[5:50]))
    assert error(believing, archs[50:], truth[50:]) < 0.01


def test_drift_along_the_order_is_no_property_of_networks():
    archs, n = sample(FBNET, 400, seed=1), 300
    orders = np.random.default_rng(0).permutation(400)
    truth = device(FBNET, archs)
    drifting = truth * (1 + 0.1 * np.sin(2 * np.pi * orders / 200))
    oracle = LearnedOracle.fit(table(FBNET, archs[:n], drifting[:n], orders[:n]))
    blind = LearnedOracle.fit(table(FBNET, archs[:n], drifting[:n], orders[:n]), drift=False)
    assert error(oracle, archs[n:], truth[n:]) < 0.5 * error(blind, archs[n:], truth[n:])
    placed = oracle.latencies(archs[n:], orders[n:])
    assert np.mean(abs(placed / drifting[n:] - 1)) < 0.01
    low, high = oracle.interval(archs[n:], 0.9, orders[n:])
    plain_low, plain_high = oracle.interval(archs[n:], 0.9)
    assert np.median(high - low) < 0.5 * np.median(plain_high - plain_low)
    with pytest.raises(UsageError, match="without a measuring order"):
        blind.latencies(archs[n:], orders[n:])
    with pytest.raises(UsageError, match="one place per architecture"):
        oracle.latencies(archs[n:], orders[:3])


@pytest.mark.parametrize("n", [25, 150])
def test_intervals_cover_what_they_say(n):
    """Over devices with relative noise, whose kernels overlap."""
    inside = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        archs = sample(FBNET, n + 300, seed=10 + seed)
        noisy = device(FBNET, archs, overlap=0.5) * np.exp(0.03 * rng.standard_normal(len(archs)))
        oracle = LearnedOracle.of(FBNET, Provenance("", "", ""), Measured(archs[:n], noisy[:n]))
        inside.append(coverage(oracle.interval(archs[n:], 0.9), noisy[n:]))
    assert 0.85 < np.mean(inside) < 0.95


def test_bad_tables_are_refused():
    archs = sample(FBNET, 5)
    with pytest.raises(TableError, match="2 measured networks"):
        LearnedOracle.fit(table(FBNET, archs[:2], [1.0, 2.0]))
    with pytest.raises(TableError, match="network 1 has latency 0"):
        LearnedOracle.fit(table(FBNET, archs, [1.0, 0.0, 1.0, 1.0, 1.0]))
    with pytest.raises(UsageError, match="fbnet"):
        LearnedOracle.fit(table(FBNET, archs + 9, np.ones(5)))


def test_a_network_seen_later_is_believed_and_tells_of_its_neighbours():
    oracle, archs = fitted(FBNET), sample(FBNET, 200, seed=7)
    arch = tuple(archs[0].tolist())
    again = oracle.seen(arch, 1.3 * oracle.latency(arch))
    assert again.latency(arch) == pytest.approx(1.3 * oracle.latency(arch), rel=0.03)
    ratio = again.latencies(archs[1:]) / oracle.latencies(archs[1:])
    assert 1 < np.median(ratio) <= 1.3
    assert oracle.seen(arch, oracle.latency(arch)).latencies(archs) == pytest.approx(oracle.latencies(archs), rel=0.02)
    assert again.interval(archs) is not None
