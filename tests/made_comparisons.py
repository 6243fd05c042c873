"""Pairs of tables with a known change, for the tests of comparisons."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from latbench.tables import LatencyTable, Provenance, Row

PROVENANCE = Provenance("cpu", "Xeon", "onnxruntime", versions={"onnxruntime": "1.20"}, policy={"rounds": 2, "seed": 0})


def row(key: str, medians: list[float], *, flags: list[str] | None = None, probes: list[float] | None = None) -> Row:
    """Blocks of three samples around each median, in processes of their own."""
    samples = tuple(m * f for m in medians for f in (0.99, 1.0, 1.01))
    n = len(medians)
    return Row(
        key, "block", f"s{key}", block_type="conv", latency_ms=float(np.median(medians)), clock="host",
        samples_ms=samples, block_sizes=(3,) * n, block_run=tuple(range(n)), block_flags=tuple(flags or [""] * n),
        probes_us=tuple(p for p in probes or [] for _ in (0, 1)), probe_at=(0, 3) * len(probes or []),
    )  # fmt: skip


def table(*rows: Row, **conditions: object) -> LatencyTable:
    return LatencyTable.from_rows(rows, replace(PROVENANCE, **conditions))  # type: ignore[arg-type]


def simulated(
    rng: np.random.Generator,
    n: int,
    ratio: float | NDArray[np.float64],
    spread: float = 0.006,
    *,
    slow_mode: float = 0.0,
) -> tuple[LatencyTable, LatencyTable]:
    """`n` rows of two blocks in each of two processes; NEW is `ratio` times OLD, of every row or of each its own.

    Each row has its own noise, each pass and each process a term of its own. With `slow_mode`, a third of the rows have
    two modes: four blocks of ten take longer by so much.
    """
    sd = spread * np.sqrt(5 / rng.chisquare(5, n))[:, None]
    two_modes = rng.random((n, 1)) < 1 / 3
    tables = []
    for factor in (1.0, ratio):
        terms = 0.0025 * rng.standard_normal((n, 1)) + 0.002 * rng.standard_normal((n, 2)).repeat(2, 1)
        modes = slow_mode * (two_modes & (rng.random((n, 4)) < 0.4))
        blocks = np.reshape(factor, (-1, 1)) * np.exp(terms + sd * rng.standard_normal((n, 4)) + modes)
        tables.append(table(*(row(f"k{i}", b.tolist()) for i, b in enumerate(blocks))))
    return tables[0], tables[1]


def slower(whole: LatencyTable, keys: set[str], factor: float) -> LatencyTable:
    """Every sample of some rows made longer."""
    rows = [
        replace(one, samples_ms=tuple(factor * s for s in one.samples_ms)) if one.key in keys else one
        for one in whole.rows()
    ]
    return LatencyTable.from_rows(rows, whole.provenance)
