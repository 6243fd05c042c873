"""TensorRT: its options, its timing cache, its inference path on a scripted engine, and the real 8.6 module.

LATBENCH_TRT86 names an environment with TensorRT 8.6 for another interpreter (a folder with `activate`, `python/`).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_tensorrt_versions import used_names

from latbench.backends import cuda, tensorrt, tensorrt_build, tensorrt_cache
from latbench.backends.base import Scalar
from latbench.backends.tensorrt import TensorRTBackend, TensorRTRunner
from latbench.backends.tensorrt_build import Plans, Toolkit, build, configure
from latbench.backends.tensorrt_versions import ENUMERATIONS, Api, settings, typing_of
from latbench.errors import BackendUnavailableError, MeasurementError, UsageError
from latbench.graph.ir import GraphBuilder
from latbench.graph.onnx import to_onnx
from latbench.graph.ops import Linear
from latbench.graph.passes import random_weights
from latbench.interpreter import describe
from latbench.measure.base import Request, SamplingPlan, WorkerSetup
from latbench.measure.launcher import LocalLauncher
from latbench.testing import BackendConformance

SPEC = "latbench.backends.tensorrt:TensorRTBackend"


def works() -> bool:
    try:
        TensorRTBackend.available()
    except BackendUnavailableError:
        return False
    return True


needs_gpu = pytest.mark.skipif(not works(), reason="TensorRT does not run here (latbench devices says why)")


@pytest.mark.gpu
@needs_gpu
class TestGraphLaunch(BackendConformance):
    backend = "tensorrt"
    tolerance = 1e-3


@pytest.mark.gpu
@needs_gpu
class TestEagerLaunch(BackendConformance):
    backend = "tensorrt"
    options = {"launch": "eager", "timing_cache": "off"}  # noqa: RUF012
    tolerance = 1e-3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lunch": "graph"}, r"no option 'lunch' \(it has: device, threads"),
        ({"launch": "fast"}, "launch must be graph or eager, got 'fast'"),
        ({"typing": "strict"}, "typing must be auto or weak or strong"),
        ({"external_tactics": True}, "external_tactics must be auto or on or off, got True"),
        ({"device": -1}, "device must be a whole number from 0"),
        ({"device": True}, "device must be a whole number"),
        ({"optimisation_level": 9}, "from 0 to 5, got 9"),
        ({"tf32": "yes"}, "tf32 must be true or false, got 'yes'"),
        ({"timing_cache": ""}, "timing_cache must be auto, off or a file"),
    ],
)
def test_options_are_checked_without_tensorrt(options: dict[str, Scalar], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        TensorRTBackend(options)


def test_absence_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match=r"run: pip install 'latbench\[tensorrt\]'.*worker_python"):
        TensorRTBackend.available()


@pytest.mark.parametrize(
    ("version", "gpus", "words"),
    [
        ("10.13.3", [("TITAN Xp", (6, 1))], r"10\.13\.3 does not run on TITAN Xp .*pip install 'tensorrt==8\.6"),
        ("8.6.1", [], r"tensorrt 8\.6\.1 is installed, but .*nvidia-smi"),
        ("8.6.1", [("TITAN Xp", (6, 1))], ""),
        ("10.13.3", [("TITAN Xp", (6, 1)), ("H100", (9, 0))], ""),
    ],
)
def test_absence_is_explained_by_version_and_device(
    version: str, gpus: list[tuple[str, tuple[int, int]]], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> tuple[cuda.CudaDevice, ...]:
        if not gpus:
            raise BackendUnavailableError("no NVIDIA driver here; look with: nvidia-smi")
        return tuple(cuda.CudaDevice(*gpu) for gpu in gpus)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(tensorrt, "installed_version", lambda: version)
    monkeypatch.setattr(cuda, "devices", found)
    if not words:
        TensorRTBackend.available()
        return
    with pytest.raises(BackendUnavailableError, match=words) as caught:
        TensorRTBackend.available()
    assert "\n" not in str(caught.value)


# ---- the timing cache -------------------------------------------------------------------------------------------


def test_a_timing_cache_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "t.timing"
    with tensorrt_cache.opened(path) as cache:
        assert (cache.data, cache.digest) == (b"", "empty")
        cache.replace(b"tactics\n" * 100)
        after = cache.digest
    with tensorrt_cache.opened(path) as cache:
        assert (cache.data, cache.digest) == (b"tactics\n" * 100, after)
        stamp = path.stat().st_mtime_ns
        cache.replace(cache.data)
        assert path.stat().st_mtime_ns == stamp
    assert sorted(p.name for p in path.parent.iterdir()) == ["t.timing", "t.timing.lock"]


@pytest.mark.parametrize(
    "harm", [lambda raw: raw[:-1], lambda raw: b"x" + raw, lambda raw: b"", lambda raw: raw + b"x"]
)
def test_a_corrupt_timing_cache_names_itself_and_the_command(harm: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "t.timing"
    with tensorrt_cache.opened(path) as cache:
        cache.replace(b"tactics")
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(MeasurementError, match=r"t\.timing is corrupt; run: rm '"), tensorrt_cache.opened(path):
        pass


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MeasurementError, match="choose another file"), tensorrt_cache.opened(tmp_path / "file" / "t"):
        pass


def _append(path: Path) -> None:
    for _ in range(20):
        with tensorrt_cache.opened(path) as cache:
            data = cache.data
            time.sleep(0.001)
            cache.replace(data + b"+")


def test_two_builds_at_once_lose_no_entry(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_append, args=(tmp_path / "t",)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    with tensorrt_cache.opened(tmp_path / "t") as cache:
        assert cache.data == b"+" * 40


def test_a_cache_is_of_one_version_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    path = tensorrt_cache.default_path("8.6.1", "NVIDIA TITAN Xp", (6, 1))
    assert str(path) == "/c/latbench/tensorrt/8.6.1-NVIDIA-TITAN-Xp-sm61.timing"


# ---- the inference path, on an engine and a device of this module's making -------------------------------------


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


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., TensorRTRunner]]:
    monkeypatch.setattr(tensorrt_build, "build", lambda kit, model: (b"plan", ["timing_cache=empty->0123abcd"]))
    stack, used = ExitStack(), []

    def made(device: Device, engine: Any = None, **options: Scalar) -> TensorRTRunner:
        used.append(device)
        return TensorRTRunner(toolkit(device, engine or Engine(device), **options), b"model", stack)

    yield made
    stack.close()
    assert all(not device.live for device in used), "something was not given back"


def test_graphs_are_replayed_and_time_is_the_devices(make: Callable[..., TensorRTRunner]) -> None:
    device = Device()
    runner = make(device)
    assert device.log == ["run"]
    assert runner.sample(8) == 8 * 0.25
    assert device.log == ["run"] * 9
    assert runner.notes()[:4] == (
        "typing=weak", "timing_cache=empty->0123abcd", "launch=graph", "tensorrt: a slow tactic was chosen",
    )  # fmt: skip


def test_where_capture_fails_it_runs_eagerly_and_says_why(make: Callable[..., TensorRTRunner]) -> None:
    runner = make(Device(graphs=False))
    assert runner.sample(4) == 1.0
    assert "launch=eager: cudaStreamEndCapture: operation not permitted" in runner.notes()


def test_eager_on_request_captures_nothing(make: Callable[..., TensorRTRunner]) -> None:
    device = Device()
    runner = make(device, launch="eager")
    assert "launch=eager" in runner.notes()
    assert "graph" not in device.made
    assert runner.sample(4) == 1.0


def test_a_host_slower_than_the_device_is_said(make: Callable[..., TensorRTRunner]) -> None:
    device = Device()
    runner = make(device, launch="eager")
    slow = device.record
    device.record = lambda event, stream: (time.sleep(0.01), slow(event, stream))[1]  # type: ignore[method-assign]
    runner.sample(1)
    assert "enqueue_bound" in runner.notes()


def test_outputs_are_those_of_the_inputs_and_the_resident_ones_return(make: Callable[..., TensorRTRunner]) -> None:
    device = Device()
    runner = make(device)
    resident = bytes(device.memory[1000])
    (y,) = runner.outputs({"x": np.array([[1, 2, 3, 4]], np.float32)}).values()
    assert y.tolist() == [[2, 4, 6, 8]]
    assert bytes(device.memory[1000]) == resident
    assert any(resident)


def test_the_layer_pass_has_a_context_of_its_own(make: Callable[..., TensorRTRunner]) -> None:
    device = Device()
    runner = make(device)
    layers = runner.layers()
    assert layers is not None
    assert [(one.name, one.op, one.ms) for one in layers] == [("double", "PointWise", 0.3)]
    assert runner._context.profiler is None


def test_cold_means_written_over_before_every_sample(make: Callable[..., TensorRTRunner]) -> None:
    device = Device()
    runner = make(device)
    device.log.clear()
    for _ in range(2):
        runner.evict(64)
        assert runner.sample(1) == 0.25  # the sweep is before the first event
    assert device.log == ["sweep", "run"] * 2
    assert max(len(memory) for memory in device.memory.values()) == 2 * device.l2_bytes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shapes": {"x": (-1, 4), "y": (1, 4)}}, r"'x' has shape \(-1, 4\): not a static tensor"),
        ({"dtypes": {"x": "BF16", "y": "FLOAT"}}, "'x' is BF16"),
    ],
)
def test_what_cannot_be_fed_is_said(make: Callable[..., TensorRTRunner], change: dict[str, Any], words: str) -> None:
    device = Device()
    engine = Engine(device)
    vars(engine).update(change)
    with pytest.raises(MeasurementError, match=words):
        make(device, engine)


def test_no_engine_and_no_context_are_said(make: Callable[..., TensorRTRunner]) -> None:
    device = Device()
    engine = Engine(device)
    engine.create_execution_context = lambda: None  # type: ignore[method-assign]
    with pytest.raises(MeasurementError, match="no room to execute the engine"):
        make(device, engine)


# ---- building, on a scripted builder of 8.6 --------------------------------------------------------------------


class Recorder:
    """An object whose calls are kept, and answered from a table (None otherwise)."""

    def __init__(self, answers: dict[str, Any]) -> None:
        vars(self).update(answers=answers, calls=[])

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls.append((name, *arguments))
            answer = self.answers.get(name)
            return answer(*arguments) if callable(answer) else answer

        return call


def building(
    *, reasons: tuple[str, ...] = (), plan: bytes | None = b"plan", types: tuple[str, ...] = ("FLOAT",), **config: Any
) -> tuple[Any, Recorder]:
    """A toolkit of TensorRT 8.6 whose parser, builder and config do as they are told, and the config."""
    tensors = [SimpleNamespace(dtype=SimpleNamespace(name=name)) for name in types]
    network = SimpleNamespace(
        num_inputs=1,
        get_input=lambda i: tensors[0],
        num_layers=len(tensors) - 1,
        get_layer=lambda i: SimpleNamespace(num_outputs=1, get_output=lambda j: tensors[i + 1]),
    )
    parser = SimpleNamespace(
        parse=lambda model: not reasons,
        num_errors=len(reasons),
        get_error=lambda i: SimpleNamespace(desc=lambda: reasons[i]),
    )
    made = Recorder({"get_tactic_sources": 0b11111, **config})
    members = {
        "BuilderFlag": ("FP16", "INT8", "TF32"),
        "TacticSource": ("CUBLAS", "CUBLAS_LT", "CUDNN"),
        "PreviewFeature": ("DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805",),
        "NetworkDefinitionCreationFlag": ("EXPLICIT_BATCH",),
    }
    numbered = {name: SimpleNamespace(**{m: i for i, m in enumerate(found)}) for name, found in members.items()}
    verbosity = SimpleNamespace(DETAILED="detailed")
    trt = SimpleNamespace(**numbered, OnnxParser=lambda net, logger: parser, ProfilingVerbosity=verbosity)
    builder = SimpleNamespace(
        create_network=lambda flags: network if flags == 1 else pytest.fail("EXPLICIT_BATCH was not asked for"),
        create_builder_config=lambda: made,
        build_serialized_network=lambda net, config: plan,
    )
    kit = SimpleNamespace(
        trt=trt,
        builder=builder,
        api=Api("8.6.1", members),
        logger=Log(),
        typing="weak",
        external=False,
        cache_path=None,
        options={"tf32": False, "optimisation_level": 3},
    )
    kit.logger.lines.append("Error Code 10: no implementation for node conv")
    return kit, made


def test_a_half_precision_model_is_built_with_its_flag_and_without_tf32() -> None:
    kit, config = building(types=("HALF", "HALF", "FLOAT"))
    assert build(kit, b"onnx") == (b"plan", [])
    assert ("set_flag", kit.trt.BuilderFlag.FP16) in config.calls
    assert ("clear_flag", kit.trt.BuilderFlag.TF32) in config.calls
    assert ("set_tactic_sources", 0b11000) in config.calls
    assert not [call for call in config.calls if call[0] == "set_preview_feature"]
    assert vars(config)["profiling_verbosity"] == "detailed"


def test_quantised_tensors_ask_for_int8() -> None:
    kit, config = building(types=("FLOAT", "INT8", "FLOAT"))
    build(kit, b"onnx")
    assert [call for call in config.calls if call[0] == "set_flag"] == [("set_flag", kit.trt.BuilderFlag.INT8)]


def test_every_reason_of_the_parser_is_told() -> None:
    kit, _ = building(reasons=("no importer for MyOp", "x has no shape"))
    with pytest.raises(MeasurementError, match=r"^no importer for MyOp; x has no shape$"):
        build(kit, b"onnx")


def test_a_builder_without_a_plan_is_told_with_the_loggers_words() -> None:
    kit, _ = building(plan=None)
    with pytest.raises(MeasurementError, match="no engine could be built: Error Code 10: no implementation for node"):
        build(kit, b"onnx")


def test_a_build_reads_and_grows_the_timing_cache(tmp_path: Path) -> None:
    entries = iter((b"first", b"first and second"))
    given: list[bytes] = []

    def grown() -> Any:
        return SimpleNamespace(serialize=lambda: bytearray(next(entries)))

    notes = []
    for _ in range(2):
        kit, config = building(
            create_timing_cache=lambda data: given.append(data) or "cache",
            set_timing_cache=True,
            get_timing_cache=grown,
        )
        kit.cache_path = tmp_path / "t.timing"
        notes += build(kit, b"onnx")[1]
        assert ("set_timing_cache", "cache", False) in config.calls, "a cache of another device must be refused"
    assert given == [b"", b"first"]
    first, second = (note.removeprefix("timing_cache=").split("->") for note in notes)
    assert first[0] == "empty"
    assert first[1] == second[0] != second[1]


@pytest.mark.parametrize(
    "config", [{"create_timing_cache": None}, {"create_timing_cache": 1, "set_timing_cache": False}]
)
def test_a_timing_cache_of_another_device_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    kit, _ = building(**config)
    kit.cache_path = tmp_path / "t.timing"
    with pytest.raises(MeasurementError, match=r"is of another TensorRT or device .*run: rm '"):
        build(kit, b"onnx")


@pytest.mark.parametrize(("limit_bytes", "builds"), [(1 << 20, "abc"), (8, "abcab"), (0, "abcabab")])
def test_a_worker_builds_a_model_once_while_there_is_room(
    limit_bytes: int, builds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plans of 4 bytes: with room for two, the one used longest ago goes."""
    built: list[bytes] = []
    monkeypatch.setattr(
        tensorrt_build, "build", lambda kit, model: (built.append(model), (bytearray(3) + model, ["typing=weak"]))[1]
    )
    plans, kit = Plans(limit_bytes), SimpleNamespace()
    for model in (b"a", b"b", b"c", b"a", b"b", b"a", b"b"):
        assert plans.get(kit, model) == (b"\0\0\0" + model, ["typing=weak"])  # type: ignore[arg-type]
    assert b"".join(built).decode() == builds


@pytest.mark.parametrize(
    ("wish", "version", "capability", "cudnn", "external", "note"),
    [
        ("auto", "8.6.1", (6, 1), True, True, ""),
        ("auto", "8.6.1", (6, 1), False, False, "external_tactics=off: no cuDNN 8 here"),
        ("auto", "8.6.1", (9, 0), True, False, ""),
        ("on", "8.6.1", (9, 0), True, True, ""),
        ("on", "11.1", (9, 0), False, True, ""),
        ("off", "8.6.1", (6, 1), True, False, ""),
    ],
)
def test_libraries_beside_it_are_used_on_pascal_where_they_are_real(
    wish: str,
    version: str,
    capability: tuple[int, int],
    cudnn: bool,
    external: bool,
    note: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tensorrt_build, "_cudnn_works", lambda: cudnn)
    kit: Any = SimpleNamespace(options={"external_tactics": wish}, api=Api(version, {}))
    used, said = Toolkit._external(kit, capability)
    assert (used, said[: len(note)]) == (external, note)


# ---- the real 8.6, in an interpreter of its own ----------------------------------------------------------------


@pytest.fixture(scope="module")
def python86(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = os.environ.get("LATBENCH_TRT86")
    if not folder:
        pytest.skip("the real TensorRT 8.6: set LATBENCH_TRT86 to the folder of an environment that has it")
    wrapper = tmp_path_factory.mktemp("python86") / "python"
    wrapper.write_text(
        f'#!/usr/bin/env bash\nsource "{folder}/activate"\nexec env PYTHONHOME="$TRT86/python" "$TRT86_PYTHON" "$@"\n'
    )
    wrapper.chmod(0o755)
    return str(wrapper)


def ask(python: str, code: str, *arguments: str) -> Any:
    environment = {**os.environ, "PYTHONPATH": str(Path(tensorrt.__file__).parents[2])}
    done = subprocess.run([python, "-c", code, *arguments], capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def test_the_real_module_has_every_name_that_is_used(python86: str) -> None:
    code = """
import json, sys, tensorrt as trt
wrong = [f"{owner}.{name}" for owner, name in json.loads(sys.argv[1])
         if not hasattr(getattr(trt, owner) if owner else trt, name)]
print(json.dumps(wrong))
"""
    assert ask(python86, code, json.dumps(sorted(used_names()))) == []


def test_the_real_module_takes_our_settings(python86: str) -> None:
    code = """
import json, tensorrt as trt
from latbench.backends.tensorrt_versions import ENUMERATIONS, Api, network_flags, settings, typing_of
from latbench.backends.tensorrt_build import _mask
api = Api.of(trt)
both = [settings(api, typing_of(api, "auto"), types={"HALF"}, external_tactics=e) for e in (False, True)]
for one in both:
    [getattr(trt.BuilderFlag, name) for name in one.flags_on + one.flags_off]
    [getattr(trt.PreviewFeature, name) for name, _ in one.previews]
print(json.dumps([api.version, {name: sorted(api.members[name]) for name in ENUMERATIONS},
                  _mask(trt.NetworkDefinitionCreationFlag, network_flags(api, "weak")),
                  [_mask(trt.TacticSource, one.sources_on + one.sources_off) for one in both]]))
"""
    version, members, creation, masks = ask(python86, code)
    assert version == "8.6.1"
    assert creation == 1
    assert masks == [0b111, 0b111]  # CUBLAS, CUBLAS_LT, CUDNN
    api = Api(version, members)
    assert typing_of(api, "auto") == "weak"
    folder = os.environ.get("LATBENCH_REFERENCE_DATA")
    if folder:
        recorded = json.loads((Path(folder) / "tensorrt_python_api.json").read_text())["8.6.1"]
        assert {name: sorted(recorded[name]) for name in ENUMERATIONS} == members


def test_settings_reach_a_builder_config_by_name() -> None:
    """The calls on a config, in the order of the settings; the real one needs a GPU to exist."""
    calls: list[tuple[Any, ...]] = []

    class Config:
        def __getattr__(self, name: str) -> Callable[..., int]:
            return lambda *arguments: calls.append((name, *arguments)) or 0b11101  # type: ignore[func-returns-value]

    sources = SimpleNamespace(CUBLAS=0, CUBLAS_LT=1, CUDNN=2)
    flags = SimpleNamespace(TF32="tf32", FP16="fp16")
    trt = SimpleNamespace(BuilderFlag=flags, TacticSource=sources, PreviewFeature=SimpleNamespace())
    members = dict.fromkeys(ENUMERATIONS, ()) | {
        "BuilderFlag": ("TF32", "FP16"),
        "TacticSource": ("CUBLAS", "CUBLAS_LT", "CUDNN"),
    }
    configure(trt, Config(), settings(Api("8.6.1", members), "weak", types={"HALF"}))
    assert calls == [
        ("set_flag", "fp16"),
        ("clear_flag", "tf32"),
        ("get_tactic_sources",),
        ("set_tactic_sources", 0b11000),
    ]


@pytest.mark.skipif(works(), reason="there is a GPU")
def test_the_builders_refusal_is_a_row_and_the_worker_lives_on(python86: str, tmp_path: Path) -> None:
    b = GraphBuilder()
    graph = b.build(b.add(Linear(8, 8), b.input("x", (1, 8)), name="fc"))
    path = tmp_path / "m.onnx"
    path.write_bytes(to_onnx(graph, random_weights(graph)))
    plan = SamplingPlan(runs=1, rounds=1)
    with LocalLauncher(WorkerSetup(SPEC, {"threads": 1}), python=python86) as launcher:
        assert launcher.start()["python"].startswith("3.11")
        first, second = launcher.measure([Request(key, str(path), 0, 0, plan) for key in "ab"])
    assert (first.status, first.stage) == ("error", "load")
    assert first.error is not None
    assert first.error.startswith("TensorRT 8.6.1 refuses to make a Builder: ")
    assert "CUDA initialization failure with error: 35" in first.error
    assert (second.error, second.pid) == (first.error, first.pid)


@pytest.mark.skipif(works(), reason="there is a GPU")
def test_another_interpreter_is_asked_what_it_has(python86: str) -> None:
    said = describe(SPEC, python86)
    assert said["problem"].startswith("tensorrt 8.6.1 is installed, but no NVIDIA driver here")
    assert said["problem"].endswith("nvidia-smi")


# ---- bad input, on a GPU ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
def test_a_corrupt_timing_cache_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "t.timing").write_bytes(b"nonsense")
    path = tmp_path / "m.onnx"
    b = GraphBuilder()
    graph = b.build(b.add(Linear(8, 8), b.input("x", (1, 8)), name="fc"))
    path.write_bytes(to_onnx(graph, random_weights(graph)))
    backend = TensorRTBackend({"timing_cache": str(tmp_path / "t.timing")})
    with pytest.raises(MeasurementError, match="is corrupt; run: rm"), backend.load(path):
        pass


@pytest.mark.gpu
@needs_gpu
def test_an_operator_that_it_lacks_is_named(tmp_path: Path) -> None:
    import onnx

    node = onnx.helper.make_node("MyOp", ["x"], ["y"], domain="my.domain")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node], "g", [value("x", onnx.TensorProto.FLOAT, [1])], [value("y", onnx.TensorProto.FLOAT, [1])]
    )
    path = tmp_path / "custom.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("my.domain", 1)]), path)
    with pytest.raises(MeasurementError, match="MyOp"), TensorRTBackend({}).load(path):
        pass


@pytest.mark.gpu
@needs_gpu
def test_swept_caches_are_cold(tmp_path: Path) -> None:
    """Eight layers of 4 MB: from the L2 cache of any GPU of ours they come several times faster than from memory."""
    b = GraphBuilder()
    x = b.input("x", (1, 1024))
    for i in range(8):
        x = b.add(Linear(1024, 1024), x, name=f"fc{i}")
    graph = b.build(x)
    path = tmp_path / "m.onnx"
    path.write_bytes(to_onnx(graph, random_weights(graph)))
    with TensorRTBackend({}).load(path) as runner:
        runner.sample(200)
        warm = np.median([runner.sample(1) for _ in range(50)])
        cold = []
        for _ in range(50):
            runner.evict(1 << 20)
            cold.append(runner.sample(1))
    assert np.median(cold) > warm
