"""The statistics of comparisons: against simulated truth, brute force, and the promises that they make."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from made_comparisons import row, simulated, table

from latbench.compare import compare
from latbench.compare.statistics import CERTAIN, adjust, moderate, region_tests
from latbench.compare.timings import WIDENED, timings
from latbench.measure.statistics import PROCESS_TERM
from latbench.tables import Row

P_VALUES = arrays(np.float64, st.integers(1, 30), elements=st.floats(0, 1))


@pytest.mark.parametrize("slow_mode", [0.0, 0.04])
def test_intervals_cover_the_true_ratio_and_claims_keep_their_promise(slow_mode: float) -> None:
    rng = np.random.default_rng(7)
    covered, false, n = 0, 0, 0
    for ratio in (0.97, 1.0, 1.05):  # 1.05 is the threshold itself: the likeliest to be called SLOWER wrongly
        found = compare(*simulated(rng, 400, ratio, slow_mode=slow_mode))
        covered += sum(one.low <= ratio <= one.high for one in found.rows)
        false += found.counts["SLOWER"] + found.counts["FASTER"]
        n += len(found.rows)
    assert 0.93 <= covered / n <= 0.99
    assert false / n <= 0.01


def test_two_passes_over_the_same_rows_claim_nothing() -> None:
    rng = np.random.default_rng(2)
    claims = [compare(*simulated(rng, 100, 1.0, slow_mode=0.03)).counts for _ in range(30)]
    assert sum(one["SLOWER"] + one["FASTER"] for one in claims) == 0
    assert np.mean([one["SAME"] for one in claims]) > 95


@pytest.mark.parametrize(("slow_mode", "beyond"), [(0.0, 1.08), (0.03, 1.08), (0.03, 1.05)])
def test_of_the_changes_claimed_no_more_are_false_than_stated(slow_mode: float, beyond: float) -> None:
    rng = np.random.default_rng(5)
    proportions, found = [], 0
    for _ in range(60):
        real = (rng.random(100) < 0.2) & (beyond > 1.05)
        within = np.where(rng.random(100) < 0.5, 1.05, 1 / 1.05)  # all at the border, where a claim is likeliest
        rows = compare(*simulated(rng, 100, np.where(real, beyond, within), slow_mode=slow_mode)).rows
        claimed = {one.key: one.verdict for one in rows if one.verdict in ("SLOWER", "FASTER")}
        right = sum(verdict == "SLOWER" and real[int(key[1:])] for key, verdict in claimed.items())
        proportions.append((len(claimed) - right) / max(len(claimed), 1))
        found += right
    assert np.mean(proportions) <= 0.05 + 2 * np.std(proportions) / math.sqrt(60)
    assert np.mean(proportions) <= 0.1
    assert found > 300 or beyond == 1.05


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_timings_are_the_lower_half_of_the_block_medians(seed: int, probed: bool) -> None:
    """Against the same said in loops, over rows whose blocks differ in number, size and flags."""
    rng = np.random.default_rng(seed)
    rows, expected = [], []
    for i in range(6):
        sizes = rng.integers(1, 6, rng.integers(2, 7)).tolist()
        blocks = [rng.uniform(1, 2, n) for n in sizes]
        flags = ["drift" if rng.random() < 0.3 else "" for _ in sizes]
        probes = [rng.uniform(5, 7, rng.integers(1, 4)) for _ in sizes]
        at = [np.sort([0, *rng.integers(1, n + 1, len(p) - 1)]) for n, p in zip(sizes, probes, strict=True)]
        more = {"probes_us": tuple(np.concatenate(probes)), "probe_at": tuple(np.concatenate(at).tolist())}
        rows.append(
            Row(
                f"k{i}", "block", "s", latency_ms=1.0, clock="host", samples_ms=tuple(np.concatenate(blocks)),
                block_sizes=tuple(sizes), block_flags=tuple(flags), **(more if probed else {}),
            )
        )  # fmt: skip
        if probed:
            blocks = [
                b * 6.0 / np.interp(np.arange(len(b)) + 0.5, a, p) for b, a, p in zip(blocks, at, probes, strict=True)
            ]
        used = [b for b, f in zip(blocks, flags, strict=True) if not f] or blocks
        medians = sorted(float(np.median(b)) for b in used)
        expected.append(np.mean(medians[: len(medians) // 2]) if len(medians) > 1 else np.nan)
    found = timings(table(*rows, clock_ref_us=6.5), 6.0)
    assert found.value_ms == pytest.approx(np.array(expected), nan_ok=True, rel=1e-12)
    known = ~np.isnan(found.value_ms)
    assert (found.process[known] == PROCESS_TERM).all()
    assert np.isfinite(found.spread[known]).all()


@pytest.mark.parametrize("n", [2, 3, 4, 7, 12, 13, 30])
def test_the_error_of_the_lower_half_is_that_of_gaussian_blocks(n: int) -> None:
    rng = np.random.default_rng(n)
    blocks = 1 + 0.01 * rng.standard_normal((4000, n))
    found = timings(table(*(row(f"k{i}", b.tolist()) for i, b in enumerate(blocks))), None)
    assert (found.share / WIDENED * found.spread).mean() == pytest.approx(np.log(found.value_ms).var(), rel=0.1)
    dof = 2 * found.spread.mean() ** 2 / found.spread.var()
    assert found.dof[0] == pytest.approx(dof, rel=0.15)


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
