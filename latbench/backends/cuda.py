"""CUDA memory, streams, events and graphs behind one small protocol, always on the device's primary context.

`cuda-python` where it is installed, else `pycuda` (``cuda_bindings``): the runtime API of the one and
``retain_primary_context`` of the other share a context with TensorRT and torch; a second context would make their
handles invalid (so never ``pycuda.autoinit``). Imported by workers: standard library and numpy, Python 3.9.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from latbench.errors import BackendUnavailableError, MeasurementError

# What two events add to the time of what lies between them: steps of 0.5 us, and the gap before the first kernel.
EVENT_NS = 2_000.0


@dataclass(frozen=True)
class CudaDevice:
    """A GPU as its driver describes it."""

    name: str
    capability: tuple[int, int]


class Cuda(Protocol):
    """One device. Every failing call raises MeasurementError, with CUDA's words. Sizes are in bytes, times in ms."""

    name: str  # "cuda-python 12.9.4"

    @property
    def device(self) -> CudaDevice: ...

    @property
    def l2_bytes(self) -> int:
        """Size of the last-level cache."""
        ...

    def allocate(self, nbytes: int) -> int:
        """Address of device memory; ``free`` gives it back."""
        ...

    def free(self, address: int) -> None: ...

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Copies a contiguous array to the device, and waits."""
        ...

    def download(self, array: NDArray[Any], address: int) -> None:
        """Copies device memory into a contiguous array, and waits."""
        ...

    def pinned(self, like: NDArray[Any]) -> NDArray[Any]:
        """A copy in host memory that the device reads and writes by itself; ``unpin`` gives it back."""
        ...

    def unpin(self, array: NDArray[Any]) -> None: ...

    def upload_async(self, address: int, array: NDArray[Any], stream: Any) -> None:
        """Enqueues a copy of a pinned array to the device."""
        ...

    def download_async(self, array: NDArray[Any], address: int, stream: Any) -> None:
        """Enqueues a copy of device memory into a pinned array."""
        ...

    def fill(self, address: int, nbytes: int, stream: Any) -> None:
        """Enqueues writing zeros."""
        ...

    def stream(self) -> Any:
        """A stream that is not the default one: only such can be captured."""
        ...

    def handle(self, stream: Any) -> int:
        """The stream as TensorRT takes it."""
        ...

    def synchronise(self, stream: Any) -> None: ...

    def event(self) -> Any: ...

    def record(self, event: Any, stream: Any) -> None: ...

    def wait(self, stream: Any, event: Any) -> None:
        """Lets what is enqueued on the stream from now on begin behind the event, of another stream."""
        ...

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Waits for `end`."""
        ...

    def capture(self, stream: Any, enqueue: Callable[[], None]) -> Any:
        """A graph of what `enqueue` enqueues on the stream, ready to replay. Raises MeasurementError where it fails."""
        ...

    def replay(self, graph: Any, stream: Any) -> None: ...

    def release(self, thing: Any) -> None:
        """Destroys a stream, an event or a graph."""
        ...


def devices() -> tuple[CudaDevice, ...]:
    """The GPUs that the driver offers, in the order of nvidia-smi. No context is made.

    Raises BackendUnavailableError, with what to do, where there is no driver or no GPU.
    """
    _settle_environment()
    try:
        driver: Any = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendUnavailableError(
            f"no NVIDIA driver here ({error}); install it, then look with: nvidia-smi"
        ) from None
    count = ctypes.c_int()
    for call, arguments in (("cuInit", (0,)), ("cuDeviceGetCount", (ctypes.byref(count),))):
        status = getattr(driver, call)(*arguments)
        if status != 0:
            said = ctypes.c_char_p()
            driver.cuGetErrorString(status, ctypes.byref(said))
            words = said.value.decode() if said.value else f"error {status}"
            raise BackendUnavailableError(f"the NVIDIA driver says: {words} ({call}); look with: nvidia-smi")
    if count.value == 0:
        raise BackendUnavailableError("the NVIDIA driver finds no GPU; look with: nvidia-smi")
    return tuple(_describe(driver, index) for index in range(count.value))


def _settle_environment() -> None:
    """What CUDA reads when it starts: devices numbered as nvidia-smi does; kernels loaded when first used, the default
    from CUDA 12.2 on, without which TensorRT 8.6 warns in every row.
    """
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")


def _describe(driver: Any, index: int) -> CudaDevice:
    device, name, value = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, 256, device)
    capability = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return CudaDevice(name.value.decode(), (capability[0], capability[1]))


def installed() -> dict[str, str]:
    """The binding that ``connect`` would take and its version; {} where there is none."""
    if _runtime_name():
        return {"cuda-python": version_of("cuda-bindings", "cuda-python")}
    if _found("pycuda"):
        return {"pycuda": version_of("pycuda")}
    return {}


def driver() -> dict[str, str]:
    """The NVIDIA driver's version; {} where there is none, or it does not say."""
    try:
        said = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return {}
    found = re.search(r"Kernel Module.*?(\d+\.\d+(?:\.\d+)?)", said)
    return {"driver": found[1]} if found else {}


def connect(index: int) -> Cuda:
    """Device `index`, in the order of nvidia-smi. Raises BackendUnavailableError, with what to install."""
    from latbench.backends.cuda_bindings import CudaPython, PyCuda

    _settle_environment()
    runtime = _runtime_name()
    try:
        if runtime:
            return CudaPython(import_module(runtime), index)
        if _found("pycuda"):
            return PyCuda(import_module("pycuda.driver"), index)
    except MeasurementError as error:
        raise BackendUnavailableError(f"GPU {index}: {error}; look with: nvidia-smi") from error
    raise BackendUnavailableError(
        "neither cuda-python nor pycuda is installed; run: pip install cuda-python (of the driver's CUDA: nvidia-smi)"
    )


def _runtime_name() -> str:
    return next((name for name in ("cuda.bindings.runtime", "cuda.cudart") if _found(name)), "")


def _found(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def version_of(*packages: str) -> str:
    """Version of the first of `packages` that is installed, "?" where none is."""
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(package)
    return "?"
