"""Intervals against sources whose median is known, exact binomials from scipy, and the real stopping rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom, norm

from latbench.errors import UsageError
from latbench.measure.base import Measurement, SamplingPlan
from latbench.measure.statistics import (
    CRITERIA,
    PROCESS_TERM,
    estimate,
    median_interval,
    percentile,
    quieter_half,
    quietest,
)
from latbench.profiling.rows import Progress, finish
from latbench.profiling.session import EXTRA_ROUNDS
from latbench.tables import Row

PLAN = SamplingPlan()
MAX_BLOCKS = PLAN.rounds * PLAN.runs + EXTRA_ROUNDS

Floats = NDArray[np.float64]
Source = Callable[[np.random.Generator, int], Floats]  # (generator, samples a block) -> (MAX_BLOCKS, samples), median 1

PROBE_US = 6.0  # of the reference clock


def gaussian(rng: np.random.Generator, n: int) -> Floats:
    return 1 + 0.05 * rng.standard_normal((MAX_BLOCKS, n))


def log_normal(rng: np.random.Generator, n: int) -> Floats:
    return np.exp(0.2 * rng.standard_normal((MAX_BLOCKS, n)))


def bimodal(rng: np.random.Generator, n: int) -> Floats:
    """65 % around one mode, 35 % a fifth above: the median lies inside the lower mode."""
    upper = 0.2 * (rng.random((MAX_BLOCKS, n)) > 0.65)
    return 1 - 0.02 * float(norm.ppf(0.5 / 0.65)) + upper + 0.02 * rng.standard_normal((MAX_BLOCKS, n))


def autoregressive_clock(rng: np.random.Generator) -> Floats:
    """Wanders by 2 %, and between two blocks forgets all but a twentieth of where it was."""
    rho, clock = math.exp(-3.0), [rng.standard_normal()]
    for _ in range(MAX_BLOCKS - 1):
        clock.append(rho * clock[-1] + math.sqrt(1 - rho**2) * rng.standard_normal())
    return 1 + 0.02 * np.array(clock)


def random_walk_clock(rng: np.random.Generator) -> Floats:
    """Wanders off from where it was, by 0.5 % from block to block."""
    return np.exp(0.005 * np.cumsum(rng.standard_normal(MAX_BLOCKS)))


def sinusoidal_clock(rng: np.random.Generator) -> Floats:
    """Swings by 4 %; blocks come at moments that know nothing of its period."""
    times = rng.uniform(0, 1) + np.cumsum(rng.uniform(2, 5, MAX_BLOCKS))
    return np.asarray(1 + 0.04 * np.sin(2 * math.pi * times))


def sample_row(blocks: Floats, plan: SamplingPlan = PLAN, probes_us: Floats | None = None) -> Progress:
    """What a session does with one row: run x round blocks, then extra ones while the plan is not met."""
    progress = Progress(plan, None if probes_us is None else PROBE_US)
    planned = plan.runs * plan.rounds
    for i in range(planned + EXTRA_ROUNDS):
        if i >= planned and (progress.done() or progress.time_s >= plan.max_time_s):
            break
        samples: Any = blocks[i]  # an array: quicker than the tuple that it stands for
        probes: dict[str, Any] = {}
        if probes_us is not None:
            probes = {"probes_us": (float(probes_us[i]),) * 2, "probe_at": (0, len(samples))}
        progress.add(Measurement("k", i // plan.rounds, i % plan.rounds, samples_ms=samples, **probes))
    return progress


def coverage(rows: Iterable[Progress]) -> float:
    """Share of rows whose interval holds 1."""
    found = [estimate([row.at_reference(block) for block in row.blocks]) for row in rows]
    return float(np.mean([one.low <= 1 <= one.high for one in found]))


@pytest.mark.parametrize("n", [30, 60])
@pytest.mark.parametrize("source", [gaussian, log_normal, bimodal])
def test_intervals_under_the_stopping_rule_cover_the_true_median(source: Source, n: int) -> None:
    rng = np.random.default_rng(7)
    assert 0.93 <= coverage(sample_row(source(rng, n)) for _ in range(3000)) <= 0.97


@pytest.mark.parametrize("clock", [autoregressive_clock, random_walk_clock, sinusoidal_clock])
def test_intervals_cover_the_true_median_while_the_clock_drifts(clock: Callable[[np.random.Generator], Floats]) -> None:
    """Constant within a block, another in the next; the probe tells it up to 0.35 % (MEASUREMENT.md)."""
    rng = np.random.default_rng(7)

    def row() -> Progress:
        slowness = clock(rng)
        samples = slowness[:, None] * (1 + 0.03 * rng.standard_normal((MAX_BLOCKS, 20)))
        return sample_row(samples, probes_us=PROBE_US * slowness * (1 + 0.0035 * rng.standard_normal(MAX_BLOCKS)))

    assert 0.93 <= coverage(row() for _ in range(3000)) <= 0.97


def test_without_a_probe_a_wandering_clock_still_widens_the_interval() -> None:
    """Blocks far apart in time carry the drift between them: samples taken in one go would not."""
    rng = np.random.default_rng(7)

    def samples() -> Floats:
        return autoregressive_clock(rng)[:, None] * (1 + 0.01 * rng.standard_normal((MAX_BLOCKS, 50)))

    apart = coverage(sample_row(samples()) for _ in range(3000))
    together = np.mean([low <= 1 <= high for low, high in (median_interval(samples()[0]) for _ in range(1000))])
    assert 0.91 <= apart <= 0.97
    assert together < 0.3


@pytest.mark.parametrize("n", [10, 20, 51])
@pytest.mark.parametrize("source", [gaussian, log_normal, bimodal])
def test_the_interval_of_one_block_covers_the_true_median(source: Source, n: int) -> None:
    rng = np.random.default_rng(1)
    blocks = np.concatenate([source(rng, n) for _ in range(500)])
    covered = [low <= 1 <= high for low, high in map(median_interval, blocks)]
    assert 0.93 <= float(np.mean(covered)) <= 0.97


@given(st.integers(6, 400), st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_one_blocks_interval_lies_between_two_exact_binomial_ones(n: int, confidence: float) -> None:
    """Of order statistics k and n + 1 - k, exact coverage 1 - 2 P(Binomial(n, 1/2) < k), by scipy."""
    exact = {k: 1 - 2 * float(binom.cdf(k - 1, n, 0.5)) for k in range(1, n // 2 + 1)}
    wide = max((k for k, c in exact.items() if c >= confidence), default=1)
    low, high = median_interval(range(1, n + 1), confidence)  # sample k is the number k
    assert math.isclose(low + high, n + 1)
    assert wide <= low <= min(wide + 1, n // 2) + 1e-9
    if exact[wide] < confidence:  # too few samples for it: their range
        assert (low, high) == (1, n)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=60))
def test_an_interval_holds_its_median_and_lies_within_the_samples(samples: list[float]) -> None:
    low, high = median_interval(samples)
    median, rounding = float(np.median(samples)), 1 + 1e-12
    assert min(samples) / rounding <= low <= median * rounding
    assert median / rounding <= high <= max(samples) * rounding


@given(st.lists(st.lists(st.floats(0.5, 2.0), min_size=1, max_size=9), min_size=1, max_size=9), st.floats(0.1, 50))
def test_an_estimate_scales_with_its_unit_and_forgets_the_order(blocks: list[list[float]], scale: float) -> None:
    one = estimate(blocks)
    scaled = estimate([[scale * s for s in b] for b in reversed(blocks)])
    assert scaled.value == pytest.approx(scale * one.value)
    assert scaled.high - scaled.low == pytest.approx(scale * (one.high - one.low), abs=1e-9)
    assert one.low <= one.value <= one.high


def test_a_process_term_widens_in_quadrature() -> None:
    blocks = [[1.0, 1.01], [1.02, 1.03], [0.99, 1.0], [1.0, 1.02]]
    without, with_term = estimate(blocks), estimate(blocks, process_term=PROCESS_TERM)
    half = (with_term.high - with_term.low) / 2
    assert half == pytest.approx(math.hypot((without.high - without.low) / 2, 1.96 * PROCESS_TERM * without.value))
    assert with_term.value == without.value


def test_equal_blocks_have_an_interval_of_one_point() -> None:
    assert estimate([[2.0] * 5] * 4).relative_half_width == 0


@pytest.mark.parametrize("n", [2, 4, 8, 20])
def test_the_quietest_processes_of_another_session_lie_within_the_interval(n: int) -> None:
    rng = np.random.default_rng(n)
    draws = 1 + 0.05 * rng.exponential(size=(4000, 2, n))  # what neighbours add
    inside = []
    for one, other in draws:
        chosen, found = quietest([[ms] for ms in one])
        assert sorted(one[chosen]) == sorted(one)[: max(1, round(n / 4))]
        assert found.value == pytest.approx(one[chosen].mean())
        inside.append(found.low <= quietest([[ms] for ms in other])[1].value <= found.high)
    assert 0.94 < np.mean(inside) < 0.97


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_the_quieter_half_of_another_session_lies_within_the_interval_more_often_than_its_median(n: int) -> None:
    rng = np.random.default_rng(n)
    quiet, median = [], []
    for one, other in 1 + 0.05 * rng.exponential(size=(4000, 2, n)):
        chosen, found = quieter_half([[ms] for ms in one])
        assert sorted(one[chosen]) == sorted(one)[: max(1, n // 2)]
        assert found.value == pytest.approx(one[chosen].mean())
        around = estimate([[ms] for ms in one])
        assert found.high - found.low == pytest.approx(around.high - around.low)
        quiet.append(found.low <= quieter_half([[ms] for ms in other])[1].value <= found.high)
        median.append(around.low <= np.median(other) <= around.high)
    assert np.mean(quiet) > 0.91
    assert np.mean(quiet) > np.mean(median) + 0.02


def test_the_quieter_half_of_one_block_is_its_median() -> None:
    assert quieter_half([[1.0, 2.0, 4.0]]) == ([0], estimate([[1.0, 2.0, 4.0]]))
    assert quieter_half([[], [3.0, 3.0], [2.0, 2.0]])[0] == [2]
    with pytest.raises(ValueError, match="no samples"):
        quieter_half([[], []])


def test_the_quietest_of_one_process_is_its_median() -> None:
    assert quietest([[1.0, 2.0, 4.0]]) == ([0], estimate([[1.0, 2.0, 4.0]]))
    assert quietest([[], [3.0, 3.0], [2.0, 2.0]])[0] == [2]
    with pytest.raises(ValueError, match="no samples"):
        quietest([[], []])


def test_no_samples_are_no_estimate() -> None:
    with pytest.raises(ValueError, match="no samples"):
        estimate([[], []])


@pytest.mark.parametrize(("q", "least"), [(0.9, 29), (0.95, 59), (0.99, 299)])
def test_percentiles_are_withheld_below_honest_counts(q: float, least: int) -> None:
    """The least n with a sample above the q-quantile in 95 % of cases, by the binomial distribution."""
    assert 1 - binom.cdf(0, least, 1 - q) >= 0.95 > 1 - binom.cdf(0, least - 1, 1 - q)
    x = np.arange(least, dtype=float)
    assert percentile(x[1:], q) is None
    assert percentile(x, q) == pytest.approx(q * (least - 1))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from(sorted(CRITERIA)),
    st.floats(0.01, 2.0),
    st.floats(1e-4, 2.0),
    st.integers(0, 2**32 - 1),
)
def test_sampling_ends_within_its_budget_on_a_source_that_never_settles(
    runs: int, rounds: int, criterion: Any, max_time_s: float, latency_s: float, seed: int
) -> None:
    """Cauchy noise: no interval of it gets narrow, its deviation grows without end."""
    plan = SamplingPlan(
        criterion=criterion, runs=runs, rounds=rounds, precision=1e-6, max_time_s=max_time_s, min_time_s=0.01
    )
    rng = np.random.default_rng(seed)
    most = runs * rounds + EXTRA_ROUNDS
    latencies = 1e3 * latency_s * (1 + np.abs(rng.standard_cauchy((most, 20))))
    progress = sample_row(latencies, plan)
    assert len(progress.blocks) <= most
    before_last = sum(float(np.sum(b.samples_ms)) for b in progress.blocks[:-1]) / 1e3
    assert len(progress.blocks) <= runs * rounds or before_last < max_time_s
    row = finish(Row("k", "block", "s"), replace_samples(progress))
    assert row.stop_reason in ("converged", "timeout")
    assert (row.stop_reason == "converged") == progress.done()


def replace_samples(progress: Progress) -> Progress:
    progress.blocks = [replace(b, samples_ms=tuple(map(float, b.samples_ms))) for b in progress.blocks]
    return progress


def fed(name: Any, *blocks: list[float], **plan: Any) -> bool:
    criterion = CRITERIA[name](SamplingPlan(criterion=name, **plan))
    for block in blocks:
        criterion.add(block)
    return criterion.done()


def test_ci_median_waits_for_precision_and_for_samples() -> None:
    steady = [[1.0, 1.001, 0.999]] * 4
    assert fed("ci-median", *steady, min_samples=12)
    assert not fed("ci-median", *steady, min_samples=13)
    apart = [[1.0] * 9, [1.1] * 9, [0.9] * 9]
    assert not fed("ci-median", *apart, precision=0.02)
    assert fed("ci-median", *apart, precision=0.9)


@given(st.lists(st.floats(0.9, 1.1), min_size=10, max_size=30), st.floats(0.001, 0.2))
def test_stdrel_is_the_deviation_over_the_mean(samples: list[float], precision: float) -> None:
    share = float(np.std(samples, ddof=1) / np.mean(samples))
    if not math.isclose(share, precision, rel_tol=1e-9):
        assert fed("stdrel", samples[:4], samples[4:], precision=precision) == (share < precision)
    assert not fed("stdrel", samples[:9], precision=0.9)  # too few


def test_samples_counts_and_duration_takes_what_the_plan_asks_for() -> None:
    assert not fed("samples", [1.0] * 5, [1.0] * 4)
    assert fed("samples", [1.0] * 5, [9.0] * 5)
    assert not fed("duration")
    assert fed("duration", [1.0])


def test_a_criterion_is_asked_of_the_blocks_of_the_plan_only() -> None:
    """Fewer blocks than runs x rounds, or less time than min_time_s, are never enough."""
    steady = np.full((MAX_BLOCKS, 20), 1.0)  # ms
    assert len(sample_row(steady).blocks) == PLAN.runs * PLAN.rounds
    patient = replace(PLAN, min_time_s=0.15)
    assert len(sample_row(steady, patient).blocks) == 7  # 20 ms each: 0.135 s is reached by the seventh


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"criterion": "entropy"}, "unknown criterion 'entropy'"),
        ({"sweep_bytes": -1}, "sweep_bytes must lie between"),
        ({"precision": 0.0}, "between 0 and 1"),
        ({"precision": float("nan")}, "between 0 and 1"),
        ({"confidence": 1.0}, "between 0 and 1"),
        ({"runs": 0}, "at least 1"),
        ({"rounds": 0}, "at least 1"),
        ({"min_samples": 0}, "at least 1"),
        ({"min_samples": 20, "max_samples": 19}, "a maximum is below its minimum"),
        ({"min_time_s": 2.0}, "a maximum is below its minimum"),
        ({"block_s": 0.0}, "must be positive"),
        ({"load_limit_s": 0.0}, "must be positive"),
    ],
)
def test_unknown_or_contradictory_plans_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        SamplingPlan(**given)
    with pytest.raises(TypeError, match="no_such"):
        SamplingPlan(no_such=1)  # type: ignore[call-arg]
