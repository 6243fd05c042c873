"""Figures by hand and by brute force; splits that share no network; models that know the truth are found exact."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from linear_oracle import LinearOracle

from latbench.errors import MissingEntryError, TableError, UsageError
from latbench.oracle.conformal import Conformal
from latbench.oracle.factors import Factor, FactorOracle
from latbench.oracle.fitting import default_oracle, fit
from latbench.oracle.lut import LutOracle
from latbench.oracle.validation import (
    Predictions,
    cross_validate,
    folds,
    learning_curve,
    network_names,
    rank_correlations,
    split,
    unseen,
    validate,
)
from latbench.provenance import Provenance
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.spaces.nasbench201 import NASBench201Space
from latbench.tables import LatencyTable, Row

SPACE = MobileNetV1Space(resolution=32, levels=2, num_classes=10)
D = len(SPACE.decisions)


def provenance(space):
    return Provenance("cpu", "Xeon", "onnxruntime", space=space.name, settings=space.settings())


def networks(n, space=SPACE, seed=0, noise=0.0):
    """`n` different networks whose latency is linear in the choices; no two decisions weigh the same."""
    rng = np.random.default_rng(seed)
    archs = list(dict.fromkeys(space.sample(rng) for _ in range(20 * n)))[:n]
    assert len(archs) == n
    slope = 0.1 * np.sqrt(np.arange(2, len(space.decisions) + 2))
    return [
        Row(f"n{space.format_arch(arch)}", "network", "s", arch=arch,
            latency_ms=float(3 + slope @ arch) * float(np.exp(noise * rng.standard_normal())))
        for arch in archs
    ]  # fmt: skip


def blocks(space=SPACE, ms=0.25):
    return [Row(key, "block", block.signature, latency_ms=ms) for key, block in space.all_blocks().items()]


def table(rows, space=SPACE):
    return LatencyTable.from_rows(rows, provenance(space))


def constant(ms, **more):
    return FactorOracle(SPACE, (Factor("all", (), np.array(float(ms))),), provenance(SPACE), **more)


def arch(i):
    return tuple(int(bit) for bit in f"{i:0{D}b}")


# -- figures


def test_figures_by_hand():
    measured = np.array([10.0, 9.9, 8.0, 20.0])
    found = validate(constant(10), (np.array([arch(i) for i in range(4)]), measured))
    off = np.array([0, 0.1 / 9.9, 0.25, -0.5])
    assert (found.n, found.within_5, found.within_10) == (4, 0.5, 0.5)
    assert found.mape == pytest.approx(np.abs(off).mean())
    assert found.bias == pytest.approx(off.mean())
    assert found.rmse == pytest.approx(np.sqrt((0 + 0.01 + 4 + 100) / 4))
    assert (found.kendall, found.spearman, found.coverage, found.half_width) == (None, None, None, None)


def test_coverage_and_half_width_are_those_of_the_interval():
    oracle = constant(10, calibration=Conformal(tuple(np.linspace(0.01, 0.1, 99))))
    measured = np.array([10.0, 10.5, 12.0, 8.0])
    found = validate(oracle, (np.array([arch(i) for i in range(4)]), measured), confidence=0.5)
    q = oracle.calibration.quantile(0.5)
    assert found.coverage == 0.5
    assert found.half_width == pytest.approx(np.sinh(q))
    assert found.confidence == 0.5


def test_ranks_are_those_of_brute_force():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 12, 40).astype(float), rng.normal(size=40)
    b += a / 4
    signs = [(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i, j in combinations(range(40), 2)]
    tau = sum(x * y for x, y in signs) / np.sqrt(sum(x != 0 for x, _ in signs) * sum(y != 0 for _, y in signs))
    ranks = [np.array([(v < one).sum() + ((v == one).sum() - 1) / 2 for one in v]) for v in (a, b)]
    kendall, spearman = rank_correlations(a, b)
    assert kendall == pytest.approx(tau)
    assert spearman == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert rank_correlations(a[:2], b[:2]) == (None, None)
    assert rank_correlations(np.ones(5), b[:5]) == (None, None)


def test_a_true_model_is_found_exact():
    rows = networks(30)
    model = LinearOracle.fit(table(rows), ridge=1e-12)
    found = validate(model, table(networks(30, seed=1)))
    assert found.mape < 1e-6
    assert found.kendall == pytest.approx(1)
    assert found.within_5 == 1


def test_networks_with_a_missing_entry_are_counted_not_guessed():
    values = np.array([1.0, np.nan])
    holed = FactorOracle(SPACE, (Factor("a", (D - 1,), values),), provenance(SPACE))
    archs = np.array([arch(i) for i in range(5)])
    found = Predictions.of(holed, (archs, np.full(5, 2.0)))
    assert (found.n_missing, len(found.measured)) == (2, 3)
    np.testing.assert_array_equal(found.archs, archs[::2])
    assert found.validation().mape == 0.5
    with pytest.raises(MissingEntryError):
        validate(holed, (archs[1::2], np.ones(2)))


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(TableError, match="no measured network"):
        validate(constant(1), table(blocks()))
    with pytest.raises(TableError, match="above zero"):
        validate(constant(1), (np.array([arch(0)]), np.zeros(1)))
    with pytest.raises(UsageError):
        validate(constant(1), (np.array([[0, 1]]), np.ones(1)))


# -- splits


def names_of(part):
    return {name for pair in network_names(part) for name in pair}


@pytest.mark.parametrize(("held_out", "n"), [(0.2, 10), (0.5, 25), (1, 1), (49, 49), (7.0, 7)])
def test_a_split_keeps_networks_out_and_everything_else_in(held_out, n):
    whole = table([*blocks(), *networks(50), Row("x", "network", "s", arch=(0,) * D, status="error")])
    fitted, kept_out = split(whole, held_out, seed=3)
    assert len(kept_out) == n
    assert set(kept_out.frame["kind"]) == {"network"}
    assert not names_of(fitted) & names_of(kept_out)
    assert len(fitted) + n == len(whole)
    keys = fitted.frame["key"].tolist()
    assert keys == [key for key in whole.frame["key"] if key in set(keys)]  # in the table's order


def test_splits_are_random_and_repeatable():
    whole = table(networks(50))
    drawn = [tuple(split(whole, 10, seed)[1].frame["key"]) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3


@pytest.mark.parametrize("seed", range(3))
def test_equal_cells_stay_on_one_side(seed):
    space = NASBench201Space()
    rng = np.random.default_rng(7)
    archs = list(dict.fromkeys(tuple(int(i) for i in rng.choice([0, 0, 3], 6)) for _ in range(300)))
    whole = table([Row(f"k{i}", "network", "s", arch=a, latency_ms=1.0) for i, a in enumerate(archs)], space)
    canonical = [{space.canonical(tuple(a)) for a in part.networks()[0].tolist()} for part in split(whole, 0.4, seed)]
    assert len(canonical[0] | canonical[1]) < len(archs)
    assert not canonical[0] & canonical[1]
    parts = [out for _, out in folds(whole, 5, seed)]
    assert sorted(key for part in parts for key in part.frame["key"]) == sorted(whole.frame["key"])
    for one, two in combinations(parts, 2):
        assert not names_of(one) & names_of(two)


def test_one_graph_key_is_one_network():
    rows = networks(20)
    twin = replace(rows[4], context="sandwich", arch=rows[4].arch[::-1])
    for seed in range(10):
        fitted, kept_out = split(table([*rows, twin]), 8, seed)
        assert (rows[4].key in set(fitted.frame["key"])) != (rows[4].key in set(kept_out.frame["key"]))


@pytest.mark.parametrize("held_out", [10, 11, 0])
def test_a_split_that_leaves_nothing_is_refused(held_out):
    with pytest.raises(UsageError, match=r"cannot keep \d+ of 10 measured networks out"):
        split(table(networks(10)), held_out, 0)
    with pytest.raises(UsageError):
        next(folds(table(networks(1)), 5, 0))


def test_unseen_networks_are_those_without_a_known_name():
    rows = networks(12)
    one, all_of_them = table([*blocks(), *rows[:5]]), table([*blocks(), *rows])
    assert unseen(all_of_them, names_of(one)).frame["key"].tolist() == [row.key for row in rows[5:]]
    renamed = table([replace(row, key=f"other{i}") for i, row in enumerate(rows)])
    assert len(unseen(renamed, names_of(one))) == 7  # known by their architectures
    assert len(unseen(all_of_them, ())) == 12


# -- fits


def test_cross_validation_predicts_every_network_by_a_model_that_lacks_it():
    whole = table([*blocks(), *networks(23, noise=0.05)])
    found = cross_validate(LinearOracle, whole, ridge=0.01)
    assert len(found.measured) == 23
    for fitted, kept_out in folds(whole, 5, 0):
        model = LinearOracle.fit(fitted, ridge=0.01)
        for a, ms in zip(kept_out.networks()[0], model.latencies(kept_out.networks()[0]), strict=True):
            (at,) = np.flatnonzero((found.archs == a).all(axis=1))
            assert found.predicted[at] == pytest.approx(ms)
    assert found.interval is not None


def test_learning_curves_fall_to_the_noise():
    noise = 0.01
    whole = table([*blocks(), *networks(200, noise=noise)])
    points = learning_curve(LinearOracle, whole, [10, 40, 120], 60, seeds=[0, 1, 2])
    assert [point.n for point in points] == [10, 40, 120]
    assert points[0].mape > points[1].mape > points[2].mape
    assert noise * np.sqrt(2 / np.pi) / 1.3 < points[2].mape < 1.5 * noise
    assert all(point.n_seeds == 3 and point.sd > 0 for point in points)


def test_what_is_not_fitted_does_not_learn():
    whole = table([*blocks(), *networks(30)])
    none, some = learning_curve(LutOracle, whole, [0, 10], 10, seeds=[0])
    assert none.mape == some.mape > 0
    with pytest.raises(UsageError, match="cannot fit on 21 networks: 20 are left beside 10"):
        learning_curve(LutOracle, whole, [21], 10, seeds=[0])


@pytest.mark.parametrize(
    ("rows", "name"),
    [((blocks, networks), "calibrated"), ((blocks,), "lut"), ((networks,), "learned")],
    ids=["both", "blocks", "networks"],
)
def test_the_default_oracle_is_what_the_table_suffices_for(rows, name):
    found = [row for make in rows for row in (make(5) if make is networks else make())]
    assert default_oracle(table(found)) == name


def test_a_table_of_nothing_has_no_oracle():
    with pytest.raises(TableError, match="neither blocks nor networks"):
        default_oracle(table([Row("a", "stub", "s", latency_ms=1.0)]))


@pytest.mark.usefixtures("linear")
def test_a_fit_tells_what_it_saw_and_how_far_off_it_is():
    whole = table([*blocks(), *networks(40, noise=0.02)])
    stored = fit("linear", whole, ridge=0.01)
    fitted, kept_out = split(whole, 0.2, 0)
    assert set(stored.notes["networks"]) == names_of(fitted)
    assert (stored.notes["n_networks"], stored.notes["n_blocks"]) == (32, len(blocks()))
    figures = validate(LinearOracle.fit(fitted, ridge=0.01), kept_out).to_dict()
    assert stored.notes["validation"] == {"method": "held out", "seed": 0, **figures}
    assert len(fit("linear", whole, held_out=5, seed=1).notes["networks"]) == 2 * 35


@pytest.mark.usefixtures("linear")
def test_few_networks_are_all_fitted_and_cross_validated():
    whole = table([*blocks(), *networks(19)])
    notes = fit("linear", whole).notes
    assert notes["n_networks"] == 19
    assert (notes["validation"]["method"], notes["validation"]["folds"], notes["validation"]["n"]) == (
        "cross-validation", 5, 19,
    )  # fmt: skip
    assert fit("linear", table(networks(4))).notes["unvalidated"].startswith("too few networks to cross-validate: ")
    assert fit("lut", table([*blocks(), *networks(1)])).notes["unvalidated"].startswith("1 measured network in")
    assert fit("lut", table(blocks())).notes["unvalidated"].startswith("no measured networks in")
