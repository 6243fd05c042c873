"""What crosses the pipe between parent and worker: the plan, a request, a measurement.

Light on purpose: both sides import it, and the worker's interpreter may be Python 3.9 with numpy and one runtime.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from latbench.backends.base import Scalar
from latbench.errors import UsageError

COLD_SWEEP_BYTES = 64 << 20  # beyond the last-level cache that one core can fill
MAX_SWEEP_BYTES = 1 << 30


@dataclass(frozen=True)
class SamplingPlan:
    """How a row is sampled, and when that ends. Durations in seconds, shares as fractions.

    A row is measured in *blocks* of samples: each block loads the model anew, warms it up and samples for `block_s`.
    `rounds` blocks are taken in each of `runs` worker processes, interleaved with the blocks of other rows; more
    follow while the criterion asks for them and `max_time_s` of timed inference is not spent. Networks and chains get a
    process for each block. On a host's clock neighbours only add time: the lower half of a row's blocks counts, and of
    networks and chains the quietest quarter of `alone_processes` or more processes; on a device's own the median does.
    """

    criterion: Literal["ci-median", "stdrel", "samples", "duration"] = "ci-median"
    precision: float = 0.02  # relative half-width (ci-median) or std/mean (stdrel) to reach
    confidence: float = 0.95
    min_samples: int = 10
    max_samples: int = 100_000
    min_time_s: float = 0.02  # timed inference per row, all blocks together
    max_time_s: float = 1.0
    block_s: float = 0.005  # timed inference per block
    rounds: int = 2  # blocks per run and row
    runs: int = 2  # worker processes per row
    warmup_s: float = 0.001
    warmup_runs: int = 2
    max_warmup_s: float = 0.5
    timer_share: float = 0.001  # of a sample that reading the clock may cost; sets `repeat`
    alone_processes: int = 12  # of a network or chain; 0: as many as blocks, and the median of either counts
    sweep_bytes: int = 0  # other memory read between two inferences; 0: the caches stay warm
    load_limit_s: float = 120.0  # limits per stage: past them the worker is killed and the row says where
    warmup_limit_s: float = 60.0
    measure_limit_s: float = 120.0
    canary_every: int = 64  # requests between two measurements of the reference block; 0: never
    canary_drift: float = 0.03  # relative drift of it beyond which the blocks between are measured again
    seed: int = 0  # order of the requests, input values

    def __post_init__(self) -> None:
        if self.criterion not in ("ci-median", "stdrel", "samples", "duration"):
            raise UsageError(f"unknown criterion {self.criterion!r}: ci-median, stdrel, samples or duration")
        if not 0 < self.precision < 1 or not 0 < self.confidence < 1:
            raise UsageError("precision and confidence must lie between 0 and 1")
        if min(self.min_samples, self.rounds, self.runs, self.warmup_runs) < 1:
            raise UsageError("min_samples, rounds, runs and warmup_runs must be at least 1")
        if self.max_samples < self.min_samples or self.max_time_s < self.min_time_s:
            raise UsageError("a maximum is below its minimum")
        if min(self.block_s, self.max_time_s, self.load_limit_s, self.warmup_limit_s, self.measure_limit_s) <= 0:
            raise UsageError("block_s, max_time_s and the limits must be positive")
        if not 0 <= self.alone_processes <= 1000:
            raise UsageError(f"alone_processes must lie between 0 and 1000, got {self.alone_processes}")
        if not 0 <= self.sweep_bytes <= MAX_SWEEP_BYTES:
            raise UsageError(f"sweep_bytes must lie between 0 and {MAX_SWEEP_BYTES}, got {self.sweep_bytes}")


@dataclass(frozen=True)
class Request:
    """One block of samples to take."""

    key: str  # of the graph that runs
    artifact: str  # path readable by the worker
    run: int  # 0 .. plan.runs - 1: which worker process
    round: int  # which block of that run
    plan: SamplingPlan
    order: int = 0  # position in the session
    fresh: bool = False  # in a worker process that has loaded nothing before

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**vars(self), "plan": vars(self.plan)}


@dataclass(frozen=True)
class Measurement:
    """One block of samples, or the reason why there is none: a failed measurement is a value."""

    key: str
    run: int
    round: int
    order: int = 0
    pid: int = 0  # of the worker process; 0: unknown
    fresh: bool = False  # that process has loaded nothing else
    status: Literal["ok", "error", "timeout"] = "ok"
    samples_ms: tuple[float, ...] = ()  # per inference, in order, warm-up left out, none deleted
    repeat: int = 1  # inferences per sample
    clock: str = "host"  # host | cuda_event | model
    started_at: float = 0.0  # Unix time, s, of the first sample
    load_ms: float = 0.0  # building the session or engine
    first_inference_ms: float = 0.0
    warmup_ms: float = 0.0
    probes_us: tuple[float, ...] = ()  # clock probes before, amid and behind the samples; empty: no probe here
    probe_at: tuple[int, ...] = ()  # how many samples were taken before each probe
    cache_us: tuple[float, ...] = ()  # cache probes before and behind the samples; empty: not asked for
    wait_ms: float = 0.0  # time the worker waited for a core during the samples
    peak_memory_bytes: int = 0  # of the worker process
    conditions: Mapping[str, float | str] = field(
        default_factory=dict
    )  # of this block: launch, enqueue_ms, sm_clock_mhz
    warnings: tuple[str, ...] = ()  # throttled, foreign_load, near_timer_floor, ...
    stage: str | None = None  # where it failed: load | warmup | measure
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Measurement:
        """Inverse of ``to_dict``; raises TypeError on unknown fields."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        return cls(**values)


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker process is told once, before its first request."""

    backend: str  # "module:Class"
    options: Mapping[str, Scalar] = field(default_factory=dict)
    cpus: tuple[int, ...] = ()  # affinity; empty: as inherited
    calibrate_s: float = 0.0  # how long to watch the clock first, to say what it is in this session


class Launcher(Protocol):
    """Takes requests to a device and brings measurements back."""

    def measure(self, requests: Iterable[Request]) -> Iterator[Measurement]:
        """One Measurement per Request, in order, as they finish; crashes and time-outs come back as values."""
        ...
