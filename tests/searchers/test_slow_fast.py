"""Slow-fast learning: the released algorithm's fixtures, constraint domination, and a known optimum."""

from __future__ import annotations

import json
import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from latbench.errors import UsageError
from latbench.oracle.base import Constraint
from latbench.oracle.factors import Factor, FactorOracle
from latbench.provenance import Provenance
from latbench.spaces.cells import GENOTYPES, OPERATIONS, RelativeNASSpace, arch_of, genotype_of
from latbench.spaces.nasbench201 import NASBench201Space
from searchers import slow_fast
from searchers.slow_fast import (
    IN_VAIN,
    Population,
    Renewal,
    best,
    decode,
    encode,
    explore,
    first_wins,
    learn,
    mend,
    order,
    upper_bounds,
    violations,
)

SPACE = RelativeNASSpace()
UPPER = upper_bounds(SPACE)
TARGET = encode(arch_of(GENOTYPES["relativenas"]))
TOY_COSTS = dict(zip(OPERATIONS, (1.0, 1.0, 0.0, 4.0, 6.0, 2.0, 3.0), strict=True))  # of an operation
FIXTURES = Path(os.environ.get("LATBENCH_REFERENCE_DATA", "")) / "spec_fixtures.json"
recorded = pytest.mark.skipif(
    not FIXTURES.exists(), reason="LATBENCH_REFERENCE_DATA names no folder with spec_fixtures.json"
)


@pytest.fixture(scope="module")
def fixtures():
    return json.loads(FIXTURES.read_text())["relativenas"]


def distances(vectors):
    """The optimiser's toy: (N, D) -> (N,), 0 at the published genotype."""
    return (((vectors - TARGET) / UPPER) ** 2).sum(1)


def toy_oracle():
    """Operation costs added up over both cells; the published genotype costs 43."""
    values = np.array([TOY_COSTS[op] for op in OPERATIONS])
    factors = tuple(Factor(f"op{d}", (d,), values) for d in range(1, 32, 2))
    return FactorOracle(SPACE, factors, Provenance(device="", device_name="", backend=""))


# ---- the encoding ---------------------------------------------------------------------------------------------------


def test_box_is_the_number_of_options():
    assert UPPER.tolist() == [2, 7, 2, 7, 3, 7, 3, 7, 4, 7, 4, 7, 5, 7, 5, 7] * 2
    assert upper_bounds(NASBench201Space()).tolist() == [5] * 6


def test_decoding():
    assert decode(np.array([0, 0.05, 1.0, 1.0001, 2.0, 5.0, 6.95, 7.0])).tolist() == [0, 0, 0, 1, 1, 4, 6, 6]


def test_decoding_is_that_of_the_released_code():
    """There: floor where v is no integer, else v - 0.1 cut off."""
    rng = np.random.default_rng(0)
    vectors = rng.random((2000, 32)) * UPPER
    vectors = np.where(rng.random(vectors.shape) < 0.2, np.round(vectors), vectors)
    released = np.where(vectors == np.floor(vectors), np.trunc(vectors - 0.1), np.floor(vectors)).astype(int)
    assert np.array_equal(decode(vectors), released)


def test_every_vector_of_the_box_is_a_genotype():
    rng = np.random.default_rng(1)
    vectors = np.concatenate([rng.random((10_000, 32)) * UPPER, np.zeros((1, 32)), UPPER[None]])
    for arch in decode(vectors).tolist():
        SPACE.check(tuple(arch))


def test_encoding_is_inverted():
    arch = arch_of(GENOTYPES["relativenas"])
    assert tuple(decode(encode(arch)).tolist()) == arch
    archs = np.array([SPACE.sample(np.random.default_rng(i)) for i in range(100)])
    assert np.array_equal(decode(encode(archs)), archs)


# ---- one generation -------------------------------------------------------------------------------------------------


@recorded
def test_seed_7_starts_as_the_released_search(fixtures):
    seed7 = fixtures["seed7"]
    population = Population(UPPER, 20, seed=7)
    np.testing.assert_allclose(population.vectors[0], seed7["p0"], rtol=0, atol=1e-12)
    assert population.vectors.sum() == pytest.approx(seed7["population_sum"], abs=1e-9)
    assert population.diversity == pytest.approx(seed7["diversity"], abs=1e-12)
    assert population.pairs().tolist() == seed7["first_pairs"]
    genotype = {kind: [tuple(pair) for pair in pairs] for kind, pairs in seed7["genotype_p0"].items()}
    assert genotype_of(tuple(population.archs[0].tolist())) == genotype


def test_the_slow_learner_moves_and_clipping_leaves_its_velocity():
    slow, fast, v = np.array([[0.5, 3.0]]), np.array([[1.5, 6.0]]), np.array([[0.2, -1.0]])
    shares, upper = (np.array([[0.5, 0.5]]), np.array([[0.4, 1.0]])), np.array([2.0, 7.0])
    moved, velocity = learn(slow, fast, v, shares, upper)
    np.testing.assert_allclose(velocity, [[0.5, 2.5]], rtol=1e-15)
    np.testing.assert_allclose(moved, [[1.0, 5.5]], rtol=1e-15)
    assert decode(moved).tolist() == [[0, 5]]
    assert (slow.tolist(), fast.tolist()) == ([[0.5, 3.0]], [[1.5, 6.0]])
    moved, velocity = learn(slow, fast, np.array([[4.0, -20.0]]), shares, upper)
    np.testing.assert_allclose(velocity, [[2.4, -7.0]])
    assert moved.tolist() == [[2.0, 0.0]]


def test_a_generation_moves_the_slow_learners_only():
    population = Population(UPPER, 10, seed=0)
    for _ in range(5):
        before, pairs = population.vectors.copy(), population.pairs().copy()
        assert sorted(pairs.ravel().tolist()) == list(range(10))
        assert np.array_equal(population.pairs(), pairs), "the same until the population moves"
        first = np.random.default_rng(0).random(5) < 0.5
        population.advance(first)
        slow = np.where(first, pairs[:, 1], pairs[:, 0])
        changed = (population.vectors != before).any(1)
        assert set(np.flatnonzero(changed).tolist()) == set(slow.tolist())
        assert (population.vectors >= 0).all()
        assert (population.vectors <= UPPER).all()


def test_a_population_goes_on_from_its_state():
    whole, parts = (Population(UPPER, 6, seed=3) for _ in range(2))
    for generation in range(4):
        whole.advance(whole.pairs()[:, 0] % 2 == 0)
        first = parts.pairs()[:, 0] % 2 == 0
        state = json.loads(json.dumps(parts.state_dict()))
        parts = Population(UPPER, 6, seed=99 + generation)
        parts.load_state_dict(state)
        parts.advance(first)
    assert np.array_equal(whole.vectors, parts.vectors)
    assert np.array_equal(whole.velocities, parts.velocities)
    assert np.array_equal(whole.pairs(), parts.pairs())


@pytest.mark.parametrize(("size", "seed", "words"), [(3, 0, "even"), (0, 0, "at least 2"), (4, -1, "seed")])
def test_what_is_no_population_is_refused(size, seed, words):
    with pytest.raises(UsageError, match=words):
        Population(UPPER, size, seed=seed)


# ---- the optimiser without networks ---------------------------------------------------------------------------------


def evolve(seed, constraints=(), generations=50):
    population = Population(UPPER, 20, seed=seed)
    for _ in range(generations):
        losses, excess, pairs = distances(population.vectors), np.zeros(20), population.pairs()
        if constraints:
            excess = violations(constraints, population.archs)
        population.advance(first_wins(losses[pairs], excess[pairs]))
    return population


@recorded
@pytest.mark.parametrize("target", [None, 1e9])
def test_seed_7_ends_as_recorded_without_a_budget_and_with_one_that_binds_nothing(fixtures, target):
    constraints = () if target is None else (Constraint(toy_oracle(), target),)
    before, after = Population(UPPER, 20, seed=7), evolve(7, constraints)
    toy = fixtures["toy_seed7"]
    assert [before.diversity, after.diversity] == pytest.approx(toy["diversity"], abs=1e-4)
    for name, figure in (("best", np.min), ("mean", np.mean)):
        found = [float(figure(distances(p.vectors))) for p in (before, after)]
        assert found == pytest.approx(toy[name], abs=1e-4)
    assert after.vectors.sum() == pytest.approx(toy["final_population_sum"], abs=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_any_seed_converges(seed):
    before, after = Population(UPPER, 20, seed=seed), evolve(seed)
    assert distances(after.vectors).mean() < 0.2 * distances(before.vectors).mean()
    assert after.diversity < 0.3 * before.diversity


# ---- constraint domination ------------------------------------------------------------------------------------------


def test_all_nine_cases_of_feasible_infeasible_and_equal():
    """Losses lower, equal, higher against: both keep the budget, one does, none does."""
    for a, b in product((1.0, 2.0), repeat=2):
        for over_a, over_b in product((0.0, 0.1, 0.3), repeat=2):
            if over_a == over_b:
                want = a <= b  # at a tie the first
            elif 0.0 in (over_a, over_b):
                want = over_a == 0.0
            else:
                want = over_a < over_b
            assert bool(first_wins(np.array([a, b]), np.array([over_a, over_b]))) is want, (a, b, over_a, over_b)


def test_a_loss_that_is_no_number_is_the_worst():
    zero = np.zeros(2)
    assert not first_wins(np.array([np.nan, 5.0]), zero)
    assert first_wins(np.array([5.0, np.nan]), zero)
    assert first_wins(np.array([np.nan, np.inf]), zero), "two of them: the first"
    assert order(np.array([np.nan, 2.0, 1.0, 0.0]), np.array([0, 0, 0, 0.1])).tolist() == [2, 1, 0, 3]


def test_violations_are_shares_of_the_budgets_added_up():
    oracle = toy_oracle()
    archs = np.array([arch_of(GENOTYPES["relativenas"]), (0, 2) * 16])  # 43 and 0
    assert oracle.latencies(archs).tolist() == [43, 0]
    assert violations((), archs).tolist() == [0, 0]
    one, two = Constraint(oracle, 40.0), Constraint(oracle, 21.5)
    assert violations((one,), archs) == pytest.approx([3 / 40, 0])
    assert violations((one, two), archs) == pytest.approx([3 / 40 + 1, 0])
    assert violations((Constraint(oracle, 43.0),), archs).tolist() == [0, 0]


@pytest.mark.parametrize("seed", [7, 0, 1, 2, 3])
def test_a_population_moves_into_its_budget(seed):
    constraint = Constraint(toy_oracle(), 30.0)
    before, after = Population(UPPER, 20, seed=seed), evolve(seed, (constraint,))
    shares = [float((violations((constraint,), p.archs) == 0).mean()) for p in (before, after)]
    assert shares[0] <= 0.2
    assert shares[1] >= 0.7
    chosen = order(distances(after.vectors), violations((constraint,), after.archs))[0]
    assert constraint.satisfied(after.archs[[chosen]]).all()


def test_mending_reaches_the_budget_by_single_changes():
    oracle = toy_oracle()
    arch = arch_of(GENOTYPES["relativenas"])
    mended = mend(SPACE, (Constraint(oracle, 39.0),), arch)
    assert oracle.latency(mended) <= 39
    assert sum(a != b for a, b in zip(arch, mended, strict=True)) == 1, "a single operation saves 4 or more"
    assert mend(SPACE, (Constraint(oracle, 43.0),), arch) == arch


def test_a_mended_population_keeps_the_budget_and_little_else_changes():
    constraint = Constraint(toy_oracle(), 30.0)
    population, uniform = (Population(UPPER, 20, seed=0) for _ in range(2))
    population.mend(SPACE, (constraint,))
    assert constraint.satisfied(population.archs).all()
    kept = constraint.satisfied(uniform.archs)
    assert np.array_equal(population.vectors[kept], uniform.vectors[kept])
    changed = population.archs != uniform.archs
    assert np.array_equal(population.vectors[~changed], uniform.vectors[~changed])
    assert population.diversity > 0.8 * uniform.diversity
    unbound = Population(UPPER, 20, seed=0)
    unbound.mend(SPACE, ())
    assert np.array_equal(unbound.vectors, uniform.vectors)


# ---- with any evaluator ---------------------------------------------------------------------------------------------


def test_exploring_another_space_finds_its_optimum_within_its_budgets():
    space = NASBench201Space(num_cells=1, channels=4, resolution=8)
    oracle = FactorOracle.counting(space, "macs")
    asked = []

    def loss(arch):
        asked.append(arch)
        return float(np.abs(np.array(arch) - 3).sum())  # best: all 3x3 convolutions

    visits = explore(space, loss, size=20, generations=200, seed=0)
    assert best(visits).arch == (3,) * 6
    assert len(set(asked)) == len(asked) == len(visits), "each once"
    limit = 0.5 * oracle.latency((3,) * 6)
    held = (Constraint(oracle, limit),)
    found = best(explore(space, loss, held, size=20, generations=200, seed=0))
    assert oracle.latency(found.arch) <= limit
    everything = np.array(list(product(range(5), repeat=6)))
    kept = everything[oracle.latencies(everything) <= limit]
    assert found.loss <= np.abs(kept - 3).sum(1).min() + 1


def noted(renewal, loss):
    """`loss`, which the renewal is told of."""

    def ask(arch):
        renewal.note(arch, loss(arch))
        return loss(arch)

    return ask


def test_climbing_ends_where_no_promising_change_within_the_budget_is_better(monkeypatch):
    monkeypatch.setattr(slow_fast, "TRIED", 1000)
    space = NASBench201Space(num_cells=1, channels=4, resolution=8)
    oracle = FactorOracle.counting(space, "macs")
    rng = np.random.default_rng(0)
    worth = {space.canonical(arch): rng.random() for arch in product(range(5), repeat=6)}
    held = (Constraint(oracle, 0.5 * oracle.latency((3,) * 6)),)
    renewal = Renewal(space, held)
    ask = noted(renewal, lambda arch: worth[space.canonical(arch)])
    start = max((arch for arch in worth if oracle.latency(arch) <= held[0].target), key=worth.__getitem__)
    before = ask(start)
    top = renewal.climb(start, ask)
    near = np.array([[*top[:d], option, *top[d + 1 :]] for d in range(6) for option in range(5)])
    kept = near[violations(held, near) == 0]
    assert violations(held, np.array([top])) == [0]
    assert worth[top] < before
    assert worth[top] == min(worth[space.canonical(tuple(arch))] for arch in kept.tolist())


def test_climbing_asks_for_the_most_promising_changes_first():
    """Losses that add up, of which a hundred networks tell: the first change asked for is as good as there is."""
    space = NASBench201Space(num_cells=1, channels=4, resolution=8)
    worth = np.random.default_rng(0).random((6, 5))
    renewal, asked = Renewal(space, ()), []

    def loss(arch):
        asked.append(arch)
        return float(sum(worth[d, option] for d, option in enumerate(space.canonical(arch))))

    ask = noted(renewal, loss)
    for arch in np.random.default_rng(1).integers(5, size=(100, 6)).tolist():
        ask(tuple(arch))
    start = sorted(renewal.known, key=renewal.known.__getitem__)[50]
    asked.clear()
    renewal.climb(start, ask)
    near = {(*start[:d], option, *start[d + 1 :]) for d in range(6) for option in range(5)}
    losses = sorted(loss(arch) for arch in near if space.canonical(arch) not in renewal.known or arch == asked[0])
    assert loss(asked[0]) <= losses[len(losses) // 4]
    assert loss(asked[0]) < renewal.known[start]


def test_a_population_that_agrees_is_renewed_around_the_best_and_forgets_it_after_failures(monkeypatch):
    monkeypatch.setattr(slow_fast, "promising", lambda known, candidates, figures: list(range(len(candidates))))
    space = NASBench201Space(num_cells=1, channels=4, resolution=8)
    renewal, population = Renewal(space, ()), Population(upper_bounds(space), 40, seed=0)
    population.vectors[:] = 3.5
    ask = noted(renewal, lambda arch: 7.0)

    def agree() -> None:
        renewal.note((3,) * 6, 7.0)
        renewal.advance(population, ask)

    agree()
    assert (population.archs == 3).all(), "its first networks are new"
    agree()
    assert renewal.champion == (3,) * 6
    near = (population.archs == 3).mean()
    assert near > 0.5, "the first half of what was drawn"
    assert not population.velocities.any()
    assert not {space.canonical(tuple(arch)) for arch in population.archs.tolist()} & set(renewal.known)
    for _ in range(IN_VAIN + 1):
        population.vectors[:] = 3.5
        agree()
        agree()
    assert renewal.champion is None
    assert (population.archs == 3).mean() < near - 0.2, "uniform again"


def test_a_population_is_renewed_once_a_generation_brings_nothing_better():
    space = NASBench201Space(num_cells=1, channels=4, resolution=8)
    renewal, population = Renewal(space, ()), Population(upper_bounds(space), 4, seed=0)
    generations = iter([(3.0, True), (2.0, True), (2.0, False), (9.0, True), (9.5, False)])
    for i, (value, stays) in enumerate(generations):
        population.vectors = population.vectors.copy()
        renewal.note(space.canonical((3, 3, 3, 3, 3, i % 5)), value)
        before = population.vectors
        renewal.advance(population, noted(renewal, lambda arch: 100.0))
        assert (population.vectors is before) == stays, i


def test_a_population_that_keeps_no_budget_is_let_move_until_it_agrees():
    space = NASBench201Space(num_cells=1, channels=4, resolution=8)
    renewal, population = Renewal(space, ()), Population(upper_bounds(space), 4, seed=0)
    for _ in range(5):
        population.vectors = population.draw(4)
        before = population.vectors
        renewal.advance(population, noted(renewal, lambda arch: 100.0))
        assert population.vectors is before
    renewal.advance(population, noted(renewal, lambda arch: 100.0))
    assert population.vectors is not before, "no network is new"


def test_renewal_keeps_the_budgets_and_ends_where_no_network_is_left():
    space = NASBench201Space(num_cells=1, channels=4, resolution=8)
    oracle = FactorOracle.counting(space, "macs")
    held = (Constraint(oracle, 0.5 * oracle.latency((3,) * 6)),)
    renewal, population = Renewal(space, held), Population(upper_bounds(space), 4, seed=0)
    ask = noted(renewal, lambda arch: float(sum(arch)))
    found = renewal.promising(population)
    assert (violations(held, decode(found)) == 0).all()
    for arch in np.ndindex((5,) * 6):
        if violations(held, np.array([arch])) == 0:
            ask(arch)
    assert renewal.promising(population).shape == (4, 6), "any, where all are known"
    best_of_all = min(renewal.known, key=renewal.known.__getitem__)
    assert renewal.climb(best_of_all, ask) == best_of_all


def test_renewal_goes_on_from_its_state():
    space = NASBench201Space(num_cells=1, channels=4, resolution=8)
    renewal = Renewal(space, ())
    renewal.known = {(2,) * 6: 0.5, (3,) * 6: 0.25}
    renewal.met, renewal.own = {(1,) * 6: None}, {(2,) * 6: None}
    renewal.champion, renewal.in_vain, renewal.own_best = (3,) * 6, 2, 0.5
    other = Renewal(space, ())
    other.known = dict(renewal.known)  # what was noted is kept elsewhere
    other.load_state_dict(json.loads(json.dumps(renewal.state_dict())))
    assert vars(other) == vars(renewal)


def test_renewed_populations_spend_every_look_up_and_find_more():
    """Worth without any order among networks that agree in four decisions: a population alone ends early."""
    space = NASBench201Space(num_cells=1, channels=4, resolution=8)
    worth = np.random.default_rng(0).random((5,) * 6) + np.indices((5,) * 6).sum(0) / 24

    def found(seed: int, renewal: bool) -> tuple[int, float]:
        visits = explore(
            space, lambda arch: float(worth[arch]), size=8, generations=500, max_visits=300, seed=seed, renewal=renewal
        )
        return len(visits), best(visits).loss

    alone, renewed = (np.array([found(seed, on) for seed in range(8)]) for on in (False, True))
    assert alone[:, 0].max() < 300
    assert (renewed[:, 0] == 300).all()
    assert np.median(renewed[:, 1]) < np.median(alone[:, 1])


def test_exploring_stops_at_its_number_of_evaluations():
    space = NASBench201Space(num_cells=1, channels=4, resolution=8)
    asked = []
    visits = explore(space, lambda arch: float(asked.append(arch) or sum(arch)), max_visits=30, seed=0)
    assert len(visits) == len(asked) == 30
    assert [v.generation for v in visits] == sorted(v.generation for v in visits)
    with pytest.raises(UsageError, match="nothing was evaluated"):
        best([])
