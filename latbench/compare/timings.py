"""What a comparison needs of each row of a table: how long its quieter half takes, and how well that is known.

Whatever disturbs a measurement makes it longer, and much of it comes in two modes: weights are in the shared cache or a
neighbour has driven them out. The median of four block medians falls on either side as it happens. The mean of their
lower half does not, and so two passes over the same rows agree better (95th percentile of the difference: 1.3 % against
2.1 %). Its variance comes from the lower half and one block more, as of Gaussian blocks, and is taken a quarter larger:
with two modes, claims keep their promise so. A slowdown that fewer than half of a row's blocks see is not seen here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from latbench.compare.statistics import CERTAIN, Floats
from latbench.measure.statistics import PROCESS_TERM
from latbench.tables import LatencyTable

Integers = NDArray[np.int64]

# Of n = 2 .. 12 unit Gaussians: the variance of the mean of the n // 2 lowest, the mean of the variance of the
# n // 2 + 1 lowest, and the degrees of freedom of the latter (2 mean^2 / variance). 1.6e6 draws each.
_LOWER_HALF = np.array([
    (0.6816, 1.0005, 1.00), (0.5592, 0.5848, 0.86), (0.3357, 0.6327, 1.75), (0.3023, 0.4960, 1.61),
    (0.2237, 0.5324, 2.44), (0.2082, 0.4572, 2.30), (0.1680, 0.4862, 3.10), (0.1592, 0.4355, 2.95),
    (0.1348, 0.4605, 3.76), (0.1288, 0.4222, 3.61), (0.1126, 0.4434, 4.40),
])  # fmt: skip
WIDENED = 1.25
_COLUMNS = ("samples_ms", "block_sizes", "probes_us", "probe_at", "block_flags")


@dataclass(frozen=True)
class Timings:
    """(N,) each. A row without a positive latency, or of which nothing tells the error, has NaN for `value_ms`."""

    value_ms: Floats
    spread: Floats  # squared, relative: of single blocks, or of the value where only its interval is stored
    share: Floats  # of `spread` in the squared error of the value
    dof: Floats  # degrees of freedom behind `spread`
    process: Floats  # relative error that no block of its session can show


def timings(table: LatencyTable, clock_us: float | None) -> Timings:
    """Of every row, at the clock whose probe takes `clock_us` where the samples were probed, else at that which ran.

    From the samples of the blocks that count (see ``profiling.rows``) where there are two or more, else from the
    stored interval.
    """
    found = _from_intervals(table, clock_us)
    first = 0
    measured = (table.frame_of("origin")["origin"] == "measured").to_numpy(bool)
    for batch in table.ragged(*_COLUMNS):
        n_rows = len(batch["block_sizes"][1]) - 1
        medians, row_of = _block_medians(batch, clock_us)
        for n, rows, blocks in _by_length(medians, np.bincount(row_of, minlength=n_rows)):
            if n < 2:
                continue
            blocks.sort(axis=1)
            lower = blocks[:, : n // 2].mean(1)
            variance = blocks[:, : n // 2 + 1].var(1, ddof=1)
            share, mean, dof = _lower_half(n)
            at = first + rows
            found.value_ms[at] = np.where(lower > 0, lower, np.nan)
            with np.errstate(divide="ignore", invalid="ignore"):
                found.spread[at] = variance / mean / lower**2
            found.share[at], found.dof[at] = WIDENED * share, dof
            found.process[at] = PROCESS_TERM * measured[at]
        first += n_rows
    return found


def _from_intervals(table: LatencyTable, clock_us: float | None) -> Timings:
    """A stored interval holds the process term, and its half-width is taken as 1.96 errors."""
    frame = table.frame_of("latency_ms", "latency_ref_ms", "ci_low_ms", "ci_high_ms").astype(np.float64)
    raw, ref = frame["latency_ms"].to_numpy(), frame["latency_ref_ms"].to_numpy()
    centre = np.where(np.isnan(ref), raw, ref)
    scale = clock_us / table.provenance.clock_ref_us if clock_us and table.provenance.clock_ref_us else 1.0
    value = np.where(np.isnan(ref), raw, scale * ref if clock_us else raw)
    half = (frame["ci_high_ms"] - frame["ci_low_ms"]).to_numpy() / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        error = half / centre / float(stdtrit(CERTAIN, 0.975))
    good = (value > 0) & (centre > 0) & np.isfinite(error)
    n = len(frame)
    return Timings(np.where(good, value, np.nan), error**2, np.ones(n), np.full(n, CERTAIN), np.zeros(n))


def _block_medians(
    batch: dict[str, tuple[NDArray[np.float64], Integers]], clock_us: float | None
) -> tuple[Floats, Integers]:
    """(B,) medians of the blocks that count, ms, and their rows: blocks without a flag, or all where each has one."""
    samples, of_samples = batch["samples_ms"]
    sizes, of_blocks = batch["block_sizes"]
    flags, of_flags = batch["block_flags"]
    n_blocks = np.diff(of_blocks)
    # a row whose parts do not fit together (an older table, an import) has no blocks
    ends = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    fits = (ends[of_blocks[1:]] - ends[of_blocks[:-1]] == np.diff(of_samples)) & (np.diff(of_flags) == n_blocks)
    row_of = np.repeat(np.arange(len(n_blocks)), n_blocks)
    sizes = sizes[fits[row_of]].astype(np.int64)
    samples = samples[np.repeat(fits, np.diff(of_samples))]
    clean = flags[np.repeat(fits, np.diff(of_flags))].astype(str) == ""
    row_of = row_of[fits[row_of]]
    if clock_us:
        samples = samples * _clock_ratio(batch, clock_us, sizes, row_of)
    medians = np.full(len(sizes), np.nan)
    for n, blocks, values in _by_length(samples, sizes):
        medians[blocks] = np.median(values, axis=1) if n else np.nan
    any_clean = np.bincount(row_of, clean & (sizes > 0), len(n_blocks)) > 0
    counts = (sizes > 0) & (clean | ~any_clean[row_of])
    return medians[counts], row_of[counts]


def _clock_ratio(
    batch: dict[str, tuple[NDArray[np.float64], Integers]], clock_us: float, sizes: Integers, row_of: Integers
) -> Floats:
    """(S,) what each sample is multiplied with: `clock_us` over the probe, interpolated between those of its block.

    1 where a row was not probed. A probe behind 0 samples begins the next block.
    """
    probes, of_probes = batch["probes_us"]
    at, of_at = batch["probe_at"]
    n_rows = len(of_probes) - 1
    row_of_at = np.repeat(np.arange(n_rows), np.diff(of_at))
    begins = at == 0
    probed = np.bincount(row_of_at, begins, n_rows) == np.bincount(row_of, minlength=n_rows)
    probed &= (np.diff(of_probes) == np.diff(of_at)) & (np.diff(of_at) > 0)
    ratio = np.ones(int(sizes.sum()))
    held, block_held = probed[row_of_at], probed[row_of]
    if not held.any():
        return ratio
    y, at = probes[np.repeat(probed, np.diff(of_probes))], at[held]
    block = np.cumsum(begins[held]) - 1
    room = float(
        max(sizes.max(), at.max()) + 2
    )  # blocks end to end: one's probes say nothing of the next one's samples
    last = np.flatnonzero(np.append(block[1:] != block[:-1], True))
    where = np.concatenate([block * room + at, block[last] * room + room - 1])
    order = np.argsort(where, kind="stable")
    x, y = where[order], np.concatenate([y, y[last]])[order]
    counts = sizes[block_held]
    number = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(number)) - np.repeat(np.cumsum(counts) - counts, counts)
    ratio[np.repeat(block_held, sizes)] = clock_us / np.interp(number * room + within + 0.5, x, y)
    return ratio


def _by_length(values: Floats, lengths: Integers) -> Iterator[tuple[int, Integers, Floats]]:
    """Lists end to end -> (n, which lists are n long, (M, n) of their values), for each n."""
    starts = np.cumsum(lengths) - lengths
    for n in np.unique(lengths).tolist():
        which = np.flatnonzero(lengths == n)
        yield n, which, values[starts[which][:, None] + np.arange(n)]


def _lower_half(n: int) -> tuple[float, float, float]:
    """As ``_LOWER_HALF``; for many blocks the limits of a half normal distribution, to 1 %."""
    if n - 2 < len(_LOWER_HALF):
        variance, mean, dof = _LOWER_HALF[n - 2].tolist()
        return variance, mean, dof
    return 1.36 / n, 1 - 2 / np.pi + 0.92 / n, n / 3
