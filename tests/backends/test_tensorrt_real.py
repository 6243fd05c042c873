"""TensorRT itself: the 8.6 module in an interpreter of its own, and on a GPU the laws of every back-end.

LATBENCH_TRT86 names an environment with TensorRT 8.6 for another interpreter (a folder with `activate`, `python/`).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_models import custom_operator
from test_tensorrt_versions import used_names

from latbench.backends import tensorrt
from latbench.backends.tensorrt import TensorRTBackend, TensorRTStreams
from latbench.backends.tensorrt_versions import ENUMERATIONS, Api, typing_of
from latbench.errors import BackendUnavailableError, MeasurementError
from latbench.graph.ir import GraphBuilder
from latbench.graph.onnx import to_onnx
from latbench.graph.ops import Conv2d, Linear, ReLU
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
    path = custom_operator(tmp_path / "custom.onnx")
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


@pytest.mark.gpu
@needs_gpu
def test_an_int8_network_is_near_its_float32(tmp_path: Path) -> None:
    """RMS of the change over that of the outputs, by TensorRT's own scheme: as test_quantize holds on CPUs."""
    import onnx
    from onnx import numpy_helper

    from latbench.graph.calibration import ranges
    from latbench.graph.quantize import quantised_tensors, quantize

    b = GraphBuilder()
    x = b.add(Conv2d(16, 32, 3, padding=1, bias=True), b.input("x", (4, 16, 28, 28)), name="conv")
    x = b.add(Conv2d(32, 32, 3, padding=1, bias=True), b.add(ReLU(), x, name="act"), name="last")
    graph = b.build(x)
    model = onnx.load_from_string(to_onnx(graph, random_weights(graph)))
    data = np.random.default_rng(0).standard_normal((4, 16, 28, 28), np.float32)
    (weight, bias) = (numpy_helper.to_array(t) for t in model.graph.initializer[:2])
    assert weight.shape == (32, 16, 3, 3)
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with TensorRTBackend({"timing_cache": "off"}).load(path) as runner:
        exact = runner.outputs({"x": data})["last"]
    bound = float(np.abs(weight).sum((1, 2, 3)).max() * np.abs(data).max() / 8 + np.abs(bias).max())
    found = {**ranges(lambda batch: {}, [{"x": data}], ["x"]), "act": (0.0, bound)}
    assert set(quantised_tensors(model, "tensorrt")) == {"x", "act"}
    path.write_bytes(quantize(model, found, "tensorrt").SerializeToString())
    with TensorRTBackend({"timing_cache": "off"}).load(path) as runner:
        near = runner.outputs({"x": data})["last"]
    assert 0 < np.sqrt(np.mean((near - exact) ** 2) / np.mean(exact**2)) < 0.1


@pytest.mark.gpu
@needs_gpu
def test_streams_are_no_slower_than_one_and_copies_take_time(tmp_path: Path) -> None:
    b = GraphBuilder()
    graph = b.build(b.add(Conv2d(8, 8, 3, padding=1), b.input("x", (1, 8, 14, 14)), name="conv"))
    path = tmp_path / "m.onnx"
    path.write_bytes(to_onnx(graph, random_weights(graph)))
    per_s = []
    for streams in (1, 2):
        with TensorRTStreams({"streams": streams, "timing_cache": "off"}).load(path) as runner:
            runner.sample(500)
            per_s.append(streams / min(runner.sample(2000) for _ in range(5)))
            figures = runner.conditions()
    assert per_s[1] > 0.8 * per_s[0]
    assert min(figures["h2d_ms"], figures["d2h_ms"], figures["enqueue_ms"]) > 0
