"""TF-NAS' widths and depths: figures on the published table, and scaling and derivation against independent answers."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from latbench.importers import plain_pickle
from latbench.oracle.base import Constraint, spread
from latbench.oracle.factors import Factor, FactorOracle
from latbench.oracle.lut import LutOracle
from latbench.provenance import Provenance
from latbench.spaces.mbconv import (
    NONE,
    OPERATION_NAMES,
    OPERATIONS,
    PUBLISHED,
    STAGES,
    SWISH,
    WIDEST,
    TFNASSpace,
)
from searchers.base import Problem
from searchers.testing import roofline_table
from searchers.tfnas_supernet import Choices
from searchers.tfnas_widths import Budgets, _kept, _likeliest, derive, fit, scale, settle, spare_steps

REFERENCE = Path(os.environ.get("LATBENCH_REFERENCE_DATA", ""))
PUBLISHED_TABLE = REFERENCE / "tfnas_latency_gpu.pkl"
needs_file = pytest.mark.skipif(
    not PUBLISHED_TABLE.is_file(), reason="needs tfnas_latency_gpu.pkl in the folder $LATBENCH_REFERENCE_DATA"
)


N_SITES, N_OPS = 18, 8


# ---- on the published table -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    """The published GPU table as an oracle, its entries placed by their keys; the importer has tests of its own."""
    space = TFNASSpace(batch=32, width_step=1)
    raw = plain_pickle.loads(PUBLISHED_TABLE.read_bytes(), str(PUBLISHED_TABLE))
    factors = [Factor("stem and head", (), np.array(raw["base"]))]
    for site in space.block_sites:
        act = "swish" if STAGES[site.stage].activation == SWISH else "relu"
        widths = space.decisions[site.scope[1]].options
        rows = [
            [
                raw[
                    f"MBInvertedResBlock_{site.side}_{site.in_channels}_{o.squeeze * site.in_channels}_"
                    f"{site.out_channels}_k{o.kernel_size}_s{site.stride}_{act}"
                ][width * o.max_expansion // WIDEST]
                for width in widths
            ]
            for o in OPERATIONS
        ]
        rows += [[0.0] * len(widths)] * (site.position > 0)
        factors.append(Factor(site.name, site.scope, np.array(rows)))
    return FactorOracle(space, tuple(factors), Provenance(device="titan_rtx", device_name="", backend=""))


@pytest.fixture(scope="module")
def golden():
    return json.loads((REFERENCE / "tfnas_golden.json").read_text())


def budgets_of(oracle, target):
    return Budgets.of(Problem((Constraint(oracle, target),), "digits", Path("unused")))


def initial(budgets):
    return budgets.widest * 3 // 4


def tfnas_a(budgets, *, widths):
    """The published operations, at their widths or at the initial ones."""
    pairs = [pair for stage in PUBLISHED["tfnas-a"] for pair in stage]
    chosen = initial(budgets)
    for i, (o, width) in enumerate(pairs):
        chosen[i, o] = width if widths else chosen[i, o]
    return tuple(o for o, _ in pairs), chosen


@needs_file
@pytest.mark.parametrize("case", range(8))
def test_published_elasticity(published, golden, case):
    want = golden["elasticity"][case]
    if want["device"] != "gpu":
        pytest.skip("its table, of a CPU, is not among the reference data")
    budgets = budgets_of(published, want["target_ms"])
    if "op_everywhere" in want:
        ops, widths = (OPERATION_NAMES.index(want["op_everywhere"]),) * N_SITES, initial(budgets)
    else:
        ops, widths = tfnas_a(budgets, widths=False)
    trace = scale(budgets, ops, widths, faithful=True)
    assert budgets.cost(ops, trace[-1])[0] == pytest.approx(want["final_ms"], rel=1e-12)
    assert [budgets.cost(ops, w)[0] for w in trace] == pytest.approx(want["trace_after_each_call"], abs=1e-4)
    if "final_widths" in want:
        assert [int(w[o]) for w, o in zip(trace[-1], ops, strict=True)] == want["final_widths"]


@needs_file
def test_the_published_network_is_its_own_answer(published):
    budgets = budgets_of(published, 18.0)
    ops, widths = tfnas_a(budgets, widths=True)
    assert budgets.cost(ops, widths)[0] == pytest.approx(17.999473, abs=1e-6)
    assert (scale(budgets, ops, widths, faithful=True)[-1] == widths).all()
    arch = budgets.arch(ops, widths)
    assert arch == published.space.published["tfnas-a"]
    network = published.space.network(arch)
    assert network.n_params == 8_757_527
    assert network.macs == 32 * 456_675_855  # and 456,747,736 by the released counter: tests/spaces/test_mbconv.py


@needs_file
def test_widening_may_reach_every_end(published):
    budgets = budgets_of(published, 15.0)
    ops = (0,) * N_SITES
    assert budgets.cost(ops, scale(budgets, ops, initial(budgets), faithful=True)[-1])[0] == pytest.approx(
        11.499363, abs=1e-6
    )
    assert budgets.cost(ops, scale(budgets, ops, initial(budgets))[-1])[0] == pytest.approx(11.517717, abs=1e-6)


@needs_file
@pytest.mark.parametrize(("full", "expected", "loss"), [(False, 10.806680, 0.02795547), (True, 14.803933, 0.00130712)])
def test_published_expectations_and_losses(published, full, expected, loss):
    budgets = budgets_of(published, 15.0)
    (settled,) = budgets.settled(initial(budgets))
    choices = Choices(budgets.space).double()
    if full:
        with torch.no_grad():
            choices.betas[[1, 4, 8, 12, 16, 17]] = 100.0
    k = max(len(decision.options) for decision in budgets.space.decisions)
    cost = settled.expected_latency(choices.probs(choices.alphas.exp(), k))
    assert float(cost.detach()) == pytest.approx(expected, abs=1e-6)
    assert 0.1 * abs(float(cost.detach()) / 15.0 - 1) == pytest.approx(loss, abs=1e-7)
    if not full:
        cost.backward()
        assert choices.betas.grad[:2].tolist() == pytest.approx([-0.381188, 0.381188], abs=1e-6)
        assert choices.betas.grad[5:9].tolist() == pytest.approx([-0.181829, -0.060610, 0.060610, 0.181829], abs=1e-6)


@needs_file
def test_published_sums_of_single_operations(published, golden):
    budgets = budgets_of(published, 15.0)
    for name, want in golden["gpu"]["full_depth_single_op"].items():
        ops = (OPERATION_NAMES.index(name),) * N_SITES
        for widths, key in ((budgets.narrowest, "min_width"), (initial(budgets), "init_width"),
                            (budgets.widest, "max_width")):  # fmt: skip
            assert budgets.cost(ops, widths)[0] == pytest.approx(want[key], rel=1e-12)


# ---- costs and scaling ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def roofline():
    return LutOracle.fit(roofline_table(TFNASSpace(width_multiplier=0.25, resolution=32, num_classes=10)))


def drawn(budgets, rng):
    """Operations with depths, and whole widths of all of them."""
    ops = rng.integers(0, N_OPS, N_SITES)
    for stage in range(6):
        (sites,) = np.nonzero(budgets.stages == stage)
        ops[sites[rng.integers(1, len(sites) + 1) :]] = NONE
    widths = rng.integers(budgets.narrowest, budgets.widest + 1)
    return tuple(ops.tolist()), widths


def test_a_width_between_two_options_is_their_expectation(roofline):
    budgets = budgets_of(roofline, 1.0)
    rng = np.random.default_rng(0)
    space = budgets.space
    k = max(len(decision.options) for decision in space.decisions)
    for _ in range(10):
        ops, widths = drawn(budgets, rng)
        probs = np.zeros((len(space.decisions), k))
        for site, o, row in zip(space.block_sites, ops, widths, strict=True):
            operation, width = site.scope
            probs[operation, o] = 1
            decision = space.decisions[width]
            option = decision.options[0] if o == NONE else row[o] * WIDEST / OPERATIONS[o].max_expansion
            probs[width, : len(decision.options)] = spread(decision, float(option))
        assert budgets.cost(ops, widths)[0] == pytest.approx(float(roofline.expected_latency(probs)), rel=1e-12)


def test_settled_oracles_know_the_widths(roofline):
    budgets = budgets_of(roofline, 1.0)
    rng = np.random.default_rng(1)
    ops, widths = drawn(budgets, rng)
    (settled,) = budgets.settled(widths)
    arch = [0] * (2 * N_SITES)
    arch[::2] = ops
    assert settled.latency(tuple(arch)) == pytest.approx(budgets.cost(ops, widths)[0], rel=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_scaling_ends_one_step_from_the_target(roofline, seed):
    """After it the network is within, and a step more of the last stage is not; or all are at an end."""
    rng = np.random.default_rng(seed)
    budgets = budgets_of(roofline, 1.0)
    ops, widths = drawn(budgets, rng)
    cost = budgets.cost(ops, widths)[0]
    budgets = replace(budgets, limits=np.array([cost * rng.uniform(0.8, 1.25)]))
    *_, found = [widths, *scale(budgets, ops, widths)]
    others = [(i, o) for i in range(N_SITES) for o in range(N_OPS) if ops[i] != o]
    assert all(found[at] == widths[at] for at in others), "what is not derived keeps its width"
    kept = [(i, o) for i, o in enumerate(ops) if o != NONE]
    if not budgets.within(budgets.cost(ops, found)):
        assert all(found[at] == budgets.narrowest[at] for at in kept)
        return
    once_more = found.copy()
    last = (17, ops[17])
    once_more[last] += 1
    assert found[last] == budgets.widest[last] or not budgets.within(budgets.cost(ops, once_more))
    settled = settle(budgets, ops, found)
    arch = budgets.arch(ops, settled)
    assert roofline.latency(arch) <= budgets.limits[0]
    assert spare_steps(budgets, ops, settled) < 1
    for at in kept:
        options = budgets.options[at[0]][at[1]]
        if settled[at] < options[-1]:
            wider = settled.copy()
            wider[at] = options[np.searchsorted(options, settled[at]) + 1]
            assert not budgets.within(budgets.cost(ops, wider))


def test_a_network_on_its_target_stays(roofline):
    budgets = budgets_of(roofline, 1.0)
    ops, widths = drawn(budgets, np.random.default_rng(5))
    assert scale(replace(budgets, limits=budgets.cost(ops, widths)), ops, widths) == []


def test_steps_are_multiples_of_the_narrowest(roofline):
    budgets = replace(budgets_of(roofline, 1.0), limits=np.array([1e9]))
    ops = (1,) * N_SITES
    widths = initial(budgets)
    nearly = budgets.cost(ops, widths)
    for shift in range(1, 4):
        wider = widths.copy()
        wider[:, 1] += shift * np.rint(widths[:, 1] / widths[:, 1].min()).astype(int)
        found = fit(replace(budgets, limits=budgets.cost(ops, wider)), ops, widths, 0, 1)
        assert (found == wider).all()
    assert (fit(replace(budgets, limits=nearly), ops, widths, 0, 1) == widths).all()


@pytest.mark.parametrize("seed", range(4))
def test_the_likeliest_is_derived_where_it_reaches_the_target(roofline, seed):
    budgets, log_alphas, log_betas = likelihoods(roofline, seed)
    free = likeliest(budgets, log_alphas, log_betas)
    least, most = (budgets.cost(free, widths)[0] for widths in (budgets.narrowest, budgets.widest))
    for limit in (least, 0.5 * (least + most), most):
        assert derive(replace(budgets, limits=np.array([limit])), log_alphas, log_betas) == free
    endless = replace(budgets, limits=np.array([1e9]))  # above all networks: nothing to reach
    assert derive(endless, log_alphas, log_betas) == free


@pytest.mark.parametrize(("seed", "share"), [(0, 0.5), (1, 0.9), (2, 1.1), (3, 1.5), (4, 2.0)])
def test_else_the_likeliest_that_reaches_it(roofline, seed, share):
    """Shares below 1 of the likeliest network's narrowest cost, else of its widest."""
    budgets, log_alphas, log_betas = likelihoods(roofline, seed)
    free = likeliest(budgets, log_alphas, log_betas)
    low = roofline.fastest()[1]
    least, most = (budgets.cost(free, widths)[0] for widths in (budgets.narrowest, budgets.widest))
    budgets = replace(budgets, limits=np.array([low + share * (least - low) if share < 1 else share * most]))
    found = derive(budgets, log_alphas, log_betas)
    assert found != free
    assert reaches(budgets, found)
    best = value(budgets, found, log_alphas, log_betas)
    for i in range(N_SITES):  # no single change is better, nor any drawn network
        for o in range(N_OPS):
            if found[i] != NONE:
                other = (*found[:i], o, *found[i + 1 :])
                assert not reaches(budgets, other) or value(budgets, other, log_alphas, log_betas) <= best + 1e-6
    rng = np.random.default_rng(seed)
    for _ in range(300):
        other, _ = drawn(budgets, rng)
        assert not reaches(budgets, other) or value(budgets, other, log_alphas, log_betas) <= best + 1e-6


@pytest.mark.parametrize("share", [0.05, 0.3, 0.8])
def test_two_exact_methods_agree(roofline, share):
    """The integer programme, and the shortest path under a budget where nothing must be used up."""
    budgets, log_alphas, log_betas = likelihoods(roofline, 7)
    free = likeliest(budgets, log_alphas, log_betas)
    low, least = roofline.fastest()[1], budgets.cost(free, budgets.narrowest)[0]
    budgets = replace(budgets, limits=np.array([low + share * (least - low)]))
    gains = log_alphas - log_alphas.max(axis=1, keepdims=True)
    score, found = _likeliest(budgets, gains, log_betas, 0)
    other = _kept(budgets, gains, log_betas)
    assert value(budgets, found, log_alphas, log_betas) == pytest.approx(score, abs=1e-9)
    if reaches(budgets, other):
        assert value(budgets, other, log_alphas, log_betas) == pytest.approx(score, abs=1e-5)
    else:
        assert value(budgets, other, log_alphas, log_betas) > score


def likelihoods(oracle, seed):
    rng = np.random.default_rng(seed)
    log_betas = np.concatenate([np.log(rng.dirichlet(np.ones(n))) for n in (2, 3, 4, 4, 4, 1)])
    return budgets_of(oracle, 1.0), np.log(rng.dirichlet(np.ones(N_OPS), N_SITES)), log_betas


def likeliest(budgets, log_alphas, log_betas):
    ops = []
    for i, row in enumerate(log_alphas):
        (sites,) = np.nonzero(budgets.stages == budgets.stages[i])
        ops.append(int(row.argmax()) if i - sites[0] <= log_betas[sites].argmax() else NONE)
    return tuple(ops)


def reaches(budgets, ops):
    low, high = (budgets.cost(ops, widths)[0] for widths in (budgets.narrowest, budgets.widest))
    return low <= budgets.limits[0] <= high


def value(budgets, ops, log_alphas, log_betas):
    """Log-probability, each block's less its likeliest's; absent blocks must be the last of their stage."""
    total = sum(row[o] - row.max() for o, row in zip(ops, log_alphas, strict=True) if o != NONE)
    for stage in range(6):
        (sites,) = np.nonzero(budgets.stages == stage)
        depth = sum(ops[i] != NONE for i in sites)
        assert all(ops[i] != NONE for i in sites[:depth])
        total += log_betas[sites[depth - 1]]
    return total
