"""The default back-end, real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latbench.backends.base import aligned_array
from latbench.backends.onnxruntime import LEVELS, OnnxRuntimeBackend
from latbench.errors import BackendUnavailableError, UsageError
from latbench.graph.ir import DType, GraphBuilder
from latbench.graph.onnx import to_onnx
from latbench.graph.ops import Conv2d, ReLU
from latbench.graph.passes import random_weights
from latbench.testing import BackendConformance


class TestConformance(BackendConformance):
    backend = "onnxruntime"


class TestConformanceUnoptimised(BackendConformance):
    backend = "onnxruntime"
    options = {"optimisation": "none", "threads": 2}  # noqa: RUF012


def model(path: Path, dtype: DType = "float32") -> Path:
    b = GraphBuilder(dtype)
    x = b.add(Conv2d(8, 8, 3, padding=1, bias=True), b.input("x", (1, 8, 14, 14)), name="conv")
    graph = b.build(b.add(ReLU(), x, name="relu"))
    path.write_bytes(to_onnx(graph, random_weights(graph, 0)))
    return path


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threds": 1}, r"no option 'threds' \(it has: threads, optimisation\)"),
        ({"optimisation": "most"}, "must be all or extended or basic or none, got 'most'"),
        ({"threads": 0}, "a whole number from 1 to 1024, got 0"),
        ({"threads": "two"}, "a whole number from 1 to 1024, got 'two'"),
        ({"threads": True}, "a whole number from 1 to 1024, got True"),
        ({"threads": 1.5}, "a whole number from 1 to 1024, got 1.5"),
    ],
)
def test_options_are_checked_before_any_work(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        OnnxRuntimeBackend(options)


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_runs_and_optimising_fuses(level: str, tmp_path: Path) -> None:
    with OnnxRuntimeBackend({"optimisation": level}).load(model(tmp_path / "m.onnx")) as runner:
        layers = runner.layers()
    assert layers is not None
    ops = [layer.op for layer in layers]
    assert ("Relu" in ops) == (level in ("none", "basic"))


def test_the_profiling_pass_leaves_no_file_and_no_profiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with OnnxRuntimeBackend({}).load(model(tmp_path / "m.onnx")) as runner:
        assert runner.layers()
        assert runner.sample(3) > 0
        assert runner.layers()
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_nothing_runs_or_is_written_beside_the_measurement(tmp_path: Path) -> None:
    """Since 1.31 ONNX Runtime collects usage data in a thread and a file of its own, unless told not to."""
    code = """
import os, sys
from pathlib import Path
from latbench.backends.onnxruntime import OnnxRuntimeBackend
before = len(os.listdir("/proc/self/task"))
with OnnxRuntimeBackend({}).load(Path(sys.argv[1])) as runner:
    runner.sample(3)
    print(len(os.listdir("/proc/self/task")) - before)
"""
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "OPENBLAS_NUM_THREADS": "1"}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    command = [sys.executable, "-c", code, str(model(tmp_path / "m.onnx"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "0\n"
    assert list((tmp_path / "tmp").iterdir()) == []


def test_half_precision_runs(tmp_path: Path) -> None:
    with OnnxRuntimeBackend({}).load(model(tmp_path / "m.onnx", "float16")) as runner:
        assert runner.sample(1) > 0


def test_a_missing_runtime_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match="run: pip install onnxruntime"):
        OnnxRuntimeBackend({})


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int64", "int32", "int8", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(1, 3, 7, 7), (5,), (1, 70_000), (0, 3)])
def test_buffers_are_seeded_aligned_noise(dtype: str, shape: tuple[int, ...]) -> None:
    array, twin = aligned_array(shape, dtype), aligned_array(shape, dtype)
    assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
    assert array.ctypes.data % 4096 == 0 or not array.size
    assert array.flags.c_contiguous
    assert np.array_equal(array, twin)
    if array.size > 100:
        assert len(np.unique(array)) >= 2
        assert np.isfinite(array.astype(np.float64)).all()
    if dtype.startswith("int"):
        assert ((array >= 0) & (array < 8)).all()
