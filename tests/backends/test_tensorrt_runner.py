"""TensorRT's inference path on a scripted engine and device."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scripted_tensorrt import Device, Engine, toolkit

from latbench.backends import tensorrt_build
from latbench.backends.base import Scalar
from latbench.backends.tensorrt_runner import DEFAULT_STREAMS, Execution, TensorRTRunner, TensorRTStreamsRunner
from latbench.errors import MeasurementError
from latbench.measure.base import SamplingPlan
from latbench.measure.worker import Sampler


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., TensorRTRunner]]:
    monkeypatch.setattr(tensorrt_build, "build", lambda kit, model: (b"plan", ["timing_cache=empty->0123abcd"]))
    stack, used = ExitStack(), []

    def made(
        device: Device, engine: Any = None, kind: type[TensorRTRunner] = TensorRTRunner, **options: Scalar
    ) -> TensorRTRunner:
        used.append(device)
        runner = kind(toolkit(device, engine or Engine(device), **options), b"model", stack)
        device.log.clear()
        return runner

    yield made
    stack.close()
    assert all(not device.live for device in used), "something was not given back"


def test_graphs_are_replayed_and_time_is_the_devices(make: Callable[..., TensorRTRunner]) -> None:
    device = Device()
    runner = make(device)
    assert runner.sample(8) == 8 * 0.25
    assert device.log == ["run"] * 8
    assert runner.notes()[0] == "tensorrt: a slow tactic was chosen"
    words = {name: value for name, value in runner.conditions().items() if isinstance(value, str)}
    assert words == {"typing": "weak", "timing_cache": "empty->0123abcd", "launch": "graph"}


def test_where_capture_fails_it_runs_eagerly_and_says_why(make: Callable[..., TensorRTRunner]) -> None:
    runner = make(Device(graphs=False))
    assert runner.sample(4) == 1.0
    assert runner.conditions()["launch"] == "eager: cudaStreamEndCapture: operation not permitted"


def test_eager_on_request_captures_nothing(make: Callable[..., TensorRTRunner]) -> None:
    device = Device()
    runner = make(device, launch="eager")
    assert runner.conditions()["launch"] == "eager"
    assert "graph" not in device.made
    assert runner.sample(4) == 1.0


def test_a_host_slower_than_the_device_is_said(
    make: Callable[..., TensorRTRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    enqueue = Execution.enqueue
    monkeypatch.setattr(Execution, "enqueue", lambda self: (time.sleep(0.002), enqueue(self))[1])
    runner = make(Device(), launch="eager")
    assert "enqueue_bound" not in runner.notes(), "nothing was measured yet"
    runner.sample(1)
    assert "enqueue_bound" in runner.notes()
    assert runner.conditions()["enqueue_ms"] > 2


def test_copies_and_enqueueing_are_figures_of_their_own(make: Callable[..., TensorRTRunner]) -> None:
    runner = make(Device())
    assert runner.sample(4) == 4 * 0.25, "samples hold no copies"
    figures = runner.conditions()
    assert (figures["h2d_ms"], figures["d2h_ms"]) == (0.125, 0.0625)
    assert 0 < figures["enqueue_ms"] < 0.25


def test_several_streams_share_an_engine_and_the_time_is_theirs_together(make: Callable[..., TensorRTRunner]) -> None:
    device = Device()
    runner = make(device, kind=TensorRTStreamsRunner, streams=3)
    assert device.made.count("stream") == device.made.count("graph") == 3
    assert runner.sample(4) == 4 * 3 * 0.25  # one after another, on this device
    assert device.log == ["run"] * 12
    (first,) = {event for _, event in device.awaited}
    assert first == id(runner._start), "every stream begins behind the first event"
    assert len({stream for stream, _ in device.awaited} - {id(runner._one.stream)}) == 2
    assert runner.notes()[0] == "streams=3"


def test_streams_are_two_unless_said(make: Callable[..., TensorRTRunner]) -> None:
    runner = make(Device(), kind=TensorRTStreamsRunner, streams=0)
    assert runner.notes()[0] == f"streams={DEFAULT_STREAMS}"


@pytest.mark.parametrize("launch", ["graph", "eager"])
def test_an_engine_goes_without_the_collector(launch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker never collects: an engine in a cycle would keep its memory until the worker ends."""
    monkeypatch.setattr(tensorrt_build, "build", lambda kit, model: (b"plan", []))
    device = Device()
    engine = Engine(device)
    gone = weakref.ref(engine)
    gc.disable()
    try:
        with ExitStack() as stack:
            kit = toolkit(device, engine, launch=launch)
            runner = TensorRTRunner(kit, b"model", stack)
            runner.sample(1)
            runner.layers()
        del kit, engine, runner
        assert gone() is None
    finally:
        gc.enable()


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
    assert runner._one.context.profiler is None


def test_cold_means_written_over_before_every_sample(make: Callable[..., TensorRTRunner]) -> None:
    device = Device()
    runner = make(device)
    device.log.clear()
    for _ in range(2):
        runner.evict(64)
        assert runner.sample(1) == 0.25  # the sweep is before the first event
    assert device.log == ["sweep", "run"] * 2
    assert max(len(memory) for memory in device.memory.values()) == 2 * device.l2_bytes


@pytest.mark.parametrize(("sweep_bytes", "expected"), [(0, {"run"}), (4096, {"sweep", "run"})])
def test_a_worker_sweeps_before_every_sample_or_never(
    sweep_bytes: int, expected: set[str], make: Callable[..., TensorRTRunner]
) -> None:
    """Cold: a sweep of what was asked for, one inference, a sweep, ...; warm: inferences in groups, nothing between."""
    device = Device()
    runner = make(device)
    sampler = Sampler(SimpleNamespace(clock="cuda_event", timer_ns=2000.0))  # type: ignore[arg-type]
    plan = SamplingPlan(runs=1, rounds=1, min_samples=5, block_s=0.001, sweep_bytes=sweep_bytes)
    found = sampler.block(runner, plan, single_ms=0.25)
    assert set(device.log) == expected
    n, repeat = len(found["samples_ms"]), found["repeat"]
    assert repeat == (1 if sweep_bytes else 8), "a sample is 1,000 times what its clock costs"
    assert device.log == (["sweep", "run"] * n if sweep_bytes else ["run"] * n * repeat)
    assert set(found["samples_ms"]) == {0.25}
    assert (found["conditions"]["launch"], found["conditions"]["h2d_ms"]) == ("graph", 0.125)
    swept = max(len(memory) for memory in device.memory.values())
    assert (swept == 4096) == bool(sweep_bytes), "what was asked for, where that is more than twice the cache"


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
