"""The laws of oracles."""

from __future__ import annotations

import math
from itertools import pairwise, product
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from latbench.oracle.base import SOURCES, LatencyOracle, Model, one_hot
from latbench.oracle.factors import FactorOracle
from latbench.testing.running import refused


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
            assert refused(self.oracle.latencies, wrong)
        arch = tuple(int(i) for i in archs[0])
        for one in (arch[:-1], (*arch, 0), (1000, *arch[1:]), (-1, *arch[1:])):
            assert refused(self.oracle.latency, one)
        assert refused(self.oracle.expected_latency, self.probs()[:, :-1])

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
