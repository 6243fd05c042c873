"""A scripted TensorRT for tests: an engine, and a device that is strict about lifetimes and the order of calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from latbench.backends import cuda
from latbench.backends.base import Scalar
from latbench.backends.tensorrt_build import Plans
from latbench.errors import MeasurementError


class Device:
    """Device memory as arrays of bytes, streams that do their work when waited for; strict about lifetimes."""

    name = "scripted"
    device = cuda.CudaDevice("scripted", (6, 1))
    l2_bytes = 1000

    def __init__(self, *, graphs: bool = True) -> None:
        self.graphs, self.memory, self.live = graphs, dict[int, bytearray](), set[object]()
        self.queue: list[Callable[[], None]] = []
        self.capturing: list[Callable[[], None]] | None = None
        self.now_ms = 0.0
        self.log: list[str] = []
        self.made: list[str] = []
        self.awaited: list[tuple[int, int]] = []

    def _make(self, kind: str) -> SimpleNamespace:
        self.made.append(kind)
        thing = SimpleNamespace(at=None, work=[])
        self.live.add(id(thing))
        return thing

    def _enqueue(self, work: Callable[[], None]) -> None:
        (self.queue if self.capturing is None else self.capturing).append(work)

    def allocate(self, nbytes: int) -> int:
        address = 1000 + 256 * len(self.memory)
        self.memory[address] = bytearray(nbytes)
        self.live.add(address)
        return address

    def free(self, address: int) -> None:
        self.live.remove(address)

    def upload(self, address: int, array: np.ndarray[Any, Any]) -> None:
        self.memory[address][:] = array.tobytes()

    def download(self, array: np.ndarray[Any, Any], address: int) -> None:
        array[...] = np.frombuffer(self.memory[address], array.dtype).reshape(array.shape)

    def pinned(self, like: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        array = like.copy()
        self.live.add(array.ctypes.data)
        return array

    def unpin(self, array: np.ndarray[Any, Any]) -> None:
        self.live.remove(array.ctypes.data)

    def upload_async(self, address: int, array: np.ndarray[Any, Any], stream: Any) -> None:
        assert array.ctypes.data in self.live, "copied from memory that is not pinned"
        self._enqueue(lambda: self._copy("h2d", lambda: self.upload(address, array)))

    def download_async(self, array: np.ndarray[Any, Any], address: int, stream: Any) -> None:
        assert array.ctypes.data in self.live, "copied to memory that is not pinned"
        self._enqueue(lambda: self._copy("d2h", lambda: self.download(array, address)))

    def _copy(self, way: str, copy: Callable[[], None]) -> None:
        copy()
        self.now_ms += {"h2d": 0.125, "d2h": 0.0625}[way]
        self.log.append(way)

    def wait(self, stream: Any, event: Any) -> None:
        self.awaited.append((id(stream), id(event)))

    def fill(self, address: int, nbytes: int, stream: Any) -> None:
        assert len(self.memory[address]) == nbytes
        self._enqueue(lambda: self.log.append("sweep"))

    def stream(self) -> Any:
        return self._make("stream")

    def handle(self, stream: Any) -> int:
        return 77

    def synchronise(self, stream: Any) -> None:
        assert self.capturing is None, "waited inside a capture"
        while self.queue:
            self.queue.pop(0)()

    def event(self) -> Any:
        return self._make("event")

    def record(self, event: Any, stream: Any) -> None:
        self._enqueue(lambda: setattr(event, "at", self.now_ms))

    def elapsed_ms(self, start: Any, end: Any) -> float:
        self.synchronise(None)
        return float(end.at - start.at)

    def capture(self, stream: Any, enqueue: Callable[[], None]) -> Any:
        assert not self.queue, "captured before the eager run was awaited"
        if not self.graphs:
            raise MeasurementError("cudaStreamEndCapture: operation not permitted")
        self.capturing = []
        enqueue()
        graph = self._make("graph")
        graph.work, self.capturing = self.capturing, None
        return graph

    def replay(self, graph: Any, stream: Any) -> None:
        for work in graph.work:
            self._enqueue(work)

    def release(self, thing: Any) -> None:
        self.live.remove(id(thing))


class Engine:
    """y = 2 x in 0.25 ms, with the calls that a real engine has and no others."""

    num_io_tensors = 2
    shapes = {"x": (1, 4), "y": (1, 4)}  # noqa: RUF012
    dtypes = {"x": "FLOAT", "y": "FLOAT"}  # noqa: RUF012

    def __init__(self, device: Device) -> None:
        self.device = device

    def get_tensor_name(self, index: int) -> str:
        return "xy"[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.dtypes[name])

    def get_tensor_mode(self, name: str) -> str:
        return {"x": "in", "y": "out"}[name]

    def create_execution_context(self) -> Any:
        return Context(self.device)

    def create_engine_inspector(self) -> Any:
        text = json.dumps({"Layers": [{"Name": "double", "LayerType": "PointWise"}], "Bindings": ["x", "y"]})
        return SimpleNamespace(get_engine_information=lambda form: text)


class Context:
    def __init__(self, device: Device) -> None:
        self.device, self.addresses, self.runs = device, dict[str, int](), 0
        self.profiler: Any = None

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address in self.device.memory

    def execute_async_v3(self, handle: int) -> bool:
        assert handle == 77
        assert set(self.addresses) == {"x", "y"}
        assert self.device.capturing is None or self.runs > 0, "captured before an eager run"
        self.runs += 1

        def work() -> None:
            x = np.frombuffer(self.device.memory[self.addresses["x"]], np.float32)
            self.device.memory[self.addresses["y"]][:] = (2 * x).tobytes()
            self.device.now_ms += 0.25
            self.device.log.append("run")

        self.device._enqueue(work)
        if self.profiler is not None:
            self.profiler.report_layer_time("double", 0.3)
        return True


class Log:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def clear(self) -> None:
        self.lines.clear()

    def words(self) -> str:
        return "; ".join(self.lines)

    def warnings(self) -> list[str]:
        return ["a slow tactic was chosen"]


def toolkit(device: Device, engine: Any, **options: Scalar) -> Any:
    trt = SimpleNamespace(
        TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
        LayerInformationFormat=SimpleNamespace(JSON="json"),
        IProfiler=object,
    )
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: engine)
    return SimpleNamespace(
        trt=trt,
        cuda=device,
        runtime=runtime,
        logger=Log(),
        plans=Plans(),
        typing="weak",
        external_note="",
        options={"launch": "graph", **options},
    )
