"""The worker process: numpy and one runtime, a pipe, nothing else. It loads, warms up, samples, answers.

Started by the launcher as ``python -m latbench.measure.worker READ_FD WRITE_FD PARENT_PID``; one JSON line each way:
a WorkerSetup first, answered by {"ready": ...}; then a Request a line, answered by {"stage": ...} lines as it goes and
by one {"measurement": ...}. With ``--describe MODULE:CLASS`` it only prints what that back-end says of itself. Runs on
Python 3.9 and later.

What a back-end or a runner may add to its protocol, by attributes that are asked for here only: ``backend.open()``,
what takes long and is no model's, done before the first request; ``backend.timer_ns``, what reading its clock costs;
``runner.evict(nbytes)``, for caches that are not the CPU's; ``runner.notes()``, warnings for the row;
``runner.conditions()``, how the model was built and launched, and figures beside the samples.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from latbench.backends.base import Backend, Runner
from latbench.errors import LatbenchError
from latbench.measure.base import Measurement, Request, SamplingPlan, WorkerSetup
from latbench.measure.monitor import Monitor, NoMonitor, monitor_of
from latbench.measure.probe import CacheProbe, WaitClock, probe_us, timer_cost_ns

Say = Callable[[dict[str, Any]], None]

FOREIGN_LOAD = 0.01  # share of a block's time spent waiting for a core beyond which the block is flagged
# A virtual core's clock moves by 1 % within 5 ms: probes amid the samples cut the spread between blocks from 0.74 to
# 0.55 % (median of 200 blocks), at 3 % of the time.
PROBE_EVERY_MS = 1.0  # of inference, between clock probes within a block of samples


def main() -> None:
    """Serves the parent's requests, a JSON line each, until its pipe closes; ``--describe`` answers once and ends."""
    if sys.argv[1] == "--describe":
        print(json.dumps(describe(sys.argv[2])))  # noqa: T201  (its answer)
        return
    read_fd, write_fd, parent_pid = map(int, sys.argv[1:4])
    lines = os.fdopen(read_fd, "r", encoding="utf-8")
    out = os.fdopen(write_fd, "w", encoding="utf-8")

    def say(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    die_with_parent(parent_pid)
    setup = WorkerSetup(**json.loads(lines.readline()))
    try:
        backend, conditions = prepare(setup)
        monitor = monitor_of(backend)
    except LatbenchError as error:
        say({"failed": str(error)})
        return
    say({"ready": {**conditions, **monitor.conditions()}})
    sampler = Sampler(backend, monitor)
    gc.collect()
    gc.freeze()
    gc.disable()
    for line in lines:
        raw = json.loads(line)
        command = raw.pop("command")
        request = Request(**{**raw, "plan": SamplingPlan(**raw["plan"])})
        if command == "layers":
            say({"layers": sampler.layers(request)})
        else:
            say({"measurement": sampler.measure(request, say).to_dict()})


def describe(spec: str) -> dict[str, Any]:
    """Why a back-end does not work in this interpreter (None: it does), its versions, and the interpreter's."""
    module, _, name = spec.partition(":")
    try:
        backend = getattr(importlib.import_module(module), name)
        backend.available()
        return {"problem": None, "versions": backend.versions(), "python": sys.version.split()[0]}
    except LatbenchError as error:
        problem = str(error)
    except ImportError as error:
        problem = f"{type(error).__name__}: {error}"
    return {"problem": problem, "versions": {}, "python": sys.version.split()[0]}


def prepare(setup: WorkerSetup) -> tuple[Backend, dict[str, Any]]:
    """The back-end, and what was reached of the conditions asked for."""
    conditions: dict[str, Any] = {"python": sys.version.split()[0], "pid": os.getpid()}
    if setup.cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, setup.cpus)
    conditions["priority"] = raise_priority()
    module, _, name = setup.backend.partition(":")
    backend: Backend = getattr(importlib.import_module(module), name)(setup.options)
    getattr(backend, "open", lambda: None)()
    if backend.clock == "host" and setup.calibrate_s > 0:
        conditions["clock_probe_us"] = settled_probe_us(setup.calibrate_s)
    return backend, conditions


def settled_probe_us(seconds: float) -> float:
    """Median clock probe of the second half of `seconds`: the clock rises for a while under load."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds / 2:
        probe_us()
    probes = []
    while time.perf_counter() - begin < seconds:
        probes.append(probe_us())
    return float(np.median(probes))


def die_with_parent(parent_pid: int) -> None:
    """Linux: be killed when the parent dies, even in a model that hangs. Elsewhere the closed pipe ends the loop."""
    if sys.platform == "linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent_pid:  # it died before the call above
            os._exit(1)


def raise_priority() -> str:
    """Ask to be preferred over other load; says what was granted.

    `nice` alone does nothing where the kernel groups processes by session (autogroup): the launcher gives the worker a
    session of its own, and the group's weight is raised here. Both need rights; without them the wait clock still
    tells what other load did.
    """
    granted = []
    try:
        Path("/proc/self/autogroup").write_text("-20")
        granted.append("autogroup")
    except OSError:
        pass
    try:
        os.setpriority(os.PRIO_PROCESS, 0, -20)
        granted.append("nice")
    except OSError:
        pass
    return "+".join(granted) or "normal"


class Sampler:
    """Measures one request after another on one back-end."""

    def __init__(self, backend: Backend, monitor: Monitor | None = None) -> None:
        self.backend = backend
        self.monitor = monitor or NoMonitor()
        self.wait = WaitClock()
        self.timer_ns: float = getattr(backend, "timer_ns", None) or timer_cost_ns()
        self.probed = backend.clock == "host"
        self.probe: Callable[[], float] = probe_us if self.probed else lambda: 0.0
        self.sweep = np.zeros(0, np.float32)

    def measure(self, request: Request, say: Say) -> Measurement:
        """One block of samples; errors of the runtime come back as values."""
        plan, stage = request.plan, "load"
        about: dict[str, Any] = {
            "key": request.key,
            "run": request.run,
            "round": request.round,
            "order": request.order,
            "pid": os.getpid(),
            "fresh": request.fresh,
            "clock": self.backend.clock,
        }
        say({"stage": stage})
        try:
            begin = time.perf_counter()
            reset_peak_memory()
            with self.backend.load(Path(request.artifact)) as runner:
                about["load_ms"] = 1e3 * (time.perf_counter() - begin)
                say({"stage": (stage := "warmup")})
                alone = request.fresh and plan.alone_processes > 0
                cache = CacheProbe() if alone and self.probed and not plan.sweep_bytes else None
                # Not between warm-up and samples: the probe displaces the model, which takes tens of ms to return.
                cache_us = () if cache is None else (cache.us(),)
                begin = time.perf_counter()
                about["first_inference_ms"], single_ms = warm_up(runner, plan)
                about["warmup_ms"] = 1e3 * (time.perf_counter() - begin)
                say({"stage": (stage := "measure")})
                about |= self.block(runner, plan, single_ms)
                if cache is not None:
                    about["cache_us"] = (*cache_us, cache.us())
                about["peak_memory_bytes"] = peak_memory_bytes()
            return Measurement(**about)
        except LatbenchError as error:
            words = str(error)
        except Exception as error:  # runtimes' exceptions share no base class but this one
            words = f"{type(error).__name__}: {error}"
        words = " ".join(words.replace(request.artifact, "the model").split())  # equal reasons are counted together
        return Measurement(**about, status="error", stage=stage, error=words[:2000])

    def block(self, runner: Runner, plan: SamplingPlan, single_ms: float) -> dict[str, Any]:
        """Samples for `block_s`, with clock probes around and amid them and the time lost to other processes."""
        swept = plan.sweep_bytes > 0
        evict = getattr(runner, "evict", self.evict)
        repeat = 1 if swept else max(1, math.ceil(self.timer_ns / plan.timer_share / (single_ms * 1e6)))
        n_blocks = plan.rounds * plan.runs
        n_min, n_max = math.ceil(plan.min_samples / n_blocks), math.ceil(plan.max_samples / n_blocks)
        block_ms, limit_ms, n, spent = 1e3 * plan.block_s, 1e3 * plan.max_time_s / n_blocks, 0, 0.0
        samples: list[float] = []
        sample, keep = runner.sample, samples.append
        probes, probe_at = [self.probe()], [0]
        probe_ms = PROBE_EVERY_MS  # of inference so far, at which the clock is probed next
        started_at, waited = time.time(), self.wait.ns()
        # Short and without look-ups: what runs between samples pushes the runtime's code out of the caches.
        while True:
            if swept:
                evict(plan.sweep_bytes)
            ms = sample(repeat)
            keep(ms)
            n += 1
            spent += ms
            if n >= n_max or spent >= limit_ms or (spent >= block_ms and n >= n_min):
                break
            if swept or spent >= probe_ms:
                probes.append(self.probe())
                probe_at.append(n)
                probe_ms = spent + PROBE_EVERY_MS
        wait_ms = (self.wait.ns() - waited) / 1e6
        probes.append(self.probe())
        probe_at.append(n)
        warnings = [*self.monitor.look(), *getattr(runner, "notes", tuple)()]
        if wait_ms > FOREIGN_LOAD * spent + 0.02:
            warnings.append("foreign_load")
        if repeat == 1 and self.timer_ns / 1e6 > plan.timer_share * 2 * single_ms:
            warnings.append("near_timer_floor")
        return {
            "samples_ms": tuple(round(ms / repeat, 7) for ms in samples),
            "repeat": repeat,
            "started_at": started_at,
            "wait_ms": wait_ms,
            "probes_us": tuple(probes) if self.probed else (),
            "probe_at": tuple(probe_at) if self.probed else (),
            "conditions": {**self.monitor.facts(), **getattr(runner, "conditions", dict)()},
            "warnings": tuple(warnings),
        }

    def evict(self, nbytes: int) -> None:
        """Read so much other memory, at the speed of the caches."""
        if self.sweep.nbytes != nbytes // 4 * 4:
            self.sweep = np.ones(nbytes // 4, np.float32)
        np.dot(self.sweep, self.sweep)

    def layers(self, request: Request) -> list[dict[str, Any]] | None:
        with self.backend.load(Path(request.artifact)) as runner:
            layers = runner.layers()
        return None if layers is None else [vars(layer) for layer in layers]


def warm_up(runner: Runner, plan: SamplingPlan) -> tuple[float, float]:
    """(first inference, settled inference) in ms: a minimum of time and runs, then until no longer getting faster.

    Never a pause between this and the samples: the clock drops within milliseconds of idling.
    """
    first = best = runner.sample(1)
    spent, n, repeat, stale = first, 1, 1, 0
    while True:
        tries = 3 if repeat * best < 0.15 else 1  # longer ones are steadier by themselves
        single = min(runner.sample(repeat) / repeat for _ in range(tries))
        spent += tries * repeat * single
        n += tries * repeat
        # a network's weights take several inferences to settle in a last-level cache that others use too
        stale = 0 if single < 0.99 * best else stale + 1
        best = min(best, single)
        settled = stale >= 2 and spent >= 1e3 * plan.warmup_s and n >= plan.warmup_runs
        if settled or spent >= 1e3 * plan.max_warmup_s:
            return first, best
        repeat = max(1, math.ceil(0.1 / max(best, 1e-6)))  # groups of about 0.1 ms


def reset_peak_memory() -> None:
    """Linux: start the high-water mark of resident memory anew."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """High-water mark of this process's resident memory since ``reset_peak_memory``; 0 where unknown."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


if __name__ == "__main__":
    main()
