"""Weights and maps beyond the cache, read from chains of blocks whose cost is known."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from latbench.graph.ops import Conv2d
from latbench.oracle.base import one_hot
from latbench.oracle.calibrated import CalibratedOracle
from latbench.oracle.capacity import FIT, Capacity, _Curve
from latbench.oracle.fitting import default_oracle
from latbench.oracle.lut import LutOracle
from latbench.profiling.chains import SHARED_FIT, chain, chains
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.tables import LatencyTable, Provenance, Row
from latbench.testing import OracleConformance

SPACE = MobileNetV1Space(resolution=64)
FITS = 2.5e6  # elements
RISE = 2e-9  # ms per element and MiB of float32 beyond


def paid(elements: float, footprint: float) -> float:
    return elements * RISE * 4 / 2**20 * max(footprint - FITS, 0.0)


def maps(block) -> int:
    """What the convolution that reads and writes the most has around it."""
    convolutions = [node for node in block.nodes if isinstance(node.op, Conv2d)]
    if not convolutions:
        return 0
    return max(math.prod(block.shapes[n.inputs[0]]) + math.prod(block.shapes[n.name]) for n in convolutions)


def table() -> LatencyTable:
    """Blocks at 80 ns a thousand weights, and the space's chains, which pay beyond FITS."""
    rows = [
        Row(block.key, "block", block.signature, "sandwich", macs=block.macs, n_params=block.n_params,
            latency_ms=8e-8 * block.n_params + 1e-3)
        for block in SPACE.all_blocks().values()
    ]  # fmt: skip
    for block, n in chains(SPACE):
        graph = chain(block, n)
        ms = 8e-8 * graph.n_params + 1e-3 * n + paid(graph.n_params, graph.n_params + maps(block))
        rows.append(Row(graph.key, "chain", graph.signature, macs=graph.macs, n_params=graph.n_params, latency_ms=ms))
    return LatencyTable.from_rows(
        rows, Provenance("cpu", "x", "onnxruntime", space=SPACE.name, settings=SPACE.settings())
    )


TABLE = table()
CAPACITY = Capacity.of(TABLE, SPACE)
assert CAPACITY is not None
RNG = np.random.default_rng(0)
ARCHS = np.array([SPACE.sample(RNG) for _ in range(200)], np.int64)


def truth(archs) -> np.ndarray:
    """A network's weights, and its largest maps once."""
    networks = [list(SPACE.blocks(tuple(arch))) for arch in archs.tolist()]
    footprints = [sum(b.n_params for b in blocks) + max(map(maps, blocks)) for blocks in networks]
    return np.array([paid(n, n) for n in footprints])


@cache
def calibrated() -> CalibratedOracle:
    return CalibratedOracle.fit(TABLE)


def test_the_excess_of_networks_is_read_from_chains():
    expected, found = truth(ARCHS), CAPACITY.excess(ARCHS)
    assert (expected > 0).sum() > 50
    assert (expected == 0).sum() > 20
    np.testing.assert_allclose(found, expected, atol=0.03 * expected.max())  # knots lie 25 % apart
    assert found[expected == 0].max() < 0.02 * expected.max()


def test_one_chain_in_a_bad_moment_does_not_lift_all_that_follows():
    small = [r for r in TABLE.rows() if r.kind == "chain" and 4 * r.n_params < 4.2 * 2**20]
    for bad in sorted(small, key=lambda r: r.n_params)[-2:]:
        rows = [replace(r, latency_ms=1.1 * r.latency_ms) if r == bad else r for r in TABLE.rows()]
        found = Capacity.of(LatencyTable.from_rows(rows, TABLE.provenance), SPACE)
        assert found is not None
        moved = np.abs(found.excess(ARCHS) - CAPACITY.excess(ARCHS)) / LutOracle.fit(TABLE).latencies(ARCHS)
        assert moved.mean() < 0.01, "a tenth of what it was off"


def test_what_blocks_take_in_context_is_not_paid_twice():
    """Beside its neighbours a block has less of the core's cache to itself than a chain of one has."""
    small = [r for r in TABLE.rows() if r.kind == "chain" and 4 * r.n_params < 4.05 * 2**20]
    own = {r.key: replace(r, latency_ms=r.latency_ms + 2e-8 * min(r.n_params, 2 * (r.n_params - 1e5))) for r in small}
    means = []
    for share in (1.0, 1.05, 10.0):
        rows = [
            replace(r, latency_ms=share * r.latency_ms) if r.kind == "block" else own.get(r.key, r)
            for r in TABLE.rows()
        ]
        found = Capacity.of(LatencyTable.from_rows(rows, TABLE.provenance), SPACE)
        assert found is not None
        means.append(float(found.excess(ARCHS).mean()))
    assert means[0] > 1.2 * CAPACITY.excess(ARCHS).mean(), "small chains rise"
    assert means[0] > means[1] > means[2] > 0.9 * CAPACITY.excess(ARCHS).mean()


def test_a_single_architecture_is_its_own_expectation():
    np.testing.assert_allclose(CAPACITY.expected(one_hot(SPACE, ARCHS)), CAPACITY.excess(ARCHS), atol=1e-12)


def test_numpy_and_torch_expect_the_same_and_it_is_what_samples_say():
    rng = np.random.default_rng(1)
    width = max(len(d.options) for d in SPACE.decisions)
    probs = np.zeros((len(SPACE.decisions), width))
    for i, decision in enumerate(SPACE.decisions):
        probs[i, : len(decision.options)] = rng.dirichlet(np.ones(len(decision.options)))
    found = float(CAPACITY.expected(probs))
    assert found == pytest.approx(float(CAPACITY.expected(torch.from_numpy(probs))), rel=1e-12)
    drawn = np.stack([rng.choice(width, 4000, p=row) for row in probs], axis=1)
    assert found == pytest.approx(
        CAPACITY.excess(drawn).mean(), rel=0.05
    )  # neighbouring sites are taken as independent


def test_its_gradient_is_finite_for_single_architectures_too():
    probs = torch.from_numpy(one_hot(SPACE, ARCHS[:4])).requires_grad_()
    CAPACITY.expected(probs).sum().backward()
    assert torch.isfinite(probs.grad).all()


def test_it_comes_back_from_its_state():
    arrays, meta = CAPACITY.state()
    back = Capacity.from_state(arrays, meta)
    np.testing.assert_array_equal(back.excess(ARCHS), CAPACITY.excess(ARCHS))


def test_a_table_without_chains_has_none():
    assert Capacity.of(TABLE.select(kind="block"), SPACE) is None


def test_chains_that_never_rise_cost_nothing():
    rows = [replace(r, latency_ms=8e-8 * (r.n_params or 0)) if r.kind == "chain" else r for r in TABLE.rows()]
    flat = Capacity.of(LatencyTable.from_rows(rows, TABLE.provenance), SPACE)
    assert flat is not None
    np.testing.assert_allclose(flat.excess(ARCHS), 0, atol=1e-9)


def test_blocks_and_chains_are_enough_to_calibrate_with():
    assert default_oracle(TABLE) == "calibrated"
    oracle = calibrated()
    np.testing.assert_allclose(
        oracle.latencies(ARCHS), LutOracle.fit(TABLE).latencies(ARCHS) + CAPACITY.excess(ARCHS), rtol=1e-12
    )
    assert oracle.interval(ARCHS) is None


class TestLaws(OracleConformance):
    closure = 1e-2  # of the weights' distribution, which is not Gaussian

    @property
    def oracle(self):
        return calibrated()


def test_what_lies_between_chains_that_fit_is_no_rise():
    weights = np.array([4.0, 8, 10, 12, 14]) * 2**18
    flat = np.array([1.0, 1.02, 1.02, 1.02, 1.02])  # the first in a good moment
    assert _Curve.of(weights, 0, flat * weights, fit=2).rise.max() == pytest.approx(0, abs=1e-12)
    assert _Curve.of(weights, 0, flat * weights, fit=1).rise.max() == pytest.approx(0.02)
    rising = _Curve.of(weights, 0, np.array([1.0, 1.02, 1.03, 1.1, 1.2]) * weights, fit=2).rise
    assert rising.tolist() == sorted(rising)
    assert rising[0] == 0
    assert rising[-1] > 0.1
    assert len(SHARED_FIT) == FIT
