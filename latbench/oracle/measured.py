"""``MeasuredOracle``: asks the device, and remembers. The oracle of spaces that do not factor, and of last resort."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from latbench.errors import MeasurementError, UsageError
from latbench.oracle.base import Archs, Floats, P, check_archs
from latbench.provenance import Provenance
from latbench.spaces.base import Arch, SearchSpace
from latbench.tables import LatencyTable

CONFIDENCE = 0.95  # of the intervals in a table


class MeasuredOracle:
    """Every answer is a measurement of the whole network, taken once.

    `measure(archs)` gives a table that holds their network rows; `held` is one that was made before. An expectation is
    taken over every architecture that has a probability, so it is for choices that are nearly made: UsageError beyond
    `max_support` architectures. Raises MeasurementError, in the device's words, where a network could not be measured.
    """

    unit = "ms"

    def __init__(
        self,
        space: SearchSpace,
        measure: Callable[[Sequence[Arch]], LatencyTable],
        *,
        held: LatencyTable | None = None,
        provenance: Provenance | None = None,
        max_support: int = 64,
    ) -> None:
        self.space, self.measure, self.max_support = space, measure, max_support
        self._provenance = provenance
        self._known: dict[str, tuple[float, float, float]] = {}  # network key -> ms, lower and upper end
        self._keys: dict[Arch, str] = {}
        if held is not None:
            self._remember(held)

    @property
    def provenance(self) -> Provenance:
        """Of the table that remembers; without one yet, what was given."""
        return self._provenance or Provenance("", "", "", space=self.space.name, settings=self.space.settings())

    def latency(self, arch: Arch) -> float:
        """One option index per decision -> ms, measured if it must be."""
        self.space.check(tuple(arch))
        return float(self._ask(np.array([arch], np.int64))[0, 0])

    def latencies(self, archs: Archs) -> Floats:
        """(N, D) option indices -> (N,) ms; what is not known is measured in one session."""
        return self._ask(check_archs(self.space, archs))[:, 0]

    def interval(self, archs: Archs, confidence: float = 0.9) -> tuple[Floats, Floats] | None:
        """(N, D) -> (N,) and (N,) ms: the measurements' own intervals, restated for this confidence."""
        if not 0 < confidence < 1:
            raise UsageError(f"a confidence lies between 0 and 1, got {confidence}")
        ms, low, high = self._ask(check_archs(self.space, archs)).T
        scale = float(ndtri((1 + confidence) / 2) / ndtri((1 + CONFIDENCE) / 2))
        return ms - scale * (ms - low), ms + scale * (high - ms)

    def sources(self, arch: Arch) -> Mapping[str, int]:
        """One measurement."""
        self.space.check(tuple(arch))
        return {"measured": 1}

    def expected_latency(self, probs: P) -> P:
        """(..., D, K) probabilities -> (...) ms, over every architecture of a probability above 0."""
        p: Any = probs if hasattr(probs, "new_tensor") else np.asarray(probs, np.float64)
        n_options = [len(d.options) for d in self.space.decisions]
        if p.ndim < 2 or p.shape[-2] != len(n_options) or p.shape[-1] < max(n_options, default=0):
            raise UsageError(f"{self.space.name}: probabilities must be (..., {len(n_options)}, {max(n_options)})")
        lead = tuple(p.shape[:-2])
        flat = p.reshape(-1, *p.shape[-2:])
        totals = [self._expected(flat[i], n_options) for i in range(flat.shape[0])]
        if not hasattr(probs, "new_tensor"):
            return cast(P, np.array(totals, np.float64).reshape(lead))
        total = p.new_zeros(len(totals))
        for i, value in enumerate(totals):
            total[i] = value
        return cast(P, total.reshape(lead))

    def _expected(self, p: Any, n_options: Sequence[int]) -> Any:
        """(D, K) -> a scalar."""
        certain = (p.detach() if hasattr(p, "detach") else p) != 0
        choices = [[k for k in range(n) if bool(certain[d, k])] for d, n in enumerate(n_options)]
        support = int(np.prod([len(ks) for ks in choices], dtype=np.float64))
        if support > self.max_support:
            raise UsageError(
                f"an expectation over {support} architectures would measure them all (at most {self.max_support}); fit "
                "an oracle to a table instead: latbench fit"
            )
        archs = np.array(list(product(*choices)), np.int64).reshape(support, len(n_options))
        total: Any = 0.0
        for arch, ms in zip(archs, self._ask(archs)[:, 0], strict=True):
            weight: Any = 1.0
            for d, k in enumerate(arch):
                weight = weight * p[d, int(k)]
            total = total + weight * float(ms)
        return total

    def _ask(self, archs: NDArray[np.int64]) -> Floats:
        """(N, D) -> (N, 3): ms and the ends of its interval."""
        asked: list[Arch] = [tuple(int(i) for i in arch) for arch in archs]
        for arch in asked:
            if arch not in self._keys:
                self._keys[arch] = self.space.network(arch).key
        wanted = {self._keys[arch]: arch for arch in asked if self._keys[arch] not in self._known}
        if wanted:
            table = self.measure(list(wanted.values()))
            self._remember(table)
            for key in wanted.keys() - self._known.keys():
                raise MeasurementError(str(table.missing_entry(key)))
        return np.array([self._known[self._keys[arch]] for arch in asked], np.float64).reshape(-1, 3)

    def _remember(self, table: LatencyTable) -> None:
        self._provenance = table.provenance
        frame = table.select(kind="network", status="ok").frame
        ms = frame["latency_ref_ms"].fillna(frame["latency_ms"])
        low, high = frame["ci_low_ms"].fillna(ms), frame["ci_high_ms"].fillna(ms)
        for key, *figures in zip(frame["key"], ms, low, high, strict=True):
            self._known[key] = (float(figures[0]), float(figures[1]), float(figures[2]))
