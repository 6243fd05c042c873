"""What a GPU is doing, read through NVML between blocks of samples and never inside them; and its clock, held still.

NVML is the driver's own library, called by ctypes: no package is needed. Imported by workers: standard library only,
Python 3.9.
"""

from __future__ import annotations

import atexit
import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from latbench.errors import EnvironmentUnfitError

SLOW = 0.9  # share of the session's highest clock below which a block counts as throttled

# nvml.h: nvmlClocksEventReason*. Power capping and idling are no faults; the clock itself tells what they cost.
_SLOWDOWN = {0x08: "hardware slowdown", 0x20: "thermal", 0x40: "hardware thermal", 0x80: "power brake"}
_SM_CLOCK = 1  # NVML_CLOCK_SM
_GRAPHICS_CLOCK = 0  # NVML_CLOCK_GRAPHICS
_GPU_TEMPERATURE = 0  # NVML_TEMPERATURE_GPU
_NO_PERMISSION = 4  # NVML_ERROR_NO_PERMISSION
_INSUFFICIENT_SIZE = 7  # NVML_ERROR_INSUFFICIENT_SIZE
_MAX_PROCESSES = 64


@dataclass(frozen=True)
class Reading:
    """A GPU at one moment. None and (): the device does not say."""

    sm_clock_mhz: int | None
    temperature_c: int | None
    slowdown: tuple[str, ...]  # why its clock is held down
    processes: tuple[int, ...]  # that compute on it; as the host numbers them, whatever we see ourselves


class Monitor(Protocol):
    """Looks at a device between blocks."""

    def conditions(self) -> dict[str, Any]:
        """What the device is like before anything was measured."""
        ...

    def look(self) -> tuple[str, ...]:
        """Warnings for the block that has just ended: "throttled", "foreign_process"."""
        ...

    def facts(self) -> dict[str, float]:
        """What the latest look saw: `sm_clock_mhz` and `temperature_c`, as far as the device says."""
        ...


class NoMonitor:
    """Where there is nothing to look at: the clock of a CPU is told by its probe."""

    def conditions(self) -> dict[str, Any]:
        return {}

    def look(self) -> tuple[str, ...]:
        return ()

    def facts(self) -> dict[str, float]:
        return {}


class _ProcessInfo(ctypes.Structure):
    """nvmlProcessInfo_t, since driver 510."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used_memory", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class Nvml:
    """One GPU through NVML, numbered as nvidia-smi does. Raises EnvironmentUnfitError where there is none."""

    def __init__(self, index: int, library: Any = None) -> None:
        self._library = library or _driver_library()
        self._check(self._library.nvmlInit_v2(), "nvmlInit")
        self._device = ctypes.c_void_p()
        self._check(
            self._library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(self._device)), f"there is no GPU {index}"
        )

    def _check(self, status: int, what: str) -> None:
        if status != 0:
            said = self._library.nvmlErrorString(status)
            words = said.decode() if isinstance(said, bytes) else f"error {status}"
            root = " (needs root: sudo)" if status == _NO_PERMISSION else ""
            raise EnvironmentUnfitError(f"{what}: NVML says {words}{root}; look with: nvidia-smi")

    def _number(self, call: str, *arguments: int) -> int | None:
        value = ctypes.c_ulonglong()
        status = getattr(self._library, call)(self._device, *arguments, ctypes.byref(value))
        return None if status != 0 else int(value.value)

    def read(self) -> Reading:
        reasons = self._number("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
        return Reading(
            self._number("nvmlDeviceGetClockInfo", _SM_CLOCK),
            self._number("nvmlDeviceGetTemperature", _GPU_TEMPERATURE),
            tuple(word for bit, word in _SLOWDOWN.items() if reasons & bit),
            self._processes(),
        )

    def _processes(self) -> tuple[int, ...]:
        count, table = ctypes.c_uint(_MAX_PROCESSES), (_ProcessInfo * _MAX_PROCESSES)()
        call = getattr(self._library, "nvmlDeviceGetComputeRunningProcesses_v3", None)
        status = call(self._device, ctypes.byref(count), table) if call else 1
        if status not in (0, _INSUFFICIENT_SIZE):
            return ()
        return tuple(sorted(table[i].pid for i in range(min(count.value, _MAX_PROCESSES))))

    def max_clock_mhz(self) -> int | None:
        return self._number("nvmlDeviceGetMaxClockInfo", _GRAPHICS_CLOCK)

    def lock_clock(self, mhz: int) -> None:
        """Holds the clock at `mhz`. Raises EnvironmentUnfitError where that needs rights or the device cannot."""
        self._check(
            self._library.nvmlDeviceSetGpuLockedClocks(self._device, mhz, mhz), f"locking the clock at {mhz} MHz"
        )

    def free_clock(self) -> None:
        self._check(self._library.nvmlDeviceResetGpuLockedClocks(self._device), "freeing the clock")


def _driver_library() -> Any:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        raise EnvironmentUnfitError(
            f"no NVIDIA driver here ({error}); install it, then look with: nvidia-smi"
        ) from None
    library.nvmlErrorString.restype = ctypes.c_char_p
    return library


class GpuMonitor:
    """Compares every reading with the first, and with the highest clock seen under load."""

    def __init__(self, gpu: Nvml) -> None:
        self._gpu = gpu
        self._first = self._latest = gpu.read()  # before this process opens the device
        self._highest_mhz = 0

    def conditions(self) -> dict[str, Any]:
        first = self._first
        return {"temperature_c": first.temperature_c, "gpu_processes": len(first.processes)}

    def look(self) -> tuple[str, ...]:
        now, warnings = self._gpu.read(), []
        self._latest = now
        clock = now.sm_clock_mhz or 0
        self._highest_mhz = max(self._highest_mhz, clock)
        if now.slowdown or clock < SLOW * self._highest_mhz:
            warnings.append("throttled")
        before = set(self._first.processes)
        # In a container the host's numbers are not ours: of those that came after us, one may be us.
        if before & set(now.processes) or len(set(now.processes) - before) > 1:
            warnings.append("foreign_process")
        return tuple(warnings)

    def facts(self) -> dict[str, float]:
        seen = {"sm_clock_mhz": self._latest.sm_clock_mhz, "temperature_c": self._latest.temperature_c}
        return {name: float(value) for name, value in seen.items() if value is not None}


def monitor_of(backend: Any) -> Monitor:
    """What looks after a back-end's device: NVML for one whose clock is a GPU's, where the driver has it."""
    if backend.clock != "cuda_event":
        return NoMonitor()
    try:
        return GpuMonitor(Nvml(int(getattr(backend, "options", {}).get("device", 0))))
    except EnvironmentUnfitError:  # a Jetson has no NVML
        return NoMonitor()


@contextmanager
def locked_clock(gpu: Nvml, mhz: int) -> Iterator[None]:
    """The GPU's clock held at `mhz` inside the block, and free again however it ends: return, exception, SIGTERM,
    SIGHUP, the interpreter's exit. Only what was locked is freed. A parent's affair: workers are killed outright.

    Raises EnvironmentUnfitError where the clock cannot be locked.
    """
    locked = threading.Event()

    def free() -> None:
        if locked.is_set():
            locked.clear()
            gpu.free_clock()

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)  # runs every `finally` on the way out, this block's too

    in_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGHUP) if in_main else ()
    before = {number: signal.signal(number, stop) for number in numbers}
    atexit.register(free)
    try:
        locked.set()  # before the call: an interrupt between the two must still free it
        try:
            gpu.lock_clock(mhz)
        except EnvironmentUnfitError:
            locked.clear()
            raise
        yield
    finally:
        free()
        atexit.unregister(free)
        for number, handler in before.items():
            signal.signal(number, handler)
