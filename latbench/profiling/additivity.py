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
    both series in ms. None where no network can be summed.
    """
    blocks = table.select(kind="block", context=context).blocks_ms()
    archs, measured = table.networks()
    predicted = []
    kept = []
    for arch, ms in zip(archs, measured, strict=True):
        keys = [block.key for block in space.blocks(tuple(int(i) for i in arch))]
        if all(key in blocks for key in keys):
            predicted.append(sum(blocks[key] for key in keys))
            kept.append(ms)
    if not kept:
        return None
    return {"n_incomplete": len(measured) - len(kept), **errors(np.array(predicted), np.array(kept))}


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
