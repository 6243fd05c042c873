"""Chains for the tests: the one of the specification, random ones, and brute force over all paths."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np

from latbench.oracle.factors import Chain
from searchers.chains import Paths

TINY = Paths.of(
    [np.array([-0.5, 0.0]), np.array([-0.6, -0.2, 0.0])],
    [Chain(0.0, (np.array([1.0, 2.0]), np.array([1.0, 1.5, 2.0])), (np.array([[1.0, 2.0, 3.0], [2.0, 3.0, 6.0]]),))],
)  # fmt: skip


def random_paths(seed: int, n_resources: int = 1) -> Paths:
    """At most 5 layers of at most 4 states, counts unequal; every third chain is full of equal figures."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, rng.integers(1, 6)).tolist()

    def draw(shape):
        return rng.integers(0, 4, shape).astype(float) if seed % 3 == 0 else rng.normal(size=shape)

    chains = [
        Chain(float(rng.normal()), tuple(map(draw, sizes)), tuple(map(draw, pairwise(sizes))))
        for _ in range(n_resources)
    ]
    return Paths.of([draw(size) for size in sizes], chains)


def brute_force(paths: Paths):
    """All paths, (N,) scores, (N, K) costs."""
    every = list(product(*(range(size) for size in paths.sizes)))
    found = [paths.sums(path) for path in every]
    return every, np.array([score for score, _ in found]), np.array([cost for _, cost in found])
