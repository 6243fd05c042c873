"""TF-NAS: its laws as a searcher, its schedules, its options and its command."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run

from latbench.errors import InfeasibleTargetError, UsageError
from latbench.oracle.base import Constraint
from latbench.oracle.factors import Factor, FactorOracle
from latbench.oracle.lut import LutOracle
from latbench.spaces.mbconv import (
    NONE,
    RELU,
    Stage,
    TFNASSpace,
)
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from searchers.base import Problem
from searchers.results import read_result
from searchers.testing import SearcherConformance, Watch, roofline_table
from searchers.tfnas import TFNAS, _Run
from searchers.tfnas_widths import Budgets
from searchers.train import Position
from searchers.world import World

REFERENCE = Path(os.environ.get("LATBENCH_REFERENCE_DATA", ""))
PUBLISHED_TABLE = REFERENCE / "tfnas_latency_gpu.pkl"
needs_file = pytest.mark.skipif(
    not PUBLISHED_TABLE.is_file(), reason="needs tfnas_latency_gpu.pkl in the folder $LATBENCH_REFERENCE_DATA"
)
SMALL = TFNASSpace(width_multiplier=0.125, resolution=32, width_step=16, num_classes=10)
QUICK = TFNAS(epochs=2, batch_size=32, warmup=0.5)
N_SITES, N_OPS = 18, 8


class TestConformance(SearcherConformance):
    searcher = TFNAS(epochs=3, batch_size=32, warmup=0.4)
    space = SMALL
    max_images = 130
    interrupt_after = 4  # of 9 steps, the first behind the warm-up


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


# ---- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epoch", "temperature"), [(0, 5), (10, 5), (11, 4.8), (50, 0.9768308), (89, 0.1987913)])
def test_published_temperatures(epoch, temperature):
    assert TFNAS(epochs=90).mixture_temperature(epoch) == pytest.approx(temperature, abs=1e-6)


@pytest.mark.parametrize(("epoch", "rate"), [(0, 0.025), (10, 0.0242462), (45, 0.0125), (89, 7.61e-6)])
def test_published_rates(epoch, rate):
    assert TFNAS(epochs=90).rate(Position(epoch, 3, 7, 90)) == pytest.approx(rate, rel=1e-3)
    assert TFNAS(epochs=90).n_warmup == 10


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 1}, {"epochs": 0}, {"epochs": 1, "warmup": 0.9}, {"lr": 0.0}, {"latency_weight": -1.0}]
)
def test_options_that_contradict_each_other(wrong):
    with pytest.raises(UsageError, match="tfnas:"):
        TFNAS(**wrong)


# ---- the search -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    return LutOracle.fit(roofline_table(SMALL))


def between(oracle, share):
    rng = np.random.default_rng(0)
    high = oracle.latencies(np.array([oracle.space.sample(rng) for _ in range(200)])).max()
    low = oracle.fastest()[1]
    return float(low + share * (high - low))


def problem_of(out, *constraints, max_images=130, **more):
    return Problem(tuple(Constraint(*pair) for pair in constraints), "digits", out, max_images=max_images, **more)


def test_probabilities_rest_in_the_warmup_and_move_every_second_step(small, tmp_path):
    problem = problem_of(tmp_path, (small, between(small, 0.4)), max_images=210)
    one = _Run(QUICK, problem, Budgets.of(problem), World.here("cpu"))
    steps = len(one.batches)
    assert steps == 5
    before, widths = copies(one), one.net.widths()
    batch = next(one.batches.epoch(0))
    one.step(batch, Position(0, 0, steps, 2))
    one.end_epoch(0)
    assert all(torch.equal(a, b) for a, b in zip(copies(one), before, strict=True))
    assert (one.net.widths() == widths).all()
    one.train(None)
    (first, _) = one.choice_update.optimizer.state.values()
    assert int(first["step"]) == 3, "steps 0, 2 and 4 of the second epoch"
    assert one.choices.alphas.detach().logsumexp(-1).numpy() == pytest.approx(0, abs=1e-6)
    assert not torch.equal(one.choices.alphas, before[0])


def copies(one):
    return [p.detach().clone() for p in one.choices.parameters()]


def test_faithful_optimisers_forget(small, tmp_path):
    problem = problem_of(tmp_path, (small, between(small, 0.4)))
    one = _Run(replace(QUICK, faithful=True), problem, Budgets.of(problem), World.here("cpu"))
    one.train(None)
    assert not one.weight_update.optimizer.state
    assert not one.choice_update.optimizer.state


def test_another_target_is_answered_without_training(small, tmp_path):
    first = QUICK.search(problem_of(tmp_path, (small, between(small, 0.4))))
    watch = Watch()
    target = 0.8 * between(small, 0.4)
    other = QUICK.search(problem_of(tmp_path, (small, target)), reporter=watch)
    assert watch.steps == 0
    assert other.arch != first.arch
    assert other.predicted[0] <= target < first.predicted[0]
    assert other.history == first.history


def test_the_command(small, tmp_path):
    roofline_table(SMALL).write(tmp_path / "t.parquet")
    target = between(small, 0.4)
    words = ["search", "tfnas", "--table", tmp_path / "t.parquet", "--target", f"{1000 * target:.4f}us",
             "--data", "digits", "--max-images", 130, "--epochs", 2, "--set", "warmup=0.5"]  # fmt: skip
    done = run(*words, "--max-params", "1M", "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["predicted"][0] <= target * 1.0001
    assert told["predicted"][1] <= 1e6
    found = read_result(tmp_path / "out")
    assert list(found.result.arch) == told["arch"]
    assert found.settings["epochs"] == 2


def test_two_devices(small, tmp_path):
    """One whose later stages are dear, one whose earlier ones are."""
    skewed = [
        replace(small, factors=tuple(replace(f, values=f.values * w) for f, w in zip(small.factors, ws, strict=True)))
        for ws in (np.geomspace(0.5, 2, 20), np.geomspace(2, 0.5, 20))
    ]
    problem = problem_of(tmp_path, *((oracle, between(oracle, 0.3)) for oracle in skewed))
    result = QUICK.search(problem)
    assert problem.satisfied(result.arch)
    assert result.predicted == tuple(oracle.latency(result.arch) for oracle in skewed)
    assert result.notes["spare_steps"] < 1
    assert {"predicted0", "predicted1"} <= set(result.history[-1])


def test_budgets_that_exclude_each_other_end_at_once(small, tmp_path):
    both = []
    for parity in (0, 1):  # one cannot afford even operations, one cannot afford odd ones
        dear = np.where(np.arange(N_OPS + 1) % 2 == parity, 1.0, 0.01)
        dear[NONE] = 0.0
        factors = [
            Factor(f.site, f.scope, f.values * 0 + dear[: len(f.values), None]) for f in small.factors if f.scope
        ]
        both.append((replace(small, factors=tuple(factors)), 1.0))
    for one in both:
        Budgets.of(problem_of(tmp_path, one))
        assert one[0].fastest()[1] < 1
    with pytest.raises(InfeasibleTargetError, match="not all of them together"):
        QUICK.search(problem_of(tmp_path / "out", *both))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_searched_is_refused(small, tmp_path):
    other = FactorOracle.counting(MobileNetV1Space(resolution=32), "macs")
    with pytest.raises(UsageError, match="searches the space tfnas, not mobilenet_v1"):
        QUICK.search(problem_of(tmp_path, (other, 1e9)))
    tangled = replace(small, factors=(*small.factors, Factor("between", (1, 2), np.ones((3, 9)))))
    assert len(small.space.decisions[1].options) == 3
    with pytest.raises(UsageError, match=r"sums over blocks"):
        QUICK.search(problem_of(tmp_path, (tangled, 1e9)))

    class Opaque:
        space, unit = small.space, "ms"

    with pytest.raises(UsageError, match="not Opaque"):
        QUICK.search(problem_of(tmp_path, (Opaque(), 1.0)))
    diverging = problem_of(tmp_path, (small, between(small, 0.4)))
    with pytest.raises(UsageError, match="loss is no longer finite"):
        replace(QUICK, lr=1e30).search(diverging)


@dataclass(frozen=True)
class TwoStages(TFNASSpace):
    """Four blocks: so few that digits teach all their operations in minutes."""

    stages = (Stage(64, 2, 2, RELU), Stage(96, 2, 1, RELU))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_digits_are_learned_at_the_target(tmp_path, seed):
    space = TwoStages(width_multiplier=0.25, resolution=32, num_classes=10)
    oracle = FactorOracle.counting(space, "macs")
    target = between(oracle, 0.5)
    problem = Problem((Constraint(oracle, target),), "digits", tmp_path, seed)
    result = TFNAS(epochs=15, lr=0.05, choice_lr=0.05).search(problem)
    assert problem.satisfied(result.arch)
    assert 0 < result.notes["spare_steps"] < 1
    assert all(row["predicted0"] <= target for row in result.history if "predicted0" in row)
    assert result.score > 0.8, "chance is 0.1"
