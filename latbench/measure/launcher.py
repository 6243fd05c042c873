"""The local launcher: one worker at a time, spawned, on its own pipe, under limits per stage."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from latbench.errors import MeasurementError
from latbench.interpreter import START_LIMIT_S, command, environment
from latbench.measure.base import Measurement, Request, SamplingPlan, WorkerSetup

AHEAD = 2  # requests in the pipe: the worker never waits for the parent's bookkeeping
DEATHS = 5  # of workers at one request, those before they began with it included
CALIBRATE_S = 0.2  # the first worker watches the clock for so long


def cpus_for(threads: int) -> tuple[int, ...]:
    """The CPUs that a worker of `threads` threads is pinned to: the last ones, as interrupts mostly go to the first.

    Empty where the system knows no affinity, or has fewer CPUs than threads.
    """
    if not hasattr(os, "sched_getaffinity"):
        return ()
    allowed = sorted(os.sched_getaffinity(0))
    return tuple(allowed[-threads:]) if threads <= len(allowed) else ()


class LocalLauncher:
    """Measures in worker processes on this machine: a fresh one for every `run`, one at a time.

    A worker that dies is replaced and its request tried once more, then recorded as an error; one that passes the
    limit of its stage is killed with its whole process group, and recorded as a time-out. Use as a context manager:
    leaving it kills the worker, whatever happened. `python` is the worker's interpreter (3.9 or later, with numpy and
    the runtime): of another one's packages it sees this one's latbench only.
    """

    def __init__(self, setup: WorkerSetup, *, python: str = sys.executable) -> None:
        self.setup, self.python = setup, python
        self.conditions: dict[str, Any] = {}  # as the latest worker reported them; the clock as the first saw it
        self._worker: _Worker | None = None
        self._spares: deque[_Worker] = deque()

    def __enter__(self) -> LocalLauncher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()
        while self._spares:
            self._spares.pop().kill()

    def prepare(self, workers: int) -> None:
        """Lets so many workers start beside what the parent does next, before anything is measured.

        Later ones are then at hand at once: a new run, or a crash, costs no start in the midst of measuring.
        """
        while len(self._spares) + (self._worker is not None) < workers:
            self._spares.append(_Worker(self.setup, self.python))

    def start(self) -> dict[str, Any]:
        """Starts a worker where there is none; gives its conditions. Raises MeasurementError where it cannot start."""
        if self._worker is None:
            try:
                self.conditions = {**self.conditions, **self._ready()}
            except BaseException:
                self._stop()
                raise
        return self.conditions

    def _ready(self) -> dict[str, Any]:
        """What a new worker reports; one that dies before it does is replaced once."""
        self._worker = self._spares.popleft() if self.conditions and self._spares else self._new()
        conditions = self._worker.wait_ready()
        if conditions is None:
            self._stop()
            self._worker = self._new()
            conditions = self._worker.wait_ready()
        if conditions is None:
            raise MeasurementError(f"the worker did not start: {self._worker.last_words()}")
        return conditions

    def _new(self) -> _Worker:
        calibrate_s = self.setup.calibrate_s if self.conditions else CALIBRATE_S
        return _Worker(replace(self.setup, calibrate_s=calibrate_s), self.python)

    def measure(self, requests: Iterable[Request]) -> Iterator[Measurement]:
        """One Measurement per Request, in order."""
        source = iter(requests)
        pending: deque[Request] = deque()
        run: int | None = None
        ahead: Request | None = next(source, None)
        while pending or ahead is not None:
            while (
                ahead is not None and len(pending) < AHEAD and (not pending or (ahead.run == run and not ahead.fresh))
            ):
                if run is not None and (ahead.run != run or ahead.fresh):
                    self._stop()
                run = ahead.run
                self.start()
                self._send(ahead)
                pending.append(ahead)
                ahead = next(source, None)
            result = self._result(pending)
            pending.popleft()
            if self._worker is None:
                self._resend(pending)
            yield result
        self._stop()

    def layers(self, artifact: Path, plan: SamplingPlan) -> list[dict[str, Any]] | None:
        """Per-layer times of a model, in a worker of its own; None where the runtime has no profiler."""
        self._stop()
        self.start()
        assert self._worker is not None
        request = Request("layers", str(artifact), 0, 0, plan)
        try:
            self._worker.send({"command": "layers", **request.to_dict()})
            message = self._worker.receive(plan.measure_limit_s)
            if message is None:
                raise MeasurementError(f"the worker of the per-layer pass died ({self._worker.last_words()})")
        except TimeoutError:
            raise MeasurementError(f"the per-layer pass did not end within {plan.measure_limit_s:g} s") from None
        finally:
            self._stop()
        layers: list[dict[str, Any]] | None = message["layers"]
        return layers

    def _send(self, request: Request) -> None:
        assert self._worker is not None
        self._worker.send({"command": "measure", **request.to_dict()})

    def _resend(self, pending: Iterable[Request]) -> None:
        for request in pending:
            self.start()
            self._send(request)

    def _result(self, pending: deque[Request]) -> Measurement:
        """The measurement of the oldest request. Where its worker dies it is asked for once more, in a new one; deaths
        before a worker began with it (of one that stood ready, say) are not its fault."""
        deaths = begun = 0
        while begun < 2 and deaths < DEATHS:
            if deaths:
                self._resend(pending)
            result = self._answer(pending[0])
            if result is not None:
                return result
            deaths += 1
            begun += self._begun
        times = "twice" if deaths == 2 else f"{deaths} times"
        return _failed(pending[0], "error", self._stage, f"the worker died {times} ({self._last_words})")

    def _answer(self, request: Request) -> Measurement | None:
        """The measurement of the oldest request; None when the worker died, and then there is no worker any more."""
        assert self._worker is not None
        plan = request.plan
        limits = {"load": plan.load_limit_s, "warmup": plan.warmup_limit_s, "measure": plan.measure_limit_s}
        self._stage, self._begun, limit = "load", False, plan.load_limit_s
        while True:
            try:
                message = self._worker.receive(limit)
            except TimeoutError:
                self._stop()
                return _failed(request, "timeout", self._stage, f"no answer within {limit:g} s; the worker was killed")
            if message is None:
                self._last_words = self._worker.last_words()
                self._stop()
                return None
            if "stage" in message:
                self._stage, self._begun = message["stage"], True
                limit = limits[self._stage]
            else:
                return Measurement.from_dict(message["measurement"])

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker = None


def _failed(request: Request, status: Literal["error", "timeout"], stage: str, error: str) -> Measurement:
    return Measurement(
        request.key,
        request.run,
        request.round,
        request.order,
        status=status,
        started_at=time.time(),
        stage=stage,
        error=error,
    )


def _pipe(undo: contextlib.ExitStack) -> tuple[int, int]:
    """Both ends, which `undo` closes."""
    ends = os.pipe()
    for end in ends:
        undo.callback(os.close, end)
    return ends


class _Worker:
    """One worker process and its pipe. Raises MeasurementError where the system lets none be made."""

    def __init__(self, setup: WorkerSetup, python: str) -> None:
        with contextlib.ExitStack() as undo:
            try:
                to_read, self._write = _pipe(undo)
                self._read, to_write = _pipe(undo)
                self._stderr = undo.enter_context(tempfile.TemporaryFile())
                self._process = subprocess.Popen(
                    command(python, to_read, to_write, os.getpid()),
                    pass_fds=(to_read, to_write),
                    stdin=subprocess.DEVNULL,
                    stdout=self._stderr,
                    stderr=self._stderr,
                    env=environment(python),
                    start_new_session=True,  # its own process group to kill, its own autogroup to prefer
                )
            except OSError as error:
                raise MeasurementError(f"cannot start a worker: {error.strerror or error}") from None
            undo.pop_all()
        os.close(to_read)
        os.close(to_write)
        self._buffer = b""
        self.send(asdict(setup))

    def send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # a dead worker is noticed where its answer is read
            os.write(self._write, (json.dumps(message) + "\n").encode())

    def receive(self, limit_s: float) -> dict[str, Any] | None:
        """The next message; None when the worker is gone, or said what is no message: its memory is not to be trusted.
        Raises TimeoutError past the limit."""
        deadline = time.monotonic() + limit_s
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            chunk = os.read(self._read, 1 << 20)
            if not chunk:
                return None
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            self._process.kill()
            return None
        return message

    def wait_ready(self) -> dict[str, Any] | None:
        """Its conditions; None where it died. Raises MeasurementError where it refuses, or does not answer."""
        try:
            message = self.receive(START_LIMIT_S)
        except TimeoutError:
            raise MeasurementError(f"the worker did not start within {START_LIMIT_S:g} s") from None
        if message is None:
            return None
        if "failed" in message:
            raise MeasurementError(f"the worker did not start: {message['failed']}")
        conditions: dict[str, Any] = message["ready"]
        return conditions

    def last_words(self) -> str:
        """How it ended, and the last line that it or its runtime printed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        code = self._process.returncode
        how = (
            "still running" if code is None else f"signal {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
        )
        self._stderr.seek(
            -min(self._stderr.seek(0, os.SEEK_END), 1 << 16), os.SEEK_END
        )  # it may have printed gigabytes
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return f"{how}: {lines[-1][:500]}" if lines else how

    def kill(self) -> None:
        """Kill the process group and close everything; never fails, never waits long."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._write)
        os.close(self._read)
        self._stderr.close()
