"""Statistics of widths against naive ones and against a known truth."""

from __future__ import annotations

from collections import deque
from itertools import product

import numpy as np
import pytest
from scipy.optimize import isotonic_regression

from searchers.aows_statistics import AdditiveFit, CellMeans, falling, filled, log_width

SIZES = (3, 5, 2, 4)


def uniform(rng, n):
    return np.stack([rng.integers(size, size=n) for size in SIZES], axis=1)


def test_windows_are_the_means_of_the_last_values():
    rng = np.random.default_rng(0)
    window = 50
    ours = CellMeans(SIZES, window)
    naive = {(layer, w): deque(maxlen=window) for layer, size in enumerate(SIZES) for w in range(size)}
    for step in range(400):  # 10,000 images
        archs, gaps = uniform(rng, 25), rng.normal(size=25).astype(np.float32).astype(np.float64)
        archs[:, 1] = np.minimum(archs[:, 1], 3)  # cell (1, 4) is never visited
        ours.push(archs, gaps, gaps)
        for arch, gap in zip(archs, gaps, strict=True):
            for layer, w in enumerate(arch):
                naive[layer, int(w)].append(gap)
        if step == 200:  # from a checkpoint
            state, ours = ours.state_dict(), CellMeans(SIZES, window)
            ours.load_state_dict(state)
    means = ours.means()
    for (layer, w), values in naive.items():
        if values:
            assert means[layer, w] == pytest.approx(np.mean(values), abs=1e-9)
    assert np.isnan(means[1, 4])
    assert ours.visits()[1, 4] == 0
    assert ours.visits()[:, :].sum() == 4 * 10_000
    assert ours.gaps()[1, 4] == ours.gaps()[1, 3], "the nearest known cell stands for it"


def additive(sizes, window):
    return AdditiveFit(sizes, window, log_width([range(1, size + 1) for size in sizes]))


@pytest.mark.parametrize("make", [CellMeans, additive])
def test_sums_of_cells_estimate_the_gap(make):
    rng = np.random.default_rng(0)
    truth = [np.sort(rng.uniform(0, 1, size))[::-1] for size in SIZES]
    statistics = make(SIZES, 20_000)
    for _ in range(60):
        archs = uniform(rng, 1000)
        gaps = sum(row[archs[:, layer]] for layer, row in enumerate(truth))
        statistics.push(archs, gaps + rng.normal(0, 0.1, len(archs)), np.full(len(archs), 2.0))
    gaps = statistics.gaps()
    for arch in product(*map(range, SIZES)):
        found = sum(gaps[layer, w] for layer, w in enumerate(arch))
        assert found == pytest.approx(sum(row[w] for row, w in zip(truth, arch, strict=True)), abs=0.05)


def test_the_additive_fit_is_not_misled_by_widths_that_come_together():
    rng = np.random.default_rng(0)
    truth = np.array([[1.0, 0.0], [0.2, 0.0]])
    fit, means = additive((2, 2), 20_000), CellMeans((2, 2), 20_000)
    first = rng.integers(2, size=20_000)
    second = np.where(rng.random(20_000) < 0.9, first, 1 - first)
    archs = np.stack([first, second], axis=1)
    for statistics in (fit, means):
        statistics.push(archs, truth[0, first] + truth[1, second], np.full(len(archs), 1.2))
    assert np.diff(fit.gaps()[1])[0] == pytest.approx(-0.2, abs=0.01)
    assert np.diff(means.gaps()[1])[0] == pytest.approx(-1.0, abs=0.05), "what cell means make of it"


def test_the_additive_fit_forgets_and_survives_a_checkpoint():
    rng = np.random.default_rng(0)
    fit = additive((2, 2), 500)
    for sign in (5.0, 1.0):
        for _ in range(40):
            archs = rng.integers(2, size=(200, 2))
            fit.push(archs, sign * (1.0 - archs[:, 0]), np.full(200, sign))
    assert np.diff(fit.gaps()[0])[0] == pytest.approx(-1.0, abs=0.05)
    twin = additive((2, 2), 500)
    twin.load_state_dict(fit.state_dict())
    np.testing.assert_array_equal(twin.gaps(), fit.gaps())
    np.testing.assert_array_equal(twin.visits(), fit.visits())


def test_without_data_the_prior_speaks_and_with_data_it_fades():
    truth = np.array([[1.0, 0.0], [0.0, 0.0]])  # the prior shares it between the layers

    def second_layer(n, seed):
        rng = np.random.default_rng(seed)
        fit = additive((2, 2), 1_000_000)
        archs = rng.integers(2, size=(n, 2))
        fit.push(archs, truth[0, archs[:, 0]] + truth[1, archs[:, 1]] + rng.normal(0, 2, n), np.ones(n))
        return -np.diff(fit.gaps()[1])[0]

    few, more, many = (np.mean([second_layer(n, seed) for seed in range(20)]) for n in (30, 1000, 50_000))
    assert few == pytest.approx(0.5, abs=0.2)
    assert many == pytest.approx(0.0, abs=0.02)
    assert few > more > many


def test_the_prior_s_curve():
    curve = log_width([(8, 16, 32), (4, 8)])
    np.testing.assert_allclose(curve, np.array([[2, 1, 0], [1, 0, 0]]) / 3)


@pytest.mark.parametrize("seed", range(20))
def test_falling_is_the_isotonic_regression(seed):
    rng = np.random.default_rng(seed)
    gaps, weights = np.zeros((2, 7)), np.zeros((2, 7))
    gaps[0], weights[0] = rng.normal(size=7), rng.uniform(0.1, 5, 7)
    gaps[1, :4], weights[1, :4] = rng.integers(3, size=4), 1.0
    found = falling(gaps, weights, (7, 4))
    for row, size in enumerate((7, 4)):
        want = isotonic_regression(gaps[row, :size], weights=weights[row, :size], increasing=False).x
        np.testing.assert_allclose(found[row, :size], want, atol=1e-12)
    assert not found[1, 4:].any()


def test_filling():
    values = np.array([[np.nan, 1.0, np.nan, 3.0], [np.nan] * 4])
    np.testing.assert_array_equal(filled(values, (4, 2), 7.0), [[1, 1, 2, 3], [7, 7, 0, 0]])
