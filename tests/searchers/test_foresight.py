"""Pre-selection: what it promises comes true where losses depend on the decisions, and it never judges."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from latbench.oracle.features import physical
from latbench.spaces.cells import RelativeNASSpace
from latbench.spaces.nasbench201 import NASBench201Space
from latbench.spaces.nsc import IRLASSpace
from searchers import foresight
from searchers.foresight import MAX_KNOWN, figures_of


def networks(n, seed, decisions=8, options=4):
    """(n, D), all different."""
    rng = np.random.default_rng(seed)
    places = rng.choice(options**decisions, n, replace=False)
    return np.stack(np.unravel_index(places, (options,) * decisions), axis=1)


def promising(known, losses, candidates, figures=None):
    losses = dict(zip(map(tuple, np.asarray(known).tolist()), np.asarray(losses).tolist(), strict=True))
    return np.array(foresight.promising(losses, list(map(tuple, np.asarray(candidates).tolist())), figures), np.int64)


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


def test_figures_tell_much_of_few_networks_where_losses_follow_what_they_cost():
    space = RelativeNASSpace(channels=4, layers=3, resolution=8)
    rng = np.random.default_rng(0)
    known, candidates = (np.array([space.sample(rng) for _ in range(n)]) for n in (10, 200))
    (column,) = [i for i, name in enumerate(physical(space).names) if name == "total/macs"]
    losses = [-physical(space).of(archs)[:, column] for archs in (known, candidates)]
    with_, without = (
        spearmanr(np.argsort(promising(known, losses[0], candidates, figures)), losses[1])[0]
        for figures in (figures_of(space), None)
    )
    assert with_ > 0.6 > 0.4 > without


@pytest.mark.parametrize(
    "space",
    [RelativeNASSpace(channels=4, layers=3, resolution=8), IRLASSpace(resolution=16, max_index=4), NASBench201Space()],
)
def test_figures_of_a_space_are_on_one_scale(space):
    rng = np.random.default_rng(1)
    figures = figures_of(space)(np.array([space.sample(rng) for _ in range(60)]))
    apart = ((figures[:, None] - figures) ** 2).sum(-1)
    assert 1 < apart[np.triu_indices(60, 1)].mean() < 4


def test_what_no_output_reads_tells_nothing():
    space = NASBench201Space(num_cells=1, channels=4, resolution=8)
    dead = space.parse_arch("|nor_conv_3x3~0|+|none~0|none~1|+|nor_conv_1x1~0|none~1|none~2|")
    spelled = np.array([dead, space.canonical(dead)])
    assert tuple(dead) != space.canonical(dead)
    one, other = figures_of(space)(spelled)
    assert np.array_equal(one, other)
