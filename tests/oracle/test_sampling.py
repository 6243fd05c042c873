"""Which networks to measure: coverage, ties and information, against counting and dense algebra."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from latbench.errors import UsageError
from latbench.graph.ir import GraphBuilder
from latbench.graph.ops import Linear
from latbench.oracle import sampling
from latbench.oracle.sampling import METHODS, biased, choose, d_optimal, uniform
from latbench.oracle.vocabulary import vocabulary
from latbench.spaces.base import Decision, FactoredSpace, SearchSpace, Site
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.spaces.nasbench201 import NASBench201Space

MOBILENET = MobileNetV1Space()


@dataclass(frozen=True)
class Toy(FactoredSpace):
    """Chains and others, with layers between the widths chosen."""

    name: ClassVar[str] = "toy"
    scopes: tuple[tuple[int, ...], ...] = ((0,), (0, 1), (1, 2), (2,))

    @property
    def decisions(self):
        return tuple(Decision(f"d{i}", tuple(range(2, 2 + n))) for i, n in enumerate((2, 3, 4)))

    @property
    def sites(self):
        return tuple(Site(f"site{i}", scope, "layer") for i, scope in enumerate(self.scopes))

    def block(self, site, picks):
        b = GraphBuilder()
        number = int(site.name[4:])
        n = 7 * number + sum(p * 10 ** (i + 2) for i, p in enumerate(picks, 1))
        return b.build(b.add(Linear(8, 1 + n), b.input("x", (1, 8)), name="fc"))


@dataclass(frozen=True)
class Whole(SearchSpace):
    """Does not factor."""

    name: ClassVar[str] = "whole"

    @property
    def decisions(self):
        return (Decision("depth", (1, 2, 3)),)

    def network(self, arch):
        raise NotImplementedError


def counts(space, archs):
    """(P,) how often each block occurs."""
    return np.asarray(vocabulary(space).design(archs).sum(axis=0)).ravel()


def test_legacy_ties_give_the_released_configurations():
    archs = biased(MOBILENET, 3, np.random.default_rng(0), legacy=True)
    assert [MOBILENET.widths(tuple(arch)) for arch in archs.tolist()] == [
        (8, 16, 24, 24, 48, 48, 104, 104, 104, 104, 104, 104, 208, 208),
        (16, 24, 24, 40, 48, 80, 104, 152, 104, 152, 104, 152, 208, 304),
        (24, 32, 24, 48, 48, 104, 104, 208, 104, 208, 104, 208, 208, 408),
    ]


@pytest.mark.parametrize("legacy", [False, True])
def test_every_block_is_seen_after_196_networks_and_evenly_after_8000(legacy):
    archs = biased(MOBILENET, 8000, np.random.default_rng(1), legacy=legacy)
    assert counts(MOBILENET, archs[:196]).min() == 1
    assert counts(MOBILENET, archs).min() == 40


def test_random_ties_keep_the_widths_even():
    archs = biased(MOBILENET, 8000, np.random.default_rng(2))
    for d, decision in enumerate(MOBILENET.decisions):
        share = np.bincount(archs[:, d], minlength=len(decision.options)) * len(decision.options) / len(archs)
        assert 0.8 < share.min() <= share.max() < 1.3, f"{decision.name}: {share}"


def test_legacy_ties_do_not():
    archs = biased(MOBILENET, 2000, np.random.default_rng(2), legacy=True)
    assert (archs[:, 8] == 0).mean() > 0.7


@pytest.mark.parametrize("scopes", [Toy().scopes, ((0, 2), (1,), (0, 1)), ((0, 1, 2), (1,))])
def test_each_network_holds_the_most_least_seen_blocks(scopes):
    space = Toy(scopes=scopes)
    every = np.stack([a.ravel() for a in np.indices((2, 3, 4))], axis=1)
    words = vocabulary(space)
    archs = biased(space, 30, np.random.default_rng(3))
    seen = np.zeros(len(words.blocks))
    for arch in archs:
        least = seen == seen.min()
        gains = least[words.occurrences(every)].sum(axis=1)
        assert least[words.occurrences(arch[None])].sum() == gains.max()
        seen += counts(space, arch[None])


def test_what_was_measured_before_counts():
    space, rng = Toy(), np.random.default_rng(4)
    first = biased(space, 12, rng)
    later = biased(space, 12, rng, measured=first)
    assert counts(space, np.concatenate([first, later])).min() >= 2 * counts(space, first).min() >= 2


def test_entangled_spaces_are_covered_too():
    space = NASBench201Space(num_cells=1)
    archs = biased(space, 125, np.random.default_rng(5))
    assert counts(space, archs).min() >= 1
    with pytest.raises(UsageError, match="nasbench201 is no chain"):
        biased(space, 1, np.random.default_rng(5), legacy=True)


@pytest.mark.parametrize("n_measured", [0, 4])
def test_the_next_network_is_the_least_certain(n_measured):
    rng = np.random.default_rng(6)
    pool, measured = uniform(Toy(), 40, rng), uniform(Toy(), n_measured, rng)
    archs = d_optimal(Toy(), 15, rng, pool=pool, measured=measured)
    design = vocabulary(Toy()).design(pool).toarray()
    known = vocabulary(Toy()).design(measured).toarray()
    information = sampling.NOISE_RATIO**2 * np.eye(design.shape[1]) + known.T @ known
    for arch in archs:
        variance = np.einsum("np,pq,nq->n", design, np.linalg.inv(information), design)
        row = vocabulary(Toy()).design(arch[None]).toarray()[0]
        held = design @ np.linalg.solve(information, row)
        at = int(np.flatnonzero((pool == arch).all(axis=1))[0])
        assert held[at] >= (1 - 1e-3) * variance.max()
        information += np.outer(row, row)


def test_an_informed_order_determines_more():
    rng = np.random.default_rng(7)
    n = 300

    def information(archs):
        design = vocabulary(MOBILENET).design(archs).toarray()
        return np.linalg.slogdet(sampling.NOISE_RATIO**2 * np.eye(n) + design @ design.T)[1]

    assert information(d_optimal(MOBILENET, n, rng)) > information(uniform(MOBILENET, n, rng)) + 10


def test_a_pool_is_used_once():
    pool = uniform(MOBILENET, 30, np.random.default_rng(8))
    archs = d_optimal(MOBILENET, 30, np.random.default_rng(8), pool=pool)
    np.testing.assert_array_equal(np.unique(archs, axis=0), np.unique(pool, axis=0))
    with pytest.raises(UsageError, match="31 networks cannot be chosen from a pool of 30"):
        d_optimal(MOBILENET, 31, np.random.default_rng(8), pool=pool)


@pytest.mark.parametrize("method", METHODS)
def test_choices_are_architectures_and_depend_on_the_generator_only(method):
    for space in (Toy(), Whole()):
        archs = choose(space, 6, method, np.random.default_rng(9))
        assert archs.shape == (6, len(space.decisions))
        for arch in archs.tolist():
            space.check(tuple(arch))
        np.testing.assert_array_equal(archs, choose(space, 6, method, np.random.default_rng(9)))
        assert choose(space, 0, method, np.random.default_rng(9)).shape == (0, len(space.decisions))


def test_an_unknown_method_is_refused():
    with pytest.raises(UsageError, match="'random': uniform, biased, d_optimal"):
        choose(Toy(), 1, "random", np.random.default_rng(0))
