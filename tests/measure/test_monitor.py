"""NVML on a scripted driver library; the clock's lock is given back however its block ends."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from latbench.errors import EnvironmentUnfitError
from latbench.measure.base import SamplingPlan
from latbench.measure.monitor import GpuMonitor, NoMonitor, Nvml, locked_clock, monitor_of
from latbench.measure.worker import Sampler


class Library:
    """libnvidia-ml with one GPU. A call that is not here is one that we should not make."""

    def __init__(self, *, may_lock: bool = True) -> None:
        self.clock_mhz, self.temperature_c, self.reasons, self.pids = 1400, 60, 0, [11]
        self.may_lock, self.calls = may_lock, list[Any]()

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlErrorString(self, status: int) -> bytes:  # noqa: N802
        return {4: b"Insufficient Permissions", 2: b"Invalid Argument"}[status]

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, device: Any) -> int:  # noqa: N802
        return 0 if index == 0 else 2

    def nvmlDeviceGetClockInfo(self, device: Any, kind: int, value: Any) -> int:  # noqa: N802
        assert kind == 1
        return self._give(value, self.clock_mhz)

    def nvmlDeviceGetTemperature(self, device: Any, sensor: int, value: Any) -> int:  # noqa: N802
        assert sensor == 0
        return self._give(value, self.temperature_c)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, device: Any, value: Any) -> int:  # noqa: N802
        return self._give(value, self.reasons)

    def nvmlDeviceGetComputeRunningProcesses_v3(self, device: Any, count: Any, table: Any) -> int:  # noqa: N802
        for i, pid in enumerate(self.pids):
            table[i].pid = pid
        ctypes.cast(count, ctypes.POINTER(ctypes.c_uint))[0] = len(self.pids)
        return 0

    def nvmlDeviceGetMaxClockInfo(self, device: Any, kind: int, value: Any) -> int:  # noqa: N802
        return self._give(value, 1980)

    def nvmlDeviceSetGpuLockedClocks(self, device: Any, low: int, high: int) -> int:  # noqa: N802
        self.calls.append((low, high))
        return 0 if self.may_lock else 4

    def nvmlDeviceResetGpuLockedClocks(self, device: Any) -> int:  # noqa: N802
        self.calls.append("free")
        return 0

    def _give(self, value: Any, number: int) -> int:
        ctypes.cast(value, ctypes.POINTER(ctypes.c_uint))[0] = number  # NVML writes 32 bits
        return 0


def test_a_reading_is_what_the_driver_says() -> None:
    library = Library()
    library.reasons = 0x1 | 0x4 | 0x20 | 0x40  # idle, power cap, and two that are faults
    reading = Nvml(0, library).read()
    assert (reading.sm_clock_mhz, reading.temperature_c, reading.processes) == (1400, 60, (11,))
    assert reading.slowdown == ("thermal", "hardware thermal")
    assert Nvml(0, library).max_clock_mhz() == 1980


def test_a_gpu_that_is_not_there_is_one_line() -> None:
    with pytest.raises(EnvironmentUnfitError, match="there is no GPU 3: NVML says Invalid Argument; look with: nvidia"):
        Nvml(3, Library())


def test_no_driver_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", absent)
    with pytest.raises(EnvironmentUnfitError, match="no NVIDIA driver here"):
        Nvml(0)
    assert isinstance(monitor_of(SimpleNamespace(clock="cuda_event", options={"device": 0})), NoMonitor)


def test_a_cpu_is_not_looked_at() -> None:
    assert isinstance(monitor_of(SimpleNamespace(clock="host")), NoMonitor)


def test_a_clock_below_nine_tenths_of_the_highest_is_throttled() -> None:
    library = Library()
    monitor = GpuMonitor(Nvml(0, library))
    assert monitor.conditions() == {"temperature_c": 60, "gpu_processes": 1}
    library.pids = []
    seen = []
    for clock in (1500, 1900, 1720, 1700, 1900):
        library.clock_mhz = clock
        seen.append(monitor.look())
    assert seen == [(), (), (), ("throttled",), ()]
    library.reasons = 0x8
    assert monitor.look() == ("throttled",)


def test_clock_and_temperature_are_those_of_the_latest_look() -> None:
    library = Library()
    monitor = GpuMonitor(Nvml(0, library))
    library.clock_mhz = 1234
    assert monitor.facts() != {"sm_clock_mhz": 1234.0, "temperature_c": 60.0}, "nothing is read between looks"
    monitor.look()
    assert monitor.facts() == {"sm_clock_mhz": 1234.0, "temperature_c": 60.0}
    assert NoMonitor().facts() == {}


def test_processes_of_others_are_noticed_and_we_are_not() -> None:
    library = Library()
    library.pids = []
    monitor = GpuMonitor(Nvml(0, library))
    library.pids = [501]  # ourselves, by the number that the host gives us
    assert monitor.look() == ()
    library.pids = [501, 502]
    assert monitor.look() == ("foreign_process",)
    library.pids = [11]
    already = GpuMonitor(Nvml(0, library))
    library.pids = [11, 501]
    assert already.look() == ("foreign_process",)


def test_the_worker_looks_after_the_samples_and_never_among_them() -> None:
    order: list[str] = []

    class Watch(NoMonitor):
        def look(self) -> tuple[str, ...]:
            order.append("look")
            return ("throttled",)

    class Runner:
        def sample(self, repeat: int) -> float:
            order.append("sample")
            return 1.0

        def notes(self) -> tuple[str, ...]:
            return ("launch=graph",)

    sampler = Sampler(SimpleNamespace(clock="cuda_event", timer_ns=2000.0), Watch())  # type: ignore[arg-type]
    sampler.wait = SimpleNamespace(ns=lambda: 0)  # type: ignore[assignment]  # other work may hold this core
    about = sampler.block(Runner(), SamplingPlan(runs=1, rounds=1), 1.0)  # type: ignore[arg-type]
    assert order == ["sample"] * (len(order) - 1) + ["look"]
    assert about["repeat"] == 2  # two events cost 2 us: a thousandth of 2 ms
    assert about["warnings"] == ("throttled", "launch=graph")


def test_a_runner_with_caches_of_its_own_sweeps_them_itself() -> None:
    swept: list[int] = []
    runner = SimpleNamespace(sample=lambda repeat: 1.0, evict=swept.append)
    sampler = Sampler(SimpleNamespace(clock="cuda_event"))  # type: ignore[arg-type]
    about = sampler.block(runner, SamplingPlan(runs=1, rounds=1, sweep_bytes=1 << 20), 1.0)  # type: ignore[arg-type]
    assert swept == [1 << 20] * len(about["samples_ms"])
    assert about["repeat"] == 1
    assert sampler.sweep.nbytes == 0


def test_a_lock_is_given_back_after_success_and_after_an_exception() -> None:
    library = Library()
    gpu = Nvml(0, library)
    with locked_clock(gpu, 1404):
        assert library.calls == [(1404, 1404)]
    with pytest.raises(KeyboardInterrupt), locked_clock(gpu, 1404):
        raise KeyboardInterrupt
    assert library.calls == [(1404, 1404), "free"] * 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_was_not_locked_is_not_freed() -> None:
    library = Library(may_lock=False)
    words = r"locking the clock at 1404 MHz: NVML says Insufficient Permissions \(needs root: sudo\)"
    with pytest.raises(EnvironmentUnfitError, match=words), locked_clock(Nvml(0, library), 1404):
        pass
    assert library.calls == [(1404, 1404)]


HEEDED = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a background job ignores it
CODE = """
import os, sys, signal
sys.path.insert(0, sys.argv[1])
from test_monitor import Library
from latbench.measure.monitor import Nvml, locked_clock
library = Library()
library.nvmlDeviceResetGpuLockedClocks = lambda device: print("free", flush=True) or 0
with locked_clock(Nvml(0, library), 1404):
    if sys.argv[2] == "exit":
        sys.exit(3)
    os.kill(os.getpid(), getattr(signal, sys.argv[2]))
    signal.pause()
"""


@pytest.mark.parametrize(("end", "status"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", -2), ("exit", 3)])
def test_a_lock_is_given_back_once_when_the_process_ends(end: str, status: int) -> None:
    command = [sys.executable, "-c", HEEDED + CODE, str(Path(__file__).parent), end]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=60)
    assert (done.stdout, done.returncode) == ("free\n", status)
