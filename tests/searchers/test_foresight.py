"""Pre-selection: what it promises comes true where losses depend on the decisions, and it never judges."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from searchers import foresight
from searchers.foresight import MAX_KNOWN


def networks(n, seed, decisions=8, options=4):
    """(n, D), all different."""
    rng = np.random.default_rng(seed)
    places = rng.choice(options**decisions, n, replace=False)
    return np.stack(np.unravel_index(places, (options,) * decisions), axis=1)


def promising(known, losses, candidates):
    losses = dict(zip(map(tuple, np.asarray(known).tolist()), np.asarray(losses).tolist(), strict=True))
    return np.array(foresight.promising(losses, list(map(tuple, np.asarray(candidates).tolist()))), np.int64)


@pytest.mark.parametrize("kind", ["sums", "joint"])
def test_the_order_follows_losses_that_depend_on_the_decisions(kind):
    rng = np.random.default_rng(0)
    alone, pairs = rng.random((8, 4)), rng.random((8, 4, 4))

    def loss(archs):
        value = alone[np.arange(8), archs].sum(1)
        if kind == "joint":
            value = pairs[np.arange(8), archs, np.roll(archs, 1, axis=1)].sum(1)
        return value

    known, candidates = networks(200, 1), networks(500, 2)
    order = promising(known, loss(known), candidates)
    assert sorted(order.tolist()) == list(range(500))
    places = np.argsort(order)
    assert spearmanr(places, loss(candidates))[0] > (0.9 if kind == "sums" else 0.5)
    assert loss(candidates[order[:10]]).mean() < np.quantile(loss(candidates), 0.1 if kind == "sums" else 0.25)


def test_only_the_order_of_losses_counts_and_failures_are_the_worst():
    known, candidates = networks(60, 1), networks(100, 2)
    losses = known.sum(1) + np.random.default_rng(0).random(60)
    order = promising(known, losses, candidates)
    assert np.array_equal(promising(known, np.exp(losses), candidates), order)
    worst = losses.argmax()
    for value in (np.inf, np.nan, 1e30):
        assert np.array_equal(promising(known, np.where(np.arange(60) == worst, value, losses), candidates), order)


def test_of_equal_expectations_the_less_known_comes_first():
    known = np.array([[0] * 8, [0] * 7 + [1]])
    near, far = [0] * 7 + [2], [2] * 8
    assert promising(known, np.array([1.0, 1.0]), np.array([near, far])).tolist() == [1, 0]


def test_the_order_stays_where_nothing_is_known():
    candidates = networks(5, 0)
    for n in (0, 1):
        assert promising(networks(n, 1).reshape(n, 8), np.ones(n), candidates).tolist() == [0, 1, 2, 3, 4]
    assert len(promising(networks(9, 1), np.ones(9), candidates[:0])) == 0


def test_of_many_networks_the_latest_count():
    known, candidates = networks(MAX_KNOWN + 50, 1), networks(20, 2)
    losses = known.sum(1).astype(float)
    latest = promising(known[50:], losses[50:], candidates)
    losses[:50] = -1e9
    assert np.array_equal(promising(known, losses, candidates), latest)
