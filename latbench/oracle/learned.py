"""``LearnedOracle``: whole networks predicted from a few measured ones, blocks never looked up.

For 10 to some hundred measured networks of any space, where blocks were not measured or do not add up. A Gaussian
process on the decisions and on physical features of the graphs (``learned_gp``); where a runtime may drop dead
operations, one process per account of what runs, weighted by their evidence. One method and one set of priors for all
devices. Intervals are conformal on predictions for networks left out, scaled by the process's own doubt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from latbench.errors import TableError, UsageError
from latbench.oracle import learned_gp as gp
from latbench.oracle.base import Archs, Floats, P, check_archs, space_of
from latbench.oracle.conformal import Conformal
from latbench.oracle.factors import MAX_TABULATED, FactorOracle, in_full
from latbench.oracle.features import views
from latbench.oracle.learned_compiled import Compiled, compiled, raised
from latbench.oracle.learned_features import scaler
from latbench.provenance import Provenance
from latbench.spaces.base import Arch, SearchSpace
from latbench.tables import LatencyTable

MIN_NETWORKS = 3
MAX_REFITTED = 100  # measurements: with more, hyperparameters are not found anew for each fold left out
FOLDS = 10
_CHUNK = 2048  # architectures at a time


@dataclass(frozen=True, eq=False)
class LearnedOracle:
    """A fitted prediction. A value.

    ``expected_latency`` is exact where the space is small (NAS-Bench-201), else in all terms but the smooth one
    (``learned_compiled``): exact at one-hot, within 1 % where every choice is open.
    """

    space: SearchSpace
    provenance: Provenance
    processes: tuple[gp.Process, ...]
    calibration: Conformal | None = None
    calibration_in_order: Conformal | None = None  # where a network's place in the measuring order is given
    unit: str = "ms"

    name: ClassVar[str] = "learned"

    @classmethod
    def fit(cls, table: LatencyTable, *, drift: bool = True, calibrated: bool = True) -> LearnedOracle:
        """From the table's measured networks, at least 3.

        `drift`: where every one states its place in the measuring order, slow drift along it is told apart from the
        networks' own latency. `calibrated`: with intervals, which are most of the work. Raises TableError where there
        are too few networks or a latency is not positive.
        """
        space = space_of(table.provenance)
        archs, latency_ms = table.networks()
        if len(archs) < MIN_NETWORKS:
            raise TableError(
                f"the table has {len(archs)} measured networks that state their architecture, and learned needs"
                f" {MIN_NETWORKS} or more: latbench profile --networks N"
            )
        if (latency_ms <= 0).any():
            raise TableError(f"network {int((latency_ms <= 0).argmax())} has latency 0: measure it again or drop it")
        order = _order(table) if drift else None
        measured = gp.Measured(check_archs(space, archs), latency_ms, order)
        return cls.of(space, table.provenance, measured, calibrated=calibrated)

    @classmethod
    def of(
        cls, space: SearchSpace, provenance: Provenance, measured: gp.Measured, *, calibrated: bool = True
    ) -> LearnedOracle:
        """``fit`` on measurements that are at hand."""
        made = cls(space, provenance, tuple(gp.fit(space, view, measured) for view in views(space)))
        if not calibrated:
            return made
        plain, in_order = _calibrate(made)
        return replace(made, calibration=plain, calibration_in_order=in_order)

    def seen(self, arch: Arch, latency_ms: float) -> LearnedOracle:
        """Fitted anew with one more measured network. What the new fit does not explain of it is taken to hold for all:
        a device that is slower now than it was."""
        again = self._with(arch, latency_ms, calibrated=False)
        return self._with(arch, latency_ms, by=latency_ms / again.latency(arch))

    def _with(self, arch: Arch, latency_ms: float, *, by: float = 1.0, calibrated: bool = True) -> LearnedOracle:
        """Of one more network, the others' latencies times `by`."""
        known = self.processes[0].measured
        order = None if known.order is None else np.append(known.order, 2 * known.order.max() + 1)  # long after
        archs = np.vstack([known.archs, check_archs(self.space, np.array([arch], np.int64))])
        more = gp.Measured(archs, np.append(by * known.latency_ms, latency_ms), order)
        return LearnedOracle.of(self.space, self.provenance, more, calibrated=calibrated)

    # -- queries

    def latency(self, arch: Arch) -> float:
        """One option index per decision -> ms."""
        self.space.check(tuple(arch))
        return float(self.latencies(np.array([arch], np.int64))[0])

    def latencies(self, archs: Archs, order: Floats | None = None) -> Floats:
        """(N, D) option indices -> (N,) ms.

        `order`: (N,) where in the measuring order, to include the drift there; without it there is none. Raises
        UsageError where the fit knew no order.
        """
        array = check_archs(self.space, archs)
        if order is not None:
            return self._predict(array, self._in_order(array, order))[0]
        if self.tabulated is not None:
            return self.tabulated.latencies(array)
        return self._in_chunks(array, self._sum)

    def expected_latency(self, probs: P) -> P:
        """(..., D, K) probabilities -> (...) ms; see the class for where it is exact."""
        if self.tabulated is not None:
            return self.tabulated.expected_latency(probs)
        p: Any = probs if hasattr(probs, "new_tensor") else np.asarray(probs, np.float64)
        sizes = [len(decision.options) for decision in self.space.decisions]
        if p.ndim < 2 or p.shape[-2] != len(sizes) or p.shape[-1] < max(sizes):
            raise UsageError(
                f"{self.space.name}: probabilities must be (..., {len(sizes)}, {max(sizes)}), got {tuple(p.shape)}"
            )
        exact = p.double() if hasattr(p, "double") else p  # coefficients of opposite signs cancel
        found = sum(share * c.expected(exact) for share, c in zip(self.shares, self._compiled, strict=True))
        found = raised(found, self._floor_ms)
        return cast(P, found.to(p.dtype) if hasattr(p, "new_tensor") else found)

    def interval(
        self, archs: Archs, confidence: float = 0.9, order: Floats | None = None
    ) -> tuple[Floats, Floats] | None:
        """(N, D) -> (N,) and (N,) ms, conformal, wider where the process knows less; `order` as in ``latencies``."""
        array = check_archs(self.space, archs)
        places = None if order is None else self._in_order(array, order)
        calibration = self.calibration if order is None else self.calibration_in_order
        if calibration is None:
            return None
        value, doubt = self._predict(array, places, deviation=True)
        return calibration.interval(self.latencies(array, order) if len(array) else value, confidence, doubt)

    def sources(self, arch: Arch) -> Mapping[str, int]:
        """Always one fitted figure."""
        self.space.check(tuple(arch))
        return {"fitted": 1}

    @property
    def shares(self) -> Floats:
        """(P,) what each process's account counts: its share of the evidence."""
        evidence = np.array([p.log_evidence for p in self.processes])
        weights = np.exp(evidence - evidence.max())
        shares: Floats = weights / weights.sum()
        return shares

    # -- kept in a file

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """The measurements and the hyperparameters; the rest follows from them."""
        measured = self.processes[0].measured
        arrays = {
            "archs": measured.archs,
            "latency_ms": measured.latency_ms,
            "theta": np.array([p.theta for p in self.processes]),
            "trust": np.array([p.trust for p in self.processes]),
            "log_evidence": np.array([p.log_evidence for p in self.processes]),
        }
        if measured.order is not None:
            arrays["order"] = measured.order
            arrays["level"] = np.array([p.level for p in self.processes])
        for name in ("calibration", "calibration_in_order"):
            if getattr(self, name) is not None:
                arrays[name] = np.array(getattr(self, name).scores)
        return arrays, {"views": [p.scaler.view.name for p in self.processes]}

    @classmethod
    def from_state(
        cls, space: SearchSpace, provenance: Provenance, arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]
    ) -> LearnedOracle:
        """Inverse of ``state``. Raises KeyError where something is missing."""
        measured = gp.Measured(arrays["archs"], arrays["latency_ms"], arrays.get("order"))
        fields = (arrays[name] for name in ("theta", "trust", "log_evidence"))
        levels = arrays.get("level", [None] * len(meta["views"]))
        processes = tuple(
            gp.Process(scaler(space, view), measured, theta, trust, float(evidence), level)
            for view, theta, trust, evidence, level in zip(meta["views"], *fields, levels, strict=True)
        )
        scores = [arrays.get(name) for name in ("calibration", "calibration_in_order")]
        plain, in_order = (None if s is None else Conformal(tuple(s.tolist())) for s in scores)
        return cls(space, provenance, processes, plain, in_order)

    # -- inside

    @cached_property
    def _floor_ms(self) -> float:
        """A sum of terms may fall below what any network takes; a tenth of the fastest measured is the least."""
        return 0.1 * float(self.processes[0].measured.latency_ms.min())

    @cached_property
    def _compiled(self) -> tuple[Compiled, ...]:
        return tuple(compiled(p) for p in self.processes)

    @cached_property
    def tabulated(self) -> FactorOracle | None:
        """Every architecture of a small space in one factor."""
        if self.space.size > MAX_TABULATED:
            return None
        every = in_full(self.space, lambda archs: self._in_chunks(archs, lambda rows: self._predict(rows, None)[0]))
        return FactorOracle(self.space, (every,), self.provenance)

    def _sum(self, archs: NDArray[np.int64]) -> Floats:
        found = sum(share * c.of(archs) for share, c in zip(self.shares, self._compiled, strict=True))
        return cast(Floats, raised(found, self._floor_ms))

    def _predict(
        self, archs: NDArray[np.int64], order: Floats | None, *, deviation: bool = False
    ) -> tuple[Floats, Floats]:
        """(N,) ms and, if asked, (N,) relative standard deviations."""
        value, variance = np.zeros(len(archs)), np.zeros(len(archs))
        for start in range(0, len(archs), _CHUNK):
            rows = slice(start, start + _CHUNK)
            for share, process in zip(self.shares, self.processes, strict=True):
                found, doubt = process.predict(archs[rows], None if order is None else order[rows], deviation=deviation)
                value[rows] += share * found
                if deviation:
                    variance[rows] += share * doubt**2
        return raised(value, self._floor_ms), np.sqrt(variance)

    def _in_chunks(self, archs: NDArray[np.int64], predict: Any) -> Floats:
        parts = [predict(archs[i : i + _CHUNK]) for i in range(0, len(archs), _CHUNK)]
        return np.concatenate([np.zeros(0), *parts])

    def _in_order(self, archs: NDArray[np.int64], order: Floats) -> Floats:
        places = np.asarray(order, np.float64)
        if places.shape != (len(archs),):
            raise UsageError(f"the order must be one place per architecture, got shape {places.shape}")
        if self.processes[0].measured.order is None:
            raise UsageError("this oracle was fitted without a measuring order, so it knows no drift along one")
        return places


def _order(table: LatencyTable) -> Floats | None:
    """The rows' places in the measuring order, as ``LatencyTable.networks`` has them; None where one is missing."""
    frame = table.frame_of("kind", "arch", "status", "order")
    rows = frame[(frame["kind"] == "network") & frame["arch"].notna() & (frame["status"] == "ok")]
    order = rows["order"].to_numpy(np.float64, na_value=np.nan)
    return None if np.isnan(order).any() or len(np.unique(order)) < len(order) else order


def left_out(oracle: LearnedOracle) -> dict[bool, tuple[Floats, Floats]]:
    """Predictions for every measured network by fits without its fold: (N,) ms and (N,) relative deviations.

    By whether its place in the measuring order is given; True is there only where the fit knew the order.
    """
    measured = oracle.processes[0].measured
    n, ordered = len(measured), measured.order is not None
    fold = np.random.default_rng(0).permutation(np.arange(n) % min(n, FOLDS))
    found = {kind: (np.zeros(n), np.ones(n)) for kind in (False, True)[: 1 + ordered]}
    for out in range(min(n, FOLDS)):
        kept, left = np.flatnonzero(fold != out), np.flatnonzero(fold == out)
        part = measured.take(kept)
        if n <= MAX_REFITTED:
            processes = tuple(gp.fit(oracle.space, p.scaler.view, part) for p in oracle.processes)
        else:
            processes = tuple(p.without(left) for p in oracle.processes)
        without = replace(oracle, processes=processes)
        for kind, (value, doubt) in found.items():
            order = measured.take(left).order if kind else None
            value[left], doubt[left] = without._predict(measured.archs[left], order, deviation=True)
    return found


def _calibrate(oracle: LearnedOracle) -> tuple[Conformal, Conformal | None]:
    """The scores of what was left out, without and with its place in the order."""
    measured_ms = oracle.processes[0].measured.latency_ms
    plain, *in_order = (Conformal.of(value, measured_ms, doubt) for value, doubt in left_out(oracle).values())
    return plain, in_order[0] if in_order else None
