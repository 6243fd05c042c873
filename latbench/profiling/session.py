"""One session of measuring: chunks of jobs, shuffled and interleaved, with a canary, until each meets the plan."""

from __future__ import annotations

import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from latbench.errors import MeasurementError
from latbench.graph.ir import GraphBuilder
from latbench.graph.ops import Conv2d, ReLU
from latbench.measure.base import Launcher, Measurement, Request, SamplingPlan
from latbench.profiling.jobs import Artifact, GraphJob, Job, chunks, estimate_s, n_blocks
from latbench.profiling.rows import Progress
from latbench.profiling.scratch import room_bytes, scratch
from latbench.tables import Row

CHUNK_S = 30.0  # work that is interleaved, and lost to a budget that ends within it
ALONE_CHUNK_S = 3600.0  # of networks and chains: neighbours press on the cache for minutes, all shall see the same
CHUNK_BYTES = 1 << 30  # of models
EXTRA_ROUNDS = 4  # more blocks of samples, in one more process, that a row may get when the plan is not met


class SessionLauncher(Launcher, Protocol):
    """A launcher that says under which conditions its workers run."""

    @property
    def conditions(self) -> Mapping[str, object]: ...

    def prepare(self, workers: int) -> None:
        """Starts workers beside what the parent does next."""
        ...


class Reporter(Protocol):
    """Who wants to know how far a session is."""

    def advance(self, done_s: float, total_s: float, rows: int, n_rows: int) -> None:
        """Estimated seconds of work done and in all; rows complete and in all."""
        ...


@dataclass
class Session:
    """Measures jobs on one launcher. `record` is told every measurement before it counts (the spool)."""

    launcher: SessionLauncher
    plan: SamplingPlan
    artifact: Artifact
    clock_ref_us: float | None
    record: Callable[[Measurement], None] = lambda measurement: None
    reporter: Reporter | None = None
    deadline: float = float("inf")  # time.monotonic()
    progress: dict[str, Progress] = field(default_factory=dict)  # by key of the graph that runs
    canary_ms: list[tuple[int, float]] = field(default_factory=list)  # (order, at the reference clock)
    recent: set[str] = field(default_factory=set)  # keys measured since drift was last judged
    order: int = 0
    judged: int = 0  # drift among the canaries before this order is known
    finished: set[str] = field(default_factory=set)  # keys whose row is final

    def restore(self, measurements: Iterable[Measurement]) -> None:
        """Takes what an earlier, interrupted session measured."""
        run = 0
        for measurement in measurements:
            if measurement.run != run:  # as then: drift is judged at the end of each worker process
                self._flag_drift()
                run = measurement.run
            self._take(measurement)
            self.order = max(self.order, measurement.order + 1)

    def measure(self, jobs: Sequence[Job]) -> bool:
        """Measures `jobs`, each distinct graph once. False where the deadline came first: some have no progress."""
        distinct = list({job.key: job for job in jobs}.values())
        random.Random(self.plan.seed).shuffle(distinct)
        blocks = {job.key for job in jobs if job.row.kind == "block"}  # some of them are chains of one, too
        todo = [job for job in distinct if not self.complete(job.key)]
        total_s = sum(estimate_s(job, self.plan) for job in distinct)
        done_s = before_s = total_s - sum(estimate_s(job, self.plan) for job in todo)
        begin, pace = time.monotonic(), 1.3  # seconds of wall time per estimated second
        share_s, alone_bytes = (self.deadline - begin) / 8, max(CHUNK_BYTES, room_bytes())
        alone = sorted((job for job in todo if job.alone), key=lambda job: job.key not in blocks)
        parts = deque(
            [
                *chunks([job for job in todo if not job.alone], self.plan, min(CHUNK_S, share_s), CHUNK_BYTES),
                *chunks(alone, self.plan, min(ALONE_CHUNK_S, share_s), alone_bytes),
            ]
        )
        while parts:
            part = parts.popleft()
            part_s = sum(estimate_s(job, self.plan) for job in part)
            if time.monotonic() + pace * part_s > self.deadline:  # as much of it as there is time for
                if len(part) == 1:
                    return False
                half = len(part) // 2
                parts.extendleft((part[half:], part[:half]))
                continue
            with scratch(max(CHUNK_BYTES, sum(job.nbytes for job in part))) as folder:
                for share in self._measure_part(part, folder):
                    if self.reporter is not None:
                        self.reporter.advance(done_s + share * part_s, total_s, len(self.finished), len(distinct))
            done_s += part_s
            pace = (time.monotonic() - begin) / (done_s - before_s)
        return True

    def _measure_part(self, part: Sequence[Job], folder: Path) -> Iterator[float]:
        """Measures a chunk to its end; gives the share of it that is done, after every measurement."""
        self.launcher.prepare(self.plan.runs + 1)
        paths = {}
        for job in [*part, CANARY]:
            paths[job.key] = folder / f"{job.key}.{'json' if self.artifact == 'graph' else 'onnx'}"
            try:
                job.write(paths[job.key], self.artifact, self.plan.seed)
            except OSError as error:
                raise MeasurementError(
                    f"cannot write a model to {folder}: {error.strerror}; make room there, or set TMPDIR to a folder "
                    "that has some"
                ) from None
        n_done, n_requests = 0, sum(n_blocks(job, self.plan) for job in part)
        for run in range(self.plan.runs + 1):
            first = self.order
            for measurement in self.launcher.measure(self._requests(part, paths, run)):
                self.record(measurement)
                self._take(measurement)
                n_done += 1
                yield min(1.0, n_done / n_requests)
            if self.order > first:  # a run that an earlier session did has been judged
                self._flag_drift()
        for job in part:  # no more tries: what there is becomes the row
            self.progress[job.key].closed = True
            self.finished.add(job.key)

    def _requests(self, part: Sequence[Job], paths: Mapping[str, Path], run: int) -> Iterator[Request]:
        """The requests of one worker process: rounds over the rows that need it, each in an order of its own."""
        extra = run == self.plan.runs
        jobs = {job.key: job for job in (*part, CANARY)}
        since_canary, first = self.plan.canary_every, self.order
        more = max(n_blocks(job, self.plan) for job in part) - self.plan.runs * self.plan.rounds
        for index in range(max(EXTRA_ROUNDS, more) if extra else self.plan.rounds):
            keys = [
                job.key
                for job in part
                if not extra or ((job.alone or index < EXTRA_ROUNDS) and not self.complete(job.key))
            ]
            random.Random(f"{self.plan.seed}/{run}/{index}/{self.order}").shuffle(keys)
            for key in keys:
                progress = self.progress.get(key)
                if progress and (progress.failure or any((b.run, b.round) == (run, index) for b in progress.blocks)):
                    continue
                if self.plan.canary_every and since_canary >= self.plan.canary_every:
                    yield self._request(CANARY.key, paths, run, index, jobs)
                    since_canary = 0
                since_canary += 1
                yield self._request(key, paths, run, index, jobs)
        if self.plan.canary_every and self.order > first:  # after a resume there may be nothing left to ask for
            yield self._request(CANARY.key, paths, run, index + 1, jobs)

    def _request(self, key: str, paths: Mapping[str, Path], run: int, index: int, jobs: Mapping[str, Job]) -> Request:
        self.order += 1
        job = jobs[key]
        return Request(key, str(paths[key]), run, index, job.plan(self.plan), self.order - 1, job.alone)

    def _take(self, measurement: Measurement) -> None:
        progress = self.progress.setdefault(measurement.key, Progress(self.plan, self.clock_ref_us))
        progress.add(measurement)
        self.recent.add(measurement.key)
        if measurement.key != CANARY.key:
            self._settle(measurement.key)
        elif measurement.status == "ok":
            at_reference = progress.at_reference(measurement)
            self.canary_ms.append((measurement.order, statistics.median(at_reference)))

    def _settle(self, key: str) -> None:
        """Keeps `finished` up to date after a row's progress changed."""
        progress = self.progress[key]
        if progress.closed or progress.done() or progress.time_s >= self.plan.max_time_s:
            self.finished.add(key)
        else:
            self.finished.discard(key)

    def complete(self, key: str) -> bool:
        """Whether the row of this graph is final: the plan met, its time spent, or failed."""
        return key in self.finished

    def _flag_drift(self) -> None:
        """Flags what was measured since the last call between two canaries that both lie off the session's median."""
        first_order, self.judged = self.judged, self.order
        keys, self.recent = self.recent - {CANARY.key}, set()
        if len(self.canary_ms) < 3:
            return
        centre = statistics.median(ms for _, ms in self.canary_ms)
        recent = [(order, ms) for order, ms in self.canary_ms if order >= first_order]
        for (start, before), (end, after) in pairwise(recent):
            if min(abs(before / centre - 1), abs(after / centre - 1)) > self.plan.canary_drift:
                for key in keys:
                    self.progress[key].flag("drift", lambda b, orders=range(start, end + 1): b.order in orders)  # type: ignore[misc]
                    self._settle(key)

    def canary_notes(self) -> dict[str, float]:
        """How steady the reference block was."""
        return steadiness([ms for _, ms in self.canary_ms])


def steadiness(canary_ms: Sequence[float]) -> dict[str, float]:
    """Of visits to the reference block: n, their median, relative spread (5-95 %), worst deviation from the median."""
    if len(canary_ms) < 3:
        return {"n": float(len(canary_ms))}
    values = sorted(canary_ms)
    centre = statistics.median(values)
    low, high = values[int(0.05 * (len(values) - 1))], values[round(0.95 * (len(values) - 1))]
    worst = max(abs(v / centre - 1) for v in values)
    return {"n": float(len(values)), "median_ms": centre, "spread": (high - low) / centre, "worst": worst}


def _canary() -> GraphJob:
    """A 3x3 convolution of 32 channels at 28x28: compute-bound, about 0.1 ms on a CPU core."""
    b = GraphBuilder()
    x = b.input("x", (1, 32, 28, 28))
    x = b.add(Conv2d(32, 32, 3, padding=1, bias=True), x, name="conv")
    graph = b.build(b.add(ReLU(), x, name="relu"))
    return GraphJob(graph, Row(key=graph.key, kind="stub", signature=graph.signature, block_type="canary"))


CANARY = _canary()
