"""TensorRT opened once in a worker, and engines built with it; ``tensorrt_versions`` holds what differs by version.

Imported by workers: standard library and numpy, Python 3.9.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from latbench.backends import cuda, tensorrt_cache
from latbench.backends.base import Scalar
from latbench.backends.cuda import Cuda
from latbench.backends.tensorrt_versions import Api, Settings, network_flags, settings, typing_of, unsupported
from latbench.errors import BackendUnavailableError, MeasurementError


class Toolkit:
    """TensorRT and CUDA, opened once in a worker. Raises MeasurementError in their words where they refuse."""

    def __init__(self, options: Mapping[str, Scalar]) -> None:
        self.options = options
        try:
            trt = import_module("tensorrt")
        except ImportError as error:
            raise MeasurementError(f"tensorrt cannot be imported: {error}") from error
        self.trt: Any = trt
        self.api = Api.of(trt)
        self.logger = make_logger(trt)
        self.cuda = self._connect(int(options["device"]))
        self.runtime = self._start("Runtime")
        gpu = self.cuda.device
        reason = unsupported(self.api.version, gpu.capability, gpu.name)
        if reason:
            raise MeasurementError(reason)
        self.builder.max_threads = int(options["threads"])
        self.plans = Plans(0 if options["timing_cache"] == "off" else 1 << 30)
        self.typing = typing_of(self.api, str(options["typing"]))
        self.external, self.external_note = self._external(gpu.capability)
        where = str(options["timing_cache"])
        self.cache_path = None if where == "off" else Path(os.path.expanduser(where))  # noqa: PTH111
        if where == "auto":
            self.cache_path = tensorrt_cache.default_path(self.api.version, gpu.name, gpu.capability)

    def _connect(self, index: int) -> Cuda:
        """Makes the device current and starts the builder on it, whose words on a device that is missing say more.

        The runtime comes after both: 8.6's crashes where there is no GPU.
        """
        try:
            device = cuda.connect(index)
        except BackendUnavailableError as error:
            self.builder = self._start("Builder")
            raise MeasurementError(str(error)) from error
        self.builder = self._start("Builder")
        return device

    def _start(self, name: str) -> Any:
        try:
            return getattr(self.trt, name)(self.logger)
        except Exception as error:  # a TypeError of the bindings: "factory function returned nullptr"
            words = self.logger.words() or f"{type(error).__name__}: {error}"
            raise MeasurementError(f"TensorRT {self.api.version} refuses to make a {name}: {words}") from error

    def _external(self, capability: tuple[int, int]) -> tuple[bool, str]:
        """Whether cuBLAS and cuDNN may serve core layers, and why not where that is not what was asked for."""
        wish = self.options["external_tactics"]
        if wish == "off" or (wish == "auto" and capability >= (7, 0)):
            return False, ""
        if self.api.release < (10, 0) and not _cudnn_works():
            return False, "external_tactics=off: no cuDNN 8 here (pip install 'nvidia-cudnn-cu12<9' nvidia-cublas-cu12)"
        return True, ""


class Plans:
    """Serialized engines of the models that a worker has built, the oldest dropped beyond `limit_bytes` (0: none kept).

    A row's blocks come back to its model several times: seconds each, were it built anew.
    """

    def __init__(self, limit_bytes: int = 1 << 30) -> None:
        self.limit_bytes = limit_bytes
        self._kept: dict[str, tuple[bytes, list[str]]] = {}

    def get(self, toolkit: Toolkit, model: bytes) -> tuple[bytes, list[str]]:
        """The engine of a model and the notes of its build; built where there is none."""
        key = hashlib.sha256(model).hexdigest()
        if key not in self._kept:
            plan, notes = build(toolkit, model)
            self._kept[key] = bytes(memoryview(plan)), notes
        found = self._kept.pop(key)
        self._kept[key] = found  # the newest is the last
        while sum(len(plan) for plan, _ in self._kept.values()) > self.limit_bytes:
            del self._kept[next(iter(self._kept))]
        return found


def build(toolkit: Toolkit, model: bytes) -> tuple[Any, list[str]]:
    """A serialized engine of an ONNX model, and notes for its row.

    Raises MeasurementError with the parser's or the builder's words.
    """
    trt, builder, api = toolkit.trt, toolkit.builder, toolkit.api
    creation = _mask(trt.NetworkDefinitionCreationFlag, network_flags(api, toolkit.typing))
    network = builder.create_network(creation)
    parser = trt.OnnxParser(network, toolkit.logger)
    if not parser.parse(model) or parser.num_errors:
        reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise MeasurementError("; ".join(reasons) or toolkit.logger.words() or "the model cannot be parsed")
    wanted = settings(
        api,
        toolkit.typing,
        types=_types(network),
        tf32=bool(toolkit.options["tf32"]),
        external_tactics=toolkit.external,
    )
    config = builder.create_builder_config()
    configure(trt, config, wanted)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the inspector's; costs nothing when not profiled
    config.builder_optimization_level = int(toolkit.options["optimisation_level"])
    notes = list(wanted.notes)
    if toolkit.cache_path is None:
        return _serialized(toolkit, network, config), notes
    with tensorrt_cache.opened(toolkit.cache_path) as entries:
        cache = config.create_timing_cache(entries.data)
        if cache is None or not config.set_timing_cache(cache, False):
            raise MeasurementError(
                f"timing cache {entries.path} is of another TensorRT or device ({toolkit.logger.words()}); "
                f"run: rm '{entries.path}'"
            )
        before = entries.digest
        plan = _serialized(toolkit, network, config)
        cache = config.get_timing_cache()
        entries.replace(bytes(memoryview(cache.serialize())))
        notes.append(f"timing_cache={before}->{entries.digest}")
    return plan, notes


def configure(trt: Any, config: Any, wanted: Settings) -> None:
    """Applies settings by name."""
    for name in wanted.flags_on:
        config.set_flag(getattr(trt.BuilderFlag, name))
    for name in wanted.flags_off:
        config.clear_flag(getattr(trt.BuilderFlag, name))
    for name, on in wanted.previews:
        config.set_preview_feature(getattr(trt.PreviewFeature, name), on)
    sources = config.get_tactic_sources() | _mask(trt.TacticSource, wanted.sources_on)
    config.set_tactic_sources(sources & ~_mask(trt.TacticSource, wanted.sources_off))


def _serialized(toolkit: Toolkit, network: Any, config: Any) -> Any:
    plan = toolkit.builder.build_serialized_network(network, config)
    if plan is None:
        raise MeasurementError(f"no engine could be built: {toolkit.logger.words() or 'TensorRT does not say why'}")
    return plan


def _types(network: Any) -> set[str]:
    """Names of the types of every tensor of a parsed network.

    Until it is built, weak typing shows what a QuantizeLinear gives as the float that it takes: that is int8.
    """
    found = {network.get_input(i).dtype.name for i in range(network.num_inputs)}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        types = {tensor.dtype.name for tensor in outputs if tensor is not None}
        if layer.type.name == "QUANTIZE" and types <= {"FLOAT", "HALF"}:
            found.add("INT8")
        found |= types
    return found


def _mask(enumeration: Any, names: tuple[str, ...]) -> int:
    """Bits of members, by name."""
    mask = 0
    for name in names:
        member = getattr(enumeration, name)
        mask |= 1 << int(getattr(member, "value", member))
    return mask


def _cudnn_works() -> bool:
    """Whether TensorRT 8.6 would find a cuDNN 8 that is more than a stub."""
    try:
        version: int = ctypes.CDLL("libcudnn.so.8").cudnnGetVersion()
    except (OSError, AttributeError):
        return False
    return version >= 8000


def make_logger(trt: Any) -> Any:
    """A logger that keeps errors and warnings, and prints nothing."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # its base is only known at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[str, str]] = []

        def log(self, severity: Any, message: str) -> None:
            if severity.name in ("INTERNAL_ERROR", "ERROR", "WARNING"):
                self.lines.append((severity.name, " ".join(message.split())))

        def clear(self) -> None:
            self.lines.clear()

        def words(self) -> str:
            """The errors, else the warnings, each once."""
            errors = [line for severity, line in self.lines if severity != "WARNING"]
            return "; ".join(dict.fromkeys(errors or self.warnings()))

        def warnings(self) -> list[str]:
            return list(dict.fromkeys(line for severity, line in self.lines if severity == "WARNING"))

    return Logger()


def make_profiler(trt: Any) -> Any:
    """A profiler that keeps every time of every layer, in ms."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]  # its base is only known at run time
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.spent: dict[str, list[float]] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.spent.setdefault(layer_name, []).append(ms)

        def clear(self) -> None:
            self.spent.clear()

    return Profiler()
