"""The plain sum nearest to a calibrated oracle: what it costs to be one, and where it is taken."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from test_calibrated import fitted, networks
from test_calibrated import table as measured_table
from test_capacity import TABLE as CHAINS

from latbench.errors import TableError
from latbench.oracle.additive import AdditiveOracle
from latbench.oracle.calibrated import CalibratedOracle
from latbench.oracle.lut import LutOracle
from latbench.spaces.mbconv import TFNASSpace
from latbench.spaces.nasbench201 import NASBench201Space
from latbench.tables import LatencyTable, Row
from latbench.testing import FactorOracleConformance
from searchers.testing import roofline_table

SMALL = TFNASSpace(width_multiplier=0.125, resolution=32, width_step=16, num_classes=10)


@cache
def near(ms=None):
    return AdditiveOracle.of(fitted(60), ms)


class TestAdditive(FactorOracleConformance):
    @property
    def oracle(self):
        return near()


@cache
def mbconv_table():
    """Sums 10 % too low, and random errors that the decisions' effects are fitted to."""
    table, rng = roofline_table(SMALL), np.random.default_rng(0)
    archs = np.array([SMALL.sample(rng) for _ in range(30)], np.int64)
    ms = 1.1 * LutOracle.fit(table).latencies(archs) * np.exp(0.05 * rng.standard_normal(len(archs)))
    rows = [
        Row(f"net{i}", "network", "", arch=tuple(map(int, arch)), latency_ms=float(y))
        for i, (arch, y) in enumerate(zip(archs, ms, strict=True))
    ]
    return LatencyTable.from_rows([*table.rows(), *rows], table.provenance)


def off(oracle, true, archs):
    return float(np.abs(oracle.latencies(archs) / true.latencies(archs) - 1).mean())


def test_without_the_curve_it_is_the_same_oracle():
    oracle = CalibratedOracle.fit(measured_table(30), curve=False)
    archs, _ = networks(50, 7)
    np.testing.assert_allclose(AdditiveOracle.of(oracle).latencies(archs), oracle.latencies(archs), rtol=1e-9)
    with pytest.raises(TableError, match="no measured network"):
        AdditiveOracle.fit(measured_table(0))


def test_it_is_nearest_where_its_tangent_is_taken():
    true = fitted(60)
    archs, _ = networks(400, 7)
    latencies = true.latencies(archs)
    assert off(near(), true, archs) < 0.01
    for share in (0.02, 0.98):
        target = float(np.quantile(latencies, share))
        there = archs[np.argsort(np.abs(latencies - target))[:20]]
        assert off(near(target), true, there) < min(0.005, off(near(), true, there))


def test_what_is_beyond_the_caches_is_in_it():
    true, plain = CalibratedOracle.fit(CHAINS), LutOracle.fit(CHAINS)
    archs, _ = networks(200, 3)
    latencies = true.latencies(archs)
    target = float(np.quantile(latencies, 0.8))
    there = archs[np.abs(latencies / target - 1) < 0.1]
    found = AdditiveOracle.fit(CHAINS, near_ms=target)
    assert off(found, true, there) < 0.25 * off(plain, true, there)
    assert found.calibration is None


def test_every_spelling_of_a_network_costs_the_same_and_absent_blocks_nothing():
    oracle, space = AdditiveOracle.fit(mbconv_table()), SMALL
    assert oracle.calibration is not None
    rng = np.random.default_rng(1)
    for site in space.block_sites:
        (values,) = (f.values for f in oracle.factors if f.site == site.name)
        blocks = [space.block(site, picks) for picks in np.ndindex(values.shape)]
        by_key: dict[str, set[float]] = {}
        for block, value in zip(blocks, values.ravel().tolist(), strict=True):
            by_key.setdefault(block.key if block else "absent", set()).add(value)
        assert all(len(found) == 1 for found in by_key.values())
        assert by_key.get("absent", {0.0}) == {0.0}
    true = CalibratedOracle.fit(mbconv_table())
    archs = np.array([space.sample(rng) for _ in range(200)], np.int64)
    assert off(oracle, true, archs) < 0.02


def test_a_small_space_is_exact():
    space, rng = NASBench201Space(), np.random.default_rng(0)
    table = roofline_table(space)
    archs = np.array([space.sample(rng) for _ in range(20)], np.int64)
    ms = LutOracle.fit(table).latencies(archs) * np.exp(0.1 * rng.standard_normal(20))
    rows = [
        Row(f"net{i}", "network", "", arch=tuple(map(int, arch)), latency_ms=float(y))
        for i, (arch, y) in enumerate(zip(archs, ms, strict=True))
    ]
    true = CalibratedOracle.fit(LatencyTable.from_rows([*table.rows(), *rows], table.provenance))
    np.testing.assert_allclose(AdditiveOracle.of(true, 0.1).latencies(archs), true.latencies(archs), rtol=1e-12)
