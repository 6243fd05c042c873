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

from latbench.backends.base import Buffers, LayerTime, Scalar
from latbench.errors import BackendUnavailableError, MeasurementError, UsageError

OPTIONS: dict[str, Scalar] = {"threads": 1, "precision": "f32"}
PRECISIONS = ("f32", "bf16", "f16")


class OpenVinoBackend:
    """Options: `threads` (default 1), `precision` (f32 | bf16 | f16: what the kernels may compute in, default f32).

    One stream and one inference at a time: latency, not throughput. Without `precision`, newer CPUs would silently
    compute float32 models in bfloat16.
    """

    name: ClassVar[str] = "openvino"
    artifact: ClassVar[Literal["onnx", "graph"]] = "onnx"
    clock: ClassVar[Literal["host", "cuda_event", "model"]] = "host"
    kinds: ClassVar[tuple[str, ...]] = ("cpu",)

    def __init__(self, options: Mapping[str, Scalar]) -> None:
        unknown = set(options) - set(OPTIONS)
        if unknown:
            raise UsageError(f"openvino has no option {sorted(unknown)[0]!r} (it has: {', '.join(OPTIONS)})")
        self.options = {**OPTIONS, **options}
        if self.options["precision"] not in PRECISIONS:
            raise UsageError(f"precision {self.options['precision']!r}: one of {', '.join(PRECISIONS)}")
        threads = self.options["threads"]
        if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
            raise UsageError(f"openvino: threads must be a whole number from 1, got {threads!r}")
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
            runner = OpenVinoRunner(self._openvino, self._core, model, self._config(), self._buffers)
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


def _words(error: Exception) -> str:
    """OpenVINO's message without the source positions before each line, on one line."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("Exception from src", "Check '"))]
    return " ".join(" ".join(kept or lines).split())
