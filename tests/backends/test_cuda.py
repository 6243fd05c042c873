"""The CUDA bindings: every name that is used is in the real module; without a GPU their refusal is one line."""

from __future__ import annotations

import ast
import ctypes
import re
from pathlib import Path

import numpy as np
import pytest

from latbench.backends import cuda, cuda_bindings
from latbench.errors import BackendUnavailableError, MeasurementError

SOURCE = ast.parse(Path(cuda_bindings.__file__).read_text())


def gpus() -> tuple[cuda.CudaDevice, ...]:
    try:
        return cuda.devices()
    except BackendUnavailableError:
        return ()


def class_source(name: str) -> ast.ClassDef:
    return next(node for node in SOURCE.body if isinstance(node, ast.ClassDef) and node.name == name)


def test_cuda_python_has_every_name_that_is_used() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="pip install cuda-python")
    strings = {
        n.value for n in ast.walk(class_source("CudaPython")) if isinstance(n, ast.Constant) and type(n.value) is str
    }
    calls = {text for text in strings if re.fullmatch(r"cuda[A-Z]\w+", text) and not text.endswith("_t")}
    assert {"cudaGraphInstantiateWithFlags", "cudaMemcpy", "cudaEventElapsedTime"} <= calls
    attributes = {text for text in calls if text.startswith("cudaDevAttr") and text != "cudaDevAttrComputeCapability"}
    assert [
        name for name in calls - attributes if not name.startswith("cudaDevAttr") and not hasattr(runtime, name)
    ] == []
    for name in (*attributes, "cudaDevAttrComputeCapabilityMajor", "cudaDevAttrComputeCapabilityMinor"):
        assert hasattr(runtime.cudaDeviceAttr, name)
    assert {type(runtime.cudaStream_t()).__name__, type(runtime.cudaEvent_t()).__name__} == {
        "cudaStream_t",
        "cudaEvent_t",
    }
    assert runtime.cudaMemcpyKind.cudaMemcpyHostToDevice.value == 1
    assert runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost.value == 2
    assert hasattr(runtime.cudaStreamCaptureMode, "cudaStreamCaptureModeThreadLocal")
    assert int(runtime.cudaStream_t()) == 0  # TensorRT takes the handle as a number


@pytest.mark.skipif(bool(gpus()), reason="there is a GPU")
def test_without_a_gpu_every_door_says_so_in_one_line() -> None:
    for door in (cuda.devices, lambda: cuda.connect(0)):
        with pytest.raises(BackendUnavailableError, match="look with: nvidia-smi") as caught:
            door()
        assert "\n" not in str(caught.value)


def test_no_binding_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cuda.installed() == {}
    with pytest.raises(BackendUnavailableError, match="run: pip install cuda-python"):
        cuda.connect(0)


class Driver:
    """libcuda with two GPUs, or a failure."""

    def __init__(self, fails: str = "", n: int = 2) -> None:
        self.fails, self.n = fails, n

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return 100 if self.fails == "cuInit" else 0

    def cuDeviceGetCount(self, count: object) -> int:  # noqa: N802
        ctypes.cast(count, ctypes.POINTER(ctypes.c_int))[0] = self.n  # type: ignore[arg-type]
        return 0

    def cuGetErrorString(self, status: int, text: object) -> int:  # noqa: N802
        ctypes.cast(text, ctypes.POINTER(ctypes.c_char_p))[0] = b"no CUDA-capable device is detected"  # type: ignore[arg-type]
        return 0

    def cuDeviceGet(self, device: object, index: int) -> int:  # noqa: N802
        ctypes.cast(device, ctypes.POINTER(ctypes.c_int))[0] = index + 10  # type: ignore[arg-type]
        return 0

    def cuDeviceGetName(self, name: ctypes.Array[ctypes.c_char], size: int, device: ctypes.c_int) -> int:  # noqa: N802
        name.value = f"GPU {device.value}".encode()
        return 0

    def cuDeviceGetAttribute(self, value: object, attribute: int, device: ctypes.c_int) -> int:  # noqa: N802
        ctypes.cast(value, ctypes.POINTER(ctypes.c_int))[0] = {75: device.value - 4, 76: 1}[attribute]  # type: ignore[arg-type]
        return 0


def test_the_driver_lists_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: Driver())
    assert cuda.devices() == (cuda.CudaDevice("GPU 10", (6, 1)), cuda.CudaDevice("GPU 11", (7, 1)))


@pytest.mark.parametrize(
    ("driver", "words"),
    [(Driver("cuInit"), r"says: no CUDA-capable device is detected \(cuInit\)"), (Driver(n=0), "finds no GPU")],
)
def test_a_driver_without_a_gpu(driver: Driver, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: driver)
    with pytest.raises(BackendUnavailableError, match=words):
        cuda.devices()


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023", "535.129.03"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build", "580.95.05"),
        ("NVRM version: none", None),
    ],
)
def test_the_drivers_version(said: str, version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path: said)
    assert cuda.driver().get("driver") == version


@pytest.mark.gpu
@pytest.mark.skipif(not gpus(), reason="no GPU here")
class TestOnAGpu:
    def test_memory_keeps_what_it_is_given(self) -> None:
        device = cuda.connect(0)
        array = np.arange(1000, dtype=np.float32)
        address = device.allocate(array.nbytes)
        device.upload(address, array)
        back = np.empty_like(array)
        device.download(back, address)
        np.testing.assert_array_equal(back, array)
        stream = device.stream()
        device.fill(address, array.nbytes, stream)
        device.synchronise(stream)
        device.download(back, address)
        assert not back.any()
        device.free(address)
        device.release(stream)

    def test_pinned_memory_is_copied_in_the_order_of_its_stream(self) -> None:
        device = cuda.connect(0)
        stream, address = device.stream(), device.allocate(4000)
        up, down = (device.pinned(np.full(1000, value, np.float32)) for value in (3, 0))
        device.upload_async(address, up, stream)
        device.download_async(down, address, stream)
        device.synchronise(stream)
        assert (down == 3).all()
        device.unpin(up)
        device.unpin(down)
        device.free(address)
        device.release(stream)

    def test_a_stream_waits_for_anothers_event(self) -> None:
        device = cuda.connect(0)
        first, second, event, address = device.stream(), device.stream(), device.event(), device.allocate(1 << 26)
        device.fill(address, 1 << 26, first)
        device.record(event, first)
        device.wait(second, event)
        start, end = device.event(), device.event()
        device.record(start, second)
        device.record(end, second)
        assert device.elapsed_ms(event, start) >= 0
        for thing in (first, second, event, start, end):
            device.release(thing)
        device.free(address)

    def test_what_does_not_fit_is_one_line(self) -> None:
        with pytest.raises(MeasurementError, match=r"memory"):
            cuda.connect(0).allocate(1 << 50)

    def test_a_graph_replays_what_was_captured(self) -> None:
        device = cuda.connect(0)
        stream, address, array = device.stream(), device.allocate(1 << 20), np.ones(1 << 20, np.uint8)
        graph = device.capture(stream, lambda: device.fill(address, 1 << 20, stream))
        device.upload(address, array)
        start, end = device.event(), device.event()
        device.record(start, stream)
        device.replay(graph, stream)
        device.record(end, stream)
        assert device.elapsed_ms(start, end) > 0
        device.download(array, address)
        assert not array.any()
        for thing in (graph, start, end, stream):
            device.release(thing)
        device.free(address)

    def test_the_primary_context_is_shared_with_torch(self) -> None:
        torch = pytest.importorskip("torch", reason="pip install 'latbench[search]'")
        device = cuda.connect(0)
        tensor = torch.full((16,), 3.0, device="cuda:0")
        back = np.empty(16, np.float32)
        device.download(back, tensor.data_ptr())
        assert (back == 3.0).all()

    def test_the_device_is_the_drivers(self) -> None:
        assert cuda.connect(0).device == cuda.devices()[0]
        assert cuda.connect(0).l2_bytes > 0
