"""AOWS: its laws as a searcher, its schedule, and a task whose answer is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_space import ToySpace, three_bits

from latbench.errors import InfeasibleTargetError, UsageError
from latbench.oracle.base import Constraint
from latbench.oracle.conformal import Conformal
from latbench.oracle.factors import FactorOracle
from latbench.oracle.lut import LutOracle
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from searchers.aows import AOWS, entropy
from searchers.base import Problem
from searchers.testing import SearcherConformance, Watch, roofline_table

SMALL = MobileNetV1Space(resolution=8, min_width=0.1, max_width=0.25, levels=3, num_classes=10)


class TestOWS(SearcherConformance):
    searcher = AOWS(epochs=2, batch_size=32, adaptive=False)
    space = SMALL


@pytest.mark.slow
class TestAOWS(SearcherConformance):
    searcher = AOWS(epochs=11, batch_size=96, warmup_epochs=2, sampler="ffbs")
    space = SMALL
    interrupt_after = 5


@pytest.mark.parametrize(
    ("epoch", "temperature"),
    [(5.0, 1), (5.5, 0.1), (6, 0.01), (8, 0.003162), (10, 0.001), (15, 0.000707), (20, 0.0005)],
)
def test_temperatures(epoch, temperature):
    assert AOWS().temperature(epoch) == pytest.approx(temperature, abs=1e-6)


@pytest.mark.parametrize("wrong", [{"epochs": 10}, {"warmup_epochs": 9}])
def test_schedules_that_their_knots_do_not_allow(wrong):
    with pytest.raises(UsageError, match="temperatures need 11 epochs and a warm-up below 9"):
        AOWS(**wrong)
    AOWS(adaptive=False, **wrong)


def test_options_that_contradict_each_other():
    with pytest.raises(UsageError, match="estimator=additive"):
        AOWS(sampler="ffbs", estimator="means")
    with pytest.raises(UsageError, match="at least 1"):
        AOWS(window=0)


TOY = FactorOracle.counting(ToySpace(), "macs")
WIDEST = (2, 2, 3)


def toy_problem(out, share, **more):
    return Problem((Constraint(TOY, share * TOY.latency(WIDEST)),), three_bits(), out, **more)


@pytest.fixture(scope="module")
def ows(tmp_path_factory):
    """OWS on the toy at 60 % of the widest network."""
    torch.set_num_threads(1)
    searcher = AOWS(epochs=12, batch_size=32, adaptive=False, lr=0.4)
    out = tmp_path_factory.mktemp("ows")
    return searcher, out, searcher.search(toy_problem(out, 0.6))


def test_the_layer_with_useless_channels_is_shrunk_first(ows):
    _, _, result = ows
    assert result.arch[:2] == WIDEST[:2]
    assert result.arch[2] < WIDEST[2]
    assert result.predicted[0] <= result.target[0]


def test_another_target_is_answered_without_training(ows):
    searcher, out, result = ows
    watch = Watch()
    other = searcher.search(toy_problem(out, 0.25), reporter=watch)
    assert watch.steps == 0
    assert other.arch != result.arch
    assert other.predicted[0] <= other.target[0] < result.target[0]
    assert other.score < result.score


def test_adaptive_sampling_settles(tmp_path):
    torch.set_num_threads(1)
    searcher = AOWS(epochs=12, batch_size=32, warmup_epochs=3, lr=0.4)
    result = searcher.search(toy_problem(tmp_path, 0.6))
    entropies = [row["entropy"] for row in result.history]
    assert entropies[:3] == [entropies[0]] * 3, "uniform while it warms up"
    assert entropies[-1] < 0.5 * entropies[0]
    assert all("temperature" in row for row in result.history[3:])
    assert result.predicted[0] <= result.target[0]
    other = searcher.search(toy_problem(tmp_path, 0.55), reporter=(watch := Watch()))
    assert watch.steps == 0
    assert other.predicted[0] <= other.target[0]


def test_entropy_is_in_nats():
    assert entropy(np.array([[0.5, 0.5], [1.0, 0.0]])) == pytest.approx(np.log(2) / 2)


def test_a_confidence_lowers_the_budget(tmp_path):
    oracle = LutOracle.fit(roofline_table(SMALL))
    sure = replace(oracle, calibration=Conformal(tuple(np.linspace(0.01, 0.1, 100))))
    target = 1.1 * oracle.fastest()[1]
    plain = Problem((Constraint(oracle, target),), "digits", tmp_path)
    problem = Problem((Constraint(sure, target, 0.95),), "digits", tmp_path)
    (budget,) = problem.budgets()
    assert budget < plain.budgets()[0] == target
    arch, ms = oracle.fastest()
    assert problem.satisfied(arch) == (ms <= budget)
    tight = Problem((Constraint(sure, 1.01 * ms, 0.95),), "digits", tmp_path)
    with pytest.raises(InfeasibleTargetError, match=r"with confidence 0\.95: the fastest is"):
        AOWS(adaptive=False).search(tight)


def test_budgets_that_exclude_each_other_end_at_once(tmp_path):
    oracle = LutOracle.fit(roofline_table(SMALL))
    odd = replace(oracle, factors=tuple(replace(f, values=1.0 - f.values) for f in oracle.factors))
    both = (Constraint(oracle, 1.001 * oracle.fastest()[1]), Constraint(odd, 1.001 * odd.fastest()[1]))
    with pytest.raises(InfeasibleTargetError, match="not all of them together"):
        AOWS(adaptive=False).search(Problem(both, "digits", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_is_no_problem_is_refused(tmp_path):
    oracle = LutOracle.fit(roofline_table(SMALL))
    other = FactorOracle.counting(MobileNetV1Space(resolution=8, levels=2, num_classes=10), "macs")
    with pytest.raises(UsageError, match="at least one constraint"):
        Problem((), "digits", tmp_path)
    with pytest.raises(UsageError, match="different networks"):
        Problem((Constraint(oracle, 1.0), Constraint(other, 1e9)), "digits", tmp_path)
    with pytest.raises(UsageError, match="max_images"):
        Problem((Constraint(oracle, 1.0),), "digits", tmp_path, max_images=0)
    problem = Problem((Constraint(oracle, 1.0),), "digits", tmp_path, max_images=160)
    with pytest.raises(UsageError, match="loss is no longer finite"):
        AOWS(epochs=1, batch_size=32, adaptive=False, lr=1e30).search(problem)
