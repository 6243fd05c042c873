"""Block sums corrected by measured networks, against a truth that is known."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from latbench.backends.roofline import OPTIONS, kernels
from latbench.errors import MissingEntryError, TableError, UsageError
from latbench.oracle.additive import AdditiveOracle
from latbench.oracle.calibrated import CalibratedOracle
from latbench.oracle.conformal import coverage
from latbench.oracle.lut import LutOracle
from latbench.provenance import Provenance
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.spaces.nasbench201 import NASBench201Space
from latbench.tables import LatencyTable, Row
from latbench.testing import OracleConformance

SPACE = MobileNetV1Space(resolution=64)
ROOFLINE = {name: float(value) for name, value in OPTIONS.items()}


@cache
def block_rows(space) -> tuple[Row, ...]:
    found = []
    for key, block in space.all_blocks().items():
        ms = sum(layer.ms for layer in kernels(block, ROOFLINE))
        found.append(Row(key, "block", block.signature, latency_ms=ms))
    return tuple(found)


def truth(space, archs, rng, noise=0.002):
    """Sums 4 % too low, 20 us of overhead, and weights that stop fitting a cache beyond 10 MB: 6 us a MB more."""
    provenance = Provenance("cpu", "x", "roofline", space=space.name, settings=space.settings())
    sums = LutOracle.fit(LatencyTable.from_rows(block_rows(space), provenance)).latencies(archs)
    mb = np.array([4e-6 * sum(b.n_params for b in space.blocks(tuple(map(int, arch)))) for arch in archs])
    return (1.04 * sums + 0.02 + 0.006 * np.maximum(mb - 10, 0)) * np.exp(noise * rng.standard_normal(len(archs)))


@cache
def networks(n, seed=0):
    rng = np.random.default_rng(seed)
    archs = np.array([SPACE.sample(rng) for _ in range(n)], np.int64)
    return archs, truth(SPACE, archs, rng)


def table(n, seed=0, space=SPACE, drop=()):
    archs, ms = networks(n, seed) if n else (np.empty((0, 14), np.int64), [])
    rows = [row for row in block_rows(space) if row.key not in drop]
    for i, (arch, y) in enumerate(zip(archs, ms, strict=True)):
        rows.append(Row(f"net{i}", "network", "", arch=tuple(map(int, arch)), latency_ms=float(y)))
    provenance = Provenance("cpu", "x", "roofline", space=space.name, settings=space.settings())
    return LatencyTable.from_rows(rows, provenance)


@cache
def fitted(n, seed=0):
    return CalibratedOracle.fit(table(n, seed))


def mape(oracle, seed=99, n=300):
    archs, measured = networks(n, seed)
    return float(np.abs(oracle.latencies(archs) / measured - 1).mean())


class TestLaws(OracleConformance):
    closure = 2e-3  # of the curve, a few percent of the latency

    @property
    def oracle(self):
        return fitted(60)


def test_more_networks_less_error():
    sums = mape(LutOracle.fit(table(0)))
    errors = [np.mean([mape(fitted(n, seed)) for seed in range(3)]) for n in (5, 25, 100)]
    assert sums > 0.05
    assert errors[0] < 0.4 * sums
    assert errors[1] < 0.006
    assert errors[2] < 0.003  # of which 0.0016 is the noise of the measurement


def test_intervals_cover_what_they_say():
    archs, measured = networks(300, 99)
    for n in (12, 25, 100):
        shares = [coverage(fitted(n, seed).interval(archs, 0.9), measured) for seed in range(6)]
        assert 0.84 < np.mean(shares) < (0.98 if n < 25 else 0.96)  # of so few, folds see fewer still: a little wide


def test_one_wild_measurement_does_not_bend_the_fit():
    clean = table(40)
    first, *rest = [r for r in clean.rows() if r.kind == "network"]
    rows = [*block_rows(SPACE), *rest, replace(first, latency_ms=1.5 * first.latency_ms)]
    wild = LatencyTable.from_rows(rows, clean.provenance)
    assert mape(CalibratedOracle.fit(wild)) < 1.8 * mape(fitted(40))


def test_a_missing_block_is_missed_and_never_free():
    archs, _ = networks(30, 0)
    used = {b.key for arch in archs for b in SPACE.blocks(tuple(map(int, arch)))}
    site, picks, block = next(
        slot for slot in SPACE.slots() if slot[2].key not in used and all(2 < pick < 10 for pick in slot[1])
    )
    lost = block.key
    oracle = CalibratedOracle.fit(table(30, drop=(lost,)))
    arch = list(archs[0])
    for d, pick in zip(site.scope, picks, strict=True):
        arch[d] = pick
    with pytest.raises(MissingEntryError, match=lost):
        oracle.latency(tuple(map(int, arch)))
    with pytest.raises(MissingEntryError, match=lost):
        oracle.expected_latency(np.full((14, 14), 1 / 14))
    filled = CalibratedOracle.fit(table(30, drop=(lost,)), missing="interpolate")
    assert filled.sources(tuple(map(int, arch)))["interpolated"] == 1


def test_networks_with_a_missing_block_are_left_out():
    archs, _ = networks(30, 0)
    lost = next(SPACE.blocks(tuple(map(int, archs[0])))).key  # a stem: one network in six has it
    oracle = CalibratedOracle.fit(table(30, drop=(lost,)))
    kept = sum(next(SPACE.blocks(tuple(map(int, arch)))).key != lost for arch in archs)
    assert 15 < len(oracle.posterior.alpha) == kept < 30
    rows = [row for row in table(30, drop=(lost,)).rows() if row.kind == "block" or row.key == "net0"]
    one = LatencyTable.from_rows(rows, oracle.provenance)
    with pytest.raises(TableError, match=f"every measured network has a block.*{lost}"):
        CalibratedOracle.fit(one)


def test_what_is_lacking_is_named():
    with pytest.raises(TableError, match="no measured network"):
        CalibratedOracle.fit(table(0))
    with pytest.raises(TableError, match="profile the space's blocks"):
        CalibratedOracle.fit(table(10).select(kind="network"))
    with pytest.raises(UsageError, match="unknown policy"):
        CalibratedOracle.fit(table(10), missing="zero")


class TestSmallSpace(OracleConformance):
    """Tabulated: every expectation is exact, and an edge that nothing reads costs nothing."""

    @property
    def oracle(self):
        return small()

    def test_dead_edges_cost_nothing(self):
        dead = (4, 3, 3, 3, 0, 0)  # nodes 1 and 2 are not read by the output
        assert small().space.canonical(dead) == (0, 0, 0, 3, 0, 0)
        assert small().latency(dead) == small().latency((0, 0, 0, 3, 0, 0))


@cache
def small():
    space = NASBench201Space()
    rng = np.random.default_rng(0)
    archs = [space.canonical(space.sample(rng)) for _ in range(40)]
    rows = list(block_rows(space))
    for i, arch in enumerate(dict.fromkeys(archs)):
        ms = 1.1 * sum(layer.ms for layer in kernels(space.network(arch), ROOFLINE))
        rows.append(Row(f"net{i}", "network", "", arch=arch, latency_ms=ms))
    return CalibratedOracle.fit(
        LatencyTable.from_rows(rows, Provenance("cpu", "x", "roofline", space=space.name, settings=space.settings()))
    )


@pytest.mark.parametrize("made", [lambda: fitted(25), small])
def test_a_scaled_oracle_answers_in_proportion_to_every_question(made):
    oracle = made()
    scaled = oracle.scaled(1.1).scaled(2.0)
    rng = np.random.default_rng(3)
    archs = np.array([oracle.space.sample(rng) for _ in range(20)], np.int64)
    probs = rng.dirichlet(np.ones(max(len(d.options) for d in oracle.space.decisions)), (2, archs.shape[1]))
    twin = CalibratedOracle.from_state(oracle.space, oracle.provenance, *scaled.state())
    near = float(np.median(oracle.latencies(archs)))
    sums = AdditiveOracle.of(oracle, near), AdditiveOracle.of(scaled, 2.2 * near)
    for one, other in ((oracle, scaled), (oracle, twin), sums):
        assert other.latencies(archs) == pytest.approx(2.2 * one.latencies(archs))
        assert other.latency(tuple(archs[0].tolist())) == pytest.approx(2.2 * one.latencies(archs)[0])
        assert other.expected_latency(probs) == pytest.approx(2.2 * one.expected_latency(probs))
        if one.interval(archs) is not None:
            assert np.array(other.interval(archs)) == pytest.approx(2.2 * np.array(one.interval(archs)))
