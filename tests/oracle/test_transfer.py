"""Transfer to a new device: laws of every oracle, and that sources help where they can and do no harm elsewhere."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from latbench.errors import TableError, UsageError
from latbench.oracle import transfer, transfer_blend
from latbench.oracle.conformal import coverage
from latbench.oracle.factors import Factor, FactorOracle
from latbench.oracle.features import live_cells
from latbench.oracle.learned import LearnedOracle
from latbench.oracle.transfer import TransferOracle, _mix
from latbench.oracle.transfer_blend import Ingredient, blend
from latbench.oracle.transfer_sources import positive, source_model
from latbench.provenance import Provenance
from latbench.spaces.fbnet import FBNetSpace
from latbench.spaces.nasbench201 import NASBench201Space
from latbench.tables import LatencyTable, Row
from latbench.testing import FactorOracleConformance

FBNET = FBNetSpace()


def truth(seed, space=FBNET):
    """A device: a launch cost per block and a price per MAC and channel, each with a whim per block."""
    rng = np.random.default_rng(seed)
    launch, price, whims, factors = rng.uniform(0.05, 0.3), rng.uniform(1e-8, 2e-7), {}, []
    for site in space.sites:
        shape = tuple(len(space.decisions[d].options) for d in site.scope)
        values = np.zeros(shape)
        for picks in np.ndindex(shape):
            block = space.block(site, picks)
            if block is not None:
                whim = whims.setdefault((site.scope, block.key), rng.uniform(0.6, 1.4))
                values[picks] = (launch + price * block.macs) * whim
        factors.append(Factor(site.name, site.scope, values))
    return FactorOracle(space, tuple(factors), provenance(f"device {seed}", space))


def provenance(name, space=FBNET):
    return Provenance("", name, "test", space=space.name, settings=space.settings())


def table(device, n, seed=0, noise=0.01, outliers=0.0):
    rng = np.random.default_rng(seed)
    archs = np.unique([device.space.sample(rng) for _ in range(n)], axis=0)
    ms = device.latencies(archs) * np.exp(noise * rng.standard_normal(len(archs)))
    ms = np.where(rng.uniform(size=len(ms)) < outliers, 2 * ms, ms)
    rows = [
        Row(key=str(i), kind="network", signature="", arch=tuple(a.tolist()), latency_ms=float(y))
        for i, (a, y) in enumerate(zip(archs, ms, strict=True))
    ]
    return LatencyTable.from_rows(rows, device.provenance)


def mape(oracle, device, n=300):
    rng = np.random.default_rng(99)
    archs = np.array([device.space.sample(rng) for _ in range(n)])
    return float(np.abs(oracle.latencies(archs) / device.latencies(archs) - 1).mean())


@pytest.fixture(scope="module")
def fbnet():
    return TransferOracle.fit(table(truth(1), 12), sources=[table(truth(2), 300), table(truth(3), 300)])


@pytest.fixture(scope="module")
def nasbench201():
    space = NASBench201Space(num_cells=1)
    return TransferOracle.fit(table(truth(1, space), 12), sources=[table(truth(2, space), 300)])


class TestLargeSpace(FactorOracleConformance):
    @pytest.fixture(autouse=True)
    def make(self, fbnet):
        self.oracle = fbnet


class TestSmallSpace(FactorOracleConformance):
    @pytest.fixture(autouse=True)
    def make(self, nasbench201):
        self.oracle = nasbench201


def test_the_file_keeps_what_it_was_made_from(fbnet):
    arrays, meta = fbnet.state()
    twin = TransferOracle.from_state(fbnet.space, fbnet.provenance, arrays, meta)
    assert twin.chances == fbnet.chances
    assert list(fbnet.chances) == [
        "source 1: device 2",
        "source 2: device 3",
        "kernels",
        "macs",
        "bytes",
        "kinds of kernels",
        "options",
    ]


def test_a_good_source_helps():
    device, others = truth(1), [table(truth(1), 500, seed=5), table(truth(4), 500)]
    few = table(device, 12)
    helped = TransferOracle.fit(few, sources=others)
    alone = TransferOracle.fit(few, sources=[shuffled(others[0])])
    assert mape(helped, device) < 0.02
    assert mape(helped, device) < 0.6 * mape(alone, device)
    assert helped.chances["source 1: device 1"] > 0.9


def shuffled(source):
    """The same latencies of other networks: a source that says nothing."""
    rows = list(source.rows())
    order = np.random.default_rng(0).permutation(len(rows))
    return LatencyTable.from_rows(
        [replace(row, latency_ms=rows[int(i)].latency_ms) for row, i in zip(rows, order, strict=True)],
        source.provenance,
    )


def reversed_of(device):
    """A device on which every choice costs the opposite: the fast are slow."""
    flipped = [Factor(f.site, f.scope, f.values.max() + f.values.min() - f.values) for f in device.factors]
    return FactorOracle(device.space, tuple(flipped), provenance("reversed"))


def test_misleading_sources_do_no_harm():
    ratios = []
    for seed, n in ((0, 10), (1, 25)):
        device = truth(seed)
        few = table(device, n, seed)
        silent = FactorOracle(FBNET, (Factor("level", (), np.array(1.0)),), provenance("silent"))
        alone = TransferOracle.fit(few, sources=[silent])
        misled = TransferOracle.fit(few, sources=[table(reversed_of(truth(9)), 400), shuffled(table(truth(8), 400))])
        ratios.append(mape(misled, device) / mape(alone, device))
    assert np.mean(ratios) < 1.1


def by_kind(seed):
    """A device without whims: what it takes is settled by MACs and kinds, so a few networks tell all."""
    space, rng = NASBench201Space(num_cells=1), np.random.default_rng(seed)
    launch, price = rng.uniform(0.05, 0.3), rng.uniform(1e-8, 2e-7)
    macs = FactorOracle.counting(space, "macs").factors
    values = [launch * (f.values > 0) + price * f.values for f in macs]
    factors = [Factor(f.site, f.scope, v) for f, v in zip(macs, values, strict=True)]
    return FactorOracle(space, (*factors, Factor("level", (), np.array(launch))), provenance(f"plain {seed}", space))


def test_where_sources_only_add_noise_the_networks_alone_are_mixed_in(monkeypatch):
    device = by_kind(1)
    few = table(device, 25, noise=0.0005)
    noisy = [table(by_kind(seed), 60, seed, noise=0.3) for seed in (2, 3)]
    mixed, alone = TransferOracle.fit(few, sources=noisy), LearnedOracle.fit(few)
    monkeypatch.setattr(transfer, "_DOUBT", 1e9)
    unmixed = TransferOracle.fit(few, sources=noisy)
    assert unmixed.share < 1e-6
    assert mixed.share > 0.5
    assert mape(alone, device) < mape(mixed, device) < 0.6 * mape(unmixed, device)
    arrays, meta = mixed.state()
    assert TransferOracle.from_state(mixed.space, mixed.provenance, arrays, meta).share == mixed.share


def test_networks_of_which_nothing_runs_are_told_by_the_device_alone():
    """Sources run every edge; the device leaves out cells that no path leads through, and takes 4 us for them."""
    space = NASBench201Space(num_cells=1)
    whole = truth(1, space)
    archs = np.indices([5] * 6).reshape(6, -1).T
    dead = ~live_cells(archs)[1]
    values = np.where(dead, 0.004, whole.latencies(archs)).reshape([5] * 6)
    device = FactorOracle(space, (Factor("network", tuple(range(6)), values),), provenance("phone", space))
    few = np.concatenate([np.flatnonzero(dead)[:2], np.random.default_rng(0).permutation(np.flatnonzero(~dead))[:18]])
    rows = [
        Row(key=str(i), kind="network", signature="", arch=tuple(a.tolist()), latency_ms=float(y))
        for i, (a, y) in enumerate(zip(archs[few], device.latencies(archs[few]), strict=True))
    ]
    measured = LatencyTable.from_rows(rows, device.provenance)
    sources = [table(truth(seed, space), 400) for seed in (2, 3)]
    found = TransferOracle.fit(measured, sources=sources)
    alone = LearnedOracle.fit(measured, calibrated=False)
    assert whole.latencies(archs[dead]).min() > 2.0
    assert found.latencies(archs[dead]).max() < 0.15
    living = np.abs(found.latencies(archs[~dead]) / device.latencies(archs[~dead]) - 1).mean()
    assert living < np.abs(alone.latencies(archs[~dead]) / device.latencies(archs[~dead]) - 1).mean()


def test_a_model_of_before_shares_were_mixed_is_read(fbnet):
    arrays, meta = fbnet.state()
    del meta["share"]
    assert TransferOracle.from_state(fbnet.space, fbnet.provenance, arrays, meta).share == 0


def test_shares_follow_the_errors_of_networks_left_out():
    rng = np.random.default_rng(0)
    ms = rng.uniform(1, 2, 40)
    good, bad = ms * (1 + 0.001 * rng.standard_normal(40)), ms * (1 + 0.1 * rng.standard_normal(40))
    share, mixed = _mix(bad, good, ms)
    assert share > 0.8
    assert np.abs(mixed / ms - 1).mean() < 0.2 * np.abs(bad / ms - 1).mean()
    share, mixed = _mix(good, bad, ms)
    assert share < 0.01
    assert np.abs(mixed / good - 1).max() < 0.003
    alike = ms * (1 + 0.01 * rng.standard_normal((2, 4000))[:, :40])
    assert 0.2 < _mix(*alike, ms)[0] < 0.6  # two as good: the mean, less the belief in sources
    share, mixed = _mix(ms, ms, ms)
    assert (share, mixed.tolist()) == (0, ms.tolist())


def test_intervals_cover_what_was_not_measured():
    inside, source = [], source_model(table(truth(50), 300))
    for seed in range(6):
        device = truth(seed)
        oracle = TransferOracle.fit(table(device, 20, seed, noise=0.03), sources=[source], seed=seed)
        rng = np.random.default_rng(seed)
        archs = np.array([FBNET.sample(rng) for _ in range(200)])
        measured = device.latencies(archs) * np.exp(0.03 * rng.standard_normal(200))
        inside.append(coverage(oracle.interval(archs, 0.9), measured))
    assert 0.8 < np.mean(inside) < 0.98


def test_a_source_may_be_measured_at_another_batch_or_fitted_already():
    few = table(truth(1), 10)
    batched = FBNetSpace(batch=32)
    from_table = TransferOracle.fit(few, sources=[table(truth(2, batched), 200)])
    fitted = TransferOracle.fit(few, sources=[source_model(table(truth(2, batched), 200))])
    archs = few.networks()[0]
    np.testing.assert_allclose(from_table.latencies(archs), fitted.latencies(archs))


def test_fits_are_repeatable_and_scale_with_the_unit():
    few, source = table(truth(1), 10), table(truth(2), 200)
    a, b = (TransferOracle.fit(few, sources=[source], seed=3) for _ in range(2))
    archs = few.networks()[0]
    np.testing.assert_array_equal(a.latencies(archs), b.latencies(archs))
    micro = LatencyTable.from_rows([replace(r, latency_ms=1000 * r.latency_ms) for r in few.rows()], few.provenance)
    np.testing.assert_allclose(
        TransferOracle.fit(micro, sources=[source], seed=3).latencies(archs), 1000 * a.latencies(archs), rtol=1e-6
    )


@pytest.mark.parametrize("space", [FBNET, NASBench201Space(num_cells=1)], ids=lambda s: s.name)
def test_a_source_becomes_a_function_of_the_architecture_whatever_its_outliers(space):
    device = truth(2, space)
    clean, soiled = (source_model(table(device, 800, noise=0.01, outliers=share)) for share in (0, 0.05))
    assert mape(clean, device) < 0.015
    assert mape(soiled, device) < 0.02


def test_nothing_is_predicted_below_the_floor():
    for space in (FBNET, NASBench201Space(num_cells=1)):
        rng = np.random.default_rng(0)
        factors = tuple(Factor(d.name, (i,), rng.normal(0.2, 1, len(d.options))) for i, d in enumerate(space.decisions))
        raw = FactorOracle(space, (*factors, Factor("level", (), np.array(5.0))), provenance("x", space))
        lifted = replace(raw, factors=positive(raw, 0.5))
        assert raw.fastest()[1] < 0
        assert lifted.fastest()[1] == pytest.approx(0.5)


def test_blend_is_gaussian_regression_where_the_scales_are_known():
    """Brute force: with one scale possible and the noise alike, the average is a ridge regression."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 3)) / np.sqrt(3)
    y = 1 + x @ [0.3, -0.2, 0.1] + 0.001 * rng.standard_normal(40)
    found = blend(y, [Ingredient(x, median=0.3, spread=0.01, chance=1.0)], np.random.default_rng(1))
    np.testing.assert_allclose(found.coefficients[0], [0.3, -0.2, 0.1], atol=0.005)
    again = blend(y[1:], [Ingredient(x[1:], median=0.3, spread=0.01, chance=1.0)], np.random.default_rng(1))
    assert found.left_out[0] == pytest.approx(1 + again.constant + x[0] @ again.coefficients[0], abs=2e-4)


def test_blend_averages_over_which_measurements_are_late(monkeypatch):
    """Brute force: every way in which five measurements may be disturbed, weighed by its likelihood."""
    monkeypatch.setattr(transfer_blend, "_NOISE", (0.02, 1e-9))
    x = np.linspace(-1, 1, 5)[:, None]
    y = 1 + 0.2 * x[:, 0] + [0.0, 0.01, 0.12, -0.01, 0.04]

    def posterior(x, y):
        covariance = 0.3**2 * x @ x.T + transfer_blend._LEVEL_SCALE**2
        total, constant, slope = 0.0, 0.0, 0.0
        for sizes in product(range(4), repeat=len(y)):
            s = list(sizes)
            spread = covariance + np.diag((0.02 * y * transfer_blend._SIZES[s]) ** 2 + 1e-10)
            off = y - 1 - 0.02 * y * transfer_blend._DELAYS[s]
            alpha = np.linalg.solve(spread, off)
            weight = np.prod(transfer_blend._SHARES[s]) * np.exp(-0.5 * off @ alpha) / np.sqrt(np.linalg.det(spread))
            total += weight
            constant += weight * transfer_blend._LEVEL_SCALE**2 * alpha.sum()
            slope += weight * 0.3**2 * (x[:, 0] @ alpha)
        return constant / total, slope / total

    found = blend(y, [Ingredient(x, median=0.3, spread=1e-9, chance=1.0)], np.random.default_rng(0))
    constant, slope = posterior(x, y)
    assert found.constant == pytest.approx(constant, abs=1e-3)
    assert found.coefficients[0][0] == pytest.approx(slope, abs=1e-3)
    for i in range(5):
        kept = np.arange(5) != i
        constant, slope = posterior(x[kept], y[kept])
        assert found.left_out[i] == pytest.approx(1 + constant + slope * x[i, 0], abs=3e-3)


def test_late_measurements_count_less_than_early_ones():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((10, 1))
    y = 1 + 0.3 * x[:, 0] + 0.01 * rng.standard_normal(10)
    off = np.where(np.arange(10) < 3, 0.05, 0.0)
    late, early = (
        blend(y + shift, [Ingredient(x, median=0.3, spread=1.0, chance=1.0)], np.random.default_rng(0)).constant
        for shift in (off, -off)
    )
    assert -0.01 < late < 0.012
    assert abs(early) > 1.5 * abs(late)


def test_what_cannot_be_used_is_refused():
    few, source = table(truth(1), 10), table(truth(2), 100)
    with pytest.raises(UsageError, match="needs tables of other devices"):
        TransferOracle.fit(few)
    with pytest.raises(TableError, match=r"source 2 \(device 1\) is of nasbench201"):
        TransferOracle.fit(few, sources=[source, table(truth(1, NASBench201Space(num_cells=1)), 50)])
    with pytest.raises(TableError, match="device 3 has 5 measured networks of fbnet, at least 10"):
        TransferOracle.fit(few, sources=[table(truth(3), 5)])
    with pytest.raises(TableError, match="has 2 measured networks of fbnet, transfer needs at least 3"):
        TransferOracle.fit(table(truth(1), 2), sources=[source])
    holed = source_model(source)
    values = holed.factors[1].values.copy()
    values[0] = np.nan
    first, second, *rest = holed.factors
    with pytest.raises(TableError, match="lacks entries"):
        TransferOracle.fit(few, sources=[replace(holed, factors=(first, replace(second, values=values), *rest))])
