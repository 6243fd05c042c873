"""Comparisons: scripted tables with known changes, simulated ones with known truth, two stored passes of 200 blocks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from latbench.compare import Comparison, compare
from latbench.compare.statistics import CERTAIN, adjust, moderate, region_tests
from latbench.errors import ProvenanceConflictError, TableError, UsageError
from latbench.tables import LatencyTable, Provenance, Row

DATA = Path(__file__).parent / "data"
PROVENANCE = Provenance("cpu", "Xeon", "onnxruntime", versions={"onnxruntime": "1.20"}, policy={"rounds": 2, "seed": 0})
P_VALUES = arrays(np.float64, st.integers(1, 30), elements=st.floats(0, 1))


def row(key: str, medians: list[float], *, flags: list[str] | None = None, probes: list[float] | None = None) -> Row:
    """Blocks of three samples around each median, in processes of their own."""
    samples = tuple(m * f for m in medians for f in (0.99, 1.0, 1.01))
    n = len(medians)
    return Row(
        key, "block", f"s{key}", block_type="conv", latency_ms=float(np.median(medians)), clock="host",
        samples_ms=samples, block_sizes=(3,) * n, block_run=tuple(range(n)), block_flags=tuple(flags or [""] * n),
        probes_us=tuple(p for p in probes or [] for _ in (0, 1)), probe_at=(0, 3) * len(probes or []),
    )  # fmt: skip


def table(*rows: Row, **conditions: object) -> LatencyTable:
    return LatencyTable.from_rows(rows, replace(PROVENANCE, **conditions))  # type: ignore[arg-type]


def simulated(
    rng: np.random.Generator, n: int, ratio: float, spread: float = 0.006
) -> tuple[LatencyTable, LatencyTable]:
    """`n` rows of four blocks; each row has its own noise, each pass its process term; NEW is `ratio` times OLD."""
    sd = spread * np.sqrt(5 / rng.chisquare(5, n))
    tables = []
    for factor in (1.0, ratio):
        centre = factor * np.exp(0.003 * rng.standard_normal(n))
        blocks = centre[:, None] * np.exp(sd[:, None] * rng.standard_normal((n, 4)))
        tables.append(table(*(row(f"k{i}", b.tolist()) for i, b in enumerate(blocks))))
    return tables[0], tables[1]


def verdicts(found: Comparison) -> dict[str, str]:
    return {one.key: one.verdict for one in found.rows}


def slower(whole: LatencyTable, keys: set[str], factor: float) -> LatencyTable:
    """Every sample of some rows made longer."""
    rows = [
        replace(one, samples_ms=tuple(factor * s for s in one.samples_ms)) if one.key in keys else one
        for one in whole.rows()
    ]
    return LatencyTable.from_rows(rows, whole.provenance)


@pytest.fixture(scope="module")
def passes() -> tuple[LatencyTable, LatencyTable]:
    """The 200 blocks of benchmarks/blocks200.py measured twice, 13 minutes apart, with other work on the machine."""
    return LatencyTable.read(DATA / "blocks200-first.parquet"), LatencyTable.read(DATA / "blocks200-second.parquet")


def test_two_passes_over_the_same_blocks_are_the_same(passes: tuple[LatencyTable, LatencyTable]) -> None:
    for old, new in (passes, passes[::-1]):
        found = compare(old, new)
        assert len(found.rows) == 200
        assert found.counts["SAME"] >= 190
        assert found.counts["SLOWER"] == found.counts["FASTER"] == 0
        assert not found.regressed
        assert found.overall[0].low < 1 < found.overall[0].high


@pytest.mark.parametrize("seed", range(4))
def test_ten_per_cent_more_in_twenty_rows_are_found(passes: tuple[LatencyTable, LatencyTable], seed: int) -> None:
    old, new = passes
    keys = set(np.random.default_rng(seed).choice(old.frame["key"].to_numpy(str), 20, replace=False).tolist())
    found = compare(old, slower(new, keys, 1.1))
    named = {key for key, verdict in verdicts(found).items() if verdict == "SLOWER"}
    assert len(named & keys) >= 18
    assert named <= keys
    assert found.regressed


def test_intervals_cover_the_true_ratio_and_claims_keep_their_promise() -> None:
    rng = np.random.default_rng(7)
    covered, false, n = 0, 0, 0
    for ratio in (0.97, 1.0, 1.05):  # 1.05 is the threshold itself: the likeliest to be called SLOWER wrongly
        found = compare(*simulated(rng, 400, ratio))
        covered += sum(one.low <= ratio <= one.high for one in found.rows)
        false += found.counts["SLOWER"] + found.counts["FASTER"]
        n += len(found.rows)
    assert 0.92 <= covered / n <= 0.98
    assert false / n <= 0.01


def test_a_change_that_nothing_is_sure_of_is_unsure() -> None:
    rng = np.random.default_rng(1)
    old, new = simulated(rng, 60, 1.0, spread=0.08)
    assert compare(old, new).counts["UNSURE"] > 50


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.8, 1.25), st.floats(0.01, 100))
def test_exchanging_the_tables_mirrors_every_verdict_and_units_do_not_matter(
    seed: int, ratio: float, unit: float
) -> None:
    old, new = simulated(np.random.default_rng(seed), 12, ratio)
    there, back = compare(old, new), compare(new, old)
    mirror = {"SLOWER": "FASTER", "FASTER": "SLOWER", "SAME": "SAME", "UNSURE": "UNSURE"}
    assert {key: mirror[verdict] for key, verdict in verdicts(back).items()} == verdicts(there)
    ratios = {one.key: 1 / one.ratio for one in back.rows}
    assert [ratios[one.key] for one in there.rows] == pytest.approx([one.ratio for one in there.rows])
    everything = {f"k{i}" for i in range(12)}
    scaled = compare(slower(old, everything, unit), slower(new, everything, unit))
    assert verdicts(scaled) == verdicts(there)


@given(P_VALUES)
def test_adjusted_p_values_are_those_of_the_step_up_procedure(p: np.ndarray) -> None:
    q = adjust(p)
    assert (q >= p).all()
    assert (q <= 1).all()
    for level in (0.01, 0.05, 0.2):  # rejected: the k smallest, for the largest k with p_(k) <= k level / n
        ordered = np.sort(p)
        k = max((i + 1 for i in range(len(p)) if ordered[i] * (len(p) / (i + 1)) <= level), default=0)
        assert (q <= level).sum() == (0 if k == 0 else (p <= ordered[k - 1]).sum())


def test_false_discoveries_stay_below_the_level_whatever_the_share_of_true_ones() -> None:
    rng = np.random.default_rng(3)
    for share in (0.0, 0.2, 0.6):
        proportions = []
        for _ in range(300):
            real = rng.random(100) < share
            p = np.where(real, rng.beta(0.05, 1, 100), rng.random(100))
            claimed = adjust(p) <= 0.1
            proportions.append((claimed & ~real).sum() / max(claimed.sum(), 1))
        assert np.mean(proportions) <= 0.115  # 0.1, and three standard errors


@given(st.floats(-1, 1), st.floats(1e-4, 0.5), st.floats(2, 100), st.floats(0.01, 0.3))
def test_the_three_regions_are_symmetric_and_never_claimed_together(
    log_ratio: float, error: float, dof: float, margin: float
) -> None:
    def tests(value: float) -> tuple[float, float]:
        change, same = region_tests(np.array([value]), np.array([error]), np.array([dof]), margin)
        return float(change[0]), float(same[0])

    assert tests(log_ratio) == pytest.approx(tests(-log_ratio))
    change, same = tests(log_ratio)
    assert max(change, same) >= 0.5
    assert tests(0.0)[1] <= same + 1e-12  # nothing is more surely the same than no change


def test_a_known_ratio_is_decided_without_doubt() -> None:
    change, same = region_tests(np.log([1.04, 1.06, 1 / 1.06]), np.zeros(3), np.full(3, CERTAIN), math.log(1.05))
    assert change.tolist() == [1, 0, 0]
    assert same.tolist() == [0, 1, 1]


def test_moderated_variances_recover_the_scatter_that_they_were_drawn_with() -> None:
    rng = np.random.default_rng(0)
    n, prior, centre, dof = 4000, 6.0, 2.5e-5, 3.0
    true = centre * prior / rng.chisquare(prior, n)
    drawn = true * rng.chisquare(dof, n) / dof
    moderated, dofs = moderate(drawn, np.full(n, dof))
    assert dofs == pytest.approx(np.full(n, dof + prior), rel=0.15)
    assert np.abs(np.log(moderated / true)).mean() < 0.75 * np.abs(np.log(drawn / true)).mean()
    assert (np.argsort(moderated) == np.argsort(drawn)).all()


@given(arrays(np.float64, st.integers(0, 9), elements=st.floats(0, 1)))
def test_few_variances_stay_as_they_are(variances: np.ndarray) -> None:
    dofs = np.full(len(variances), 3.0)
    assert moderate(variances, dofs)[0] is variances


def test_variances_with_no_scatter_of_their_own_become_one() -> None:
    moderated, dofs = moderate(np.full(20, 1e-4), np.full(20, 4.0))
    assert np.ptp(moderated) < 1e-9
    assert (dofs == CERTAIN).all()


def test_latencies_are_compared_at_one_clock() -> None:
    slow, fast = [1.0, 1.004, 0.998, 1.002], [0.5, 0.502, 0.499, 0.501]
    old = [row(f"k{i}", slow, probes=[6.0] * 4) for i in range(12)]
    new = [row(f"k{i}", fast, probes=[3.0] * 4) for i in range(12)]
    found = compare(table(*old, clock_ref_us=6.0), table(*new, clock_ref_us=3.1))
    assert found.clock == "the reference clock of OLD"
    assert found.counts["SAME"] == 12
    assert found.rows[0].new_ms == pytest.approx(1.001, rel=1e-3)
    raw = compare(table(*old, clock_ref_us=6.0), table(*new))
    assert raw.clock == "the clock that ran"
    assert raw.counts["FASTER"] == 12


def test_flagged_blocks_do_not_count_unless_there_are_no_others() -> None:
    good, bad = [1.0, 1.001, 0.999], [9.0]
    old = table(row("a", good * 2))
    mixed = table(row("a", good + bad, flags=["", "", "", "foreign_load"]))
    assert compare(old, mixed).rows[0].new_ms == pytest.approx(1.0)
    only = table(row("a", bad * 2, flags=["drift", "drift"]))
    assert compare(old, only).rows[0].new_ms == pytest.approx(9.0)


def test_without_samples_the_stored_interval_decides_and_simulated_rows_are_exact() -> None:
    one = Row("a", "network", "a", arch=(1, 2), latency_ms=2.0, ci_low_ms=1.99, ci_high_ms=2.01)
    found = compare(table(one), table(replace(one, latency_ms=2.4, ci_low_ms=2.39, ci_high_ms=2.41))).rows[0]
    assert (found.verdict, found.name) == ("SLOWER", "1,2")
    assert (found.low, found.high) == pytest.approx((1.192, 1.208), abs=0.001)
    exact = replace(one, ci_low_ms=2.0, ci_high_ms=2.0, origin="simulated")
    for factor, verdict in ((1.049, "SAME"), (1.051, "SLOWER"), (1 / 1.051, "FASTER")):
        ms = 2.0 * factor
        other = replace(exact, latency_ms=ms, ci_low_ms=ms, ci_high_ms=ms)
        assert compare(table(exact), table(other)).rows[0].verdict == verdict
    assert compare(table(exact), table(exact)).overall[0].ratio == 1


def test_what_is_not_compared_is_told() -> None:
    steady = [1.0, 1.001, 0.999, 1.0]
    failed = Row("b", "block", "sb", status="timeout", stage="load", error="no answer")
    old = table(*(row(key, steady) for key in "abcde"), replace(row("s", steady), kind="stub"))
    new = table(
        row("a", steady), failed, row("c", [1.0]), replace(row("d", steady), clock="cuda_event"), row("new", steady),
        replace(row("s", steady), kind="stub"),
    )  # fmt: skip
    found = compare(old, new)
    assert verdicts(found) == {"a": "SAME"}
    assert found.lost == ("block b: timeout while in load: no answer", "block e: not in NEW")
    assert (found.failed, found.gained) == (1, 1)
    assert [text.split(":")[0] for text in found.skipped] == ["block c", "block d"]
    assert "different clocks (host / cuda_event)" in found.skipped[1]
    with pytest.raises(TableError, match="share no row with a figure"):
        compare(table(row("a", steady)), table(row("b", steady)))
    with pytest.raises(TableError, match="none of 1 shared rows can be compared"):
        compare(table(row("a", [1.0])), table(row("a", steady)))


def test_unlike_conditions_are_refused_unless_they_are_what_is_compared() -> None:
    steady = row("a", [1.0, 1.001, 0.999, 1.0])
    old = table(steady)
    for conditions, flags in (
        ({"versions": {"onnxruntime": "1.21"}}, "--across versions"),
        ({"policy": {"rounds": 5, "seed": 0}}, "--across policy"),
        ({"device_name": "EPYC"}, "--across device"),
        ({"backend": "openvino", "versions": {"openvino": "2025"}}, "--across backend"),
        ({"space": "fbnet", "settings": {"batch": 2}}, "--across space"),
        ({"device_name": "EPYC", "policy": {"rounds": 5}}, "--across device --across policy"),
    ):
        new = table(steady, **conditions)
        with pytest.raises(ProvenanceConflictError, match=flags) as caught:
            compare(old, new)
        across = flags.replace("--across ", "").split()
        found = compare(old, new, across=across)
        assert found.differs
        assert all(text in str(caught.value) for text in found.differs)
    assert compare(old, table(steady, policy={"rounds": 2, "seed": 9})).differs == ()


@pytest.mark.parametrize("threshold", [0.0, -0.05, 10.0, math.nan])
def test_a_threshold_or_a_confidence_out_of_range_is_one_line(threshold: float) -> None:
    old = table(row("a", [1.0, 1.001]))
    with pytest.raises(UsageError, match="the threshold must lie between"):
        compare(old, old, threshold=threshold)
    with pytest.raises(UsageError, match="the confidence must lie between"):
        compare(old, old, confidence=1 + abs(threshold))
    with pytest.raises(UsageError, match="nothing to compare across is called 'clock'"):
        compare(old, old, across=["clock"])
