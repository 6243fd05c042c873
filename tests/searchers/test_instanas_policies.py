"""Loads, windows and prices of InstaNAS's policies, against sums by hand and every subset tried."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from latbench.oracle.base import Constraint
from latbench.oracle.factors import Factor, FactorOracle
from latbench.oracle.lut import LutOracle
from latbench.spaces.instanas import InstaNASSpace
from searchers.base import Problem
from searchers.instanas_controller import instance_latency, policies_of, subsets_of
from searchers.instanas_policies import OPEN, Costs
from searchers.testing import roofline_table

SMALL = InstaNASSpace(plan="8x1,12x2s2,16x1s2", stem_channels=8, head_channels=32, resolution=8)
N_LAYERS = 4


@pytest.fixture(scope="module")
def oracle():
    return LutOracle.fit(roofline_table(SMALL))


def between(oracle, share):
    low, high = oracle.fastest()[1], oracle.latency(SMALL.published["meta-graph"])
    return low + share * (high - low)


def problem_of(out, *constraints):
    return Problem(tuple(Constraint(*pair) for pair in constraints), "digits", out)


# ---- loads and windows ----------------------------------------------------------------------------------------------


def test_a_load_is_the_share_of_what_layers_may_use(oracle, tmp_path):
    target = between(oracle, 0.5)
    costs = Costs.of(problem_of(tmp_path, (oracle, target)))
    constant = oracle.chain().constant
    policies = policies_of(torch.randint(32, (20, N_LAYERS), generator=torch.Generator().manual_seed(0)))
    want = (instance_latency(oracle, policies) - constant) / (target - constant)
    assert torch.allclose(costs.load(policies), want)
    assert costs.load_of(31) == pytest.approx((oracle.latency((31,) * N_LAYERS) - constant) / (target - constant))
    scaled = [replace(f, values=1000 * f.values) for f in oracle.factors]
    twin = Costs.of(problem_of(tmp_path, (replace(oracle, factors=tuple(scaled)), 1000 * target)))
    assert torch.allclose(twin.load(policies), want), "any unit"


def test_of_two_budgets_the_fuller_one_counts(oracle, tmp_path):
    params = FactorOracle.counting(SMALL, "n_params")
    pairs = (oracle, between(oracle, 0.3)), (params, between(params, 0.3))
    both = Costs.of(problem_of(tmp_path, *pairs))
    each = [Costs.of(problem_of(tmp_path, pair)) for pair in pairs]
    policies = policies_of(torch.randint(32, (20, N_LAYERS), generator=torch.Generator().manual_seed(1)))
    loads = torch.stack([one.load(policies) for one in each])
    assert torch.allclose(both.load(policies), loads.amax(0))
    assert 0 < int(loads.argmax(0).sum()) < 20, "either is the fuller one somewhere"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_the_window_ends_with_its_middle_before_the_target(oracle, tmp_path, share):
    costs = Costs.of(problem_of(tmp_path, (oracle, between(oracle, share))))
    windows = costs.windows(20, kind="target", start=0.7, end=0.5, aim=0.9, rest=0.25)
    fastest = costs.load_of(oracle.fastest()[0])
    assert len(windows) == 21
    assert len({window.lower for window in windows}) == 1
    assert windows[0].lower == pytest.approx(fastest)
    if share:
        assert windows[-1].middle == pytest.approx(fastest + 0.9 * (1 - fastest))
    else:
        assert windows[-1].upper - windows[-1].lower == pytest.approx(1e-3 * costs.load_of(1))
    uppers = [window.upper for window in windows]
    assert uppers == sorted(uppers, reverse=True)
    assert uppers[15:] == pytest.approx([uppers[-1]] * 6), "it rests"
    assert uppers[0] == pytest.approx(max(0.7 * costs.load_of(31), uppers[-1]))


def test_a_target_above_everything_aims_at_everything(oracle, tmp_path):
    costs = Costs.of(problem_of(tmp_path, (oracle, 100 * between(oracle, 1.0))))
    window = costs.windows(5, kind="target", start=0.7, end=0.5, aim=0.9, rest=0.0)[-1]
    assert window.middle == pytest.approx(costs.load_of(31))


def test_the_released_windows(oracle, tmp_path):
    costs = Costs.of(problem_of(tmp_path, (oracle, between(oracle, 0.5))))
    most, base, least = (costs.load_of(subset) for subset in (31, 1, 0))
    given = {"start": 0.7, "end": 0.5, "aim": 0.9, "rest": 0.2}
    paper, static = (costs.windows(4, kind=kind, **given) for kind in ("paper", "static"))
    half = 0.5 * (0.7 * most + 0.5 * base)
    wanted = [max(upper, least + 1e-3 * base) for upper in (0.7 * most, half, 0.5 * base)]
    assert [paper[e].upper for e in (0, 2, 4)] == pytest.approx(wanted)
    assert {(w.lower, w.upper) for w in static} == {(least, most)}


def test_sums_of_modules_are_the_papers(oracle, tmp_path):
    target = between(oracle, 0.5)
    costs = Costs.of(problem_of(tmp_path, (oracle, target)), modular=True)
    tau = np.array(oracle.chain().unary)[:, [1, 2, 4, 8, 16]]
    policies = policies_of(torch.randint(32, (20, N_LAYERS), generator=torch.Generator().manual_seed(2)))
    policies[0] = False
    bits = policies.numpy().astype(float)
    first = np.array([site.first for site in SMALL.layers])
    want = (bits * tau).sum((1, 2)) + (~policies.numpy().any(-1) & first) @ tau[:, 4]
    constant = oracle.chain().constant
    assert costs.load(policies).numpy() == pytest.approx(want / (target - constant), rel=1e-9)
    assert torch.allclose(costs.latencies(policies)[0], instance_latency(oracle, policies)), "budgets stay exact"


# ---- budgets in the mean --------------------------------------------------------------------------------------------


def certain(seed, n=40, share=0.6):
    """Probabilities of some images, near 0 or near 1."""
    rng = torch.Generator().manual_seed(seed)
    on = torch.rand(n, N_LAYERS, 5, generator=rng) < share
    return torch.where(on, 0.95, 0.05) + 0.04 * (torch.rand(n, N_LAYERS, 5, generator=rng) - 0.5)


def test_policies_that_keep_their_budget_have_no_price(oracle, tmp_path):
    costs, probs = Costs.of(problem_of(tmp_path, (oracle, between(oracle, 0.9)))), certain(0)
    prices = costs.settle(probs)
    assert not prices.any()
    assert torch.equal(costs.decode(probs, prices), probs >= 0.5)
    assert costs.decode(torch.full((1, N_LAYERS, 5), 0.5), prices).all(), "a tie is on"


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3])
def test_prices_bring_the_mean_to_its_budget_and_no_further(oracle, tmp_path, share):
    target = between(oracle, share)
    costs, probs = Costs.of(problem_of(tmp_path, (oracle, target))), certain(1)
    assert float(instance_latency(oracle, probs >= 0.5).mean()) > target
    prices = costs.settle(probs)
    policies = costs.decode(probs, prices)
    assert float(instance_latency(oracle, policies).mean()) <= target * (1 + 1e-12)
    if share:
        cheaper = costs.decode(probs, prices * 0.999)
        assert float(instance_latency(oracle, cheaper).mean()) > target
    assert oracle.latency(costs.representative(policies)) <= target


def test_a_price_is_weighed_against_each_subsets_probability(oracle, tmp_path):
    costs, probs = Costs.of(problem_of(tmp_path, (oracle, between(oracle, 0.3)))), certain(2, n=5).double()
    prices = costs.settle(certain(1))
    found = subsets_of(costs.decode(probs, prices))
    for image, row in zip(probs, found.tolist(), strict=True):
        for t, subset in enumerate(row):
            worth = [
                sum(np.log(p if s >> i & 1 else 1 - p) for i, p in enumerate(image[t].tolist())) - float(prices[t, s])
                for s in range(32)
            ]
            assert worth[subset] == pytest.approx(max(worth), abs=1e-9)


def test_a_fixed_subset_is_everybodys_and_the_rest_keeps_the_budget(oracle, tmp_path):
    target = between(oracle, 0.3)
    costs, probs = Costs.of(problem_of(tmp_path, (oracle, target))), certain(1)
    fixed = (OPEN, 5, OPEN, 2)
    found = subsets_of(costs.decode(probs, costs.settle(probs, fixed)))
    assert (found[:, [1, 3]] == torch.tensor([5, 2])).all()
    assert len(found[:, [0, 2]].unique(dim=0)) > 1, "images still differ elsewhere"
    assert float(instance_latency(oracle, policies_of(found)).mean()) <= target * (1 + 1e-12)
    assert torch.equal(costs.settle(probs, (OPEN,) * N_LAYERS), costs.settle(probs))
    alone = costs.settle(probs, (1, 0, 4, 8))
    assert subsets_of(costs.decode(probs, alone)).unique(dim=0).tolist() == [[1, 0, 4, 8]]


def test_what_is_fixed_must_leave_room(oracle, tmp_path):
    for fixed in ((OPEN,) * N_LAYERS, (31, OPEN, OPEN, OPEN), (31, 31, 31, OPEN), (31,) * 4):
        archs = np.array(list(product(*(range(32) if subset == OPEN else [subset] for subset in fixed[1:]))))
        first = range(1, 32) if fixed[0] == OPEN else [fixed[0]]
        least = min(oracle.latencies(np.column_stack([np.full(len(archs), s), archs])).min() for s in first)
        for share in (0.01, 0.4, 0.8):
            target = between(oracle, share)
            costs = Costs.of(problem_of(tmp_path, (oracle, target)))
            assert costs.affords(fixed) == (least <= target * (1 + 1e-12)), (fixed, share)


def test_two_budgets_are_kept_in_the_mean(oracle, tmp_path):
    params = FactorOracle.counting(SMALL, "n_params")
    problem = problem_of(tmp_path, (oracle, between(oracle, 0.2)), (params, between(params, 0.2)))
    costs, probs = Costs.of(problem), certain(3)
    policies = costs.decode(probs, costs.settle(probs))
    assert (costs.latencies(policies).mean(1) <= torch.tensor(problem.targets) * (1 + 1e-12)).all()
    assert problem.satisfied(costs.representative(policies))
    assert len(costs.census(policies)) > 1


def test_what_nothing_brings_together_becomes_one_network(oracle, tmp_path):
    """Two budgets that just one network keeps."""
    rng = np.random.default_rng(0)
    only = (3, 2, 8, 4)

    def against(row):
        values = [rng.uniform(1, 2, 32) for _ in range(N_LAYERS)]
        for t, subset in enumerate(only):
            values[t] = np.where(np.arange(32) % 2 == row, values[t], 0.2)
            values[t][subset] = 0.5
        factors = [Factor(site.name, site.scope, v) for site, v in zip(SMALL.layers, values, strict=True)]
        return FactorOracle(SMALL, tuple(factors), oracle.provenance)

    problem = problem_of(tmp_path, (against(0), 2.0), (against(1), 2.0))
    assert problem.satisfied(only)
    costs, probs = Costs.of(problem), certain(4)
    policies = costs.decode(probs, costs.settle(probs))
    assert costs.kept(policies)
    assert problem.satisfied(costs.representative(policies))


def test_what_is_told_of_policies(oracle, tmp_path):
    costs = Costs.of(problem_of(tmp_path, (oracle, between(oracle, 0.5))))
    archs = [(1, 0, 0, 1)] * 3 + [(0, 0, 0, 2)] * 2 + [(16, 0, 0, 2)] * 2 + [(31, 31, 31, 31)] * 3
    policies = policies_of(torch.tensor(archs))
    told = costs.told(policies)
    names = [entry["arch"] for entry in told["policies"]]
    assert names == ["16,16,0,2", "1,16,0,1", "31,31,31,31"], "two spellings of one network are one"
    assert [entry["share"] for entry in told["policies"]] == [0.4, 0.3, 0.3]
    latencies = oracle.latencies(np.array(archs))
    assert told["latency"][0]["mean"] == pytest.approx(latencies.mean())
    assert told["latency"][0]["quantiles"]["1"] == pytest.approx(latencies.max())
    assert told["n_policies"] == 3
    second, third = oracle.latency((1, 0, 0, 1)), oracle.latency((31,) * N_LAYERS)
    slow = policies_of(torch.tensor([(31,) * N_LAYERS] * 3 + [(1, 0, 0, 1)] * 2))
    tight = Costs.of(problem_of(tmp_path, (oracle, 0.5 * (second + third))))
    assert costs.census(slow)[0][0] == (31,) * N_LAYERS
    assert tight.representative(slow) == (1, 16, 0, 1), "the most frequent is too slow by itself"
