"""TensorRT on NVIDIA GPUs: one inference path for 8.6, 10 and 11 (``tensorrt_versions`` holds what differs).

Constructing the back-end only reads its options: parents do that without TensorRT, whose worker may be another
interpreter. Python 3.9.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import metadata, util
from itertools import repeat as times
from pathlib import Path
from time import perf_counter_ns
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from latbench.backends import cuda, tensorrt_inspector
from latbench.backends.base import LayerTime, Scalar, aligned_array
from latbench.backends.tensorrt_build import Toolkit, make_profiler
from latbench.backends.tensorrt_versions import unsupported
from latbench.errors import BackendUnavailableError, MeasurementError, UsageError

OPTIONS: dict[str, Scalar] = {
    "device": 0,
    "threads": 1,
    "typing": "auto",
    "tf32": False,
    "external_tactics": "auto",
    "launch": "graph",
    "timing_cache": "auto",
    "optimisation_level": 3,
}
CHOICES = {
    "typing": ("auto", "weak", "strong"),
    "external_tactics": ("auto", "on", "off"),
    "launch": ("graph", "eager"),
}
PACKAGES = ("tensorrt", "tensorrt_bindings", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings")
NUMPY = {  # member of DataType -> numpy; the others have no numpy type
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
ENQUEUE_BOUND = 0.9  # share of the GPU's time that enqueueing took on the host: beyond it the GPU waited


class TensorRTBackend:
    """Options: `device` (number in nvidia-smi), `threads` (of the builder), `typing` (auto | weak | strong), `tf32`
    (may float32 be computed in TF32? default false), `external_tactics` (cuBLAS and cuDNN in the core layers:
    auto | on | off; auto: on Pascal, where they are up to 85 % faster and installed), `launch` (graph: replays a CUDA
    graph, eager where it cannot be captured, and says so; eager), `timing_cache` (auto | FILE | off:
    then every load builds anew, else a worker builds a model once), `optimisation_level` (0 to 5).

    Precision is the model's: float32, float16, or int8 by its QuantizeLinear nodes. Time is that between two CUDA
    events around the enqueued work (gpu_compute): copies are not in it.
    """

    name: ClassVar[str] = "tensorrt"
    artifact: ClassVar[Literal["onnx", "graph"]] = "onnx"
    clock: ClassVar[Literal["host", "cuda_event", "model"]] = "cuda_event"
    kinds: ClassVar[tuple[str, ...]] = ("gpu",)
    timer_ns: ClassVar[float] = cuda.EVENT_NS
    fresh_build: ClassVar[Mapping[str, Scalar]] = {"timing_cache": "off"}  # options that make each load build anew

    def __init__(self, options: Mapping[str, Scalar]) -> None:
        unknown = set(options) - set(OPTIONS)
        if unknown:
            raise UsageError(f"tensorrt has no option {sorted(unknown)[0]!r} (it has: {', '.join(OPTIONS)})")
        self.options = {**OPTIONS, **options}
        for name, choices in CHOICES.items():
            if self.options[name] not in choices:
                raise UsageError(f"tensorrt: {name} must be {' or '.join(choices)}, got {self.options[name]!r}")
        for name, least, most in (("device", 0, 63), ("threads", 1, 1024), ("optimisation_level", 0, 5)):
            value = self.options[name]
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise UsageError(f"tensorrt: {name} must be a whole number from {least} to {most}, got {value!r}")
        if not isinstance(self.options["tf32"], bool):
            raise UsageError(f"tensorrt: tf32 must be true or false, got {self.options['tf32']!r}")
        if not isinstance(self.options["timing_cache"], str) or not self.options["timing_cache"]:
            raise UsageError(f"tensorrt: timing_cache must be auto, off or a file: {self.options['timing_cache']!r}")
        self._toolkit: Toolkit | None = None
        self._refusal: MeasurementError | None = None

    def open(self) -> None:
        """Starts TensorRT and CUDA, seconds, once in a worker. A refusal is kept: each load is a row with its words."""
        if self._toolkit is None and self._refusal is None:
            try:
                self._toolkit = Toolkit(self.options)
            except MeasurementError as error:
                self._refusal = error

    @classmethod
    def available(cls) -> None:
        if util.find_spec("tensorrt") is None:
            raise BackendUnavailableError(
                "tensorrt is not installed; run: pip install 'latbench[tensorrt]', or name an interpreter that has it: "
                "worker_python in ~/.config/latbench/devices.toml"
            )
        version = installed_version()
        try:
            gpus = cuda.devices()
        except BackendUnavailableError as error:
            raise BackendUnavailableError(f"tensorrt {version} is installed, but {error}") from None
        reasons = [unsupported(version, gpu.capability, gpu.name) for gpu in gpus] if version != "?" else [None]
        if all(reasons):
            raise BackendUnavailableError(str(reasons[0]))
        if not cuda.installed():
            raise BackendUnavailableError(
                "tensorrt needs cuda-python or pycuda beside it; run: pip install cuda-python"
            )

    @classmethod
    def versions(cls) -> dict[str, str]:
        return {"tensorrt": installed_version(), **cuda.installed(), **cuda.driver()}

    @contextmanager
    def load(self, artifact: Path) -> Iterator[TensorRTRunner]:
        try:
            model = artifact.read_bytes()
        except OSError as error:
            raise MeasurementError(f"{artifact.name}: {error.strerror}") from error
        self.open()
        if self._toolkit is None:
            raise MeasurementError(str(self._refusal))
        with ExitStack() as stack:
            yield TensorRTRunner(self._toolkit, model, stack)


class TensorRTRunner:
    """An engine, its buffers on the device, and what it takes to enqueue it. `stack` gives everything back."""

    def __init__(self, toolkit: Toolkit, model: bytes, stack: ExitStack) -> None:
        self._toolkit, self._cuda, self._stack = toolkit, toolkit.cuda, stack
        stack.callback(vars(self).clear)  # last: the engine goes with its last reference, before the next is built
        toolkit.logger.clear()
        self._notes = [f"typing={toolkit.typing}"]
        if toolkit.external_note:
            self._notes.append(toolkit.external_note)
        plan, notes = toolkit.plans.get(toolkit, model)
        self._notes += notes
        engine = toolkit.runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise MeasurementError(f"the engine cannot be loaded: {toolkit.logger.words()}")
        self._engine = engine
        self._arrays: dict[str, NDArray[Any]] = {}  # host copies of inputs and outputs, by name
        self._addresses: dict[str, int] = {}
        self._stream = self._cuda.stream()
        stack.callback(self._cuda.release, self._stream)
        self._handle = self._cuda.handle(self._stream)
        self._start, self._end = self._cuda.event(), self._cuda.event()
        stack.callback(self._cuda.release, self._start)
        stack.callback(self._cuda.release, self._end)
        self._allocate()
        self._context = self._make_context()
        self._enqueue_ms = self._gpu_ms = 0.0
        self._sweep: tuple[int, int] | None = None  # address and size
        self._launch = self._first_launch()
        self._notes += [f"tensorrt: {line}" for line in toolkit.logger.warnings()]

    def _allocate(self) -> None:
        engine, trt = self._engine, self._toolkit.trt
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            shape, dtype = tuple(engine.get_tensor_shape(name)), engine.get_tensor_dtype(name).name
            if any(n < 0 for n in shape):
                raise MeasurementError(f"{name!r} has shape {shape}: not a static tensor")
            if dtype not in NUMPY:
                raise MeasurementError(f"{name!r} is {dtype}: inputs and outputs must have a numpy type")
            given = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            array = aligned_array(shape, NUMPY[dtype]) if given else np.empty(shape, NUMPY[dtype])
            address = self._cuda.allocate(array.nbytes)
            self._stack.callback(self._cuda.free, address)
            self._cuda.upload(address, array)
            self._arrays[name], self._addresses[name] = array, address

    def _make_context(self) -> Any:
        """An execution context with every tensor's address set."""
        context = self._engine.create_execution_context()
        if context is None:
            raise MeasurementError(f"no room to execute the engine: {self._toolkit.logger.words()}")
        for name, address in self._addresses.items():
            if not context.set_tensor_address(name, address):
                raise MeasurementError(f"{name!r} takes no address: {self._toolkit.logger.words()}")
        return context

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._handle):
            raise MeasurementError(f"the engine does not run: {self._toolkit.logger.words()}")

    def _first_launch(self) -> Callable[[], None]:
        """Runs the engine once, eagerly, as capturing needs; then the launch asked for, or eager and a note why."""
        self._enqueue()
        self._cuda.synchronise(self._stream)
        if self._toolkit.options["launch"] == "eager":
            self._notes.append("launch=eager")
            return self._enqueue
        try:
            graph = self._cuda.capture(self._stream, self._enqueue)
        except MeasurementError as error:
            self._cuda.synchronise(self._stream)
            self._notes.append(f"launch=eager: {error}")
            return self._enqueue
        self._stack.callback(self._cuda.release, graph)
        self._notes.append("launch=graph")
        return lambda: self._cuda.replay(graph, self._stream)

    def sample(self, repeat: int) -> float:
        launch, record = self._launch, self._cuda.record
        start = perf_counter_ns()
        record(self._start, self._stream)
        for _ in times(None, repeat):
            launch()
        record(self._end, self._stream)
        self._enqueue_ms += (perf_counter_ns() - start) / 1e6
        ms = self._cuda.elapsed_ms(self._start, self._end)
        self._gpu_ms += ms
        return ms

    def evict(self, nbytes: int) -> None:
        """Enqueues writing twice the L2 cache's size, or `nbytes` where that is more, before the next sample."""
        if self._sweep is None:
            size = max(nbytes, 2 * self._cuda.l2_bytes)
            self._sweep = self._cuda.allocate(size), size
            self._stack.callback(self._cuda.free, self._sweep[0])
        self._cuda.fill(*self._sweep, self._stream)

    def notes(self) -> tuple[str, ...]:
        """How it was built and launched, what the version lacks, what TensorRT warned of, and `enqueue_bound`."""
        bound = self._enqueue_ms > ENQUEUE_BOUND * self._gpu_ms > 0
        return (*self._notes, *(("enqueue_bound",) if bound else ()))

    def outputs(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        for name, array in inputs.items():
            resident = self._arrays[name]
            self._cuda.upload(self._addresses[name], np.ascontiguousarray(array, resident.dtype))
        self._launch()
        self._cuda.synchronise(self._stream)
        results = {}
        for name, address in self._addresses.items():
            if self._engine.get_tensor_mode(name) == self._toolkit.trt.TensorIOMode.OUTPUT:
                results[name] = np.empty_like(self._arrays[name])
                self._cuda.download(results[name], address)
        for name in inputs:
            self._cuda.upload(self._addresses[name], self._arrays[name])
        return results

    def layers(self) -> list[LayerTime] | None:
        """Median of each engine layer over 20 inferences of a context of its own, with a profiler attached.

        Their sum exceeds the engine's time: the profiler waits for every layer.
        """
        trt = self._toolkit.trt
        inspector = self._engine.create_engine_inspector()
        info = tensorrt_inspector.parse(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
        profiler = make_profiler(trt)
        timed, self._context = self._context, self._make_context()
        try:
            self._context.profiler = profiler
            for n in range(25):
                if n == 5:
                    profiler.clear()
                self._enqueue()
                self._cuda.synchronise(self._stream)
        finally:
            self._context = timed
        ops = {one.name: one.op for one in info.layers}
        return [LayerTime(name, ops.get(name) or "layer", float(np.median(ms))) for name, ms in profiler.spent.items()]


def installed_version() -> str:
    """Of the ``tensorrt`` that ``import`` would find, by its packages; "?" where none of them is known."""
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(package)
    return "?"
