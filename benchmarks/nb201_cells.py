"""What `nb201_search.py` knows of the cells of NAS-Bench-201: accuracies and latencies, and what of them a search may
know."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latbench.errors import UsageError
from latbench.importers import arrays
from latbench.importers.base import Source
from latbench.oracle.factors import Factor, FactorOracle
from latbench.oracle.learned import LearnedOracle
from latbench.oracle.sampling import d_optimal
from latbench.spaces.nasbench201 import NASBench201Space
from latbench.tables import LatencyTable
from searchers.accuracy_table import AccuracyTable

MEASURED, FINALISTS = 50, 5
LEVEL = 0.9  # of intervals: a limit is kept with 95 % confidence
SHAPE = (5,) * 6
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Cells:
    """Accuracies and latencies of every cell. An architecture's index is its row in ``archs``."""

    space: NASBench201Space
    table: LatencyTable  # of whole networks
    accuracy: AccuracyTable
    judge: AccuracyTable | None = None  # what searches look up, if not the accuracy

    @classmethod
    def read(cls, path: Path, accuracy: str, batch: int, judge: str | None = None) -> Cells:
        """The published figures of one accuracy and one batch size. Raises TableError."""
        source = Source(path, device="gtx_1080_ti", device_name="GTX 1080 Ti", framework="pytorch")
        settings = {"batch": batch, "num_classes": 100}
        table = arrays.read(source, NASBench201Space.name, settings, f"latency_ms_1080ti_{batch}", "ms")
        space = NASBench201Space.from_settings(settings)
        tables = [AccuracyTable.read(path, space, name, "percent") for name in (accuracy, judge) if name]
        return cls(space, table, *tables)

    @cached_property
    def archs(self) -> Ints:
        """(15625, 6)."""
        return np.stack(np.unravel_index(np.arange(self.space.size), SHAPE), axis=1).astype(np.int64)

    @cached_property
    def network(self) -> Ints:
        """(15625,) index of each architecture's canonical spelling."""
        canonical = [self.space.canonical(tuple(arch)) for arch in self.archs.tolist()]
        return np.ravel_multi_index(np.array(canonical).T, SHAPE).astype(np.int64)

    @cached_property
    def accuracies(self) -> Floats:
        """(15625,) of every spelling's network."""
        found = np.array([self.accuracy.evaluate(tuple(arch)) for arch in self.archs[self.networks].tolist()])
        return found[np.searchsorted(self.networks, self.network)]

    @cached_property
    def networks(self) -> Ints:
        """Indices of the canonical spellings."""
        return np.flatnonzero(self.network == np.arange(len(self.network)))

    @cached_property
    def latency_ms(self) -> Floats:
        """(15625,) of every spelling's network."""
        archs, ms = self.table.networks()
        found = np.full(len(self.archs), np.nan)
        found[np.ravel_multi_index(archs.T, SHAPE)] = ms
        return found[self.network]

    def oracle(self, values: Floats) -> FactorOracle:
        """(15625,) figures as an oracle."""
        return FactorOracle(
            self.space, (Factor("network", tuple(range(6)), values.reshape(SHAPE)),), self.table.provenance
        )

    def learned(self, seed: int, measured: int = MEASURED) -> tuple[Floats, Floats]:
        """(15625,) ms each: the lower and upper ends of the 90 % intervals of every network's latency after so many
        were measured, which are chosen as ``latbench profile --sampling d_optimal`` does.

        The rows' order in the file is no order of measuring, so no drift is looked for.
        """
        archs = d_optimal(self.space, measured, np.random.default_rng((seed, MEASURED)))
        chosen = self.network[np.ravel_multi_index(archs.T, SHAPE)]
        rows = np.ravel_multi_index(self.table.networks()[0].T, SHAPE)
        table = self.table.take(np.flatnonzero(np.isin(rows, chosen)))
        ends = LearnedOracle.fit(table, drift=False).interval(self.archs[self.networks], LEVEL)
        if ends is None:
            raise UsageError(f"{measured} networks are too few for an interval")
        found = np.zeros((2, len(self.archs)))
        found[:, self.networks] = ends
        lower, upper = found[:, self.network]
        return lower, upper


@dataclass(frozen=True, eq=False)
class Knowledge:
    """What a search may know of latencies: (15625,) ms each."""

    asked: Floats  # what its oracle says
    surely: Floats  # what a network takes at most
    finalists: int = 0  # measurements that are left for the best of what it finds

    @classmethod
    def of(cls, cells: Cells, oracle: str, seed: int) -> Knowledge:
        if oracle == "true":
            return cls(cells.latency_ms, cells.latency_ms)
        if oracle == "learned":
            _, upper = cells.learned(seed)
            return cls(upper, upper)
        lower, upper = cells.learned(seed, MEASURED - FINALISTS)
        return cls(lower, upper, FINALISTS)
