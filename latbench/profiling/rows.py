"""From the blocks of samples of one graph to its row; from a sandwich and its stubs to a block's increment."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from latbench.measure.base import Measurement, SamplingPlan
from latbench.measure.statistics import CRITERIA, PROCESS_TERM, Estimate, estimate, percentile, quieter_half, quietest
from latbench.tables import Row

THROTTLED = 1 / 0.9  # probe time over the session's beyond which a block ran at less than 90 % of the clock
FLAGS = ("foreign_load", "throttled", "drift")  # a block with one of these is left out where others remain


class Progress:
    """The blocks of samples of one graph so far."""

    def __init__(self, plan: SamplingPlan, clock_ref_us: float | None) -> None:
        self.plan, self.clock_ref_us = plan, clock_ref_us
        self.blocks: list[Measurement] = []
        self.failure: Measurement | None = None
        self.closed = False  # nothing more will be measured

    def add(self, measurement: Measurement) -> None:
        """Takes a block, or a failure: the first failure ends the row."""
        if measurement.status != "ok":
            self.failure = self.failure or measurement
            self.closed = True
            return
        slow = self.clock_ref_us and _probe_us(measurement) > THROTTLED * self.clock_ref_us
        if slow and "throttled" not in measurement.warnings:
            measurement = replace(measurement, warnings=(*measurement.warnings, "throttled"))
        self.blocks.append(measurement)

    def flag(self, warning: str, where: Callable[[Measurement], bool]) -> None:
        """Flags the blocks that `where` says."""
        self.blocks = [
            replace(b, warnings=(*b.warnings, warning)) if where(b) and warning not in b.warnings else b
            for b in self.blocks
        ]

    @property
    def by_process(self) -> bool:
        """Whether the quietest processes count: of what is alone in each."""
        return self.plan.alone_processes > 0 and all(b.fresh for b in self.blocks)

    @property
    def used(self) -> list[Measurement]:
        """The blocks that count: those without a flag, or all: where every one has, or the quietest are sought."""
        return (not self.by_process and [b for b in self.blocks if not flags(b)]) or self.blocks

    def estimates(self) -> tuple[Estimate, Estimate]:
        """As measured, and at the session's reference clock with the interval of later processes."""
        raw, reference = [b.samples_ms for b in self.used], [self.at_reference(b) for b in self.used]
        if not self.plan.alone_processes:
            return estimate(raw), estimate(reference, process_term=PROCESS_TERM)
        quiet = quietest if self.by_process else quieter_half
        chosen, found = quiet(reference, process_term=PROCESS_TERM)
        ms = float(np.mean([np.median(raw[i]) for i in chosen]))
        return Estimate(ms, ms, ms), found

    @property
    def time_s(self) -> float:
        """Timed inference so far, flagged blocks included."""
        return sum(sum(b.samples_ms) * b.repeat for b in self.blocks) / 1e3

    def at_reference(self, block: Measurement) -> list[float]:
        """The block's samples at the session's reference clock, ms; as measured where there is no probe.

        The clock between two probes is interpolated.
        """
        if not self.clock_ref_us or not block.probes_us:
            return list(block.samples_ms)
        probe_us = np.interp(np.arange(len(block.samples_ms)) + 0.5, block.probe_at, block.probes_us)
        reference: list[float] = (np.asarray(block.samples_ms) * self.clock_ref_us / probe_us).tolist()
        return reference

    def done(self) -> bool:
        """Whether the plan is met: enough unflagged blocks and inference time, and the criterion content."""
        if self.by_process:
            return len(self.blocks) >= max(self.plan.alone_processes, self.plan.rounds * self.plan.runs)
        clean = [b for b in self.blocks if not flags(b)]
        if len(clean) < self.plan.rounds * self.plan.runs or self.time_s < self.plan.min_time_s * 0.9:
            return False
        criterion = CRITERIA[self.plan.criterion](self.plan)
        for block in clean:
            criterion.add(self.at_reference(block))
        return criterion.done()

    def stop_reason(self) -> str:
        """converged | timeout | max_samples | throttled | error."""
        if not self.blocks:
            return "error"
        if all("throttled" in b.warnings for b in self.blocks):
            return "throttled"
        if self.done():
            return "converged"
        return "max_samples" if sum(len(b.samples_ms) for b in self.blocks) >= self.plan.max_samples else "timeout"


def conditions(blocks: Sequence[Measurement]) -> str | None:
    """JSON of what was said of the blocks: medians of numbers, words once each; None where nothing was said."""
    said: dict[str, list[float | str]] = {}
    for block in blocks:
        for name, value in block.conditions.items():
            said.setdefault(name, []).append(value)
    found: dict[str, float | str] = {}
    for name, values in said.items():
        numbers = [value for value in values if not isinstance(value, str)]
        words = dict.fromkeys(value for value in values if isinstance(value, str))
        found[name] = float(np.median(numbers)) if numbers else "; ".join(words)
    return json.dumps(found) if found else None


def flags(block: Measurement) -> tuple[str, ...]:
    """The warnings that speak against a block."""
    return tuple(w for w in block.warnings if w in FLAGS)


def _probe_us(block: Measurement) -> float:
    return float(np.mean(block.probes_us)) if block.probes_us else 0.0


def finish(row: Row, progress: Progress, *, origin: str = "measured") -> Row:
    """The row with its figures, gross: a sandwich's stubs are still in it. A failure becomes a failed row."""
    if progress.failure is not None or not progress.blocks:
        failure = progress.failure or Measurement(row.key, 0, 0, status="error", error="no samples")
        return replace(
            row,
            status=failure.status,
            stage=failure.stage,
            error=failure.error,
            started_at=failure.started_at or None,
            stop_reason="error",
        )
    blocks, used = progress.blocks, progress.used
    raw, ref = progress.estimates()
    probed = progress.clock_ref_us is not None
    simulated = origin == "simulated"
    interval = Estimate(raw.value, raw.value, raw.value) if simulated else ref
    samples = np.concatenate([b.samples_ms for b in used])
    processes = list(dict.fromkeys((b.run, b.pid) for b in blocks))
    runs = {(b.run, b.pid) for b in used}
    medians = [float(np.median(np.concatenate([b.samples_ms for b in used if (b.run, b.pid) == one]))) for one in runs]
    noisy = not simulated and interval.relative_half_width > max(progress.plan.precision, PROCESS_TERM * 2)
    warnings = {w for b in blocks for w in b.warnings} | ({"noise>ci"} if noisy else set())
    if len(samples) < progress.plan.min_samples:
        warnings.add("few_samples")
    return replace(
        row,
        latency_ms=raw.value,
        latency_ref_ms=ref.value if probed else None,
        ci_low_ms=interval.low,
        ci_high_ms=interval.high,
        gross_ms=raw.value,
        gross_ref_ms=ref.value if probed else None,
        mean_ms=float(samples.mean()),
        std_ms=float(samples.std(ddof=1)) if len(samples) > 1 else None,
        min_ms=float(samples.min()),
        p90_ms=percentile(samples, 0.90),
        p99_ms=percentile(samples, 0.99),
        n_samples=len(samples),
        n_blocks=len(used),
        n_runs=len(runs),
        run_spread=(max(medians) - min(medians)) / raw.value,
        repeat=used[0].repeat,
        clock=used[0].clock,
        clock_probe_us=float(np.median([_probe_us(b) for b in used])) if probed else None,
        order=blocks[0].order,
        started_at=blocks[0].started_at,
        stop_reason=progress.stop_reason(),
        first_inference_ms=blocks[0].first_inference_ms,
        load_ms=float(np.median([b.load_ms for b in blocks])),
        cache_probe_us=float(np.median(cache_us)) if (cache_us := [us for b in used for us in b.cache_us]) else None,
        wait_ms=sum(b.wait_ms for b in blocks),
        peak_memory_bytes=max(b.peak_memory_bytes for b in blocks) or None,
        warnings=tuple(sorted(warnings)),
        conditions=conditions(used),
        origin="simulated" if simulated else "measured",
        samples_ms=tuple(s for b in blocks for s in b.samples_ms),
        block_sizes=tuple(len(b.samples_ms) for b in blocks),
        block_run=tuple(processes.index((b.run, b.pid)) for b in blocks),
        probes_us=tuple(p for b in blocks for p in b.probes_us),
        probe_at=tuple(i for b in blocks for i in b.probe_at),
        block_flags=tuple("+".join(flags(b)) for b in blocks),
    )


def increment(row: Row, stubs: Mapping[str, Row]) -> Row:
    """A sandwich's row less half of each of its stubs; intervals add in quadrature. A failed stub fails the row."""
    if row.status != "ok" or not row.stubs:
        return row
    around = [stubs.get(key) for key in row.stubs]
    for key, one in zip(row.stubs, around, strict=True):
        if one is None or one.status != "ok":
            why = "was not measured" if one is None else f"failed: {one.error}"
            lost = dict.fromkeys(("latency_ms", "latency_ref_ms", "ci_low_ms", "ci_high_ms"))
            return replace(row, **lost, status="error", stage="measure", error=f"its stub {key} {why}")  # type: ignore[arg-type]
    parts = [one for one in around if one is not None]
    assert row.latency_ms is not None
    latency_ms = row.latency_ms - _half(one.latency_ms for one in parts)
    ref_ms = None if row.latency_ref_ms is None else row.latency_ref_ms - _half(one.latency_ref_ms for one in parts)
    centre = latency_ms if ref_ms is None else ref_ms
    half = math.hypot(_half_width(row), *(0.5 * _half_width(one) for one in parts))
    return replace(row, latency_ms=latency_ms, latency_ref_ms=ref_ms, ci_low_ms=centre - half, ci_high_ms=centre + half)


def _half(values: Iterable[float | None]) -> float:
    return 0.5 * sum(v for v in values if v is not None)


def _half_width(row: Row) -> float:
    return 0.0 if row.ci_low_ms is None or row.ci_high_ms is None else (row.ci_high_ms - row.ci_low_ms) / 2
