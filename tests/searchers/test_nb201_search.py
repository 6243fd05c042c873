"""The study of searches on NAS-Bench-201: its arithmetic, and its searches on cells whose answer is known."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from latbench.errors import UsageError
from latbench.oracle.base import Constraint
from latbench.provenance import Provenance
from latbench.spaces.nasbench201 import NASBench201Space
from latbench.tables import LatencyTable, Row
from searchers.accuracy_table import AccuracyTable
from searchers.base import Problem
from searchers.evaluators import Lookups
from searchers.random_search import draw

ROOT = Path(__file__).parents[2]
REFERENCE = Path(os.environ.get("LATBENCH_REFERENCE_DATA", ""))
GAIN, COST_MS = np.array([0.0, 0.03, 0.06, 0.1, 0.02]), np.array([0.0, 0.1, 0.6, 1.0, 0.4])  # of an edge's operations


@pytest.fixture(scope="module")
def study():
    """``benchmarks/nb201_search.py``, which is a command and no package's module."""
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    yield importlib.import_module("nb201_search")
    sys.path.remove(folder)
    for name in ("nb201_search", "nb201_cells"):
        del sys.modules[name]


@pytest.fixture(scope="module")
def cells(study):
    """Made-up cells: edges add their own accuracy and latency, whether they reach the output or not."""
    space = NASBench201Space(batch=1, num_classes=100)
    archs = np.stack(np.unravel_index(np.arange(space.size), study.SHAPE), axis=1)
    accuracy = 0.3 + GAIN[archs].sum(1)
    latency_ms = 2.0 + COST_MS[archs].sum(1)
    spelled = [tuple(arch) for arch in archs.tolist()]
    rows = [
        Row(key=str(i), kind="network", signature="", space=space.name, arch=arch, latency_ms=ms, origin="imported")
        for i, (arch, ms) in enumerate(zip(spelled, latency_ms.tolist(), strict=True))
    ]
    provenance = Provenance("made_up", "made up", "none", space=space.name, settings=space.settings())
    table = AccuracyTable(space, dict(zip(spelled, accuracy.tolist(), strict=True)), "made up", "fraction")
    return study.Cells(space, LatencyTable.from_rows(rows, provenance), table)


def truth(study, cells):
    return study.Knowledge.of(cells, "true", 0)


def test_a_network_has_the_figures_of_its_canonical_spelling(study, cells):
    assert len(cells.networks) == 12205
    spelled, network = (2, 3, 0, 3, 0, 0), (0, 0, 0, 3, 0, 0)
    at = np.ravel_multi_index(spelled, study.SHAPE)
    assert cells.latency_ms[at] == pytest.approx(3.0)
    assert cells.accuracies[at] == pytest.approx(0.4)
    oracle = cells.oracle(cells.latency_ms)
    assert oracle.latency(spelled) == oracle.latency(network) == pytest.approx(3.0)


@pytest.mark.parametrize(
    "name", ["random", "relativenas", "relativenas+renewal", "irlas", "irlas+hopeful", "irlas+foresight"]
)
def test_every_search_keeps_limit_and_budget_and_ends_alike(study, cells, name):
    limit_ms = float(np.percentile(cells.latency_ms[cells.networks], 50))
    first, again = (study.run(cells, study.SEARCHES[name], truth(study, cells), limit_ms, seed=3) for _ in range(2))
    assert first == again
    assert 0 < first["lookups"] <= study.LOOKUPS
    assert first["over_percent"] <= 1e-9
    best = max(
        0.3 + GAIN[arch].sum()
        for arch in cells.archs[cells.networks]
        if 2.0 + COST_MS[arch].sum() <= limit_ms * (1 + 1e-12)
    )
    arch = np.array([int(i) for i in first["arch"].split(",")])
    assert first["regret"] == pytest.approx(100 * (best - 0.3 - GAIN[arch].sum()), abs=1e-9)
    assert first["regret"] >= -1e-9


def test_learning_searches_beat_chance_where_edges_add_up(study, cells):
    limit_ms = float(np.percentile(cells.latency_ms[cells.networks], 50))
    known = truth(study, cells)
    medians = {
        name: np.median([study.run(cells, study.SEARCHES[name], known, limit_ms, seed)["regret"] for seed in range(5)])
        for name in ("random", "relativenas", "relativenas+renewal", "irlas+hopeful", "irlas+foresight")
    }
    assert medians["random"] > 0
    assert medians["relativenas"] < medians["random"]
    assert medians["relativenas+renewal"] <= 0.5 * medians["random"]
    assert medians["irlas+hopeful"] <= 0.5 * medians["random"]
    assert medians["relativenas+renewal"] == medians["irlas+foresight"] == pytest.approx(0, abs=1e-9)


def test_an_answer_beyond_the_limit_is_told(study, cells):
    """The oracle is told half of every latency, so what it allows breaks the limit."""
    limit_ms = float(np.percentile(cells.latency_ms[cells.networks], 20))
    half = study.Knowledge(0.5 * cells.latency_ms, 0.5 * cells.latency_ms)
    found = study.run(cells, study.SEARCHES["irlas+hopeful"], half, limit_ms, seed=0)
    assert found["over_percent"] > 5
    assert found["over_percent"] == pytest.approx(100 * (found["latency_ms"] / limit_ms - 1))
    assert found["regret"] < 0


def test_answers_are_told_by_another_accuracy_than_searches_look_up(study, cells):
    worst = {arch: 1 - value for arch, value in cells.accuracy.accuracies.items()}
    judge = AccuracyTable(cells.space, worst, "upside down", "fraction")
    limit_ms = float(np.percentile(cells.latency_ms[cells.networks], 50))
    constraint = Constraint(cells.oracle(cells.latency_ms), limit_ms)
    found = study.run(replace(cells, judge=judge), study.SEARCHES["random"], truth(study, cells), limit_ms, 0, 40)
    looked_up = draw(Problem((constraint,), "digits", Path("unused"), 0), 40, np.random.default_rng(0)).archs
    assert found["lookups"] == len(looked_up) == 40
    least = min(cells.accuracy.evaluate(arch) for arch in looked_up)
    assert found["accuracy_percent"] == pytest.approx(100 * least)


def test_bounds_of_a_learned_oracle_hold_what_was_never_measured(study, cells):
    lower, upper = cells.learned(seed=0)
    assert (lower < upper).all()
    assert (upper[cells.networks] >= cells.latency_ms[cells.networks]).mean() > 0.85
    assert (lower[cells.networks] <= cells.latency_ms[cells.networks]).mean() > 0.85
    assert np.median(upper / lower) < 1.4
    assert (upper == upper[cells.network]).all()


@pytest.mark.parametrize(
    ("finalists", "answer"),
    [
        (0, 4),  # the best that surely keeps the limit
        (1, 4),  # the best doubtful one was measured, and breaks it
        (2, 2),  # the second keeps it
        (9, 2),
    ],
)
def test_the_best_that_may_keep_the_limit_are_measured(study, cells, finalists, answer):
    """Networks 0 to 4, the best first: one that is known to break the limit, two in doubt, one that breaks it, one
    within."""
    chosen = cells.networks[:5]
    lookups = Lookups(AccuracyTable(cells.space, {}, "none", "fraction"), cells.space)
    lookups.values = {tuple(cells.archs[at].tolist()): 1 - 0.1 * i for i, at in enumerate(chosen)}
    ms, asked, surely = (np.full(len(cells.archs), 9.0) for _ in range(3))
    ms[chosen], asked[chosen], surely[chosen] = (9, 6, 5, 9, 3), (8, 4, 4, 6, 2), (9, 7, 6, 9, 4)
    measured = replace(cells)
    measured.__dict__["latency_ms"] = ms
    assert study.answer(measured, lookups, study.Knowledge(asked, surely, finalists), 5.0) == chosen[answer]


def test_no_answer_where_none_is_known_to_keep_the_limit(study, cells):
    lookups = Lookups(cells.accuracy, cells.space)
    lookups.evaluate((0,) * 6)
    with pytest.raises(UsageError, match="of 1 networks looked up none is known to keep 1 ms"):
        study.answer(cells, lookups, truth(study, cells), 1.0)


def test_knowledge_spends_as_many_measurements_either_way(study, cells, monkeypatch):
    asked = []
    learned = study.Cells.learned
    monkeypatch.setattr(study.Cells, "learned", lambda *a: (asked.append(a[2:] or (study.MEASURED,)), learned(*a))[1])
    by_margin, by_finalists = (study.Knowledge.of(cells, oracle, 0) for oracle in ("learned", "finalists"))
    assert asked == [(50,), (50 - study.FINALISTS,)]
    assert (by_margin.asked == by_margin.surely).all()
    assert (by_finalists.asked < by_finalists.surely).all()
    assert (by_margin.finalists, by_finalists.finalists) == (0, study.FINALISTS)


def test_figures_of_the_summary(study):
    regrets = {"random": (1.0, 2.0, 3.0, 4.0), "irlas": (0.0, 0.5, 1.0, 6.0)}
    over = {"random": (-1.0, -2.0, 0.0, -4.0), "irlas": (-1.0, 2.0, 5.5, 0.0)}
    table = pd.DataFrame(
        {"batch": 1, "oracle": "true", "percentile": 20, "search": name, "limit_ms": 7.0, "lookups": 300 - i}
        | {"regret": regrets[name][i], "over_percent": over[name][i]}
        for name in regrets
        for i in range(4)
    )
    found = study.summary(table).loc[1, "true", 20].loc["irlas"]
    assert found["median"] == 0.75
    assert (found["q1"], found["q3"]) == (0.375, 2.25)
    assert found["of random"] == 0.75 / 2.5
    assert found["feasible %"] == 50
    assert found["> 5 % over, %"] == 25
    assert found["over, max %"] == 5.5
    assert found["look-ups"] == 298.5


def test_the_picture_is_drawn(study, tmp_path):
    table = pd.DataFrame(
        {"batch": batch, "oracle": "true", "percentile": p, "search": name, "limit_ms": 7.0, "regret": 0.1 * i}
        for batch in (1, 256)
        for p in study.PERCENTILES
        for name in ("random", "irlas")
        for i in range(3)
    )
    study.draw_picture(table, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.skipif(
    not (REFERENCE / "nb201_search.parquet").is_file(),
    reason="needs nb201_search.parquet in the folder $LATBENCH_REFERENCE_DATA",
)
@pytest.mark.parametrize("oracle", ["true", "finalists"])
def test_published_cells_are_searched_with_half_of_chances_regret(study, oracle):
    cells = study.Cells.read(REFERENCE / "nb201_search.parquet", "c100_test_200ep", 256)
    searches = {name: study.SEARCHES[name] for name in ("random", "relativenas+renewal", "irlas+foresight")}
    found = study.summary(pd.DataFrame(study.study(cells, 256, searches, range(10), oracle)))
    assert (found["feasible %"] == 100).all()
    for name in ("relativenas+renewal", "irlas+foresight"):
        assert (found["of random"].xs(name, level="search") <= 0.5).all()
