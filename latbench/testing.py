"""Conformance suites, shipped so that third parties hold their plug-ins to the laws that ours keep.

Subclass in a test module, name the class ``Test...``, and pytest collects the laws::

    class TestMySpace(FactoredSpaceConformance):
        space = MySpace(resolution=64)
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from latbench import plugins
from latbench.backends.base import Backend, Runner, Scalar
from latbench.errors import MeasurementError, UsageError
from latbench.graph.ir import Graph, GraphBuilder, Weights
from latbench.graph.ops import AdaptiveAvgPool2d, Add, Conv2d, Flatten, Linear, Op, ReLU
from latbench.oracle.base import SOURCES, LatencyOracle, Model, one_hot
from latbench.oracle.factors import FactorOracle
from latbench.spaces.base import Arch, FactoredSpace, SearchSpace

MAX_SCOPE = 10_000  # entries of one latency factor


class SpaceConformance:
    """Laws of every search space."""

    space: SearchSpace
    n_networks = 20  # sampled per law
    tolerance = 1e-5  # largest difference between two runtimes' outputs, over the largest output

    def archs(self) -> list[Arch]:
        """The sample that the laws are checked on, the same each time."""
        rng = np.random.default_rng(0)
        return [self.space.sample(rng) for _ in range(self.n_networks)]

    def test_sampled_networks_are_valid(self) -> None:
        for arch in self.archs():
            self.space.check(arch)
            network = self.space.network(arch)
            assert network.dtype == self.space.dtype
            assert network.inputs == (("x", self.space.input_shape),)
            assert all(network.shapes[name][0] == self.space.batch for name in network.outputs)

    def test_sampling_depends_on_the_generator_only(self) -> None:
        assert self.archs() == self.archs()

    def test_size_is_the_product_of_the_options(self) -> None:
        assert self.space.size == math.prod(len(d.options) for d in self.space.decisions)
        assert all(len(set(d.options)) == len(d.options) for d in self.space.decisions), "an option appears twice"
        assert len({d.name for d in self.space.decisions}) == len(self.space.decisions), "a decision's name repeats"

    def test_settings_round_trip_through_json(self) -> None:
        twin = type(self.space).from_settings(json.loads(json.dumps(self.space.settings())))
        assert twin == self.space
        for arch in self.archs():
            assert twin.network(arch).key == self.space.network(arch).key

    def test_unknown_setting_is_refused(self) -> None:
        assert _refused(type(self.space).from_settings, {**self.space.settings(), "no_such_setting": 1})

    def test_parse_inverts_format(self) -> None:
        for arch in self.archs():
            assert self.space.parse_arch(self.space.format_arch(arch)) == arch

    def test_random_arch_is_reproducible(self) -> None:
        assert self.space.parse_arch("random:7") == self.space.sample(np.random.default_rng(7))

    def test_published_archs_parse_and_build(self) -> None:
        for name, arch in self.space.published.items():
            assert self.space.parse_arch(name) == arch
            assert self.space.network(arch).macs >= 0

    def test_malformed_archs_are_refused(self) -> None:
        (arch, *_) = self.archs()
        last = len(self.space.decisions[-1].options)
        for wrong in (arch[:-1], (*arch, 0), (*arch[:-1], last), (*arch[:-1], -1)):
            assert _refused(self.space.check, wrong), f"{wrong} passes check"
            assert _refused(self.space.network, wrong), f"{wrong} builds a network"
            assert _refused(self.space.parse_arch, self.space.format_arch(wrong)), f"{wrong} parses"
        for text in ("", "no-such-name", "random:", "random:x", "1.5"):
            assert _refused(self.space.parse_arch, text), f"{text!r} parses"

    def test_both_lowerings_agree_folded_and_unfolded(self) -> None:
        import pytest

        pytest.importorskip("torch", reason="the lowering to torch needs it: pip install 'latbench[search]'")
        from latbench.graph.passes import fold_batch_norm, random_weights

        space = replace(self.space, dtype="float32")
        rng = np.random.default_rng(0)
        for arch in self.archs():
            network = space.network(arch)
            weights = random_weights(network, seed=0)
            folded, folded_weights, _ = fold_batch_norm(network, weights)
            x = rng.standard_normal(space.input_shape, dtype=np.float32)
            want = _run_torch(network, weights, x)
            scale = float(np.abs(want).max())
            assert np.isfinite(scale), f"{arch}: random weights give {scale}"
            for got in (
                _run_onnx(network, weights, x),
                _run_torch(folded, folded_weights, x),
                _run_onnx(folded, folded_weights, x),
            ):
                difference = float(np.abs(got - want).max())
                assert difference <= self.tolerance * scale, f"{arch}: outputs differ by {difference} of {scale}"


class FactoredSpaceConformance(SpaceConformance):
    """Laws of a space built from sites."""

    space: FactoredSpace
    drops_unread_blocks = False  # True where a network leaves out blocks that its output does not read (cells)

    def test_scopes_are_small_and_ordered(self) -> None:
        for site in self.space.sites:
            assert list(site.scope) == sorted(set(site.scope)), f"{site.name}: scope {site.scope}"
            assert len(self._options(site.scope)) <= MAX_SCOPE, f"{site.name}: too many picks"
            assert site.block_type, f"{site.name} has no block type"
        names = [site.name for site in self.space.sites]
        assert len(set(names)) == len(names), "a site's name repeats"

    def test_all_blocks_are_those_of_every_slot(self) -> None:
        keys = [
            block.key
            for site in self.space.sites
            for picks in self._options(site.scope)
            if (block := self.space.block(site, picks)) is not None
        ]
        assert len(keys) == self.space.n_slots
        assert set(keys) == set(self.space.all_blocks())
        assert all(key == block.key for key, block in self.space.all_blocks().items())

    def test_blocks_of_an_arch_are_in_all_blocks(self) -> None:
        known = self.space.all_blocks()
        for arch in self.archs():
            assert all(block.key in known for block in self.space.blocks(arch))

    def test_blocks_share_the_settings(self) -> None:
        for block in self.space.all_blocks().values():
            assert block.dtype == self.space.dtype
            assert all(shape[0] == self.space.batch for _, shape in block.inputs)
            assert len(block.outputs) == 1

    def test_network_is_its_blocks_and_nothing_else(self) -> None:
        for arch in self.archs():
            inside: dict[str, list[Op]] = {site.name: [] for site in self.space.sites}
            for node in self.space.network(arch).nodes:
                (owner,) = (name for name in inside if node.name.startswith(f"{name}/"))
                inside[owner].append(node.op)
            for site in self.space.sites:
                block = self.space.block(site, self.space.picks(site, arch))
                want = [node.op for node in block.nodes] if block else []
                dropped = self.drops_unread_blocks and not inside[site.name]
                assert dropped or inside[site.name] == want, f"{arch}: {site.name} is not its block"

    def test_macs_and_parameters_add_up(self) -> None:
        for arch in self.archs():
            network, blocks = self.space.network(arch), list(self.space.blocks(arch))
            macs, n_params = sum(b.macs for b in blocks), sum(b.n_params for b in blocks)
            if self.drops_unread_blocks and len(network.nodes) < sum(len(b.nodes) for b in blocks):
                assert network.macs <= macs
                assert network.n_params <= n_params
            else:
                assert (network.macs, network.n_params) == (macs, n_params)

    def test_equal_picks_give_equal_keys(self) -> None:
        twin = type(self.space).from_settings(self.space.settings())
        for arch in self.archs():
            for site in self.space.sites:
                ours = self.space.block(site, self.space.picks(site, arch))
                theirs = twin.block(site, twin.picks(site, arch))
                assert (ours and ours.key) == (theirs and theirs.key)

    def _options(self, scope: tuple[int, ...]) -> list[tuple[int, ...]]:
        return list(product(*(range(len(self.space.decisions[i].options)) for i in scope)))


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
        assert _refused(self.plugin, {**self.options, "no_such_option": 1})

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
                    want = _run_onnx(graph, random_weights(graph, 0), x)
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
        want = _run_onnx(graph, random_weights(graph, 0), x)
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


class OracleConformance:
    """Laws of every latency oracle. A subclass gives one as `oracle`, an attribute or a property."""

    oracle: LatencyOracle
    n_archs = 40
    closure = 0.0  # relative error allowed to an expectation that is not in closed form

    def archs(self) -> NDArray[np.int64]:
        rng = np.random.default_rng(0)
        return np.array([self.oracle.space.sample(rng) for _ in range(self.n_archs)], np.int64)

    def probs(self, n: int = 3) -> NDArray[np.float64]:
        """(n, D, K) random choices: uniform, then ever more decided."""
        options = [len(d.options) for d in self.oracle.space.decisions]
        probs = np.zeros((n, len(options), max(options)))
        rng = np.random.default_rng(1)
        for i, d in product(range(n), range(len(options))):
            probs[i, d, : options[d]] = rng.dirichlet(np.full(options[d], 1.0 / (i + 1))) if i else 1 / options[d]
        return probs

    def test_latencies_are_finite_and_positive(self) -> None:
        latencies = self.oracle.latencies(self.archs())
        assert latencies.dtype == np.float64
        assert latencies.shape == (self.n_archs,)
        assert np.isfinite(latencies).all()
        assert (latencies > 0).all()

    def test_one_is_the_batch(self) -> None:
        archs = self.archs()
        one = [self.oracle.latency(tuple(int(i) for i in arch)) for arch in archs]
        np.testing.assert_allclose(one, self.oracle.latencies(archs), rtol=1e-9)

    def test_batches_of_any_integer_type_and_size(self) -> None:
        archs = self.archs()
        want = self.oracle.latencies(archs)
        for dtype in (np.uint8 if archs.max() < 256 else np.uint16, np.int32, np.uint64):
            np.testing.assert_array_equal(self.oracle.latencies(archs.astype(dtype)), want)
        np.testing.assert_allclose(self.oracle.latencies(archs[:1]), want[:1], rtol=1e-12)
        assert self.oracle.latencies(archs[:0]).shape == (0,)

    def test_one_hot_expectation_is_latency(self) -> None:
        archs = self.archs()
        expected = self.oracle.expected_latency(one_hot(self.oracle.space, archs))
        np.testing.assert_allclose(expected, self.oracle.latencies(archs), rtol=1e-9)

    def test_expectation_is_the_mean_over_samples(self) -> None:
        rng = np.random.default_rng(2)
        for probs in self.probs():
            columns = [
                rng.choice(len(d.options), 4000, p=row[: len(d.options)])
                for d, row in zip(self.oracle.space.decisions, probs, strict=True)
            ]
            found = self.oracle.latencies(np.stack(columns, axis=1))
            want, error = found.mean(), found.std(ddof=1) / math.sqrt(len(found))
            assert abs(float(self.oracle.expected_latency(probs)) - want) <= 5 * error + (self.closure + 1e-9) * want

    def test_expectation_takes_leading_dimensions(self) -> None:
        probs = self.probs(4)
        flat = self.oracle.expected_latency(probs)
        assert flat.shape == (4,)
        np.testing.assert_allclose(self.oracle.expected_latency(probs.reshape(2, 2, *probs.shape[1:])).ravel(), flat)
        wide = np.concatenate([probs, np.zeros((*probs.shape[:-1], 2))], axis=-1)
        np.testing.assert_allclose(self.oracle.expected_latency(wide), flat)

    def test_torch_gives_torch_and_the_gradient_is_the_finite_difference(self) -> None:
        import pytest

        torch = pytest.importorskip("torch", reason="the differentiable query: pip install 'latbench[search]'")
        probs = self.probs(2)
        leaf = torch.tensor(probs, requires_grad=True)
        expected = self.oracle.expected_latency(leaf)
        np.testing.assert_allclose(expected.detach().numpy(), self.oracle.expected_latency(probs), rtol=1e-9)
        single = self.oracle.expected_latency(torch.tensor(probs, dtype=torch.float32))
        assert single.dtype == torch.float32
        np.testing.assert_allclose(single.numpy(), expected.detach().numpy(), rtol=1e-4)
        expected.sum().backward()
        rng, scale = np.random.default_rng(3), float(expected.detach().mean())
        for at in map(tuple, rng.permutation(np.argwhere(probs > 0))[:20].tolist()):
            step = np.zeros_like(probs)
            step[at] = 1e-5
            up, down = self.oracle.expected_latency(probs + step), self.oracle.expected_latency(probs - step)
            slope = float((up - down).sum()) / 2e-5
            assert abs(float(leaf.grad[at]) - slope) <= 1e-5 * scale + 1e-4 * abs(slope)

    def test_what_is_no_architecture_is_refused(self) -> None:
        archs = self.archs()[:2]
        for wrong in (archs[:, :-1], archs + 1000, archs - 1000, archs.astype(float), archs[0]):
            assert _refused(self.oracle.latencies, wrong)
        arch = tuple(int(i) for i in archs[0])
        for one in (arch[:-1], (*arch, 0), (1000, *arch[1:]), (-1, *arch[1:])):
            assert _refused(self.oracle.latency, one)
        assert _refused(self.oracle.expected_latency, self.probs()[:, :-1])

    def test_intervals_hold_the_prediction_and_grow_with_confidence(self) -> None:
        archs = self.archs()
        latencies, widths = self.oracle.latencies(archs), []
        for confidence in (0.5, 0.8, 0.9):
            found = self.oracle.interval(archs, confidence)
            if found is None:
                continue
            low, high = found
            assert (low > 0).all()
            assert ((low <= latencies) & (latencies <= high)).all()
            widths.append(high - low)
        assert all((b >= a - 1e-12).all() for a, b in pairwise(widths))

    def test_sources_are_named(self) -> None:
        for arch in self.archs():
            sources = self.oracle.sources(tuple(int(i) for i in arch))
            assert set(sources) <= set(SOURCES) - {"missing"}
            assert sum(sources.values()) > 0

    def test_a_model_is_the_same_from_its_file(self, tmp_path: Path) -> None:
        import pytest

        if not hasattr(self.oracle, "name"):
            pytest.skip("this oracle is not kept in a file")
        from latbench.oracle import store

        store.save(tmp_path / "model.npz", cast(Model, self.oracle), {"note": 1})
        twin, archs = store.load(tmp_path / "model.npz"), self.archs()
        assert twin.notes == {"note": 1}
        assert twin.oracle.space == self.oracle.space
        assert twin.oracle.provenance == self.oracle.provenance
        np.testing.assert_allclose(twin.oracle.latencies(archs), self.oracle.latencies(archs), rtol=1e-12)
        for ours, theirs in zip(self.oracle.interval(archs) or (), twin.oracle.interval(archs) or (), strict=True):
            np.testing.assert_allclose(theirs, ours, rtol=1e-12)


class FactorOracleConformance(OracleConformance):
    """Laws of an oracle that is a sum over sites."""

    oracle: FactorOracle

    def test_no_sampled_architecture_is_faster_than_the_fastest(self) -> None:
        arch, ms = self.oracle.fastest()
        assert ms == self.oracle.latency(arch)
        rng = np.random.default_rng(4)
        sampled = np.array([self.oracle.space.sample(rng) for _ in range(500)], np.int64)
        assert self.oracle.latencies(sampled).min() >= ms - 1e-12 * abs(ms)
        best = np.array(arch)
        n_options = [len(d.options) for d in self.oracle.space.decisions]
        near = [np.where(np.arange(len(best)) == d, i, best) for d, n in enumerate(n_options) for i in range(n)]
        assert self.oracle.latencies(np.array(near)).min() >= ms - 1e-12 * abs(ms)

    def test_a_settled_decision_no_longer_matters(self) -> None:
        archs = self.archs()
        for d, decision in enumerate(self.oracle.space.decisions):
            k = len(decision.options) - 1
            settled = self.oracle.condition({d: k})
            fixed = archs.copy()
            fixed[:, d] = k
            np.testing.assert_allclose(settled.latencies(archs), self.oracle.latencies(fixed), rtol=1e-9)

    def test_settling_by_probabilities_is_the_expectation(self) -> None:
        probs = self.probs(1)[0]
        rows = {d: probs[d, : len(decision.options)] for d, decision in enumerate(self.oracle.space.decisions)}
        archs = self.archs()[:5]
        half = {d: row for d, row in rows.items() if d % 2}
        mixed = one_hot(self.oracle.space, archs)
        for d in half:
            mixed[:, d] = probs[d]
        np.testing.assert_allclose(
            self.oracle.condition(half).latencies(archs), self.oracle.expected_latency(mixed), rtol=1e-9
        )


def _refused(call: Callable[..., object], *args: object) -> bool:
    try:
        call(*args)
    except UsageError:
        return True
    return False


def _run_torch(graph: Graph, weights: Weights, x: NDArray[np.float32]) -> NDArray[np.float32]:
    import torch

    from latbench.graph.torch import to_module

    with torch.inference_mode():
        output: NDArray[np.float32] = to_module(graph, weights)(torch.from_numpy(x)).numpy()
    return output


def _run_onnx(graph: Graph, weights: Weights, x: NDArray[np.float32]) -> NDArray[np.float32]:
    import onnxruntime

    from latbench.graph.onnx import to_onnx

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(to_onnx(graph, weights), options, ["CPUExecutionProvider"])
    (output,) = session.run(None, {graph.inputs[0][0]: x})
    return np.asarray(output, np.float32)


def _tiny_network(classes: int = 10) -> Graph:
    """A convolution, a branch and its sum, a pooled classifier."""
    b = GraphBuilder()
    x = b.input("x", (2, 3, 16, 16))
    x = b.add(Conv2d(3, 16, 3, stride=2, padding=1, bias=True), x, name="stem")
    y = b.add(ReLU(), b.add(Conv2d(16, 16, 3, padding=1, groups=16, bias=True), x, name="depthwise"), name="relu")
    x = b.add(Flatten(), b.add(AdaptiveAvgPool2d(), b.add(Add(), x, y, name="sum"), name="pool"), name="flat")
    return b.build(b.add(Linear(16, classes), x, name="fc"))
