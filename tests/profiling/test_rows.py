"""From blocks to a row, and from a sandwich to its increment, by hand-made figures."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latbench.measure.base import Measurement, SamplingPlan
from latbench.profiling.rows import Progress, finish, increment
from latbench.tables import Row

ROW = Row("k", "block", "s", context="sandwich", stubs=("a", "b"))
PLAN = SamplingPlan()


def block(*samples_ms: float, run: int = 0, index: int = 0, probe_us: float = 0.0, **rest: object) -> Measurement:
    probes = {"probes_us": (probe_us,) * 2, "probe_at": (0, len(samples_ms))} if probe_us else {}
    raw = {"samples_ms": samples_ms, **probes, **rest}
    return Measurement("k", run, index, **raw)  # type: ignore[arg-type]


def progress(*blocks: Measurement, clock_ref_us: float | None = None, plan: SamplingPlan = PLAN) -> Progress:
    made = Progress(plan, clock_ref_us)
    for one in blocks:
        made.add(one)
    return made


def test_a_latency_is_the_mean_of_the_lower_half_of_block_medians() -> None:
    """(1, 2, 9), (3), (4, 5), (6): medians 2, 3, 4.5, 6. One long block does not outvote a short one."""
    row = finish(ROW, progress(block(1, 2, 9), block(6), block(4, 5, run=1), block(3, run=1)))
    assert (row.latency_ms, row.gross_ms) == (2.5, 2.5)
    assert (row.n_samples, row.n_blocks, row.n_runs) == (7, 4, 2)  # all are kept and told


def test_a_latency_on_a_devices_own_clock_is_the_median_of_block_medians() -> None:
    """(1, 2, 9), (3), (4, 5): medians 2, 3, 4.5. One long block does not outvote two short ones."""
    own = replace(PLAN, alone_processes=0)
    row = finish(ROW, progress(block(1, 2, 9), block(3), block(4, 5, run=1), plan=own))
    assert (row.latency_ms, row.gross_ms) == (3, 3)
    assert (row.min_ms, row.mean_ms) == (1, 4)
    assert row.std_ms == pytest.approx(np.std([1, 2, 9, 3, 4, 5], ddof=1))
    assert (row.n_samples, row.n_blocks, row.n_runs) == (6, 3, 2)
    assert row.run_spread == pytest.approx((4.5 - 2.5) / 3)  # medians of the runs' samples: 2.5 and 4.5
    assert row.samples_ms == (1, 2, 9, 3, 4, 5)
    assert (row.block_sizes, row.block_run) == ((3, 1, 2), (0, 0, 1))
    assert row.warnings == ("few_samples", "noise>ci")


def test_the_reference_clock_scales_each_block_by_its_own_probe() -> None:
    """At a clock 10 % slow both probe and model take 10 % longer."""
    blocks = [block(1.0, probe_us=6.0), block(1.1, probe_us=6.6), block(0.9, probe_us=5.4)]
    row = finish(ROW, progress(*blocks, clock_ref_us=6.0))
    assert row.latency_ms == 1.0
    assert row.latency_ref_ms == pytest.approx(1.0)
    assert row.probes_us == (6.0, 6.0, 6.6, 6.6, 5.4, 5.4)
    assert row.probe_at == (0, 1) * 3
    assert row.ci_low_ms is not None
    assert row.ci_high_ms is not None
    assert row.ci_high_ms - row.ci_low_ms == pytest.approx(2 * 1.96 * 0.003)  # the process term alone: blocks agree


def test_without_a_probe_there_is_no_reference_latency() -> None:
    row = finish(ROW, progress(block(1.0, 1.1), block(1.0, 1.1)))
    assert row.latency_ref_ms is None
    assert row.clock_probe_us is None
    assert row.probes_us == ()


def test_every_figure_can_be_recomputed_from_the_row() -> None:
    rng = np.random.default_rng(0)
    flags = [(), ("foreign_load",), (), (), ("near_timer_floor",), ()]
    blocks = [
        block(*rng.lognormal(size=9).tolist(), run=i // 2, index=i % 2, probe_us=6 + 0.1 * i, warnings=flags[i])
        for i in range(6)
    ]
    row = finish(ROW, progress(*blocks, clock_ref_us=6.0))
    parts = np.split(np.array(row.samples_ms), np.cumsum(row.block_sizes)[:-1])
    used = [i for i, flag in enumerate(row.block_flags) if not flag]
    assert used == [0, 2, 3, 4, 5]
    medians = {i: float(np.median(parts[i])) for i in used}
    starts = [i for i, at in enumerate(row.probe_at) if at == 0]
    probes = np.split(np.array(row.probes_us), starts[1:])
    at_reference = {i: medians[i] * 6.0 / probes[i].mean() for i in used}
    lower = sorted(used, key=at_reference.__getitem__)[: len(used) // 2]
    assert row.latency_ref_ms == pytest.approx(np.mean([at_reference[i] for i in lower]))
    assert row.latency_ms == pytest.approx(np.mean([medians[i] for i in lower]))
    assert row.p90_ms == pytest.approx(np.quantile(np.concatenate([parts[i] for i in used]), 0.9))
    assert row.p99_ms is None  # 45 samples
    assert row.warnings == ("foreign_load", "near_timer_floor", "noise>ci")


def test_a_simulated_row_has_no_interval_and_says_so() -> None:
    row = finish(ROW, progress(*[block(2.0, 2.0)] * 4), origin="simulated")
    assert (row.latency_ms, row.ci_low_ms, row.ci_high_ms) == (2.0, 2.0, 2.0)
    assert row.origin == "simulated"
    assert "noise>ci" not in row.warnings


@pytest.mark.parametrize("status", ["error", "timeout"])
def test_the_first_failure_is_the_row(status: str) -> None:
    bad = Measurement("k", 1, 0, status=status, stage="warmup", error="first", started_at=7.0)  # type: ignore[arg-type]
    row = finish(ROW, progress(block(1.0), bad, replace(bad, error="second"), block(1.0)))
    assert (row.status, row.stage, row.error, row.started_at) == (status, "warmup", "first", 7.0)
    assert (row.latency_ms, row.samples_ms, row.stop_reason) == (None, (), "error")


def test_no_blocks_are_a_failed_row() -> None:
    assert finish(ROW, progress()).error == "no samples"


def test_what_was_said_of_the_blocks_is_in_the_row() -> None:
    said = [{"launch": "graph", "h2d_ms": 0.1, "sm_clock_mhz": clock} for clock in (1500.0, 1400.0, 1450.0)]
    row = finish(ROW, progress(*(block(1.0, index=i, conditions=one) for i, one in enumerate(said))))
    assert row.conditions is not None
    assert json.loads(row.conditions) == {"launch": "graph", "h2d_ms": 0.1, "sm_clock_mhz": 1450.0}
    assert finish(ROW, progress(block(1.0))).conditions is None
    mixed = [block(1.0, index=i, conditions={"launch": word}) for i, word in enumerate(("graph", "eager: no"))]
    assert json.loads(finish(ROW, progress(*mixed)).conditions or "") == {"launch": "graph; eager: no"}


def measured(key: str, latency_ms: float, half: float, *, ref: float | None = None, **rest: object) -> Row:
    centre = latency_ms if ref is None else ref
    figures = {"latency_ms": latency_ms, "latency_ref_ms": ref, "ci_low_ms": centre - half, "ci_high_ms": centre + half}
    return Row(key, "stub", "s", gross_ms=latency_ms, **{**figures, **rest})  # type: ignore[arg-type]


def test_an_increment_is_the_sandwich_less_half_of_each_stub() -> None:
    sandwich = replace(measured("k", 10.0, 0.3, ref=9.0), kind="block", context="sandwich", stubs=("a", "b"))
    stubs = {"a": measured("a", 2.0, 0.2, ref=1.8), "b": measured("b", 4.0, 0.6, ref=3.8)}
    row = increment(sandwich, stubs)
    assert row.latency_ms == pytest.approx(10 - 1 - 2)
    assert row.latency_ref_ms == pytest.approx(9 - 0.9 - 1.9)
    assert row.gross_ms == 10.0
    half = math.sqrt(0.3**2 + 0.1**2 + 0.3**2)
    assert (row.ci_low_ms, row.ci_high_ms) == pytest.approx((6.2 - half, 6.2 + half))


@given(st.floats(0.1, 1), st.floats(0.1, 9))
def test_one_stub_on_both_sides_is_subtracted_whole(sandwich_ms: float, stub_ms: float) -> None:
    row = replace(measured("k", sandwich_ms, 0.01), kind="block", context="sandwich", stubs=("a", "a"))
    assert increment(row, {"a": measured("a", stub_ms, 0.01)}).latency_ms == pytest.approx(sandwich_ms - stub_ms)


def test_an_increment_without_its_stub_is_a_failed_row() -> None:
    sandwich = replace(measured("k", 10.0, 0.3), kind="block", context="sandwich", stubs=("a", "b"))
    good, bad = measured("a", 2.0, 0.1), Row("b", "stub", "s", status="error", error="no room")
    for stubs, why in [
        ({"a": good, "b": bad}, "its stub b failed: no room"),
        ({"a": good}, "its stub b was not measured"),
    ]:
        row = increment(sandwich, stubs)
        assert (row.status, row.error, row.latency_ms, row.ci_low_ms) == ("error", why, None, None)


def test_rows_without_stubs_and_failed_rows_pass_through() -> None:
    alone = measured("k", 1.0, 0.1)
    failed = Row("k", "block", "s", context="sandwich", stubs=("a",), status="timeout")
    assert increment(alone, {}) is alone
    assert increment(failed, {}) is failed
