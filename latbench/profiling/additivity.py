"""How well block sums foretell measured networks: told with every table, not hidden."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from latbench.oracle.base import Floats
from latbench.oracle.capacity import Capacity
from latbench.spaces.base import FactoredSpace
from latbench.tables import LatencyTable


def additivity(table: LatencyTable, space: FactoredSpace, context: str) -> dict[str, Any] | None:
    """Errors of the sums of this context's blocks against the table's measured networks; nothing is fitted to them.

    mape, bias (shares of the measured latency), spearman, n, n_incomplete (networks with a block that has no row) and
    both series in ms; mape and bias once more for the half with fewer parameters and the half with more: a network
    whose weights do not fit the last-level cache is slower than its blocks, which do. Where chains were measured,
    "beyond_cache" holds the same with their excess added to the sums in context. None where no network can be summed.
    """
    blocks = table.select(kind="block", context=context).blocks_ms()
    archs, measured = table.networks()
    sums, kept, n_params = [], [], []
    for spelled, ms in zip(archs.tolist(), measured, strict=True):
        arch = space.canonical(tuple(spelled))  # blocks that nothing reads are not in the network
        parts = list(space.blocks(arch))
        if all(block.key in blocks for block in parts):
            sums.append(sum(blocks[block.key] for block in parts))
            kept.append((arch, ms))
            n_params.append(sum(block.n_params for block in parts))
    if not kept:
        return None
    of, ms = np.array([arch for arch, _ in kept], np.int64), np.array([ms for _, ms in kept])
    capacity = Capacity.of(table, space) if context == "sandwich" else None
    found = {"n_incomplete": len(measured) - len(kept), **_told(np.array(sums), ms, n_params)}
    if capacity is not None:
        found["beyond_cache"] = _told(np.array(sums) + capacity.excess(of), ms, n_params)
    return found


def _told(predicted_ms: Floats, measured_ms: Floats, n_params: list[int]) -> dict[str, Any]:
    """``errors`` of all, and of the halves by parameters."""
    halves = {}
    if len(n_params) >= 4:
        order = np.argsort(n_params, kind="stable")
        for name, part in zip(("fewer_params", "more_params"), np.array_split(order, 2), strict=True):
            found = errors(predicted_ms[part], measured_ms[part])
            halves[name] = {"mape": found["mape"], "bias": found["bias"]}
    return {**halves, **errors(predicted_ms, measured_ms)}


def errors(predicted_ms: Floats, measured_ms: Floats) -> dict[str, Any]:
    """mape and bias as shares of the measured latency, spearman, n, and both series.

    spearman is None below three networks, and where a series is constant.
    """
    relative = predicted_ms / measured_ms - 1
    spearman = None
    if len(measured_ms) > 2:
        ranked = float(pd.Series(predicted_ms).rank().corr(pd.Series(measured_ms).rank()))
        spearman = ranked if np.isfinite(ranked) else None
    return {
        "n": len(measured_ms),
        "mape": float(np.abs(relative).mean()),
        "bias": float(relative.mean()),
        "spearman": spearman,
        "predicted_ms": predicted_ms.tolist(),
        "measured_ms": measured_ms.tolist(),
    }
