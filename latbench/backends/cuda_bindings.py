"""The two bindings of CUDA behind ``cuda.Cuda``. Imported by workers: standard library and numpy, Python 3.9."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latbench.backends.cuda import CudaDevice, version_of
from latbench.errors import MeasurementError


class CudaPython:
    """By `cuda-python`: the module ``cuda.bindings.runtime``, before 12.3 ``cuda.cudart``."""

    def __init__(self, runtime: Any, index: int) -> None:
        self._runtime, self._index = runtime, index
        self.name = f"cuda-python {version_of('cuda-bindings', 'cuda-python')}"
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

    def pinned(self, like: NDArray[Any]) -> NDArray[Any]:
        address = int(self._call("cudaMallocHost", max(1, like.nbytes)))
        room = memoryview((ctypes.c_byte * like.nbytes).from_address(address)).cast("B")
        array: NDArray[Any] = np.frombuffer(room, like.dtype).reshape(like.shape)
        array[...] = like
        return array

    def unpin(self, array: NDArray[Any]) -> None:
        self._call("cudaFreeHost", array.ctypes.data)

    def upload_async(self, address: int, array: NDArray[Any], stream: Any) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, stream)

    def download_async(self, array: NDArray[Any], address: int, stream: Any) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, stream)

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

    def wait(self, stream: Any, event: Any) -> None:
        self._call("cudaStreamWaitEvent", stream, event, 0)

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


_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: work on the default stream does not hold it up


class PyCuda:
    """By `pycuda`, which has no graphs."""

    def __init__(self, driver: Any, index: int) -> None:
        self._driver = driver
        self.name = f"pycuda {version_of('pycuda')}"
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

    def pinned(self, like: NDArray[Any]) -> NDArray[Any]:
        with self._words("pagelocked_empty"):
            array: NDArray[Any] = self._driver.pagelocked_empty(like.shape, like.dtype)
        array[...] = like
        return array

    def unpin(self, array: NDArray[Any]) -> None:
        """It goes with its last reference."""

    def upload_async(self, address: int, array: NDArray[Any], stream: Any) -> None:
        with self._words("memcpy_htod_async"):
            self._driver.memcpy_htod_async(address, array, stream)

    def download_async(self, array: NDArray[Any], address: int, stream: Any) -> None:
        with self._words("memcpy_dtoh_async"):
            self._driver.memcpy_dtoh_async(array, address, stream)

    def fill(self, address: int, nbytes: int, stream: Any) -> None:
        with self._words("memset_d8_async"):
            self._driver.memset_d8_async(address, 0, nbytes, stream)

    def stream(self) -> Any:
        return self._driver.Stream(_NON_BLOCKING)

    def handle(self, stream: Any) -> int:
        return int(stream.handle)

    def synchronise(self, stream: Any) -> None:
        with self._words("Stream.synchronize"):
            stream.synchronize()

    def event(self) -> Any:
        return self._driver.Event()

    def record(self, event: Any, stream: Any) -> None:
        with self._words("Event.record"):
            event.record(stream)

    def wait(self, stream: Any, event: Any) -> None:
        with self._words("Stream.wait_for_event"):
            stream.wait_for_event(event)

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
