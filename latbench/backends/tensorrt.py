"""TensorRT on NVIDIA GPUs: one inference path for 8.6, 10 and 11 (``tensorrt_versions`` holds what differs).

Constructing the back-end only reads its options: parents do that without TensorRT, whose worker may be another
interpreter. Python 3.9.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import metadata, util
from pathlib import Path
from typing import ClassVar, Literal

from latbench.backends import cuda
from latbench.backends.base import MAX_THREADS, Scalar, checked
from latbench.backends.streams import TIMER_NS
from latbench.backends.tensorrt_build import Toolkit
from latbench.backends.tensorrt_runner import MAX_STREAMS, TensorRTRunner, TensorRTStreamsRunner
from latbench.backends.tensorrt_versions import unsupported
from latbench.errors import BackendUnavailableError, MeasurementError, UsageError

CHOICES = {
    "typing": ("auto", "weak", "strong"),
    "external_tactics": ("auto", "on", "off"),
    "launch": ("graph", "eager"),
}
PACKAGES = ("tensorrt", "tensorrt_bindings", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings")


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
    int8: ClassVar[str] = "tensorrt"  # the scheme of latbench.graph.quantize that it takes
    streams: ClassVar[str] = "latbench.backends.tensorrt:TensorRTStreams"  # for throughput
    runner: ClassVar[type[TensorRTRunner]] = TensorRTRunner
    defaults: ClassVar[Mapping[str, Scalar]] = {
        "device": 0,
        "threads": 1,
        "typing": "auto",
        "tf32": False,
        "external_tactics": "auto",
        "launch": "graph",
        "timing_cache": "auto",
        "optimisation_level": 3,
    }
    counts: ClassVar[Mapping[str, tuple[int, int]]] = {
        "device": (0, 63),
        "threads": (1, MAX_THREADS),
        "optimisation_level": (0, 5),
    }
    load_limit_s: ClassVar[float] = 1800.0  # builds take minutes; one that hangs is killed
    fresh_build: ClassVar[Mapping[str, Scalar]] = {"timing_cache": "off"}  # options that make each load build anew

    def __init__(self, options: Mapping[str, Scalar]) -> None:
        self.options = checked(self.name, self.defaults, options, counts=self.counts, choices=CHOICES, flags=("tf32",))
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
            yield self.runner(self._toolkit, model, stack)


class TensorRTStreams(TensorRTBackend):
    """Options: those of tensorrt, and `streams`: contexts of one engine at once; 0: two, as one leaves gaps."""

    timer_ns: ClassVar[float] = TIMER_NS
    runner: ClassVar[type[TensorRTRunner]] = TensorRTStreamsRunner
    defaults: ClassVar[Mapping[str, Scalar]] = {**TensorRTBackend.defaults, "streams": 0}
    counts: ClassVar[Mapping[str, tuple[int, int]]] = {**TensorRTBackend.counts, "streams": (0, MAX_STREAMS)}


def installed_version() -> str:
    """Of the ``tensorrt`` that ``import`` would find, by its packages; "?" where none of them is known."""
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(package)
    return "?"
