"""An engine of TensorRT at work: its buffers, launches and times, one at a time or several at once.

Imported by workers: standard library and numpy, Python 3.9.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import repeat as times
from time import perf_counter_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latbench.backends import tensorrt_inspector
from latbench.backends.base import LayerTime, aligned_array
from latbench.backends.tensorrt_build import Toolkit, make_profiler
from latbench.errors import MeasurementError

NUMPY = {  # member of DataType -> numpy; the others have no numpy type
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
ENQUEUE_BOUND = 0.9  # share of the GPU's time that enqueueing takes on the host: beyond it the GPU waits
DEFAULT_STREAMS, MAX_STREAMS = 2, 128
PASSES = 11  # of what is timed once per load: copies, enqueueing


class Execution:
    """An engine's context with buffers and a stream of its own, launched as asked. `stack` gives everything back."""

    def __init__(self, toolkit: Toolkit, engine: Any, stack: ExitStack) -> None:
        self.toolkit, self.cuda, self.engine, self._stack = toolkit, toolkit.cuda, engine, stack
        stack.callback(vars(self).clear)  # last: `launch` refers back to this, and the worker never collects
        self.arrays: dict[str, NDArray[Any]] = {}  # host copies of inputs and outputs, by name
        self.addresses: dict[str, int] = {}
        self.inputs: list[str] = []
        self.stream = self.cuda.stream()
        stack.callback(self.cuda.release, self.stream)
        self._handle = self.cuda.handle(self.stream)
        self._allocate()
        self.context = self.make_context()
        self.launched = ""  # how: "graph", "eager", or "eager: " and why
        self.launch = self._first_launch()

    def _allocate(self) -> None:
        engine, trt = self.engine, self.toolkit.trt
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            shape, dtype = tuple(engine.get_tensor_shape(name)), engine.get_tensor_dtype(name).name
            if any(n < 0 for n in shape):
                raise MeasurementError(f"{name!r} has shape {shape}: not a static tensor")
            if dtype not in NUMPY:
                raise MeasurementError(f"{name!r} is {dtype}: inputs and outputs must have a numpy type")
            given = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            array = aligned_array(shape, NUMPY[dtype]) if given else np.zeros(shape, NUMPY[dtype])
            address = self.cuda.allocate(array.nbytes)
            self._stack.callback(self.cuda.free, address)
            self.cuda.upload(address, array)
            self.arrays[name], self.addresses[name] = array, address
            if given:
                self.inputs.append(name)

    def make_context(self) -> Any:
        """An execution context with every tensor's address set."""
        context = self.engine.create_execution_context()
        if context is None:
            raise MeasurementError(f"no room to execute the engine: {self.toolkit.logger.words()}")
        for name, address in self.addresses.items():
            if not context.set_tensor_address(name, address):
                raise MeasurementError(f"{name!r} takes no address: {self.toolkit.logger.words()}")
        return context

    def enqueue(self) -> None:
        if not self.context.execute_async_v3(self._handle):
            raise MeasurementError(f"the engine does not run: {self.toolkit.logger.words()}")

    def _first_launch(self) -> Callable[[], None]:
        """Runs the engine once, eagerly, as capturing needs; then the launch asked for, or eager and a note why."""
        self.enqueue()
        self.cuda.synchronise(self.stream)
        self.launched = "eager"
        if self.toolkit.options["launch"] == "eager":
            return self.enqueue
        try:
            graph = self.cuda.capture(self.stream, self.enqueue)
        except MeasurementError as error:
            self.cuda.synchronise(self.stream)
            self.launched = f"eager: {error}"
            return self.enqueue
        self._stack.callback(self.cuda.release, graph)
        self.launched = "graph"
        return lambda: self.cuda.replay(graph, self.stream)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs for given inputs; the resident ones return."""
        for name, array in inputs.items():
            self.cuda.upload(self.addresses[name], np.ascontiguousarray(array, self.arrays[name].dtype))
        self.launch()
        self.cuda.synchronise(self.stream)
        results = {}
        for name in self.arrays.keys() - set(self.inputs):
            results[name] = np.empty_like(self.arrays[name])
            self.cuda.download(results[name], self.addresses[name])
        for name in inputs:
            self.cuda.upload(self.addresses[name], self.arrays[name])
        return results


class TensorRTRunner:
    """An engine that runs one inference at a time. `stack` gives everything back."""

    def __init__(self, toolkit: Toolkit, model: bytes, stack: ExitStack) -> None:
        self._toolkit, self._cuda, self._stack = toolkit, toolkit.cuda, stack
        stack.callback(vars(self).clear)  # last: the engine goes with its last reference, before the next is built
        toolkit.logger.clear()
        plan, self._build_notes = toolkit.plans.get(toolkit, model)
        engine = toolkit.runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise MeasurementError(f"the engine cannot be loaded: {toolkit.logger.words()}")
        self._executions = [Execution(toolkit, engine, stack) for _ in range(self._n_executions())]
        self._one = self._executions[0]
        self._start, self._end = self._event(), self._event()
        self._sweep: tuple[int, int] | None = None  # address and size
        self._gpu_ms = 0.0  # of one inference, by the latest sample
        self._figures = self._timed_once()
        self._logged = [f"tensorrt: {line}" for line in toolkit.logger.warnings()]

    def _n_executions(self) -> int:
        return 1

    def _event(self) -> Any:
        event = self._cuda.event()
        self._stack.callback(self._cuda.release, event)
        return event

    def sample(self, repeat: int) -> float:
        launch, record, stream = self._one.launch, self._cuda.record, self._one.stream
        record(self._start, stream)
        for _ in times(None, repeat):
            launch()
        record(self._end, stream)
        ms = self._cuda.elapsed_ms(self._start, self._end)
        self._gpu_ms = ms / repeat
        return ms

    def evict(self, nbytes: int) -> None:
        """Enqueues writing twice the L2 cache's size, or `nbytes` where that is more, before the next sample."""
        if self._sweep is None:
            size = max(nbytes, 2 * self._cuda.l2_bytes)
            self._sweep = self._cuda.allocate(size), size
            self._stack.callback(self._cuda.free, self._sweep[0])
        self._cuda.fill(*self._sweep, self._one.stream)

    def _timed_once(self) -> dict[str, float]:
        """Medians in ms: `enqueue_ms` of one launch on the host, while the GPU is idle; `h2d_ms` and `d2h_ms` of all
        inputs and outputs between the GPU and pinned memory. Samples are gpu_compute; latency is h2d + that + d2h.
        """
        one, cuda = self._one, self._cuda
        outputs = [name for name in one.arrays if name not in one.inputs]
        enqueue_ms, copies_ms = [], []
        for _ in range(PASSES):
            start = perf_counter_ns()
            one.launch()
            enqueue_ms.append((perf_counter_ns() - start) / 1e6)
            cuda.synchronise(one.stream)
        for names, copy in ((one.inputs, self._upload), (outputs, self._download)):
            pinned = {name: cuda.pinned(one.arrays[name]) for name in names}
            try:
                copies_ms.append(float(np.median([self._copies_ms(pinned, copy) for _ in range(PASSES)])))
            finally:
                for array in pinned.values():
                    cuda.unpin(array)
        return {"enqueue_ms": float(np.median(enqueue_ms)), "h2d_ms": copies_ms[0], "d2h_ms": copies_ms[1]}

    def _copies_ms(self, pinned: Mapping[str, NDArray[Any]], copy: Callable[[int, NDArray[Any]], None]) -> float:
        self._cuda.record(self._start, self._one.stream)
        for name, array in pinned.items():
            copy(self._one.addresses[name], array)
        self._cuda.record(self._end, self._one.stream)
        return self._cuda.elapsed_ms(self._start, self._end)

    def _upload(self, address: int, array: NDArray[Any]) -> None:
        self._cuda.upload_async(address, array, self._one.stream)

    def _download(self, address: int, array: NDArray[Any]) -> None:
        self._cuda.download_async(array, address, self._one.stream)

    def conditions(self) -> dict[str, float | str]:
        """How it was built and launched; ``enqueue_ms``, ``h2d_ms`` and ``d2h_ms`` beside samples of gpu_compute."""
        said = [f"typing={self._toolkit.typing}", *self._build_notes, f"launch={self._one.launched}"]
        words = dict(word.split("=", 1) for word in [*said, self._toolkit.external_note] if "=" in word)
        return {**words, **self._figures}

    def notes(self) -> tuple[str, ...]:
        """What the version lacks, what TensorRT warned of, and `enqueue_bound`."""
        lacks = [word for word in self._build_notes if "=" not in word]
        bound = self._figures["enqueue_ms"] > ENQUEUE_BOUND * self._gpu_ms > 0
        return (*lacks, *self._logged, *(("enqueue_bound",) if bound else ()))

    def outputs(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return self._one.run(inputs)

    def layers(self) -> list[LayerTime] | None:
        """Median of each engine layer over 20 inferences of a context of its own, with a profiler attached.

        Their sum exceeds the engine's time: the profiler waits for every layer.
        """
        trt, one = self._toolkit.trt, self._one
        inspector = one.engine.create_engine_inspector()
        info = tensorrt_inspector.parse(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
        profiler = make_profiler(trt)
        timed, one.context = one.context, one.make_context()
        try:
            one.context.profiler = profiler
            for n in range(25):
                if n == 5:
                    profiler.clear()
                one.enqueue()
                self._cuda.synchronise(one.stream)
        finally:
            one.context = timed
        ops = {kernel.name: kernel.op for kernel in info.layers}
        return [LayerTime(name, ops.get(name) or "layer", float(np.median(ms))) for name, ms in profiler.spent.items()]


class TensorRTStreamsRunner(TensorRTRunner):
    """Several contexts of one engine, each on a stream of its own: they share weights and the GPU."""

    def __init__(self, toolkit: Toolkit, model: bytes, stack: ExitStack) -> None:
        super().__init__(toolkit, model, stack)
        self._ends = [self._event() for _ in self._executions]

    def _n_executions(self) -> int:
        return int(self._toolkit.options["streams"]) or DEFAULT_STREAMS

    @property
    def streams(self) -> int:
        return len(self._executions)

    def sample(self, repeat: int) -> float:
        """From an event before the first inference, which every stream awaits, to the last stream's last."""
        cuda, executions = self._cuda, self._executions
        cuda.record(self._start, self._one.stream)
        for execution in executions[1:]:
            cuda.wait(execution.stream, self._start)
        launches = [execution.launch for execution in executions]
        for _ in times(None, repeat):
            for launch in launches:
                launch()
        for execution, end in zip(executions, self._ends):  # noqa: B905  (Python 3.9)
            cuda.record(end, execution.stream)
        ms = max(cuda.elapsed_ms(self._start, end) for end in self._ends)
        self._gpu_ms = ms / repeat / self.streams
        return ms

    def notes(self) -> tuple[str, ...]:
        return (f"streams={self.streams}", *super().notes())
