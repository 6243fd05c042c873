"""Comparisons: scripted tables with known changes, simulated ones with known truth, two stored passes of 200 blocks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_comparisons import row, simulated, slower, table

from latbench.compare import Comparison, compare
from latbench.errors import ProvenanceConflictError, TableError, UsageError
from latbench.tables import LatencyTable, Row

DATA = Path(__file__).parent / "data"


def verdicts(found: Comparison) -> dict[str, str]:
    return {one.key: one.verdict for one in found.rows}


@pytest.fixture(scope="module")
def passes() -> tuple[LatencyTable, LatencyTable]:
    """The first two passes that benchmarks/compare_power.py took over its 200 blocks, eight minutes apart."""
    return LatencyTable.read(DATA / "blocks200-first.parquet"), LatencyTable.read(DATA / "blocks200-second.parquet")


def test_two_passes_over_the_same_blocks_are_the_same(passes: tuple[LatencyTable, LatencyTable]) -> None:
    for old, new in (passes, passes[::-1]):
        found = compare(old, new)
        assert len(found.rows) == 200
        assert found.counts["SAME"] >= 190
        assert found.counts["SLOWER"] == found.counts["FASTER"] == 0
        assert not found.regressed
        assert found.overall[0].low < 1 < found.overall[0].high


@pytest.mark.parametrize("seed", range(10))
def test_ten_per_cent_more_in_twenty_rows_are_found(passes: tuple[LatencyTable, LatencyTable], seed: int) -> None:
    old, new = passes if seed % 2 else passes[::-1]
    keys = set(np.random.default_rng(seed).choice(old.frame["key"].to_numpy(str), 20, replace=False).tolist())
    found = compare(old, slower(new, keys, 1.1))
    named = {key for key, verdict in verdicts(found).items() if verdict == "SLOWER"}
    assert len(named & keys) >= 18
    assert named <= keys
    assert found.regressed


def test_a_change_that_nothing_is_sure_of_is_unsure() -> None:
    rng = np.random.default_rng(1)
    old, new = simulated(rng, 60, 1.0, spread=0.08)
    assert compare(old, new).counts["UNSURE"] > 50


def test_what_disturbs_fewer_than_half_of_the_blocks_is_no_change() -> None:
    steady = [1.0, 1.002, 0.998, 1.001]
    old = table(*(row(f"k{i}", steady) for i in range(12)))
    new = table(*(row(f"k{i}", [1.3, *steady[1:]]) for i in range(12)))
    assert compare(old, new).counts["SAME"] == 12
    most = table(*(row(f"k{i}", [1.3, 1.301, 1.299, 1.0]) for i in range(12)))
    assert compare(old, most).counts["SAME"] == 0
    whole = table(*(row(f"k{i}", [1.3, 1.302, 1.298, 1.301]) for i in range(12)))
    assert compare(old, whole).counts["SLOWER"] == 12


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


def test_latencies_are_compared_at_one_clock() -> None:
    slow, fast = [1.0, 1.004, 0.998, 1.002], [0.5, 0.502, 0.499, 0.501]
    old = [row(f"k{i}", slow, probes=[6.0] * 4) for i in range(12)]
    new = [row(f"k{i}", fast, probes=[3.0] * 4) for i in range(12)]
    found = compare(table(*old, clock_ref_us=6.0), table(*new, clock_ref_us=3.1))
    assert found.clock == "the reference clock of OLD"
    assert found.counts["SAME"] == 12
    assert found.rows[0].new_ms == pytest.approx(0.999, rel=1e-9)  # of 0.998, 1, 1.002 and 1.004 the lower half
    raw = compare(table(*old, clock_ref_us=6.0), table(*new))
    assert raw.clock == "the clock that ran"
    assert raw.counts["FASTER"] == 12


def test_flagged_blocks_do_not_count_unless_there_are_no_others() -> None:
    good, bad = [1.0, 1.001, 0.999], [9.0]
    old = table(row("a", good * 2))
    mixed = table(row("a", good + bad, flags=["", "", "", "foreign_load"]))
    assert compare(old, mixed).rows[0].new_ms == pytest.approx(1.0, rel=2e-3)
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
        assert all(" ".join(text.split()) in str(caught.value) for text in found.differs)
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
