"""The worker, real: ONNX Runtime on tiny models, what the process holds, and how it warms up."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from latbench.graph.ir import GraphBuilder
from latbench.graph.onnx import to_onnx
from latbench.graph.ops import Conv2d, ReLU
from latbench.graph.passes import random_weights
from latbench.measure.base import COLD_SWEEP_BYTES, Measurement, Request, SamplingPlan, WorkerSetup
from latbench.measure.launcher import LocalLauncher
from latbench.measure.worker import warm_up

PLAN = SamplingPlan(runs=1, rounds=1)
OUR_WORKER = WorkerSetup("latbench.backends.onnxruntime:OnnxRuntimeBackend", {}, (min(os.sched_getaffinity(0)),))
NOT_IN_A_WORKER = {
    "torch", "torchvision", "onnx", "pyarrow", "pandas", "click", "ray", "scipy", "rich", "matplotlib"
}  # fmt: skip


def conv(channels: int = 8, side: int = 14) -> bytes:
    b = GraphBuilder()
    x = b.input("x", (1, channels, side, side))
    x = b.add(Conv2d(channels, channels, 3, padding=1), x, name="conv")
    graph = b.build(b.add(ReLU(), x, name="relu"))
    return to_onnx(graph, random_weights(graph, 0))


def one_node(op: str, inputs: list[tuple[str, int, tuple[int | None, ...]]], output: int, opset: int = 17) -> bytes:
    """A model of one operator, whatever its sense."""
    values = [helper.make_tensor_value_info(*spec) for spec in dict.fromkeys(inputs)]
    node = helper.make_node(op, [name for name, _, _ in inputs], ["y"])
    out = helper.make_tensor_value_info("y", output, None)
    model = helper.make_model(helper.make_graph([node], "g", values, [out]), ir_version=8)
    model.opset_import[0].version = opset
    return bytes(model.SerializeToString())


@pytest.fixture(scope="module")
def launcher() -> Iterator[LocalLauncher]:
    with LocalLauncher(OUR_WORKER) as launcher:
        yield launcher


@pytest.fixture
def measure(launcher: LocalLauncher, tmp_path: Path) -> Callable[..., list[Measurement]]:
    def measure(*models: bytes, plan: SamplingPlan = PLAN) -> list[Measurement]:
        requests = []
        for i, data in enumerate(models):
            (tmp_path / f"{i}.onnx").write_bytes(data)
            requests.append(Request(f"k{i}", str(tmp_path / f"{i}.onnx"), 0, 0, plan, i))
        return list(launcher.measure(requests))

    return measure


Measure = Callable[..., list[Measurement]]


def test_a_block_is_sampled_with_all_that_explains_it(measure: Measure) -> None:
    (m,) = measure(conv())
    assert (m.status, m.stage, m.error, m.clock) == ("ok", None, None, "host")
    assert len(m.samples_ms) >= PLAN.min_samples
    assert all(0 < s < 100 for s in m.samples_ms)
    assert sum(m.samples_ms) * m.repeat >= 1e3 * PLAN.block_s * 0.999  # samples are rounded to 0.1 ns
    assert m.load_ms > 0
    assert m.first_inference_ms > 0
    assert m.warmup_ms >= 1e3 * PLAN.warmup_s
    assert all(1 < probe < 1000 for probe in m.probes_us)
    assert m.probe_at[0] == 0
    assert m.probe_at[-1] == len(m.samples_ms)
    assert len(m.probe_at) == len(m.probes_us)
    assert sorted(m.probe_at) == list(m.probe_at)
    assert m.wait_ms >= 0
    assert m.started_at > 1.7e9
    assert 10 << 20 < m.peak_memory_bytes < 1 << 30


def test_short_work_is_repeated_until_the_timer_costs_nothing(measure: Measure) -> None:
    short, long = measure(conv(8, 1), conv(64, 56))
    assert short.repeat > 1
    assert long.repeat == 1
    tighter = measure(conv(8, 1), plan=replace(PLAN, timer_share=PLAN.timer_share / 10))[0]
    assert tighter.repeat > 3 * short.repeat


@pytest.mark.parametrize(
    ("plan", "n"),
    [
        (replace(PLAN, min_samples=40), 40),  # a long model is sampled beyond block_s
        (replace(PLAN, min_samples=40, max_time_s=0.1), 10),  # but never beyond its time: 10 samples of 10 ms
        (replace(PLAN, min_samples=40, runs=2, rounds=2), 10),  # each of 4 blocks takes its share
        (replace(PLAN, min_samples=2, max_samples=2, block_s=10, max_time_s=10), 2),
        (replace(PLAN, min_samples=1, block_s=0.1), 10),
    ],
)
def test_a_block_ends_as_the_plan_says(
    plan: SamplingPlan, n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    (tmp_path / "model").write_text("{}")  # of faulty_backend: 10 ms an inference by its own account
    with LocalLauncher(WorkerSetup("faulty_backend:FaultyBackend")) as launcher:
        (m,) = launcher.measure([Request("k", str(tmp_path / "model"), 0, 0, plan)])
    assert m.samples_ms == (10.0,) * n


def test_a_cold_cache_is_slower_and_never_repeated(measure: Measure) -> None:
    warm, cold = (measure(conv(8, 4), plan=replace(PLAN, sweep_bytes=n))[0] for n in (0, COLD_SWEEP_BYTES))
    assert cold.repeat == 1 < warm.repeat
    assert min(cold.samples_ms) > min(warm.samples_ms)  # by a factor of about 5


def test_what_the_runtime_refuses_is_a_value_in_its_words(measure: Measure, tmp_path: Path) -> None:
    good = conv()
    x, brain = ("x", TensorProto.FLOAT16, (2, 3)), ("x", TensorProto.BFLOAT16, (2, 3))
    models = {
        "No graph was found in the protobuf": b"\x08\x08",
        "Protobuf parsing failed": good[: len(good) // 2],
        "Type 'tensor(float16)' of input parameter (x) of operator (Xor)": one_node("Xor", [x, x], TensorProto.BOOL),
        "Could not find an implementation for Relu(14)": one_node("Relu", [brain], TensorProto.BFLOAT16),
        "not a static tensor": one_node("Relu", [("x", TensorProto.FLOAT, (None, 3))], TensorProto.FLOAT),
    }
    measured = measure(good, *models.values(), good)
    assert [m.status for m in measured] == ["ok", *["error"] * len(models), "ok"]
    for m, words in zip(measured[1:-1], models, strict=True):
        assert m.stage == "load"
        assert m.error
        assert "\n" not in m.error
        assert not m.samples_ms
        assert words in m.error
        assert str(tmp_path) not in m.error  # equal reasons are counted as one


def test_an_error_in_an_inference_is_one_of_the_warm_up(measure: Measure) -> None:
    """Gather's indices are seeded noise, 0 to 7: outside an axis of 2."""
    gather = one_node("Gather", [("x", TensorProto.FLOAT, (2, 3)), ("i", TensorProto.INT64, (64,))], TensorProto.FLOAT)
    bad, good = measure(gather, conv())
    assert (bad.status, bad.stage, good.status) == ("error", "warmup", "ok")
    assert bad.error is not None
    assert "out of data bounds" in bad.error


def ask(how: str, tmp_path: Path, setup: str = "faulty_backend:FaultyBackend") -> str:
    (tmp_path / "model").write_text(json.dumps({"how": how}))
    with LocalLauncher(WorkerSetup(setup)) as launcher:
        (m,) = launcher.measure([Request("k", str(tmp_path / "model"), 0, 0, PLAN)])
    assert m.error is not None
    return m.error.partition(": ")[2]


ORT_AND_MODULES = """
from faulty_backend import FaultyBackend
from latbench.backends.onnxruntime import OnnxRuntimeBackend

class Backend(FaultyBackend):
    def __init__(self, options):
        super().__init__(options)
        self.ours = OnnxRuntimeBackend(options)
"""


def test_a_worker_holds_numpy_and_its_runtime_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(tmp_path)]))
    (tmp_path / "ort_and_modules.py").write_text(ORT_AND_MODULES)
    modules = json.loads(ask("modules", tmp_path, "ort_and_modules:Backend"))
    assert not NOT_IN_A_WORKER & set(modules)
    assert {"numpy", "onnxruntime", "latbench"} <= set(modules)


def test_the_environment_is_an_allow_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    refused = {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "active", "KMP_AFFINITY": "compact", "MKL_DYNAMIC": "1"}
    for name, value in {**refused, "LD_PRELOAD": "", "MALLOC_ARENA_MAX": "1", "A_SECRET": "s"}.items():
        monkeypatch.setenv(name, value)
    seen = json.loads(ask("environment", tmp_path))
    assert {k: v for k, v in seen.items() if k in refused} == {"OMP_NUM_THREADS": "1"}
    assert not {"LD_PRELOAD", "MALLOC_ARENA_MAX", "A_SECRET"} & set(seen)
    assert seen["PATH"] == os.environ["PATH"]


def test_conditions_are_what_was_reached(launcher: LocalLauncher) -> None:
    conditions = launcher.start()
    pid = conditions["pid"]
    assert os.sched_getaffinity(pid) == set(OUR_WORKER.cpus)
    assert os.getsid(pid) == pid  # a session, hence a process group, of its own
    assert conditions["priority"] in ("normal", "nice", "autogroup", "autogroup+nice")
    assert ("nice" in conditions["priority"]) == (os.getpriority(os.PRIO_PROCESS, pid) == -20)
    assert 1 < conditions["clock_probe_us"] < 1000


def test_layers_are_the_kernels_of_the_runtime(launcher: LocalLauncher, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(conv())
    layers = launcher.layers(tmp_path / "m.onnx", PLAN)
    assert layers
    assert [layer["op"] for layer in layers].count("Conv") == 1  # ReLU runs inside it
    assert all(layer["ms"] >= 0 for layer in layers)


class Scripted:
    """A runner whose n-th inference takes `script(n)` ms."""

    def __init__(self, script: Callable[[int], float]) -> None:
        self.script, self.n, self.spent_ms = script, 0, 0.0

    def sample(self, repeat: int) -> float:
        ms = sum(self.script(self.n + i) for i in range(repeat))
        self.n += repeat
        self.spent_ms += ms
        return ms

    def outputs(self, inputs: object) -> dict[str, Any]:
        return {}

    def layers(self) -> None:
        return None


@given(st.floats(1e-3, 1e3), st.floats(0.001, 0.05), st.integers(1, 20))
def test_warm_up_is_a_minimum_of_time_and_of_runs(ms: float, warmup_s: float, runs: int) -> None:
    runner = Scripted(lambda n: ms)
    plan = replace(PLAN, warmup_s=warmup_s, warmup_runs=runs, max_warmup_s=1e6)
    first, settled = warm_up(runner, plan)
    assert math.isclose(first, ms)
    assert math.isclose(settled, ms)
    assert runner.n >= runs
    assert runner.spent_ms >= 1e3 * warmup_s * (1 - 1e-9)


@given(st.floats(1.05, 3.0), st.floats(0.01, 50.0))
def test_warm_up_goes_on_while_the_model_gets_faster(factor: float, settled_ms: float) -> None:
    n_slow = 40
    runner = Scripted(lambda n: settled_ms * factor ** max(0, n_slow - n))
    _, single = warm_up(runner, replace(PLAN, warmup_s=0, max_warmup_s=1e30))
    assert single <= settled_ms * factor**6  # it may stop within 3 % of standing still, in groups of a few


def test_warm_up_ends_at_its_cap_whatever_the_model_does() -> None:
    runner = Scripted(lambda n: 100 * 0.9**n)  # never settles
    warm_up(runner, replace(PLAN, max_warmup_s=0.3))
    assert 300 <= runner.spent_ms < 500


def test_the_first_inference_is_kept_apart() -> None:
    first, settled = warm_up(Scripted(lambda n: 1.0 if n else 50.0), PLAN)
    assert (first, settled) == (50.0, 1.0)


def test_a_measurement_survives_json() -> None:
    m = Measurement("k", 1, 2, samples_ms=(1.0, 2.0), warnings=("foreign_load",))
    assert Measurement.from_dict(json.loads(json.dumps(m.to_dict()))) == m
    with pytest.raises(TypeError):
        Measurement.from_dict({**m.to_dict(), "no_such_field": 1})
