"""The conformance suite of searchers, shipped so that third parties hold theirs to the laws that ours keep.

Subclass in a test module, name the class ``Test...``, and pytest collects the laws::

    class TestMine(SearcherConformance):
        searcher = Mine(epochs=2)
        space = MobileNetV1Space(resolution=8, levels=2, num_classes=10)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from latbench.backends.roofline import OPTIONS, kernels
from latbench.oracle.base import Constraint
from latbench.oracle.factors import FactorOracle
from latbench.oracle.lut import LutOracle
from latbench.spaces.base import FactoredSpace
from latbench.tables import LatencyTable, Provenance, Row
from searchers.base import Problem, Reporter, Scalar, Searcher, SearchResult
from searchers.options import from_settings, settings_of
from searchers.results import RESULT, read_result


def roofline_table(space: FactoredSpace) -> LatencyTable:
    """Every block of a space on the analytic device."""
    options = {name: float(value) for name, value in OPTIONS.items()}
    rows = [
        Row.of(
            block,
            "block",
            space=space.name,
            latency_ms=sum(layer.ms for layer in kernels(block, options)),
            origin="simulated",
        )
        for block in space.all_blocks().values()
    ]
    provenance = Provenance(
        device="cpu", device_name="roofline", backend="roofline", space=space.name, settings=space.settings()
    )
    return LatencyTable.from_rows(rows, provenance)


class InterruptedRunError(Exception):
    """What a ``Watch`` raises to end a run."""


class Watch:
    """A ``Reporter`` that counts steps, and ends the run after `limit` of them."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit, self.steps = limit, 0

    def advance(self, done: int, total: int, text: str) -> None:
        """Raises InterruptedRunError at the limit."""
        self.steps += 1
        if self.steps == self.limit:
            raise InterruptedRunError

    def epoch(self, history: Sequence[Mapping[str, Scalar]]) -> None:
        """Nothing."""


class SearcherConformance:
    """Laws of every searcher. A subclass gives quick options, a small factored space, and a share of the range between
    the fastest and the largest latency as its target. Trains on one thread, where floating-point sums have one order.
    """

    searcher: Searcher
    space: FactoredSpace
    data = "digits"
    max_images = 160
    share = 0.4
    interrupt_after = 3  # steps

    def oracle(self) -> FactorOracle:
        """Of the space, by name: it must be kept in a file."""
        return LutOracle.fit(roofline_table(self.space))

    def problem(self, out: Path, share: float | None = None) -> Problem:
        """At a target between the fastest network and the slowest of 200 sampled."""
        oracle = self.oracle()
        share = self.share if share is None else share
        return Problem((Constraint(oracle, self.between(oracle, share)),), self.data, out, max_images=self.max_images)

    def between(self, oracle: FactorOracle, share: float) -> float:
        """The oracle's figure at this share of its range."""
        rng = np.random.default_rng(0)
        high = oracle.latencies(np.array([self.space.sample(rng) for _ in range(200)], np.int64)).max()
        low = oracle.fastest()[1]
        return float(low + share * (high - low))

    def run(self, problem: Problem, reporter: Reporter | None = None) -> SearchResult:
        """One search on one thread."""
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self.searcher.search(problem, reporter=reporter)
        finally:
            torch.set_num_threads(threads)

    def test_keeps_its_target_and_its_folder_says_all(self, tmp_path: Path) -> None:
        problem = self.problem(tmp_path)
        watch = Watch()
        result = self.run(problem, watch)
        self.space.check(result.arch)
        assert problem.satisfied(result.arch)
        assert result.predicted == problem.predicted(result.arch)
        assert result.target == problem.targets
        assert np.isfinite(result.score)
        assert watch.steps > 0
        assert result.history
        found = read_result(tmp_path)
        assert found.result == result
        assert (found.problem.space, found.problem.targets, found.problem.data) == (
            self.space,
            problem.targets,
            self.data,
        )
        assert from_settings(type(self.searcher), found.settings) == self.searcher
        self._check_network(result)

    def _check_network(self, result: SearchResult) -> None:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(result.network), providers=["CPUExecutionProvider"])
        graph = self.space.network(result.arch)
        (output,) = session.run(None, {"x": np.zeros(self.space.input_shape, self.space.dtype)})
        assert output.shape == graph.shapes[graph.outputs[0]]
        assert np.isfinite(output).all()

    def test_an_infeasible_target_is_refused_before_any_training(self, tmp_path: Path) -> None:
        import pytest

        from latbench.errors import InfeasibleTargetError

        oracle = self.oracle()
        fastest, ms = oracle.fastest()
        problem = Problem((Constraint(oracle, 0.99 * ms),), self.data, tmp_path / "out", max_images=self.max_images)
        watch = Watch()
        with pytest.raises(InfeasibleTargetError, match=self.space.format_arch(fastest)):
            self.run(problem, watch)
        assert watch.steps == 0
        assert not (tmp_path / "out").exists()

    def test_an_interrupted_run_ends_as_an_uninterrupted_one(self, tmp_path: Path) -> None:
        import pytest

        from searchers import train

        whole = self.run(self.problem(tmp_path / "whole"))
        before = train.SAVE_EVERY_S
        train.SAVE_EVERY_S = 0.0
        try:
            for limit in (self.interrupt_after, self.interrupt_after + 1):
                with pytest.raises(InterruptedRunError):
                    self.run(self.problem(tmp_path / "parts"), Watch(limit))
            watch = Watch()
            parts = self.run(self.problem(tmp_path / "parts"), watch)
        finally:
            train.SAVE_EVERY_S = before
        assert _without_time(parts) == _without_time(whole)
        assert parts.network.read_bytes() == whole.network.read_bytes()
        again = Watch()
        repeated = self.run(self.problem(tmp_path / "parts"), again)
        assert again.steps == 0, "nothing is trained twice"
        assert _without_time(repeated) == _without_time(whole)

    def test_two_budgets_hold_together(self, tmp_path: Path) -> None:
        latency, params = self.oracle(), FactorOracle.counting(self.space, "n_params")
        constraints = tuple(Constraint(oracle, self.between(oracle, 0.5)) for oracle in (latency, params))
        problem = Problem(constraints, self.data, tmp_path, max_images=self.max_images)
        result = self.run(problem)
        assert problem.satisfied(result.arch)
        assert len(result.predicted) == 2
        assert read_result(tmp_path).problem.targets == problem.targets
        entries = json.loads((tmp_path / RESULT).read_text())["constraints"]
        assert [entry["unit"] for entry in entries] == ["ms", "parameters"]

    def test_options_are_told_apart(self) -> None:
        import pytest

        from latbench.errors import UsageError

        kind = type(self.searcher)
        assert from_settings(kind, json.loads(json.dumps(settings_of(self.searcher)))) == self.searcher
        with pytest.raises(UsageError, match="no option"):
            from_settings(kind, {"no such option": 1})


def _without_time(result: SearchResult) -> tuple[object, ...]:
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in result.history]
    return result.arch, result.predicted, result.score, history, result.notes
