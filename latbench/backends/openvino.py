"""OpenVINO on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import metadata, util
from itertools import repeat as times
from pathlib import Path
from time import perf_counter_ns
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from latbench.backends.base import MAX_THREADS, Buffers, LayerTime, Scalar, checked
from latbench.backends.streams import TIMER_NS
from latbench.errors import BackendUnavailableError, MeasurementError

PRECISIONS = ("f32", "bf16", "f16")


class OpenVinoRunner:
    """A compiled model with inputs bound to fixed buffers."""

    def __init__(self, openvino: Any, core: Any, model: Any, config: dict[str, Any], buffers: Buffers) -> None:
        self._openvino, self._core, self._model, self._config = openvino, core, model, config
        self._inputs: list[NDArray[Any]] = []
        for i, port in enumerate(model.inputs):
            if port.partial_shape.is_dynamic:
                raise MeasurementError(f"input {port.any_name!r} is {port.partial_shape}: not a static tensor")
            dtype = np.dtype(port.element_type.to_dtype()).name
            self._inputs.append(buffers.get("input", i, tuple(port.shape), dtype))
        self._compiled = core.compile_model(model, "CPU", config)
        self._request = self._bind(self._compiled)
        # What InferRequest.infer does beneath its conversion of inputs: outputs stay where they are.
        beneath: Any = super(type(self._request), self._request)
        self._infer = beneath.infer

    def _bind(self, compiled: Any) -> Any:
        request = compiled.create_infer_request()
        for i, array in enumerate(self._inputs):
            request.set_input_tensor(i, self._openvino.Tensor(array, shared_memory=True))
        return request

    def sample(self, repeat: int) -> float:
        infer = self._infer
        start = perf_counter_ns()
        for _ in times(None, repeat):
            infer({}, True, False)  # inputs as bound, share_outputs, decode_strings
        return (perf_counter_ns() - start) / 1e6

    def outputs(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        request = self._compiled.create_infer_request()
        for name, array in inputs.items():
            request.set_tensor(name, self._openvino.Tensor(np.ascontiguousarray(array)))
        request.infer()
        return {port.any_name: np.array(request.get_tensor(port).data) for port in self._compiled.outputs}

    def layers(self) -> list[LayerTime] | None:
        """Median of each executed node over 20 inferences of a compilation of its own, with counters on."""
        request = self._bind(self._core.compile_model(self._model, "CPU", {**self._config, "PERF_COUNT": True}))
        times_us: dict[tuple[str, str], list[float]] = {}
        for n in range(25):
            request.infer()
            for info in request.profiling_info if n >= 5 else ():
                if info.status == info.Status.EXECUTED and info.node_type not in ("Parameter", "Result", "Constant"):
                    us = info.real_time.total_seconds() * 1e6
                    times_us.setdefault((info.node_name, info.node_type), []).append(us)
        return [LayerTime(name, op, float(np.median(us)) / 1e3) for (name, op), us in times_us.items()]


@cache
def _core() -> Any:
    """One for the process.

    Each sets its thread's alternate signal stack and restores the former one at its end: of two that end out of order
    the second restores what the first has unmapped, and the next signal kills the process.
    """
    import openvino

    return openvino.Core()


class OpenVinoBackend:
    """Options: `threads` (default 1), `precision` (f32 | bf16 | f16: what the kernels may compute in, default f32).

    One stream and one inference at a time: latency, not throughput. Without `precision`, newer CPUs would silently
    compute float32 models in bfloat16.
    """

    name: ClassVar[str] = "openvino"
    artifact: ClassVar[Literal["onnx", "graph"]] = "onnx"
    clock: ClassVar[Literal["host", "cuda_event", "model"]] = "host"
    kinds: ClassVar[tuple[str, ...]] = ("cpu",)
    int8: ClassVar[str] = "openvino"  # the scheme of latbench.graph.quantize that it fuses
    streams: ClassVar[str] = "latbench.backends.openvino:OpenVinoStreams"  # for throughput
    defaults: ClassVar[Mapping[str, Scalar]] = {"threads": 1, "precision": "f32"}
    counts: ClassVar[Mapping[str, tuple[int, int]]] = {"threads": (1, MAX_THREADS)}
    runner: ClassVar[type[OpenVinoRunner]] = OpenVinoRunner

    def __init__(self, options: Mapping[str, Scalar]) -> None:
        self.options = checked(self.name, self.defaults, options, counts=self.counts, choices={"precision": PRECISIONS})
        self.available()
        os.environ.setdefault("OPENVINO_LOG_LEVEL", "0")
        import openvino

        self._openvino = openvino
        self._core = _core()
        self._buffers = Buffers()

    @classmethod
    def available(cls) -> None:
        if util.find_spec("openvino") is None:
            raise BackendUnavailableError("openvino is not installed; run: pip install 'latbench[openvino]'")

    @classmethod
    def versions(cls) -> dict[str, str]:
        try:
            return {"openvino": metadata.version("openvino")}
        except metadata.PackageNotFoundError:
            return {}

    @contextmanager
    def load(self, artifact: Path) -> Iterator[OpenVinoRunner]:
        if not artifact.is_file():
            raise MeasurementError(f"{artifact.name}: no such file")
        try:
            # From bytes: by path the front-end goes by the file's ending, and keeps the file mapped.
            model = self._core.read_model(artifact.read_bytes(), b"")
            runner = self.runner(self._openvino, self._core, model, self._config(), self._buffers)
        except Exception as error:  # bare RuntimeError or Exception, by version
            raise MeasurementError(_words(error)) from error
        yield runner

    def _config(self) -> dict[str, Any]:
        return {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": int(self.options["threads"]),
            "INFERENCE_PRECISION_HINT": str(self.options["precision"]),
            "ENABLE_CPU_PINNING": False,  # the worker is pinned already
        }


class OpenVinoStreamsRunner(OpenVinoRunner):
    """A compiled model and a queue of requests, each with inputs of its own."""

    def __init__(self, openvino: Any, core: Any, model: Any, config: dict[str, Any], buffers: Buffers) -> None:
        super().__init__(openvino, core, model, config, buffers)
        self.streams = int(self._compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        self._queue = openvino.AsyncInferQueue(self._compiled, self.streams)
        self._kept = []  # the memory of each request's inputs
        for request in self._queue:
            own = Buffers()
            arrays = [own.get("input", i, array.shape, array.dtype.name) for i, array in enumerate(self._inputs)]
            self._kept.append(arrays)
            for i, array in enumerate(arrays):
                request.set_input_tensor(i, openvino.Tensor(array, shared_memory=True))

    def sample(self, repeat: int) -> float:
        queue, start = self._queue, perf_counter_ns()
        for _ in times(None, repeat * self.streams):
            queue.start_async()  # waits for a free request
        queue.wait_all()
        return (perf_counter_ns() - start) / 1e6

    def notes(self) -> tuple[str, ...]:
        return (f"streams={self.streams}",)


class OpenVinoStreams(OpenVinoBackend):
    """Options: those of openvino, and `streams`: inferences at once; 0: as its throughput hint has it.

    `threads` are those of each stream. As many requests are in flight as OpenVINO calls optimal, as in benchmark_app.
    """

    timer_ns: ClassVar[float] = TIMER_NS
    runner: ClassVar[type[OpenVinoRunner]] = OpenVinoStreamsRunner
    defaults: ClassVar[Mapping[str, Scalar]] = {**OpenVinoBackend.defaults, "streams": 0}
    counts: ClassVar[Mapping[str, tuple[int, int]]] = {**OpenVinoBackend.counts, "streams": (0, MAX_THREADS)}

    def _config(self) -> dict[str, Any]:
        streams, config = int(self.options["streams"]), super()._config()
        del config["NUM_STREAMS"], config["INFERENCE_NUM_THREADS"]
        if streams == 0:
            return {**config, "PERFORMANCE_HINT": "THROUGHPUT"}
        del config["PERFORMANCE_HINT"]
        threads = int(self.options["threads"]) * streams
        return {**config, "NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": threads}


def _words(error: Exception) -> str:
    """OpenVINO's message without the source positions before each line, on one line."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("Exception from src", "Check '"))]
    return " ".join(" ".join(kept or lines).split())
