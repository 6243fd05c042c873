"""An oracle that measures: with the roofline back-end, through the real session, launcher and table."""

from __future__ import annotations

import numpy as np
import pytest

from latbench.backends.roofline import OPTIONS, kernels
from latbench.errors import MeasurementError, UsageError
from latbench.measure.base import SamplingPlan
from latbench.oracle.lut import LutOracle
from latbench.oracle.measured import MeasuredOracle
from latbench.profiling.on_device import measure_blocks, measured_oracle
from latbench.profiling.profile import Target, profile
from latbench.provenance import Provenance
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.spaces.nasbench201 import NASBench201Space
from latbench.tables import LatencyTable, Row
from latbench.testing import OracleConformance

ROOFLINE = {name: float(value) for name, value in OPTIONS.items()}
SPACE = NASBench201Space(num_cells=1)


def truth(space, arch):
    return sum(layer.ms for layer in kernels(space.network(arch), ROOFLINE))


class Device:
    """Measures by the roofline, and counts."""

    def __init__(self, space, fails=()):
        self.space, self.fails, self.calls, self.rows = space, fails, [], {}

    def __call__(self, archs):
        self.calls.append(list(archs))
        for arch in archs:
            key, ms = self.space.network(arch).key, truth(self.space, arch)
            ok = arch not in self.fails
            row = Row(key, "network", "", arch=arch, latency_ms=ms, ci_low_ms=ms * 0.98, ci_high_ms=ms * 1.02)
            self.rows[key] = row if ok else Row(key, "network", "", arch=arch, status="error", error="no memory")
        return LatencyTable.from_rows(self.rows.values(), Provenance("cpu", "x", "roofline"))


class TestLaws(OracleConformance):
    n_archs = 10
    oracle = MeasuredOracle(SPACE, Device(SPACE), max_support=20_000)

    def probs(self, n=3):
        """Two edges undecided: 25 architectures."""
        full, rng = np.zeros((n, 6, 5)), np.random.default_rng(0)
        full[:, :, 3] = 1
        full[:, [0, 3]] = rng.dirichlet(np.ones(5), (n, 2))
        return full


def test_each_network_is_measured_once():
    device = Device(SPACE)
    oracle = MeasuredOracle(SPACE, device)
    archs = np.array([(3, 3, 3, 3, 3, 3), (1, 2, 3, 0, 1, 2), (3, 3, 3, 3, 3, 3)])
    first = oracle.latencies(archs)
    assert [len(call) for call in device.calls] == [2]
    np.testing.assert_array_equal(oracle.latencies(archs), first)
    assert oracle.latency((3, 3, 3, 3, 3, 3)) == first[0]
    low, high = oracle.interval(archs, 0.95)
    np.testing.assert_allclose([low, high], [0.98 * first, 1.02 * first])
    assert len(device.calls) == 1
    remembering = MeasuredOracle(SPACE, device, held=device([]))
    remembering.latencies(archs)
    assert sum(map(len, device.calls)) == 2


def test_equal_networks_are_one_measurement():
    device = Device(SPACE)
    MeasuredOracle(SPACE, device).latencies(np.array([(4, 3, 3, 3, 0, 0), (0, 0, 0, 3, 0, 0)]))  # dead edges
    assert [len(call) for call in device.calls] == [1]


def test_a_failed_measurement_is_told_in_the_devices_words():
    arch = (3, 3, 3, 3, 3, 3)
    with pytest.raises(MeasurementError, match="no memory"):
        MeasuredOracle(SPACE, Device(SPACE, fails=(arch,))).latency(arch)


def test_a_wide_expectation_is_refused():
    with pytest.raises(UsageError, match="15625 architectures"):
        MeasuredOracle(SPACE, Device(SPACE)).expected_latency(np.full((6, 5), 0.2))


def test_on_a_target_the_memory_is_a_table(tmp_path):
    out = tmp_path / "table.parquet"
    target = Target("cpu", "roofline", "roofline", {}, SamplingPlan())
    oracle = measured_oracle(SPACE, target, out)
    arch = (3, 1, 2, 3, 4, 0)
    assert oracle.latency(arch) == pytest.approx(truth(SPACE, arch), rel=0.02)  # batch norms folded
    assert set(LatencyTable.read(out).frame["kind"]) == {"network"}
    again = measured_oracle(SPACE, target, out)
    again.measure = None  # what is known is not asked again
    assert again.latency(arch) == oracle.latency(arch)


def test_missing_blocks_are_measured_when_asked(tmp_path):
    out, target = tmp_path / "table.parquet", Target("cpu", "roofline", "roofline", {}, SamplingPlan())
    space = MobileNetV1Space(resolution=32, levels=3)
    table = profile(space, target, out).table
    part = table.take(np.arange(0, len(table), 2))
    oracle = LutOracle.fit(part, missing="measure", measure=measure_blocks(space, target, out))
    whole = LutOracle.fit(table)
    archs = np.array([space.sample(np.random.default_rng(i)) for i in range(5)])
    np.testing.assert_allclose(oracle.latencies(archs), whole.latencies(archs))
