"""torch and torch.compile by the laws of every back-end, and their own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'latbench[search]'")

from latbench.backends.base import Scalar  # noqa: E402
from latbench.backends.torch import TorchBackend, TorchCompileBackend, _compiler  # noqa: E402
from latbench.errors import BackendUnavailableError, MeasurementError, UsageError  # noqa: E402
from latbench.graph.ir import Graph, GraphBuilder  # noqa: E402
from latbench.graph.ops import Conv2d, ReLU  # noqa: E402
from latbench.graph.passes import random_weights  # noqa: E402
from latbench.graph.torch import to_module  # noqa: E402
from latbench.measure.base import Request, SamplingPlan, WorkerSetup  # noqa: E402
from latbench.measure.launcher import LocalLauncher  # noqa: E402
from latbench.spaces.mobilenet_v1 import MobileNetV1Space  # noqa: E402
from latbench.testing import BackendConformance  # noqa: E402

GPU = torch.cuda.is_available()
needs_compiler = pytest.mark.skipif(not _compiler(), reason="torch_compile needs a C++ compiler: apt-get install g++")
needs_gpu = pytest.mark.skipif(not GPU, reason="torch sees no GPU here")


class TestEager(BackendConformance):
    backend = "torch"


class TestEagerChannelsLast(BackendConformance):
    backend = "torch"
    options = {"channels_last": True}  # noqa: RUF012


@pytest.mark.slow  # the compiler takes seconds a model
@needs_compiler
class TestCompiled(BackendConformance):
    backend = "torch_compile"


@pytest.mark.gpu
@needs_gpu
class TestEagerOnGpu(BackendConformance):
    backend = "torch"
    options = {"device": 0}  # noqa: RUF012
    tolerance = 1e-3


@pytest.mark.gpu
@needs_gpu
class TestCompiledOnGpu(BackendConformance):
    backend = "torch_compile"
    options = {"device": 0, "mode": "reduce-overhead"}  # noqa: RUF012
    tolerance = 1e-3


def block(channels: int = 8, dtype: Any = "float32") -> Graph:
    b = GraphBuilder(dtype)
    x = b.add(Conv2d(channels, 8, 3, padding=1, bias=True), b.input("x", (1, channels, 14, 14)), name="conv")
    return b.build(b.add(ReLU(), x, name="relu"))


def write(graph: Graph, folder: Path) -> Path:
    path = folder / f"{graph.key}.json"
    path.write_text(graph.to_json())
    return path


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threds": 1}, "torch_compile has no option 'threds'"),
        ({"threads": 0}, "a whole number from 1 to 1024, got 0"),
        ({"device": "gpu"}, "cpu or the number of a GPU, got 'gpu'"),
        ({"device": -1}, "cpu or the number of a GPU, got -1"),
        ({"tf32": 1}, "true or false, got 1"),
        ({"mode": "fastest"}, "must be default or reduce-overhead"),
    ],
)
def test_options_are_checked_before_any_work(options: dict[str, Scalar], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        TorchCompileBackend(options)


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_an_absent_gpu_is_said() -> None:
    with pytest.raises(BackendUnavailableError, match=r"torch .* sees no GPU 0; .*nvidia-smi"):
        TorchBackend({"device": 0}).open()


def test_a_parent_checks_options_without_importing_torch() -> None:
    code = (
        "import sys; from latbench.backends.torch import TorchBackend; TorchBackend({}); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_missing_compiler_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    TorchBackend.available()
    with pytest.raises(BackendUnavailableError, match="run: apt-get install"):
        TorchCompileBackend.available()


def test_layers_are_the_graphs_nodes(tmp_path: Path) -> None:
    graph = MobileNetV1Space(resolution=32).network((0,) * 14)
    with TorchBackend({}).load(write(graph, tmp_path)) as runner:
        layers = runner.layers()
        assert layers is not None
        assert [(layer.name, layer.op) for layer in layers] == [(n.name, type(n.op).__name__) for n in graph.nodes]
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in runner.module.modules())
    assert hooks == 0


def test_half_precision_is_computed_in_half_precision(tmp_path: Path) -> None:
    graph = block(dtype="float16")
    x = np.random.default_rng(0).standard_normal((1, 8, 14, 14)).astype(np.float16)
    with TorchBackend({}).load(write(graph, tmp_path)) as runner:
        (got,) = runner.outputs({"x": x}).values()
    with torch.inference_mode():
        want = to_module(graph, random_weights(graph))(torch.from_numpy(x)).numpy()
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, want)


def test_what_is_no_graph_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "g").write_text('{"nodes": []}')
    with pytest.raises(MeasurementError, match="not a graph in JSON"), TorchBackend({}).load(tmp_path / "g"):
        pass


@pytest.mark.slow
@needs_compiler
def test_more_models_than_dynamo_keeps_of_one_function(tmp_path: Path) -> None:
    """Past its limit torch.compile falls back to eager, silently but for `fullgraph`."""
    backend = TorchCompileBackend({})
    torch._dynamo.config.recompile_limit = 2
    try:
        for channels in (8, 16, 24, 32):
            with backend.load(write(block(channels), tmp_path)) as runner:
                assert runner.sample(1) > 0
    finally:
        torch._dynamo.config.recompile_limit = 8


@pytest.mark.parametrize("name", ["torch", pytest.param("torch_compile", marks=[pytest.mark.slow, needs_compiler])])
def test_nothing_runs_beside_the_measurement(name: str, tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from latbench import plugins
backend = plugins.load("latbench.backends", sys.argv[1])({})
with backend.load(Path(sys.argv[2])) as runner:
    runner.sample(3)
    parents = [p.read_text().rpartition(")")[2].split()[1] for p in Path("/proc").glob("[0-9]*/stat") if p.exists()]
    print(parents.count(str(os.getpid())), backend._torch.get_num_threads(), backend._torch.get_num_interop_threads())
"""
    command = [sys.executable, "-c", code, name, str(write(block(), tmp_path))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["0", "1", "1"]


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_the_clock_is_the_gpus(tmp_path: Path) -> None:
    backend = TorchBackend({"device": 0})
    assert backend.clock == "cuda_event"
    with backend.load(write(block(), tmp_path)) as runner:
        runner.evict(1 << 20)
        assert runner.sample(10) > 0


@pytest.mark.gpu
@needs_gpu
def test_a_batch_too_large_for_the_memory_is_a_row(tmp_path: Path) -> None:
    b = GraphBuilder()
    graph = b.build(b.add(Conv2d(1, 16384, 1), b.input("x", (64, 1, 1024, 1024)), name="conv"))  # gives 4.4 TB
    setup = WorkerSetup("latbench.backends.torch:TorchBackend", {"threads": 1, "device": 0})
    path = str(write(graph, tmp_path))
    with LocalLauncher(setup) as launcher:
        (measured,) = launcher.measure([Request("k", path, 0, 0, SamplingPlan(runs=1, rounds=1))])
    assert measured.status == "error"
    assert "OutOfMemoryError" in (measured.error or "")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's")
@pytest.mark.parametrize("keep", [True, False])
def test_freed_memory_stays_in_the_process(keep: bool) -> None:
    # In a process of its own: thresholds cannot be taken back.
    program = f"""
import ctypes, resource
from latbench.backends.torch import keep_heap
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.mallopt(-3, 131072)  # M_MMAP_THRESHOLD: no longer dynamic
{"keep_heap()" if keep else ""}
def cycle():
    memory = libc.malloc(8 << 20)
    ctypes.memset(memory, 1, 8 << 20)
    libc.free(memory)
cycle()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    cycle()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    faults = int(run.stdout)
    assert faults < 100 if keep else faults >= 10 * (8 << 20) // (1 << 21)  # pages may be huge
