"""Max-sum, marginals and joint samples against all paths."""

from __future__ import annotations

import chain_cases
import numpy as np
import pytest
from scipy import stats

from latbench.errors import UsageError
from latbench.oracle.factors import Chain
from searchers.chains import Paths, marginals, max_sum, sample, sample_layers

TINY = chain_cases.TINY
AT = np.array([0.25])


def priced(paths, gamma):
    return paths.scores, paths.priced(np.array([gamma])), paths.sizes


@pytest.mark.parametrize(
    ("gamma", "path", "value"), [(0.05, (1, 2), -0.5), (0.2, (1, 1), -1.5), (0.255, (0, 1), -1.8475), (0.3, (0, 0), -2)]
)
def test_max_sum_of_the_specification(gamma, path, value):
    found, total = max_sum(*priced(TINY, gamma))
    assert found == path
    assert total == pytest.approx(value, abs=1e-12)


def test_marginals_of_the_specification():
    warm = marginals(*priced(TINY, 0.25), 1.0)
    np.testing.assert_allclose(warm[0, :2], (0.531165, 0.468835), atol=1e-6)
    np.testing.assert_allclose(warm[1], (0.368095, 0.377413, 0.254492), atol=1e-6)
    cold = marginals(*priced(TINY, 0.25), 0.1)
    np.testing.assert_allclose(cold[0, :2], (0.523121, 0.476879), atol=1e-6)
    np.testing.assert_allclose(cold[1], (0.417303, 0.535827, 0.046870), atol=1e-6)
    frozen = marginals(*priced(TINY, 0.3), 1e-4)
    np.testing.assert_allclose(frozen[:, 0], 1)


def test_joint_samples_have_the_joint_frequencies():
    drawn = sample(*priced(TINY, 0.25), 1.0, 100_000, np.random.default_rng(0))
    seen = np.bincount(3 * drawn[:, 0] + drawn[:, 1], minlength=6)
    expected = np.array([0.184047, 0.188707, 0.158411, 0.184047, 0.188707, 0.096081])
    assert stats.chisquare(seen, expected / expected.sum() * seen.sum()).pvalue > 0.001
    for layer, row in enumerate(marginals(*priced(TINY, 0.25), 1.0)):
        shares = np.bincount(drawn[:, layer], minlength=3) / len(drawn)
        np.testing.assert_allclose(shares, row, atol=0.006)


def test_layers_apart_have_their_marginals():
    probs = marginals(*priced(TINY, 0.25), 1.0)
    drawn = sample_layers(probs, TINY.sizes, 100_000, np.random.default_rng(0))
    for layer, row in enumerate(probs):
        np.testing.assert_allclose(np.bincount(drawn[:, layer], minlength=3) / len(drawn), row, atol=0.006)


@pytest.mark.parametrize("seed", range(200))
def test_random_chains_against_all_paths(seed):
    paths = chain_cases.random_paths(seed)
    every, scores, costs = chain_cases.brute_force(paths)
    for gamma in (0.0, 0.7):
        value = scores - gamma * (costs[:, 0] - paths.constants[0])
        found, total = max_sum(*priced(paths, gamma))
        assert total == pytest.approx(value.max(), abs=1e-12)
        assert value[every.index(found)] == pytest.approx(value.max(), abs=1e-12)
        weight = np.exp(value - value.max())
        probs = marginals(*priced(paths, gamma), 1.0)
        for layer, size in enumerate(paths.sizes):
            states = np.array([path[layer] for path in every])
            want = np.bincount(states, weight, minlength=int(size)) / weight.sum()
            np.testing.assert_allclose(probs[layer, :size], want, atol=1e-12)
            assert not probs[layer, size:].any()


def test_scores_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="do not fit"):
        Paths.of([np.zeros(2)], [Chain(0.0, (np.zeros(3),), ())])
