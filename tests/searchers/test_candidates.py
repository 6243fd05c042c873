"""Candidates on a fleet: whoever judges them, and whatever becomes of the nodes, the answers are the same."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from fleet_cluster import cluster

from latbench import __version__
from latbench.errors import EnvironmentUnfitError, UsageError
from latbench.measure.fleet import NodeLostError, Place
from latbench.oracle.base import Constraint
from latbench.oracle.lut import LutOracle
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from searchers import candidates
from searchers.base import Problem
from searchers.candidates import CandidateFleet, CandidateNode, OnFleet
from searchers.evaluators import Lookups, open_evaluator
from searchers.random_search import RandomSearch
from searchers.relativenas import RelativeNAS
from searchers.testing import roofline_table

SPACE = MobileNetV1Space(resolution=8, min_width=0.1, max_width=0.25, levels=3, num_classes=10)
OPTIONS = RandomSearch(evaluations=6, evaluator="synflow", epochs=1)


class Node:
    """As ``measure.fleet.Held``, in this process: it is lost at its n-th call, from the first on not there."""

    def __init__(self, name, *, lost_at=None, version=__version__):
        self.node = Place(name, name, "here", {})
        self.object, self.calls, self.lost_at, self.killed = CandidateNode(version, 1), 0, lost_at, False

    def placed(self, wait_s):
        return self.lost_at != 0

    def send(self, method, *args):
        assert not self.killed
        self.calls += method == "evaluate"
        return self, method, args, self.calls

    def receive(self, sent, limit_s):
        _, method, args, n = sent
        if n == self.lost_at:
            raise NodeLostError(f"{self.node.name} is lost")
        return getattr(self.object, method)(*args)

    def kill(self):
        self.killed = True
        self.object.close()


class Here:
    """As ``measure.fleet.Fleet``: preparations happen as they are sent, one answer at a time."""

    def done(self, calls, wait_s):
        return calls[:1]


class Prompt(Node):
    def send(self, method, *args):
        if method == "prepare":
            return self.object.prepare(*args)
        return super().send(method, *args)


def problem_of(folder, fleet=None, space=SPACE):
    oracle = LutOracle.fit(roofline_table(space))
    return Problem((Constraint(oracle, 1e9),), "digits", folder, max_images=100, fleet=fleet)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def sampled(n):
    import numpy as np

    rng = np.random.default_rng(0)
    return [SPACE.sample(rng) for _ in range(n)]


MADE = []


@pytest.fixture(autouse=True)
def nothing_stays():
    """Neither folder nor watcher of a node."""
    yield
    for node in MADE:
        node.kill()
        assert not node.object._folder.exists()
    MADE.clear()


def fleet_of(*nodes):
    told = []
    MADE.extend(nodes)
    return CandidateFleet(Here(), nodes, told.append), told


def test_a_search_ends_in_the_same_result(tmp_path):
    alone = OPTIONS.search(problem_of(tmp_path / "alone"))
    nodes = Prompt("a"), Prompt("b")
    fleet, told = fleet_of(*nodes)
    shared = OPTIONS.search(problem_of(tmp_path / "shared", fleet))
    assert (shared.arch, shared.score) == (alone.arch, alone.score)
    assert [row["score"] for row in shared.history] == [row["score"] for row in alone.history]
    assert [node.calls for node in nodes] == [3, 3]
    assert told == []


def test_relativenas_asks_a_generation_at_once(tmp_path):
    options = RelativeNAS(generations=2, population=4, evaluator="synflow", batch_size=16)
    alone = options.search(problem_of(tmp_path / "alone"))
    node = Prompt("a")
    shared = options.search(problem_of(tmp_path / "shared", fleet_of(node)[0]))
    assert shared.arch == alone.arch
    lookups = json.loads((tmp_path / "shared" / "evaluations.json").read_text())["lookups"]
    assert node.calls >= 4
    assert {tuple(arch): value for arch, value, _ in lookups} == {
        tuple(arch): value
        for arch, value, _ in json.loads((tmp_path / "alone" / "evaluations.json").read_text())["lookups"]
    }


def test_a_lost_node_s_candidate_is_given_to_another(tmp_path):
    archs = sampled(6)
    make = partial(open_evaluator, "synflow")
    expected = [make(problem_of(tmp_path)).evaluate(arch) for arch in archs]
    lost, left = Prompt("lost", lost_at=2), Prompt("left")
    fleet, told = fleet_of(lost, left)
    found = dict(fleet.evaluate(make, problem_of(tmp_path), archs))
    assert [found[i] for i in range(6)] == expected
    assert lost.killed
    assert not left.killed
    assert told == ["lost: lost is lost; going on without it"]
    fleet, _ = fleet_of(Prompt("one", lost_at=3), Prompt("two", lost_at=2))
    answers = fleet.evaluate(make, problem_of(tmp_path), archs)
    with pytest.raises(NodeLostError, match="no node of the fleet is left to judge candidates"):
        list(answers)


def test_a_fleet_that_is_held_by_others_is_waited_for_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(candidates, "SILENT_S", 0.0)
    node, polls = Prompt("a"), iter([False, False])
    monkeypatch.setattr(node, "placed", lambda wait_s: next(polls, True))
    fleet, told = fleet_of(node)
    assert len(list(fleet.evaluate(partial(open_evaluator, "synflow"), problem_of(tmp_path), sampled(2)))) == 2
    assert told == ["waiting for a: other runs hold the devices"]


def test_what_was_judged_before_all_nodes_were_lost_is_kept(tmp_path):
    fleet, _ = fleet_of(Prompt("one", lost_at=4))
    with pytest.raises(NodeLostError):
        OPTIONS.search(problem_of(tmp_path, fleet))
    assert len(json.loads((tmp_path / "evaluations.json").read_text())["lookups"]) == 3
    node = Prompt("two")
    OPTIONS.search(problem_of(tmp_path, fleet_of(node)[0]))
    assert node.calls == 3


def test_a_budget_bounds_what_is_asked_at_once(tmp_path):
    node = Prompt("a")
    problem = problem_of(tmp_path, fleet_of(node)[0])
    lookups = Lookups(open_evaluator("synflow", problem), SPACE, budget=4)
    assert isinstance(lookups.evaluator, OnFleet)
    archs = list(dict.fromkeys(map(SPACE.canonical, sampled(12))))
    lookups.prepare(archs[:2])
    lookups.prepare(archs)
    assert (lookups.spent, node.calls) == (4, 4)
    assert list(lookups.values) == archs[:4]


def test_what_a_node_cannot_do_is_told_in_its_words(tmp_path):
    missing = replace(problem_of(tmp_path), data="folder:/nowhere")
    node = Prompt("a")
    with pytest.raises(UsageError, match="/nowhere"):
        list(fleet_of(node)[0].evaluate(partial(open_evaluator, "naswot"), missing, sampled(1)))
    other = Prompt("old", version="0.0.1")
    with pytest.raises(EnvironmentUnfitError, match=r"it has latbench .*, this machine 0\.0\.1"):
        list(fleet_of(other)[0].evaluate(partial(open_evaluator, "synflow"), problem_of(tmp_path), sampled(1)))


@pytest.mark.slow
def test_on_real_nodes_the_result_is_the_same(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'latbench[fleet]'")
    roofline_table(SPACE).write(tmp_path / "t.parquet")
    words = ["search", "random", "--table", "t.parquet", "--target", "1s", "--data", "digits", "--max-images", "200"]
    words += ["--epochs", "1", "--set", "evaluations=6", "--json"]
    code = "import torch; torch.set_num_threads(1); from latbench.cli import main; main()"

    def search(*more):
        command = [sys.executable, "-c", code, *words, *more]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    with (
        tempfile.TemporaryDirectory(prefix="ray") as folder,
        cluster(Path(folder), [["titanxp"], ["cpu"]]) as nodes,
    ):
        shared, err = search("--fleet", nodes.client, "-o", "shared")
        assert "2 nodes judge candidates" in err
        alone, _ = search("-o", "alone")
        assert (shared["arch"], shared["score"]) == (alone["arch"], alone["score"])


def test_a_supernet_is_not_for_a_fleet(tmp_path):
    from command_line import refused

    roofline_table(SPACE).write(tmp_path / "t.parquet")
    words = ["--table", tmp_path / "t.parquet", "--target", "1s", "--data", "digits", "--fleet", "auto"]
    for searcher, advice in (("aows", "torchrun"), ("relativenas", "--set evaluator=train")):
        told = refused("search", searcher, *words, "-o", tmp_path / "out")
        assert advice in told
