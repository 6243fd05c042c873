"""CUDA memory, streams, events and graphs behind one small protocol, always on the device's primary context.

`cuda-python` where it is installed, else `pycuda`. The runtime API of the one and ``retain_primary_context`` of the
other share a context with TensorRT and torch; a second context would make their handles invalid (so never
``pycuda.autoinit``). Imported by workers: standard library and numpy, Python 3.9.
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
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
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
        return {"cuda-python": _version("cuda-bindings", "cuda-python")}
    if _found("pycuda"):
        return {"pycuda": _version("pycuda")}
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
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
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


class CudaPython:
    """By `cuda-python`: the module ``cuda.bindings.runtime``, before 12.3 ``cuda.cudart``."""

    def __init__(self, runtime: Any, index: int) -> None:
        self._runtime, self._index = runtime, index
        self.name = f"cuda-python {_version('cuda-bindings', 'cuda-python')}"
        self._call("cudaSetDevice", index)
        self._call("cudaFree", 0)  # makes the primary context

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *results = getattr(self._runtime, name)(*arguments)
        if status != self._runtime.cudaError_t.cudaSuccess:
            _, said = self._runtime.cudaGetErrorString(status)
            words = said.decode() if isinstance(said, bytes) else said
            raise MeasurementError(f"{name}: {words} ({status.name})")
        return results[0] if len(results) == 1 else tuple(results)

    def _attribute(self, name: str) -> int:
        return int(self._call("cudaDeviceGetAttribute", getattr(self._runtime.cudaDeviceAttr, name), self._index))

    @property
    def device(self) -> CudaDevice:
        name = self._call("cudaGetDeviceProperties", self._index).name
        version = tuple(self._attribute(f"cudaDevAttrComputeCapability{part}") for part in ("Major", "Minor"))
        return CudaDevice(name.decode().rstrip("\0") if isinstance(name, bytes) else name, (version[0], version[1]))

    @property
    def l2_bytes(self) -> int:
        return self._attribute("cudaDevAttrL2CacheSize")

    def allocate(self, nbytes: int) -> int:
        return int(self._call("cudaMalloc", max(1, nbytes)))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def upload(self, address: int, array: NDArray[Any]) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpy", address, array.ctypes.data, array.nbytes, kind)
        self._call("cudaStreamSynchronize", 0)  # from pageable memory it returns before the device has it all

    def download(self, array: NDArray[Any], address: int) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpy", array.ctypes.data, address, array.nbytes, kind)

    def fill(self, address: int, nbytes: int, stream: Any) -> None:
        self._call("cudaMemsetAsync", address, 0, nbytes, stream)

    def stream(self) -> Any:
        return self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)

    def handle(self, stream: Any) -> int:
        return int(stream)

    def synchronise(self, stream: Any) -> None:
        self._call("cudaStreamSynchronize", stream)

    def event(self) -> Any:
        return self._call("cudaEventCreate")

    def record(self, event: Any, stream: Any) -> None:
        self._call("cudaEventRecord", event, stream)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        self._call("cudaEventSynchronize", end)
        return float(self._call("cudaEventElapsedTime", start, end))

    def capture(self, stream: Any, enqueue: Callable[[], None]) -> Any:
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)
        try:
            enqueue()
        except BaseException:
            with contextlib.suppress(MeasurementError):  # a capture that failed still has to be ended
                self._call("cudaStreamEndCapture", stream)
            raise
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return self._call("cudaGraphInstantiateWithFlags", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def replay(self, graph: Any, stream: Any) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def release(self, thing: Any) -> None:
        kinds = {"cudaStream_t": "cudaStreamDestroy", "cudaEvent_t": "cudaEventDestroy"}
        self._call(kinds.get(type(thing).__name__, "cudaGraphExecDestroy"), thing)


class PyCuda:
    """By `pycuda`, which has no graphs."""

    def __init__(self, driver: Any, index: int) -> None:
        self._driver = driver
        self.name = f"pycuda {_version('pycuda')}"
        self._memory: dict[int, Any] = {}
        with self._words("retain_primary_context"):
            driver.init()
            self._device = driver.Device(index)
            self._context = self._device.retain_primary_context()
            self._context.push()

    @contextlib.contextmanager
    def _words(self, what: str) -> Any:
        try:
            yield
        except self._driver.Error as error:
            raise MeasurementError(f"{what}: {error}") from error

    @property
    def device(self) -> CudaDevice:
        return CudaDevice(self._device.name(), self._device.compute_capability())

    @property
    def l2_bytes(self) -> int:
        return int(self._device.get_attribute(self._driver.device_attribute.L2_CACHE_SIZE))

    def allocate(self, nbytes: int) -> int:
        with self._words("mem_alloc"):
            memory = self._driver.mem_alloc(max(1, nbytes))
        self._memory[int(memory)] = memory
        return int(memory)

    def free(self, address: int) -> None:
        self._memory.pop(address).free()

    def upload(self, address: int, array: NDArray[Any]) -> None:
        with self._words("memcpy_htod"):
            self._driver.memcpy_htod(address, array)
            self._driver.Context.synchronize()  # from pageable memory it returns before the device has it all

    def download(self, array: NDArray[Any], address: int) -> None:
        with self._words("memcpy_dtoh"):
            self._driver.memcpy_dtoh(array, address)

    def fill(self, address: int, nbytes: int, stream: Any) -> None:
        with self._words("memset_d8_async"):
            self._driver.memset_d8_async(address, 0, nbytes, stream)

    def stream(self) -> Any:
        return self._driver.Stream()

    def handle(self, stream: Any) -> int:
        return int(stream.handle)

    def synchronise(self, stream: Any) -> None:
        with self._words("Stream.synchronize"):
            stream.synchronize()

    def event(self) -> Any:
        return self._driver.Event()

    def record(self, event: Any, stream: Any) -> None:
        event.record(stream)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        with self._words("Event.synchronize"):
            end.synchronize()
            return float(end.time_since(start))

    def capture(self, stream: Any, enqueue: Callable[[], None]) -> Any:
        raise MeasurementError("pycuda has no graphs: pip install cuda-python")

    def replay(self, graph: Any, stream: Any) -> None:
        raise MeasurementError("pycuda has no graphs: pip install cuda-python")

    def release(self, thing: Any) -> None:
        """pycuda's objects go with their last reference."""


def _runtime_name() -> str:
    return next((name for name in ("cuda.bindings.runtime", "cuda.cudart") if _found(name)), "")


def _found(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def _version(*packages: str) -> str:
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(package)
    return "?"
