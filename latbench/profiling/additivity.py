"""How well block sums foretell measured networks: told with every table, not hidden."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from latbench.spaces.base import FactoredSpace
from latbench.tables import LatencyTable


def additivity(table: LatencyTable, space: FactoredSpace, context: str) -> dict[str, Any] | None:
    """Errors of the sums of this context's blocks against the table's measured networks; nothing is fitted.

    mape, bias (shares of the measured latency), spearman, n, n_incomplete (networks with a block that has no row) and
    both series in ms; mape and bias once more for the half with fewer parameters and the half with more: a network
    whose weights do not fit the last-level cache is slower than its blocks, which do. None where no network can be
    summed.
    """
    blocks = table.select(kind="block", context=context).blocks_ms()
    archs, measured = table.networks()
    predicted, kept, n_params = [], [], []
    for arch, ms in zip(archs, measured, strict=True):
        keys = [block.key for block in space.blocks(tuple(int(i) for i in arch))]
        if all(key in blocks for key in keys):
            predicted.append(sum(blocks[key] for key in keys))
            kept.append(ms)
            n_params.append(space.network(tuple(int(i) for i in arch)).n_params)
    if not kept:
        return None
    both = np.array(predicted), np.array(kept)
    order = np.argsort(n_params, kind="stable")
    halves = {}
    if len(kept) >= 4:
        for name, part in zip(("fewer_params", "more_params"), np.array_split(order, 2), strict=True):
            found = errors(both[0][part], both[1][part])
            halves[name] = {"mape": found["mape"], "bias": found["bias"]}
    return {"n_incomplete": len(measured) - len(kept), **halves, **errors(*both)}


def errors(predicted_ms: NDArray[np.float64], measured_ms: NDArray[np.float64]) -> dict[str, Any]:
    """mape and bias as shares of the measured latency, spearman (None below three networks), n, and both series."""
    relative = predicted_ms / measured_ms - 1
    spearman = None
    if len(measured_ms) > 2:
        spearman = float(pd.Series(predicted_ms).rank().corr(pd.Series(measured_ms).rank()))
    return {
        "n": len(measured_ms),
        "mape": float(np.abs(relative).mean()),
        "bias": float(relative.mean()),
        "spearman": spearman,
        "predicted_ms": predicted_ms.tolist(),
        "measured_ms": measured_ms.tolist(),
    }
