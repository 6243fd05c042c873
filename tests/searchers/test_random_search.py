"""Random search: its laws as a searcher, and that it draws networks uniformly among those that keep the budget."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import chisquare
from toy_space import ToySpace, three_bits

from latbench.errors import InfeasibleTargetError, UsageError
from latbench.oracle.base import Constraint
from latbench.oracle.factors import FactorOracle
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.spaces.nasbench201 import NASBench201Space
from searchers import random_search
from searchers.base import Problem
from searchers.random_search import RandomSearch, draw
from searchers.testing import SearcherConformance, Watch

SMALL = MobileNetV1Space(resolution=8, min_width=0.1, max_width=0.25, levels=3, num_classes=10)
TOY = FactorOracle.counting(ToySpace(), "macs")
LARGE = FactorOracle.counting(MobileNetV1Space(resolution=8, levels=5, num_classes=10), "n_params")
N_TOY = 36
IMAGES = three_bits()


class TestConformance(SearcherConformance):
    searcher = RandomSearch(evaluations=5, epochs=1, batch_size=32)
    space = SMALL


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def toy_problem(out="unused", target=1e12, **more):
    return Problem((Constraint(TOY, target),), IMAGES, Path(out), **more)


def within(target):
    """The toy's networks that keep a budget."""
    return {arch for arch in product(range(3), range(3), range(4)) if TOY.latency(arch) <= target}


# ---- the search -----------------------------------------------------------------------------------------------------


def test_all_networks_are_tried_where_they_are_few(tmp_path):
    target = 0.5 * TOY.latency((2, 2, 3))
    watch = Watch()
    result = RandomSearch(evaluations=100, evaluator="synflow", epochs=1, batch_size=32).search(
        toy_problem(tmp_path, target), reporter=watch
    )
    tried = [tuple(map(int, row["arch"].split(","))) for row in result.history]
    assert len(tried) == len(set(tried))
    assert set(tried) == within(target)
    assert result.notes["evaluations"] == result.notes["feasible"] == len(tried) < N_TOY
    assert result.score == max(row["score"] for row in result.history) == result.history[-1]["score_best"]
    assert tried[[row["score"] for row in result.history].index(result.score)] == result.arch
    assert 0 <= result.notes["accuracy"] <= 1
    assert watch.steps > len(tried), "the network that was found is trained, whatever judged it"


def test_more_evaluations_go_on_from_those_made_before(tmp_path, monkeypatch):
    asked = []

    class Counted:
        def __init__(self, problem):
            pass

        def evaluate(self, arch):
            asked.append(arch)
            return float(sum(arch))

    monkeypatch.setattr(random_search, "open_evaluator", lambda text, problem, **_: Counted(problem))
    few = RandomSearch(evaluations=4, evaluator="synflow", epochs=1, batch_size=32)
    first = few.search(toy_problem(tmp_path))
    assert len(asked) == 4
    more = replace(few, evaluations=9).search(toy_problem(tmp_path))
    assert len(asked) == len(set(asked)) == 9
    assert [row["arch"] for row in more.history[:4]] == [row["arch"] for row in first.history]
    assert more.score >= first.score


def test_a_table_of_accuracies_decides(tmp_path):
    archs = [",".join(map(str, arch)) for arch in product(range(3), range(3), range(4))]
    values = np.linspace(0.1, 0.9, N_TOY)
    pq.write_table(pa.table({"arch": archs, "accuracy": values}), tmp_path / "table.parquet")
    searcher = RandomSearch(evaluations=36, evaluator=f"table:{tmp_path}/table.parquet", epochs=1, batch_size=32)
    result = searcher.search(toy_problem(tmp_path / "out"))
    assert result.arch == (2, 2, 3)
    assert result.score == pytest.approx(0.9)


def test_another_evaluators_answers_are_not_taken(tmp_path):
    quick = {"evaluations": 2, "epochs": 1, "batch_size": 32}
    RandomSearch(evaluator="synflow", **quick).search(toy_problem(tmp_path))
    with pytest.raises(UsageError, match=r"other settings .*evaluator: synflow / naswot"):
        RandomSearch(evaluator="naswot", **quick).search(toy_problem(tmp_path))


@pytest.mark.parametrize(
    "wrong", [{"evaluations": 0}, {"lr": 0.0}, {"epochs": 0}, {"batch_size": 0}, {"held_out": 1.0}]
)
def test_options_out_of_range(wrong):
    with pytest.raises(UsageError, match=r"at least 1|>= 1|between 0 and 1"):
        RandomSearch(**wrong)


# ---- drawing --------------------------------------------------------------------------------------------------------


def test_every_network_that_fits_is_equally_likely_where_all_are_listed():
    target = 0.5 * TOY.latency((2, 2, 3))
    problem = toy_problem(target=target)
    firsts = Counter(draw(problem, 1, np.random.default_rng(i)).archs[0] for i in range(1000))
    assert set(firsts) == within(target)
    assert chisquare(list(firsts.values())).pvalue > 1e-3


def test_every_network_that_fits_is_equally_likely_by_rejection(monkeypatch):
    monkeypatch.setattr(random_search, "ENUMERABLE", 0)
    target = 0.5 * TOY.latency((2, 2, 3))
    problem, firsts = toy_problem(target=target), Counter()
    for i in range(1000):
        drawn = draw(problem, 1, np.random.default_rng(i))
        firsts.update(drawn.archs)
        assert drawn.notes["sampling"] == "rejection"
    assert set(firsts) == within(target)
    assert chisquare(list(firsts.values())).pvalue > 1e-3


def test_a_walk_ends_everywhere_equally_often(monkeypatch):
    monkeypatch.setattr(random_search, "ENUMERABLE", 0)
    monkeypatch.setattr(random_search, "CHAINS", 1)
    target = 0.5 * TOY.latency((2, 2, 3))
    problem, ends = toy_problem(target=target), Counter()
    for i in range(500):
        found = {}
        random_search.walk(problem, 1, np.random.default_rng(i), found)
        ends.update(list(found))
    assert set(ends) == within(target)
    assert chisquare(list(ends.values())).pvalue > 1e-3


def test_networks_and_not_spellings_are_drawn():
    space = NASBench201Space(num_classes=10)
    oracle = FactorOracle.counting(space, "macs")
    problem = Problem((Constraint(oracle, oracle.latency((3, 0, 0, 3, 0, 0))),), "digits", Path("unused"))
    drawn = draw(problem, 10**6, np.random.default_rng(0))
    assert len(set(drawn.archs)) == len(drawn.archs) == drawn.notes["feasible"]
    assert all(space.canonical(arch) == arch for arch in drawn.archs)
    assert all(oracle.latency(arch) <= problem.targets[0] for arch in drawn.archs)


def test_what_hardly_anything_keeps_is_found_by_walking():
    """Within 0.1 % of the range above the smallest network: about one in 10^8."""
    low = LARGE.fastest()[1]
    high = LARGE.latency(tuple(len(d.options) - 1 for d in LARGE.space.decisions))
    problem = Problem((Constraint(LARGE, low + 0.001 * (high - low)),), "digits", Path("unused"))
    drawn = draw(problem, 20, np.random.default_rng(0))
    assert drawn.notes["sampling"] == "walk"
    assert len(set(drawn.archs)) == 20
    assert all(problem.satisfied(arch) for arch in drawn.archs)


def test_draws_depend_on_the_seed_alone():
    problem = Problem((Constraint(LARGE, 3 * LARGE.fastest()[1]),), "digits", Path("unused"))
    one, same, other = (draw(problem, 8, np.random.default_rng(seed)).archs for seed in (0, 0, 1))
    assert one == same != other


def test_budgets_that_only_together_cannot_be_kept(tmp_path):
    """Each of them allows some networks, and no network keeps both."""

    def only(arch_index):
        values = np.full((3, 3, 4), 9.0)
        values[arch_index] = 1.0
        factor = replace(TOY.factors[0], scope=(0, 1, 2), values=values)
        return FactorOracle(TOY.space, (factor,), TOY.provenance)

    problem = Problem((Constraint(only((0, 0, 0)), 2.0), Constraint(only((2, 2, 3)), 2.0)), IMAGES, tmp_path / "out")
    with pytest.raises(
        InfeasibleTargetError, match=r"no toy network was found .* at 1 ms of 2, 9 ms of 2; raise a target"
    ):
        RandomSearch(evaluations=2, epochs=1, batch_size=32).search(problem)
    assert not (tmp_path / "out").exists()
