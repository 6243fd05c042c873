"""The mirror stimuli function against brute force, counts of published form and the margins of a prototype."""

from __future__ import annotations

import json
import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from latbench.errors import UsageError
from latbench.spaces.nsc import IRLASSpace
from searchers.mirror import Block, Features, train

SIX, TEN = IRLASSpace(max_index=6), IRLASSpace(max_index=10)
EXPERT = SIX.parse_arch("resnext")
CHAIN = "(1,1,3,0,0)(2,1,3,1,0)(3,1,3,2,0)(4,1,3,3,0)(5,7,0,0,0)"
FIXTURES = Path(os.environ.get("LATBENCH_REFERENCE_DATA", "")) / "spec_fixtures.json"


def blocks_of(max_index: int) -> list[Block]:
    space, features = IRLASSpace(max_index=max_index), Features(max_index)
    options = product(*(range(len(decision.options)) for decision in space.decisions))
    return sorted({features.cut(arch) for arch in options})


# ---- counts ---------------------------------------------------------------------------------------------------------


def test_counts_of_the_expert() -> None:
    features = Features(6, layout="fields")
    want = np.zeros(features.size)
    want[[0, 4, 6]] = 2.71, 0.729, 0.6561  # types convolution, add, terminal
    want[[7, 8]] = 1.81, 0.9  # kernels 1 and 3
    want[[10, 11, 12]] = 1.729, 0.9, 0.81  # first predecessors
    want[16 + 3] = 0.729  # second predecessor
    np.testing.assert_allclose(features.count(EXPERT), want, atol=1e-12)


def test_uniform_counts_are_those_of_rollouts() -> None:
    features = Features(6, layout="fields")
    expected = features.uniform()
    np.testing.assert_allclose(expected[:7], [1.2048, 0.8032, 0.8032, 0.4016, 0.3072, 0.3072, 0.6173], atol=1e-4)
    rng = np.random.default_rng(0)
    mean = np.mean([features.count(SIX.sample(rng)) for _ in range(20_000)], axis=0)
    assert np.abs(mean - expected).max() < 0.03


@pytest.mark.parametrize("layout", ["indexed", "fields"])
def test_uniform_counts_are_exact(layout: str) -> None:
    """Every block of a small space, each with the probability of its choices."""
    features = Features(4, layout=layout)
    sizes = [len(columns) for columns in features.columns]
    blocks = blocks_of(4)
    weight = np.array([np.prod([1 / n for n in sizes[: len(block)]]) for block in blocks])
    assert weight.sum() == pytest.approx(1)
    counts = np.array([features.count(block) for block in blocks])
    np.testing.assert_allclose(weight @ counts, features.uniform(), atol=1e-12)


def test_indexed_features_hold_a_copy_per_index() -> None:
    features = Features(10)
    assert features.size == 10 * (11 + 20)
    assert features.count(EXPERT).nonzero()[0].tolist() == sorted(
        31 * step + bit
        for step, bits in enumerate([(0, 11), (1, 12), (0, 13), (8, 11, 24), (10,)])  # kind, predecessors
        for bit in bits
    )


# ---- the planner ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["indexed", "fields"])
def test_the_planner_is_brute_force(layout: str) -> None:
    features, blocks = Features(4, layout=layout), blocks_of(4)
    counts = np.array([features.count(block) for block in blocks])
    rng = np.random.default_rng(1)
    for _ in range(20):
        weights = rng.standard_normal(features.size)
        worth = counts @ weights
        order = np.argsort(-worth)
        assert worth @ np.eye(len(blocks))[blocks.index(features.best(weights))] == pytest.approx(worth[order[0]])
        banned = [blocks[i] for i in order[:3]]
        assert features.best(weights, banned) not in banned
        assert features.count(features.best(weights, banned)) @ weights == pytest.approx(worth[order[3]])


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "margin", "published", "chain"), [(SIX, 0.325, 0.2347, 0.4182), (TEN, 0.319, 0.2366, 0.4195)]
)
def test_max_margin_makes_the_expert_the_one_best_block(space, margin, published, chain) -> None:
    features, expert = Features(space.max_index), space.parse_arch("resnext")
    found = train(features, [expert])
    low, high = found.margin
    assert low <= high
    assert low == pytest.approx(margin, abs=1e-3)
    assert high == pytest.approx(margin, abs=1e-3)
    assert features.best(found.weights) == features.cut(expert)
    assert np.linalg.norm(found.weights) == pytest.approx(1)
    assert found.score(expert) == pytest.approx(1)
    assert found.score(space.parse_arch("irlas-mobile")) == pytest.approx(published, abs=1e-3)
    assert found.score(space.parse_arch(CHAIN)) == pytest.approx(chain, abs=1e-3)


def test_the_margin_is_that_over_every_other_block() -> None:
    features = Features(4)
    expert = IRLASSpace(max_index=4).parse_arch("(1,1,3,0,0)(2,5,0,0,1)(3,7,0,0,0)")
    found = train(features, [expert], tolerance=1e-4)
    worth = {block: float(found.weights @ features.count(block)) for block in blocks_of(4)}
    best = worth.pop(features.cut(expert))
    assert best - max(worth.values()) == pytest.approx(found.margin[0])
    random = np.mean([found.score(IRLASSpace(max_index=4).sample(np.random.default_rng(i))) for i in range(4000)])
    assert random == pytest.approx(0, abs=0.05)


@pytest.mark.skipif(not FIXTURES.is_file(), reason="needs spec_fixtures.json in the folder $LATBENCH_REFERENCE_DATA")
@pytest.mark.parametrize("space", [SIX, TEN])
def test_figures_of_the_prototype(space: IRLASSpace) -> None:
    want = json.loads(FIXTURES.read_text())["irlas"]
    figures = want["indexed_maxmargin"][str(space.max_index)]
    found = train(Features(space.max_index, want["gamma"]), [space.parse_arch("resnext")])
    assert found.margin == pytest.approx((figures["margin_lower"], figures["margin_upper"]), abs=1e-6)
    assert found.scale == pytest.approx(figures["raw_scale"], abs=1e-6)
    lone = space.parse_arch("(1,1,1,0,0)(2,7,0,0,0)")
    assert found.score(lone) == pytest.approx(figures["F_conv1_only"], abs=1e-6)
    projected = train(
        Features(space.max_index, layout="fields"), [space.parse_arch("resnext")], method="projection"
    ).distances
    for iteration, distance in want["fields_projection_t"][f"T{space.max_index}"].items():
        assert projected[int(iteration) - 1] == pytest.approx(distance, rel=0.1)


def test_projection_on_fields_nears_the_expert_and_never_finds_it() -> None:
    features = Features(6, layout="fields")
    found = train(features, [EXPERT], method="projection")
    distances = np.array(found.distances)
    assert distances[0] == pytest.approx(2.317, abs=1e-3)
    assert (np.diff(distances) <= 1e-12).all()
    assert distances[999] < 0.1
    assert found.margin[0] <= 0
    assert features.best(found.weights) != features.cut(EXPERT)


def test_several_experts_count_by_their_mean() -> None:
    features = Features(10)
    experts = [TEN.parse_arch("resnext"), TEN.parse_arch("resnext-split")]
    found = train(features, experts)
    np.testing.assert_allclose(found.expert, np.mean([features.count(expert) for expert in experts], axis=0))
    assert np.mean([found.score(expert) for expert in experts]) == pytest.approx(1)
    assert features.best(found.weights, [features.cut(expert) for expert in experts]) not in map(features.cut, experts)


def test_a_bonus_adds_up_to_the_score() -> None:
    found = train(Features(10), [TEN.parse_arch("resnext")], tolerance=1e-2)
    bonus, rng = found.bonus(0.7), np.random.default_rng(2)
    for block in (found.features.cut(TEN.sample(rng)) for _ in range(200)):
        total = sum(part[option] for part, option in zip(bonus, block, strict=False))
        assert total == pytest.approx(0.7 * (found.weights @ found.features.count(block)) / found.scale, abs=1e-9)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Features(6, layout="bits"), "indexed or fields"),
        (lambda: Features(6, gamma=0.0), "gamma in"),
        (lambda: Features(1), "max_index at least 2"),
        (lambda: train(Features(6), []), "at least one expert"),
        (lambda: train(Features(6), [EXPERT], method="q"), "max_margin or projection"),
        (lambda: train(Features(2), [(i, 0) for i in range(8)]), "cannot tell the experts"),
        (lambda: Features(6).count((0, 0)), "has no terminal"),
    ],
)
def test_what_cannot_be_learned_is_refused(make, words) -> None:
    with pytest.raises(UsageError, match=words):
        make()
