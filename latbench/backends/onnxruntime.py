"""ONNX Runtime on the CPU: the embedded default."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import metadata, util
from itertools import repeat as times
from pathlib import Path
from time import perf_counter_ns
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from latbench.backends.base import MAX_THREADS, Buffers, LayerTime, Scalar, checked
from latbench.backends.streams import TIMER_NS, Crew
from latbench.errors import BackendUnavailableError, MeasurementError

LEVELS = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "none": "ORT_DISABLE_ALL",
}
DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


class OnnxRuntimeBackend:
    """Options: `threads` (intra-op, default 1), `optimisation` (all | extended | basic | none).

    Inputs and outputs are bound once (``io_binding``): it saves 2-4 us a call, half of a 3 us operator. "all" is the
    default because "basic" keeps the NCHW kernels, 2.5 times slower on convolutions.
    """

    name: ClassVar[str] = "onnxruntime"
    artifact: ClassVar[Literal["onnx", "graph"]] = "onnx"
    clock: ClassVar[Literal["host", "cuda_event", "model"]] = "host"
    kinds: ClassVar[tuple[str, ...]] = ("cpu",)
    int8: ClassVar[str] = "onnxruntime"  # the scheme of latbench.graph.quantize that it fuses
    streams: ClassVar[str] = "latbench.backends.onnxruntime:OnnxRuntimeStreams"  # for throughput
    defaults: ClassVar[Mapping[str, Scalar]] = {"threads": 1, "optimisation": "all"}
    counts: ClassVar[Mapping[str, tuple[int, int]]] = {"threads": (1, MAX_THREADS)}

    def __init__(self, options: Mapping[str, Scalar]) -> None:
        self.options = checked(self.name, self.defaults, options, counts=self.counts, choices={"optimisation": LEVELS})
        self.available()
        # Read on import (1.31): else a thread that collects and sends usage data runs beside the measurement.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime

        self._ort = onnxruntime
        self._buffers = Buffers()

    @classmethod
    def available(cls) -> None:
        if util.find_spec("onnxruntime") is None:
            raise BackendUnavailableError("onnxruntime is not installed; run: pip install onnxruntime")

    @classmethod
    def versions(cls) -> dict[str, str]:
        for package in ("onnxruntime", "onnxruntime-gpu"):
            try:
                return {"onnxruntime": metadata.version(package)}
            except metadata.PackageNotFoundError:
                continue
        return {}

    @contextmanager
    def load(self, artifact: Path) -> Iterator[OnnxRuntimeRunner]:
        try:
            runner = OnnxRuntimeRunner(self._ort, artifact, self._session_options(), self._buffers)
        except Exception as error:  # ORT's exceptions share no base class but Exception
            raise MeasurementError(_words(error)) from error
        yield runner

    def _session_options(self) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = int(self.options["threads"])
        options.inter_op_num_threads = 1
        options.execution_mode = self._ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = getattr(
            self._ort.GraphOptimizationLevel, LEVELS[str(self.options["optimisation"])]
        )
        options.log_severity_level = 4  # its warnings would reach the terminal; errors come as exceptions
        return options


class OnnxRuntimeRunner:
    """A session with inputs and outputs bound to fixed buffers."""

    def __init__(self, ort: Any, artifact: Path, options: Any, buffers: Buffers) -> None:
        self._ort, self._artifact, self._options, self._buffers = ort, artifact, options, buffers
        self._session = ort.InferenceSession(str(artifact), options, providers=["CPUExecutionProvider"])
        self._inputs = {}
        for i, tensor in enumerate(self._session.get_inputs()):
            if tensor.type not in DTYPES or not all(isinstance(n, int) for n in tensor.shape):
                raise MeasurementError(f"input {tensor.name!r} is {tensor.type} {tensor.shape}: not a static tensor")
            self._inputs[tensor.name] = buffers.get("input", i, tuple(tensor.shape), DTYPES[tensor.type])
        self._binding = self._bind(self._session, buffers)
        self._run = self._session.run_with_iobinding

    def call(self, buffers: Buffers) -> Callable[[], object]:
        """An inference whose outputs go to these buffers."""
        return partial(self._run, self._bind(self._session, buffers))

    def _bind(self, session: Any, buffers: Buffers) -> Any:
        binding = session.io_binding()
        for name, array in self._inputs.items():
            binding.bind_ortvalue_input(name, self._ort.OrtValue.ortvalue_from_numpy(array))
        for i, tensor in enumerate(session.get_outputs()):
            if tensor.type in DTYPES and all(isinstance(n, int) for n in tensor.shape):
                room = buffers.get("output", i, tuple(tensor.shape), DTYPES[tensor.type])
                binding.bind_ortvalue_output(tensor.name, self._ort.OrtValue.ortvalue_from_numpy(room))
            else:
                binding.bind_output(tensor.name)
        return binding

    def sample(self, repeat: int) -> float:
        run, binding = self._run, self._binding
        start = perf_counter_ns()
        for _ in times(None, repeat):
            run(binding)
        return (perf_counter_ns() - start) / 1e6

    def outputs(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        names = [tensor.name for tensor in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, dict(inputs))))  # noqa: B905  (Python 3.9)

    def layers(self) -> list[LayerTime] | None:
        """Median of each kernel over 20 inferences of a session of its own, with ONNX Runtime's profiler on."""
        with tempfile.TemporaryDirectory(prefix="layers-", dir=self._artifact.parent) as folder:  # goes with the run's
            self._options.enable_profiling = True
            self._options.profile_file_prefix = os.path.join(folder, "profile")  # noqa: PTH118
            session = self._ort.InferenceSession(str(self._artifact), self._options, providers=["CPUExecutionProvider"])
            binding = self._bind(session, self._buffers)
            for _ in range(25):
                session.run_with_iobinding(binding)
            path = session.end_profiling()
            self._options.enable_profiling = False
            events = json.loads(Path(path).read_text())
        times_us: dict[tuple[str, str], list[float]] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                name = event["name"][: -len("_kernel_time")]
                times_us.setdefault((name, event["args"].get("op_name", "")), []).append(event["dur"])
        return [LayerTime(name, op, float(np.median(us[5:])) / 1e3) for (name, op), us in times_us.items()]


class OnnxRuntimeStreams(OnnxRuntimeBackend):
    """Options: those of onnxruntime, and `streams`: threads that run one session at once; 0: a CPU's worth of them.

    As onnxruntime_perf_test's ``-c``: weights, inputs and the pool of `threads` are shared, outputs are a stream's own.
    """

    timer_ns: ClassVar[float] = TIMER_NS
    defaults: ClassVar[Mapping[str, Scalar]] = {**OnnxRuntimeBackend.defaults, "streams": 0}
    counts: ClassVar[Mapping[str, tuple[int, int]]] = {**OnnxRuntimeBackend.counts, "streams": (0, MAX_THREADS)}

    @contextmanager
    def load(self, artifact: Path) -> Iterator[Any]:
        with super().load(artifact) as runner:
            n = int(self.options["streams"]) or max(1, _cpus() // int(self.options["threads"]))
            streams = OnnxRuntimeStreamsRunner(runner, n)
            try:
                yield streams
            finally:
                streams.crew.close()


class OnnxRuntimeStreamsRunner:
    """A session that several threads run."""

    def __init__(self, runner: OnnxRuntimeRunner, streams: int) -> None:
        self._runner, self.streams = runner, streams
        self.crew = Crew(runner.call(Buffers()) for _ in range(streams))

    def sample(self, repeat: int) -> float:
        return self.crew.run(repeat * self.streams)

    def outputs(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return self._runner.outputs(inputs)

    def layers(self) -> list[LayerTime] | None:
        return self._runner.layers()

    def notes(self) -> tuple[str, ...]:
        return (f"streams={self.streams}",)


def _cpus() -> int:
    """Logical CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _words(error: Exception) -> str:
    """ONNX Runtime's message without its status prefix, on one line."""
    text = " ".join(str(error).split())
    return text.removeprefix("[ONNXRuntimeError] : ")
