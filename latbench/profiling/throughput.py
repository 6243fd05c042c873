"""``bench --throughput``: how many inferences a second when several run at once. Never a row of a latency table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast

from latbench.errors import MeasurementError, UsageError
from latbench.measure.base import WorkerSetup
from latbench.measure.launcher import LocalLauncher, cpus_for
from latbench.profiling.bench import Model, bench
from latbench.profiling.profile import Target
from latbench.profiling.session import Reporter

# A sample is 0.1 s of all streams at work (backends.streams); a figure per process takes some of them.
BLOCK_S, WARMUP_S, MIN_TIME_S = 0.5, 0.3, 2.0


@dataclass(frozen=True)
class Throughput:
    """Inferences a second, a batch being one inference, and how long each took meanwhile."""

    model: str
    device_name: str
    backend: str
    versions: Mapping[str, str]
    options: Mapping[str, Any]
    streams: int  # inferences at once
    per_s: float
    low_per_s: float  # 95 % interval
    high_per_s: float
    ms_in_flight: float  # streams / per_s: what one inference takes while the others run (Little's law)
    n_samples: int
    n_runs: int
    run_spread: float
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _StreamsTarget(Target):
    """A target whose workers run the back-end's streams variant."""

    streams: int = 0

    def launcher(self) -> LocalLauncher:
        spec: str = cast(Any, self.backend_class).streams  # a variant is no part of the protocol
        cpus = cpus_for(self.streams * int(self.options.get("threads", 1)))  # of no stream: all there are
        setup = WorkerSetup(spec, {**self.options, "streams": self.streams}, cpus)
        return LocalLauncher(setup, python=self.python) if self.python else LocalLauncher(setup)


def throughput(model: Model, target: Target, streams: int = 0, *, reporter: Reporter | None = None) -> Throughput:
    """Of a model on a target, `streams` inferences at once; 0: as many as the runtime thinks best.

    Raises UsageError where the back-end runs one inference at a time only, MeasurementError where it fails.
    """
    if not hasattr(target.backend_class, "streams"):
        raise UsageError(f"{target.backend} has no throughput mode: onnxruntime, openvino and tensorrt do")
    plan = replace(target.plan, block_s=BLOCK_S, warmup_s=WARMUP_S, min_time_s=min(MIN_TIME_S, target.plan.max_time_s))
    given = {field.name: getattr(target, field.name) for field in fields(Target)}
    found = bench(model, _StreamsTarget(**{**given, "plan": plan}, streams=streams), layers=False, reporter=reporter)
    row, about = found.row, found.table.provenance
    if row.latency_ms is None or row.ci_low_ms is None or row.ci_high_ms is None:
        raise MeasurementError(f"{model.name}: {row.status} in {row.stage}: {row.error}")
    said = [word.removeprefix("streams=") for word in row.warnings if word.startswith("streams=")]
    n, round_ms = int(said[0]), row.latency_ms  # of `n` inferences
    centre_ms = row.latency_ref_ms or round_ms  # what the interval is of
    return Throughput(
        model.name,
        about.device_name,
        target.backend,
        about.versions,
        target.options,
        n,
        per_s=1e3 * n / round_ms,
        low_per_s=1e3 * n / (round_ms * row.ci_high_ms / centre_ms),
        high_per_s=1e3 * n / (round_ms * row.ci_low_ms / centre_ms),
        ms_in_flight=round_ms,
        n_samples=row.n_samples or 0,
        n_runs=row.n_runs or 0,
        run_spread=row.run_spread or 0.0,
        warnings=tuple(word for word in row.warnings if not word.startswith("streams=")),
    )
