"""The laws of back-ends."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from latbench import plugins
from latbench.backends.base import Backend, Runner, Scalar
from latbench.errors import MeasurementError
from latbench.graph.ir import Graph, GraphBuilder
from latbench.graph.ops import AdaptiveAvgPool2d, Add, Conv2d, Flatten, Linear, ReLU
from latbench.testing.running import refused, run_onnx


class BackendConformance:
    """Laws of every back-end. A subclass names it as registered, and may give its options."""

    backend: str
    options: Mapping[str, Scalar] = {}
    tolerance = 1e-4  # largest difference to ONNX Runtime's outputs, over the largest output
    gives_outputs = True  # False for a back-end that only computes times

    @property
    def plugin(self) -> type[Backend]:
        found: type[Backend] = plugins.load("latbench.backends", self.backend)
        return found

    def test_it_is_available_and_says_what_it_is(self) -> None:
        self.plugin.available()
        assert self.plugin.name == self.backend
        assert self.plugin.artifact in ("onnx", "graph")
        assert self.plugin.clock in ("host", "cuda_event", "model")

    def test_versions_are_text(self) -> None:
        versions = self.plugin.versions()
        assert versions, "what can move a number is not named"
        assert all(isinstance(text, str) for pair in versions.items() for text in pair)

    def test_an_unknown_option_is_refused(self) -> None:
        assert refused(self.plugin, {**self.options, "no_such_option": 1})

    def test_samples_are_positive_and_grow_with_repeat(self, tmp_path: Path) -> None:
        with self._loaded(_tiny_network(), tmp_path) as runner:
            runner.sample(50)
            one = sorted(runner.sample(1) for _ in range(25))[12]
            many = sorted(runner.sample(100) for _ in range(5))[2]
        assert 0 < one < math.inf
        assert many > 10 * one, f"100 inferences in {many} ms, one in {one} ms"

    def test_what_cannot_be_loaded_raises_in_words(self, tmp_path: Path) -> None:
        import pytest

        backend = self.plugin(self.options)
        for name, data in (("missing", None), ("empty", b""), ("noise", bytes(range(256)))):
            path = tmp_path / name
            if data is not None:
                path.write_bytes(data)
            with pytest.raises(MeasurementError, match=r"\S"), backend.load(path):
                pass

    def test_a_model_is_loaded_anew_each_time(self, tmp_path: Path) -> None:
        for _ in range(3):
            with self._loaded(_tiny_network(), tmp_path) as runner:
                assert runner.sample(1) > 0

    def test_samples_are_milliseconds(self, tmp_path: Path) -> None:
        if self.plugin.clock == "model":
            return
        with self._loaded(_tiny_network(), tmp_path) as runner:
            runner.sample(100)
            shares = []
            for _ in range(15):
                start = time.perf_counter()
                ms = runner.sample(200)
                shares.append(ms / 1e3 / (time.perf_counter() - start))
        share = sorted(shares)[7]  # the device's time may be less than ours, and no more
        assert 0.02 < share < 1.05, f"{share:.3g} of the time that went by"

    def test_two_models_live_side_by_side(self, tmp_path: Path) -> None:
        from latbench.graph.passes import random_weights

        first, second = _tiny_network(), _tiny_network(classes=7)
        x = np.random.default_rng(2).standard_normal(first.inputs[0][1], dtype=np.float32)
        with self._loaded(first, tmp_path) as one, self._loaded(second, tmp_path) as two:
            for graph, runner in ((first, one), (second, two), (first, one)):
                assert runner.sample(2) > 0
                if self.gives_outputs:
                    want = run_onnx(graph, random_weights(graph, 0), x)
                    (got,) = runner.outputs({graph.inputs[0][0]: x}).values()
                    assert np.abs(got - want).max() <= self.tolerance * np.abs(want).max()

    def test_a_model_that_cannot_be_loaded_is_a_row_and_the_worker_goes_on(self, tmp_path: Path) -> None:
        from latbench.measure.base import Request, SamplingPlan, WorkerSetup
        from latbench.measure.launcher import LocalLauncher

        good, bad = self._write(_tiny_network(), tmp_path), tmp_path / "bad"
        bad.write_bytes(b"no model")
        setup = WorkerSetup(plugins.spec("latbench.backends", self.backend), dict(self.options))
        plan = SamplingPlan(runs=1, rounds=1)
        with LocalLauncher(setup) as launcher:
            requests = [Request(str(i), str(path), 0, 0, plan, i) for i, path in enumerate((good, bad, good))]
            rows = list(launcher.measure(requests))
        assert [row.status for row in rows] == ["ok", "error", "ok"], rows[0].error
        assert rows[1].stage == "load"
        assert rows[1].error
        assert "\n" not in rows[1].error
        assert len({row.pid for row in rows}) == 1
        assert all(row.clock == self.plugin(self.options).clock for row in rows)
        assert all(ms > 0 for row in rows for ms in row.samples_ms)

    def test_layers_are_named_and_not_negative(self, tmp_path: Path) -> None:
        with self._loaded(_tiny_network(), tmp_path) as runner:
            layers = runner.layers()
        assert layers is None or layers, "a profile without layers"
        assert all(layer.name and layer.op and layer.ms >= 0 for layer in layers or ())

    def test_outputs_are_those_of_the_graph(self, tmp_path: Path) -> None:
        import pytest

        if not self.gives_outputs:
            pytest.skip(f"{self.backend} computes times, not outputs")
        from latbench.graph.passes import random_weights

        graph = _tiny_network()
        x = np.random.default_rng(1).standard_normal(graph.inputs[0][1], dtype=np.float32)
        want = run_onnx(graph, random_weights(graph, 0), x)
        with self._loaded(graph, tmp_path) as runner:
            for _ in range(2):
                (got,) = runner.outputs({graph.inputs[0][0]: x}).values()
                assert np.abs(got - want).max() <= self.tolerance * np.abs(want).max()
                runner.sample(3)  # timing changes no result

    @contextmanager
    def _loaded(self, graph: Graph, folder: Path) -> Iterator[Runner]:
        with self.plugin(self.options).load(self._write(graph, folder)) as runner:
            yield runner

    def _write(self, graph: Graph, folder: Path) -> Path:
        from latbench.graph.onnx import to_onnx
        from latbench.graph.passes import random_weights

        path = folder / f"{graph.key}.artifact"
        if self.plugin.artifact == "graph":
            path.write_text(graph.to_json())
        else:
            path.write_bytes(to_onnx(graph, random_weights(graph, 0)))
        return path


def _tiny_network(classes: int = 10) -> Graph:
    """A convolution, a branch and its sum, a pooled classifier."""
    b = GraphBuilder()
    x = b.input("x", (2, 3, 16, 16))
    x = b.add(Conv2d(3, 16, 3, stride=2, padding=1, bias=True), x, name="stem")
    y = b.add(ReLU(), b.add(Conv2d(16, 16, 3, padding=1, groups=16, bias=True), x, name="depthwise"), name="relu")
    x = b.add(Flatten(), b.add(AdaptiveAvgPool2d(), b.add(Add(), x, y, name="sum"), name="pool"), name="flat")
    return b.build(b.add(Linear(16, classes), x, name="fc"))
