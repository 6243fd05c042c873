"""From blocks of samples to an estimate, its interval, and the decision to stop. Pure: no clock, no device.

A row is sampled in blocks that lie apart in time and in different processes, because the errors that matter (clock,
memory placement, neighbours) are between blocks and processes, not within one loop: an interval over consecutive
samples is 10 to 100 times too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc, stdtrit

from latbench.measure.base import SamplingPlan

Floats = NDArray[np.float64]

# How much wider than Student's t of the mean the 80 % interval of the median of n Gaussian draws is, for n = 0, 1, 2...
# (simulated, 3.2e6 draws; the limit is sqrt(pi / 2)). At 95 % it is 2-5 % less: stopping early needs the difference.
_MEDIAN_FACTOR = (1.0, 1.0, 1.0, 1.090, 1.066, 1.158, 1.114, 1.188, 1.143, 1.203, 1.163, 1.212, 1.175)

# What a new process or a new hour adds and no block of this session can show; MEASUREMENT.md: with it intervals cover
# 91-93 % of later passes, without it 78-86 %.
PROCESS_TERM = 0.003
N_SPACINGS = 4  # between the lowest of several processes, that tell how far they may be off


@dataclass(frozen=True)
class Estimate:
    """A latency and its confidence interval, in ms."""

    value: float
    low: float
    high: float

    @property
    def relative_half_width(self) -> float:
        return (self.high - self.low) / 2 / self.value if self.value > 0 else math.inf


def estimate(blocks: Sequence[Sequence[float]], confidence: float = 0.95, process_term: float = 0.0) -> Estimate:
    """Median of block medians with its interval, in the blocks' unit.

    Two or more blocks: Student's t over the block medians, widened in quadrature by `process_term` (relative).
    One block: the interpolated order-statistics interval of its samples. Raises ValueError without samples.
    """
    medians = np.array([float(np.median(b)) for b in blocks if len(b)])
    if not len(medians):
        raise ValueError("no samples")
    n = len(medians)
    value = float(np.median(medians))
    if n == 1:
        low, high = median_interval(next(b for b in blocks if len(b)), confidence)
        low_half, high_half = value - low, high - value
    else:
        factor = _MEDIAN_FACTOR[n] if n < len(_MEDIAN_FACTOR) else math.sqrt(math.pi / 2)
        t = float(stdtrit(n - 1, (1 + confidence) / 2))
        low_half = high_half = t * factor * float(medians.std(ddof=1)) / math.sqrt(n)
    widen = 1.96 * process_term * value
    return Estimate(value, value - math.hypot(low_half, widen), value + math.hypot(high_half, widen))


def quieter_half(
    blocks: Sequence[Sequence[float]], confidence: float = 0.95, process_term: float = 0.0
) -> tuple[list[int], Estimate]:
    """The half of the blocks with the lowest medians; their mean, with the interval of the median around it.

    For blocks that share their processes with others: noise adds time, so the lower half repeats better than the
    median, and the interval, as wide as the median's, holds the next session's value more often: of four Gaussian
    block medians in 87 % (the median's in 89 %), of exponential ones in 94 % (87 %), of two modes in 93 % (83 %).
    Of one block its median. Raises ValueError without samples.
    """
    medians = np.array([float(np.median(b)) if len(b) else math.inf for b in blocks])
    around = estimate(blocks, confidence, process_term)
    n = int(np.isfinite(medians).sum())
    chosen: list[int] = np.argsort(medians, kind="stable")[: max(1, n // 2)].tolist()
    if n == 1:
        return chosen, around
    value = float(medians[chosen].mean())
    low, high = value - (around.value - around.low), value + (around.high - around.value)
    return chosen, Estimate(value, low, high)


def quietest(
    processes: Sequence[Sequence[float]], confidence: float = 0.95, process_term: float = 0.0
) -> tuple[list[int], Estimate]:
    """The processes of the lowest medians, a quarter; their mean, with the interval where another session's falls.

    For what is measured alone in each of n processes: neighbours and a bad placement of its memory add time, by up to
    20 % and for as long as the process lives, so medians spread upwards from the undisturbed latency. Near it they lie
    about as exponential draws do: spacings, each times how many medians lie above, are independent draws of one scale
    (Renyi 1953). Fewer than six processes: the lowest. Raises ValueError without samples.
    """
    medians = np.array([float(np.median(p)) if len(p) else math.inf for p in processes])
    order = np.argsort(medians, kind="stable")[: int(np.isfinite(medians).sum())]
    if not len(order):
        raise ValueError("no samples")
    n, k = len(order), max(1, round(len(order) / 4))
    chosen, x = order[:k].tolist(), medians[order]
    if n == 1:
        return chosen, estimate([processes[chosen[0]]], confidence, process_term)
    value, spacings = float(x[:k].mean()), np.diff(x[: 1 + N_SPACINGS])
    m = len(spacings)
    scale = float(((n - 1 - np.arange(m)) * spacings).mean())
    spread = math.sqrt(sum(((k - i) / k / (n - i)) ** 2 for i in range(k))) * scale  # of `value`
    quantile = m * ((1 - confidence) ** (-1 / m) - 1)  # of two lowest's difference, a Laplace variable, by m spacings
    half = math.hypot(quantile * spread, 1.96 * process_term * value)
    return chosen, Estimate(value, value - half, value + half)


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Distribution-free interval of the median of independent samples, interpolated between order statistics.

    Hettmansperger and Sheather 1986: plain order statistics are too wide for small n (n = 10: 97.9 % or 89.1 %).
    With too few samples for `confidence` (fewer than 6 at 95 %) the range of the samples.
    """
    x = np.sort(np.asarray(samples, dtype=np.float64))
    n = len(x)

    def coverage(k: int) -> float:  # of [x_k, x_(n+1-k)], k = 1 .. n/2: 1 - 2 P(Binomial(n, 1/2) < k)
        return 1 - 2 * float(betainc(n - k + 1, k, 0.5))

    k = 1
    while k + 1 <= n // 2 and coverage(k + 1) >= confidence:
        k += 1
    if n < 2 or coverage(k) < confidence or k + 1 > n // 2:
        return float(x[k - 1]), float(x[n - k])
    wide, narrow = coverage(k), coverage(k + 1)
    share = (wide - confidence) / (wide - narrow)
    weight = (n - k) * share / (k + (n - 2 * k) * share)
    low = (1 - weight) * x[k - 1] + weight * x[k]
    high = (1 - weight) * x[n - k] + weight * x[n - k - 1]
    return float(low), float(high)


def percentile(samples: Floats, q: float, confidence: float = 0.95) -> float | None:
    """The q-quantile (0.9 for p90), or None where too few samples stand behind it.

    n samples hold one above the true quantile with this confidence only if 1 - q**n >= confidence:
    29 samples for p90, 59 for p95, 299 for p99.
    """
    if len(samples) < math.ceil(math.log(1 - confidence) / math.log(q)):
        return None
    return float(np.quantile(samples, q))


class Criterion(Protocol):
    """Decides when a row has been sampled enough."""

    def add(self, block: Sequence[float]) -> None:
        """Takes one block of samples, ms."""
        ...

    def done(self) -> bool: ...


class CiMedian:
    """The interval of the median is within `precision` of it, from at least `min_samples` samples."""

    def __init__(self, plan: SamplingPlan) -> None:
        self.plan = plan
        self.blocks: list[Sequence[float]] = []

    def add(self, block: Sequence[float]) -> None:
        self.blocks.append(block)

    def done(self) -> bool:
        if sum(map(len, self.blocks)) < self.plan.min_samples:
            return False
        return estimate(self.blocks, self.plan.confidence).relative_half_width <= self.plan.precision


class StdRel:
    """The relative standard deviation of all samples is at most `precision`, as nvbench's stdrel."""

    def __init__(self, plan: SamplingPlan) -> None:
        self.plan = plan
        self.samples: list[float] = []

    def add(self, block: Sequence[float]) -> None:
        self.samples.extend(block)

    def done(self) -> bool:
        if len(self.samples) < self.plan.min_samples:
            return False
        x = np.asarray(self.samples)
        return bool(x.std(ddof=1) <= self.plan.precision * x.mean())


class Samples:
    """`min_samples` samples were taken."""

    def __init__(self, plan: SamplingPlan) -> None:
        self.plan = plan
        self.n = 0

    def add(self, block: Sequence[float]) -> None:
        self.n += len(block)

    def done(self) -> bool:
        return self.n >= self.plan.min_samples


class Duration:
    """Every block that the plan asks for was taken; `min_time_s` is checked for every criterion."""

    def __init__(self, plan: SamplingPlan) -> None:
        self.any = False

    def add(self, block: Sequence[float]) -> None:
        self.any = True

    def done(self) -> bool:
        return self.any


CRITERIA: dict[str, Callable[[SamplingPlan], Criterion]] = {
    "ci-median": CiMedian,
    "stdrel": StdRel,
    "samples": Samples,
    "duration": Duration,
}
