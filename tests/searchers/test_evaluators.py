"""Evaluators: training that no order changes, texts that name them, a budget of look-ups that outlasts a process."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_space import ToySpace, three_bits

from latbench.errors import TableError, UsageError
from latbench.oracle.base import Constraint
from latbench.oracle.factors import FactorOracle
from latbench.spaces.nasbench201 import NASBench201Space
from searchers.base import Problem
from searchers.data import Splits, eval_batches
from searchers.derive import Recipe
from searchers.evaluators import CANDIDATES, HELD_OUT, BudgetSpentError, HeldOut, Lookups, Trained, open_evaluator
from searchers.proxies import NASWOT, SynFlow
from searchers.testing import InterruptedRunError, Watch
from searchers.train import evaluate
from searchers.world import World

CELLS = NASBench201Space()
RECIPE = Recipe(epochs=2, batch_size=32, lr=2.0, warmup_epochs=0.5, mixup=0.0)
WIDEST, NARROW = (2, 2, 3), (0, 0, 0)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def problem_of(out, space=None, **more):
    space = space or ToySpace()
    return Problem((Constraint(FactorOracle.counting(space, "macs"), 1e12),), three_bits(), out, **more)


# ---- training -------------------------------------------------------------------------------------------------------


def test_accuracy_does_not_depend_on_what_was_trained_before(tmp_path):
    one, other = Trained(problem_of(tmp_path / "one"), RECIPE), Trained(problem_of(tmp_path / "other"), RECIPE)
    forward = [one.evaluate(arch) for arch in (WIDEST, NARROW)]
    torch.rand(5)
    assert [other.evaluate(arch) for arch in (NARROW, WIDEST)] == forward[::-1]
    assert forward[0] > 0.5 > 1 / 8  # eight classes
    assert forward[0] > forward[1]


def test_accuracy_is_that_of_the_weights_on_the_held_out_images(tmp_path):
    problem = problem_of(tmp_path)
    trained = Trained(problem, RECIPE)
    module, accuracy = trained.train(WIDEST)
    splits = Splits.of(problem, 8)
    found = evaluate(module, eval_batches(problem, splits, World.here(), "held_out"), World.here())
    assert accuracy == found["accuracy"] == trained.evaluate(WIDEST)


def test_a_share_of_the_training_images_judges(tmp_path):
    problem = problem_of(tmp_path)
    half, fifth = (Trained(problem, RECIPE, share)._data for share in (0.5, HELD_OUT))
    n = len(Splits.of(problem, 8, held_out=0.0).train)
    assert len(half.labels("test")) == pytest.approx(n / 2, abs=8)
    assert len(fifth.labels("test")) == pytest.approx(n / 5, abs=8)
    assert Trained(problem, RECIPE, 0.5).evaluate(WIDEST) != Trained(problem, RECIPE).evaluate(WIDEST)


def test_candidates_leave_nothing_and_the_chosen_one_its_checkpoint(tmp_path):
    trained = Trained(problem_of(tmp_path), RECIPE)
    trained.evaluate(NARROW)
    assert not list((tmp_path / CANDIDATES).iterdir())
    trained.train(NARROW)
    watch = Watch()
    trained.train(NARROW, reporter=watch)
    assert watch.steps == 0


def test_a_candidate_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("searchers.train.SAVE_EVERY_S", 0.0)
    whole = Watch()
    accuracy = Trained(problem_of(tmp_path / "whole"), RECIPE).train(WIDEST, reporter=whole)[1]
    parts = Trained(problem_of(tmp_path / "parts"), RECIPE)
    with pytest.raises(InterruptedRunError):
        parts.train(WIDEST, reporter=Watch(5))
    rest = Watch()
    assert parts.train(WIDEST, reporter=rest)[1] == accuracy
    assert rest.steps < whole.steps


def test_images_held_out_are_not_trained_on(tmp_path):
    splits = Splits.of(problem_of(tmp_path), 8)
    part = HeldOut(splits)
    assert len(part.labels("train")) + len(part.labels("test")) == len(splits.source.labels("train"))
    assert not set(splits.train) & set(splits.held_out)
    assert (part.labels("test") == splits.source.labels("train")[splits.held_out]).all()
    assert (part.image("test", 3) == splits.source.image("train", int(splits.held_out[3]))).all()
    other = HeldOut(Splits.of(problem_of(tmp_path, seed=1), 8))
    assert other.name != part.name
    assert (part.classes, part.mirrored) == (splits.source.classes, False)


# ---- texts ----------------------------------------------------------------------------------------------------------


def test_texts_name_evaluators(tmp_path):
    problem = problem_of(tmp_path)
    assert open_evaluator("synflow", problem) == SynFlow(problem)
    assert open_evaluator("naswot", problem) == NASWOT(problem)
    assert open_evaluator("train", problem, recipe=RECIPE) == Trained(problem, RECIPE)
    one = open_evaluator("train:1", problem, recipe=replace(RECIPE, epochs=3, warmup_epochs=1.5))
    assert one == Trained(problem, replace(RECIPE, epochs=1, warmup_epochs=0.5))
    assert open_evaluator("train", problem, held_out=0.5) == Trained(problem, held_out=0.5)
    with pytest.raises(TableError, match=r"nowhere\.parquet cannot be read"):
        open_evaluator(f"table:{tmp_path}/nowhere.parquet", problem)


@pytest.mark.parametrize("text", ["guess", "train:", "train:0", "train:long", "table", "table:", "synflow:2", ""])
def test_texts_that_name_none(tmp_path, text):
    with pytest.raises(UsageError, match=r"unknown evaluator .*: train\[:EPOCHS\], synflow, naswot, table:FILE"):
        open_evaluator(text, problem_of(tmp_path))


# ---- look-ups -------------------------------------------------------------------------------------------------------


class Sum:
    """The sum of the indices; keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def evaluate(self, arch):
        self.asked.append(arch)
        return float(sum(arch))


def test_spellings_of_one_network_are_one_look_up():
    told = Sum()
    lookups = Lookups(told, CELLS)
    spelled, network = (2, 3, 0, 3, 0, 0), (0, 0, 0, 3, 0, 0)
    assert lookups.evaluate(spelled) == lookups.evaluate(network) == 3
    assert told.asked == [network]
    assert lookups.spent == 1
    assert lookups.knows(spelled)
    assert not lookups.knows((3,) * 6)


def test_a_budget_ends_what_is_new_and_not_what_is_known():
    lookups = Lookups(Sum(), CELLS, budget=2)
    lookups.evaluate((3,) * 6)
    assert lookups.left == 1
    lookups.evaluate((1,) * 6)
    assert lookups.evaluate((3,) * 6) == 18
    with pytest.raises(BudgetSpentError, match="the budget of 2 look-ups is spent: 2,2,2,2,2,2 is one more"):
        lookups.evaluate((2,) * 6)
    assert (lookups.spent, lookups.left) == (2, 0)
    assert Lookups(Sum(), CELLS).left is None
    with pytest.raises(UsageError, match="at least 1 look-up"):
        Lookups(Sum(), CELLS, budget=0)


def test_the_best_of_all_or_of_some():
    lookups = Lookups(Sum(), CELLS)
    with pytest.raises(UsageError, match="nothing was looked up"):
        lookups.best()
    for arch in ((1,) * 6, (4,) * 6, (3, 0, 3, 1, 0, 1), (2, 2, 2, 2, 0, 0)):
        lookups.evaluate(arch)
    assert lookups.best() == ((4,) * 6, 24)
    assert lookups.best([(1,) * 6, (3, 0, 3, 1, 0, 1), (2,) * 6]) == ((3, 0, 3, 1, 0, 1), 8)


def test_answers_outlast_the_process(tmp_path):
    path, identity = tmp_path / "deep" / "lookups.json", {"evaluator": "sum", "seed": 3}
    first = Lookups(Sum(), CELLS, path=path, identity=identity)
    values = {arch: first.evaluate(arch) for arch in ((3,) * 6, (1,) * 6, (4,) * 6)}
    first.flush()
    told = Sum()
    again = Lookups(told, CELLS, budget=4, path=path, identity=identity)
    assert again.values == values
    assert {arch: again.evaluate(arch) for arch in values} == values
    assert told.asked == []
    assert (again.spent, again.left) == (3, 1)
    assert set(again.seconds) == set(values)


def test_what_a_killed_process_was_told_is_there(tmp_path):
    """Saving takes 1 % of the time, so what was saved last is at most a hundred savings old."""
    path = tmp_path / "lookups.json"
    Lookups(Sum(), CELLS, path=path).evaluate((3,) * 6)
    assert Lookups(Sum(), CELLS, path=path).values == {(3,) * 6: 18.0}


def test_files_of_other_searches_are_kept(tmp_path):
    path = tmp_path / "lookups.json"
    first = Lookups(Sum(), CELLS, path=path, identity={"seed": 3})
    first.evaluate((3,) * 6)
    first.flush()
    before = path.read_bytes()
    with pytest.raises(UsageError, match=r"filled with other settings \(there / here\): seed: 3 / 4"):
        Lookups(Sum(), CELLS, path=path, identity={"seed": 4})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '{"identity": {}, "lookups": [[[3,3,3], 0.5, 0.1]]}',
        '{"identity": {}, "lookups": [[[3,3,3,3,3,9], 0.5, 0.1]]}',
        '{"identity": {}, "lookups": [[[3,3,3,3,3,3], null, 0.1]]}',
    ],
)
def test_damaged_files_are_refused(tmp_path, text):
    path = tmp_path / "lookups.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"holds no look-ups, or is damaged .*: remove it to start again"):
        Lookups(Sum(), CELLS, path=path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_answer_that_is_no_number_is_refused(tmp_path, value):
    class Broken:
        def evaluate(self, arch):
            return value

    lookups = Lookups(Broken(), CELLS, path=tmp_path / "lookups.json")
    with pytest.raises(UsageError, match=r"answer for 3,3,3,3,3,3 is (nan|inf): no number"):
        lookups.evaluate((3,) * 6)
    assert lookups.spent == 0


def test_the_file_is_plain_json(tmp_path):
    path = tmp_path / "lookups.json"
    lookups = Lookups(Sum(), CELLS, path=path, identity={"seed": 3})
    lookups.evaluate((3,) * 6)
    lookups.flush()
    raw = json.loads(path.read_text())
    assert raw["identity"] == {"seed": 3}
    assert raw["lookups"][0][:2] == [[3] * 6, 18.0]
