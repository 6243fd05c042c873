"""A small model for the tests of what surrounds models: non-negative least squares on one-hot choices."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from scipy.optimize import nnls

from latbench.errors import TableError, UsageError
from latbench.oracle.base import one_hot, space_of
from latbench.oracle.conformal import Conformal
from latbench.oracle.factors import Factor, FactorOracle
from latbench.tables import LatencyTable


class LinearOracle(FactorOracle):
    """Fits whole networks, four at least; intervals by cross-validation."""

    name: ClassVar[str] = "linear"

    @classmethod
    def fit(cls, table: LatencyTable, *, ridge: float = 1e-3, note: str | None = None) -> LinearOracle:
        if ridge <= 0:
            raise UsageError(f"linear: ridge must be above 0, got {ridge}")
        space, (archs, measured) = space_of(table.provenance), table.networks()
        if len(measured) < 4:
            raise TableError(f"linear needs 4 measured networks, the table has {len(measured)}")
        x = one_hot(space, archs)
        fold = np.arange(len(measured)) % 4
        kept_out = np.empty(len(measured))
        for i in range(4):
            kept_out[fold == i] = _predict(x[fold == i], *_solve(x[fold != i], measured[fold != i], ridge))
        mean, weights = _solve(x, measured, ridge)
        factors = [Factor("all", (), np.array(mean))]
        for d, decision in enumerate(space.decisions):
            factors.append(Factor(decision.name, (d,), weights[d, : len(decision.options)]))
        return cls(space, tuple(factors), table.provenance, calibration=Conformal.of(kept_out, measured))


def _solve(x, y, ridge):
    """The constant, at least half the smallest latency, and (D, K) weights, none below 0: latencies stay positive."""
    flat = x.reshape(len(x), -1)
    rows = np.vstack([np.c_[np.ones(len(x)), flat], np.c_[np.zeros(flat.shape[1]), np.eye(flat.shape[1]) * ridge]])
    floor = y.min() / 2
    weights = nnls(rows, np.r_[y - floor, np.zeros(flat.shape[1])])[0]
    return floor + weights[0], weights[1:].reshape(x.shape[1:])


def _predict(x, mean, weights):
    return mean + (x * weights).sum(axis=(1, 2))


def register(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installs it as a third party's plug-in would be: a distribution in `folder`, found on ``sys.path``."""
    info = folder / "linear_oracle-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: linear-oracle\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[latbench.oracles]\nlinear = linear_oracle:LinearOracle\n")
    monkeypatch.syspath_prepend(folder)
