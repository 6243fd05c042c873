"""Several inferences at once: each is run once, whichever stream takes it, and the time is that of all together."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from latbench import plugins
from latbench.backends.base import Scalar
from latbench.backends.onnxruntime import OnnxRuntimeStreams
from latbench.backends.streams import TIMER_NS, Crew
from latbench.errors import UsageError
from latbench.graph.ir import Graph, GraphBuilder
from latbench.graph.onnx import to_onnx
from latbench.graph.ops import Conv2d, ReLU
from latbench.graph.passes import random_weights
from latbench.measure.base import SamplingPlan
from latbench.measure.worker import Sampler


def network() -> Graph:
    b = GraphBuilder()
    x = b.add(Conv2d(8, 8, 3, padding=1, bias=True), b.input("x", (1, 8, 14, 14)), name="conv")
    return b.build(b.add(ReLU(), x, name="relu"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    graph = network()
    (tmp_path / "m.onnx").write_bytes(to_onnx(graph, random_weights(graph)))
    return tmp_path / "m.onnx"


def test_every_inference_is_run_once_and_all_threads_help() -> None:
    done: dict[int, list[int]] = {}

    def call() -> None:
        done.setdefault(threading.get_ident(), []).append(1)
        time.sleep(0.001)

    crew = Crew([call] * 3)
    try:
        for n in (30, 1, 0, 30):
            before = sum(map(len, done.values()))
            assert crew.run(n) > 0
            assert sum(map(len, done.values())) == before + n
    finally:
        crew.close()
    assert len(done) == 3
    assert threading.get_ident() not in done


def test_waiting_calls_overlap() -> None:
    crew = Crew([lambda: time.sleep(0.01)] * 4)
    try:
        assert 20 <= crew.run(8) < 60, "8 waits of 10 ms, 4 at a time"
    finally:
        crew.close()


def test_what_a_thread_raises_is_raised_and_the_crew_goes_on() -> None:
    wrong: list[bool] = [True]

    def call() -> None:
        if wrong.pop() if wrong else False:
            raise ValueError("no")

    crew = Crew([call, call])
    try:
        with pytest.raises(ValueError, match="no"):
            crew.run(4)
        assert crew.run(4) > 0
    finally:
        crew.close()


def test_a_closed_crew_leaves_no_thread() -> None:
    before = threading.active_count()
    Crew([lambda: None] * 3).close()
    assert threading.active_count() == before


@pytest.mark.parametrize("streams", [1, 3])
def test_onnx_runtime_counts_its_inferences(streams: int, path: Path) -> None:
    with OnnxRuntimeStreams({"streams": streams}).load(path) as runner:
        counted: list[int] = []
        run = runner.crew.run
        runner.crew.run = lambda n: (counted.append(n), run(n))[1]  # type: ignore[method-assign]
        assert runner.sample(5) > 0
        assert counted == [5 * streams]
        assert runner.notes() == (f"streams={streams}",)
        x = np.random.default_rng(0).standard_normal((1, 8, 14, 14), np.float32)
        (found,) = runner.outputs({"x": x}).values()
        assert found.shape == (1, 8, 14, 14)


def test_openvino_takes_its_own_number_unless_told(path: Path) -> None:
    pytest.importorskip("openvino", reason="pip install 'latbench[openvino]'")
    from latbench.backends.openvino import OpenVinoStreams

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for options in ({}, {"streams": 1}, {"streams": 2}):
        with OpenVinoStreams(options).load(path) as runner:
            assert runner._compiled.get_property("NUM_STREAMS") >= 1
            if options:
                assert runner._compiled.get_property("NUM_STREAMS") == min(options["streams"], cpus)
            assert runner.streams == len(runner._queue)
            assert runner.sample(3) > 0
            addresses = {request.get_input_tensor(0).data.ctypes.data for request in runner._queue}
            assert len(addresses) == runner.streams, "each request has inputs of its own"


def test_a_worker_takes_samples_of_a_tenth_of_a_second() -> None:
    """Of an inference of 2 ms fifty rounds, and the row is not flagged for its timer."""
    rounds: list[int] = []
    runner: Any = SimpleNamespace(sample=lambda repeat: rounds.append(repeat) or 2.0 * repeat)
    sampler = Sampler(SimpleNamespace(clock="host", timer_ns=TIMER_NS))  # type: ignore[arg-type]
    found = sampler.block(runner, SamplingPlan(runs=1, rounds=1, min_samples=2, block_s=0.2), single_ms=2.0)
    assert rounds == [50, 50]
    assert "near_timer_floor" not in found["warnings"]


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "tensorrt"])
def test_a_variant_is_named_by_its_back_end_and_registered_nowhere(name: str) -> None:
    plugin = plugins.load("latbench.backends", name)
    module, _, variant = plugin.streams.partition(":")
    assert module == plugin.__module__
    assert variant.endswith("Streams")
    assert plugin.streams not in {plugins.spec("latbench.backends", one) for one in plugins.names("latbench.backends")}


@pytest.mark.parametrize("options", [{"streams": -1}, {"streams": True}, {"streams": 2.5}])
def test_streams_are_counted_in_whole_numbers(options: dict[str, Scalar]) -> None:
    with pytest.raises(UsageError, match="streams must be a whole number from 0"):
        OnnxRuntimeStreams(options)
